import numpy as np
import pytest
from helpers.toy_data import known_before, random_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from minirec_pl.data.samples import Catalogue, SampleTable
from minirec_pl.utils.errors import InputError

ROWS = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 5).map(str), st.integers(0, 8)), min_size=1, max_size=40
)


def table_of(rows, item_ids=None):
    users, items, times = zip(*rows, strict=True)
    catalogue = Catalogue(item_ids or sorted(set(items)))
    return SampleTable(list(users), catalogue.indices_of(items), [float(t) for t in times], len(catalogue)), catalogue


@settings(max_examples=80, deadline=None)
@given(ROWS, st.integers(1, 4))
def test_every_answer_equals_the_plain_loop(rows, window):
    table, catalogue = table_of(rows)
    truth = known_before(rows)
    assert len(table) == len(truth)
    for sample_id, (user, item, time, before) in enumerate(truth):
        earlier = [catalogue.index_of(other) for other in before]
        assert table.user_ids[table.user[sample_id]] == user
        assert catalogue.item_ids[table.item[sample_id]] == item
        assert table.timestamp[sample_id] == time
        assert table.history(sample_id).tolist() == earlier
        assert table.history(sample_id, window).tolist() == earlier[-window:]
        assert table.seen(sample_id).tolist() == list(dict.fromkeys(earlier))
        assert table.n_earlier[sample_id] == len(earlier)
        assert table.repeated[sample_id] == (item in before)
        assert table.eligible[sample_id] == (bool(before) and item not in before)


def test_ties_keep_the_order_of_the_source():
    table, catalogue = table_of([("u", "c", 5), ("v", "a", 5), ("u", "b", 5), ("u", "d", 4)])
    assert [catalogue.item_ids[item] for item in table.item] == ["d", "c", "a", "b"]


def test_table_without_rows():
    with pytest.raises(InputError, match="no interactions"):
        SampleTable([], [], [], 1)


def test_catalogue():
    catalogue = Catalogue(["b", "a"], ["Bee", "Ape"])
    assert [catalogue.index_of(item_id) for item_id in catalogue.item_ids] == [0, 1]
    assert "a" in catalogue
    assert "z" not in catalogue
    assert catalogue.fingerprint == Catalogue(["b", "a"]).fingerprint
    others = [["a", "b"], ["ba"], ["b", "a", "c"], ["b\na"]]
    assert len({catalogue.fingerprint, *(Catalogue(other).fingerprint for other in others[:3])}) == 4
    with pytest.raises(InputError, match="'z' is not in the catalogue of 2 items"):
        catalogue.index_of("z")
    with pytest.raises(InputError, match="'b' is in the catalogue twice"):
        Catalogue(["b", "a", "b"])
    with pytest.raises(InputError, match="1 titles for 2 items"):
        Catalogue(["b", "a"], ["Bee"])
    with pytest.raises(InputError, match="3 texts for 2 items"):
        Catalogue(["b", "a"], None, ["x", "y", "z"])
    with pytest.raises(InputError, match="no item"):
        Catalogue([])


def test_an_item_without_text_is_read_by_its_title_then_by_its_id():
    titles, texts = ["Bee", "Ape", ""], ["", "Ape, an animal", ""]
    assert Catalogue(["b", "a", "c"], titles, texts).texts == ["Bee", "Ape, an animal", "c"]
    assert Catalogue(["b", "a", "c"], titles).texts == Catalogue(["b", "a", "c"], titles).titles == ["Bee", "Ape", "c"]
    assert Catalogue(["b", "a"]).texts == ["b", "a"]
    assert Catalogue(["b", "a", "c"], titles, texts).fingerprint == Catalogue(["b", "a", "c"]).fingerprint


def test_fingerprint_of_the_table_tells_data_apart():
    rows = random_rows(n=50)
    same, changed = (
        table_of(rows)[0],
        table_of([("u0", *rows[0][1:]), *rows[1:-1], (*rows[-1][:2], rows[-1][2] + 1)])[0],
    )
    assert table_of(rows)[0].fingerprint == same.fingerprint != changed.fingerprint


def test_answers_do_not_slow_down_with_the_table():
    """`history` of a sample touches its own window only, whatever the size of the table."""
    n = 200_000
    table = SampleTable(["u"] * n, np.arange(n), np.arange(n), n)
    assert table.history(n - 1, 5).tolist() == [n - 6, n - 5, n - 4, n - 3, n - 2]
    assert table.history(n - 1, 5).base is not None
