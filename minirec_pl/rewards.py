"""Reward functions of recommendation, for the option `rewards`; how they are called: `minirec_pl.reward_calls`."""

from collections.abc import Sequence


def hit(completions: Sequence[str], target: Sequence[str]) -> list[float]:
    """1 where the recommended item is the target, else 0.

    Args:
        completions: [n] external item ids.
        target: [n] external item ids.

    Returns:
        [n] rewards.

    Example:
        >>> hit(["50", "7"], target=["50", "8"])
        [1.0, 0.0]
    """
    return [1.0 if completion == wanted else 0.0 for completion, wanted in zip(completions, target, strict=True)]
