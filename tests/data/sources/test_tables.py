"""One spelling of ids, times and texts, and one sentence for what cannot be read."""

import gzip
import math

import numpy as np
import pandas as pd
import pytest

from minirec_pl.data.sources.files import read_table
from minirec_pl.data.sources.tables import Table, as_id, clean_text, ids_of, numbers_of, times_of
from minirec_pl.utils.errors import InputError


def column(values, has_header=False):
    return Table("here", pd.DataFrame({"x": values}), has_header)


@pytest.mark.parametrize(
    ("value", "spelled"),
    [
        (12, "12"),
        (12.0, "12"),
        ("12", "12"),
        ("12.0", "12"),
        (" 12 ", "12"),
        (np.int64(12), "12"),
        (np.float32(12), "12"),
        (1e15, "1000000000000000"),
        ("007", "007"),
        ("007.0", "007.0"),
        ("-3.00", "-3"),
        ("1.5", "1.5"),
        (1.5, "1.5"),
        ("B00X", "B00X"),
        ("é", "é"),
        (None, ""),
        (math.nan, ""),
        (pd.NA, ""),
        ("  ", ""),
        ("None", ""),
        (" nan ", ""),
        ("NULL", ""),
        ("<NA>", ""),
        ("\\N", ""),
        (pd.NaT, ""),
        ("NA", "NA"),
        ("n/a", "n/a"),
        ("Nancy", "Nancy"),
    ],
)
def test_an_id_has_one_spelling(value, spelled):
    assert as_id(value) == spelled


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("Rock &amp; Roll", "Rock & Roll"),
        ("  two\t\n words\u00a0", "two words"),
        ("Cafe\u0301", "Caf\u00e9"),
        ("&quot;Q&quot; &#39;s", '"Q" \'s'),
        (["a", " ", None, "b &lt; c"], "a, b < c"),
        (np.array(["x", "y"], dtype=object), "x, y"),
        (1999.0, "1999"),
        (7, "7"),
        (None, ""),
        (math.nan, ""),
    ],
)
def test_a_text_is_clean(value, text):
    assert clean_text(value) == text


@pytest.mark.parametrize("unit", [1, 1_000, 1_000_000, 1_000_000_000])
def test_unix_times_of_any_unit_are_seconds(unit):
    seconds = [1_600_000_000, 1_700_000_000]
    assert times_of(column([s * unit for s in seconds]), "x").tolist() == seconds
    assert times_of(column([str(s * unit) for s in seconds]), "x").tolist() == seconds
    assert times_of(column([3, 1, 2]), "x").tolist() == [3, 1, 2]


def test_dates_are_seconds():
    dates = ["2020-01-01", "2020-01-02T00:00:01", "2020-01-02 01:00:00+01:00"]
    seconds = [1_577_836_800, 1_577_923_201, 1_577_923_200]
    assert times_of(column(dates), "x").tolist() == seconds
    assert times_of(column(pd.to_datetime(pd.Series(dates), utc=True, format="ISO8601")), "x").tolist() == seconds
    with pytest.raises(InputError, match=r"^here, line 3, column x: 'soon' is not a date: write it like 2023-09-30$"):
        times_of(column(["2020-01-01", "soon"], has_header=True), "x")


def test_numbers_may_be_missing_but_not_wrong():
    values = ["4", "", "NaN", " 5.5 ", None]
    assert np.array_equal(numbers_of(column(values), "x", required=False), [4, np.nan, np.nan, 5.5, np.nan], True)
    with pytest.raises(InputError, match=r"^here, row 2, column x: '' is not a finite number"):
        numbers_of(column(values), "x", required=True)
    for wrong in ("good", "inf"):
        with pytest.raises(InputError, match=rf"^here, row 2, column x: '{wrong}' is not a finite number"):
            numbers_of(column(["1", wrong]), "x", required=False)


def test_an_empty_id_is_named_with_its_line_below_cells_of_several_lines(tmp_path):
    path = tmp_path / "items.csv"
    path.write_text('item_id,title\n1,"two\nlines"\n2,b\n ,c\n')
    table = read_table(path)
    assert table.frame["title"].tolist() == ["two\nlines", "b", "c"]
    with pytest.raises(InputError, match=r"items\.csv, line 5, column item_id: the id is missing"):
        ids_of(table, "item_id")


def test_text_tables_keep_every_value_as_written(tmp_path):
    text = "a,b\n007,NA\n1.0,null\n"
    (tmp_path / "t.csv").write_text(text)
    (tmp_path / "t.tsv").write_text(text.replace(",", "\t"))
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "bom.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    for name in ("t.csv", "t.tsv", "t.csv.gz", "bom.csv"):
        frame = read_table(tmp_path / name).frame
        assert frame.to_dict("list") == {"a": ["007", "1.0"], "b": ["NA", "null"]}


FILES = {
    "cp1252.csv": (b"item_id,title\n1,a\n2,caf\xe9\n", r"cp1252\.csv, line 3: not UTF-8 text \(perhaps Windows cp1252"),
    "long.csv": (b"a,b\n1,2\n1,2,3\n", r"long\.csv cannot be read \(.*line 3.*\): fix"),
    "longfirst.csv": (b"a,b\n1,2,3\n1,2,3\n", r"longfirst\.csv cannot be read"),
    "empty.csv": (b"", r"empty\.csv cannot be read"),
    "cut.csv.gz": (gzip.compress(b"a,b\n" * 99)[:-9], r"cut\.csv\.gz is damaged or truncated"),
    "no.csv.gz": (b"a,b\n", r"no\.csv\.gz is damaged or truncated"),
    "broken.parquet": (b"PAR1", r"broken\.parquet cannot be read"),
    "data.xlsx": (b"x", r"data\.xlsx is not a table of a known kind: give a \.csv"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_one_sentence(name, tmp_path):
    content, message = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as raised:
        read_table(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match=r"no\.csv does not exist"):
        read_table(tmp_path / "no.csv")
    with pytest.raises(InputError, match="is a folder"):
        read_table(tmp_path)


def test_columns_are_renamed_from_ours_to_theirs():
    table = Table("log.csv", pd.DataFrame({"who": ["u"], "user_id": ["not this"], "sku": ["i"]}))
    selected = table.select({"user_id": "who", "item_id": "sku"}, ["user_id", "item_id"])
    assert selected.frame.to_dict("list") == {"user_id": ["u"], "item_id": ["i"]}
    with pytest.raises(InputError, match=r"^log\.csv: no column 'item_id' among who, user_id, sku: .*item_id: NAME"):
        table.select({}, ["item_id"])
    with pytest.raises(InputError, match=r"^log\.csv: no column 'product' \(for item_id\) among who"):
        table.select({"item_id": "product"}, [])
    with pytest.raises(InputError, match="columns names 'usr', which is not one of user_id"):
        table.select({"usr": "who"}, [])
