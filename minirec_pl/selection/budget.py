"""How many samples a budget stands for."""

from __future__ import annotations

from minirec_pl.utils.errors import InputError


def check_budget(budget: int | float | None) -> None:
    """Refuses a budget that no pool can meet.

    Raises:
        InputError: if the budget is not positive, or above 1 and not a whole number.
    """
    if budget is None:
        return
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not budget > 0:
        raise InputError(
            f"budget is {budget!r}: give a fraction of the pool in (0, 1] such as 0.1, or a number of samples"
        )
    if budget > 1 and not float(budget).is_integer():
        raise InputError(
            f"budget is {budget}, a fraction above 1: give at most 1.0, or an integer for a number of samples"
        )


def budget_count(budget: int | float | None, n: int) -> int:
    """Returns the number of samples of a budget in a pool of n, at least 1; 20.0 means 20, 1.0 the whole pool.

    Raises:
        InputError: if a number of samples is above n.
    """
    if budget is None:
        return n
    if isinstance(budget, float) and budget <= 1.0:
        return max(1, int(budget * n))
    if budget > n:
        raise InputError(
            f"budget is {budget} samples but the pool has {n}: give at most {n}, or a fraction such as 0.1"
        )
    return int(budget)
