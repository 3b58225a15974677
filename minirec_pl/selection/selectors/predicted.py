"""The selector that goes by predicted difficulty and scores nothing."""

from __future__ import annotations

from typing import Literal

import numpy as np

from minirec_pl.selection.ledger import SelectionLedger
from minirec_pl.selection.predicted import PredictedDifficulty
from minirec_pl.selection.selectors.minirec import MiniRecSelector, predicted_ledger, with_chance
from minirec_pl.selection.selectors.outcome_based import thompson_draw
from minirec_pl.selection.selectors.picks import ascending, outcomes
from minirec_pl.selection.signals import Signals
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.seeds import check_seed

_GATES = {"mean": (0.02, 0.5), "pass_at_group": (0.02, 0.95)}


class PredictedSelector:
    """Picks samples by the difficulty that the outcomes of training predict, without a scoring pass (ours).

    For each selection p_i ~ Beta(alpha_i, beta_i) is drawn from the posterior of `PredictedDifficulty` (Thompson
    sampling), so that samples of which little is known are tried out, among them those that were never met. Then it
    picks as MiniRec does, see `MiniRecSelector`: V(x | S) = d(x | S) L(q), q = p_i or 1 - (1 - p_i)^G, among the
    samples whose q is within the gate. L is by default the size of the expected update, w_G(p) p (1 - p).

    d is the novelty by embeddings, where every sample has one. Else it is by item factors: a sample's vector holds the
    factors of its target and the mean factors of its history, from who had which items in the data before the pool.
    Where neither is known, d = 1 and the k highest L(q) are picked; so it is before the first outcome, when all
    samples are alike to the predictor and the picks are random.

    The ledger's `difficulty` is the q drawn, its `value` d L. A smaller budget of the same epoch is a prefix.
    """

    needs: frozenset[str] = frozenset()
    outcomes = True

    def __init__(
        self,
        predictor: PredictedDifficulty | None = None,
        difficulty: Literal["mean", "pass_at_group"] = "mean",
        learnability: Literal["update", "gaussian"] = "update",
        mu: float = 0.5,
        sigma: float | None = None,
        gate: tuple[float, float] | None = None,
        on_short: Literal["fill", "shrink"] = "fill",
        num_generations: int | None = None,
        novelty: bool = True,
        scale_rewards: Literal["group", "none", "mean"] | None = None,
        baseline: Literal["mean", "leave_one_out"] | None = None,
        seed: int = 42,
    ) -> None:
        """Sets the method.

        Args:
            predictor: Model of the solve probability; None takes `PredictedDifficulty()`.
            difficulty: "mean" (solve probability) or "pass_at_group" (probability that a group holds a hit).
            learnability: "update" (size of the expected update) or "gaussian" (of the difficulty).
            mu: Difficulty of the highest learnability, for "gaussian".
            sigma: Width of the learnability curve, for "gaussian"; None takes the standard deviation over the pool.
            gate: Lowest and highest difficulty, both inclusive, to pick first. None takes 0.02 to 0.5, since above 0.5
                the target is the likeliest answer already; of "pass_at_group" 0.02 to 0.95.
            on_short: If fewer than k samples pass the gate: "fill" picks the others outside the gate, "shrink" picks
                fewer and warns.
            num_generations: Rollouts in a training group, G; None takes that of the module, or 8 without one.
            novelty: Whether to spread the picks.
            scale_rewards: What training divides rewards by, for "update"; None takes that of the module, or "group".
            baseline: What training subtracts from rewards, for "update"; None takes that of the module, or "mean".
            seed: Seed of the draws; each epoch has its own.

        Raises:
            InputError: If an option has a value that is not allowed, or scikit-learn is not installed.
        """
        if learnability not in ("update", "gaussian"):
            raise InputError(
                f"learnability is {learnability!r}: give update or gaussian, since no gradient is measured"
            )
        self.predictor = PredictedDifficulty() if predictor is None else predictor
        self.difficulty = difficulty
        self.learnability = learnability
        self.mu = mu
        self.sigma = sigma
        self.gate = _GATES.get(difficulty, (0.0, 1.0)) if gate is None else gate
        self.on_short = on_short
        self.num_generations = num_generations
        self.novelty = novelty
        self.scale_rewards = scale_rewards
        self.baseline = baseline
        self.seed = check_seed(seed)
        self.gate = self._like_minirec(novelty).gate

    def _like_minirec(self, novelty: bool) -> MiniRecSelector:
        return MiniRecSelector(
            difficulty=self.difficulty,
            learnability=self.learnability,
            mu=self.mu,
            sigma=self.sigma,
            gate=self.gate,
            on_short=self.on_short,
            num_generations=self.num_generations,
            novelty=novelty,
            scale_rewards=self.scale_rewards,
            baseline=self.baseline,
            beta=0.0,
        )

    def select(self, signals: Signals, k: int, *, epoch: int = 0) -> SelectionLedger:
        """Picks at most k samples, see `Selector.select`; each epoch draws anew.

        Raises:
            InputError: Also if the signals hold neither outcomes of training nor predictions.
        """
        signals = ascending(signals, k)
        hits, misses = outcomes(signals, self)
        prior = signals.prior_hits
        if not bool((hits + misses).any()) and (prior is None or bool(prior.isnan().all())):
            raise InputError(
                "PredictedSelector goes by the rollouts met in training, and these signals hold none: use it in a run, "
                "or give the signals of one"
            )
        posterior = signals.posterior()
        assert posterior is not None
        drawn = thompson_draw(*posterior, self.seed, epoch)
        known = signals.embedding_known
        embedding = signals.embedding if known is None or bool(known.all()) else None
        spread = self.novelty and bool((hits + misses).any())
        vectors = (signals.vectors if embedding is None else embedding) if spread else None
        drawn_from = with_chance(signals, drawn)
        drawn_from.gradient, drawn_from.embedding, drawn_from.embedding_known = None, vectors, None
        ledger = self._like_minirec(vectors is not None).select(drawn_from, k, epoch=epoch)
        ledger.columns["representativeness"][:] = np.nan
        return predicted_ledger(ledger, signals, "drawn")
