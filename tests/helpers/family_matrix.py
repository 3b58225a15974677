"""Text policies on every family of causal language models, against the plain forward of transformers in float64.

Run it to see what is right, refused, wrong and crashed:

    python -m tests.helpers.family_matrix --json out.json [--families llama gemma2] [--transformers] [--details]
    python -m tests.helpers.family_matrix --rows out.json --markdown docs/models.md
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import sys
import tempfile
import textwrap
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from minirec_pl import InputError
from minirec_pl.data.samples import Catalogue

from .families import EOS, FAMILIES, PAD, is_available, make_config, make_model, vocabulary, write_family

try:
    from minirec_pl.policy.language_models.pretrained import LanguageModel, Lora
except ImportError as error:
    raise SystemExit(f"this version of minirec_pl has no language models ({error})") from error


class Missing(Exception):
    """An older version of the package lacks a name."""


def _from_package(module: str, name: str) -> Any:
    """A name of minirec_pl; where an older version lacks it, its use is the outcome `missing`."""
    try:
        return getattr(importlib.import_module(f"minirec_pl.{module}"), name)
    except (ImportError, AttributeError):

        def missing(*arguments: Any, **options: Any) -> Any:
            raise Missing(f"minirec_pl.{module} has no {name}")

        return missing


GenerativePolicy = _from_package("policy", "GenerativePolicy")
PromptTemplate = _from_package("policy", "PromptTemplate")
RetrievalPolicy = _from_package("policy", "RetrievalPolicy")
Sampling = _from_package("policy", "Sampling")
SemanticIds = _from_package("policy.semantic_ids", "SemanticIds")
raw_completion_logps = _from_package("policy", "completion_logps")
raw_generate = _from_package("policy", "generate")

TOLERANCE = 1e-5
FLOAT32_TOLERANCE = 2e-4
FLOAT32_INSIDE = {
    "qwen3_next": 5e-5,
    "qwen3_5": 5e-5,
    "qwen3_5_text": 5e-5,
    "qwen3_5_moe_text": 5e-5,
    "olmo_hybrid": 5e-5,
    "kimi_linear": 5e-5,
    "bailing_hybrid": 5e-5,
    "mpt": FLOAT32_TOLERANCE,
    "xglm": FLOAT32_TOLERANCE,
}
"""Tolerance for model types whose layers compute in float32 whatever their weights are."""
FLOAT32_ONLY = ("mpt", "xglm")
OUTCOMES = ("right", "refused", "wrong", "crashed")
TITLES = ["ab", "abc", "abd", "b", "ba", "cab", "cad", "d"]
HISTORIES = [[3], [0, 5, 2, 7, 6, 1], [4, 6]]
SEEN = [[3], [0, 5], [4, 1, 7]]
TARGETS = [4, 6, 5]
ITEMS = [[0, 5], [1, 3], [2, 6]]
MARKER = "<a>"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Row:
    """One cell of the matrix.

    Attributes:
        family: in `FAMILIES`.
        check: what was called, on which policy.
        outcome: one of `OUTCOMES`; `missing` where the package is too old; `adapted` or `not adapted` by the layers
            that `Lora()` names; `consistent`, `inconsistent` or `none` for checks of transformers alone.
        gap: largest difference from the truth, in nats or as the values are.
        sentence: where the gap is, what is adapted, or what the refusal or the exception says.
    """

    family: str
    check: str
    outcome: str
    gap: float
    sentence: str


Pair = tuple[str, Any, Any]
"""(where, ours, truth)"""

_softmax = nn.functional.softmax


def _wide_softmax(values: Tensor, *args: Any, **options: Any) -> Tensor:
    """Softmax in the dtype of its input: eager attention asks for float32, in which float64's lowest value is -inf."""
    if values.dtype == torch.float64:
        options.pop("dtype", None)
    return _softmax(values, *args, **options)


@contextmanager
def wide_softmax() -> Iterator[None]:
    """Attention in float64 throughout."""
    nn.functional.softmax = _wide_softmax
    try:
        yield
    finally:
        nn.functional.softmax = _softmax


class Truth:
    """A model of transformers in float64: one sequence at a time, no padding, no cache, eager attention."""

    def __init__(self, model: Any) -> None:
        self.model = in_float64(copy.deepcopy(model)).eval()
        self.causal = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        self.causal.set_attn_implementation("eager")
        self.known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def run(self, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Logits [T, V] and last hidden states [T, D], with gradient."""
        key = tuple(tokens)
        if key not in self.known:
            seen: list[Tensor] = []
            body, ids = self.causal.base_model, torch.tensor([key])
            if body is self.causal:  # Llama 4, which has no body of that name: the state is what its head is given
                head = self.causal.get_output_embeddings()
                handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
            else:
                handle = body.register_forward_hook(lambda module, args, out: seen.append(out.last_hidden_state))
            try:
                logits = self.causal(input_ids=ids, use_cache=False).logits[0]
            finally:
                handle.remove()
            if not seen:  # OPT's head calls the decoder inside its body
                seen.append(body(input_ids=ids, use_cache=False).last_hidden_state)
            self.known[key] = logits, seen[-1][0]
        return self.known[key]

    def steps(self, prompt: Sequence[int], completion: Sequence[int], temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of each token, [L] each."""
        logits = self.run([*prompt, *completion])[0][len(prompt) - 1 : len(prompt) + len(completion) - 1]
        logps = (logits / temperature).log_softmax(dim=-1)
        chosen = logps[torch.arange(len(completion)), torch.tensor(list(completion))]
        return chosen, -(logps.exp() * logps).sum(dim=-1)

    def allowed_steps(
        self, prompt: Sequence[int], ids: Sequence[tuple[int, ...]], seen: Sequence[int], item: int, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """As `steps` of an item's id, among the tokens that lead to an item that is open."""
        logits = self.run([*prompt, *ids[item]])[0]
        open_ids = [tokens for i, tokens in enumerate(ids) if i not in set(seen)]
        chosen, entropy = [], []
        for depth, token in enumerate(ids[item]):
            children = sorted({tokens[depth] for tokens in open_ids if tokens[:depth] == ids[item][:depth]})
            logps = (logits[len(prompt) - 1 + depth][children] / temperature).log_softmax(dim=0)
            chosen.append(logps[children.index(token)])
            entropy.append(-(logps.exp() * logps).sum())
        return torch.stack(chosen), torch.stack(entropy)

    def gradients(self, value: Tensor) -> dict[str, Tensor]:
        """Of what is trained, by name."""
        self.model.zero_grad()
        value.backward(retain_graph=True)
        return gradients_of(self.model)


def in_float64(model: Any) -> Any:
    """The model with float64 weights, its experts in a loop, since torch has no grouped product for float64.

    MPT and XGLM stay in float32: their attention narrows the lowest value of float64, which gives NaN or an error.
    """
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(causal, "set_experts_implementation"):
        causal.set_experts_implementation("eager")
    return model if causal.config.model_type in FLOAT32_ONLY else model.double()


def gradients_of(model: Any) -> dict[str, Tensor]:
    """Of what is trained, by name; zeros where there is none."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def gradient_pairs(model: Any, value: Tensor, truth: Truth, truth_value: Tensor) -> Iterator[Pair]:
    """Gradients, on the scale of the largest of them where that is above 1."""
    wanted = truth.gradients(truth_value)
    scale = max(1.0, *(float(grad.abs().max()) for grad in wanted.values()))
    model.zero_grad()
    value.backward()
    got = gradients_of(model)
    model.zero_grad()
    for name, grad in wanted.items():
        yield f"gradient of {name}", got[name] / scale, grad / scale


def weights_like(values: Tensor, seed: int = 3) -> Tensor:
    """Random weights of a sum, so that no gradient cancels."""
    return torch.rand(values.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5


class Matrix:
    """Collects the cells of one family."""

    def __init__(self, family: str) -> None:
        self.family = family
        self.rows: list[Row] = []

    def check(self, check: str, pairs: Callable[[], Iterator[Pair]], tolerance: float = TOLERANCE) -> None:
        """One cell: the largest gap of the pairs, or how they were refused."""
        worst, where = 0.0, ""
        try:
            for label, ours, truth in pairs():
                gap = _gap(ours, truth)
                if not gap <= worst:
                    worst, where = gap, label
        except InputError as error:
            self.add(check, "refused", 0.0, " ".join(str(error).split()))
        except Missing as error:
            self.add(check, "missing", 0.0, str(error))
        except Exception as error:
            self.add(check, "crashed", 0.0, _what_crashed(error))
        else:
            tolerance = max(tolerance, FLOAT32_INSIDE.get(FAMILIES[self.family].kind, 0.0))
            self.add(check, "right" if worst <= tolerance else "wrong", worst, where)

    def add(self, check: str, outcome: str, gap: float, sentence: str) -> None:
        self.rows.append(Row(self.family, check, outcome, gap, sentence))

    @contextmanager
    def made(self, checks: Sequence[str]) -> Iterator[None]:
        """Cells of a policy, all of which share what happens while it is made."""
        try:
            yield
        except InputError as error:
            for check in checks:
                self.add(check, "refused", 0.0, " ".join(str(error).split()))
        except Missing as error:
            for check in checks:
                self.add(check, "missing", 0.0, str(error))
        except Exception as error:
            for check in checks:
                self.add(check, "crashed", 0.0, _what_crashed(error))


def _gap(ours: Any, truth: Any) -> float:
    ours, truth = (torch.as_tensor(value).detach().double() for value in (ours, truth))
    if ours.shape != truth.shape:
        return float("inf")
    gap = float((ours - truth).abs().max()) if ours.numel() else 0.0
    return gap if gap == gap else float("inf")


def _what_crashed(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "minirec_pl" in frame.filename or "callbacks" in frame.filename]
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in [*ours[-1:], *frames[-1:]]]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]} ({', '.join(dict.fromkeys(places))})"


# What is given to the policies.


def random_prompts(lengths: Sequence[int] = (5, 12, 26), seed: int = 1) -> tuple[list[list[int]], Tensor, Tensor]:
    """Prompts as lists, and padded on the left: input_ids and attention_mask, int64 [B, T]."""
    random = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, 250, (length,), generator=random).tolist() for length in lengths]
    width = max(lengths)
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return rows, ids, mask


def random_completions(lengths: Sequence[Sequence[int]], seed: int = 2) -> tuple[Tensor, Tensor]:
    """Completions of these lengths, padded on the right: ids int64 and mask bool [B, G, L]."""
    size = (len(lengths), len(lengths[0]), max(map(max, lengths)))
    ids = torch.randint(3, 250, size, generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(size[2]) < torch.tensor([list(row) for row in lengths])[..., None]
    return ids.masked_fill(~mask, PAD), mask


SIMILAR = [[6, 5], [6, 6], [5, 6]]
UNEQUAL = [[6, 1, 3], [2, 6, 4], [1, 1, 6]]


def history_batch() -> dict[str, Tensor]:
    """Histories and seen items of unequal length."""
    width, most = max(map(len, HISTORIES)), max(map(len, SEEN))
    return {
        "history": torch.tensor([[-1] * (width - len(row)) + row for row in HISTORIES]),
        "seen": torch.tensor([row + [-1] * (most - len(row)) for row in SEEN]),
        "target": torch.tensor(TARGETS),
        "sample_id": torch.arange(len(HISTORIES)) + 7,
    }


def prompt_template() -> Any:
    """Prompts of a few tokens.

    Raises:
        Missing: where prompts of an older version cannot be as short.
    """
    try:
        return PromptTemplate(system="", user="Pick: {history}", item="{title}", separator=",", age="")
    except TypeError as error:
        raise Missing(f"minirec_pl.policy.PromptTemplate has no such option ({error})") from error


def prompt_tokens(tokenizer: Any, history: Sequence[int]) -> list[int]:
    """The prompt of a history by the chat template of `families`."""
    text = f"<|im_start|>Pick: {','.join(TITLES[item] for item in history)}<|im_end|><|im_start|>"
    tokens: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokens


def catalogue() -> Catalogue:
    return Catalogue([f"i{i}" for i in range(len(TITLES))], TITLES)


@dataclass(frozen=True)
class LoadedOnce(LanguageModel):
    """A language model that several policies share; nothing is added to its vocabulary."""

    def load(self, extend: Any = None) -> tuple[Any, Any]:
        key = (self.name, self.lora is not None)
        if key not in _LOADED:
            _LOADED[key] = super().load()
        if extend is not None:
            assert not extend(*_LOADED[key])
        return _LOADED[key]


_LOADED: dict[tuple[str, bool], tuple[Any, Any]] = {}


def lora_targets(name: str) -> list[str]:
    """Names of the linear layers that adapters go on: those of `Lora()`, or else all below the head that peft takes."""
    found = linear_layers(name)
    alone = FAMILIES[name].kind in ("mamba", "falcon_mamba", "mamba2")
    refused = {"out_proj"} if alone else set()  # by peft, since their kernels read its weight
    return [target for target in PROJECTIONS if target in found] or sorted(found - refused)


def linear_layers(name: str) -> set[str]:
    """Last names of the linear layers below the head."""
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        model = make_model_on_meta(name)
    head = model.get_output_embeddings()
    body = model.base_model
    return {
        label.rsplit(".", 1)[-1]
        for label, module in body.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and not label.rsplit(".", 1)[-1].isdigit()
    }


def make_model_on_meta(name: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(make_config(name))


@torch.no_grad()
def move_adapters(model: Any) -> None:
    """Adapters and rows of new tokens away from their start."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_B" in name or "trainable_tokens" in name:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


# The checks.


def check_raw(matrix: Matrix, label: str, model: Any, truth: Truth, names: Sequence[str]) -> None:
    """`generate` and `completion_logps` of minirec_pl.policy."""
    rows, ids, mask = random_prompts()

    def sampled(temperature: float) -> Callable[[], Iterator[Pair]]:
        def pairs() -> Iterator[Pair]:
            random, sampling = torch.Generator().manual_seed(0), Sampling(temperature=temperature)
            made = raw_generate(model, ids, mask, 2, 6, sampling=sampling, generator=random)
            for b, prompt in enumerate(rows):
                for g in range(2):
                    own = made.ids[b, g][made.mask[b, g]].tolist()
                    wanted = truth.steps(prompt, own, temperature)[0]
                    yield f"prompt of {len(prompt)}", made.logps[b, g, : len(own)], wanted

        return pairs

    def given(lengths: Sequence[Sequence[int]], temperature: float, *, gradients: bool) -> Callable[[], Iterator[Pair]]:
        def pairs() -> Iterator[Pair]:
            tokens, counted = random_completions(lengths)
            got = raw_completion_logps(model, ids, mask, tokens, counted, temperature)
            weights = weights_like(got.logps)
            total = torch.zeros((), dtype=torch.float64)
            for b, prompt in enumerate(rows):
                for g, length in enumerate(lengths[b]):
                    logps, entropy = truth.steps(prompt, tokens[b, g, :length].tolist(), temperature)
                    total = total + (weights[b, g, :length] * logps).sum()
                    yield f"logps, {len(prompt)} + {length}", got.logps[b, g, :length], logps
                    yield f"entropy, {len(prompt)} + {length}", got.entropy[b, g, :length], entropy
            if gradients:
                yield from gradient_pairs(model, (got.logps * weights).sum(), truth, total)

        return pairs

    checks = {
        "generate in float32": (sampled(1.0), FLOAT32_TOLERANCE),
        "generate": (sampled(1.0), TOLERANCE),
        "generate, temperature 0.7": (sampled(0.7), TOLERANCE),
        "completion_logps, similar lengths": (given(SIMILAR, 1.0, gradients=False), TOLERANCE),
        "completion_logps, unequal lengths": (given(UNEQUAL, 0.7, gradients=True), TOLERANCE),
    }
    for name in names:
        if name != "generate in float32":
            in_float64(model)
        matrix.check(f"{label}: {name}", *checks[name])


RAW = (
    "generate in float32",
    "generate",
    "generate, temperature 0.7",
    "completion_logps, similar lengths",
    "completion_logps, unequal lengths",
)
"""The first is as it is used: adapters added to the weights, experts in grouped products."""


RETRIEVAL = ("reason", "read", "item vectors", "item_logps", "target_logps")


def check_retrieval(matrix: Matrix, label: str, policy: Any, truth: Truth) -> None:
    """Every step of a `RetrievalPolicy`."""
    batch, tokenizer = history_batch(), policy.tokenizer
    prompts = [prompt_tokens(tokenizer, history) for history in HISTORIES]
    marker = tokenizer(MARKER, add_special_tokens=False)["input_ids"]
    texts = torch.tensor(
        [
            [[EOS, -1, -1, -1], [40, 41, EOS, -1]],
            [[50, 60, 70, 80], [90, 91, 92, EOS]],
            [[33, EOS, -1, -1], [20, 21, 22, 23]],
        ]
    )

    def state(row: int, text: Sequence[int]) -> Tensor:
        kept = [token for token in text if token not in (-1, EOS)]
        return truth.run([*prompts[row], *kept, *marker])[1][-1]

    def vector(item: int) -> Tensor:
        last = truth.run([*tokenizer(TITLES[item], add_special_tokens=False)["input_ids"], *marker])[1][-1]
        return last / last.norm()

    def reasoned() -> Iterator[Pair]:
        uniform = torch.rand(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        sampling = Sampling(temperature=0.7)
        made = policy.reason(policy.encode(batch), 2, length=4, sampling=sampling, uniform=uniform)
        for b, prompt in enumerate(prompts):
            for g in range(2):
                own = [token for token in made.texts[b, g].tolist() if token >= 0]
                yield f"prompt of {len(prompt)}", made.logps[b, g, : len(own)], truth.steps(prompt, own, 0.7)[0]

    def read() -> Iterator[Pair]:
        passed = policy.read(policy.encode(batch), texts, 0.7)
        by_logp, by_state = weights_like(passed.logps), weights_like(passed.states, 4)
        total = torch.zeros((), dtype=torch.float64)
        for b, prompt in enumerate(prompts):
            for g in range(2):
                own = [token for token in texts[b, g].tolist() if token >= 0]
                logps, entropy = truth.steps(prompt, own, 0.7)
                last = state(b, texts[b, g].tolist())
                yield f"logps, {len(prompt)} + {len(own)}", passed.logps[b, g, : len(own)], logps
                yield f"entropy, {len(prompt)} + {len(own)}", passed.entropy[b, g, : len(own)], entropy
                yield f"state, {len(prompt)} + {len(own)}", passed.states[b, g], last
                total = total + (by_logp[b, g, : len(own)] * logps).sum() + (by_state[b, g] * last).sum()
        ours = (passed.logps * by_logp).sum() + (passed.states * by_state).sum()
        yield from gradient_pairs(policy.model, ours, truth, total)

    def vectors() -> Iterator[Pair]:
        policy.refresh_items()
        for item in range(len(TITLES)):
            yield f"item {TITLES[item]}", policy.index.vectors[item], vector(item)

    def ranked() -> Iterator[Pair]:
        got = policy.item_logps(batch)
        for b, prompt in enumerate(prompts):
            text: list[int] = []
            while len(text) < policy.max_completion_length and EOS not in text:
                text.append(int(truth.run([*prompt, *text])[0][-1].argmax()))
            user = state(b, text)
            scores = torch.stack([user / user.norm() @ vector(item) for item in range(len(TITLES))])
            free = [item for item in range(len(TITLES)) if item not in SEEN[b]]
            wanted = (scores[free] / policy.similarity_temperature).log_softmax(dim=0)
            yield f"prompt of {len(prompt)}", got[b, free], wanted
            yield "seen items", bool((got[b, SEEN[b]] == torch.finfo(torch.float32).min).all()), True

    def contrast() -> Iterator[Pair]:
        target = batch["target"]
        states = policy.read(policy.encode(batch), texts[:, 1:], with_logps=False).states[:, 0]
        got = policy.target_logps(states, target, target, torch.full((3, 0), -1))
        items = sorted(set(TARGETS))
        wanted = []
        for b in range(3):
            user = state(b, texts[b, 1].tolist())
            logits = torch.stack([user / user.norm() @ vector(item) for item in items])
            logps = (logits / policy.similarity_temperature).log_softmax(dim=0)
            wanted.append(logps[items.index(TARGETS[b])])
        yield "log-probabilities", got, torch.stack(wanted)
        yield from gradient_pairs(policy.model, got.sum(), truth, torch.stack(wanted).sum())

    for name, pairs in zip(RETRIEVAL, (reasoned, read, vectors, ranked, contrast), strict=True):
        matrix.check(f"{label}: {name}", pairs)


GENERATIVE = ("run_prompt", "generate", "completion_logps", "item_logps", "beams")


def check_generative(matrix: Matrix, label: str, policy: Any, truth: Truth, names: Sequence[str]) -> None:
    """Every step of a `GenerativePolicy`."""
    batch, items = history_batch(), torch.tensor(ITEMS)
    prompts = [prompt_tokens(policy.chat.tokenizer, history) for history in HISTORIES]
    ids = [tuple(token for token in row if token >= 0) for row in policy.trie.item_tokens.tolist()]

    def states() -> Iterator[Pair]:
        got = policy.run_prompt(batch).states
        for b, prompt in enumerate(prompts):
            yield f"prompt of {len(prompt)}", got[b], truth.run(prompt)[1][-1]

    def of_rollouts(made: Any, temperature: float) -> Iterator[Pair]:
        for b, prompt in enumerate(prompts):
            for g, item in enumerate(made.items[b].tolist()):
                wanted = truth.allowed_steps(prompt, ids, SEEN[b], item, temperature)[0]
                yield f"{len(prompt)} + {len(ids[item])}", made.logps[b, g, : len(ids[item])], wanted

    def sampled() -> Iterator[Pair]:
        generator = torch.Generator().manual_seed(0)
        yield from of_rollouts(policy.generate(batch, 3, temperature=0.7, generator=generator), 0.7)

    def searched() -> Iterator[Pair]:
        policy.model.eval()
        try:
            with torch.no_grad():
                made = policy.beams(policy.run_prompt(batch), batch["seen"], 3)
        finally:
            policy.model.train()
        yield from of_rollouts(made, 1.0)

    def given() -> Iterator[Pair]:
        logps, mask, entropy = policy.completion_logps(batch, items, 0.7)
        weights, total = weights_like(logps), torch.zeros((), dtype=torch.float64)
        for b, prompt in enumerate(prompts):
            for g, item in enumerate(ITEMS[b]):
                length = len(ids[item])
                wanted, spread = truth.allowed_steps(prompt, ids, SEEN[b], item, 0.7)
                yield f"logps, {len(prompt)} + {length}", logps[b, g, :length], wanted
                yield f"entropy, {len(prompt)} + {length}", entropy[b, g, :length], spread
                yield "mask", mask[b, g].sum(), length
                total = total + (weights[b, g, :length] * wanted).sum()
        yield from gradient_pairs(policy.model, (logps * weights).sum(), truth, total)

    def scored() -> Iterator[Pair]:
        got = policy.item_logps(batch)
        for b, prompt in list(enumerate(prompts))[1:]:
            for item in range(len(TITLES)):
                if item not in SEEN[b]:
                    wanted = truth.allowed_steps(prompt, ids, SEEN[b], item, 1.0)[0].sum()
                    yield f"item {TITLES[item]} after {len(prompt)}", got[b, item], wanted

    checks = dict(zip(GENERATIVE, (states, sampled, given, scored, searched), strict=True))
    for name in names:
        matrix.check(f"{label}: {name}", checks[name])


def family_rows(name: str, *, quick: bool = False) -> list[Row]:
    """Every cell of a family; those of the whole model alone for a variant of another one.

    Args:
        name: in `FAMILIES`.
        quick: leave out what is most like other cells: semantic ids, new tokens without adapters, the other way to tie.
    """
    matrix, family = Matrix(name), FAMILIES[name]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings(), wide_softmax():
        warnings.simplefilter("ignore")
        folder = write_family(name, Path(place) / "usual")
        _check_shared(matrix, "whole model", folder, None)
        _check_default_adapters(matrix, folder)
        if not family.variant:
            lora = Lora(r=2, alpha=4, dropout=0.0, target_modules=lora_targets(name))
            _check_shared(matrix, "adapters", folder, lora)
            _check_new_tokens(matrix, "item_ids token with adapters", folder, "token", lora)
            if not quick:
                _check_new_tokens(matrix, "item_ids token", folder, "token", None)
                _check_new_tokens(matrix, "item_ids semantic with adapters", folder, "semantic", lora)
        if family.both and not family.variant and not quick:
            how = "untied" if family.tied else "tied"
            other = write_family(name, Path(place) / "other", tied=not family.tied)
            _check_shared(matrix, f"{how} whole model", other, None, (RAW[1], RAW[4]))
            some = ("generate", "completion_logps")
            _check_new_tokens(matrix, f"{how} item_ids token with adapters", other, "token", lora, some)
    _LOADED.clear()
    return matrix.rows


def _check_default_adapters(matrix: Matrix, folder: Path) -> None:
    """Which layers get the adapters of `Lora()`."""
    try:
        model, _ = LanguageModel(str(folder), "float32", Lora()).load()
    except InputError as error:
        matrix.add(DEFAULT_ADAPTERS, "not adapted", 0.0, " ".join(str(error).split()))
    except Exception as error:
        matrix.add(DEFAULT_ADAPTERS, "crashed", 0.0, _what_crashed(error))
    else:
        names = [
            name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in model.named_parameters() if "lora_A" in name
        ]
        matrix.add(DEFAULT_ADAPTERS, "adapted", 0.0, ", ".join(dict.fromkeys(names)))


DEFAULT_ADAPTERS = "Lora() by default"


def _check_shared(matrix: Matrix, label: str, folder: Path, lora: Any, raw: Sequence[str] = RAW) -> None:
    """Policies that add no tokens: they share a model."""
    language_model = LoadedOnce(str(folder), "float32", lora)
    retrieval, titles = f"{label}, retrieval", f"{label}, item_ids title"
    only_raw = raw is not RAW
    names = [f"{label}: {name}" for name in raw]
    if not only_raw:
        names += [f"{retrieval}: {name}" for name in RETRIEVAL] + [f"{titles}: {name}" for name in GENERATIVE]
    truth: Truth | None = None
    with matrix.made(names):
        model, _ = language_model.load()
        move_adapters(model)
        truth = Truth(model)
    if truth is None:
        return
    check_raw(matrix, label, model, truth, raw)
    if only_raw:
        return
    with matrix.made([f"{retrieval}: {name}" for name in RETRIEVAL]):
        policy = RetrievalPolicy(
            language_model, prompt=prompt_template(), answer_marker=MARKER, similarity_temperature=0.5,
            max_completion_length=2,
        )  # fmt: skip
        policy.bind(catalogue())
        policy.index.to(next(policy.model.parameters()).dtype)
        check_retrieval(matrix, retrieval, policy, truth)
    with matrix.made([f"{titles}: {name}" for name in GENERATIVE]):
        writer = GenerativePolicy(language_model=language_model, prompt=prompt_template())
        writer.bind(catalogue())
        check_generative(matrix, titles, writer, truth, GENERATIVE)


def _check_new_tokens(
    matrix: Matrix, label: str, folder: Path, kind: Any, lora: Any, names: Sequence[str] = GENERATIVE
) -> None:
    every = [*([TRAINED_ROWS] if lora is not None else []), *names]
    with matrix.made([f"{label}: {name}" for name in every]):
        policy = GenerativePolicy(
            language_model=LanguageModel(str(folder), "float32", lora),
            item_ids=kind,
            semantic_ids=SemanticIds(levels=2, codes=3) if kind == "semantic" else None,
            prompt=prompt_template(),
        )
        policy.bind(catalogue())
        if lora is not None:
            matrix.check(f"{label}: {TRAINED_ROWS}", lambda: _trained_rows(policy))
        move_adapters(policy.model)
        in_float64(policy.model)
        check_generative(matrix, label, policy, Truth(policy.model), names)


TRAINED_ROWS = "rows of new tokens"


def _trained_rows(policy: Any) -> Iterator[Pair]:
    """Whether training moves the rows of the new tokens, in the embedding and in a head of its own."""
    causal = policy.model.get_base_model()
    ends = {"embedding": causal.get_input_embeddings(), "head": causal.get_output_embeddings()}
    before = {name: end.weight.clone() for name, end in ends.items()}
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if parameter.requires_grad and "trainable_tokens" in name:
                parameter.add_(1.0)
    for name, end in ends.items():
        moved = (end.weight - before[name]).abs().amin(dim=1)
        old = vocabulary()
        yield f"new rows of the {name} that are trained", moved[old:], torch.ones(len(moved) - old)
        yield f"old rows of the {name} that are trained", moved[:old], torch.zeros(old)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if parameter.requires_grad and "trainable_tokens" in name:
                parameter.sub_(1.0)


# What transformers itself makes of padding and caches.


def consistency_rows(name: str) -> list[Row]:
    """Whether the family's own forward says the same with padding and with its cache as it does without."""
    truth = Truth(make_from_folder(name))
    model = truth.causal
    rows, ids, mask = random_prompts()
    made = []

    def consistent(check: str, pairs: Callable[[], Iterator[Pair]]) -> None:
        worst, where = 0.0, ""
        try:
            with torch.no_grad(), wide_softmax():
                for label, ours, wanted in pairs():
                    gap = _gap(ours, wanted)
                    if not gap <= worst:
                        worst, where = gap, label
        except Exception as error:
            made.append(Row(name, check, "none", 0.0, _what_crashed(error)))
        else:
            limit = FLOAT32_INSIDE.get(FAMILIES[name].kind, TOLERANCE)
            outcome = "consistent" if worst <= limit else "inconsistent"
            made.append(Row(name, check, outcome, worst, where))

    def positions(seen: Tensor) -> Tensor:
        return (seen.cumsum(dim=1) - 1).clamp(min=0)

    def left() -> Iterator[Pair]:
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
        for b, prompt in enumerate(rows):
            yield f"prompt of {len(prompt)}", logits[b, -len(prompt) :], truth.run(prompt)[0]

    def right() -> Iterator[Pair]:
        width = ids.shape[1]
        padded = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
        real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        logits = model(input_ids=padded, attention_mask=real, use_cache=False).logits
        for b, prompt in enumerate(rows):
            yield f"prompt of {len(prompt)}", logits[b, : len(prompt)], truth.run(prompt)[0]

    def cached(inputs: Tensor, real: Tensor, steps: Sequence[int], kept: int) -> Iterator[Pair]:
        """A first pass over all but the last sum(steps) tokens, then the others; `kept` of the logits are compared."""
        state: dict[str, Any] = {}
        logits, start = [], 0
        for chunk in (inputs.shape[1] - sum(steps), *steps):
            stop = start + chunk
            masked = real[:, start if "cache_params" in state else 0 : stop]
            place = positions(real)[:, start:stop]
            output = model(
                input_ids=inputs[:, start:stop], attention_mask=masked, position_ids=place, use_cache=True, **state
            )
            names = ("past_key_values", "cache_params", "state")
            state = {key: output[key] for key in names if output.get(key) is not None}
            logits.append(output.logits)
            start = stop
        every = torch.cat(logits, dim=1)
        for row, padded, tokens in zip(every, real, inputs, strict=True):
            prompt = tokens[padded.bool()].tolist()
            yield f"prompt of {len(prompt)}", row[-kept:], truth.run(prompt)[0][-kept:]

    alone = torch.tensor(rows[2:]), torch.ones(1, len(rows[2]), dtype=torch.int64)
    consistent("transformers: padding on the left", left)
    consistent("transformers: padding on the right", right)
    consistent("transformers: cache, a token at a time", lambda: cached(*alone, [1] * 6, 26))
    consistent("transformers: cache, six tokens at once", lambda: cached(*alone, [6], 26))
    consistent("transformers: padding on the left and cache, a token at a time", lambda: cached(ids, mask, [1] * 4, 5))
    consistent("transformers: padding on the left and cache, four tokens at once", lambda: cached(ids, mask, [4], 5))
    return made


def make_from_folder(name: str) -> Any:
    from transformers import AutoModelForCausalLM

    if not FAMILIES[name].composite:
        return make_model(name)
    with tempfile.TemporaryDirectory() as place:
        return AutoModelForCausalLM.from_pretrained(write_family(name, Path(place)), dtype=torch.float32)


# Tables.


def summary(rows: Sequence[Row]) -> str:
    """A line for each family with counts, then what is not right."""
    families = list(dict.fromkeys(row.family for row in rows))
    lines = [f"{'family':22s} {'right':>6s} {'refused':>8s} {'wrong':>6s} {'crashed':>8s} {'worst gap':>10s}"]
    totals = dict.fromkeys(OUTCOMES, 0)
    whole = dict.fromkeys(OUTCOMES, 0)

    def line(name: str, count: dict[str, int]) -> str:
        return f"{name:22s} {count['right']:6d} {count['refused']:8d} {count['wrong']:6d} {count['crashed']:8d}"

    for family in families:
        own = [row for row in rows if row.family == family and row.outcome in OUTCOMES]
        count = {outcome: sum(row.outcome == outcome for row in own) for outcome in OUTCOMES}
        totals = {outcome: totals[outcome] + count[outcome] for outcome in OUTCOMES}
        whole[next((outcome for outcome in ("crashed", "wrong", "refused") if count[outcome]), "right")] += 1
        lines.append(f"{line(family, count)} {max((row.gap for row in own), default=0.0):10.1e}")
    lines.append(line("cells", totals))
    lines.append(
        f"{len(families)} families: {whole['right']} right in every cell, {whole['refused']} right or refused, "
        f"{whole['wrong']} with a wrong cell, {whole['crashed']} with a crash"
    )
    return "\n".join(lines)


def details(rows: Sequence[Row]) -> str:
    """What is not right, equal sentences of a family together."""
    together: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.outcome not in ("right", "consistent", "adapted"):
            label = "" if row.outcome in ("wrong", "inconsistent") else row.sentence
            together.setdefault((row.family, row.outcome, label), []).append(row)
    lines = []
    for (family, outcome, label), some in together.items():
        lines.append(f"{family}: {outcome} in {len(some)} cells{': ' + label if label else ''}")
        lines += [
            f"    {row.check}" + (f": off by {row.gap:.1e} ({row.sentence})" if not label else "") for row in some
        ]
    return "\n".join(lines)


def markdown(rows: Sequence[Row]) -> str:
    """The page docs/models.md."""
    families = list(dict.fromkeys(row.family for row in rows))
    kinds = {FAMILIES[family].kind for family in families}
    what = (
        f"Each of these {len(families)} families and variants ({len(kinds)} model types of transformers) is built "
        "small with weights far from zero. Sampling, log-probabilities, gradients and item scores are compared with "
        "a plain forward of transformers in float64, one sequence at a time. *Runs* means equal to "
        f"{TOLERANCE:.5f} in every call. *Refused* means an error of one sentence, which is quoted. The script "
        "`python -m tests.helpers.family_matrix` makes this page."
    )
    layers = (
        "The last column has the layers of a model that `language_model.lora` adapts by default. Where it is empty, "
        "set `target_modules`."
    )
    lines = [
        "# Models",
        "",
        textwrap.fill(what, 120),
        "",
        textwrap.fill(layers, 120),
        "",
        "| family | model type | settings checked | outcome | default LoRA layers |",
        "| --- | --- | --- | --- | --- |",
    ]
    for family in families:
        own = [row for row in rows if row.family == family and row.outcome in OUTCOMES]
        adapted = [row.sentence for row in rows if row.family == family and row.outcome == "adapted"]
        cells = (family, f"`{FAMILIES[family].kind}`", _settings(family), _outcome(own), "".join(adapted))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


_SETTINGS = {
    "sliding_window": "sliding window",
    "attention_window_size": "sliding window",
    "window_size": "sliding window",
    "attention_chunk_size": "chunked attention",
    "final_logit_softcapping": "logit softcap",
    "logits_soft_cap": "logit softcap",
    "logit_scale": "logit scale",
    "logits_scaling": "logit scale",
    "lm_head_multiplier": "logit scale",
    "lm_head_bias": "head bias",
    "partial_rotary_factor": "partial rotary",
    "rotary_dim": "partial rotary",
    "alibi": "ALiBi",
    "n_routed_experts": "experts",
    "num_local_experts": "experts",
    "moe_num_experts": "experts",
    "kv_lora_rank": "latent attention",
    "no_rope_layers": "layers without rotary positions",
    "num_kv_shared_layers": "shared keys and values",
}


def _settings(family: str) -> str:
    built = FAMILIES[family]
    options = {**built.options, **(built.text or {})}
    ropes = [options.get(key, {}).get("rope_type") for key in ("rope_parameters", "rope_scaling")]
    found = [f"{rope} positions" for rope in ropes if rope]
    found += [text for key, text in _SETTINGS.items() if options.get(key)]
    found += ["recurrent layers"] if {"linear_attention", "mamba", "conv"} & set(_layers(options)) else []
    found.append("tied head" if built.tied else "own head")
    return ", ".join(dict.fromkeys(found))


def _layers(options: dict[str, Any]) -> list[str]:
    return [*options.get("layer_types", []), *options.get("layers_block_type", [])]


def _outcome(rows: Sequence[Row]) -> str:
    count = {outcome: [row for row in rows if row.outcome == outcome] for outcome in OUTCOMES}
    if len(count["right"]) == len(rows):
        return "runs"
    parts = []
    tokens = [row for row in rows if "item_ids token" in row.check]
    if tokens and all(row.outcome == "right" for row in tokens) and not count["wrong"] and not count["crashed"]:
        return (
            f"runs with `item_ids: token` and in `completion_logps`; refused elsewhere: {count['refused'][0].sentence}"
        )
    if count["right"]:
        parts.append(f"runs in {len(count['right'])} of {len(rows)} calls")
    for outcome in OUTCOMES[1:]:
        sentences: dict[str, list[str]] = {}
        for row in count[outcome]:
            sentences.setdefault(row.sentence if outcome != "wrong" else "", []).append(row.check)
        for sentence, checks in sentences.items():
            where = "" if len(checks) == len(rows) else f" ({len(checks)} calls, such as {checks[0]})"
            parts.append(f"{outcome}{where}{': ' if sentence else ''}{sentence}")
    return "; ".join(parts).replace("|", "\\|")


def listed_families(page: str) -> list[str]:
    """Families in the table of a page that `markdown` made."""
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
    return [name for name in rows if name not in ("family", "---")]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="*", default=[name for name in FAMILIES if is_available(name)])
    parser.add_argument("--rows", type=Path, help="read the cells that an earlier --json wrote instead of making them")
    parser.add_argument("--json", type=Path, help="where to write the cells")
    parser.add_argument("--markdown", type=Path, help="where to write the page of the documentation")
    parser.add_argument("--transformers", action="store_true", help="check transformers' own padding and caches, too")
    parser.add_argument("--details", action="store_true", help="print what is not right")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    rows: list[Row] = []
    if options.rows:
        rows = [Row(**cell) for cell in json.loads(options.rows.read_text(encoding="utf-8"))]
    for name in [] if options.rows else options.families:
        start = time.perf_counter()
        rows += family_rows(name)
        if options.transformers:
            rows += consistency_rows(name)
        print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        if options.json:
            options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    print(summary(rows))
    if options.details:
        print(details(rows))
    if options.markdown:
        options.markdown.write_text(markdown(rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
