"""Free generation of groups of completions by any causal language model of transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from minirec_pl.policy.language_models.causal_lm import Head, body_of, check_padding, decoder_of, head_of, run_prompts
from minirec_pl.policy.language_models.decoding import decode
from minirec_pl.policy.language_models.model_config import text_config, text_setting
from minirec_pl.policy.language_models.model_support import check_support
from minirec_pl.policy.language_models.positions import position_rules
from minirec_pl.policy.language_models.sampling import Prompt, warpers
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.modules import evaluation_mode


class Completions(NamedTuple):
    """G completions of each of B prompts.

    Attributes:
        ids: int64 [B, G, L]; the pad token where masked. L is the longest completion's length.
        mask: bool [B, G, L], true up to and including the first token that ends a completion.
        logps: float [B, G, L], the log-probabilities with which the tokens were drawn, after every processor of the
            logits; 0 where masked.
    """

    ids: Tensor
    mask: Tensor
    logps: Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Names, defaults and order of the processors are those of transformers.

    Args:
        strategy: `sample` draws with replacement; `greedy` takes the most likely token, the same for all of a group.
        temperature: divides the logits.
        top_k: keep the k most likely tokens; None or 0 keeps all.
        top_p: keep the smallest set of tokens with this mass; None keeps all.

    Raises:
        InputError: if an option is out of range.
    """

    strategy: Literal["sample", "greedy"] = "sample"
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.strategy not in ("sample", "greedy"):
            raise InputError(f"strategy is {self.strategy!r}: choose one of sample, greedy")
        if not 0 < self.temperature < math.inf:
            raise InputError(f"temperature is {self.temperature}: it divides the logits, so it must be above 0")
        if self.top_k is not None and self.top_k < 0:
            raise InputError(f"top_k is {self.top_k}: give at least 1, or null for all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}: it is above 0 and at most 1, or null for all tokens")


class VocabularyHead:
    """The whole vocabulary as candidates, after the logits processors; ends with an EOS token.

    Args:
        head: of the model.
        sampling: what happens to the logits.
        eos_token_ids: every id that ends a completion.
    """

    def __init__(self, head: Head, sampling: Sampling, eos_token_ids: Sequence[int]) -> None:
        self.head = head
        self.processors = warpers(temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p)
        self.eos = torch.tensor(list(eos_token_ids), dtype=torch.int64, device=head.weight.device)

    def logps(self, states: Tensor) -> Tensor:
        """Log-probabilities, float [R, V]."""
        logits = self.head.logits(states)
        for processor in self.processors:
            logits = processor(None, logits)
        return logits.log_softmax(dim=-1)

    def take(self, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """See `TokenHead`."""
        return candidates, torch.isin(candidates, self.eos)

    def select(self, source: Tensor) -> None:
        """See `TokenHead`; the vocabulary is the same for every row."""


def eos_token_ids(model: Any) -> list[int]:
    """Every id in `generation_config.eos_token_id`, or in the config where that has none.

    `LanguageModel.load` puts the end of the tokenizer there, too.
    """
    for config in (getattr(model, "generation_config", None), model.config, text_config(model)):
        ids = getattr(config, "eos_token_id", None)
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    return []


def generate(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    num_generations: int,
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    uniform: Tensor | None = None,
    generator: torch.Generator | None = None,
    prompt: Prompt | None = None,
    sizes: Tensor | None = None,
) -> Completions:
    """G completions of each prompt, in evaluation mode and without gradients; the mode is put back afterwards.

    Each prompt is run once, in batches of similar length, and its keys and values are shared by its group. Completions
    that have ended leave the batch. A completion depends on its own prompt and random numbers alone.

    Args:
        model: a causal language model of transformers, also inside peft; with gradient checkpointing on or off.
        input_ids: int64 [B, T], padded on the left.
        attention_mask: [B, T], which tokens are real.
        num_generations: G.
        max_new_tokens: tokens at most in a completion.
        sampling: plain sampling if None.
        uniform: float64 [B, G, max_new_tokens] in [0, 1), one number for each token; drawn from `generator` if None.
        generator: e.g. from `rollout_generator(seed, epoch, step, rank)`; torch's global one if None.
        prompt: these prompts, run in evaluation mode already.
        sizes: int64 [B], how many of the G completions each prompt gets; None for all. The mask of the others is empty.

    Raises:
        InputError: if a prompt is empty or too long for the model, the shapes do not fit, the weights have diverged, or
            the model is not known to generate in batches what it says of single sequences.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8,
        ...                                      num_hidden_layers=1, num_attention_heads=2, eos_token_id=2))
        >>> prompt = torch.tensor([[0, 3, 4], [5, 6, 7]])
        >>> made = generate(model, prompt, (prompt != 0).long(), num_generations=4, max_new_tokens=5)
        >>> tuple(made.ids.shape[:2])
        (2, 4)
    """
    sampling = sampling or Sampling()
    _check_request(model, input_ids, attention_mask, num_generations, max_new_tokens)
    size = (len(input_ids), num_generations, max_new_tokens)
    if sampling.strategy != "sample":
        uniform = None
    elif uniform is None:
        device = input_ids.device if generator is None else generator.device
        uniform = torch.rand(size, dtype=torch.float64, generator=generator, device=device).to(input_ids.device)
    elif uniform.shape != size:
        raise InputError(f"the random numbers have shape {tuple(uniform.shape)}: give {size}, one for each token")
    with evaluation_mode(model):
        prompt, ends = prompt or run_prompts(body_of(model), input_ids, attention_mask), eos_token_ids(model)
        head = VocabularyHead(head_of(model), sampling, ends)
        rows = decode(prompt, head, num_generations, max_new_tokens, uniform, sizes)
    longest = int(rows.mask.sum(dim=1).max())
    pad = text_setting(model, "pad_token_id")
    ids = rows.tokens.masked_fill(~rows.mask, (ends or [0])[0] if pad is None else pad)
    shape = (*size[:2], longest)
    return Completions(*(part[:, :longest].reshape(shape) for part in (ids, rows.mask, rows.logps)))


def _check_request(model: Any, input_ids: Tensor, mask: Tensor, group: int, length: int) -> None:
    if input_ids.ndim != 2 or mask.shape != input_ids.shape or not input_ids.numel():
        raise InputError(f"prompts have shape {tuple(input_ids.shape)} and masks {tuple(mask.shape)}: give [B, T] each")
    check_padding(mask)
    if group < 1 or length < 1:
        raise InputError(f"num_generations is {group} and max_new_tokens {length}: both must be at least 1")
    check_support(model, cache=True)
    check_context(model, mask, length)
    position_rules(decoder_of(model)).check(mask.sum(dim=1), length, "prompt {} of the batch".format)


def check_context(model: Any, mask: Tensor, length: int) -> None:
    """Refuses prompts that leave no room for `length` tokens in the model's context.

    Raises:
        InputError: naming the first such row of `mask` [B, T].
    """
    context = text_setting(model, "max_position_embeddings")
    prompt = mask.sum(dim=1)
    if context is not None and int(prompt.max()) + length > context:
        row = int(prompt.argmax())
        raise InputError(
            f"prompt {row} of the batch has {int(prompt[row])} tokens, and with {length} new ones it is longer than "
            f"the model's {context} positions: shorten the prompt, or lower max_completion_length"
        )
