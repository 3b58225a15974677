"""Group Relative Policy Optimization as pure tensor functions.

Names, defaults and normalisations are those of TRL's GRPOTrainer. B prompts, G rollouts each, L completion tokens.
Papers: GRPO (arXiv 2402.03300), Dr. GRPO (arXiv 2503.20783), DAPO (arXiv 2503.14476), BNPO (arXiv 2506.02864), GSPO
(arXiv 2507.18071), RLOO (arXiv 2402.14740), two-sided clipping (INTELLECT-2, arXiv 2505.07291).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from minirec_pl.utils.errors import InputError

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo"]
ScaleRewards = Literal["group", "batch", "none", "mean"]
Baseline = Literal["mean", "leave_one_out"]
ImportanceSamplingLevel = Literal["token", "sequence"]

ADVANTAGE_EPS = 1e-4  # added to a deviation, as in TRL

# exp(20) is far outside every clip range; without a bound, exp overflows and 0 * inf makes the loss NaN.
_MAX_LOG_RATIO = 20.0


class PolicyLoss(NamedTuple):
    """What `policy_loss` returns: scalars, all but `loss` detached.

    Attributes:
        loss: The objective to minimise.
        clip_low: Share of the active tokens (of the completions with active tokens for `sequence`) with A < 0 and a
            ratio below 1 - epsilon.
        clip_high: The same with A > 0 and a ratio above 1 + epsilon_high.
        kl: Mean estimate of KL(policy || reference) per active token as it stands in the loss, or None without a
            reference.
    """

    loss: Tensor
    clip_low: Tensor
    clip_high: Tensor
    kl: Tensor | None


def group_advantages(
    rewards: Tensor,
    *,
    scale_rewards: ScaleRewards = "group",
    baseline: Baseline = "mean",
    applies: Tensor | None = None,
    eps: float = ADVANTAGE_EPS,
) -> Tensor:
    """Advantages relative to the group: A_bg = (r_bg - m_bg) / (s_b + eps).

    m_bg is the mean of the group for `mean` (GRPO) and the mean of the other G - 1 rewards for `leave_one_out` (RLOO),
    which is G / (G - 1) times as large an advantage. s_b is the sample standard deviation (divisor n - 1) of the group
    for `group` (GRPO) and of all B * G rewards for `batch`; `none` divides by 1 (Dr. GRPO). `mean` divides by the mean
    of the group, A_bg = (r_bg - m_bg) / mean_g r_bg, without eps (MaxRL, arXiv 2602.02710). A group whose rewards are
    all equal gets exactly 0. Only `leave_one_out` with `none` is an unbiased estimate of the policy gradient: a mean or
    deviation that contains the completion's own reward depends on its action.

    Args:
        rewards: [B, G] finite; integers are taken as float32.
        scale_rewards: What divides the centred rewards. `batch` sees only the rewards given: gather them under DDP.
        baseline: What is subtracted.
        applies: [B, G] bool, false where no reward applies to a completion: it is left out of mean and deviation and
            its advantage is 0. None: everywhere.
        eps: Added to the standard deviation.

    Returns:
        [B, G], float32 or the wider dtype of `rewards`.

    Raises:
        InputError: If the shape is not [B, G >= 2], a reward that applies is not finite, one is negative with `mean`,
            or an option is unknown.

    Example:
        >>> group_advantages(torch.tensor([[1.0, 0.0], [0.1, 0.1]]), scale_rewards="none")
        tensor([[ 0.5000, -0.5000],
                [ 0.0000,  0.0000]])
    """
    check_choice("scale_rewards", scale_rewards, ScaleRewards)
    check_choice("baseline", baseline, Baseline)
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise InputError(
            f"rewards have shape {tuple(rewards.shape)}: give [B, G] with num_generations (G) of at least 2"
        )
    known = torch.ones_like(rewards, dtype=torch.bool) if applies is None else applies
    wrong = (known & ~rewards.isfinite()).any(dim=1)
    if bool(wrong.any()):
        rows = wrong.nonzero().flatten().tolist()
        raise InputError(f"rewards of groups {rows[:5]} are NaN or infinite: fix the reward function")
    if scale_rewards == "mean" and bool((known & (rewards < 0)).any()):
        rows = (known & (rewards < 0)).any(dim=1).nonzero().flatten().tolist()
        raise InputError(
            f"rewards of groups {rows[:5]} are negative, and scale_rewards='mean' divides by their mean: use group or "
            "none, or rewards of at least 0"
        )
    rewards = rewards.to(_at_least_float32(rewards.dtype))
    if not len(rewards):
        return rewards
    mean, std = rewards.mean(dim=1, keepdim=True), rewards.std(dim=1, keepdim=True)
    for row in (~known).any(dim=1).nonzero().flatten().tolist():
        group = rewards[row][known[row]]
        mean[row], std[row] = group.mean(), group.std() if len(group) > 1 else 0.0
    flat = flat_groups(rewards, known)
    centred = (rewards - mean).masked_fill(flat[:, None] | ~known, 0.0)
    if baseline == "leave_one_out":
        others = (known.sum(dim=1, keepdim=True) - 1).clamp(min=1).to(rewards.dtype)
        centred = centred * ((others + 1) / others)
    if scale_rewards == "none":
        return centred
    if scale_rewards == "mean":
        return centred / mean.masked_fill(flat[:, None], 1.0)
    if scale_rewards == "batch":
        std = rewards[known].std() if int(known.sum()) > 1 else torch.zeros_like(std)
    return centred / (std + eps)


def flat_groups(rewards: Tensor, applies: Tensor | None = None) -> Tensor:
    """Which groups have no reward variance, and so no advantage to learn from.

    Args:
        rewards: [B, G].
        applies: [B, G] bool, which rewards count; None: all.

    Returns:
        [B] bool, also true where fewer than two rewards count.

    Example:
        >>> flat_groups(torch.tensor([[0.1, 0.1], [0.0, 1.0]]))
        tensor([ True, False])
    """
    if applies is None:
        return rewards.amax(dim=1) == rewards.amin(dim=1)
    highest = rewards.masked_fill(~applies, -math.inf).amax(dim=1)
    return highest <= rewards.masked_fill(~applies, math.inf).amin(dim=1)


def kl_k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(policy || reference) per token: exp(d) - d - 1 with d = ref_logps - logps.

    Args:
        logps: [...] log-probabilities of the sampled tokens under the policy, in nats.
        ref_logps: [...] the same under the reference.

    Returns:
        [...] at least 0, unbiased when the tokens were drawn from the policy.

    Example:
        >>> kl_k3(torch.tensor([-1.0]), torch.tensor([-1.0]))
        tensor([0.])
    """
    difference = ref_logps - logps
    return torch.expm1(difference) - difference


def eos_mask(tokens: Tensor, eos_token_ids: int | Sequence[int], *, mask_truncated_completions: bool = False) -> Tensor:
    """True up to and including the first end-of-sequence token, so that padding that shares its id is told apart.

    Args:
        tokens: [..., L] int64 sampled token ids, without the prompt.
        eos_token_ids: Every id that ends a completion (`generation_config.eos_token_id`); none keeps all tokens.
        mask_truncated_completions: Mask every token of a completion that has no end (DAPO, arXiv 2503.14476), so that
            being cut off at the longest length is not punished.

    Returns:
        [..., L] bool.

    Example:
        >>> eos_mask(torch.tensor([[5, 2, 2], [5, 6, 7]]), 2)
        tensor([[ True,  True, False],
                [ True,  True,  True]])
    """
    ids = [eos_token_ids] if isinstance(eos_token_ids, int) else list(eos_token_ids)
    is_eos = torch.isin(tokens, torch.tensor(ids, dtype=tokens.dtype, device=tokens.device))
    ended_before = is_eos.cumsum(dim=-1) - is_eos.long()
    if mask_truncated_completions:
        return (ended_before == 0) & is_eos.any(dim=-1, keepdim=True)
    return ended_before == 0


def policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    beta: float = 0.0,
    use_bias_correction_kl: bool = True,
    ref_logps: Tensor | None = None,
    loss_type: LossType = "dapo",
    importance_sampling_level: ImportanceSamplingLevel = "token",
    max_completion_length: int | None = None,
    num_items: int | float | Tensor | None = None,
    weights: Tensor | None = None,
) -> PolicyLoss:
    """Clipped GRPO objective over the active tokens.

    With rho = exp(logps - old_logps) per token, or for `sequence` (GSPO) the one ratio of a completion y,
    rho = exp(mean over its active tokens of logps - old_logps) = (pi(y) / pi_old(y))^(1/|y|), the loss of a token is

        l = -min(min(rho, delta) A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) + beta rho k3(logps, ref_logps)

    and `loss_type` says how tokens are averaged:

    * `grpo`: mean over the completions of the mean over their active tokens (arXiv 2402.03300). A completion without
      active tokens counts as 0. Divides by `num_items` completions.
    * `dr_grpo`: sum / (completions * max_completion_length) (arXiv 2503.20783), `num_items` completions.
    * `dapo`: sum / active tokens (arXiv 2503.14476), `num_items` of them.
    * `bnpo`: sum / active tokens of this call (arXiv 2506.02864). Local: micro-batches of unequal length do not add up
      to the whole batch.

    With `num_items` of the whole optimizer step, micro-batches and ranks of any size add up to the whole batch: give
    the total divided by whatever the trainer divides by (accumulated micro-batches, ranks). What stands at masked
    positions, NaN included, touches neither the value nor the gradient.

    Args:
        logps: [B, G, L] (or [..., L]) log-probabilities of the sampled tokens under the policy, in nats, with gradient.
        old_logps: Same shape, under the policy that sampled. On-policy: `logps.detach()`.
        advantages: [B, G] (or [...]) per completion.
        mask: Same shape as `logps`, true where a token counts, see `eos_mask`.
        epsilon: Lower clip width, at least 0.
        epsilon_high: Upper clip width, `epsilon` if None (DAPO's clip-higher: 0.28).
        delta: Upper bound of the ratio where A < 0, which plain clipping leaves open (arXiv 2505.07291); above
            1 + epsilon_high, None for no bound.
        beta: Weight of the KL term; 0 leaves it out of the loss (it is still reported if `ref_logps` is given).
        use_bias_correction_kl: Multiply k3 by rho (DeepSeek-V3.2, arXiv 2512.02556): its gradient is then that of
            KL(policy || reference), which that of k3 alone is not, even where rho is 1.
        ref_logps: Same shape as `logps`, under the reference policy. Needed if beta is not 0.
        loss_type: How tokens are averaged.
        importance_sampling_level: One ratio per token, or one per completion.
        max_completion_length: Tokens; needed for `dr_grpo`.
        num_items: What the whole optimizer step averages over: active tokens for `dapo`, completions for `grpo` and
            `dr_grpo`; those of this call if None. Not used by `bnpo`.
        weights: [B, G] (or [...]), how often a completion and its tokens count in these sums and averages, for instance
            1 / G where groups are of unequal size; None for 1. With weights `num_items` is a weighted sum, too.

    Returns:
        A `PolicyLoss`; the loss is 0 with zero gradient if no token is active.

    Raises:
        InputError: If shapes differ, an option is out of range or unknown, or a needed one is missing.
    """
    check_objective(loss_type, importance_sampling_level, epsilon, epsilon_high, delta, beta)
    high = epsilon if epsilon_high is None else epsilon_high
    if beta > 0 and ref_logps is None:
        raise InputError(f"beta is {beta} but there is no reference policy: give ref_logps or set beta to 0")
    _check_shapes(logps, old_logps=old_logps, mask=mask, ref_logps=ref_logps)
    if advantages.shape != logps.shape[:-1]:
        raise InputError(
            f"advantages have shape {tuple(advantages.shape)} but logps {tuple(logps.shape)}: give one per completion"
        )

    active = mask.bool()
    n_tokens, lengths = active.sum().clamp(min=1), active.sum(dim=-1).clamp(min=1)
    dtype = _at_least_float32(logps.dtype)
    policy = logps.to(dtype).masked_fill(~active, 0.0)
    log_ratio = policy - old_logps.detach().to(dtype).masked_fill(~active, 0.0)
    counted = active
    if importance_sampling_level == "sequence":
        log_ratio = (log_ratio.sum(dim=-1) / lengths).unsqueeze(-1)
        counted = active.any(dim=-1, keepdim=True)
    ratio = log_ratio.clamp(max=_MAX_LOG_RATIO).exp()
    advantage = advantages.detach().to(dtype).unsqueeze(-1)
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    token_loss = -torch.minimum(bounded * advantage, ratio.clamp(1 - epsilon, 1 + high) * advantage)

    kl: Tensor | None = None
    if ref_logps is not None:
        token_kl = kl_k3(policy, ref_logps.detach().to(dtype).masked_fill(~active, 0.0))
        if use_bias_correction_kl:
            token_kl = (token_kl * ratio).masked_fill(~active, 0.0)
        kl = token_kl.detach().sum() / n_tokens
        if beta > 0:
            token_loss = token_loss + beta * token_kl
    token_loss = token_loss.expand_as(policy).masked_fill(~active, 0.0)

    items = n_tokens if loss_type in ("dapo", "bnpo") else torch.tensor(advantages.numel(), device=logps.device)
    if weights is not None:
        weights = weights.to(dtype)
        token_loss = token_loss * weights.unsqueeze(-1)
        items = (weights * active.sum(dim=-1)).sum() if loss_type in ("dapo", "bnpo") else weights.sum()
    if num_items is not None and loss_type != "bnpo":
        items = torch.as_tensor(num_items, dtype=dtype, device=logps.device)
    items = items.masked_fill(items == 0, 1)
    if loss_type == "grpo":
        loss = (token_loss.sum(dim=-1) / lengths).sum() / items
    elif loss_type == "dr_grpo":
        if max_completion_length is None or max_completion_length < 1:
            raise InputError("loss_type dr_grpo divides by max_completion_length: set it to at least 1")
        loss = token_loss.sum() / (items * max_completion_length)
    else:
        loss = token_loss.sum() / items

    outside = ratio.detach()
    n_counted = counted.sum().clamp(min=1).to(loss.dtype)
    clip_low = (counted & (outside < 1 - epsilon) & (advantage < 0)).sum() / n_counted
    clip_high = (counted & (outside > 1 + high) & (advantage > 0)).sum() / n_counted
    return PolicyLoss(loss, clip_low, clip_high, kl)


def check_objective(
    loss_type: str, level: str, epsilon: float, epsilon_high: float | None, delta: float | None, beta: float
) -> None:
    """Refuses options of `policy_loss` that are out of range.

    Raises:
        InputError: naming the option.
    """
    check_choice("loss_type", loss_type, LossType)
    check_choice("importance_sampling_level", level, ImportanceSamplingLevel)
    high = epsilon if epsilon_high is None else epsilon_high
    for name, value in (("epsilon", epsilon), ("epsilon_high", high), ("beta", beta)):
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"{name} is {value}: give a number of at least 0")
    if delta is not None and not delta > 1 + high:
        raise InputError(f"delta is {delta}: it bounds the ratio above the clip range, so give more than {1 + high}")


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def check_choice(name: str, value: str, literal: object) -> None:
    """Refuses a value that is not one of a Literal's.

    Raises:
        InputError: naming the option and its values.
    """
    if value not in get_args(literal):
        raise InputError(f"{name} is {value!r}: choose one of {', '.join(get_args(literal))}")


def _check_shapes(logps: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is not None and other.shape != logps.shape:
            raise InputError(f"{name} has shape {tuple(other.shape)} but logps {tuple(logps.shape)}: make them equal")


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


def best_rollouts(advantages: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k rollouts of each group with the largest advantages, the first of equals.

    Args:
        advantages: float [B, G].
        k: at most G.

    Returns:
        Positions int64 [B, k] and advantages float [B, k].
    """
    best = advantages.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return best, advantages.gather(1, best)


def item_loss(logps: Tensor, advantages: Tensor, epsilon: float, epsilon_high: float | None = None) -> Tensor:
    """Sum of the item losses of RecPO (R2ec, arXiv 2505.16994): rollouts that rank the catalogue learn their target.

    l = -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A), rho = p / stop_gradient(p), p being the softmax
    probability of the target among the items that it is compared with.

    Args:
        logps: float [R], log p of R rollouts, with gradient.
        advantages: A, R values of any shape.
        epsilon: lower clip width of the ratio.
        epsilon_high: upper clip width; None takes `epsilon`.
    """
    advantages = advantages.flatten().to(logps.device)
    ratio = (logps - logps.detach()).exp()
    clipped = ratio.clamp(1 - epsilon, 1 + (epsilon if epsilon_high is None else epsilon_high))
    return -torch.minimum(ratio * advantages, clipped * advantages).sum()


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
