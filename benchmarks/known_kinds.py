"""A pool whose samples have known kinds, and the oracle that knows their rules.

A history is five filler items and a key, the last item, which alone decides the target:

solved     a key of its own and one target: the warm start teaches that target.
useful     a key of its own and one target out of the key's 16 candidates: the warm start has seen the candidates
           equally often, so it knows the candidates and not which of them it is (half taught).
redundant  as useful, but near copies of few patterns: the fillers are the same up to one.
hopeless   the key is a filler and the target is drawn from the whole catalogue: no history tells it.
coin       as useful, but the target is drawn anew from the candidates each time: noise that looks half taught.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from minirec_pl.data.samples import Catalogue, IntArray
from minirec_pl.data.sequence_table import SequenceTable
from minirec_pl.data.sources import Samples

KINDS = ("useful", "solved", "redundant", "hopeless", "coin")
RULES = ("solved", "useful")


@dataclass(frozen=True)
class KnownKinds:
    """A source of `RecDataModule` with parts of known kinds; equal seeds give equal rules, warm and held-out parts.

    Args:
        seed: Of the rules and of all draws.
        pool: Samples of the pool by kind.
        n_items: Size of the catalogue.
        n_keys: Keys of solved, useful and coin, each.
        n_patterns: Patterns of redundant, each with a key of its own.
        n_candidates: Candidates of a key.
        warm_repeats: How often the warm part shows each candidate of a key; 0 for no warm part.
        held_out: Samples of each solved and useful key in validation, and again in test.

    Attributes:
        kinds: Kind of each sample by sample_id, [N] of str.
        truth: Target of each sample by its rule, -1 where the target is drawn, [N] int64.
    """

    seed: int
    pool: Mapping[str, int]
    n_items: int = 1_682
    n_keys: int = 24
    n_patterns: int = 4
    n_candidates: int = 16
    warm_repeats: int = 24
    held_out: int = 4

    def read(self) -> Samples:
        """Draws the samples, once: warm part, pool, validation and test, in this order."""
        return self._drawn[0]

    @property
    def kinds(self) -> npt.NDArray[np.str_]:
        return self._drawn[1]

    @property
    def truth(self) -> IntArray:
        return self._drawn[2]

    @cached_property
    def _drawn(self) -> tuple[Samples, npt.NDArray[np.str_], IntArray]:
        rules = Rules(self)
        shown = self.n_candidates * self.warm_repeats
        warm = {kind: rules.n_keys(kind) * shown for kind in ("solved", "useful", "redundant", "coin")}
        held_out = dict.fromkeys(RULES, self.n_keys * self.held_out)
        parts = (
            ("train", warm | {"hopeless": self.n_keys * shown // 2}, True),
            ("train", self.pool, False),
            ("validation", held_out, False),
            ("test", held_out, False),
        )
        rows = []
        for place, (part, counts, taught) in enumerate(parts):
            # The pool has a stream of its own, so that the other parts are the same whatever it holds.
            rng = np.random.default_rng([self.seed, place])
            drawn = [
                (part, kind, *rules.sample(kind, number, rng, taught))
                for kind in KINDS
                for number in range(counts.get(kind, 0))
            ]
            rows += [drawn[row] for row in rng.permutation(len(drawn))]
        part_of, kinds, histories, items, truth = (list(column) for column in zip(*rows, strict=True))
        users = [f"u{row}" for row in range(len(rows))]
        table = SequenceTable(users, items, histories, self.n_items, parts=part_of)
        catalogue = Catalogue([f"i{item}" for item in range(self.n_items)])
        return Samples(table, catalogue, "known kinds", Counter()), np.array(kinds), np.array(truth)

    def with_pool(self, pool: Mapping[str, int]) -> KnownKinds:
        """The same rules and held-out parts with another pool and without a warm part."""
        return replace(self, pool=dict(pool), warm_repeats=0)

    @property
    def warm_fraction(self) -> float:
        """Share of the train part that is the warm part."""
        shown = self.n_candidates * self.warm_repeats
        n_warm = (3 * self.n_keys + self.n_patterns) * shown + self.n_keys * shown // 2
        return n_warm / (n_warm + sum(self.pool.values()))


class Rules:
    """Which key leads where; the items of all of them differ."""

    def __init__(self, source: KnownKinds) -> None:
        self.source = source
        items = iter(np.random.default_rng([source.seed, 99]).permutation(source.n_items).tolist())
        keyed = ("solved", "useful", "redundant", "coin")
        self.keys = {kind: [next(items) for _ in range(self.n_keys(kind))] for kind in keyed}
        width = {kind: 1 if kind == "solved" else source.n_candidates for kind in keyed}
        self.candidates = {kind: [[next(items) for _ in range(width[kind])] for _ in self.keys[kind]] for kind in keyed}
        self.fillers = np.array(list(items))
        rng = np.random.default_rng([source.seed, 98])
        self.patterns = [rng.choice(self.fillers, 5, replace=False) for _ in range(source.n_patterns)]

    def n_keys(self, kind: str) -> int:
        return self.source.n_patterns if kind == "redundant" else self.source.n_keys

    def sample(self, kind: str, number: int, rng: np.random.Generator, taught: bool) -> tuple[list[int], int, int]:
        """History, target and the target by the rule (-1 for none) of the number-th sample of a kind.

        Args:
            kind: One of `KINDS`.
            number: Takes the keys in turn and, where `taught`, each key's candidates in turn.
            rng: Of the fillers and of targets that are drawn.
            taught: As the warm part shows it.
        """
        fillers = rng.choice(self.fillers, 6, replace=False)
        if kind == "hopeless":
            return fillers.tolist(), other_than(fillers, lambda: int(rng.integers(self.source.n_items))), -1
        key = number % self.n_keys(kind)
        if kind == "redundant":
            fillers[:5] = self.patterns[key]
            fillers[rng.integers(5)] = other_than(fillers, lambda: int(rng.choice(self.fillers)))
        candidates = self.candidates[kind][key]
        truth = -1 if kind == "coin" else candidates[0]
        target = truth
        if taught:
            target = candidates[number // self.n_keys(kind) % len(candidates)]
        elif kind == "coin":
            target = int(rng.choice(candidates))
        return [*fillers[:5].tolist(), self.keys[kind][key]], target, truth


def other_than(items: IntArray, draw: Callable[[], int]) -> int:
    """What is drawn first that is not one of the items."""
    while (item := draw()) in items:
        pass
    return item


def counts_of(shares: Mapping[str, float], n: int) -> dict[str, int]:
    """Whole numbers of samples that add up to n, by the shares of the kinds; what rounding leaves is useful."""
    counts = {kind: round(share * n) for kind, share in shares.items()}
    counts["useful"] += n - sum(counts.values())
    return counts
