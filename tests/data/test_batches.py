"""What a batch says of a history, against plain loops over the rows as written."""

import math

import numpy as np
import pytest
from helpers.toy_data import random_rows

from minirec_pl.data.batches import SampleDataset
from minirec_pl.data.samples import SampleTable


@pytest.mark.parametrize("window", [1, 4, 200])
def test_age_and_rating_are_those_of_the_item_in_the_same_place(window):
    rows = random_rows(5, n=300, n_users=6, n_items=1000)
    users, items, times = zip(*rows, strict=True)
    ratings = [math.nan if i % 7 == 0 else i / 2 for i in range(len(rows))]
    index = {item: i for i, item in enumerate(dict.fromkeys(items))}
    table = SampleTable(users, [index[item] for item in items], times, len(index), ratings)
    order = sorted(range(len(rows)), key=lambda i: (times[i], i))
    ids = np.flatnonzero(table.eligible)[::-3]
    batch = SampleDataset(table, window, ids, "these").__getitems__(ids)
    for row, sample_id in enumerate(ids):
        source = order[sample_id]
        before = [i for i in order if users[i] == users[source] and times[i] < times[source]][-window:]
        pads = window - len(before)
        assert batch["history"][row].tolist() == [-1] * pads + [index[items[i]] for i in before]
        assert batch["history_age"][row].tolist() == [0] * pads + [times[source] - times[i] for i in before]
        wanted = [math.nan] * pads + [ratings[i] for i in before]
        assert np.array_equal(batch["history_rating"][row].numpy(), np.float32(wanted), equal_nan=True)


def test_without_ratings_a_batch_has_none():
    table = SampleTable(["u", "u"], [0, 1], [1, 2], 2)
    assert "history_rating" not in SampleDataset(table, 3, np.array([1]), "these")[1]
