"""Checks of the options of GRPORecModule that no part of it checks for itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from minirec_pl.data.loader import GenerationSchedule
from minirec_pl.policy import RetrievalPolicy
from minirec_pl.rewards.calls import reward_name
from minirec_pl.rewards.functions import hit, rank_penalty
from minirec_pl.utils.errors import InputError

ROLLOUTS = ("sample", "beam")
WASTED_GROUPS = ("keep", "dynamic_sampling", "preference_pairs")


def check_sampling(
    num_generations: int, scoring_generations: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    """Refuses options of sampling that are out of range.

    Raises:
        InputError: naming the option.
    """
    if num_generations < 2:
        raise InputError(
            f"num_generations is {num_generations}: GRPO compares the rollouts of one prompt, so it must be at least 2"
        )
    if scoring_generations == 1 or scoring_generations < 0:
        raise InputError(
            f"scoring_generations is {scoring_generations}: give 0 (exact probabilities only) or at least 2"
        )
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature is {temperature}: it divides the logits, so it must be above 0")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k is {top_k}: give at least 1, or null for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}: it is a probability above 0 and at most 1, or null for all tokens")


def check_schedule(num_iterations: int, steps_per_generation: int | None, accumulate: int = 1) -> None:
    """Refuses a schedule of rollouts in which an optimizer step is not known before its first backward pass.

    Args:
        num_iterations: times each rollout is trained on.
        steps_per_generation: training batches that rollouts are made for at once, or None.
        accumulate: the Trainer's `accumulate_grad_batches`.

    Raises:
        InputError: naming the option.
    """
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


def check_wasted_groups(
    wasted_groups: str, oversample: float, distinct_rollouts: bool, top_k: int | None, top_p: float | None
) -> None:
    """Refuses unknown treatments of wasted groups, and sampling without replacement where it is not exact.

    Raises:
        InputError: naming the option.
    """
    if wasted_groups not in WASTED_GROUPS:
        raise InputError(f"wasted_groups is {wasted_groups!r}: choose one of {', '.join(WASTED_GROUPS)}")
    if not 1 <= oversample < math.inf:
        raise InputError(f"oversample is {oversample}: it is a multiple of data.batch_size, at least 1")
    if distinct_rollouts and (top_k is not None or (top_p or 1.0) < 1.0):
        raise InputError("distinct_rollouts draws from the whole distribution: set top_k and top_p to null")


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


def check_kind(module: Any) -> None:
    """Refuses options of GRPORecModule that make no sense with its kind of policy.

    Args:
        module: with all its options.

    Raises:
        InputError: naming the option.
    """
    if module.reward_weights is not None and len(module.reward_weights) != len(module.rewards):
        raise InputError(
            f"reward_weights has {len(module.reward_weights)} numbers for {len(module.rewards)} rewards: give one each"
        )
    if module.rollouts not in ROLLOUTS:
        raise InputError(f"rollouts is {module.rollouts!r}: choose one of {', '.join(ROLLOUTS)}")
    if isinstance(module.policy, RetrievalPolicy):
        _check_ranking(module)
    else:
        _check_items(module)


def _check_ranking(module: Any) -> None:
    refused = {
        "rollouts": module.rollouts != "sample",
        "distinct_rollouts": module.distinct_rollouts,
        "wasted_groups": module.wasted_groups == "preference_pairs",
    }
    for name in [name for name, wrong in refused.items() if wrong]:
        raise InputError(
            f"{name} is for policies that generate an item, and a RetrievalPolicy generates texts: leave it out"
        )
    for reward in module.rewards:
        if reward in (hit, rank_penalty):
            raise InputError(
                f"the reward {reward_name(reward)} compares completions with the target, and those of a "
                "RetrievalPolicy are texts: take minirec_pl.rewards.SoftmaxMixReward or NDCGReward, which go by the "
                "target's rank"
            )
    if module.scoring_generations == 0:
        raise InputError("scoring_generations is 0: a RetrievalPolicy is scored by its rollouts, so give at least 2")
    if not 1 <= module.relabel_topk <= module.num_generations:
        raise InputError(
            f"relabel_topk is {module.relabel_topk}: give 1 to num_generations ({module.num_generations}) rollouts"
        )
    length = module.max_completion_length
    if (module.policy.max_completion_length if length is None else length) < 1:
        raise InputError(
            "max_completion_length is 0: rollouts without a text are all the same, so give at least 1 token to train on"
        )


def _check_items(module: Any) -> None:
    texts = {
        "max_completion_length": module.max_completion_length is not None,
        "mask_truncated_completions": module.mask_truncated_completions,
        "negatives_across_ranks": module.negatives_across_ranks,
        "relabel_topk": module.relabel_topk != 1,
    }
    for name in [name for name, wrong in texts.items() if wrong]:
        raise InputError(
            f"{name} is for policies that reason in text, and a GenerativePolicy generates the ids of items: leave it "
            "out"
        )
    narrowed = module.top_k is not None or (module.top_p or 1.0) < 1.0
    if module.rollouts == "beam" and (module.distinct_rollouts or narrowed):
        raise InputError(
            "rollouts='beam' takes the most likely items, all different: set distinct_rollouts to false, top_k and "
            "top_p to null"
        )
