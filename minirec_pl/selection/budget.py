"""How many samples a budget means."""

from __future__ import annotations

from minirec_pl.utils.errors import InputError


def check_budget(budget: int | float | None) -> None:
    """Refuses budgets that no pool can meet.

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
        raise InputError(f"budget is {budget}: a fraction is at most 1.0; for a number of samples write an integer")


def budget_count(budget: int | float | None, n: int) -> int:
    """Number of samples that a budget means in a pool of n, at least 1; 20.0 is as good as 20, but 1.0 is the pool.

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
