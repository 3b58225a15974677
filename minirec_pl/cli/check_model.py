"""What `minirec check` tells of a language model and its tokenizer, before a run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import torch

from minirec_pl.policy.language_models.adapters import Lora, adapter_coverage
from minirec_pl.policy.language_models.causal_lm import decoder_of
from minirec_pl.policy.language_models.generation import eos_token_ids
from minirec_pl.policy.language_models.model_config import text_setting
from minirec_pl.policy.language_models.model_support import described, few_layers, support_of
from minirec_pl.policy.language_models.positions import position_rules

Level = Literal["ok", "warning", "fails"]
_ANSWER = "Answer 3141"
_SHOWN = 5


class Finding(NamedTuple):
    """One line of what `minirec check` prints."""

    level: Level
    what: str
    text: str


class Prompts(NamedTuple):
    """What prompts look like.

    Attributes:
        text: the first one.
        lengths: tokens of some from all over the pool.
        completion: tokens of a completion at most.
    """

    text: str
    lengths: list[int]
    completion: int


def describe_language_model(model: Any, tokenizer: Any, lora: Lora | None) -> list[Finding]:
    """Describes a model, which may be on the meta device, and on its tokenizer.

    Args:
        model: of `LanguageModel.on_meta`, given this tokenizer.
        tokenizer: of the model.
        lora: its new adapters; None for stored adapters or none.
    """
    findings = [_vocabulary(model, tokenizer), _ends(model, tokenizer), *_template(model, tokenizer)]
    if hasattr(model, "peft_config"):
        coverage = adapter_coverage(model) if lora is None else lora.coverage(model)
        findings.append(Finding("warning" if coverage.missing else "ok", "lora", coverage.sentence()))
    return findings


def describe_family(config: Any, prompts: Prompts, completions: bool) -> list[Finding]:
    """Describes head, cache and positions, tried on a few untrained layers of the model's family.

    Args:
        config: of a causal language model of transformers.
        prompts: that it will be asked.
        completions: whether completions of several tokens follow.

    Raises:
        InputError: if no model of the family can be a policy, or prompts break the rules of its positions.
    """
    model = few_layers(config)
    if model is None:
        return [Finding("ok", "model", "its head, cache and positions are tried when it is loaded")]
    sentences = described(model)
    position_rules(decoder_of(model)).check(
        torch.tensor(prompts.lengths), prompts.completion, lambda row: f"a prompt (number {row} of those tried)"
    )
    lacking = completions and support_of(model).cache is not None
    if lacking:
        sentences["cache"] = f"{sentences['cache']}: take a decoder with attention alone, or item_ids: token"
    return [Finding("fails" if lacking and what == "cache" else "ok", what, text) for what, text in sentences.items()]


def _vocabulary(model: Any, tokenizer: Any) -> Finding:
    rows, vocabulary = len(model.get_input_embeddings().weight), tokenizer.get_vocab()
    text = f"{len(vocabulary):,} tokens in the tokenizer, {rows:,} rows in the model"
    lacking = sorted(token for token, index in vocabulary.items() if index >= rows)
    if lacking:
        more = f" and {len(lacking) - _SHOWN} more" if len(lacking) > _SHOWN else ""
        text += f"; no prompt may hold {', '.join(lacking[:_SHOWN])}{more}, for which the model has no row"
    return Finding("ok", "vocabulary", text)


def _ends(model: Any, tokenizer: Any) -> Finding:
    pad = text_setting(model, "pad_token_id")
    text = f"free text ends with {_named(tokenizer, eos_token_ids(model))}; padding is {_named(tokenizer, [pad])}"
    return Finding("ok", "end tokens", text)


def _template(model: Any, tokenizer: Any) -> list[Finding]:
    """A warning if the chat template closes the model's turn with a token that does not end a text."""
    closing = _closing_token(tokenizer)
    if closing is None or closing in eos_token_ids(model):
        return []
    return [
        Finding(
            "warning",
            "chat template",
            f"it closes the model's turn with {_named(tokenizer, [closing])}, which ends no text here, so that "
            f"completions run on: add {closing} to eos_token_id in the model's generation_config.json",
        )
    ]


def _closing_token(tokenizer: Any) -> int | None:
    """The first special token after an answer in a conversation; None where there is no template or no such token."""
    if tokenizer.chat_template is None:
        return None
    turns = [("user", "Hello"), ("assistant", _ANSWER), ("user", "Thanks")]
    try:
        text = tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in turns], tokenize=False
        )
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "jinja2":
            raise
        return None
    _, found, after = text.partition(_ANSWER)
    if not found:
        return None
    special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    ids: list[int] = tokenizer(after, add_special_tokens=False)["input_ids"]
    return next((token for token in ids if token in special), None)


def _named(tokenizer: Any, ids: Iterable[int]) -> str:
    """The tokens with their ids."""
    ids = list(ids)
    return ", ".join(
        f"{token} ({index})" for token, index in zip(tokenizer.convert_ids_to_tokens(ids), ids, strict=True)
    )
