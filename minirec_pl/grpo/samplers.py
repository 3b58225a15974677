"""How a module draws its rollouts: by the kind of its policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from minirec_pl.grpo.item_sampler import ItemSampler
from minirec_pl.grpo.reasoning_sampler import ReasoningSampler
from minirec_pl.policy import RetrievalPolicy
from minirec_pl.rewards.calls import Rewarder

if TYPE_CHECKING:
    from minirec_pl.trainers.grpo import GRPORecModule


def sampler_of(module: GRPORecModule) -> ItemSampler | ReasoningSampler:
    """The sampler of a module, with its options as they are now."""
    shared: dict[str, Any] = {
        "rewards": Rewarder(module.rewards, module.reward_weights, module.item_ids),
        "sampling": {"temperature": module.temperature, "top_k": module.top_k, "top_p": module.top_p},
        "cost": module.cost,
        "num_generations": module.num_generations,
        "objective": module.objective,
    }
    policy = module.policy
    if isinstance(policy, RetrievalPolicy):
        length = module.max_completion_length or policy.max_completion_length
        return ReasoningSampler(policy, length=length, mask_truncated=module.mask_truncated_completions, **shared)
    draw: Literal["sample", "distinct", "beam"] = "distinct" if module.distinct_rollouts else module.rollouts
    pairs = module.wasted_groups == "preference_pairs"
    return ItemSampler(policy, draw=draw, pairs=pairs, trajectory=module.trajectory, **shared)
