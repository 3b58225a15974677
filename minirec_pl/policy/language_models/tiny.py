"""A small causal language model over item tokens, built from a config and stored as an ordinary Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from minirec_pl.policy.language_models.generation import eos_token_ids
from minirec_pl.policy.language_models.model_config import text_setting
from minirec_pl.policy.language_models.model_support import check_support
from minirec_pl.utils.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
_FROM_CATALOGUE = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")


def item_token(item_id: str) -> str:
    """The token that stands for an item in the vocabulary of a tiny model; angle brackets are percent-encoded.

    Example:
        >>> item_token("50"), item_token("a>b")
        ('<item:50>', '<item:a%3Eb>')
    """
    return f"<item:{item_id.replace('%', '%25').replace('<', '%3C').replace('>', '%3E')}>"


def item_tokenizer(item_ids: Sequence[str]) -> PreTrainedTokenizerFast:
    """A `word_tokenizer` with one token per item."""
    return word_tokenizer([item_token(item_id) for item_id in item_ids])


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of these words, each in angle brackets, after the special tokens."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL_TOKENS, *words]
    if len(set(words)) != len(words):
        raise InputError("the catalogue names an item twice: item ids must be unique")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=SPECIAL_TOKENS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"<[^<>]*>"), behavior="isolated")
    pad, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos
    )


def build_tiny(config: dict[str, Any], vocabulary: int) -> PreTrainedModel:
    """Builds an untrained causal language model.

    Args:
        config: `model_type` (default "llama") and the keys of that model's transformers config.
        vocabulary: number of tokens.

    Raises:
        InputError: if transformers does not know the model type or refuses a key or value, or a key follows from the
            catalogue.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    fixed = [key for key in _FROM_CATALOGUE if key in config]
    if fixed:
        raise InputError(f"--model.policy.config sets {', '.join(fixed)}, which the catalogue decides: leave it out")
    values = {"model_type": "llama", **config, "vocab_size": vocabulary}
    values |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    try:
        model_config = AutoConfig.for_model(values.pop("model_type"), **values)
        known = {"model_type", *type(model_config)().to_dict(), *type(model_config).attribute_map}
        unknown = sorted(set(config) - known)
        if unknown:
            raise InputError(
                f"--model.policy.config has keys that {type(model_config).__name__} does not know: {', '.join(unknown)}"
            )
        model: PreTrainedModel = AutoModelForCausalLM.from_config(model_config)  # type: ignore[no-untyped-call]
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"--model.policy.config is refused by transformers: {' '.join(str(error).split())}") from error
    return model


def check_model(model: Any, *, cache: bool = True) -> None:
    """Refuses a model that cannot be a policy.

    Args:
        model: a causal language model of transformers.
        cache: whether completions will share their prompt's keys and values.

    Raises:
        InputError: if it has no start or padding token, or `model_support` finds it wrong.
    """
    starts = (text_setting(model, "bos_token_id"), *eos_token_ids(model))
    if text_setting(model, "pad_token_id") is None or all(start is None for start in starts):
        raise InputError(
            f"{type(model).__name__} has no pad or no start token: set pad_token_id and bos_token_id in its config"
        )
    check_support(model, cache=cache)
