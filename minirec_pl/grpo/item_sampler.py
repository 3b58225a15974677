"""Groups of items drawn from a generative policy: rewarded for training, and measured for selection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from minirec_pl.grpo.buffer import Batch, RolloutBatch, scoring_numbers, take_rows
from minirec_pl.grpo.loss import flat_groups
from minirec_pl.policy import GenerativePolicy, Rollouts
from minirec_pl.policy.distinct import sample_distinct
from minirec_pl.policy.language_models.sampling import Prompt, evaluation_mode
from minirec_pl.rewards.calls import Rewarder
from minirec_pl.selection.probes.gradients import GradientKind, GradientSpace
from minirec_pl.selection.probes.target import target_signals
from minirec_pl.selection.probes.trajectory import Trajectory
from minirec_pl.selection.signals import SampleSignals
from minirec_pl.utils.cost import Cost

if TYPE_CHECKING:
    from minirec_pl.grpo.objective import Objective


@dataclass
class ItemSampler:
    """Draws groups of items in evaluation mode.

    Attributes:
        policy: what is sampled from.
        rewards: of the module.
        sampling: `temperature`, `top_k` and `top_p`.
        cost: what is run is booked here.
        num_generations: G, rollouts of a prompt in training.
        draw: with replacement, without, or the items that a beam search ends with.
        pairs: turn groups in which nothing found the target into preference pairs.
        objective: what the rollouts are for.
        trajectory: remembers where training started.
    """

    policy: GenerativePolicy
    rewards: Rewarder
    sampling: dict[str, Any]
    cost: Cost
    num_generations: int
    draw: Literal["sample", "distinct", "beam"]
    pairs: bool
    objective: Objective
    trajectory: Trajectory

    def roll_out(self, batch: Batch, generator: torch.Generator, keep_logps: bool) -> RolloutBatch:
        """Rewarded rollouts to train on.

        Args:
            batch: the prompts.
            generator: of the random numbers.
            keep_logps: whether an update needs the log-probabilities under the policy that sampled.
        """
        policy, temperature = self.policy, self.sampling["temperature"]
        target, seen = batch["target"][:, None], batch["seen"]
        with evaluation_mode(policy):
            prompt = policy.run_prompt(batch)
            rollouts = self._draw(prompt, batch, generator)
            items = rollouts.items
            target_logps, target_mask, _ = policy.head_logps(
                policy.completion_states(prompt, target), target, seen, temperature
            )
        rewards, by_name = self.rewards(batch, items, rollouts.logps.sum(dim=-1))
        applies = ~rewards.isnan()
        rewards = rewards.nan_to_num(nan=0.0)
        flat = flat_groups(rewards, applies)
        paired = flat & applies.any(dim=1) & (items != target).all(dim=1) if self.pairs else torch.zeros_like(flat)
        learns = torch.ones_like(flat) if self.objective.beta > 0 else ~flat | paired
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
            pairs=paired,
        )

    def _draw(self, prompt: Prompt, batch: Batch, generator: torch.Generator) -> Rollouts:
        temperature, group = self.sampling["temperature"], self.num_generations
        if self.draw == "distinct":
            return sample_distinct(self.policy, prompt, batch, group, generator, temperature)
        if self.draw == "beam":
            return self.policy.beams(prompt, batch["seen"], group, temperature)
        size = (len(batch["target"]), group, self.policy.id_length)
        uniform = torch.rand(size, dtype=torch.float64, generator=generator, device=generator.device)
        return self.policy.sample(prompt, batch["seen"], uniform, **self.sampling)

    def reference_logps(self, policy: GenerativePolicy, rollouts: RolloutBatch) -> Tensor:
        """Log-probabilities [B, G, L] of rollouts under another policy."""
        tokens = policy.prompt_tokens(rollouts.batch) + policy.fed_tokens(rollouts.items)
        self.cost.add("training", forward=tokens)
        return policy.completion_logps(rollouts.batch, rollouts.items, self.sampling["temperature"])[0]

    def signals(
        self, batch: Batch, group: int, words: tuple[int, int], gradient: GradientKind, space: GradientSpace
    ) -> SampleSignals:
        """See `GRPORecModule.sample_signals`.

        Args:
            batch: the prompts.
            group: rollouts of each, or 0.
            words: seed of the random numbers, with the sample_id.
            gradient: which signal.
            space: where it is taken.
        """
        policy, target = self.policy, batch["target"][:, None]
        rewards = None
        forward = policy.prompt_tokens(batch) + policy.fed_tokens(target)
        with evaluation_mode(policy):
            prompt = policy.run_prompt(batch)
            states = policy.completion_states(prompt, target)
            if group > 0:
                numbers = scoring_numbers(words, batch["sample_id"], (group, policy.id_length))
                drawn = policy.sample(prompt, batch["seen"], numbers, **self.sampling)
                rewards, _ = self.rewards(batch, drawn.items, drawn.logps.sum(dim=-1))
                forward += policy.fed_tokens(drawn.items)
        measured = target_signals(policy, states, batch, self.sampling["temperature"], gradient, space, self.trajectory)
        forward += measured.tokens
        self.cost.add("scoring", forward=forward, backward=measured.tokens, rollouts=group * len(target))
        return SampleSignals(
            batch["sample_id"],
            rewards=rewards,
            gradient=measured.gradient,
            embedding=states.prompt.detach(),
            solve_probability=measured.logp.exp(),
            alignment=measured.alignment,
        )
