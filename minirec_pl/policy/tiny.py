"""A small causal language model over item tokens, built from a config and stored as an ordinary Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from minirec_pl.errors import InputError
from minirec_pl.policy.causal_lm import body_of, head_of, run_prompt, run_widened
from minirec_pl.policy.generation import eos_token_ids
from minirec_pl.policy.model_config import text_setting
from minirec_pl.policy.rollout import evaluation_mode

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
        InputError: if transformers does not know the model type or refuses a key or value, or a key follows from the
            catalogue.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    fixed = [key for key in _FROM_CATALOGUE if key in config]
    if fixed:
        raise InputError(f"policy.config sets {', '.join(fixed)}, which the catalogue decides: leave it out")
    values = {"model_type": "llama", **config, "vocab_size": vocabulary}
    values |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    try:
        model_config = AutoConfig.for_model(values.pop("model_type"), **values)
        known = {"model_type", *type(model_config)().to_dict(), *type(model_config).attribute_map}
        unknown = sorted(set(config) - known)
        if unknown:
            raise InputError(
                f"policy.config has keys that {type(model_config).__name__} does not know: {', '.join(unknown)}"
            )
        model: PreTrainedModel = AutoModelForCausalLM.from_config(model_config)  # type: ignore[no-untyped-call]
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"policy.config is refused by transformers: {' '.join(str(error).split())}") from error
    return model


def check_model(model: Any) -> None:
    """Refuses a model whose logits after left padding are not its head's on the last hidden state.

    Args:
        model: a causal language model of transformers.

    Raises:
        InputError: if it has no start or padding token, takes no padding, positions or cache, or its logits differ.
    """
    name, pad = type(model).__name__, text_setting(model, "pad_token_id")
    starts = (text_setting(model, "bos_token_id"), *eos_token_ids(model))
    start = next((token for token in starts if token is not None), None)
    if pad is None or start is None:
        raise InputError(f"{name} has no pad or no start token: set pad_token_id and bos_token_id in its config")
    tokens = torch.tensor([[pad, start]], device=model.device)
    mask = torch.tensor([[0, 1]], device=model.device)
    try:
        with evaluation_mode(model):
            prompt = run_prompt(body_of(model), tokens, mask)
            if not prompt.cache.layers:
                raise ValueError("it keeps no keys and values")
            ours = head_of(model).logits(prompt.states)
            its = run_widened(model, input_ids=tokens[:, 1:]).logits[:, -1].to(ours.dtype)
        tolerance = 1e-4 if model.dtype.itemsize >= 4 else 5e-2
        same = torch.allclose(ours, its, rtol=tolerance, atol=tolerance * float(its.abs().max()))
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{name} cannot be a policy ({error}): take a decoder with a cache, such as llama") from error
    if not same:
        raise InputError(
            f"{name} changes the logits after its head, or with padding: take a model that does not, such as llama"
        )
