"""The random numbers of a run: torch's (every device), NumPy's and Python's."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from typing import Any, cast

from minirec_pl.utils.errors import InputError

LARGEST_SEED = 2**32 - 1  # that NumPy's and scikit-learn's global generators take


def check_seed(seed: int, name: str = "seed") -> int:
    """Refuses a seed that one of the generators would not take.

    Args:
        seed: of any of them.
        name: of the option.

    Returns:
        The seed.

    Raises:
        InputError: naming the option.
    """
    if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed <= LARGEST_SEED:
        raise InputError(f"{name} is {seed!r}: give a whole number from 0 to {LARGEST_SEED}")
    return seed


def random_state() -> dict[str, Any]:
    """Reads where all global generators stand, in tensors and primitives, as a checkpoint may hold them."""
    import numpy as np
    import torch

    name, keys, position, has_gauss, gauss = cast(tuple[Any, ...], np.random.get_state())
    version, words, spare = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss],
        "python": [version, list(words), spare],
    }


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Puts all global generators where `random_state` found them; those of CUDA if there are as many devices."""
    import numpy as np
    import torch

    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, words, spare = state["python"]
    random.setstate((version, tuple(words), spare))


@contextmanager
def isolated_random_state() -> Iterator[None]:
    """Puts all global generators back at the end, also after an exception (Lightning's `isolate_rng` does not)."""
    state = random_state()
    try:
        yield
    finally:
        restore_random_state(state)
