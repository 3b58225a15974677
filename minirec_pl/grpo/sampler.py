"""Groups of rollouts drawn from a policy: rewarded for training, and measured for selection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from minirec_pl.data.loader import GROUP_SIZE
from minirec_pl.grpo.buffer import RolloutBatch, resize, scoring_numbers, take_rows
from minirec_pl.grpo.loss import flat_groups, group_advantages
from minirec_pl.grpo.objective import Objective
from minirec_pl.policy.interface import (
    Batch,
    CompletionPass,
    DrawnGroups,
    Policy,
    PolicySignals,
    RolloutOptions,
    SignalOptions,
)
from minirec_pl.policy.returned import returned
from minirec_pl.rewards.calls import Rewarder, ranking_columns
from minirec_pl.selection.probes.gradients import GradientKind, GradientSpace
from minirec_pl.selection.probes.trajectory import Trajectory
from minirec_pl.selection.signals import SampleSignals
from minirec_pl.utils.cost import Cost
from minirec_pl.utils.errors import InputError


@dataclass
class RolloutSampler:
    """Draws groups of rollouts in evaluation mode and has them rewarded.

    Attributes:
        policy: what is sampled from.
        options: how.
        rewards: of the module.
        objective: what the rollouts are for.
        cost: what is run is booked here.
        trajectory: remembers where training started.
        largest: rollouts that groups of unequal size are padded to.
    """

    policy: Policy
    options: RolloutOptions
    rewards: Rewarder
    objective: Objective
    cost: Cost
    trajectory: Trajectory
    largest: int = 0

    def roll_out(self, batch: Batch, generator: torch.Generator, keep_logps: bool) -> RolloutBatch:
        """Rewarded rollouts to train on.

        Groups of unequal size are rewarded one size after the other, smallest first, and drawn so, too, unless the
        policy draws them at once. Nothing is drawn for padding.

        Args:
            batch: the prompts; with a column `group_size` int64 [B] where groups are of unequal size.
            generator: of the random numbers.
            keep_logps: whether an update needs the log-probabilities under the policy that sampled.
        """
        if GROUP_SIZE not in batch:
            return self._to_train_on(batch, self._drawn(batch, self.options, generator), keep_logps)
        parts, places = [], []
        for rows, drawn in self._drawn_by_size(batch, generator):
            part = self._to_train_on(take_rows(batch, rows), drawn, keep_logps)
            parts.append(part.resized(self.largest))
            places.append(rows)
        return RolloutBatch.cat(parts).take(torch.cat(places).argsort())

    def _drawn_by_size(self, batch: Batch, generator: torch.Generator) -> Iterator[tuple[Tensor, DrawnGroups]]:
        """The groups of each size, and at which rows of the batch they are."""
        sizes, whole = batch[GROUP_SIZE], None
        if self.policy.draws_unequal_groups:
            whole = self._drawn(batch, replace(self.options, num_generations=int(sizes.max())), generator)
            whole.target = None if whole.target is None else cache(whole.target)
            self.cost.add("training", forward=whole.tokens)
        for size in sorted(set(sizes.tolist())):
            rows = (sizes == size).nonzero().flatten()
            if whole is not None:
                yield rows, whole.of_size(rows, size)
            else:
                options = replace(self.options, num_generations=size)
                yield rows, self._drawn(take_rows(batch, rows), options, generator)

    def _to_train_on(self, batch: Batch, drawn: DrawnGroups, keep_logps: bool) -> RolloutBatch:
        """Rewards rollouts and measures what no update will."""
        target_logps, target_mask = (None, None) if drawn.target is None else drawn.target()
        rewards, by_name = self._rewarded(batch, drawn)
        applies = ~rewards.isnan()
        rewards = rewards.nan_to_num(nan=0.0)
        flat = flat_groups(rewards, applies)
        pairs = torch.zeros_like(flat)
        if self.options.preference_pairs:
            pairs = flat & applies.any(dim=1) & (drawn.items != batch["target"][:, None]).all(dim=1)
        learns = torch.ones_like(flat) if self.objective.beta > 0 else ~flat | pairs
        rows = (torch.ones_like(flat) if keep_logps else ~learns).nonzero().flatten()
        logps, entropy, measured = torch.zeros_like(drawn.logps), torch.zeros_like(drawn.logps), 0
        if len(rows):
            of_logps, of_entropy, measured = drawn.measure(rows)
            logps, entropy = (v.new_zeros(logps.shape).index_copy(0, rows, v) for v in (of_logps, of_entropy))
        self.cost.add("training", forward=drawn.tokens + measured, rollouts=drawn.items.numel())
        return RolloutBatch(
            batch=take_rows(batch, torch.arange(len(flat), device=flat.device)),
            items=drawn.items,
            rewards=rewards,
            applies=applies,
            rewards_by_name=by_name,
            mask=drawn.mask,
            entropy=entropy,
            target_logps=target_logps,
            target_mask=target_mask,
            old_logps=logps if keep_logps else None,
            ref_logps=None,
            advantages=torch.zeros_like(rewards),
            learns=learns,
            pairs=pairs,
            texts=drawn.texts,
        )

    def _drawn(self, batch: Batch, options: RolloutOptions, random: torch.Generator | Tensor) -> DrawnGroups:
        drawn = self.policy.roll_out(batch, options, random)
        groups = (len(batch["sample_id"]), options.num_generations)
        shapes = {"items": groups, "logps": (*groups, None), "mask": (*groups, None)}
        returned(drawn, DrawnGroups, self.policy, "roll_out", **shapes)
        lowest, highest = (int(item) for item in drawn.items.aminmax())
        if not 0 <= lowest <= highest < len(self.rewards.item_ids):
            raise InputError(
                f"{type(self.policy).__name__}.roll_out returned items {lowest}..{highest}: return item indices in "
                f"0..{len(self.rewards.item_ids) - 1}"
            )
        return drawn

    def _rewarded(self, batch: Batch, drawn: DrawnGroups) -> tuple[Tensor, dict[str, Tensor]]:
        """Rewards float32 [B, G], NaN where none applies, and the single ones by name."""
        words = None if drawn.texts is None else self.policy.words(drawn.texts)
        ranking = drawn.ranking
        columns = None if ranking is None else ranking_columns(ranking.rank, ranking.probability)
        return self.rewards(batch, drawn.items, drawn.logps.sum(dim=-1), words, columns)

    def reference_logps(self, policy: Policy, rollouts: RolloutBatch) -> Tensor:
        """Log-probabilities [B, G, L] of rollouts under another policy."""
        parts, places = [], []
        for rows, part in rollouts.of_equal_size():
            passed = policy.completion_pass(part.batch, part.items, part.texts, self.options.temperature)
            returned(passed, CompletionPass, policy, "completion_pass", logps=part.mask.shape)
            self.cost.add("training", forward=passed.tokens)
            parts.append(resize(passed.logps, rollouts.items.shape[1]))
            places.append(rows)
        return torch.cat(parts)[torch.cat(places).argsort()]

    def signals(
        self, batch: Batch, words: tuple[int, int], gradient: GradientKind, space: GradientSpace
    ) -> SampleSignals:
        """See `GRPORecModule.sample_signals`; `scale_rewards="batch"` counts as `group`, since samples stand alone.

        Args:
            batch: the prompts.
            words: seed of the random numbers, with the sample_id.
            gradient: which signal.
            space: where it is taken.
        """
        ids, group = batch["sample_id"], self.options.scoring_generations
        drawn = rewards = advantages = None
        if group:
            options = replace(self.options, num_generations=group, rollouts="sample", distinct_rollouts=False)
            numbers = scoring_numbers(words, ids, (group, self.policy.rollout_length(options)))
            drawn = self._drawn(batch, options, numbers)
            rewards, _ = self._rewarded(batch, drawn)
            advantages = group_advantages(
                rewards.nan_to_num(nan=0.0),
                scale_rewards="group" if self.objective.scale_rewards == "batch" else self.objective.scale_rewards,
                baseline=self.objective.baseline,
                applies=~rewards.isnan(),
            )
        wanted = SignalOptions(gradient, space, self.options.temperature, words[0], self.trajectory)
        found = returned(self.policy.signals(batch, drawn, advantages, wanted), PolicySignals, self.policy, "signals")
        self.cost.add("scoring", forward=found.forward, backward=found.backward, rollouts=group * len(ids))
        try:
            return SampleSignals(
                ids,
                rewards=rewards,
                gradient=found.gradient,
                embedding=found.embedding,
                solve_probability=found.solve_probability,
                alignment=found.alignment,
            )
        except InputError as error:
            raise InputError(f"{type(self.policy).__name__}.signals: {error}") from error
