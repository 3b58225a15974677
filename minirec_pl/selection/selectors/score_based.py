"""Rival selectors that score each sample by its rewards or its gradient."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from minirec_pl.selection import reasons
from minirec_pl.selection.learnability import min_max, update_learnability
from minirec_pl.selection.ledger import SelectionLedger
from minirec_pl.selection.selectors.picks import (
    ascending,
    best_first,
    gradient_blocks,
    ledger_of,
    row_norms,
    solve_chance,
    vectors,
)
from minirec_pl.selection.signals import Signals
from minirec_pl.utils.errors import InputError, check_whole
from minirec_pl.utils.seeds import check_seed

SOLVE = "solve probability"
_ROUNDING = 1e-12  # a standard deviation below this share of the mean is rounding
_DAMPING = 0.01  # of the mean eigenvalue of the curvature


class GraNdSelector:
    """Picks the largest gradients first (GraNd, Paul et al. 2021, arXiv 2107.07075).

    Theirs: the expectation of ||g||_2, g the gradient of the loss by all weights, over several initialisations early in
    training. How ours differs: ||u||_2 of the gradient signal u of the one policy that is trained, at the hidden states
    (the paper's is for a supervised loss; u belongs to the reward). The ledger's `value` is the norm. A smaller budget
    is a prefix.
    """

    needs: frozenset[str] = frozenset({"gradient"})

    def select(self, signals: Signals, k: int, *, epoch: int = 0) -> SelectionLedger:
        """Picks the k largest gradients, see `Selector.select`."""
        signals = ascending(signals, k)
        gradient, known = vectors(signals, "gradient", self)
        value = row_norms(gradient).where(known, torch.nan)
        return ledger_of(signals, best_first(value, k), k, {"value": value}, {reasons.NEVER_SCORED: ~known})


class EL2NSelector:
    """Picks the largest prediction errors first (EL2N, Paul et al. 2021, arXiv 2107.07075).

    Theirs: the expectation of ||p(x) - y||_2, p(x) the predicted distribution over classes and y the one-hot target,
    over several models early in training. How ours differs: of p(x) only the target's entry p is known, exact or as the
    share of rollouts that solved the sample, so the error is 1 - p. The full norm lies between 1 - p and
    sqrt(2) (1 - p), by how the rest of the mass is spread. One policy, no average over models. With sparse rewards many
    errors are 1, and ties go to the smaller sample_id. The ledger's `value` is 1 - p, its `difficulty` p. A smaller
    budget is a prefix.
    """

    needs: frozenset[str] = frozenset({"rewards"})

    def select(self, signals: Signals, k: int, *, epoch: int = 0) -> SelectionLedger:
        """Picks the k largest errors, see `Selector.select`."""
        signals = ascending(signals, k)
        chance = solve_chance(signals, self)
        columns = {"value": 1 - chance, "difficulty": chance}
        return ledger_of(signals, best_first(1 - chance, k), k, columns, {reasons.NEVER_SCORED: chance.isnan()}, SOLVE)


class RewardVarianceSelector:
    """Picks groups whose rewards vary, most variance first (the filters of DAPO and SPEED).

    DAPO (arXiv 2503.14476) drops groups that are all right or all wrong, which have no advantage, and draws others
    until the batch is full. SPEED (arXiv 2506.09016) screens prompts with a few rollouts and keeps those strictly
    between; the signal-to-noise ratio of the gradient of a prompt with N rollouts is at most 4 N p (1 - p).

    How ours differs: the variance ranks as well as filters: p (1 - p) where the exact solve probability p is known, the
    variance of a hit reward; else the population variance of the rewards within the group. It picks from what was
    scored, once per epoch, and draws nothing more. Samples without variance are `too_easy` or `too_hard`, and fewer
    than k are picked where fewer vary. The ledger's `value` is the variance, its `difficulty` p or else the mean
    reward. A smaller budget is a prefix.
    """

    needs: frozenset[str] = frozenset({"rewards"})

    def select(self, signals: Signals, k: int, *, epoch: int = 0) -> SelectionLedger:
        """Picks the k largest variances, see `Selector.select`."""
        signals = ascending(signals, k)
        variance, difficulty, named = signals.reward_std**2, signals.reward_mean, "mean reward"
        if signals.solve_probability is not None:
            exact = signals.solve_probability
            variance = (exact * (1 - exact)).where(~exact.isnan(), variance)
            difficulty = exact.where(~exact.isnan(), difficulty)
            named = f"{SOLVE} or {named}" if exact.isnan().any() else SOLVE
        if variance.isnan().all():
            raise InputError(
                "RewardVarianceSelector needs rewards or the exact solve probability: return `rewards` or "
                "`solve_probability` from sample_signals"
            )
        flat = variance <= (_ROUNDING * difficulty) ** 2
        dropped = {
            reasons.TOO_EASY: flat & (difficulty >= 0.5),
            reasons.TOO_HARD: flat & (difficulty < 0.5),
            reasons.NEVER_SCORED: variance.isnan(),
        }
        picks = best_first(variance.where(~flat, torch.nan), k)
        return ledger_of(signals, picks, k, {"value": variance, "difficulty": difficulty}, dropped, named)


class ExpectedUpdateSelector:
    """Picks the samples with the largest expected GRPO update first (ours), see `update_learnability`.

    The value is w_G(p) p (1 - p), p being the exact solve probability where known, else the share of rollouts that hit;
    with `measured`, w_G(p) times the length of the gradient signal. The ledger's `value` is relative to the largest,
    its `difficulty` p. A smaller budget is a prefix.
    """

    def __init__(
        self,
        num_generations: int | None = None,
        scale_rewards: Literal["group", "none", "mean"] | None = None,
        baseline: Literal["mean", "leave_one_out"] | None = None,
        measured: bool = False,
    ) -> None:
        """Sets the method.

        Args:
            num_generations: Rollouts in a training group, G; None takes that of the module, or 8 without one.
            scale_rewards: What training divides rewards by; None takes that of the module, or "group".
            baseline: What training subtracts from rewards; None takes that of the module, or "mean".
            measured: Whether to measure the length of the gradient of p instead of taking it as p (1 - p).

        Raises:
            InputError: If an option has a value that is not allowed.
        """
        update_learnability(
            torch.zeros(1),
            8 if num_generations is None else num_generations,
            scale_rewards=scale_rewards or "group",
            baseline=baseline or "mean",
        )
        self.num_generations = num_generations
        self.scale_rewards = scale_rewards
        self.baseline = baseline
        self.measured = measured
        self.needs = frozenset({"rewards", "gradient"} if measured else {"rewards"})

    def select(self, signals: Signals, k: int, *, epoch: int = 0) -> SelectionLedger:
        """Picks the k largest updates, see `Selector.select`."""
        signals = ascending(signals, k)
        chance, lengths = solve_chance(signals, self), None
        unknown = chance.isnan()
        if self.measured:
            gradient, known = vectors(signals, "gradient", self)
            unknown, lengths = unknown | ~known, row_norms(gradient).masked_fill(~known, 0.0)
        value = update_learnability(
            chance.nan_to_num(nan=0.0),
            self.num_generations or 8,
            scale_rewards=self.scale_rewards or "group",
            baseline=self.baseline or "mean",
            lengths=lengths,
        ).masked_fill(unknown, torch.nan)
        columns = {"value": value, "difficulty": chance}
        return ledger_of(signals, best_first(value, k), k, columns, {reasons.NEVER_SCORED: unknown}, SOLVE)


class LearnAlignSelector:
    """Picks learnable samples whose gradients agree with those of learnable samples (LearnAlign, arXiv 2506.11480).

    S_ij = V_i V_j cos(g_i, g_j) with V = p (1 - p); the score of a sample is the mean of its row, and the best are
    taken. With z_i = V_i g_i / ||g_i|| it is z_i . mean_j z_j, so that no N x N matrix is made.

    How ours differs: g is the gradient signal u at the hidden states, not a projected gradient of the GRPO objective by
    all weights; p is exact where known; the mean is over the rows of fresh gradients (`gradient_fresh`). Their
    warm-up corresponds to the policy that training starts from. The ledger's `value` is the score, its `difficulty` p.
    A smaller budget is a prefix.
    """

    needs: frozenset[str] = frozenset({"rewards", "gradient"})

    def select(self, signals: Signals, k: int, *, epoch: int = 0) -> SelectionLedger:
        """Picks the k best aligned samples, see `Selector.select`."""
        signals = ascending(signals, k)
        gradient, known = vectors(signals, "gradient", self)
        chance = solve_chance(signals, self)
        known = known & ~chance.isnan()
        norm = row_norms(gradient)
        weight = (chance * (1 - chance) / norm).where(known & (norm > 0), 0.0)
        fresh = _fresh(signals, known)
        total = torch.zeros(gradient.shape[1], dtype=torch.float64)
        for rows, block in gradient_blocks(gradient):
            total += weight[rows].where(fresh[rows], 0.0) @ block
        mean = total / fresh.sum().clamp_min(1)
        value = (_products(gradient, mean) * weight).where(known, torch.nan)
        columns = {"value": value, "difficulty": chance.where(known, torch.nan)}
        return ledger_of(signals, best_first(value, k), k, columns, {reasons.NEVER_SCORED: ~known}, SOLVE)


class DEALRecSelector:
    """Picks influential samples that cost the model effort, from the whole range of scores (DEALRec, arXiv 2401.17197).

    score = I + lambda E, both min-max scaled. The influence I_i = g_i . H^-1 mean_j g_j is how much the empirical risk
    rises without sample i; the effort E_i = ||g_i||_2 is the LLM's gradient norm. The range of scores is cut into K
    groups of equal width. From the group with the fewest samples on, each gives a random min(its size, floor(m / groups
    left)) of the m picks that are still to make, which covers easy and hard regions alike.

    How ours differs: they take I from a small surrogate recommender, with H^-1 by stochastic iteration. We have no
    surrogate: g is the gradient signal u of the policy itself, and H the empirical Fisher matrix mean_j u_j u_j^T plus
    0.01 of its mean eigenvalue, over the rows of fresh gradients. Groups, quotas and lambda are theirs. Ranks are in
    the order in which a growing budget adds samples: the quotas only grow with it, so a smaller budget is a prefix. The
    ledger's `value` is the score, which does not rank the picks.
    """

    needs: frozenset[str] = frozenset({"gradient"})

    def __init__(self, effort_weight: float = 1.0, n_groups: int = 50, seed: int = 42) -> None:
        """Sets the method.

        Args:
            effort_weight: Weight lambda of the effort beside the influence, not negative; published are 0.3 and 1.
            n_groups: Number K of groups of scores; published is 50.
            seed: Seed of the draws within the groups.

        Raises:
            InputError: If an option is out of range.
        """
        if not 0 <= effort_weight < float("inf"):
            raise InputError(f"effort_weight is {effort_weight}: give a finite number of at least 0")
        check_whole(n_groups=n_groups)
        if n_groups < 1:
            raise InputError(f"n_groups is {n_groups}: give at least 1")
        self.effort_weight = effort_weight
        self.n_groups = n_groups
        self.seed = check_seed(seed)

    def select(self, signals: Signals, k: int, *, epoch: int = 0) -> SelectionLedger:
        """Picks from every group of scores, see `Selector.select`."""
        signals = ascending(signals, k)
        gradient, known = vectors(signals, "gradient", self)
        influence = _products(gradient, _newton_direction(gradient, _fresh(signals, known)))
        score = torch.full_like(influence, torch.nan)
        score[known] = min_max(influence[known]) + self.effort_weight * min_max(row_norms(gradient)[known])
        rows = known.nonzero()[:, 0]
        picks = rows[self._stratified(score[rows].numpy(), min(k, len(rows)))]
        return ledger_of(signals, picks, k, {"value": score}, {reasons.NEVER_SCORED: ~known})

    def _stratified(self, score: np.ndarray, k: int) -> Tensor:
        low, high = score.min(), score.max()
        edges = low + (high - low) * np.arange(1, self.n_groups) / self.n_groups
        group = np.searchsorted(edges, score)
        shuffled = np.random.default_rng(self.seed).permutation(len(score))
        members = [shuffled[group[shuffled] == one] for one in np.unique(group)]
        members.sort(key=len)
        order = np.empty(k, dtype=np.int64)
        left = np.arange(k + 1)  # picks still to make, for every budget up to k at once
        for place, rows in enumerate(members):
            quota = np.minimum(len(rows), left // (len(members) - place))
            grows = np.flatnonzero(np.diff(quota))
            order[grows] = rows[: len(grows)]
            left = left - quota
        return torch.from_numpy(order)


def _products(gradient: Tensor, direction: Tensor) -> Tensor:
    return torch.cat([block @ direction for _, block in gradient_blocks(gradient)])


def _fresh(signals: Signals, known: Tensor) -> Tensor:
    return known if signals.gradient_fresh is None else known & signals.gradient_fresh


def _newton_direction(gradient: Tensor, fresh: Tensor) -> Tensor:
    width = gradient.shape[1]
    fisher = torch.zeros(width, width, dtype=torch.float64)
    total = torch.zeros(width, dtype=torch.float64)
    for rows, block in gradient_blocks(gradient):
        block = block[fresh[rows]]
        fisher += block.T @ block
        total += block.sum(dim=0)
    damping = _DAMPING * fisher.trace() / width
    if damping == 0:
        return total
    direction: Tensor = torch.linalg.solve(fisher + damping * torch.eye(width, dtype=torch.float64), total)
    return direction
