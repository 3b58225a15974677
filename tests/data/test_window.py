"""A window of time against plain lists of the rows in it."""

import numpy as np
import pytest
from helpers.toy_data import random_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from minirec_pl.data.samples import SampleTable
from minirec_pl.data.splits import split_table, window_rows
from minirec_pl.utils.errors import InputError

ROWS = st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 9), st.integers(0, 30)), min_size=8, max_size=60)


def table_of(rows, **options):
    users, items, times = zip(*rows, strict=True)
    return SampleTable(users, items, times, 10, **options)


@settings(max_examples=60, deadline=None)
@given(ROWS, st.sampled_from([(0.0, 0.6), (0.2, 0.8), (0.4, 1.0)]))
def test_a_window_is_split_like_a_table_of_its_rows_alone(rows, window):
    table = table_of(rows)
    parts, cuts = split_table(table, (0.8, 0.1, 0.1), 0.5, window)
    begin, end = window_rows(table, window)
    inside = np.arange(begin, end)
    assert cuts.end == end
    assert np.concatenate(parts).tolist() == inside.tolist()
    if len(inside):
        own = sorted(rows, key=lambda row: row[2])[begin:end]
        alone, _ = split_table(table_of(own), (0.8, 0.1, 0.1), 0.5)
        assert [len(part) for part in parts] == [len(part) for part in alone]
    for border in (begin, end):  # no timestamp is on both sides
        assert border in (0, len(table)) or table.timestamp[border - 1] != table.timestamp[border]


def test_the_whole_window_is_no_window(toy_data):
    plain, windowed = toy_data(), toy_data(window=(0.0, 1.0))
    plain.setup("fit")
    windowed.setup("fit")
    assert windowed.split == plain.split
    assert all(np.array_equal(one, other) for one, other in zip(windowed.parts, plain.parts, strict=True))


def test_parts_stay_inside_and_histories_reach_back(toy_data):
    data = toy_data(window=(0.5, 1.0), train_on="pool")
    data.setup("fit")
    begin = int(np.concatenate(data.parts).min())
    assert begin == window_rows(data.table, (0.5, 1.0))[0] > 0
    table = data.table
    first = table.timestamp[begin]
    reaching = 0
    for sample_id in data.pool_ids:
        rows = np.flatnonzero((table.user == table.user[sample_id]) & (table.timestamp < table.timestamp[sample_id]))
        assert table.history(int(sample_id)).tolist() == table.item[rows].tolist()
        reaching += bool((table.timestamp[rows] < first).any())
    assert reaching > 0
    assert data.item_popularity.sum() == len(data.parts.warm) + len(data.parts.pool)


def test_the_warm_start_trains_on_the_window_alone(toy_data):
    data = toy_data(window=(0.5, 1.0), train_on="warm")
    data.setup("fit")
    trained = {sample_id for batch in data.train_dataloader() for sample_id in batch["sample_id"].tolist()}
    assert trained <= set(data.parts.warm.tolist())
    assert min(trained) >= window_rows(data.table, (0.5, 1.0))[0] > 0


@pytest.mark.parametrize("window", [(0.6, 0.2), (-0.1, 0.5), (0.5, 1.2), (0.5,)])
def test_shares_out_of_range_are_refused(window):
    table = SampleTable(*zip(*[(u, int(i[1:]), t) for u, i, t in random_rows(n=50)], strict=True), 60)
    with pytest.raises(InputError, match="give begin and end as shares"):
        split_table(table, (0.8, 0.1, 0.1), 0.5, window)


def test_a_window_needs_a_split_in_time():
    table = SampleTable(*zip(*[(u, int(i[1:]), t) for u, i, t in random_rows(n=50)], strict=True), 60)
    with pytest.raises(InputError, match="give a split in global time"):
        split_table(table, "leave_one_out", 0.5, (0.0, 0.5))
