"""Whether padding, shared prompts and cached decoding give what a model says of a single sequence: it is tried."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from minirec_pl.policy.language_models.causal_lm import (
    Body,
    Head,
    body_of,
    decoder_of,
    head_of,
    pad_left,
    run_completions,
    run_prompt,
    widened,
    without_adapter_wrapper,
)
from minirec_pl.policy.language_models.decoding import Decoder
from minirec_pl.policy.language_models.model_config import text_config, text_setting
from minirec_pl.policy.language_models.positions import position_rules
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.modules import evaluation_mode

_PROMPTS = (5, 3)  # tokens of each prompt that is tried
_COMPLETIONS = ((3, 2), (2, 3))  # and of the completions of each
_STEPS = 2  # of each completion that are decoded
_TOKENS, _INNER_WIDTH = 512, 64  # of a cut-down model
_MOST_WEIGHTS = 2**28
_RECURRENT = ("linear_attention", "conv", "mamba", "mamba2", "hybrid", "hybrid_sliding", "recurrent")


class Support(NamedTuple):
    """What is wrong with a model; None where nothing is.

    Attributes:
        padding: in passes over batches that are padded on the left.
        cache: in passes and decoding loops that share a prompt's keys and values.
    """

    padding: str | None
    cache: str | None


_KNOWN: WeakKeyDictionary[nn.Module, Support] = WeakKeyDictionary()


def support_of(model: Any) -> Support:
    """Runs two short prompts with completions in every way of ours and compares them with single plain sequences.

    A model is tried once; later calls remember it.

    Args:
        model: a causal language model of transformers, also inside peft.

    Raises:
        InputError: if its head is not known, see `minirec_pl.policy.language_models.causal_lm.head_of`.
    """
    causal = without_adapter_wrapper(model)
    if causal not in _KNOWN:
        head_of(model)
        with evaluation_mode(model):
            _KNOWN[causal] = _tried(model)
    return _KNOWN[causal]


def check_support(model: Any, *, cache: bool) -> None:
    """Refuses a model that `support_of` has found to be wrong.

    Args:
        model: as in `support_of`.
        cache: whether prompts are to be shared by completions.

    Raises:
        InputError: if it is.
    """
    support = support_of(model)
    reason = support.padding or (support.cache if cache else None)
    if reason is not None:
        name = type(without_adapter_wrapper(model)).__name__
        raise InputError(f"{name} cannot be a policy ({reason}): take a decoder with a cache, such as llama")


class _Trial(NamedTuple):
    """Prompts with completions, and what is compared.

    Attributes:
        body: of the model.
        device: of the model.
        prompts: tokens of two prompts.
        completions: tokens of the completions of each, as many of one as of the other.
        plain: the model's own logits after each token of each prompt with its completion, [n, V] each, flat.
        head: of the model, which makes logits of states.
        tolerance: of the logits, relative; what arithmetic in the model's dtype explains.
    """

    body: Body
    device: torch.device
    prompts: list[list[int]]
    completions: list[list[list[int]]]
    plain: list[Tensor]
    head: Head
    tolerance: float

    @property
    def group(self) -> int:
        """Completions of a prompt."""
        return len(self.completions[0])

    @property
    def wholes(self) -> list[list[int]]:
        """Each prompt with its completion, flat."""
        pairs = zip(self.prompts, self.completions, strict=True)
        return [prompt + completion for prompt, group in pairs for completion in group]

    def differs(self, whole: int, start: int, states: Tensor) -> bool:
        """Whether states [n, D] give other logits than the model after the tokens from `start` on of a sequence."""
        pair = (self.head.logits(states), self.plain[whole][start : start + len(states)])
        found, expected = (logits.double() - logits.double().mean(dim=-1, keepdim=True) for logits in pair)
        return not bool((found - expected).norm() <= self.tolerance * expected.norm())


def _tried(model: Any) -> Support:
    trials: list[_Trial] = []
    padding = _reason(lambda: trials.append(_trial(model))) or _reason(lambda: _padded(trials[0]))
    if padding is not None:
        return Support(padding, padding)
    if _is_recurrent(without_adapter_wrapper(model)):
        return Support(None, "it has recurrent layers, whose state the completions of a prompt cannot share here")
    return Support(None, _reason(lambda: _shared(trials[0])) or _reason(lambda: _decoded(trials[0])))


def _is_recurrent(causal: Any) -> bool:
    config = text_config(causal)
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    return any(kind in _RECURRENT for kind in kinds) if kinds else bool(getattr(causal, "_is_stateful", False))


def _reason(attempt: Callable[[], str | None]) -> str | None:
    try:
        return attempt()
    except Exception as error:  # whatever a model's own code raises when it is used in a way it does not know
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        return " ".join(f"{kind}{error}".split())[:200]


def _trial(model: Any) -> _Trial:
    causal = without_adapter_wrapper(model)
    numbers, vocabulary = torch.Generator().manual_seed(0), text_config(causal).vocab_size
    # A model may count positions from the padding tokens of a sequence.
    usual = [token for token in range(vocabulary) if token != text_setting(model, "pad_token_id")]

    def tokens(length: int) -> list[int]:
        return [usual[place] for place in torch.randint(len(usual), (length,), generator=numbers).tolist()]

    coarse = causal.get_output_embeddings().weight.dtype.itemsize < 4
    trial = _Trial(
        body_of(model),
        model.device,
        [tokens(n) for n in _PROMPTS],
        [[tokens(n) for n in group] for group in _COMPLETIONS],
        [],
        head_of(model),
        0.25 if coarse else 1e-3,
    )
    run = widened(causal)
    for whole in trial.wholes:
        ids = torch.tensor([whole], device=trial.device)
        trial.plain.append(run(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0])
    return trial


def _padded(trial: _Trial) -> str | None:
    rows = [*trial.wholes, *trial.prompts]
    sources = [*range(len(trial.wholes)), *range(0, len(trial.wholes), trial.group)]
    states = run_prompt(trial.body, *pad_left(rows, 0, trial.device), keep_cache=False).states
    found = zip(sources, rows, states, strict=True)
    wrong = any(trial.differs(whole, len(row) - 1, state[None]) for whole, row, state in found)
    return "a batch padded on the left gives other numbers than single sequences" if wrong else None


def _shared(trial: _Trial) -> str | None:
    prompt = run_prompt(trial.body, *pad_left(trial.prompts, 0, trial.device))
    if not prompt.cache.layers or any(layer.keys is None for layer in prompt.cache.layers):
        return "not all of its layers keep keys and values"
    rows = [row for group in trial.completions for row in group]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=trial.device)
    fed = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=trial.device)
    sample = torch.arange(len(trial.prompts), device=trial.device).repeat_interleave(trial.group)
    for place, states in enumerate(run_completions(prompt, sample, tokens, fed)):
        if trial.differs(place, len(trial.prompts[place // trial.group]), states[: len(rows[place])]):
            return "a completion after cached keys is not what it says of the whole sequence"
    return None


def _decoded(trial: _Trial) -> str | None:
    prompt = run_prompt(trial.body, *pad_left(trial.prompts, 0, trial.device))
    rows = [row for group in trial.completions for row in group]
    decoder = Decoder(prompt, trial.group, _STEPS)
    steps = zip(*(row[:_STEPS] for row in rows), strict=True)
    states = torch.stack([decoder.step(torch.tensor(tokens, device=trial.device)) for tokens in steps], dim=1)
    for place in range(len(rows)):
        if trial.differs(place, len(trial.prompts[place // trial.group]), states[place]):
            return "decoding token by token is not what it says of the whole sequence"
    return None


def try_untrained(model: Any) -> None:
    """Has `support_of` remember of an untrained model what it finds with weights that are as large as trained ones.

    Where the weights are near zero, layers add so little that what is wrong with them does not show.

    Args:
        model: a causal language model of transformers, left as it is.

    Raises:
        InputError: as `support_of`.
    """
    head_of(model)
    _KNOWN[model] = support_of(_moved(copy.deepcopy(model)))


@torch.no_grad()
def _moved(model: Any) -> Any:
    """The model with noise added to its weights, of the size that keeps a layer's output as large as its input."""
    numbers = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        width = parameter.shape[-1] if parameter.ndim > 1 else _INNER_WIDTH
        noise = torch.randn(parameter.shape, generator=numbers) / math.sqrt(width)
        parameter.add_(noise.to(parameter.device, parameter.dtype))
    return model


def few_layers(config: Any) -> Any:
    """A model of the family, with a layer of each kind, narrow inside, with few tokens and random weights, to be tried.

    Args:
        config: of a causal language model of transformers.

    Returns:
        The model in float32; None where the family cannot be cut down so, or its layers are too large to be made.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config.get_text_config())
    count = config.num_hidden_layers
    kinds = list(getattr(config, "layer_types", None) or [])
    few = min(count, max([2, *(kinds.index(kind) + 1 for kind in set(kinds))]))
    build: Any = AutoModelForCausalLM.from_config
    try:
        for name, value in list(vars(config).items()):
            if isinstance(value, list | tuple) and len(value) == count:
                setattr(config, name, value[:few])
            elif name.endswith("intermediate_size") and isinstance(value, int):
                setattr(config, name, min(value, _INNER_WIDTH))
        config.num_hidden_layers, config.vocab_size = few, min(config.vocab_size, _TOKENS)
        config.pad_token_id, config.bos_token_id, config.eos_token_id = 0, 1, 2
        with torch.device("meta"):
            if sum(parameter.numel() for parameter in build(config).parameters()) > _MOST_WEIGHTS:
                return None
        return _moved(build(config, dtype=torch.float32).eval())
    except Exception:  # what a family makes of a config that none of its models has
        return None


def described(model: Any) -> dict[str, str]:
    """What a model's head, cache and positions are, a sentence each.

    Raises:
        InputError: if the model cannot be a policy.
    """
    check_support(model, cache=False)
    head, cache, rules = head_of(model), support_of(model).cache, position_rules(decoder_of(model))
    shape = [f"times {head.scale:g}"] if head.scale != 1.0 else []
    shape += [f"capped at {head.softcap:g}"] if head.softcap is not None else []
    found = {
        "head": f"the logits are its product {', then '.join(shape) or 'as it is'}",
        "cache": cache or "a prompt is run once and shared by its completions",
    }
    if rules.switch is not None:
        found["positions"] = (
            f"they change after {rules.switch} tokens: a prompt with its longest completion must stay below, or begin "
            "above"
        )
    elif rules.limit is not None:
        found["positions"] = f"they are right up to {rules.limit} tokens, prompt and completion together"
    return found
