"""RecPO, the RL of a policy that reasons and then ranks (R2ec, arXiv 2505.16994): rollouts, item loss and signals.

A rollout is a reasoning. It gives the state h behind the answer marker, and so a ranking of the whole catalogue, which
is rewarded. Beside the token loss with group advantages A, the best rollouts of a group learn the item:

    l = -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A),  rho = p / stop_gradient(p)

p being the softmax probability of the target among the targets of the batch and, if wanted, other items.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from minirec_pl.grpo.buffer import Batch, RolloutBatch, scoring_numbers, take_rows
from minirec_pl.grpo.loss import flat_groups, group_advantages
from minirec_pl.policy import RetrievalPolicy, Sampling
from minirec_pl.policy.item_index import Ranking, draw_negatives
from minirec_pl.policy.language_models.sampling import evaluation_mode
from minirec_pl.policy.reasoning import ReasoningPass, unit
from minirec_pl.rewards.calls import Rewarder, ranking_columns
from minirec_pl.selection.probes.gradients import GradientKind, GradientSpace, head_gradient, head_hvp
from minirec_pl.selection.signals import SampleSignals
from minirec_pl.utils.cost import Cost
from minirec_pl.utils.errors import InputError

if TYPE_CHECKING:
    from minirec_pl.grpo.objective import Objective

SIGNAL_NEGATIVES = 64


class Drawn(NamedTuple):
    """G reasonings of each of B prompts, and what came of them.

    Attributes:
        texts: int64 [B, G, L], tokens padded with -1.
        passed: without gradient.
        ranking: fields [B, G].
        rewards: float32 [B, G], NaN where none applies.
        by_name: the single rewards.
        tokens: tokens that went through the model.
    """

    texts: Tensor
    passed: ReasoningPass
    ranking: Ranking
    rewards: Tensor
    by_name: dict[str, Tensor]
    tokens: int


@dataclass
class ReasoningSampler:
    """Draws groups of reasonings in evaluation mode.

    Attributes:
        policy: what is sampled from.
        rewards: of the module.
        sampling: `temperature`, `top_k` and `top_p`.
        length: L, tokens of a reasoning at most.
        cost: what is run is booked here.
        num_generations: G, rollouts of a prompt in training.
        mask_truncated: leave the tokens of texts that ended at the length out of the loss.
        objective: what the rollouts are for.
    """

    policy: RetrievalPolicy
    rewards: Rewarder
    sampling: dict[str, Any]
    length: int
    cost: Cost
    num_generations: int
    mask_truncated: bool
    objective: Objective

    def draw(self, batch: Batch, uniform: Tensor) -> Drawn:
        """Reasonings, one for each row of random numbers float64 [B, G, L]."""
        policy = self.policy
        with evaluation_mode(policy):
            prompts = policy.encode(batch, self.length)
            ran, sampling = policy.run(prompts), Sampling(**self.sampling)
            texts, logps = policy.reason(
                prompts, uniform.shape[1], length=self.length, sampling=sampling, uniform=uniform, ran=ran
            )
            passed = policy.read(prompts, texts, sampling.temperature, ran=ran)
            ranking = policy.rank(passed.states, batch["target"], batch["seen"])
        columns = ranking_columns(*ranking, self.rewards.item_ids)
        rewards, by_name = self.rewards(batch, ranking.best, logps.sum(dim=-1), policy.words(texts), columns)
        markers = len(texts) * texts.shape[1] * len(policy.marker)
        tokens = int(prompts.mask.sum()) + 2 * passed.tokens - markers
        return Drawn(texts, passed, ranking, rewards, by_name, tokens)

    def roll_out(self, batch: Batch, generator: torch.Generator, keep_logps: bool) -> RolloutBatch:
        """Rewarded rollouts to train on.

        Args:
            batch: the prompts.
            generator: of the random numbers.
            keep_logps: whether an update needs the log-probabilities under the policy that sampled.
        """
        size = (len(batch["target"]), self.num_generations, self.length)
        drawn = self.draw(batch, torch.rand(size, dtype=torch.float64, generator=generator, device=generator.device))
        self.cost.add("training", forward=drawn.tokens, rollouts=drawn.rewards.numel())
        applies, mask = ~drawn.rewards.isnan(), drawn.texts >= 0
        if self.mask_truncated:
            mask = mask & ~self.policy.truncated(drawn.texts)[..., None]
        rewards = drawn.rewards.nan_to_num(nan=0.0)
        flat = flat_groups(rewards, applies)
        return RolloutBatch(
            batch=take_rows(batch, torch.arange(len(rewards), device=rewards.device)),
            items=drawn.ranking.best,
            rewards=rewards,
            applies=applies,
            rewards_by_name=drawn.by_name,
            mask=mask,
            entropy=drawn.passed.entropy,
            target_logps=None,
            target_mask=None,
            old_logps=drawn.passed.logps if keep_logps else None,
            ref_logps=None,
            advantages=torch.zeros_like(rewards),
            learns=torch.ones_like(flat) if self.objective.beta > 0 else ~flat,
            pairs=torch.zeros_like(flat),
            texts=drawn.texts,
        )

    def reference_logps(self, policy: RetrievalPolicy, rollouts: RolloutBatch) -> Tensor:
        """Log-probabilities [B, G, L] of rollouts under another policy."""
        assert rollouts.texts is not None
        prompts = policy.encode(rollouts.batch, self.length)
        passed = policy.read(prompts, rollouts.texts, self.sampling["temperature"])
        self.cost.add("training", forward=passed.tokens)
        return passed.logps

    def signals(
        self, batch: Batch, group: int, words: tuple[int, int], gradient: GradientKind, space: GradientSpace
    ) -> SampleSignals:
        """Rewards, gradient signals and embeddings of samples, each from its own rollouts alone.

        With h_n the state of rollout n behind the answer marker and l_n its item loss, whose negatives come from the
        item cache: u = (1/G) sum_n A_n d l_n / d h_n for `first`; for `hvp` the published Hessian-vector product of the
        first rollout with A = 1. The embedding is the mean of h_n / |h_n|. `scale_rewards="batch"` counts as `group`.

        Args:
            batch: the prompts.
            group: G.
            words: seed of the random numbers, with the sample_id; the negatives depend on the first of them.
            gradient: which signal.
            space: where it is taken.

        Raises:
            InputError: if the gradient is `trajectory` or the space `lora`.
        """
        if gradient == "trajectory" or space == "lora":
            raise InputError(
                "a RetrievalPolicy has gradient signals at the hidden state of the answer: set the selector's gradient "
                "to first or hvp, and its gradient_space to answer"
            )
        policy, target, ids = self.policy, batch["target"], batch["sample_id"]
        drawn = self.draw(batch, scoring_numbers(words, ids, (group, self.length)))
        self.cost.add("scoring", forward=drawn.tokens, rollouts=drawn.rewards.numel())
        size = policy.cached_negatives or SIGNAL_NEGATIVES
        others = draw_negatives(len(policy.index), target, ids, words[:1], size)
        vectors = policy.index.vectors[torch.cat([target[:, None], others], dim=1)]
        states, first = drawn.passed.states, torch.zeros_like(target)
        options: dict[str, Any] = {"temperature": policy.similarity_temperature, "cosine": True}
        if gradient == "hvp":
            signal = head_hvp(states[:, 0], vectors, first, **options)
        else:
            applies = ~drawn.rewards.isnan()
            advantages = group_advantages(
                drawn.rewards.nan_to_num(nan=0.0),
                scale_rewards="none" if self.objective.scale_rewards == "none" else "group",
                baseline=self.objective.baseline,
                applies=applies,
            )
            slopes = [head_gradient(states[:, g], vectors, first, **options) for g in range(group)]
            signal = (torch.stack(slopes, dim=1) * advantages[..., None]).mean(dim=1)
        return SampleSignals(
            ids, rewards=drawn.rewards, gradient=signal.float(), embedding=unit(states).mean(dim=1).float()
        )


def with_negatives(
    policy: RetrievalPolicy,
    batches: Sequence[Batch],
    words: Sequence[int],
    ranks: tuple[int, int] | None,
    reduce: Callable[[Tensor], Tensor],
) -> list[dict[str, Any]]:
    """Batches with a column `negatives` int64 [B, K]: items from the cache that the targets are compared with.

    Args:
        policy: says how many are drawn for each sample.
        batches: of a generation, as large on every rank.
        words: seed of the draw, with the sample_id.
        ranks: the own rank and how many there are, if the others' targets of the same batch are negatives too.
        reduce: sums a tensor over the ranks.
    """
    elsewhere = None
    if ranks is not None:
        target = torch.cat([batch["target"] for batch in batches])
        table = torch.zeros(ranks[1], len(target), dtype=torch.float64, device=target.device)
        table[ranks[0]] = target.to(table)
        table = reduce(table).to(target)
        elsewhere = torch.cat([table[: ranks[0]], table[ranks[0] + 1 :]])
    made, start = [], 0
    for batch in batches:
        target = batch["target"]
        negatives = draw_negatives(len(policy.index), target, batch["sample_id"], words, policy.cached_negatives)
        if elsewhere is not None:
            there = elsewhere[:, start : start + len(target)].flatten()
            negatives = torch.cat([negatives, there.expand(len(target), -1)], dim=1)
        start += len(target)
        made.append({**batch, "negatives": negatives})
    return made


def item_loss(
    policy: RetrievalPolicy,
    part: RolloutBatch,
    states: Tensor,
    batch_items: Tensor,
    relabel_topk: int,
    epsilon: float,
    epsilon_high: float | None,
) -> Tensor:
    """Sum of the item losses of the best rollouts, those with the largest advantages, the first of equals.

    Args:
        policy: encodes the batch's items, with gradient.
        part: B groups.
        states: float [B, G, D], behind the answer marker, with gradient.
        batch_items: int64 [n], targets that are each other's negatives.
        relabel_topk: rollouts of a group that learn the item.
        epsilon: lower clip width of the ratio.
        epsilon_high: upper clip width; None takes `epsilon`.
    """
    best = part.advantages.sort(dim=1, descending=True, stable=True).indices[:, :relabel_topk]
    advantages = part.advantages.gather(1, best).flatten().to(states.device)
    chosen = states.gather(1, best[..., None].expand(-1, -1, states.shape[-1])).flatten(0, 1)
    target, negatives = (part.batch[name].repeat_interleave(best.shape[1], 0) for name in ("target", "negatives"))
    logps = policy.target_logps(chosen, target, batch_items, negatives)
    ratio = (logps - logps.detach()).exp()
    high = epsilon if epsilon_high is None else epsilon_high
    clipped = ratio.clamp(1 - epsilon, 1 + high)
    return -torch.minimum(ratio * advantages, clipped * advantages).sum()
