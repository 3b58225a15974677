"""Rival selectors that go by the outcomes of training alone and score nothing: GRESO and MoPPS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minirec_pl.selection import reasons
from minirec_pl.selection.ledger import SelectionLedger
from minirec_pl.selection.selectors.picks import ascending, best_first, ledger_of, outcomes
from minirec_pl.selection.signals import Signals
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.seeds import check_seed

_MOST_PRIOR = 1e9  # rollouts that a prior counts as, of a kind
_FLOOR = 0.01  # least probability that a sample is kept
_EASY_SHARE = 1 / 3  # of the target that is for all-hit groups, the rest is for all-miss groups


class MoPPSSelector:
    """Picks the samples whose drawn solve probability is nearest to a target (MoPPS, arXiv 2507.04632).

    Each sample has a Beta posterior, from Beta(1, 1), that is updated with the groups met in training:
    alpha <- lambda alpha + (1 - lambda) alpha_0 + hits, beta <- lambda beta + (1 - lambda) beta_0 + misses (section
    3.2). For each selection gamma_i ~ Beta(alpha_i, beta_i) is drawn (Thompson sampling), and the k samples of least
    (gamma_i - gamma*)^2 are picked, gamma* = 0.5 (section 3.3). Samples that were never met are eligible.

    How ours differs: they draw for each batch, among 8 or 16 times as many random candidates; here it is once per
    selection, and the candidates are the pool. The ledger's `value` is -(gamma_i - gamma*)^2, its `difficulty` gamma_i.
    Nothing is scored. A smaller budget of the same epoch is a prefix.
    """

    needs: frozenset[str] = frozenset()
    outcomes = True

    def __init__(
        self, target: float = 0.5, discount: float = 0.5, prior: tuple[float, float] = (1.0, 1.0), seed: int = 42
    ) -> None:
        """Sets the method.

        Args:
            target: Solve probability gamma* to pick near, from 0 to 1.
            discount: Share lambda of the earlier counts that remains when a sample is met again, from 0 to 1. Published
                are 1 and, for fast learners, 0.5.
            prior: alpha_0 and beta_0, both above 0 and at most 1e9.
            seed: Seed of the draws; each epoch has its own.

        Raises:
            InputError: If an option is out of range.
        """
        if not 0 <= target <= 1:
            raise InputError(f"target is {target}: give a probability from 0 to 1")
        if not 0 <= discount <= 1:
            raise InputError(f"discount is {discount}: give a share from 0 to 1")
        if len(prior) != 2 or not all(0 < count <= _MOST_PRIOR for count in prior):
            raise InputError(f"prior is {list(prior)}: give [alpha, beta], both above 0 and at most {_MOST_PRIOR:g}")
        self.target = target
        self.discount = discount
        self.prior = (float(prior[0]), float(prior[1]))
        self.seed = check_seed(seed)

    def select(self, signals: Signals, k: int, *, epoch: int = 0) -> SelectionLedger:
        """Picks the k nearest to the target, see `Selector.select`; each epoch draws anew."""
        signals = ascending(signals, k)
        hits, misses = outcomes(signals, self)
        drawn = thompson_draw(self.prior[0] + hits, self.prior[1] + misses, self.seed, epoch)
        value = -((drawn - self.target) ** 2)
        columns = {"value": value, "difficulty": drawn}
        return ledger_of(signals, best_first(value, k), k, columns, {}, "drawn solve probability")


class GRESOSelector:
    """Draws samples at random and skips those whose last groups had no variance (GRESO, arXiv 2506.02177).

    A sample whose last z groups in a row were without variance is skipped with the probability
    p_f = 1 - max(p_e^z, 0.01) (section 4.1). Groups that are all hits have a p_e of their own, `p_easy`, and those that
    are all misses another, `p_hard`; a group of the other kind begins a new streak, and a mixed group ends it. The
    floor, the split and the constants are those of their code. Both are adjusted to how many groups turn out that way
    (section 4.2): p_e falls by `step` where the share of all-hit (all-miss) groups among those met reaches a third (two
    thirds) of `target_zero_variance`, else it rises by as much, within [0.05, 0.95].

    Samples are gone through in random order, then again those that were skipped, until there are k.

    How ours differs: they filter and adjust for each batch, ours for each selection, on the groups met since the last
    one; they leave p_e alone in the first epoch, as ours does without groups. Their adaptive batch size belongs to
    dynamic sampling (`wasted_groups: dynamic_sampling`). The ledger's `value` is the probability of being kept.
    Nothing is scored. A smaller budget of the same epoch is a prefix.
    """

    needs: frozenset[str] = frozenset()
    outcomes = True
    groups = True  # of rollouts: solve probabilities without them are not enough

    def __init__(
        self,
        p_easy: float = 0.5,
        p_hard: float = 0.5,
        target_zero_variance: float = 0.25,
        step: float = 0.01,
        seed: int = 42,
    ) -> None:
        """Sets the method.

        Args:
            p_easy: Base probability of exploring a sample after an all-hit group, from 0 to 1, at first.
            p_hard: The same after an all-miss group.
            target_zero_variance: Share of groups without variance to aim at, from 0 to 1.
            step: How far the two move at a selection, at least 0.
            seed: Seed of the draws; each epoch has its own.

        Raises:
            InputError: If an option is out of range.
        """
        shares = {"p_easy": p_easy, "p_hard": p_hard, "target_zero_variance": target_zero_variance}
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise InputError(f"{name} is {value}: give a share from 0 to 1")
        if not 0 <= step < 1:
            raise InputError(f"step is {step}: give a number from 0 to below 1")
        self.p_easy = float(p_easy)
        self.p_hard = float(p_hard)
        self.target_zero_variance = target_zero_variance
        self.step = step
        self.seed = check_seed(seed)
        self._last = -1  # epoch of the last selection

    def select(self, signals: Signals, k: int, *, epoch: int = 0) -> SelectionLedger:
        """Picks k samples, see `Selector.select`; each epoch draws anew and adjusts the probabilities."""
        signals = ascending(signals, k)
        easy, hard = signals.all_hit_streak, signals.all_miss_streak
        if easy is None or hard is None or signals.reward_epoch is None:
            raise InputError(
                "GRESOSelector goes by the groups met in training, of which these signals hold none: give what "
                "SignalStore.pool_view returns"
            )
        if epoch > self._last:
            met = (signals.reward_epoch >= max(self._last, 0)) & (signals.n_rollouts > 0)
            self._adjust(easy[met] > 0, hard[met] > 0)
            self._last = epoch
        keep = self._kept(easy, self.p_easy) * self._kept(hard, self.p_hard)

        random = np.random.default_rng([self.seed, epoch])
        shuffled, number = random.permutation(len(signals)), random.random(len(signals))
        with np.errstate(divide="ignore", invalid="ignore"):  # in the pass t with 1 - (1 - keep)^t > number at last
            turn = np.where(keep < 1, np.floor(np.log1p(-number) / np.log1p(-keep)), 0.0)
        order = shuffled[np.argsort(turn[shuffled], kind="stable")]
        skipped = torch.from_numpy(turn > 0)
        dropped = {reasons.TOO_EASY: skipped & (easy > 0), reasons.TOO_HARD: skipped & (hard > 0)}
        columns = {"value": torch.from_numpy(keep), "difficulty": signals.reward_mean}
        return ledger_of(signals, torch.from_numpy(order[:k].copy()), k, columns, dropped, "mean reward")

    @staticmethod
    def _kept(streak: Tensor, base: float) -> np.ndarray:
        kept: np.ndarray = np.maximum(float(base) ** streak.numpy(), _FLOOR)
        return kept

    def _adjust(self, easy: Tensor, hard: Tensor) -> None:
        if not len(easy):
            return
        for name, flat, share in (("p_easy", easy, _EASY_SHARE), ("p_hard", hard, 1 - _EASY_SHARE)):
            reached = float(flat.double().mean()) >= self.target_zero_variance * share
            moved = getattr(self, name) + (-self.step if reached else self.step)
            setattr(self, name, min(max(moved, 0.05), 0.95))

    def state_dict(self) -> dict[str, Any]:
        """Returns the adjusted probabilities, for a checkpoint."""
        return {"p_easy": self.p_easy, "p_hard": self.p_hard, "last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` returned."""
        self.p_easy, self.p_hard, self._last = float(state["p_easy"]), float(state["p_hard"]), int(state["last"])


def thompson_draw(alpha: Tensor, beta: Tensor, seed: int, epoch: int) -> Tensor:
    """Draws a solve probability of each sample from Beta(alpha, beta), the same for the same seed and epoch.

    Args:
        alpha: [N] float64, above 0, in the order of sample_id.
        beta: [N] float64, above 0.
        seed: Of the draws.
        epoch: Each has a draw of its own.

    Returns:
        [N] float64 in [0, 1].
    """
    drawn = np.random.default_rng([seed, epoch]).beta(alpha.numpy(), beta.numpy())
    return torch.from_numpy(drawn).clamp(0.0, 1.0)
