"""Modules of which only the weights are cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn


class ExactBuffers(nn.Module):
    """A module whose buffers, and those of its parts, keep their dtype when its parameters are cast.

    `Trainer(precision="bf16-true")` casts a whole module. Counters, fingerprints of weights, item vectors of a chosen
    dtype and the frequencies of rotary positions would be rounded by it. They move between devices as usual.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        parts: list[dict[str, Tensor | None]] = [part._buffers for part in self.modules()]
        before = [(buffers, name, value) for buffers in parts for name, value in buffers.items() if value is not None]
        applied: Any = super()._apply
        applied(fn, recurse)
        for buffers, name, value in before:
            now = buffers[name]
            if now is not None and now.dtype != value.dtype:
                buffers[name] = value.to(now.device)
        return self
