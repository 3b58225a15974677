"""Layers of a transformers cache for prompts that are run once and shared by a group of completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class PromptLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keeps the keys and values of the first pass and hands out those it is given.

    The recomputation of gradient checkpointing therefore finds it as the first pass did.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values, each [U, heads, T, d], as given."""
        if not self.is_initialized:
            self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


class BranchLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Puts the prompt's keys and values before those of its completions, differentiably, and keeps nothing."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self.is_initialized = keys, values, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of prompt and completion, each [R, heads, T + t, d]."""
        assert self.keys is not None
        assert self.values is not None
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


class DecodeLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Grows by one token a step inside a buffer that is allocated once.

    Args:
        keys: float [U, heads, T, d] of the prompts.
        values: the same.
        row: int64 [R], the prompt of each row.
        room: tokens that may follow the prompt.
    """

    def __init__(self, keys: Tensor, values: Tensor, row: Tensor, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.n_rows, self.length, self.is_initialized = len(row), keys.shape[-2], True
        self.buffers = (self._buffer(keys, row, room), self._buffer(values, row, room))

    @staticmethod
    def _buffer(states: Tensor, row: Tensor, room: int) -> Tensor:
        _, heads, length, width = states.shape
        buffer = states.new_empty(len(row), heads, length + room, width)
        buffer[:, :, :length] = states.index_select(0, row)
        return buffer

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values so far, each [rows in use, heads, length, d]."""
        start, self.length = self.length, self.length + key_states.shape[-2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[: self.n_rows, :, start : self.length] = states
        keys, values = (buffer[: self.n_rows, :, : self.length] for buffer in self.buffers)
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self.length

    def select(self, n_rows: int, moves: Sequence[tuple[Tensor, Tensor, int]]) -> None:
        """Keeps `n_rows` rows, after all moves at once.

        Args:
            n_rows: rows in use from now on.
            moves: (target, source, start): row `target[i]` becomes what row `source[i]` was, from token `start` on.
        """
        for buffer in self.buffers:
            moved = [buffer[source, :, start : self.length] for _, source, start in moves]
            for (target, _, start), states in zip(moves, moved, strict=True):
                buffer[target, :, start : self.length] = states
        self.n_rows = n_rows


def recording_cache() -> Cache:
    """A cache that a prompt fills, differentiably."""
    return Cache(layer_class_to_replicate=PromptLayer)


def branch_cache(prompt: Cache, row: Tensor) -> Cache:
    """A cache for one pass over completions, row r of prompt `row[r]`; it leaves the prompt's own as it is."""
    return Cache([BranchLayer(*(states.index_select(0, row) for states in pair)) for pair in _pairs(prompt)])


def decode_cache(prompt: Cache, row: Tensor, room: int) -> Cache:
    """A cache for at most `room` tokens after the prompts, row r of prompt `row[r]`."""
    return Cache([DecodeLayer(*pair, row, room) for pair in _pairs(prompt)])


def join_prompts(caches: Iterable[Cache], order: Tensor) -> Cache:
    """One cache of prompts that were run in several batches, padded on the left to the longest.

    Args:
        caches: of the batches.
        order: int64 [U], the position of each prompt in the batches laid end to end.
    """
    joined = recording_cache()
    for index, batches in enumerate(zip(*map(_pairs, caches), strict=True)):
        length = max(keys.shape[-2] for keys, _ in batches)
        keys, values = (_joined(kind, length, order) for kind in zip(*batches, strict=True))
        joined.update(keys, values, index)
    return joined


def _joined(batches: Iterable[Tensor], length: int, order: Tensor) -> Tensor:
    padded = [torch.nn.functional.pad(states, (0, 0, length - states.shape[-2], 0)) for states in batches]
    return torch.cat(padded).index_select(0, order)


def _pairs(cache: Cache) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cast(list[Any], cache.layers)]
