"""MiniRec's own selector."""

from __future__ import annotations

import copy
import warnings
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from minirec_pl.selection import reasons
from minirec_pl.selection.learnability import (
    group_difficulty,
    learnability,
    min_max,
    quantile_calibration,
    update_learnability,
)
from minirec_pl.selection.ledger import SelectionLedger
from minirec_pl.selection.maxmin.greedy import Selection, maxmin_select
from minirec_pl.selection.predicted import PredictedDifficulty
from minirec_pl.selection.representativeness import representativeness
from minirec_pl.selection.selectors.picks import ascending, blank_columns, outcomes, row_norms, solve_chance, vectors
from minirec_pl.selection.signals import Signals
from minirec_pl.utils.errors import InputError, check_whole

_SAID = (
    "mode",
    "difficulty",
    "calibrate",
    "alpha",
    "beta",
    "mu",
    "sigma",
    "on_short",
    "num_generations",
    "novelty",
    "learnability",
)
_LARGE = 100_000  # samples from which on the selection shows its progress


class MiniRecSelector:
    """Picks learnable, representative and diverse samples (MiniRec, arXiv 2602.04278), as published or as written.

    V(x | S) = d(x | S) (alpha L + beta R), greedily from argmax(alpha L + beta R); beta is 1 in the paper. L and R are
    scaled over all samples with signals, before the gate. A sample without a gradient counts as one whose gradient is
    zero; where no sample has one, R is 0.5 for all.

    A sample that passed the gate and was not picked is redundant if it would have been worth more than the last pick,
    had it been as novel as the median pick: median novelty * (alpha L + beta R) >= V of the last pick. The ledger then
    names the pick nearest to it.

    mode="paper" is what the text says: first-order gradients with group advantages, and no pick whose difficulty is
    outside the gate. mode="official" is what the authors' code does: Hessian-vector products and no gate.
    difficulty="pass_at_group" is ours: instead of the mean reward r it uses q = 1 - (1 - p)^G, the probability that a
    group of G rollouts holds a hit; p is the exact solve probability where known, else the share of rollouts that hit.
    learnability="update" is ours: instead of the Gaussian, L is the size of the sample's expected update, w_G(p) p
    (1 - p) scaled to a largest value of 1, see `update_learnability`; mu and sigma play no part. "update_length" takes
    the measured length w_G(p) |grad p| at the hidden states.
    signals="predicted" is ours: both r and p are the predicted solve probability, the posterior mean of
    `PredictedDifficulty`, so that a sample needs an embedding (and a gradient, where it has one) but no rollouts to be
    scored. Set the module's `scoring_generations` to 0 to have none drawn.

    gradient="trajectory" is ours: R_i = (1 + a_i) / 2, a_i the cosine of the sample's update with the way the trained
    parameters have moved since the first scoring, scaled to [0, 1] over the samples of which it is known. The others
    (at first all, since nothing has moved) keep the R of their first-order gradient.
    """

    def __init__(
        self,
        mode: Literal["paper", "official"] = "paper",
        difficulty: Literal["mean", "pass_at_group"] = "mean",
        calibrate: Literal["quantile"] | None = None,
        alpha: float = 1.0,
        mu: float = 0.5,
        sigma: float | None = None,
        gate: tuple[float, float] = (0.05, 0.95),
        on_short: Literal["shrink", "fill"] = "shrink",
        gradient: Literal["first", "hvp", "trajectory"] | None = None,
        num_generations: int | None = None,
        gradient_space: Literal["answer", "lora"] = "answer",
        beta: float = 1.0,
        novelty: bool = True,
        learnability: Literal["gaussian", "update", "update_length"] = "gaussian",
        scale_rewards: Literal["group", "none", "mean"] | None = None,
        baseline: Literal["mean", "leave_one_out"] | None = None,
        signals: Literal["scored", "predicted"] = "scored",
        predictor: PredictedDifficulty | None = None,
    ) -> None:
        """Sets the method.

        Args:
            mode: "paper" (gated, first-order gradients) or "official" (not gated, Hessian-vector products).
            difficulty: "mean" (mean reward) or "pass_at_group" (probability that a group holds a hit).
            calibrate: "quantile" takes mu and sigma from the difficulties within the gate at each selection; None
                takes those below.
            alpha: Weight of learnability beside representativeness, not negative.
            mu: Difficulty of the highest learnability, in units of the difficulty.
            sigma: Width of the learnability curve; None takes the standard deviation over the pool.
            gate: Lowest and highest difficulty, both inclusive, that may be picked in mode "paper". With "update" the
                size of the update leaves out the hopeless and the solved, so that (0, 1) will do.
            on_short: If fewer than k samples pass the gate: "shrink" picks fewer and warns, "fill" picks the others
                outside the gate.
            gradient: "first" (first-order), "hvp" (Hessian-vector products) or "trajectory" (way of the
                parameters); None takes that of the mode.
            num_generations: Rollouts in a training group, G, for "pass_at_group" and "update"; None takes that of the
                module, or 8 without one.
            gradient_space: Where the module takes the gradient: "answer", at the hidden states that produce the answer,
                or "lora", by the trainable parameters, projected; not with Hessian-vector products.
            beta: Weight of representativeness, which is 1 in the paper; 0 switches the term off, as alpha=0 does for
                learnability.
            novelty: Whether to spread the picks; False takes the best alpha L + beta R whatever they resemble, with a
                novelty of 1 each.
            learnability: "gaussian" (of the difficulty), "update" (size of the expected update) or "update_length" (the
                same with the measured length of the first-order gradient).
            scale_rewards: What training divides rewards by, for "update"; None takes that of the module, or "group".
            baseline: What training subtracts from rewards, for "update"; None takes that of the module, or "mean".
            signals: Where the difficulty is from: "scored" (rewards or solve probabilities that were measured) or
                "predicted" (from the outcomes met in training).
            predictor: Model behind "predicted"; None takes `PredictedDifficulty()`.

        Raises:
            InputError: If an option has a value that is not allowed.
        """
        _one_of("signals", signals, ("scored", "predicted"))
        if predictor is not None and signals != "predicted":
            raise InputError("predictor goes with signals='predicted': set signals, or leave predictor out")
        _one_of("mode", mode, ("paper", "official"))
        _one_of("difficulty", difficulty, ("mean", "pass_at_group"))
        _one_of("calibrate", calibrate, ("quantile", None))
        _one_of("on_short", on_short, ("shrink", "fill"))
        _one_of("gradient", gradient, ("first", "hvp", "trajectory", None))
        _one_of("gradient_space", gradient_space, ("answer", "lora"))
        _one_of("learnability", learnability, ("gaussian", "update", "update_length"))
        _one_of("scale_rewards", scale_rewards, ("group", "none", "mean", None))
        _one_of("baseline", baseline, ("mean", "leave_one_out", None))
        if learnability != "gaussian" and (calibrate is not None or sigma is not None):
            raise InputError(
                f"learnability='{learnability}' has no mu and no sigma: leave out calibrate and sigma, or set "
                "learnability to gaussian"
            )
        if not (0 <= alpha < float("inf")):
            raise InputError(f"alpha is {alpha}: give a finite number of at least 0")
        if not (0 <= beta < float("inf")) or alpha == beta == 0:
            raise InputError(f"beta is {beta}: give a finite number of at least 0, and above 0 if alpha is 0")
        if len(gate) != 2 or not gate[0] < gate[1]:
            raise InputError(f"gate is {list(gate)}: give [low, high] with low below high")
        if calibrate is not None and sigma is not None:
            raise InputError("calibrate='quantile' takes sigma from the pool: leave out sigma or calibrate")
        if sigma is not None and not sigma > 0:
            raise InputError(f"sigma is {sigma}: give a number above 0")
        check_whole(num_generations=num_generations)
        least = 1 if learnability == "gaussian" else 2
        if num_generations is not None and num_generations < least:
            raise InputError(f"num_generations is {num_generations}: give at least {least}")
        self.mode = mode
        self.difficulty = difficulty
        self.calibrate = calibrate
        self.alpha = alpha
        self.beta = beta
        self.novelty = novelty
        self.mu = mu
        self.sigma = sigma
        self.gate = (float(gate[0]), float(gate[1]))
        self.on_short = on_short
        self.gradient: Literal["first", "hvp", "trajectory"] = gradient or ("hvp" if mode == "official" else "first")
        if gradient_space == "lora" and self.gradient == "hvp":
            raise InputError(
                "gradient_space='lora' has no Hessian-vector products, which mode='official' takes by default: set "
                "gradient to first or trajectory, or gradient_space to answer"
            )
        self.gradient_space = gradient_space
        if learnability == "update_length" and (self.gradient == "hvp" or gradient_space == "lora"):
            raise InputError(
                "learnability='update_length' measures the first-order gradient at the hidden states: set gradient to "
                "first or trajectory, and gradient_space to answer"
            )
        self.num_generations = num_generations
        self.learnability = learnability
        self.scale_rewards = scale_rewards
        self.baseline = baseline
        self.signals = signals
        self.outcomes = signals == "predicted"
        self.predictor = (predictor or PredictedDifficulty()) if self.outcomes else None
        self.needs = frozenset({"gradient", "embedding"} if self.outcomes else {"rewards", "gradient", "embedding"})

    def select(self, signals: Signals, k: int, *, epoch: int = 0) -> SelectionLedger:
        """Picks at most k samples.

        Args:
            signals: Of the pool.
            k: Number of samples to pick, 1..N.
            epoch: Not used: the pick depends on the signals alone.

        Returns:
            The ledger, a row for each sample of `signals`.

        Raises:
            InputError: If k is not in 1..N, a needed signal is missing throughout, or no sample passes the gate.

        Warns:
            UserWarning: If fewer than k samples are picked.
        """
        signals = ascending(signals, k)
        if self.outcomes:
            own, signals = signals, with_chance(signals, predicted_chance(signals, self))
            return predicted_ledger(self._select(signals, k), own, "predicted")
        return self._select(signals, k)

    def _select(self, signals: Signals, k: int) -> SelectionLedger:
        difficulty = self._difficulty(signals)
        scored = ~difficulty.isnan()
        if self.learnability != "gaussian":
            scored &= ~solve_chance(signals, self).isnan()
        if not scored.any():
            enough = "set difficulty='pass_at_group', for which the exact solve probability is enough, or "
            raise InputError(
                f"no sample of the pool has the rewards that difficulty='{self.difficulty}' needs: "
                f"{enough if signals.solve_probability is not None else ''}score the pool with rewards, of a "
                "GRPORecModule with scoring_generations of at least 2"
            )
        if signals.embedding is None and self.novelty:
            raise InputError("MiniRecSelector needs an embedding per sample: return `embedding` from sample_signals")
        if signals.embedding is not None and signals.embedding_known is not None:
            scored &= signals.embedding_known
        rows = scored.nonzero()[:, 0]
        if not len(rows):
            raise InputError("no sample of the pool has both rewards and an embedding: score the pool first")

        learn, represent = self._terms(signals, difficulty, rows)
        score = self.alpha * learn + self.beta * represent
        low, high = self.gate if self.mode == "paper" else (-float("inf"), float("inf"))
        passes = scored & (difficulty >= low) & (difficulty <= high)

        columns = blank_columns(signals)
        columns["difficulty"] = difficulty.double().numpy().copy()
        for name, term in (("learnability", learn), ("representativeness", represent), ("score", score)):
            columns[name][rows.numpy()] = term.numpy()
        columns["reason"][(scored & ~passes & (difficulty < low)).numpy()] = reasons.TOO_HARD
        columns["reason"][(scored & ~passes & (difficulty > high)).numpy()] = reasons.TOO_EASY
        columns["reason"][(~scored).numpy()] = reasons.NEVER_SCORED

        embedding = None if signals.embedding is None else _at(signals.embedding, rows)
        n_pass = int(passes.sum())
        if not n_pass and self.on_short == "shrink":
            known = difficulty[rows]
            raise InputError(
                f"none of {len(rows)} scored samples has a difficulty within gate={list(self.gate)}: widen the gate, "
                f"since they are {float(known.min()):.3g} to {float(known.max()):.3g}, or set on_short='fill'"
            )
        inside = passes[rows].nonzero()[:, 0]
        picked = torch.empty(0, dtype=torch.int64)
        if n_pass:
            progress = n_pass > _LARGE
            near = None if embedding is None else _at(embedding, inside)
            first = self._pick(near, score[inside], min(k, n_pass), progress=progress)
            picked = inside[first.indices]
            _enter(columns, rows[picked], first.novelty, score[picked], reasons.SELECTED, start=1)
        missing = k - len(picked)
        if missing and self.on_short == "fill" and len(rows) > n_pass:
            more = self._pick(embedding, score, min(missing, len(rows) - n_pass), initial=picked)
            start = len(picked) + 1
            _enter(columns, rows[more.indices], more.novelty, score[more.indices], reasons.FILLED, start=start)
            missing -= len(more.indices)
        if missing:
            gated = f", {n_pass} of these within gate={list(self.gate)}" if n_pass < len(rows) else ""
            advice = [f"lower the budget to {k - missing}"]
            advice += ["score more samples"] * (len(rows) < len(signals))
            advice += ["widen the gate", "set on_short='fill'"] * (n_pass < len(rows) and self.on_short == "shrink")
            warnings.warn(
                f"picked {k - missing} samples instead of {k}; of {len(signals)} samples {len(rows)} have the needed "
                f"signals{gated}: {', or '.join(advice)}",
                stacklevel=2,
            )
        named = "mean reward" if self.difficulty == "mean" else f"solve probability of a group of {self._group()}"
        options = {name: getattr(self, name) for name in _SAID} | {"gate": list(self.gate)}
        return SelectionLedger.of(columns, signals.embedding, named, options)

    def _group(self) -> int:
        return self.num_generations or 8

    def _pick(
        self, embedding: Tensor | None, score: Tensor, k: int, initial: Tensor | None = None, progress: bool = False
    ) -> Selection:
        if self.novelty:
            assert embedding is not None
            return maxmin_select(embedding, score, k, initial=initial, progress=progress)
        taken = score.clone()
        if initial is not None:
            taken[initial] = -torch.inf
        best = taken.sort(descending=True, stable=True).indices[:k]
        return Selection(best, torch.ones(len(best), dtype=torch.float64))

    def _difficulty(self, signals: Signals) -> Tensor:
        if self.difficulty == "mean":
            met = signals.reward_mean
            return met if self.learnability == "gaussian" else met.where(~met.isnan(), solve_chance(signals, self))
        return group_difficulty(solve_chance(signals, self), self._group())

    def _terms(self, signals: Signals, difficulty: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        learn = self._learnability(signals, difficulty, rows)
        if signals.gradient is None:
            return learn, torch.full_like(learn, 0.5)
        fresh = None if signals.gradient_fresh is None else signals.gradient_fresh[rows]
        represent = representativeness(_at(signals.gradient, rows), fresh=fresh)
        if self.gradient == "trajectory" and signals.alignment is not None:
            alignment = signals.alignment[rows]
            known = ~alignment.isnan()
            represent[known] = min_max((1 + alignment[known]) / 2)
        return learn, represent

    def _learnability(self, signals: Signals, difficulty: Tensor, rows: Tensor) -> Tensor:
        if self.learnability == "gaussian":
            mu, sigma = self.mu, self.sigma
            if self.calibrate == "quantile":
                mu, sigma = quantile_calibration(difficulty[rows], self.gate)
            return learnability(difficulty[rows], mu=mu, sigma=sigma)
        lengths = None
        if self.learnability == "update_length":
            gradient, known = vectors(signals, "gradient", self)
            lengths = row_norms(gradient).masked_fill(~known, 0.0)[rows]
        return update_learnability(
            solve_chance(signals, self)[rows],
            self._group(),
            scale_rewards=self.scale_rewards or "group",
            baseline=self.baseline or "mean",
            lengths=lengths,
        )


def predicted_chance(signals: Signals, selector: object) -> Tensor:
    """Returns the expected solve probability of each sample, float64 [N], see `SignalStore.posterior`."""
    outcomes(signals, selector)
    found = signals.posterior()
    assert found is not None
    return found[0] / (found[0] + found[1])


def with_chance(signals: Signals, chance: Tensor) -> Signals:
    """Returns signals in which mean reward and solve probability are these values, float64 [N]."""
    changed = copy.copy(signals)  # not made anew, which would check all signals again
    changed.reward_mean = changed.solve_probability = chance
    return changed


def predicted_ledger(ledger: SelectionLedger, signals: Signals, kind: str) -> SelectionLedger:
    """Enters measured rewards into a ledger that was made from others, and says what its difficulty is.

    Args:
        ledger: changed in place.
        signals: with the rewards, of the same rows.
        kind: "predicted" or "drawn".
    """
    ledger.columns["reward_mean"][:] = signals.reward_mean.numpy()
    ledger.options["signals"] = "predicted"
    ledger.difficulty_name = f"{kind} {ledger.difficulty_name.replace('mean reward', 'solve probability')}"
    return ledger


def _at(matrix: Tensor, rows: Tensor) -> Tensor:
    """The rows at these ascending positions; the matrix itself, perhaps a mapped file, if that is all of them."""
    return matrix if len(rows) == len(matrix) else matrix[rows]


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise InputError(f"{name} is {value!r}: give one of {', '.join(str(option) for option in allowed)}")


def _enter(
    columns: dict[str, npt.NDArray[Any]], rows: Tensor, novelty: Tensor, score: Tensor, reason: str, *, start: int
) -> None:
    places = rows.numpy()
    columns["rank"][places] = np.arange(start, start + len(places))
    columns["novelty"][places] = novelty.numpy()
    columns["value"][places] = (novelty * score).numpy()
    columns["reason"][places] = reason
