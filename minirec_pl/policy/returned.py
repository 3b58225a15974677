"""What the methods of a policy return, checked: a wrong shape would be broadcast and trained on."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

from minirec_pl.policy.interface import Batch, Policy
from minirec_pl.utils.errors import InputError

T = TypeVar("T")
Size = int | None  # None for any


def returned(value: T, kind: type[T], policy: object, method: str, **shapes: tuple[Size, ...]) -> T:
    """Refuses what is of another kind, or has a tensor of another shape, than a method of `Policy` returns.

    Args:
        value: what the method returned.
        kind: what it should return.
        policy: whose method it is.
        method: its name.
        shapes: of the fields of `value`, or of itself under its own name.

    Returns:
        `value`.

    Raises:
        InputError: naming class, method and field.
    """
    name = f"{type(policy).__name__}.{method}"
    if not isinstance(value, kind):
        raise InputError(f"{name} returned a {type(value).__name__}: return a {kind.__name__}, see its docstring")
    for field, shape in shapes.items():
        tensor = value if isinstance(value, Tensor) else getattr(value, field)
        if not isinstance(tensor, Tensor):
            raise InputError(f"{name} returned a {type(tensor).__name__} as {field}: return a tensor {_words(shape)}")
        if len(shape) != tensor.ndim or any(size not in (None, n) for size, n in zip(shape, tensor.shape, strict=True)):
            raise InputError(f"{name} returned {field} of the shape {list(tensor.shape)}: return {_words(shape)}")
    return value


def item_logps(policy: Policy, batch: Batch) -> Tensor:
    """`Policy.item_logps`, checked.

    Raises:
        InputError: as `returned`, or if a log-probability is NaN.
    """
    assert policy.catalogue is not None
    scores = policy.item_logps(batch)
    returned(scores, Tensor, policy, "item_logps", scores=(len(batch["target"]), len(policy.catalogue)))
    if bool(scores.isnan().any()):
        raise InputError(f"{type(policy).__name__}.item_logps returned NaN: return the lowest value for an item seen")
    return scores


def _words(shape: tuple[Size, ...]) -> str:
    return f"[{', '.join('L' if size is None else str(size) for size in shape)}]" if shape else "a single number"
