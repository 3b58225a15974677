"""Group Relative Policy Optimization as pure tensor functions.

Names, defaults and normalisations are those of TRL's GRPOTrainer. B prompts, G rollouts each, L completion tokens.
Papers: GRPO (arXiv 2402.03300), Dr. GRPO (arXiv 2503.20783), DAPO (arXiv 2503.14476), BNPO (arXiv 2506.02864).
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from minirec_pl.errors import InputError

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo"]
ScaleRewards = Literal["group", "batch", "none"]

# exp(20) is far outside every clip range; without a bound, exp overflows and 0 * inf makes the loss NaN.
_MAX_LOG_RATIO = 20.0


class PolicyLoss(NamedTuple):
    """What `policy_loss` returns: scalars, all but `loss` detached.

    Attributes:
        loss: The objective to minimise.
        clip_low: Share of the active tokens with A < 0 and a ratio below 1 - epsilon.
        clip_high: Share of the active tokens with A > 0 and a ratio above 1 + epsilon_high.
        kl: Mean k3 estimate of KL(policy || reference) per active token, or None without a reference.
    """

    loss: Tensor
    clip_low: Tensor
    clip_high: Tensor
    kl: Tensor | None


def group_advantages(rewards: Tensor, *, scale_rewards: ScaleRewards = "group", eps: float = 1e-4) -> Tensor:
    """Advantages relative to the group: A_bg = (r_bg - mean_g r_bg) / (s_b + eps).

    s_b is the sample standard deviation (divisor n - 1) of the group for `group` (GRPO) and of all B * G rewards for
    `batch`; `none` divides by 1 (Dr. GRPO). A group whose rewards are all equal gets exactly 0.

    Args:
        rewards: [B, G] finite; integers are taken as float32.
        scale_rewards: What divides the centred rewards. `batch` sees only the rewards given: gather them under DDP.
        eps: Added to the standard deviation.

    Returns:
        [B, G], float32 or the wider dtype of `rewards`.

    Raises:
        InputError: If the shape is not [B, G >= 2], a reward is not finite or `scale_rewards` is unknown.

    Example:
        >>> group_advantages(torch.tensor([[1.0, 0.0], [0.1, 0.1]]), scale_rewards="none")
        tensor([[ 0.5000, -0.5000],
                [ 0.0000,  0.0000]])
    """
    _check_choice("scale_rewards", scale_rewards, ScaleRewards)
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise InputError(
            f"rewards have shape {tuple(rewards.shape)}; give [B, G] with num_generations (G) of at least 2."
        )
    if not bool(rewards.isfinite().all()):
        rows = (~rewards.isfinite()).any(dim=1).nonzero().flatten().tolist()
        raise InputError(f"rewards of groups {rows[:5]} are NaN or infinite; mend the reward function.")
    rewards = rewards.to(_at_least_float32(rewards.dtype))
    constant = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    centred = (rewards - rewards.mean(dim=1, keepdim=True)).masked_fill(constant, 0.0)
    if scale_rewards == "none":
        return centred
    std = rewards.std(dim=1, keepdim=True) if scale_rewards == "group" else rewards.std()
    return centred / (std + eps)


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


def eos_mask(tokens: Tensor, eos_token_ids: int | Sequence[int]) -> Tensor:
    """True up to and including the first end-of-sequence token, so that padding that shares its id is told apart.

    Args:
        tokens: [..., L] int64 sampled token ids, without the prompt.
        eos_token_ids: Every id that ends a completion (`generation_config.eos_token_id`); none keeps all tokens.

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
    return ended_before == 0


def policy_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    beta: float = 0.0,
    ref_logps: Tensor | None = None,
    loss_type: LossType = "dapo",
    max_completion_length: int | None = None,
    num_items: int | float | Tensor | None = None,
) -> PolicyLoss:
    """Clipped GRPO objective over the active tokens.

    With rho = exp(logps - old_logps), the loss of a token is

        l = -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) + beta k3(logps, ref_logps)

    and `loss_type` says how tokens are averaged:

    * `grpo`: mean over the B * G completions of the mean over their active tokens (arXiv 2402.03300). A completion
      without active tokens counts as 0.
    * `bnpo`: sum / active tokens of this call. Local: micro-batches of unequal length do not add up to the whole batch.
    * `dr_grpo`: sum / (B * G * max_completion_length) (arXiv 2503.20783).
    * `dapo`: sum / num_items (arXiv 2503.14476), the active tokens of the whole optimizer step.

    grpo, bnpo and dr_grpo are averages: over n micro-batches (or ranks) with as many completions each, divide by n, as
    Lightning's accumulation and DDP do. dapo with `num_items` adds up to the whole batch by itself: give the total
    divided by whatever the trainer divides by (accumulated micro-batches, ranks). What stands at masked positions, NaN
    included, touches neither the value nor the gradient.

    Args:
        logps: [B, G, L] (or [..., L]) log-probabilities of the sampled tokens under the policy, in nats, with gradient.
        old_logps: Same shape, under the policy that sampled. On-policy: `logps.detach()`.
        advantages: [B, G] (or [...]) per completion.
        mask: Same shape as `logps`, true where a token counts, see `eos_mask`.
        epsilon: Lower clip width, at least 0.
        epsilon_high: Upper clip width, `epsilon` if None (DAPO's clip-higher: 0.28).
        beta: Weight of the KL term; 0 leaves it out of the loss (it is still reported if `ref_logps` is given).
        ref_logps: Same shape as `logps`, under the reference policy. Needed if beta is not 0.
        loss_type: How tokens are averaged.
        max_completion_length: Tokens; needed for `dr_grpo`.
        num_items: Active tokens of the whole optimizer step for `dapo`; those of this call if None.

    Returns:
        A `PolicyLoss`; the loss is 0 with zero gradient if no token is active.

    Raises:
        InputError: If shapes differ, an option is out of range or unknown, or a needed one is missing.
    """
    _check_choice("loss_type", loss_type, LossType)
    high = epsilon if epsilon_high is None else epsilon_high
    for name, value in (("epsilon", epsilon), ("epsilon_high", high), ("beta", beta)):
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"{name} is {value}; it must be a number of at least 0.")
    if beta > 0 and ref_logps is None:
        raise InputError(f"beta is {beta} but there is no reference policy; give ref_logps or set beta to 0.")
    _check_shapes(logps, old_logps=old_logps, mask=mask, ref_logps=ref_logps)
    if advantages.shape != logps.shape[:-1]:
        raise InputError(
            f"advantages have shape {tuple(advantages.shape)} but logps {tuple(logps.shape)}; give one per completion."
        )

    active = mask.bool()
    dtype = _at_least_float32(logps.dtype)
    policy = logps.to(dtype).masked_fill(~active, 0.0)
    log_ratio = policy - old_logps.detach().to(dtype).masked_fill(~active, 0.0)
    ratio = log_ratio.clamp(max=_MAX_LOG_RATIO).exp()
    advantage = advantages.detach().to(dtype).unsqueeze(-1)
    token_loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - epsilon, 1 + high) * advantage)

    n_active = active.sum().clamp(min=1)
    kl: Tensor | None = None
    if ref_logps is not None:
        token_kl = kl_k3(policy, ref_logps.detach().to(dtype).masked_fill(~active, 0.0))
        kl = token_kl.detach().sum() / n_active
        if beta > 0:
            token_loss = token_loss + beta * token_kl
    token_loss = token_loss.masked_fill(~active, 0.0)

    if loss_type == "grpo":
        loss = (token_loss.sum(dim=-1) / active.sum(dim=-1).clamp(min=1)).mean()
    elif loss_type == "dr_grpo":
        if max_completion_length is None or max_completion_length < 1:
            raise InputError("loss_type dr_grpo divides by max_completion_length; set it to at least 1.")
        loss = token_loss.sum() / (advantages.numel() * max_completion_length)
    elif loss_type == "bnpo" or num_items is None:
        loss = token_loss.sum() / n_active
    else:
        total = torch.as_tensor(num_items, dtype=dtype, device=logps.device)
        loss = token_loss.sum() / total.masked_fill(total == 0, 1)

    low_clipped = active & (ratio.detach() < 1 - epsilon) & (advantage < 0)
    high_clipped = active & (ratio.detach() > 1 + high) & (advantage > 0)
    return PolicyLoss(loss, low_clipped.sum() / n_active, high_clipped.sum() / n_active, kl)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check_choice(name: str, value: str, literal: object) -> None:
    if value not in get_args(literal):
        raise InputError(f"{name} is {value!r}; choose one of {', '.join(get_args(literal))}.")


def _check_shapes(logps: Tensor, **others: Tensor | None) -> None:
    for name, other in others.items():
        if other is not None and other.shape != logps.shape:
            raise InputError(f"{name} has shape {tuple(other.shape)} but logps {tuple(logps.shape)}; make them equal.")
