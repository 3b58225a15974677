"""Models whose positions depend on the length of a sequence: what they need so that a row depends on itself alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from minirec_pl.utils.errors import InputError


class PositionRules(NamedTuple):
    """How long sequences may be for a model to treat each of their tokens alike.

    Attributes:
        switch: longest sequence of the first of two regimes, which have other positions (LongRoPE, arXiv 2402.13753);
            None where there is one regime. A prompt and its completion must be in the same one, since keys cached in
            one regime mean nothing in the other.
        limit: longest sequence that does not depend on the batch or on what was run before (dynamic NTK scaling,
            attention scaled by the place in the batch, sparse attention whose indexer sees padding); None for any.
        rotaries: modules that choose the regime by the longest row of their input.
    """

    switch: int | None = None
    limit: int | None = None
    rotaries: tuple[nn.Module, ...] = ()

    def check(
        self, prompt: Tensor, completion: Tensor | int, name: Callable[[int], str] = "row {} of the batch".format
    ) -> None:
        """Refuses rows that break the rules.

        Args:
            prompt: int64 [B], tokens of each prompt.
            completion: int64 [B], or one number for all: tokens that may follow.
            name: what to call a row.

        Raises:
            InputError: naming the first such row.
        """
        if (self.switch is None and self.limit is None) or not len(prompt):
            return
        whole = prompt + completion
        remedy = "shorten the prompt (data.history_window) or the completion"
        # In a batch every row has the places of the longest prompt and of the longest completion.
        if self.limit is not None and int(prompt.max() + (whole - prompt).max()) > self.limit:
            row = int(whole.argmax())
            raise InputError(
                f"{name(row)} has {int(whole[row])} tokens with its completion, and beyond {self.limit} what the model "
                f"says of a row depends on the rest of the batch: {remedy}"
            )
        if self.switch is not None:
            crossing = ((prompt <= self.switch) & (whole > self.switch)).nonzero()
            if len(crossing):
                row = int(crossing[0])
                raise InputError(
                    f"{name(row)} has {int(prompt[row])} tokens, {int(whole[row])} with the longest completion, and "
                    f"the model changes its positions after {self.switch}, which cached keys cannot follow: {remedy}"
                )

    @contextmanager
    def each_row_by_itself(self) -> Iterator[None]:
        """Every row of a pass inside is in the regime of its own length, whatever the rows beside it."""
        with ExitStack() as stack:
            for rotary in self.rotaries:
                assert self.switch is not None
                stack.enter_context(_by_row(rotary, self.switch))
            yield


_KNOWN: WeakKeyDictionary[nn.Module, PositionRules] = WeakKeyDictionary()


def position_rules(decoder: nn.Module) -> PositionRules:
    """The rules of a transformer, found in its modules."""
    if decoder not in _KNOWN:
        switches, limits, rotaries = [], [], []
        for module in decoder.modules():
            found = _switches(module)
            switches += found
            rotaries += [module] if found else []
            limits += _limits(module)
        switch = None if not switches else min(switches)
        if len(set(switches)) > 1:
            # Layers that change at different lengths: only what lies below the first change or above the last is safe.
            limits.append(min(switches))
        _KNOWN[decoder] = PositionRules(switch, min(limits, default=None), tuple(rotaries))
    return _KNOWN[decoder]


def _rope_kinds(module: nn.Module) -> list[tuple[str, dict[str, Any]]]:
    """(type, parameters) of the rotary embeddings in a module, one for each kind of layer that it serves."""
    kind, config = getattr(module, "rope_type", None), getattr(module, "config", None)
    if kind is None or config is None:
        return []
    given: Any = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if isinstance(kind, dict):
        return [(one, given.get(layer) or {}) for layer, one in kind.items()]
    return [(str(kind), given)]


def _switches(module: nn.Module) -> list[int]:
    found = []
    for kind, parameters in _rope_kinds(module):
        if kind == "longrope" or "long_mscale" in parameters:
            config: Any = module.config
            original = parameters.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None)
            found.append(int(original or config.max_position_embeddings))
    return found


def _limits(module: nn.Module) -> list[int]:
    found = [int(module.original_max_seq_len) for kind, _ in _rope_kinds(module) if "dynamic" in kind]  # type: ignore[arg-type]
    if getattr(module, "attn_temperature_tuning", False) and hasattr(module, "floor_scale"):
        found.append(int(module.floor_scale) - 1)  # type: ignore[arg-type]
    if isinstance(getattr(module, "index_topk", None), int):  # picks keys, padding among them, beyond so many
        found.append(int(module.index_topk))  # type: ignore[arg-type]
    return found


@contextmanager
def _by_row(rotary: nn.Module, switch: int) -> Iterator[None]:
    """Runs the rows of each regime apart inside a rotary embedding."""
    together: Any = rotary.forward

    def forward(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Sequence[Tensor]:
        long = position_ids.amax(dim=-1) >= switch
        if len(position_ids) == 1 or bool(long.all()) or not bool(long.any()):
            made: Sequence[Tensor] = together(x, position_ids, *args, **kwargs)
            return made
        rows = [(~long).nonzero().flatten(), long.nonzero().flatten()]
        parts = [together(x, position_ids[some], *args, **kwargs) for some in rows]
        order = torch.argsort(torch.cat(rows))
        return tuple(torch.cat(pair).index_select(0, order) for pair in zip(*parts, strict=True))

    rotary.forward = forward
    try:
        yield
    finally:
        del rotary.forward
