"""The GRPO objective without rollouts: its expectation, where the probability of the target is known exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from minirec_pl.policy.interface import Batch, Policy
from minirec_pl.rewards.hit_or_miss import HitValues
from minirec_pl.selection.expected_update import GroupMoments, group_moments
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.modules import no_loss


class ExpectedLoss(NamedTuple):
    """The expected loss of samples.

    Attributes:
        losses: float [B], with gradient.
        underflow: how many samples have a weight too small for the loss's dtype, which counts as 0.
    """

    losses: Tensor
    underflow: Tensor


def expected_loss(logp: Tensor, weight: Tensor | None) -> ExpectedLoss:
    """Makes losses -w_G(p) p log p, w_G(p) p being detached: their gradient is the expectation of that of a group.

    Args:
        logp: float [B], log-probability of the target in nats, with gradient.
        weight: w_G(p) float64 [B], see `group_moments`; None for 1 / p, which makes it maximum likelihood.
    """
    if weight is None:
        return ExpectedLoss(-logp, torch.zeros((), dtype=torch.int64, device=logp.device))
    factor = weight * logp.detach().double().exp()
    small = factor.abs() < torch.finfo(logp.dtype).tiny
    factor = factor.masked_fill(small, 0.0).to(logp.dtype)
    return ExpectedLoss(-factor * logp, (small & (weight != 0)).sum())


def exact_kl(logps: Tensor, ref_logps: Tensor, *, use_bias_correction_kl: bool = True) -> tuple[Tensor, Tensor]:
    """The KL term of distributions that are known whole: a loss and KL(policy || reference).

    The gradient of the loss is the expectation of that of the sampled term. With the correction that is the gradient of
    KL(policy || reference); without it, that of KL(reference || policy).

    Args:
        logps: float [B, V], log-probabilities in nats, with gradient; the lowest finite value or -inf where impossible.
        ref_logps: float [B, V], of the reference.
        use_bias_correction_kl: see `policy_loss`.

    Returns:
        Two float [B]: the loss with gradient, and KL(policy || reference) without.
    """
    possible = logps.detach() > torch.finfo(logps.dtype).min / 2
    difference = (logps - ref_logps.detach()).masked_fill(~possible, 0.0)
    divergence = (logps.exp().masked_fill(~possible, 0.0) * difference).sum(dim=-1)
    if use_bias_correction_kl:
        return divergence, divergence.detach()
    reverse = -(ref_logps.detach().exp().masked_fill(~possible, 0.0) * difference).sum(dim=-1)
    return reverse, divergence.detach()


class ExpectedUpdate(NamedTuple):
    """The loss of a micro-batch, with gradient, and what is logged of it.

    Attributes:
        loss: what to minimise; over the micro-batches of an optimizer step it adds up to the objective of the whole.
        solve_probability: float [B], of the targets, without gradient.
        figures: what is logged, by TRL's names where it has one.
        tokens: run forward and backward.
    """

    loss: Tensor
    solve_probability: Tensor
    figures: dict[str, Tensor]
    tokens: int


@dataclass(frozen=True)
class Expectation:
    """The options of the expected objective, named and explained in `GRPORecModule`.

    Attributes:
        likelihood: weigh with 1 / p instead of w_G(p), which is supervised training.
        values: sum of the rewards of a hit, and of a miss.

    Raises:
        InputError: if the expectation of one is not known.
    """

    num_generations: int
    scale_rewards: str
    baseline: str
    values: HitValues
    beta: float
    use_bias_correction_kl: bool
    likelihood: bool

    def __post_init__(self) -> None:
        self._moments(torch.zeros(1))

    def _moments(self, logp: Tensor) -> GroupMoments:
        return group_moments(
            logp,
            self.num_generations,
            scale_rewards=self.scale_rewards,
            baseline=self.baseline,
            hit=self.values.hit,
            miss=self.values.miss,
        )

    def update(
        self, policy: Policy, reference: Callable[[Batch], Tensor], batch: Batch, groups: Tensor, temperature: float
    ) -> ExpectedUpdate:
        """One pass over the prompts and their targets, which is all that there is to run.

        Args:
            policy: in the mode in which it is trained.
            reference: gives the log-probabilities [B, V] of the reference, where `beta` is above 0.
            batch: prompts that have a weight.
            groups: how many prompts the optimizer step has, divided by whatever the trainer divides by.
            temperature: divides the logits.

        Raises:
            InputError: if a target cannot be generated.
        """
        if not len(batch["target"]):
            return ExpectedUpdate(no_loss(policy), torch.zeros(0), {}, 0)
        passed = policy.target_pass(batch, temperature)
        logp = passed.logp
        impossible = logp.detach() <= torch.finfo(logp.dtype).min / 2
        if bool(impossible.any()):
            row = int(impossible.nonzero()[0])
            raise InputError(
                f"the target of sample_id {int(batch['sample_id'][row])} cannot be recommended, since the user has "
                "seen it: leave such samples out of the pool"
            )
        moments = self._moments(logp)
        found = expected_loss(logp, None if self.likelihood else moments.weight)
        loss = found.losses.sum() / (passed.length * groups)
        figures = {
            "reward": self.values.miss + (self.values.hit - self.values.miss) * logp.detach().exp().mean(),
            "reward_std": moments.deviation.mean(),
            "frac_reward_zero_std": moments.flat.mean(),
            "expected/underflow": found.underflow,
        }
        if passed.distribution is not None:
            every = passed.distribution.detach()
            figures["entropy"] = -(every.exp() * every).sum(dim=-1).mean()
            if self.beta > 0:
                term, divergence = exact_kl(
                    passed.distribution, reference(batch), use_bias_correction_kl=self.use_bias_correction_kl
                )
                loss = loss + self.beta * term.sum() / groups
                figures["kl"] = divergence.mean()
        figures = {name: value.detach().float() for name, value in figures.items()}
        figures["train/loss"] = loss.detach()
        return ExpectedUpdate(loss, logp.detach().exp(), figures, passed.tokens)
