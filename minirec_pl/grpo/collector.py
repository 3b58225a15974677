"""Has rollouts of a generation drawn and decides what becomes of groups without variance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minirec_pl.grpo.buffer import Batch, Generation, RolloutBatch, step_totals, take_rows
from minirec_pl.grpo.objective import Objective


@dataclass
class RolloutCollector:
    """Draws groups of rollouts for all the batches of a generation.

    Attributes:
        roll_out: from a batch, random numbers and whether the sampling policy's log-probabilities are needed later to
            rewarded rollouts.
        objective: what the rollouts are for.
        reference: from rollouts to log-probabilities [B, G, L]; None without a reference.
        oversample: prompts of a batch for one that is trained on, where groups without variance are dropped; None
            keeps them all.
        reduce: sums a tensor over the ranks; None where there is one.
    """

    roll_out: Callable[[Batch, torch.Generator, bool], RolloutBatch]
    objective: Objective
    reference: Callable[[RolloutBatch], Tensor] | None
    oversample: float | None
    reduce: Callable[[Tensor], Tensor] | None = None

    def collect(
        self, batches: Sequence[Batch], positions: int, accumulate: int, generator: torch.Generator
    ) -> tuple[Generation, list[RolloutBatch]]:
        """Rollouts of all the batches of a generation, rewarded, with their advantages.

        Args:
            batches: the prompts.
            positions: training steps that use them, in turn.
            accumulate: training steps of an optimizer step.
            generator: of the random numbers.

        Returns:
            What to train on, and all that was drawn.
        """
        moves = positions > accumulate
        both = [self._enough(batch, generator, keep_logps=moves) for batch in batches]
        kept = [rollouts for rollouts, _ in both]
        if self.reference is not None:
            for rollouts in kept:
                nothing = torch.zeros_like(rollouts.entropy)
                rollouts.ref_logps = self.reference(rollouts) if len(rollouts) else nothing
        self.objective.set_advantages(kept, self.reduce)
        totals = step_totals(kept, positions, accumulate)
        return Generation(kept, positions, totals if self.reduce is None else self.reduce(totals)), [d for _, d in both]

    def _enough(self, batch: Batch, generator: torch.Generator, keep_logps: bool) -> tuple[RolloutBatch, RolloutBatch]:
        """What to train on of a batch, and all that was drawn.

        With `oversample`, prompts are drawn for in rounds until enough groups have variance (DAPO, arXiv 2503.14476).
        The others have cost their rollouts, or nothing if no round came to them, and stay in the pool untrained. A
        prompt repeated to make the ranks equal is not trained on, since it has its weight on the other rank.
        """
        if self.oversample is None:
            drawn = self.roll_out(batch, generator, keep_logps)
            once = ~drawn.repeated
            return drawn if bool(once.all()) else drawn.take(once), drawn
        n_rows = len(batch["sample_id"])
        wanted = math.ceil(n_rows / self.oversample)
        rounds: list[RolloutBatch] = []
        for rows in torch.split(torch.arange(n_rows, device=batch["sample_id"].device), wanted):
            rounds.append(self.roll_out(take_rows(batch, rows), generator, keep_logps))
            if sum(int(_teaches(drawn).sum()) for drawn in rounds) >= wanted:
                break
        drawn = RolloutBatch.cat(rounds)
        return drawn.take(_teaches(drawn).nonzero().flatten()[:wanted]), drawn


def _teaches(drawn: RolloutBatch) -> Tensor:
    return ~drawn.flat & ~drawn.repeated
