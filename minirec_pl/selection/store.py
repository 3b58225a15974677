"""The signal store: what is known of every sample of the pool, and when it was measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from minirec_pl.selection.signals import Array, SampleSignals, Signals, as_ids, name_ids, repeated_ids
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.files import load_tensors, save_tensors

_OUTCOMES = {"hits": 0.0, "misses": 0.0}
_SQUARES = {"squared_weights": 0.0}
_PRIOR = {"prior_hits": torch.nan, "prior_misses": torch.nan}
_STREAKS = {"all_hit_streak": 0, "all_miss_streak": 0}
_SCALARS = dict.fromkeys(("reward_mean", "reward_std", "solve_share", "solve_probability", "alignment"), torch.nan)
_SCALARS |= _OUTCOMES | _SQUARES | _PRIOR
_COUNTS = {"n_rollouts": 0, "n_wasted": 0, **_STREAKS} | {
    f"{signal}_{clock}": -1
    for signal in ("reward", "solve_probability", "alignment", "gradient", "embedding", "prior")
    for clock in ("epoch", "step")
}
_ADDED = {*_OUTCOMES, *_SQUARES, *_PRIOR, *_STREAKS, "prior_epoch", "prior_step"}  # not in files of 0.1
_EXACT_ROLLOUTS = 8  # rollouts that an exact solve probability met in training counts as
_VECTORS = ("gradient", "embedding")
_MATRICES = ("rewards", *_VECTORS)


class SignalStore:
    """Signals by sample_id, each with its own age.

    A re-score replaces what was known. A reward met in training replaces it when its group is as large as the last one,
    and otherwise moves mean, standard deviation and solve share by `reward_decay`. Gradients, alignments, embeddings
    and exact solve probabilities are always replaced. Everything is on the CPU: means in float64, vectors in float32.

    Of the groups met in training it also keeps discounted counts of the rollouts that hit and missed,
    hits <- discount hits + those of the group, and how many of the last groups in a row were all hits or all misses. An
    exact solve probability p that training met without rewards counts as 8 rollouts, 8 p of them hits. With a prior,
    see `set_prior`, the counts are the Beta posterior of the solve probability, see `posterior`.

    Attributes:
        sample_ids: [N] int64, ascending.
        solve_threshold: A rollout with a reward above it has solved the sample.
        discount: Share in [0, 1] of the earlier counts that remains when a sample is met again.
        fingerprints: What the signals were measured with (model, data, seed), written into the file.
        vectors_version: Grows whenever a gradient or embedding is replaced.
    """

    def __init__(
        self,
        sample_ids: Array | Sequence[int],
        *,
        solve_threshold: float = 0.5,
        seed: int = 42,
        fingerprints: Mapping[str, str] | None = None,
    ) -> None:
        """Makes an empty store.

        Args:
            sample_ids: [N] distinct, the pool.
            solve_threshold: In units of reward.
            seed: Decides the order in which equally stale samples are re-scored.
            fingerprints: Name to text, for instance {"data": "...", "policy": "..."}.

        Raises:
            InputError: If the pool is empty or an id repeats.
        """
        self.sample_ids = as_ids(sample_ids).sort().values
        if not len(self.sample_ids):
            raise InputError("the pool is empty: give at least one sample to select from")
        if len(repeated := repeated_ids(self.sample_ids)):
            raise InputError(f"sample_id {name_ids(repeated)} occurs more than once in the pool: give each once")
        self.solve_threshold = solve_threshold
        self.discount = 0.5
        self.fingerprints = dict(fingerprints or {})
        self.vectors_version = 0
        self._has_prior = False
        self._lent = False  # whether a view may still read the embeddings, so that an update must not write into them
        self._seed = seed
        n = len(self.sample_ids)
        self._data = {name: torch.full((n,), empty, dtype=torch.float64) for name, empty in _SCALARS.items()}
        self._data |= {name: torch.full((n,), empty, dtype=torch.int64) for name, empty in _COUNTS.items()}

    def __len__(self) -> int:
        return len(self.sample_ids)

    def update(
        self,
        signals: SampleSignals,
        *,
        epoch: int,
        step: int,
        source: Literal["score", "train"],
        reward_decay: float = 0.5,
    ) -> None:
        """Takes in new measurements; nothing changes if they do not fit.

        Args:
            signals: Of any samples of the pool; of a sample that appears twice the later row counts.
            epoch: Epoch of the measurement.
            step: Optimizer step of the measurement.
            source: "score" replaces; "train" moves a reward whose group size differs from the last one.
            reward_decay: Share in [0, 1] of the old mean that such a move keeps.

        Raises:
            InputError: If a sample is not in the pool or a vector has another width than before.
        """
        if not 0 <= reward_decay <= 1:
            raise InputError(f"reward_decay is {reward_decay}: give a share in [0, 1]")
        rows = self._rows(signals.sample_id)
        for name in ("gradient", "embedding"):
            new, old = getattr(signals, name), self._data.get(name)
            if new is not None and old is not None and new.shape[1] != old.shape[1]:
                raise InputError(f"{name} had {old.shape[1]} columns, now {new.shape[1]}: keep one width in a run")

        last = {row: place for place, row in enumerate(rows.tolist())}
        places = torch.tensor(list(last.values()), dtype=torch.int64)
        rows = rows[places]
        measured: list[str] = []
        if signals.rewards is not None:
            group = signals.rewards.cpu()[places]
            decay = 0.0 if source == "score" else reward_decay
            _take_rewards(self._data, rows, group, decay=decay, solve_threshold=self.solve_threshold)
            if source == "train":
                solved, flat = group > self.solve_threshold, group.amax(dim=1) == group.amin(dim=1)
                self._data["n_wasted"][rows] += flat
                self._count(rows, solved.sum(dim=1).double(), group.shape[1], drawn=group.shape[1])
                for name, met in (("all_hit_streak", flat & solved[:, 0]), ("all_miss_streak", flat & ~solved[:, 0])):
                    self._data[name][rows] = (self._data[name][rows] + 1) * met
            measured.append("reward")
        elif signals.solve_probability is not None and source == "train":
            exact = signals.solve_probability.cpu().double()[places]
            self._count(rows, exact * _EXACT_ROLLOUTS, _EXACT_ROLLOUTS, drawn=0)
        for name in ("solve_probability", "alignment"):
            new = getattr(signals, name)
            if new is not None:
                self._data[name][rows] = new.cpu().double()[places]
                measured.append(name)
        for name in ("gradient", "embedding"):
            new = getattr(signals, name)
            if new is None:
                continue
            if name == "embedding" and self._lent:
                self._data[name] = self._data[name].clone()
                self._lent = False
            self._data.setdefault(name, torch.zeros(len(self), new.shape[1], dtype=torch.float32))[rows] = (
                new.cpu().float()[places]
            )
            measured.append(name)
            self.vectors_version += 1
        for name in measured:
            self._data[f"{name}_epoch"][rows] = epoch
            self._data[f"{name}_step"][rows] = step

    def _count(self, rows: Tensor, hits: Tensor, size: int, drawn: int) -> None:
        """Adds the hits [n] of groups of this size, so many of them drawn at random, to the discounted counts."""
        self._data["squared_weights"][rows] = self.discount**2 * self._data["squared_weights"][rows] + drawn
        for name, new in (("hits", hits), ("misses", size - hits)):
            self._data[name][rows] = self.discount * self._data[name][rows] + new

    def set_prior(self, mean: Tensor, strength: float, *, epoch: int, step: int) -> None:
        """Sets the prior of every sample's solve probability, Beta(strength mean, strength (1 - mean)).

        Args:
            mean: [N] float in (0, 1), in the order of `sample_ids`.
            strength: Rollouts that the prior counts as, above 0.
            epoch: Coming epoch.
            step: Optimizer step.
        """
        mean = mean.double()
        self._data["prior_hits"], self._data["prior_misses"] = strength * mean, strength * (1 - mean)
        self._has_prior = True
        self._data["prior_epoch"].fill_(epoch)
        self._data["prior_step"].fill_(step)

    def posterior(self, sample_ids: Array | Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Returns the Beta posterior of the solve probability of samples, met or not.

        alpha = prior hits + discounted hits and beta = prior misses + discounted misses. Each outcome that training
        meets moves them at once. Without a prior, see `set_prior`, it is Beta(1, 1).

        Args:
            sample_ids: [n], in the pool; None takes all, in the order of `sample_ids`.

        Returns:
            alpha and beta, float64 [n].

        Raises:
            InputError: If a sample is not in the pool.
        """
        rows = slice(None) if sample_ids is None else self._rows(as_ids(sample_ids))
        data = {name: self._data[name][rows] for name in (*_OUTCOMES, *_PRIOR)}
        return (
            data["prior_hits"].nan_to_num(nan=1.0) + data["hits"],
            data["prior_misses"].nan_to_num(nan=1.0) + data["misses"],
        )

    def posterior_mean(self, sample_ids: Array | Sequence[int] | None = None) -> Tensor:
        """Returns the expected solve probability of samples, alpha / (alpha + beta) of `posterior`; float64 [n]."""
        alpha, beta = self.posterior(sample_ids)
        return alpha / (alpha + beta)

    @property
    def has_prior(self) -> bool:
        """Whether a prior was set, so that the solve probability of samples that were never met is predicted."""
        return self._has_prior

    @property
    def squared_weights(self) -> Tensor:
        """Sum of the squared weights of the rollouts in the discounted counts, float64 [N], on a copy.

        It tells how much of the counts is chance: the hits of a sample with the solve probability p have the variance
        p (1 - p) times that. Exact solve probabilities add nothing.
        """
        return self._data["squared_weights"].clone()

    @property
    def has_outcomes(self) -> bool:
        """Whether training met any group."""
        return bool(self._data["hits"].any() or self._data["misses"].any())

    def stalest(self, n: int) -> list[int]:
        """Returns the samples that most need a re-score: never measured first, then the oldest measurement.

        A sample is as old as the older of its rewards and gradient. A signal of which the store holds nothing at all
        does not count, an exact solve probability counts as rewards. Ties are in a fixed, seeded order.

        Args:
            n: Number of samples; all of them if the pool is smaller.

        Returns:
            [min(n, N)] sample_ids, stalest first.
        """
        rewarded = torch.maximum(self._data["reward_epoch"], self._data["solve_probability_epoch"])
        held = [clock for clock in (rewarded, self._data["gradient_epoch"]) if (clock >= 0).any()]
        age = torch.stack(held).amin(dim=0).numpy() if held else np.zeros(len(self))
        tie_break = np.random.default_rng(self._seed).permutation(len(self))
        order = np.lexsort((tie_break, age))
        stalest: list[int] = self.sample_ids[torch.from_numpy(order[: max(n, 0)])].tolist()
        return stalest

    def wasted_groups(self, sample_ids: Array | Sequence[int]) -> Tensor:
        """Counts the groups without reward variance that training met of each sample, int64 [n]."""
        return self._data["n_wasted"][self._rows(as_ids(sample_ids))]

    def clock(self, name: str) -> Tensor:
        """Tells when a signal was measured.

        Args:
            name: "reward", "solve_probability", "gradient", "alignment", "embedding" or "prior", then "_epoch" or
                "_step".

        Returns:
            [N] int64 in the order of `sample_ids`, -1 for never.
        """
        return self._data[name].clone()

    def read(self, sample_ids: Array | Sequence[int], *, vectors: bool = True) -> Signals:
        """Returns what is known of some samples; every gradient counts as fresh.

        Args:
            sample_ids: [n], in the pool.
            vectors: False leaves out gradients and embeddings.

        Returns:
            A `Signals` of n rows in this order, on copies.

        Raises:
            InputError: If a sample is not in the pool, or an id repeats.
        """
        rows = self._rows(as_ids(sample_ids))
        return self._signals(self._data["gradient_epoch"] >= 0, rows, vectors=vectors)

    def pool_view(self, epoch: int, max_age: int = 1) -> Signals:
        """Returns what is known of the whole pool, ascending by sample_id, for a selector to read.

        Args:
            epoch: The current epoch.
            max_age: Gradients measured at most this many epochs ago form the mean gradient; if there are none, those of
                the newest epoch do.

        Returns:
            A `Signals` of N rows. Its embedding stays as it is; the rest shares memory with the store: read it before
            the next update.
        """
        measured = self._data["gradient_epoch"]
        oldest = min(epoch - max_age, int(measured.max()))
        self._lent = "embedding" in self._data
        return self._signals(measured >= max(oldest, 0))

    def _signals(self, fresh: Tensor, rows: Tensor | None = None, *, vectors: bool = True) -> Signals:
        data, solve, alignment = self._data, self._data["solve_probability"], self._data["alignment"]
        known: dict[str, Tensor] = {
            "sample_id": self.sample_ids,
            **{name: data[name] for name in ("reward_mean", "reward_std", "n_rollouts", "solve_share")},
            **({} if bool(solve.isnan().all()) else {"solve_probability": solve}),
            **({} if bool(alignment.isnan().all()) else {"alignment": alignment}),
            **{name: data[name] for name in (*_OUTCOMES, *_PRIOR, *_STREAKS, "reward_epoch")},
        }
        if vectors and "gradient" in data:
            known |= {"gradient": data["gradient"], "gradient_known": data["gradient_epoch"] >= 0}
            known["gradient_fresh"] = fresh
        if vectors and "embedding" in data:
            known |= {"embedding": data["embedding"], "embedding_known": data["embedding_epoch"] >= 0}
        return Signals(**(known if rows is None else {name: value[rows] for name, value in known.items()}))

    def _rows(self, sample_ids: Tensor) -> Tensor:
        rows = torch.searchsorted(self.sample_ids, sample_ids).clamp_max(len(self) - 1)
        strange = self.sample_ids[rows] != sample_ids
        if strange.any():
            raise InputError(
                f"sample_id {name_ids(sample_ids[strange])} is not in the pool of {len(self)} samples: "
                "score and train on the samples the store was made for"
            )
        return rows

    def vectors(self) -> dict[str, Tensor]:
        """Returns the big arrays `gradient` [N, D] and `embedding` [N, E], where measured, sharing memory."""
        return {name: self._data[name] for name in _VECTORS if name in self._data}

    def state_dict(self, *, vectors: bool = True) -> dict[str, Any]:
        """Returns copies of all arrays, and the settings as primitives.

        Args:
            vectors: False leaves out what `vectors()` gives.
        """
        arrays = {name: value.clone() for name, value in self._data.items() if vectors or name not in _VECTORS}
        return {**arrays, "sample_ids": self.sample_ids.clone(), **self._settings()}

    def load_state_dict(self, state: Mapping[str, Any], *, source: str = "the saved signals") -> None:
        """Takes over the content of `state_dict()`; nothing changes if it does not fit.

        Args:
            state: As returned by `state_dict`.
            source: How error messages call it.

        Raises:
            InputError: If it is of another pool, or an array is missing or has another shape or type than a store's.
        """
        try:
            if not torch.equal(as_ids(state["sample_ids"]), self.sample_ids):
                raise InputError(f"{source} belong to another pool of samples: use the data and split they are from")
            empty = {name: value for name, value in self._data.items() if name not in _MATRICES}
            loaded = {name: state[name].clone() for name in empty if name in state or name not in _ADDED}
            for name, value in loaded.items():
                if value.shape != empty[name].shape or value.dtype != empty[name].dtype:
                    raise InputError(f"{source} are damaged, {name} has a wrong shape or type: score again")
            for name in [name for name in _MATRICES if name in state]:
                value = loaded[name] = state[name].clone()
                if value.ndim != 2 or len(value) != len(self) or value.dtype != torch.float32:
                    raise InputError(f"{source} are damaged, {name} has a wrong shape or type: score again")
            settings = [state[name] for name in ("solve_threshold", "seed", "fingerprints")]
        except KeyError as error:
            raise InputError(f"{source} are damaged or not a signal store, {error} is missing: score again") from error
        fresh = SignalStore(self.sample_ids)._data
        self._data = {name: fresh[name] for name in _ADDED} | loaded
        self._has_prior = not bool(self._data["prior_hits"].isnan().all())
        self.vectors_version += 1
        self.solve_threshold, self._seed, self.fingerprints = float(settings[0]), int(settings[1]), dict(settings[2])

    def _settings(self) -> dict[str, Any]:
        return {
            "solve_threshold": self.solve_threshold,
            "seed": self._seed,
            "fingerprints": dict(self.fingerprints),
        }

    def digest(self) -> str:
        """Returns the SHA-256 (hex) of the content; equal stores have equal digests."""
        sha = hashlib.sha256(json.dumps(self._settings(), sort_keys=True).encode())
        for name, value in sorted({**self._data, "sample_ids": self.sample_ids}.items()):
            sha.update(f"{name} {tuple(value.shape)}".encode())
            sha.update(value.contiguous().numpy().tobytes())
        return sha.hexdigest()

    def save(self, path: Path | str) -> Path:
        """Writes the store as safetensors, whole or not at all, with the settings as JSON in the file's metadata.

        Args:
            path: A `.safetensors` file.

        Returns:
            The path.

        Raises:
            InputError: If it cannot be written.
        """
        return save_tensors(Path(path), {**self._data, "sample_ids": self.sample_ids}, self._settings())

    @classmethod
    def load(cls, path: Path | str) -> SignalStore:
        """Reads what `save` wrote.

        Args:
            path: A `.safetensors` file.

        Returns:
            The store.

        Raises:
            InputError: If the file is missing, damaged or not a signal store.
        """
        tensors, settings = load_tensors(Path(path))
        if "sample_ids" not in tensors:
            raise InputError(f"the signals in {path} are not a signal store, 'sample_ids' is missing: score again")
        store = cls(tensors["sample_ids"])
        store.load_state_dict({**tensors, **settings}, source=f"the signals in {path}")
        return store


def _take_rewards(
    data: dict[str, Tensor], rows: Tensor, group: Tensor, *, decay: float, solve_threshold: float
) -> None:
    """Replaces the rewards of samples, or moves them where the group has another size than the last one.

    With keep = decay if the sizes differ, else 0, the mean becomes keep * old + (1 - keep) * new, the standard
    deviation that of the mixture of both groups with these weights, and the solve share moves like the mean.

    Args:
        data: arrays [N] `reward_mean`, `reward_std`, `solve_share`, `n_rollouts` and, once there are any, `rewards`
            [N, G], changed in place.
        rows: [n] int64, distinct.
        group: [n, G] float, the new rewards.
        decay: in [0, 1]; 0 always replaces.
        solve_threshold: a reward above it has solved the sample.
    """
    if not len(rows):
        return
    size = group.shape[1]
    exact = group.double()
    flat = exact.amax(dim=1) == exact.amin(dim=1)
    new_mean = exact.mean(dim=1).where(~flat, exact[:, 0])  # so that a flat group has no rounding in it
    new_std = exact.std(dim=1, correction=0).where(~flat, torch.zeros((), dtype=torch.float64))
    new_share = (exact > solve_threshold).double().mean(dim=1)

    mean, std, share, count = (data[name] for name in ("reward_mean", "reward_std", "solve_share", "n_rollouts"))
    keep = torch.full((len(rows),), decay, dtype=torch.float64)
    keep[(count[rows] == size) | (count[rows] == 0)] = 0.0
    old_mean, old_std, old_share = (old[rows].nan_to_num() for old in (mean, std, share))
    moved = keep * old_mean + (1 - keep) * new_mean
    spread = keep * (old_std**2 + (old_mean - moved) ** 2) + (1 - keep) * (new_std**2 + (new_mean - moved) ** 2)
    mean[rows] = moved
    std[rows] = spread.sqrt().where(keep > 0, new_std)
    share[rows] = keep * old_share + (1 - keep) * new_share
    count[rows] = size

    n = len(mean)
    kept = data.get("rewards", torch.empty(n, 0, dtype=torch.float32))
    if kept.shape[1] < size:
        kept = torch.cat([kept, torch.full((n, size - kept.shape[1]), torch.nan, dtype=torch.float32)], dim=1)
    kept[rows] = torch.nan
    kept[rows, :size] = group.float()
    data["rewards"] = kept
