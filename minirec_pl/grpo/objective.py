"""The GRPO objective on rollouts: what their advantages are, and what an update of the policy computes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from minirec_pl.grpo.buffer import RolloutBatch, resize
from minirec_pl.grpo.loss import (
    ADVANTAGE_EPS,
    Baseline,
    ImportanceSamplingLevel,
    LossType,
    ScaleRewards,
    best_rollouts,
    check_objective,
    group_advantages,
    item_loss,
    pair_weights,
    policy_loss,
    preference_loss,
)
from minirec_pl.policy.interface import CompletionPass, Policy
from minirec_pl.policy.returned import returned
from minirec_pl.utils.modules import no_loss

WastedGroups = Literal["keep", "dynamic_sampling", "preference_pairs"]
WASTED_GROUPS: tuple[WastedGroups, ...] = ("keep", "dynamic_sampling", "preference_pairs")


class Update(NamedTuple):
    """The loss of a micro-batch, with gradient, and what is logged of it.

    Attributes:
        loss: what to minimise; over the micro-batches of an optimizer step it adds up to the objective of the whole.
        clip_low: see `minirec_pl.grpo.PolicyLoss`, as are `clip_high` and `kl`.
        entropy: mean over the active tokens, in nats.
        item_loss: share of the item loss in the loss, without gradient; None for a policy that does not rank.
        tokens: run forward and backward.
    """

    loss: Tensor
    clip_low: Tensor
    clip_high: Tensor
    kl: Tensor | None
    entropy: Tensor
    item_loss: Tensor | None
    tokens: int


@dataclass(frozen=True)
class Objective:
    """The options of the objective, named and explained in `minirec_pl.grpo`.

    Raises:
        InputError: if one is out of range.
    """

    loss_type: LossType = "dapo"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0
    use_bias_correction_kl: bool = True
    importance_sampling_level: ImportanceSamplingLevel = "token"
    scale_rewards: ScaleRewards = "group"
    baseline: Baseline = "mean"
    relabel_topk: int = 1

    def __post_init__(self) -> None:
        check_objective(
            self.loss_type, self.importance_sampling_level, self.epsilon, self.epsilon_high, self.delta, self.beta
        )
        group_advantages(
            torch.ones(1, 2, dtype=torch.float32), scale_rewards=self.scale_rewards, baseline=self.baseline
        )

    def set_advantages(self, batches: Sequence[RolloutBatch], reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Gives the rollouts of a generation their advantages.

        Args:
            batches: all of the generation, since `scale_rewards="batch"` divides by the deviation of all rewards.
            reduce: sums a tensor over the ranks, where there are several.
        """
        rewards, applies = torch.cat([b.rewards for b in batches]), torch.cat([b.applies for b in batches])
        common = reduce is not None and self.scale_rewards == "batch"
        advantages = group_advantages(
            rewards, scale_rewards="none" if common else self.scale_rewards, baseline=self.baseline, applies=applies
        )
        if reduce is not None and common:
            known = rewards[applies].double()
            count, total, squares = reduce(
                torch.stack([torch.ones_like(known).sum(), known.sum(), known.square().sum()])
            )
            variance = (squares - total.square() / count.clamp(min=1)).clamp(min=0) / (count - 1).clamp(min=1)
            advantages = advantages / (variance.sqrt().to(advantages.dtype) + ADVANTAGE_EPS)
        for batch, part in zip(batches, torch.split(advantages, [len(b) for b in batches]), strict=True):
            batch.advantages = part

    def update(self, policy: Policy, rollouts: RolloutBatch, shares: Tensor, temperature: float) -> Update:
        """One pass over the groups that the loss depends on; the others add nothing to it and are not run.

        Args:
            policy: in the mode in which it is trained.
            rollouts: a micro-batch.
            shares: [3], active tokens, completions and groups that the loss is averaged over: those of the optimizer
                step, divided by whatever the trainer divides by.
            temperature: divides the logits.
        """
        rows = rollouts.learns.nonzero().flatten()
        on_policy = rollouts.old_logps is None
        known = torch.zeros_like(rollouts.entropy) if rollouts.old_logps is None else rollouts.old_logps
        logps, entropy, loss, tokens = known, rollouts.entropy, no_loss(policy), 0
        of_items = torch.zeros_like(loss.detach()) if policy.ranks_catalogue else None
        if len(rows):
            learning = rollouts if len(rows) == len(rollouts) else rollouts.take(rows)
            extras: list[Tensor] = []
            for places, part in learning.of_equal_size():
                passed, extra, more = self._pass(policy, part, rollouts.batch["target"], shares, temperature)
                tokens += passed.tokens + more
                extras.append(extra)
                logps = _place(resize(passed.logps, known.shape[1]), rows[places], logps)
                entropy = _place(resize(passed.entropy, known.shape[1]), rows[places], entropy)
            loss = torch.stack(extras).sum()
            of_items = loss.detach() if policy.ranks_catalogue else None
        parts = policy_loss(
            logps,
            logps.detach() if on_policy else known,
            rollouts.advantages,
            rollouts.mask,
            epsilon=self.epsilon,
            epsilon_high=self.epsilon_high,
            delta=self.delta,
            beta=self.beta,
            use_bias_correction_kl=self.use_bias_correction_kl,
            ref_logps=rollouts.ref_logps,
            loss_type=self.loss_type,
            importance_sampling_level=self.importance_sampling_level,
            max_completion_length=rollouts.mask.shape[-1],
            num_items=shares[0 if self.loss_type == "dapo" else 1],
            weights=rollouts.weights,
        )
        mean_entropy = entropy.masked_fill(~rollouts.mask, 0.0).sum() / rollouts.mask.sum().clamp(min=1)
        return Update(parts.loss + loss, parts.clip_low, parts.clip_high, parts.kl, mean_entropy, of_items, tokens)

    def _pass(
        self, policy: Policy, part: RolloutBatch, targets: Tensor, shares: Tensor, temperature: float
    ) -> tuple[CompletionPass, Tensor, int]:
        """The completions of groups of one size, the losses of their targets, and the tokens that these took."""
        with_target = bool(part.pairs.any())
        passed = policy.completion_pass(part.batch, part.items, part.texts, temperature, with_target=with_target)
        returned(passed, CompletionPass, policy, "completion_pass", logps=part.mask.shape, entropy=part.mask.shape)
        extra = passed.logps.new_zeros(())
        if passed.target_logps is not None:
            extra = self._pair_loss(part, passed.target_logps, passed.logps).sum() / shares[2]
        if passed.rank_target is None:
            return passed, extra, 0
        best, advantages = best_rollouts(part.advantages, self.relabel_topk)
        ranked, more = passed.rank_target(best, targets)
        extra = item_loss(ranked, advantages, self.epsilon, self.epsilon_high) / shares[1]
        return passed, extra if part.sizes is None else extra / part.items.shape[1], more

    def _pair_loss(self, part: RolloutBatch, target: Tensor, sampled: Tensor) -> Tensor:
        pairs = part.pairs
        assert part.target_mask is not None
        assert part.target_logps is not None
        chosen, rejected = target[pairs], sampled[pairs]
        return preference_loss(
            chosen,
            rejected,
            part.target_mask[pairs],
            part.mask[pairs],
            pair_weights(part.items[pairs]),
            old_chosen=chosen if part.old_logps is None else part.target_logps[pairs],
            old_rejected=rejected if part.old_logps is None else part.old_logps[pairs],
            epsilon=self.epsilon,
            epsilon_high=self.epsilon_high,
        )


def _place(values: Tensor, rows: Tensor, into: Tensor) -> Tensor:
    return values if len(rows) == len(into) else into.to(values.dtype).index_copy(0, rows, values)
