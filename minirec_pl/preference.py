"""Preference pairs: what a group without reward variance can still teach."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    chosen_mask: Tensor,
    rejected_mask: Tensor,
    weights: Tensor,
    *,
    old_chosen: Tensor,
    old_rejected: Tensor,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> Tensor:
    """Target-over-sampled pairs with a bounded update of every token, after RISER (arXiv 2602.00632).

    A group in which no rollout found the target has no advantage. Its target c and its rollouts y_1..y_G are pairs that
    a recommender should order, and the loss of the group is the weighted mean of -log sigmoid of the margins

        l = sum_j w_j -log sigmoid(s(c) - s(y_j))
        s(c) = mean_t min(log pi(c_t), log pi_old(c_t) + log(1 + epsilon_high))
        s(y) = mean_t max(log pi(y_t), log pi_old(y_t) + log(1 - epsilon))

    with mean log-probabilities as in SimPO (arXiv 2405.14734), so that no reference is needed and length does not
    decide. What a pair moves is bounded twice: the gradient by the log-probability of a token is at most 1 / length
    (the sigmoid's), and 0 once the token has left the clip range, the one that the GRPO objective keeps to.

    Args:
        chosen: float [P, L], log-probabilities of the target's tokens, in nats, with gradient.
        rejected: float [P, G, L], of the rollouts' tokens.
        chosen_mask: bool [P, L], true where a token counts.
        rejected_mask: bool [P, G, L].
        weights: float [P, G], of the pairs, see `pair_weights`.
        old_chosen: float [P, L], under the policy that sampled. On-policy: `chosen.detach()`.
        old_rejected: float [P, G, L].
        epsilon: lower clip width.
        epsilon_high: upper clip width; None takes `epsilon`.

    Returns:
        float [P], the loss of each group.

    Example:
        >>> one, two = torch.tensor([[0.0]]), torch.tensor([[[0.0]]])
        >>> mask = torch.ones(1, 1), torch.ones(1, 1, 1)
        >>> preference_loss(one, two, *mask, torch.ones(1, 1), old_chosen=one, old_rejected=two)
        tensor([0.6931])
    """
    highest = old_chosen.detach() + math.log1p(epsilon if epsilon_high is None else epsilon_high)
    lowest = old_rejected.detach() + (math.log1p(-epsilon) if epsilon < 1 else -math.inf)
    margin = _mean(torch.minimum(chosen, highest), chosen_mask)[:, None]
    margin = margin - _mean(torch.maximum(rejected, lowest), rejected_mask)
    return -(weights * torch.nn.functional.logsigmoid(margin)).sum(dim=-1)


def pair_weights(items: Tensor) -> Tensor:
    """Weights that count each different item of a group once: 1 / (times drawn * different items).

    Args:
        items: int64 [P, G].

    Returns:
        float32 [P, G], rows sum to 1.

    Example:
        >>> pair_weights(torch.tensor([[4, 7, 4]]))
        tensor([[0.2500, 0.5000, 0.2500]])
    """
    drawn = (items[:, :, None] == items[:, None, :]).sum(dim=-1)
    weights = 1.0 / drawn
    return weights / weights.sum(dim=-1, keepdim=True)


def _mean(logps: Tensor, mask: Tensor) -> Tensor:
    active = mask.bool()
    return logps.masked_fill(~active, 0.0).sum(dim=-1) / active.sum(dim=-1).clamp(min=1)
