"""What options and batches of GRPO do not go together, each refused in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from minirec_pl.data.loader import GenerationSchedule
from minirec_pl.grpo.objective import Objective
from minirec_pl.policy.interface import Policy, RolloutOptions
from minirec_pl.selection.group_sizes import AdaptiveGenerations
from minirec_pl.utils.errors import InputError, check_whole


def check_schedule(num_iterations: int, steps_per_generation: int | None, accumulate: int = 1) -> None:
    """Refuses a schedule of rollouts in which an optimizer step is not known before its first backward pass.

    Args:
        num_iterations: times each rollout is trained on.
        steps_per_generation: training batches that rollouts are made for at once, or None.
        accumulate: the Trainer's `accumulate_grad_batches`.

    Raises:
        InputError: naming the option.
    """
    check_whole(num_iterations=num_iterations, steps_per_generation=steps_per_generation)
    if num_iterations < 1:
        raise InputError(f"num_iterations is {num_iterations}: each rollout is trained on at least once")
    if steps_per_generation is None:
        return
    if steps_per_generation < 1:
        raise InputError(f"steps_per_generation is {steps_per_generation}: give at least 1 training batch, or null")
    if steps_per_generation % accumulate:
        raise InputError(
            f"steps_per_generation is {steps_per_generation} and trainer.accumulate_grad_batches {accumulate}: "
            "rollouts are made for whole optimizer steps, so give a multiple, or null"
        )


def check_adaptive(
    adaptive: AdaptiveGenerations, num_generations: int, rollouts: str, distinct_rollouts: bool, scale_rewards: str
) -> None:
    """Refuses options with which groups of unequal size make no sense.

    Raises:
        InputError: naming the option.
    """
    if not isinstance(adaptive, AdaptiveGenerations):
        raise InputError(
            f"adaptive_generations is {adaptive!r}: give minirec_pl.grpo.AdaptiveGenerations(q=0.8, max=64), or in "
            "YAML the keys q and max"
        )
    if rollouts != "sample" or distinct_rollouts:
        given = "distinct_rollouts is true" if distinct_rollouts else f"rollouts is {rollouts!r}"
        raise InputError(
            f"{given}, and adaptive_generations is for groups that are sampled with replacement: set rollouts to "
            "sample and distinct_rollouts to false, or leave out adaptive_generations"
        )
    if scale_rewards == "batch":
        raise InputError(
            "scale_rewards is 'batch', a deviation to which large groups would contribute more than small ones under "
            "adaptive_generations: set scale_rewards to group, mean or none"
        )
    if adaptive.max < num_generations:
        raise InputError(
            f"adaptive_generations.max is {adaptive.max} and num_generations {num_generations}, which samples get of "
            "which nothing is known: raise the former or lower the latter"
        )


def check_without_rollouts(
    rollouts: str, num_iterations: int, steps_per_generation: int | None, wasted_groups: str
) -> None:
    """Refuses options that are about rollouts where none are drawn.

    Raises:
        InputError: naming the option.
    """
    for name, value, usual in (
        ("num_iterations", num_iterations, 1),
        ("steps_per_generation", steps_per_generation or 1, 1),
        ("wasted_groups", wasted_groups, "keep"),
    ):
        if value != usual:
            kept = "null" if name == "steps_per_generation" else usual
            raise InputError(
                f"{name} is {value} and rollouts='{rollouts}' draws none, so that every step is on policy and no group "
                f"is wasted: set {name} to {kept}, or rollouts to sample"
            )


def check_ids(rollouts: str, policy: Policy, options: RolloutOptions, objective: Objective) -> None:
    """Refuses item ids for which the expectation of the objective is not known.

    Raises:
        InputError: naming the option.
    """
    several = policy.rollout_length(options) > 1
    if several and objective.beta > 0:
        raise InputError(beta_without_rollouts(objective.beta, rollouts))
    if rollouts == "expected" and not policy.equal_lengths and objective.loss_type != "dr_grpo":
        raise InputError(
            f"the item ids have unequal lengths, for which loss_type='{objective.loss_type}' has another expectation: "
            "set loss_type to dr_grpo, or rollouts to sample"
        )


def beta_without_rollouts(beta: float, rollouts: str) -> str:
    """Says why `beta` does not go with ids of several tokens."""
    return (
        f"beta is {beta} and rollouts='{rollouts}' knows the KL divergence of ids of one token only: set beta to 0, or "
        "rollouts to sample"
    )


def check_single(schedule: GenerationSchedule) -> None:
    """Refuses a loader that serves single batches where rollouts are made for several.

    Raises:
        InputError: if the schedule is for more than single batches.
    """
    if schedule.steps * schedule.iterations > 1:
        raise InputError(
            "the training loader serves single batches, but accumulate_grad_batches, steps_per_generation or "
            "num_iterations is above 1: train with RecDataModule, or on a ResumableLoader with steps and iterations"
        )


def check_selectors(callbacks: Sequence[Any]) -> None:
    """Refuses `distinct_rollouts` or beams beside a selector in mode `official`, which goes by the mean reward.

    Args:
        callbacks: of the Trainer.

    Raises:
        InputError: if there is such a selector.
    """
    for callback in callbacks:
        for part in (callback, *getattr(callback, "parts", ())):
            if getattr(getattr(part, "selector", None), "mode", None) == "official":
                raise InputError(
                    "distinct_rollouts changes what a mean reward means, as do beams, and a selector in mode official "
                    "goes by it: set distinct_rollouts to false and rollouts to sample, or the selector's mode to paper"
                )
