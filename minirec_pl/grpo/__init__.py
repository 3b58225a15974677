"""Group Relative Policy Optimization: loss, objective, rollouts and the reference policy."""

from minirec_pl.grpo.loss import (
    PolicyLoss,
    eos_mask,
    flat_groups,
    group_advantages,
    kl_k3,
    pair_weights,
    policy_loss,
    preference_loss,
)
from minirec_pl.selection.group_sizes import AdaptiveGenerations

__all__ = [
    "AdaptiveGenerations",
    "PolicyLoss",
    "eos_mask",
    "flat_groups",
    "group_advantages",
    "kl_k3",
    "pair_weights",
    "policy_loss",
    "preference_loss",
]
