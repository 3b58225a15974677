"""Rollouts of the batches that GRPO trains on together, kept until each has been used as often as asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minirec_pl.data.loader import GROUP_SIZE, REPEATED
from minirec_pl.grpo.loss import flat_groups
from minirec_pl.selection.signals import SampleSignals

Batch = Mapping[str, Tensor]
_FILLERS = {  # what stands after the last rollout of a group that is smaller than others, by field
    "items": 0,
    "rewards": 0.0,
    "applies": False,
    "rewards_by_name": float("nan"),
    "mask": False,
    "entropy": 0.0,
    "old_logps": 0.0,
    "ref_logps": 0.0,
    "advantages": 0.0,
    "texts": -1,
}


def take_rows(batch: Batch, rows: Tensor) -> dict[str, Tensor]:
    """The samples of a batch at these rows, in this order; what is not a tensor is left out."""
    return {name: value[rows] for name, value in batch.items() if isinstance(value, Tensor)}


def scoring_numbers(words: Sequence[int], sample_ids: Tensor, size: tuple[int, int]) -> Tensor:
    """Uniform numbers float64 [B, *size] whose rows depend on the words and their own sample_id alone."""
    rows = [np.random.default_rng([*words, sample_id]).random(size) for sample_id in sample_ids.tolist()]
    return torch.from_numpy(np.array(rows, dtype=np.float64).reshape(len(rows), *size)).to(sample_ids.device)


@dataclass
class RolloutBatch:
    """B prompts with G rollouts each, and all that an update needs to know of them.

    Groups of unequal size are padded to G with rollouts that have no token and no reward, see `sizes`.

    Attributes:
        batch: the prompts, each tensor [B, ...]; with a column `group_size` where groups are of unequal size.
        items: int64 [B, G], item index; of a rollout that ranks items, the first.
        rewards: float32 [B, G], 0 where none applies.
        applies: bool [B, G], whether any reward applies.
        rewards_by_name: float32 [B, G] each, NaN where that reward does not apply.
        mask: bool [B, G, L], active tokens.
        entropy: float32 [B, G, L] in nats, of the groups whose entropy no update will measure, else 0.
        target_logps: float32 [B, L], log-probabilities of the target's tokens when the rollouts were drawn; None where
            the target is not a completion.
        target_mask: bool [B, L], tokens of the target; None likewise.
        old_logps: float32 [B, G, L] under the policy that sampled; None where it is updated once, and so on-policy.
        ref_logps: float32 [B, G, L] under the reference; None without one.
        advantages: float32 [B, G].
        learns: bool [B], groups that the loss depends on.
        pairs: bool [B], groups without advantage that are turned into preference pairs.
        texts: int64 [B, G, L], tokens of the rollouts, padded with -1, where these are texts and not items.
    """

    batch: dict[str, Tensor]
    items: Tensor
    rewards: Tensor
    applies: Tensor
    rewards_by_name: dict[str, Tensor]
    mask: Tensor
    entropy: Tensor
    target_logps: Tensor | None
    target_mask: Tensor | None
    old_logps: Tensor | None
    ref_logps: Tensor | None
    advantages: Tensor
    learns: Tensor
    pairs: Tensor
    texts: Tensor | None = None

    def __len__(self) -> int:
        return len(self.items)

    @property
    def flat(self) -> Tensor:
        """Groups without reward variance, bool [B]."""
        return flat_groups(self.rewards, self.applies)

    @property
    def repeated(self) -> Tensor:
        """Prompts that another rank has, too, and that are here to make the ranks equal, bool [B]."""
        return self.batch.get(REPEATED, torch.zeros_like(self.learns))

    @property
    def sizes(self) -> Tensor | None:
        """Rollouts of each group, int64 [B], where they are of unequal size; else None."""
        return self.batch.get(GROUP_SIZE)

    @property
    def exists(self) -> Tensor:
        """Which rollouts were drawn and are no padding, bool [B, G]."""
        if self.sizes is None:
            return torch.ones_like(self.applies)
        return torch.arange(self.items.shape[1], device=self.items.device) < self.sizes[:, None]

    @property
    def weights(self) -> Tensor | None:
        """Weight of each rollout in averages, float64 [B, G], that of a group being 1; None for equal weights."""
        return None if self.sizes is None else self.exists.double() / self.sizes[:, None]

    def of_equal_size(self) -> Iterator[tuple[Tensor, RolloutBatch]]:
        """The groups of each size without padding, and at which rows they are, int64 [n]."""
        if self.sizes is None:
            yield torch.arange(len(self), device=self.items.device), self
            return
        for size in sorted(set(self.sizes.tolist())):
            rows = (self.sizes == size).nonzero().flatten()
            yield rows, self.take(rows).resized(size)

    def resized(self, size: int) -> RolloutBatch:
        """Groups padded to a size, or cut to it."""
        changed: dict[str, Any] = {}
        for name, filler in _FILLERS.items():
            value = getattr(self, name)
            if isinstance(value, dict):
                changed[name] = {key: resize(part, size, filler) for key, part in value.items()}
            elif value is not None:
                changed[name] = resize(value, size, filler)
        return replace(self, **changed)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each rollout, those that the loss leaves out included, int64 [B, G]."""
        return (self.mask if self.texts is None else self.texts >= 0).sum(dim=-1)

    @property
    def known_rewards(self) -> Tensor:
        """Rewards [B, G] with the mean of the others where none applies (0 where that goes for the whole group)."""
        mean = self.rewards.sum(dim=1, keepdim=True) / self.applies.sum(dim=1, keepdim=True).clamp(min=1)
        return self.rewards.where(self.applies, mean)

    def take(self, rows: Tensor) -> RolloutBatch:
        """The groups at these rows, in this order."""
        return _merge(lambda values: values[0][rows], [self])

    @staticmethod
    def cat(parts: Sequence[RolloutBatch]) -> RolloutBatch:
        """Rollouts of parts of one batch, put together again."""
        return _merge(torch.cat, parts)


def resize(values: Tensor, size: int, filler: float = 0.0) -> Tensor:
    """Values [B, G, ...] of rollouts, cut to G = `size` or filled up to it."""
    missing = size - values.shape[1]
    if missing <= 0:
        return values[:, :size]
    return torch.cat([values, values.new_full((len(values), missing, *values.shape[2:]), filler)], dim=1)


def _merge(function: Callable[[list[Tensor]], Tensor], parts: Sequence[RolloutBatch]) -> RolloutBatch:
    merged: dict[str, Any] = {}
    for field in fields(RolloutBatch):
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], dict):
            merged[field.name] = {name: function([value[name] for value in values]) for name in values[0]}
        else:
            merged[field.name] = None if values[0] is None else function(values)
    return RolloutBatch(**merged)


@dataclass
class Generation:
    """The rollouts of one generation batch and how far training has used them.

    Attributes:
        batches: the micro-batches, trained on in turn.
        positions: how many training steps use them in all, `len(batches)` times the iterations unless the epoch ends.
        totals: float64 [n, 3], active tokens, completions and groups of each optimizer step, over all ranks; those of
            groups of unequal size by their weights.
        position: the last training step that used them; -1 for none.
    """

    batches: list[RolloutBatch]
    positions: int
    totals: Tensor
    position: int = -1

    def at(self, position: int) -> RolloutBatch:
        """The micro-batch of a position."""
        return self.batches[position % len(self.batches)]

    @property
    def left(self) -> bool:
        """Whether training steps are still to use them."""
        return self.position + 1 < self.positions

    def to(self, device: torch.device) -> None:
        """Moves the rollouts."""
        self.batches = [_merge(lambda values: values[0].to(device), [batch]) for batch in self.batches]

    def state_dict(self) -> dict[str, Any]:
        """Tensors and primitives."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Generation:
        """What `state_dict` gave."""
        return cls(**{**state, "batches": [RolloutBatch(**batch) for batch in state["batches"]]})


def step_totals(batches: Sequence[RolloutBatch], positions: int, accumulate: int) -> Tensor:
    """Active tokens, completions and groups of each optimizer step, before the first of them.

    Args:
        batches: the micro-batches of a generation.
        positions: training steps that use them, in turn.
        accumulate: training steps of an optimizer step.

    Returns:
        float64 [ceil(positions / accumulate), 3].
    """
    sizes: list[tuple[float, float, int]] = []
    for batch in batches:
        if batch.weights is None:
            sizes.append((int(batch.mask.sum()), batch.items.numel(), len(batch)))
        else:
            tokens = batch.weights * batch.mask.sum(dim=-1)
            sizes.append((float(tokens.sum()), float(batch.weights.sum()), len(batch)))
    return totals_of(sizes, positions, accumulate)


def totals_of(sizes: Sequence[tuple[float, float, int]], positions: int, accumulate: int) -> Tensor:
    """See `step_totals`, of micro-batches of these sizes."""
    used = [sizes[position % len(sizes)] for position in range(positions)]
    steps = [used[start : start + accumulate] for start in range(0, positions, accumulate)]
    return torch.tensor([[sum(column) for column in zip(*step, strict=True)] for step in steps], dtype=torch.float64)


def signals_of(drawn: Sequence[RolloutBatch], *, with_rewards: bool) -> SampleSignals | None:
    """What selection learns from rollouts; groups to which no reward applies are left out, None if that goes for all.

    Args:
        drawn: all that was drawn.
        with_rewards: false where the mean of a group's rewards does not estimate what a single rollout gets.
    """
    known = torch.cat([part.applies.any(dim=1) for part in drawn])
    if not bool(known.any()):
        return None
    exact = [part.target_logps.sum(dim=1).exp() for part in drawn if part.target_logps is not None]
    solved = torch.cat(exact)[known] if exact else None
    rewards = torch.cat([part.known_rewards for part in drawn])
    ids = torch.cat([part.batch["sample_id"] for part in drawn])
    sizes = [part.sizes for part in drawn if part.sizes is not None]
    return SampleSignals(
        ids[known],
        rewards[known] if with_rewards else None,
        solve_probability=solved,
        group_size=torch.cat(sizes)[known] if sizes else None,
    )


def figures_of(drawn: Sequence[RolloutBatch]) -> dict[str, Tensor]:
    """What is logged of rollouts, under TRL's names."""
    rewards, flat = torch.cat([part.known_rewards for part in drawn]), torch.cat([part.flat for part in drawn])
    applies = torch.cat([part.applies for part in drawn])
    known = applies.any(dim=1)
    spread = (rewards - rewards.mean(dim=1, keepdim=True)).square().sum(dim=1) / (applies.sum(dim=1) - 1).clamp(min=1)
    lengths = torch.cat([part.lengths[part.exists] for part in drawn])
    return {
        "reward": rewards[applies].sum() / applies.sum().clamp(min=1),
        "reward_std": spread[known].sqrt().sum() / known.sum().clamp(min=1),
        "frac_reward_zero_std": flat.float().mean(),
        "completions/mean_length": lengths.float().mean(),
        **{
            f"rewards/{name}/mean": torch.cat([part.rewards_by_name[name] for part in drawn]).nanmean()
            for name in drawn[0].rewards_by_name
        },
    }
