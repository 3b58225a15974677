"""Signals, what is known of samples: `SampleSignals` of one batch, `Signals` of a whole pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from minirec_pl.utils.errors import InputError
from minirec_pl.utils.ranks import gather_rows, world

Array: TypeAlias = Tensor | npt.NDArray[Any]
_SLACK = 1e-5  # a float32 softmax or cosine can exceed 1 by rounding
_ROWS = 65_536  # rows looked at in one go, so that a mapped file is not held in memory
_MEASURED = (
    *("reward_mean", "reward_std", "solve_probability", "solve_share", "alignment"),
    *("hits", "misses", "prior_hits", "prior_misses"),
)
_COUNTED = ("n_rollouts", "all_hit_streak", "all_miss_streak", "reward_epoch")
_LOWEST = {"solve_probability": 0, "solve_share": 0, "alignment": -1}


def name_ids(sample_ids: Tensor) -> str:
    """Names ids in an error message: five of them, then how many more there are."""
    shown = ", ".join(str(i) for i in sample_ids[:5].tolist())
    return shown if len(sample_ids) <= 5 else f"{shown} and {len(sample_ids) - 5} more"


def repeated_ids(sample_ids: Tensor) -> Tensor:
    """Returns the ids that occur more than once, one entry per repetition, ascending."""
    ordered = sample_ids.sort().values
    return ordered[1:][ordered[1:] == ordered[:-1]]


def as_ids(sample_id: Array | Sequence[int]) -> Tensor:
    """Turns sample ids into an int64 CPU tensor.

    Args:
        sample_id: [n], integers.

    Returns:
        [n] int64.

    Raises:
        InputError: If they are not a flat list of integers.
    """
    ids = sample_id.detach() if isinstance(sample_id, Tensor) else torch.as_tensor(np.asarray(sample_id))
    if ids.ndim != 1:
        raise InputError(f"sample_id has the shape {tuple(ids.shape)}: give a flat list of integers")
    if ids.numel() and (ids.is_floating_point() or ids.dtype == torch.bool):
        raise InputError(f"sample_id holds {ids.dtype}, not integers: convert the ids to int64")
    return ids.to("cpu", torch.int64)


def _checked(value: Array, name: str, ids: Tensor, ndim: int) -> Tensor:
    tensor = torch.as_tensor(value).detach()
    if tensor.ndim != ndim or len(tensor) != len(ids):
        wanted = f"[{len(ids)}]" if ndim == 1 else f"[{len(ids)}, n]"
        raise InputError(f"{name} has the shape {list(tensor.shape)}: give {wanted}, a row per sample_id")
    return tensor


def _refuse_non_finite(tensor: Tensor, name: str, ids: Tensor, known: Tensor | None = None) -> None:
    if not len(ids) or torch.isfinite(tensor.sum()):
        return
    parts = torch.split(tensor.reshape(len(ids), -1), _ROWS)
    bad = torch.cat([~torch.isfinite(part).all(dim=1).cpu() for part in parts])
    if known is not None:
        bad &= known
    if bad.any():
        raise InputError(
            f"{name} is NaN or infinite for sample_id {name_ids(ids[bad])}: fix the reward or the policy that made it"
        )


def _within(tensor: Tensor, name: str, ids: Tensor) -> Tensor:
    low = _LOWEST[name]
    bad = ((tensor < low - _SLACK) | (tensor > 1 + _SLACK)).cpu()
    if bad.any():
        raise InputError(f"{name} is outside [{low}, 1] for sample_id {name_ids(ids[bad])}: give values within")
    return tensor.double().clamp(low, 1.0)


@dataclass
class SampleSignals:
    """The signals of one batch of samples, as a module's `sample_signals(batch)` returns them.

    A field that was not measured is None. NumPy arrays are taken as well and become tensors.

    Attributes:
        sample_id: [B] int64.
        rewards: [B, G] float, the rewards of a group of G rollouts.
        gradient: [B, D] float, the gradient signal u.
        embedding: [B, E] float, the embedding e.
        solve_probability: [B] float in [0, 1], the exact probability that one rollout hits the target.
        alignment: [B] float in [-1, 1], the cosine of the sample's update with the way the parameters have moved.
        group_size: [B] int64, how many of a row's rewards count, where the groups are of unequal size; see
            `of_equal_size`.

    Raises:
        InputError: If a shape does not fit or a value is NaN or infinite; the message names the sample_ids.
    """

    sample_id: Tensor
    rewards: Tensor | None = None
    gradient: Tensor | None = None
    embedding: Tensor | None = None
    solve_probability: Tensor | None = None
    alignment: Tensor | None = None
    group_size: Tensor | None = None

    def __post_init__(self) -> None:
        self.sample_id = as_ids(self.sample_id)
        for name in ("rewards", "gradient", "embedding"):
            value = getattr(self, name)
            if value is None:
                continue
            tensor = _checked(value, name, self.sample_id, ndim=2)
            if tensor.shape[1] == 0:
                raise InputError(f"{name} has no columns: pass None for a signal that was not measured")
            _refuse_non_finite(tensor, name, self.sample_id)
            setattr(self, name, tensor)
        for name in ("solve_probability", "alignment"):
            value = getattr(self, name)
            if value is not None:
                tensor = _checked(value, name, self.sample_id, ndim=1)
                _refuse_non_finite(tensor, name, self.sample_id)
                setattr(self, name, _within(tensor, name, self.sample_id))
        if self.group_size is not None:
            self.group_size = _checked(self.group_size, "group_size", self.sample_id, ndim=1).to("cpu", torch.int64)

    def __len__(self) -> int:
        return len(self.sample_id)

    def of_equal_size(self) -> list[SampleSignals]:
        """Returns the rows of each size of group, smallest first, with as many rewards as count; else itself."""
        if self.group_size is None or self.rewards is None:
            return [self]
        parts = []
        for size in sorted(set(self.group_size.tolist())):
            rows = (self.group_size == size).nonzero().flatten()
            taken: dict[str, Any] = {}
            for field in fields(self):
                value: Tensor | None = getattr(self, field.name)
                taken[field.name] = None if value is None else value[rows.to(value.device)]
            parts.append(SampleSignals(**{**taken, "rewards": taken["rewards"][:, :size], "group_size": None}))
        return parts

    def cpu(self) -> SampleSignals:
        """Moves the signals to the CPU."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: None if value is None else value.cpu() for name, value in values.items()}
        return SampleSignals(**moved)

    @classmethod
    def cat(cls, parts: Sequence[SampleSignals]) -> SampleSignals:
        """Joins batches, in order.

        Args:
            parts: At least one; all must have measured the same signals with the same number of columns.

        Returns:
            One `SampleSignals` with all rows.

        Raises:
            InputError: If there are no parts or they do not fit together.
        """
        if not parts:
            raise InputError("there are no signals to join: give at least one batch")
        joined: dict[str, Tensor | None] = {}
        for field in fields(cls):
            values = [getattr(part, field.name) for part in parts]
            tensors = [value for value in values if value is not None]
            if tensors and len(tensors) != len(values):
                raise InputError(f"only some batches have {field.name}: return it for all or for none")
            if len({tensor.shape[1:] for tensor in tensors}) > 1:
                widths = sorted({tensor.shape[1] for tensor in tensors})
                raise InputError(f"{field.name} has {widths} columns in different batches: return one width")
            joined[field.name] = torch.cat(tensors) if tensors else None
        sample_id = joined.pop("sample_id")
        assert sample_id is not None
        return cls(sample_id=sample_id, **joined)


@dataclass
class Signals:
    """All that is known of a pool, a row per sample: what a selector reads.

    Usually made by `SignalStore.pool_view`. NumPy arrays are taken as well and become CPU tensors.

    Attributes:
        sample_id: [N] int64, each once, in any order.
        reward_mean: [N] float64, NaN where no rollout was drawn yet.
        reward_std: [N] float64, population standard deviation within the group, NaN likewise.
        n_rollouts: [N] int64, rollouts behind the mean, 0 where none.
        solve_probability: [N] float64 in [0, 1], exact, NaN where not known; None if never measured.
        solve_share: [N] float64 in [0, 1], share of rollouts that solved the sample, NaN where none was drawn.
        gradient: [N, D] float, a row of zeros where not measured; None if never measured.
        gradient_known: [N] bool, rows whose gradient was measured; None means all.
        gradient_fresh: [N] bool, rows that may form the mean gradient; None means all.
        embedding: [N, E] float; None if never measured.
        embedding_known: [N] bool, rows whose embedding was measured; None means all.
        alignment: [N] float64 in [-1, 1], see `SampleSignals`, NaN where not measured; None if never measured.
        hits: [N] float64, discounted count of the rollouts met in training that solved the sample. None where no store
            kept them, as the following.
        misses: [N] float64, likewise of those that did not solve it.
        prior_hits: [N] float64, hits that the predicted solve probability counts as, NaN where none was predicted.
        prior_misses: [N] float64, misses that it counts as.
        all_hit_streak: [N] int64, how many of the last groups in a row were all hits.
        all_miss_streak: [N] int64, how many were all misses.
        reward_epoch: [N] int64, epoch in which rewards were last met or measured, -1 for never.
        vectors: [N, D] float, who else had the target and the history; None where that is not known.

    Raises:
        InputError: If a shape does not fit, an id repeats, or a measured value is NaN or infinite.
    """

    sample_id: Tensor
    reward_mean: Tensor
    reward_std: Tensor
    n_rollouts: Tensor
    solve_probability: Tensor | None = None
    solve_share: Tensor | None = None
    gradient: Tensor | None = None
    gradient_known: Tensor | None = None
    gradient_fresh: Tensor | None = None
    embedding: Tensor | None = None
    embedding_known: Tensor | None = None
    alignment: Tensor | None = None
    hits: Tensor | None = None
    misses: Tensor | None = None
    prior_hits: Tensor | None = None
    prior_misses: Tensor | None = None
    all_hit_streak: Tensor | None = None
    all_miss_streak: Tensor | None = None
    reward_epoch: Tensor | None = None
    vectors: Tensor | None = None

    def __post_init__(self) -> None:
        self.sample_id = ids = as_ids(self.sample_id)
        if len(repeated := repeated_ids(ids)):
            raise InputError(f"sample_id {name_ids(repeated)} occurs more than once: keep one row each")
        for name in _MEASURED:
            value = getattr(self, name)
            if value is None:
                continue
            tensor = _checked(value, name, ids, ndim=1).to("cpu", torch.float64)
            _refuse_non_finite(tensor, name, ids, known=~tensor.isnan())
            setattr(self, name, _within(tensor, name, ids) if name in _LOWEST else tensor)
        for name in _COUNTED:
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, _checked(value, name, ids, ndim=1).to("cpu", torch.int64))
        for name in ("gradient_known", "gradient_fresh", "embedding_known"):
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, _checked(value, name, ids, ndim=1).to("cpu", torch.bool))
        for name, known in (("gradient", None), ("embedding", self.embedding_known), ("vectors", None)):
            value = getattr(self, name)
            if value is not None:
                tensor = _checked(value, name, ids, ndim=2)
                _refuse_non_finite(tensor, name, ids, known)
                setattr(self, name, tensor)

    def __len__(self) -> int:
        return len(self.sample_id)

    def solve_chance(self) -> Tensor:
        """Returns the probability that one rollout solves a sample: exact where known, else the share that did.

        Returns:
            [N] float64 in [0, 1], NaN where neither is known.
        """
        share, exact = self.solve_share, self.solve_probability
        chance = torch.full((len(self),), torch.nan, dtype=torch.float64) if share is None else share
        return chance if exact is None else exact.where(~exact.isnan(), chance)

    def posterior(self) -> tuple[Tensor, Tensor] | None:
        """Returns alpha and beta [N] of the solve probability, see `SignalStore.posterior`; None without counts."""
        if self.hits is None or self.misses is None:
            return None
        none = torch.full((len(self),), torch.nan, dtype=torch.float64)
        prior = [none if value is None else value for value in (self.prior_hits, self.prior_misses)]
        return prior[0].nan_to_num(nan=1.0) + self.hits, prior[1].nan_to_num(nan=1.0) + self.misses

    def take(self, rows: Tensor) -> Signals:
        """Takes the rows at these positions, in this order.

        Args:
            rows: [n] int64 positions in 0..N-1, or [N] bool.

        Returns:
            A new `Signals` of n rows.
        """
        taken: dict[str, Any] = {}
        for field in fields(self):
            value: Tensor | None = getattr(self, field.name)
            taken[field.name] = None if value is None else value[rows]
        return Signals(**taken)


def gather_signals(signals: SampleSignals | None, device: torch.device) -> SampleSignals | None:
    """Joins the signals that the ranks measured; every rank must call this at the same time.

    Args:
        signals: of this rank; None if it has none.
        device: that the process group works on.

    Returns:
        All rows, in the order of the ranks; None if no rank has any. Without a process group `signals`.

    Raises:
        InputError: if the ranks measured different signals.
    """
    if world()[0] == 1:
        return signals
    names = [field.name for field in fields(SampleSignals)]
    own = {name: None if signals is None else getattr(signals, name) for name in names}
    widths = torch.tensor([[-1 if v is None else (v.shape[1] if v.ndim > 1 else 0) for v in own.values()]])
    all_widths = torch.cat(gather_rows(widths, device))
    known = all_widths[all_widths[:, 0] >= 0]
    if not len(known):
        return None
    if bool((known != known[0]).any()):
        raise InputError(
            "the ranks measured different signals: let sample_signals return the same ones for every batch"
        )
    joined: dict[str, Tensor] = {}
    for name, width in zip(names, known[0].tolist(), strict=True):
        if width < 0:
            continue
        value = own[name]
        dtype = torch.int64 if name == "sample_id" else torch.float64
        shape = (0, width) if width else (0,)
        rows = torch.empty(shape, dtype=dtype) if value is None else value.detach().to(dtype)
        joined[name] = torch.cat(gather_rows(rows, device))
    return SampleSignals(**joined)
