"""A small causal language model over item tokens, built from a config and stored as an ordinary Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from minirec_pl.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")


def item_token(item_id: str) -> str:
    """The token that stands for an item in the vocabulary of a tiny model."""
    return f"<item:{item_id}>"


def item_tokenizer(item_ids: Sequence[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with one token per item, after the special tokens."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL_TOKENS, *map(item_token, item_ids)]
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
        InputError: if transformers does not know the model type or refuses a value.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {"model_type": "llama", **config, "vocab_size": vocabulary}
    values |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    try:
        model_config = AutoConfig.for_model(values.pop("model_type"), **values)
    except Exception as error:
        raise InputError(f"policy.config is refused by transformers: {' '.join(str(error).split())}") from error
    unknown = sorted(set(config) - {"model_type"} - set(type(model_config)().to_dict()))
    if unknown:
        raise InputError(
            f"policy.config has keys that {type(model_config).__name__} does not know: {', '.join(unknown)}"
        )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(model_config)  # type: ignore[no-untyped-call]
    return model
