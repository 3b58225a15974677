"""Tables by their hashes: the first row that differs, what was there before, and how much room that takes."""

import numpy as np
import pytest

from minirec_pl.utils.errors import InputError
from minirec_pl.utils.identity import Column, Identity, Table, fact, refuse_changed


def identity(texts, index, numbers):
    table = Table(
        {"target": Column("target item", texts, index), "time": Column("time", numbers)},
        lambda row: f"sample {row} of the pool",
        "samples",
    )
    return Identity({f"samples.{name}": value for name, value in table.facts().items()}, lambda: {"samples": table})


TEXTS = [f"item {i}" for i in range(500)]


def world(n=1000):
    random = np.random.default_rng(0)
    return random.integers(0, 500, n), np.sort(random.random(n))


def test_the_first_row_is_named_with_its_value_and_the_one_before():
    index, numbers = world()
    before = identity(TEXTS, index, numbers)
    assert before.differences(before.facts) == []
    changed = index.copy()
    changed[[41, 700]] = 7, 8
    told = identity(TEXTS, changed, numbers).differences(before.facts)
    assert told == [f"sample 41 of the pool has the target item 'item 7' here and 'item {index[41]}' there"]
    other = [*TEXTS, "new"]
    changed[41] = 500
    (told,) = identity(other, changed, numbers).differences(before.facts)
    assert told == f"sample 41 of the pool has the target item 'new' here and 'item {index[41]}' there"
    gone = [f"other {i}" for i in range(500)]
    (told,) = identity(gone, index, numbers).differences(before.facts)
    assert told == f"sample 0 of the pool has the target item 'other {index[0]}' here and another there"


def test_every_row_and_column_can_be_named():
    index, numbers = world()
    before = identity(TEXTS, index, numbers)
    for row in range(0, 1000, 37):
        changed = numbers.copy()
        changed[row] += 1e-9
        (told,) = identity(TEXTS, index, changed).differences(before.facts)
        assert told.startswith(f"sample {row} of the pool has the time ")
        assert told.endswith(" here and another there")
    both = identity(TEXTS, np.roll(index, 1), numbers + 1)
    (told,) = both.differences(before.facts)
    assert told == "sample 0 of the pool has another target item and time"


def test_other_numbers_of_rows_are_counted():
    index, numbers = world()
    before = identity(TEXTS, index, numbers)
    assert identity(TEXTS, index[:-1], numbers[:-1]).differences(before.facts) == [
        "there are 999 samples here and 1,000 there"
    ]
    assert identity(TEXTS, index, numbers).differences({}) == []


def test_facts_alone_name_the_row_too():
    index, numbers = world()
    before, after = identity(TEXTS, index, numbers), identity(TEXTS, np.r_[index[:-1], (index[-1] + 1) % 500], numbers)
    assert Identity(after.facts).differences(before.facts) == ["row 999 of the samples has another target"]
    assert after.differences(before.brief()) == ["some samples have another target item"]


def test_of_many_rows_a_stretch_is_named_in_half_a_mebibyte():
    n = 300_000
    index, numbers = world(n)
    before = identity(TEXTS, index, numbers)
    assert len(before.facts["samples.rows"]) < 2**19 + 10
    index[250_001] += 1 if index[250_001] < 499 else -1
    (told,) = identity(TEXTS, index, numbers).differences(before.facts)
    assert told == "one from sample 249999 of the pool to sample 250001 of the pool has another target item"


def test_nan_is_like_nan_and_minus_zero_like_zero():
    one = identity(TEXTS, np.zeros(2, dtype=np.int64), np.array([np.nan, 0.0]))
    assert identity(TEXTS, np.zeros(2, dtype=np.int64), np.array([-np.nan, -0.0])).differences(one.facts) == []


def test_facts_with_something_hidden_compare_that_alone():
    here = Identity({"split": fact("[0.8, 0.2]", b"1"), "prompt.user": "a #b", "rewards": "hit"})
    assert here.differences({"split": fact("(0.8, 0.2)", b"1"), "prompt.user": "a #b", "rewards": "hit"}) == []
    assert here.differences({"split": fact("[0.7, 0.3]", b"2"), "prompt.user": "a #c"}) == [
        "the split is [0.8, 0.2] here and [0.7, 0.3] there",
        "the prompt.user is a #b here and a #c there",
    ]
    assert here.differences({"split": fact("[0.8, 0.2]", b"3")}) == ["the split differs"]


def test_the_first_difference_is_refused_and_the_others_counted():
    refuse_changed("it is wrong", [])
    with pytest.raises(InputError, match=r"^it is wrong \(one, and 2 more\): use what it was made for, or allow"):
        refuse_changed("it is wrong", ["one", "two", "three"])
