"""Parts against plain loops over the rows as written."""

import numpy as np
import pytest
from helpers.toy_data import random_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from minirec_pl.data.samples import SampleTable
from minirec_pl.data.sequence_table import SequenceTable
from minirec_pl.data.splits import given_parts, leave_one_out, random_part, split_by_time, split_table
from minirec_pl.utils.errors import InputError

ROWS = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 9), st.integers(0, 8)), min_size=1, max_size=40)


def table_of(rows, parts=None):
    users, items, times = zip(*rows, strict=True)
    return SampleTable(users, [int(str(item).lstrip("i")) for item in items], times, 1000, parts=parts)


def in_time(rows):
    """Source rows by sample_id."""
    return sorted(range(len(rows)), key=lambda i: (rows[i][2], i))


@settings(max_examples=80, deadline=None)
@given(ROWS)
def test_leave_one_out_takes_the_last_two_of_who_has_three(rows):
    order, last, second, rest = in_time(rows), [], [], []
    for user in {user for user, *_ in rows}:
        own = [sample_id for sample_id, row in enumerate(order) if rows[row][0] == user]
        if len(own) >= 3:
            *own, before, final = own
            second.append(before)
            last.append(final)
        rest += own
    parts = leave_one_out(table_of(rows))
    assert [part.tolist() for part in parts] == [sorted(rest), sorted(second), sorted(last)]


@settings(max_examples=80, deadline=None)
@given(ROWS, st.integers(0, 99), st.floats(0, 1))
def test_given_parts_are_those_of_the_rows_and_warm_is_the_earliest_share(rows, seed, warm_fraction):
    drawn = np.random.default_rng(seed).choice(["train", "validation", "test"], len(rows)).tolist()
    order, table = in_time(rows), table_of(rows, drawn)
    parts, cuts = split_table(table, "given", warm_fraction)
    assert cuts is None
    named = {name: [i for i, row in enumerate(order) if drawn[row] == name] for name in set(drawn)}
    assert parts.test.tolist() == named.get("test", [])
    train = [*parts.warm.tolist(), *parts.pool.tolist()]
    if "validation" in named:
        assert parts.validation.tolist() == named["validation"]
        assert train == named.get("train", [])
    else:
        assert train + parts.validation.tolist() == named.get("train", [])
    times = table.timestamp
    assert not {times[i] for i in parts.warm} & {times[i] for i in parts.pool}
    wanted = round(len(train) * warm_fraction)
    smaller = [n for n in range(len(parts.warm)) if n == 0 or times[train[n - 1]] != times[train[n]]]
    assert len(parts.warm) >= wanted > max(smaller, default=-1) or len(parts.warm) == wanted


def test_without_validation_the_latest_tenth_of_train_becomes_it():
    rows = [("u", i, i) for i in range(100)]
    train, validation, test = given_parts(table_of(rows, ["train"] * 80 + ["test"] * 20))
    assert [part.tolist() for part in (train, validation, test)] == [
        list(range(72)),
        list(range(72, 80)),
        list(range(80, 100)),
    ]


def test_sequences_are_split_the_same_way():
    table = SequenceTable(["u"] * 4, [1, 2, 3, 4], [[0]] * 4, 5, parts=["train", "test", "train", "validation"])
    parts, _ = split_table(table, "given", 0.5)
    assert [part.tolist() for part in parts] == [[0], [2], [3], [1]]
    parts, cuts = split_table(table, (0.5, 0.25, 0.25), 0.5)
    assert [part.tolist() for part in parts] == [[0], [1], [2], [3]]
    assert cuts == (1, 2, 3, 4)


def test_parts_of_a_time_split_are_its_stretches():
    table = table_of(random_rows(n=200))
    parts, cuts = split_table(table, (0.8, 0.1, 0.1), 0.5)
    assert np.concatenate(parts).tolist() == list(range(200))
    assert np.cumsum([len(part) for part in parts]).tolist() == list(cuts)


def test_what_cannot_be_split():
    table = table_of([("u", 1, 1)])
    with pytest.raises(InputError, match="split='given' needs a column 'split'"):
        split_table(table, "given", 0.5)
    with pytest.raises(InputError, match="split='random': give three shares of time, 'leave_one_out' or 'given'"):
        split_table(table, "random", 0.5)
    with pytest.raises(InputError, match="warm_fraction=2"):
        split_table(table, "leave_one_out", 2)


def test_a_random_part_is_seeded_and_no_larger_than_what_there_is():
    ids = np.arange(10, 110)
    part = random_part(ids, 30, 1)
    assert len(part) == len(set(part.tolist()) & set(ids.tolist())) == 30
    assert (
        part.tolist() == sorted(part.tolist()) == random_part(ids, 30, 1).tolist() != random_part(ids, 30, 2).tolist()
    )
    assert random_part(ids, None, 1).tolist() == random_part(ids, 200, 1).tolist() == ids.tolist()


@settings(max_examples=80, deadline=None)
@given(ROWS, st.floats(0.05, 0.9), st.floats(0, 1))
def test_a_cut_moves_forward_to_the_next_timestamp(rows, train, warm):
    ratios = (train, (1 - train) / 2, (1 - train) / 2)
    table = table_of(rows)
    split = split_by_time(table, ratios, warm_fraction=warm)
    assert 0 <= split.warm_end <= split.train_end <= split.val_end <= split.end == len(rows)
    times = sorted(time for _, _, time in rows)
    for cut in split[:3]:
        assert cut in (0, len(times)) or times[cut - 1] < times[cut]
    nominal = round(len(times) * train)
    assert split.train_end >= nominal
    assert len({times[row] for row in range(max(nominal - 1, 0), split.train_end)}) <= 1
    assert (
        abs(split.warm_end - split.train_end * warm) <= 0.5
        or times[split.warm_end - 1] == times[max(round(split.train_end * warm) - 1, 0)]
    )


def test_cuts_without_ties_are_where_the_shares_say():
    table = table_of([("u", "1", time) for time in range(1000)])
    assert split_by_time(table, (0.8, 0.1, 0.1), warm_fraction=0.875) == (700, 800, 900, 1000)
    assert split_by_time(table, (0.7, 0.1, 0.2)) == (0, 700, 800, 1000)


@pytest.mark.parametrize("ratios", [(0.8, 0.2), (0.8, 0.1, 0.2), (1.0, 0.0, 0.0), (0.9, 0.2, -0.1)])
def test_bad_ratios(ratios):
    table = table_of([("u", "1", 1)])
    with pytest.raises(InputError, match=r"^split=.*three shares.*add up to 1$"):
        split_by_time(table, ratios)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_bad_warm_fraction(fraction):
    table = table_of([("u", "1", 1)])
    with pytest.raises(InputError, match=r"^warm_fraction=.*0 to 1"):
        split_by_time(table, warm_fraction=fraction)
