"""Makes rollouts of a batch of prompts, has them rewarded, and decides what becomes of groups without variance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minirec_pl.cost import Cost
from minirec_pl.generation import Batch, Generation, RolloutBatch, step_totals, take_rows
from minirec_pl.grpo import flat_groups
from minirec_pl.objective import Objective
from minirec_pl.policy import GenerativePolicy, Rollouts
from minirec_pl.policy.distinct import sample_distinct
from minirec_pl.policy.rollout import Prompt, evaluation_mode

Reward = Callable[[Batch, Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
Reference = Callable[[Batch, Tensor], Tensor]


def scoring_numbers(words: Sequence[int], sample_ids: Tensor, size: tuple[int, int]) -> Tensor:
    """Uniform numbers float64 [B, *size] whose rows depend on the words and their own sample_id alone."""
    rows = [np.random.default_rng([*words, sample_id]).random(size) for sample_id in sample_ids.tolist()]
    return torch.from_numpy(np.stack(rows)).to(sample_ids.device)


@dataclass
class RolloutCollector:
    """Draws groups of rollouts in evaluation mode, for all the batches of a generation.

    Attributes:
        policy: what is sampled from.
        objective: what the rollouts are for.
        reward: from a batch, items [B, G] and their log-probabilities [B, G] to the reward [B, G], NaN where none
            applies, and the single rewards by name.
        reference: from a batch and items to log-probabilities [B, G, L]; None without a reference.
        num_generations: G.
        sampling: `temperature`, `top_k` and `top_p`.
        distinct: draw a group without replacement.
        pairs: turn groups in which nothing found the target into preference pairs.
        oversample: prompts of a batch for one that is trained on, where groups without variance are dropped; None
            keeps them all.
        cost: what is run is booked here, as training.
        reduce: sums a tensor over the ranks; None where there is one.
    """

    policy: GenerativePolicy
    objective: Objective
    reward: Reward
    reference: Reference | None
    num_generations: int
    sampling: dict[str, Any]
    distinct: bool
    pairs: bool
    oversample: float | None
    cost: Cost
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
                rollouts.ref_logps = torch.zeros_like(rollouts.entropy)
                if not len(rollouts):
                    continue
                rollouts.ref_logps = self.reference(rollouts.batch, rollouts.items)
                tokens = self.policy.prompt_tokens(rollouts.batch) + self.policy.fed_tokens(rollouts.items)
                self.cost.add("training", forward=tokens)
        self.objective.set_advantages(kept, self.reduce)
        totals = step_totals(kept, positions, accumulate)
        return Generation(kept, positions, totals if self.reduce is None else self.reduce(totals)), [d for _, d in both]

    def _enough(self, batch: Batch, generator: torch.Generator, keep_logps: bool) -> tuple[RolloutBatch, RolloutBatch]:
        """What to train on of a batch, and all that was drawn.

        With `oversample`, prompts are drawn for in rounds until enough groups have variance (DAPO, arXiv 2503.14476).
        The others have cost their rollouts, or nothing if no round came to them, and stay in the pool untrained.
        """
        if self.oversample is None:
            drawn = self._roll_out(batch, generator, keep_logps)
            return drawn, drawn
        n_rows = len(batch["sample_id"])
        wanted = math.ceil(n_rows / self.oversample)
        rounds: list[RolloutBatch] = []
        for rows in torch.split(torch.arange(n_rows, device=batch["sample_id"].device), wanted):
            rounds.append(self._roll_out(take_rows(batch, rows), generator, keep_logps))
            if sum(int((~drawn.flat).sum()) for drawn in rounds) >= wanted:
                break
        drawn = RolloutBatch.cat(rounds)
        return drawn.take((~drawn.flat).nonzero().flatten()[:wanted]), drawn

    def _roll_out(self, batch: Batch, generator: torch.Generator, keep_logps: bool) -> RolloutBatch:
        policy, temperature = self.policy, self.sampling["temperature"]
        target, seen = batch["target"][:, None], batch["seen"]
        with evaluation_mode(policy):
            prompt = policy.run_prompt(batch)
            rollouts = self._draw(prompt, batch, generator)
            items = rollouts.items
            target_logps, target_mask, _ = policy.head_logps(
                policy.completion_states(prompt, target), target, seen, temperature
            )
        rewards, by_name = self.reward(batch, items, rollouts.logps.sum(dim=-1))
        applies = ~rewards.isnan()
        rewards = rewards.nan_to_num(nan=0.0)
        flat = flat_groups(rewards, applies)
        pairs = flat & (items != target).all(dim=1) if self.pairs else torch.zeros_like(flat)
        learns = torch.ones_like(flat) if self.objective.beta > 0 else ~flat | pairs
        rows = (torch.ones_like(flat) if keep_logps else ~learns).nonzero().flatten()
        logps, entropy = torch.zeros_like(rollouts.logps), torch.zeros_like(rollouts.logps)
        if len(rows):
            with evaluation_mode(policy):
                part = prompt._replace(states=prompt.states[rows], row=prompt.row[rows])
                states = policy.completion_states(part, items[rows])
                logps[rows], _, entropy[rows] = policy.head_logps(states, items[rows], seen[rows], temperature)
        fed = policy.prompt_tokens(batch) + policy.fed_tokens(items) + policy.fed_tokens(target)
        self.cost.add("training", forward=fed + policy.fed_tokens(items[rows]), rollouts=items.numel())
        return RolloutBatch(
            batch=take_rows(batch, torch.arange(len(items), device=items.device)),
            items=items,
            rewards=rewards,
            applies=applies,
            rewards_by_name=by_name,
            mask=rollouts.mask,
            entropy=entropy,
            target_logps=target_logps[:, 0],
            target_mask=target_mask[:, 0],
            old_logps=logps if keep_logps else None,
            ref_logps=None,
            advantages=torch.zeros_like(rewards),
            learns=learns,
            pairs=pairs,
        )

    def _draw(self, prompt: Prompt, batch: Batch, generator: torch.Generator) -> Rollouts:
        if self.distinct:
            temperature = self.sampling["temperature"]
            return sample_distinct(self.policy, prompt, batch, self.num_generations, generator, temperature)
        size = (len(batch["target"]), self.num_generations, self.policy.id_length)
        uniform = torch.rand(size, dtype=torch.float64, generator=generator, device=generator.device)
        return self.policy.sample(prompt, batch["seen"], uniform, **self.sampling)
