"""Tables of every separator and encoding say the same, and what is missing is missing in every kind of file."""

import gzip
import json

import numpy as np
import pandas as pd
import pytest
from helpers.toy_data import INTER
from hypothesis import given, settings
from hypothesis import strategies as st

from minirec_pl.data.sources import AmazonReviews2023, AtomicFiles, HubDataset, InteractionTable, Sequences
from minirec_pl.data.sources.files import TextFormat, read_table
from minirec_pl.utils.errors import InputError

HEADER = ["user_id", "item_id", "timestamp"]
ROWS = [["Ann", "Café au lait", "1000"], ["Bob", "7", "2000"], ["Ann", "7", "3000"]]


def text_of(separator, rows=ROWS):
    return "\n".join(separator.join(row) for row in [HEADER, *rows]) + "\n"


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".dat", ".txt", ".csv.gz"])
@pytest.mark.parametrize("separator", ["\t", "::", ";", "|", ","])
def test_the_separator_is_found(separator, ending, tmp_path):
    path, data = tmp_path / f"log{ending}", text_of(separator).encode()
    path.write_bytes(gzip.compress(data) if ending.endswith(".gz") else data)
    table = read_table(path)
    assert list(table.frame) == HEADER
    assert table.frame.to_numpy().tolist() == ROWS


@pytest.mark.parametrize("separator", ["^", " - ", "@@@", "::"])
def test_the_separator_is_named(separator, tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(text_of(separator), encoding="utf-8")
    assert read_table(path, TextFormat(separator)).frame.to_numpy().tolist() == ROWS
    path.write_text(text_of("\t"), encoding="utf-8")
    assert read_table(path, TextFormat(r"\t")).frame.to_numpy().tolist() == ROWS


def test_a_quoted_cell_may_hold_the_separator(tmp_path):
    for separator in ("::", ";", ","):
        path = tmp_path / "log.csv"
        path.write_text(f'a{separator}"b;,::,;"\n"x{separator}y"{separator}z\n')
        assert read_table(path).frame.to_dict("list") == {"a": [f"x{separator}y"], "b;,::,;": ["z"]}


def test_two_separators_that_are_as_likely_are_refused(tmp_path):
    (tmp_path / "log.csv").write_text("user_id;item_id,timestamp\n")
    with pytest.raises(InputError, match=r"line 1: the separator may be ';' or ',': set item_separator to it$"):
        read_table(tmp_path / "log.csv", TextFormat(prefix="item_"))
    with pytest.raises(InputError, match="separator is empty: give the text between two values"):
        read_table(tmp_path / "log.csv", TextFormat(""))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp1252", "latin-1", "utf-16-le"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "jsonl.gz"])
def test_encodings_are_found_by_their_mark_or_named(kind, encoding, tmp_path):
    path = tmp_path / f"log.{kind}"
    lines = [json.dumps(dict(zip(HEADER, row, strict=True)), ensure_ascii=False) for row in ROWS]
    data = (text_of(";") if kind == "csv" else "\n".join(lines) + "\n").encode(encoding)
    path.write_bytes(gzip.compress(data) if kind.endswith("gz") else data)
    assert read_table(path, TextFormat(encoding=encoding)).frame.to_numpy().tolist() == ROWS
    if encoding.startswith("utf") and encoding != "utf-16-le":
        assert read_table(path).frame.to_numpy().tolist() == ROWS
    elif encoding != "utf-16-le":
        with pytest.raises(InputError, match=r"line \d: not UTF-8 text .*: set encoding to the one it has, or save"):
            read_table(path, TextFormat())
        with pytest.raises(InputError, match=r"line \d: not UTF-8 text \(perhaps Windows cp1252\): save the file"):
            read_table(path)
        with pytest.raises(InputError, match=r"line \d: not text in the encoding 'ascii': set item_encoding to"):
            read_table(path, TextFormat(encoding="ascii", prefix="item_"))
    with pytest.raises(InputError, match="item_encoding is 'cp1251x', which is unknown: give one that Python knows"):
        read_table(path, TextFormat(encoding="cp1251x", prefix="item_"))


def test_lines_are_those_of_the_file_below_blank_lines_and_dropped_rows(tmp_path):
    for name, lines in {
        "log.csv": ["user_id,item_id,timestamp", "", 'a,"1\n2",5', "", ",3,5", "a,4,late"],
        "log.jsonl": [
            "",
            '{"user_id": "a", "item_id": 1, "timestamp": 5}',
            "",
            "",
            '{"item_id": 3, "timestamp": 5}',
            "",
            '{"user_id": "a", "item_id": 1, "timestamp": "late"}',
        ],
    }.items():
        (tmp_path / name).write_text("\n".join(lines))
        with pytest.raises(InputError, match=rf"{name}, line 7, column timestamp: 'late' is not a finite number"):
            InteractionTable(str(tmp_path / name)).read()


def test_what_is_no_json_object_is_named(tmp_path):
    for line in ("[1]", "{", "1"):
        (tmp_path / "log.jsonl").write_text('{"user_id": 1}\n\n' + line + "\n")
        with pytest.raises(InputError, match=r"log\.jsonl, line 3: not a JSON object \(.*\): write one on each line$"):
            read_table(tmp_path / "log.jsonl")


MISSING = [None, np.nan, "", "  ", "nan", "NaN", "None", "none", "NULL", "null", "<NA>", "NaT", r"\N", " NULL "]
KEPT = ["NA", "n/a", "Nancy", "0", "nil", "-", "007", "1.5", "None of these"]


def write(frame, path):
    """A frame as a file of the kind that the path says, nulls as each kind writes them."""
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".jsonl":
        rows = [
            json.dumps({n: None if v is None or v != v else v for n, v in r.items()}) for r in frame.to_dict("records")
        ]
        path.write_text("\n".join(rows) + "\n")
    else:
        frame.to_csv(path, index=False, sep={".csv": ",", ".tsv": "\t"}[path.suffix])
    return str(path)


def log_with(column, value):
    """Four good rows, and in the middle one that lacks a value."""
    frame = pd.DataFrame(
        {
            "user_id": ["a", "a", "x", "b", "b"],
            "item_id": ["1", "2", "3", "2", "1"],
            "timestamp": ["10", "20", "30", "40", "50"],
        },
        dtype=object,
    )
    frame.loc[2, column] = value
    return frame


def names_of(samples):
    table = samples.table
    return [(table.user_ids[u], samples.catalogue.item_ids[i]) for u, i in zip(table.user, table.item, strict=True)]


GOOD = [("a", "1"), ("a", "2"), ("b", "2"), ("b", "1")]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("column", HEADER)
def test_a_row_without_an_id_or_time_is_dropped_and_counted_by_file(column, kind, tmp_path):
    for value in MISSING:
        path = write(log_with(column, value), tmp_path / f"log.{kind}")
        samples = InteractionTable(path).read()
        assert names_of(samples) == GOOD, value
        assert dict(+samples.report) == {f"log.{kind}: rows without {column}: dropped": 1}
        assert set(samples.catalogue.item_ids) == {"1", "2"}
        what = "time" if column == "timestamp" else "id"
        place = {"jsonl": "line 3", "parquet": "row 3"}.get(kind, "line 4")
        where = rf"log\.{kind}, {place}, column {column}: the {what} is missing"
        with pytest.raises(InputError, match=rf"{where}.*: give it, remove the row, or set on_missing to drop$"):
            InteractionTable(path, on_missing="error").read()


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_other_texts_are_ids_and_titles(kind, tmp_path):
    for value in KEPT:
        log, items = (
            log_with("item_id", value),
            pd.DataFrame({"item_id": ["1", "2", value], "title": ["None", "NA", "nan"]}),
        )
        samples = InteractionTable(write(log, tmp_path / f"l.{kind}"), write(items, tmp_path / f"i.{kind}")).read()
        assert names_of(samples) == [*GOOD[:2], ("x", value), *GOOD[2:]]
        assert samples.catalogue.titles == ["None", "NA", "nan"]
        assert not +samples.report


def test_a_time_may_be_na_and_a_rating_too(tmp_path):
    for value in ("NA", "n/a"):
        frame = log_with("timestamp", value).assign(rating=["1", value, "2", "3", "NULL"])
        samples = InteractionTable(write(frame, tmp_path / "log.csv")).read()
        assert dict(+samples.report) == {
            "log.csv: rows without timestamp: dropped": 1,
            "log.csv: ratings that are missing: kept as unknown": 2,
        }
        assert np.array_equal(samples.table.rating, np.float32([1, np.nan, 3, np.nan]), equal_nan=True)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_an_item_without_an_id_is_no_item(kind, tmp_path):
    log = write(log_with("user_id", None), tmp_path / f"log.{kind}")
    for value in MISSING:
        items = pd.DataFrame({"item_id": ["2", value, "1"], "title": ["two", "nothing", "one"]}, dtype=object)
        path = write(items, tmp_path / f"items.{kind}")
        samples = InteractionTable(log, path).read()
        assert samples.catalogue.item_ids == ["2", "1"]
        assert samples.catalogue.titles == ["two", "one"]
        assert samples.report[f"items.{kind}: rows without item_id: dropped"] == 1
        place = {"jsonl": "line 2", "parquet": "row 2"}.get(kind, "line 3")
        with pytest.raises(InputError, match=rf"items\.{kind}, {place}, column item_id: the id is missing"):
            InteractionTable(write(log_with("user_id", "x"), tmp_path / "l.csv"), path, on_missing="error").read()


def test_atomic_files_follow_the_same_rule(tmp_path):
    (tmp_path / "toy").mkdir()
    for value in [value for value in MISSING if isinstance(value, str)]:
        for place, column in enumerate(["user_id", "item_id", "rating", "timestamp"]):
            rows = [["a", "1", "5", "10"], ["a", "2", "5", "20"], ["x", "3", "5", "30"], ["b", "2.0", "5", "40"]]
            rows[2][place] = value
            lines = [INTER, *("\t".join(row) for row in rows), "b\t1\t5\t50"]
            (tmp_path / "toy" / "toy.inter").write_text("\n".join(lines) + "\n")
            samples = AtomicFiles(str(tmp_path), "toy").read()
            if column == "rating":
                assert names_of(samples) == [*GOOD[:2], ("x", "3"), *GOOD[2:]]
                assert dict(+samples.report) == {"toy.inter: ratings that are missing: kept as unknown": 1}
                continue
            assert names_of(samples) == GOOD, (value, column)
            assert dict(+samples.report) == {f"toy.inter: rows without {column}: dropped": 1}
            with pytest.raises(InputError, match=rf"toy\.inter, line 4, column {column}: the \w+ is missing"):
                AtomicFiles(str(tmp_path), "toy", on_missing="error").read()


def test_atomic_files_of_another_encoding_and_with_an_item_without_an_id(tmp_path):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "toy.inter").write_text(INTER + "\na\t1\t5\t10\nb\t1\t5\t20\n")
    item = tmp_path / "toy" / "toy.item"
    item.write_bytes("item_id:token\tmovie_title:token_seq\nNone\tnothing\n1\tCafé\n".encode("cp1252"))
    samples = AtomicFiles(str(tmp_path), "toy", encoding="cp1252").read()
    assert (samples.catalogue.item_ids, samples.catalogue.titles) == (["1"], ["Café"])
    assert dict(+samples.report) == {"toy.item: rows without item_id: dropped": 1}
    with pytest.raises(InputError, match=r"toy\.item, line 3: not UTF-8 text \(perhaps Windows cp1252\): set encoding"):
        AtomicFiles(str(tmp_path), "toy").read()


@pytest.mark.parametrize("raw", [True, False])
def test_amazon_reviews_follow_the_same_rule(raw, tmp_path):
    meta = [{"parent_asin": f"B{i}", "title": f"Thing {i}", "price": "1.5"} for i in range(4)]
    (tmp_path / "meta_Toys.jsonl").write_text("".join(json.dumps(row) + "\n" for row in meta))
    for value in MISSING:
        for column in ("user_id", "parent_asin", "timestamp"):
            day = 1_672_531_200_000
            rows = [
                {"user_id": u, "parent_asin": f"B{i}", "rating": 5, "timestamp": day} for u in "ab" for i in range(4)
            ]
            rows[3][column] = None if value is None or value != value else value
            frame = pd.DataFrame(rows, dtype=object)
            write(frame, tmp_path / ("Toys.jsonl" if raw else "Toys.csv"))
            source = AmazonReviews2023("Toys", str(tmp_path), category_core=0, min_items=0)
            samples = source.read()
            wanted = [("a", f"B{i}") for i in range(3)] + [("b", f"B{i}") for i in range(4)]
            assert sorted(names_of(samples)) == wanted, value
            name = "Toys.jsonl" if raw else "Toys.csv"
            assert samples.report[f"{name}: rows without {column}: dropped"] == 1
            with pytest.raises(InputError, match=rf"{name}, line {4 if raw else 5}, column {column}: the"):
                AmazonReviews2023("Toys", str(tmp_path), category_core=0, min_items=0, on_missing="error").read()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_what_is_missing_in_a_history_goes_with_its_time_and_rating(kind, tmp_path):
    for value in [*MISSING[2:], None]:
        frame = pd.DataFrame(
            {
                "user_id": ["u", "v", None, "w", "w"],
                "history_item_id": [["1", value, "2"], ["3"], ["1"], [], None],
                "history_timestamp": [[10, 20, 30], [40], [1], [], None],
                "history_rating": [[1.0, 2.0, 3.0], [4.0], [1.0], [], None],
                "item_id": ["3", "1", "2", "2", "1"],
                "timestamp": [50, 60, 70, 80, 90],
            }
        )
        path = tmp_path / f"s.{kind}"
        if kind == "parquet":
            frame.to_parquet(path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in frame.to_dict("records")))
        samples = Sequences(str(path)).read()
        table, ids = samples.table, samples.catalogue.item_ids
        assert [[ids[i] for i in table.history(k)] for k in range(len(table))] == [["1", "2"], ["3"], [], []]
        assert table.grouped_time.tolist() == [10, 30, 40]
        assert table.grouped_rating.tolist() == [1, 3, 4]
        assert sorted(ids) == ["1", "2", "3"]
        assert dict(+samples.report) == {
            f"s.{kind}: rows without user_id: dropped": 1,
            f"s.{kind}: history items without an id: dropped": 1,
        }
        whole = frame[frame["user_id"].notna()]
        whole.to_parquet(tmp_path / "whole.parquet")
        with pytest.raises(
            InputError, match=r"whole\.parquet, row 1, column history_item_id: an id in the list is miss"
        ):
            Sequences(str(tmp_path / "whole.parquet"), on_missing="error").read()


def test_whole_numbers_beside_nulls_keep_all_their_digits(tmp_path):
    """Ids above 2**53 have no float; nulls must not make floats of them."""
    big = 2**60 + 1
    frame = pd.DataFrame(
        {"user_id": pd.array([big, big + 1, None], "Int64"), "item_id": [1, 2, 3], "timestamp": [1, 2, 3]}
    )
    frame.to_parquet(tmp_path / "log.parquet")
    rows = [{"user_id": big, "item_id": 1, "timestamp": 1}, {"user_id": big + 1, "item_id": 2, "timestamp": 2}, {}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("log.parquet", "log.jsonl"):
        assert InteractionTable(str(tmp_path / name)).read().table.user_ids == [str(big), str(big + 1)]
    lists = pd.DataFrame({"user_id": ["u"], "history_item_id": [[big, None, 7]], "item_id": [8]})
    lists.to_parquet(tmp_path / "s.parquet")
    assert Sequences(str(tmp_path / "s.parquet")).read().catalogue.item_ids == [str(big), "7", "8"]
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_pandas(frame).save_to_disk(tmp_path / "hub")
    samples = HubDataset(str(tmp_path / "hub")).read()
    assert samples.table.user_ids == [str(big), str(big + 1)]
    assert dict(+samples.report) == {"hub: rows without user_id: dropped": 1}
    with pytest.raises(InputError, match=r"hub, row 3, column user_id: the id is missing"):
        HubDataset(str(tmp_path / "hub"), on_missing="error").read()


IDS = st.sampled_from(
    [12, 12.0, "12", "12.0", " 12 ", "007", "NA", None, float("nan"), "nan", "", "NULL", "x", 7, True]
)


@pytest.mark.property
@settings(max_examples=50, deadline=None)
@given(rows=st.lists(st.tuples(IDS, IDS, st.sampled_from([1, 2.0, "3", None, "None", "NA"])), min_size=1, max_size=12))
def test_all_kinds_of_files_say_the_same(rows, tmp_path_factory):
    """Whatever ids are spelled like, a CSV and JSON lines give the same samples, and a plain loop agrees."""
    folder = tmp_path_factory.mktemp("kinds")
    frame = pd.DataFrame([*rows, ("u", "i", 9)], columns=HEADER, dtype=object)
    csv = InteractionTable(write(frame, folder / "log.csv")).read()
    jsonl = InteractionTable(write(frame, folder / "log.jsonl")).read()
    gone = ("", "nan", "none", "null")

    def plain(value):
        text = "" if value is None else str(value).strip()
        return "" if text.lower() in gone else {"12.0": "12"}.get(text, text)

    wanted = []
    for user, item, time in [*rows, ("u", "i", 9)]:
        if plain(user) and plain(item) and plain(time) not in ("", "NA"):
            row = (plain(user), plain(item), float(plain(time)))
            wanted += [] if row in wanted else [row]
    wanted.sort(key=lambda row: row[2])
    for samples in (csv, jsonl):
        got = [(u, i, t) for (u, i), t in zip(names_of(samples), samples.table.timestamp.tolist(), strict=True)]
        assert got == wanted
