"""Drawn batches, drawn bounds of buckets, and the one law: a row's result does not depend on the rest of the batch.

A batch is a dictionary of tensors and lists with a row for each sample, and so is a result. The law compares a batch
with rows picked out of it, in any order and as often as drawn, with other padding and with other bounds: permuted
batches, rows alone, parts of a batch and duplicates are all such picks.
"""

import functools
import importlib
import os
import random
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from minirec_pl.utils.errors import InputError

EXAMPLES = int(os.environ.get("MINIREC_PROPERTY_EXAMPLES", "100"))
MOST_ROWS = 9
SHAPES = ("equal", "nearly", "wild", "shortest", "longest", "extremes", "mixed")
LIMITS = {
    "policy.language_models.causal_lm": {"_MAX_PADDING": (0.0, 0.6, 1.0, 0.2)},
    "policy.language_models.logps": {"_TILE_TOKENS": (5, 40, 1024), "_TILE_ENTRIES": (1_500, 2**20)},
    "policy.language_models.sampling": {"_LONG_ROW": (1, 4096), "_BLOCK": (2, 7, 256)},
    "policy.item_index": {"_TOKENS": (1, 20, 8192), "_SCORES": (1, 30, 2**24), "_VALUES": (1, 70, 2**24)},
    "policy.item_ids": {"_TOKENS": (1, 30, 4096)},
    "policy.generative": {"_LOGITS": (40, 120, 2**22), "_CACHE_BYTES": (2_000, 40_000, 2**28)},
    "trainers.recommender": {"_SCORES": (30, 60, 2**24)},
    "selection.probes.gradients": {"_OWN_VECTORS": (1, 60, 5 * 2**19), "_LOGITS": (1, 30, 2**24)},
    "policy.target_signals": {"_TOKENS": (12, 30, 1024), "_VALUES": (1, 2**26)},
    "selection.representativeness": {"_BLOCK": (1, 9, 2**18)},
    "selection.selectors.picks": {"_ROWS": (1, 4, 16_384)},
    "selection.signals": {"_ROWS": (1, 4, 65_536)},
    "selection.maxmin.unit_rows": {"_BLOCK": (1, 40, 2**22)},
    "selection.maxmin.lazy": {"_CANDIDATES": (1, 40, 2**20)},
}
_BOUNDS = [
    (importlib.import_module(f"minirec_pl.{module}"), name, values)
    for module, bounds in LIMITS.items()
    for name, values in bounds.items()
]


def drawn(test):
    """The test with drawn `data`, as many times as MINIREC_PROPERTY_EXAMPLES says."""
    kept = settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.differing_executors],
    )
    return pytest.mark.property(kept(given(data=st.data())(test)))


class Case:
    """One drawn example of `n` rows; the values, unlike what shapes them, come from a seed."""

    def __init__(self, data, n):
        self.data, self.n = data, n
        seed = data.draw(st.integers(0, 2**16))
        self.values, self.random = torch.Generator().manual_seed(seed), random.Random(seed)

    def pick(self, *options):
        return self.data.draw(st.sampled_from(options))

    def count(self, low, high):
        return self.data.draw(st.integers(low, high))

    def lengths(self, low, high, n=None):
        """Of n rows: equal, within 2 of each other, anything, all at a bound, some at each bound, or all of that."""
        shape, n = self.pick(*SHAPES), self.n if n is None else n
        start = self.random.randint(low, high)
        kinds = {
            "equal": lambda: start,
            "nearly": lambda: min(high, start + self.random.randint(0, 2)),
            "wild": lambda: self.random.randint(low, high),
            "shortest": lambda: low,
            "longest": lambda: high,
            "extremes": lambda: self.random.choice((low, high)),
        }
        kinds["mixed"] = lambda: kinds[self.random.choice(SHAPES[:-1])]()
        return [kinds[shape]() for _ in range(n)]

    def uniform(self, *size):
        return torch.rand(size, dtype=torch.float64, generator=self.values)

    def normal(self, *size):
        return torch.randn(size, dtype=torch.float64, generator=self.values)

    def integers(self, low, high, *size):
        return torch.randint(low, high, size, generator=self.values)

    def flags(self, *size, share=0.5):
        return self.uniform(*size) < share

    def permutation(self, n):
        return torch.randperm(n, generator=self.values)

    def padded(self, lengths, low, high, *, left, fill):
        """Rows of these lengths, values int64 in [low, high), and which places are real."""
        width = max(lengths, default=4)
        place = torch.arange(width).flip(0) if left else torch.arange(width)
        real = place[None] < torch.tensor(lengths, dtype=torch.int64).reshape(-1, 1)
        return self.integers(low, high, len(lengths), width).masked_fill(~real, fill), real


class Entry(NamedTuple):
    """A public entry on one drawn batch.

    Attributes:
        run: from a batch to results, names to tensors or lists with a row for each of the batch.
        batch: names to tensors or lists with a row each.
        pad: from a batch to the same one with more padding; None where it cannot be padded.
    """

    run: Any
    batch: dict
    pad: Any = None


@contextmanager
def limits(case):
    """Other bounds of buckets, tiles and portions inside."""
    before = [getattr(module, name) for module, name, _ in _BOUNDS]
    seed = case.data.draw(st.integers(0, 999))  # 0 for the usual ones
    chosen = random.Random(seed)
    for module, name, values in _BOUNDS:
        setattr(module, name, chosen.choice(values) if seed else values[-1])
    try:
        yield
    finally:
        for (module, name, _), value in zip(_BOUNDS, before, strict=True):
            setattr(module, name, value)


def rows(values, index):
    """The rows at these positions of a tensor or a list."""
    return (
        values[torch.tensor(index, dtype=torch.int64)]
        if isinstance(values, torch.Tensor)
        else [values[i] for i in index]
    )


def take(batch, index):
    return {name: rows(values, index) for name, values in batch.items()}


def selections(n):
    """Positions: all in another order, one alone, a part, or some several times."""
    place = st.integers(0, n - 1)
    return st.one_of(
        st.permutations(range(n)),
        st.lists(place, min_size=1, max_size=1),
        st.lists(place, min_size=1, max_size=n, unique=True),
        st.lists(place, min_size=1, max_size=n + 3),
    )


def close(found, expected, message=""):
    """Equal: floats to 1e-9 in float64, 2e-5 in float32, the rest exactly."""
    if isinstance(expected, torch.Tensor) and expected.is_floating_point():
        assert found.dtype == expected.dtype
        tolerance = 1e-9 if expected.dtype == torch.float64 else 2e-5
        torch.testing.assert_close(
            found, expected, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda text: f"{message}: {text}"
        )
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), message
    else:
        assert found == expected, message


def same_rows(found, whole, index):
    assert found.keys() == whole.keys()
    for name in whole:
        close(found[name], rows(whole[name], index), name)


def check(case, entry):
    """The law of this module for one entry."""
    with limits(case):
        whole = entry.run(entry.batch)
    index = case.data.draw(selections(case.n))
    part = take(entry.batch, index)
    if entry.pad is not None:
        part = entry.pad(part)
    with limits(case):
        found = entry.run(part)
    same_rows(found, whole, list(index))


def check_empty(case, entry):
    """An empty batch gives empty results or is refused in a sentence."""
    with suppress(InputError), limits(case):
        results = entry.run(entry.batch)
        assert all(len(values) == 0 for values in results.values())


def laws(entries):
    """Two tests of named builders of entries, `builder(case) -> Entry`: the law, and empty batches."""

    @pytest.mark.parametrize("name", entries)
    @drawn
    def law(name, data):
        case = Case(data, data.draw(st.integers(1, MOST_ROWS)))
        check(case, entries[name](case))

    @pytest.mark.parametrize("name", entries)
    @settings(max_examples=5, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    @given(data=st.data())
    def emptiness(name, data):
        case = Case(data, 0)
        check_empty(case, entries[name](case))

    return law, emptiness


def pad_columns(case, batch, left=(), right=(), anywhere=()):
    """More columns of padding: on the left or right of tensors [B, W], or one at the same place of several.

    Args:
        case: of which the numbers of columns are drawn.
        batch: to be padded.
        left: pairs of a name and what fills.
        right: the same.
        anywhere: the same, of tensors of one width.
    """
    made = dict(batch)
    for names, sides in ((left, (1, 0)), (right, (0, 1))):
        for more in [case.count(0, 3)] if names else ():
            for name, fill in names:
                made[name] = torch.nn.functional.pad(made[name], (sides[0] * more, sides[1] * more), value=fill)
    if anywhere and case.pick(False, True):
        place = case.count(0, batch[anywhere[0][0]].shape[1])
        for name, fill in anywhere:
            values = made[name]
            column = (
                torch.full_like(values[:, :1], fill) if values.shape[1] else values.new_full((len(values), 1), fill)
            )
            made[name] = torch.cat([values[:, :place], column, values[:, place:]], dim=1)
    return made


def widened(values, width, fill=0):
    """Results [.., L] padded on the right to a width, so that batches of unequal longest rows compare."""
    return torch.nn.functional.pad(values, (0, width - values.shape[-1]), value=fill)


@functools.cache
def root():
    """A folder for models that last as long as the tests."""
    import atexit
    import shutil
    import tempfile
    from pathlib import Path

    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, True)
    return Path(folder)


def in_float64(model):
    """The model in float64 throughout: norms that transformers computes in float32 are torch's own here."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm") and not isinstance(child, torch.nn.RMSNorm):
                norm = torch.nn.RMSNorm(len(child.weight), eps=1e-5)
                with torch.no_grad():
                    norm.weight.copy_(child.weight)
                setattr(module, name, norm)
    return model.double()
