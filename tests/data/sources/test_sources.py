"""Users' tables through each source, and every fault of a real export."""

import math

import numpy as np
import pandas as pd
import pytest
from helpers.own_tables import item_frame, log_frame, sequence_frame
from helpers.toy_data import known_before, write_dataset

from minirec_pl.data.datamodule import RecDataModule
from minirec_pl.data.sources import AtomicFiles, HubDataset, InteractionTable, Sequences
from minirec_pl.utils.errors import InputError


def rows_of(table, catalogue):
    """(user, item, time) by sample_id, with external ids."""
    users, items = ([names[i] for i in index] for names, index in _columns(table, catalogue))
    return list(zip(users, items, table.timestamp.tolist(), strict=True))


def _columns(table, catalogue):
    return ((table.user_ids, table.user), (catalogue.item_ids, table.item))


def in_time(log):
    rows = list(log[["user_id", "item_id", "timestamp"]].itertuples(index=False, name=None))
    return [(user, item, time) for user, item, time, _ in known_before(rows)]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_log_in_any_format_gives_the_same_samples(kind, tmp_path):
    log, write = log_frame(), {"csv": lambda f, p: f.to_csv(p, index=False), "parquet": lambda f, p: f.to_parquet(p)}
    renamed = log.rename(columns={"user_id": "customer", "item_id": "sku"})
    write[kind](renamed, tmp_path / f"log.{kind}")
    write[kind](item_frame(log).rename(columns={"item_id": "asin"}), tmp_path / f"items.{kind}")
    source = InteractionTable(
        str(tmp_path / f"log.{kind}"),
        str(tmp_path / f"items.{kind}"),
        columns={"user_id": "customer", "item_id": "sku"},
        item_columns={"item_id": "asin"},
        item_text=["title", "brand"],
    )
    table, catalogue, name, report, *_ = source.read()
    assert name == str(tmp_path / f"log.{kind}")
    assert rows_of(table, catalogue) == in_time(log)
    assert catalogue.item_ids == item_frame(log)["item_id"].tolist()
    first = catalogue.item_ids[0]
    assert catalogue.titles[0] == f"Thing {first}"
    assert catalogue.texts[0] == f"Thing {first}, B{first}"
    assert table.rating.tolist() == log["rating"].iloc[table.source_row].tolist()
    assert {what for what, count in report.items() if count} == {
        f"log.{kind}: interactions earlier than the row before: sorted by time"
    }


def test_a_log_equals_the_atomic_files_with_the_same_rows(tmp_path):
    log = log_frame()
    log.to_csv(tmp_path / "log.csv", index=False)
    write_dataset(tmp_path, log[["user_id", "item_id", "timestamp"]].itertuples(index=False, name=None))
    atomic, own = AtomicFiles(str(tmp_path), "toy").read(), InteractionTable(str(tmp_path / "log.csv")).read()
    assert atomic.table.fingerprint == own.table.fingerprint
    assert atomic.catalogue.fingerprint == own.catalogue.fingerprint
    assert own.catalogue.titles is None


def read_log(tmp_path, log, items=None, **options):
    pd.DataFrame(log).to_csv(tmp_path / "log.csv", index=False)
    if items is not None:
        pd.DataFrame(items).to_parquet(tmp_path / "items.parquet")
    path = None if items is None else str(tmp_path / "items.parquet")
    return InteractionTable(str(tmp_path / "log.csv"), path, **options).read()


def test_every_fault_of_a_log_is_fixed_and_counted(tmp_path):
    long = " ".join(["word"] * 300)
    log = {
        "user_id": ["a", "a", "a", "b", "a", "c", "a"],
        "item_id": ["12", "7.0", "12", "7", "007", "8", "999"],
        "rating": ["5", "", "5", "nan", "1", "2", "3"],
        "timestamp": [30, 10, 30, 5, 40, 6, 50],
    }
    items = {
        "item_id": [7.0, 12.0, 8.0, 12.0],
        "title": ["Rock &amp; Roll", None, long, "again"],
        "year": [1999.0, math.nan, 2001.0, 1.0],
    }
    table, catalogue, _, report, *_ = read_log(tmp_path, log, items, item_text=["title", "year"])
    assert rows_of(table, catalogue) == [("b", "7", 5.0), ("c", "8", 6.0), ("a", "7", 10.0), ("a", "12", 30.0)]
    assert np.array_equal(table.rating, np.float32([np.nan, 2, np.nan, 5]), equal_nan=True)
    assert catalogue.titles == ["Rock & Roll", "12", long]
    assert catalogue.texts == ["Rock & Roll, 1999", "12", f"{long}, 2001"]
    assert {what: count for what, count in report.items() if count} == {
        "items.parquet: rows whose item_id came before: dropped": 1,
        "items.parquet: items without a title: the id stands in": 1,
        "log.csv: ratings that are missing: kept as unknown": 2,
        "log.csv: interactions with an item that is not in the item table: dropped": 2,
        "log.csv: interactions that repeat user, item and time of one before: dropped": 1,
        "log.csv: interactions earlier than the row before: sorted by time": 2,
    }


ONE = {"user_id": ["a"], "item_id": ["1"], "timestamp": [1]}
REFUSED = {
    "no user": ({**ONE, "user_id": [" "]}, None, r"log\.csv: each of its 1 rows lacks one of user_id, item_id, time"),
    "wrong rating": ({**ONE, "rating": ["good"]}, None, r"log\.csv, line 2, column rating: 'good' is not a finite"),
    "wrong time": ({**ONE, "timestamp": ["late"]}, None, r"log\.csv, line 2, column timestamp: 'late' is not a finite"),
    "no time": ({"user_id": ["a"], "item_id": ["1"]}, None, r"log\.csv: no column 'timestamp' among user_id, item_id:"),
    "wrong part": ({**ONE, "split": ["dev"]}, None, r"log\.csv, line 2, column split: 'dev' is not one of train, val,"),
    "no row": ({"user_id": [], "item_id": [], "timestamp": []}, None, r"log\.csv has no rows"),
    "no item known": (
        ONE,
        {"item_id": ["B1"]},
        r"log\.csv: none of its items is in .*items\.parquet, .*'1' .*'B1'",
    ),
    "no item": (ONE, {"item_id": [None, None]}, r"items\.parquet: each of its 2 rows lacks one of item_id: name"),
    "no item id": (
        ONE,
        {"asin": ["1"]},
        r"items\.parquet: no column 'item_id' among asin: .*item_columns: \{item_id: NAME",
    ),
    "no item row": (ONE, {"item_id": []}, r"items\.parquet has no rows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_fixed_is_one_sentence(name, tmp_path):
    log, items, message = REFUSED[name]
    with pytest.raises(InputError, match=message) as raised:
        read_log(tmp_path, log, items)
    assert "\n" not in str(raised.value)


def test_a_text_column_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match=r"items\.parquet: item_text names 'brand', but the columns are item_id: name"):
        read_log(tmp_path, ONE, {"item_id": ["1"]}, item_text=["title", "brand"])


@pytest.mark.parametrize("with_times", [True, False])
def test_sequences_are_samples_with_their_own_history(with_times, tmp_path):
    log = log_frame(3, n=300)
    frame, items = sequence_frame(log), item_frame(log)
    if not with_times:
        frame = frame.drop(columns="timestamp")
    frame.to_parquet(tmp_path / "s.parquet")
    items.to_parquet(tmp_path / "i.parquet")
    table, catalogue, _, report, *_ = Sequences(str(tmp_path / "s.parquet"), str(tmp_path / "i.parquet")).read()
    assert not +report
    assert len(table) == len(frame)
    for sample_id, row in enumerate(frame.itertuples()):
        history = [catalogue.item_ids[i] for i in table.history(sample_id)]
        assert table.user_ids[table.user[sample_id]] == row.user_id
        assert catalogue.item_ids[table.item[sample_id]] == row.item_id
        assert history == list(row.history_item_id)
        assert [catalogue.item_ids[i] for i in table.seen(sample_id)] == list(dict.fromkeys(history))
        assert table.eligible[sample_id] == (row.item_id not in history)
        assert table.part[sample_id] == row.split
        assert table.timestamp[sample_id] == (row.timestamp if with_times else sample_id)
    pairs = {(row.user_id, item) for row in frame.itertuples() for item in [*row.history_item_id, row.item_id]}
    counts = table.item_counts(np.arange(len(table)))
    assert counts.tolist() == [sum(item == i for _, item in pairs) for i in catalogue.item_ids]


def test_batches_of_sequences_know_ages_and_ratings_where_the_data_do(tmp_path):
    frame = pd.DataFrame(
        {
            "user_id": ["u", "v", "u"],
            "history_item_id": [[1, 2], [3], [1, 2, 4]],
            "history_timestamp": [[1_600_000_000_000, 1_600_000_060_000], [1_600_000_000_000], [1_600_000_000_000] * 3],
            "history_rating": [[5.0, np.nan], [1.0], [2.0, 3.0, 4.0]],
            "item_id": [4, 1, 3],
            "timestamp": [1_600_000_100_000, 1_600_000_010_000, 1_600_000_200_000],
            "split": ["train", "train", "test"],
        }
    )
    frame.to_parquet(tmp_path / "s.parquet")
    pd.DataFrame({"item_id": ["1", "2", "3", "4"], "title": list("abcd")}).to_csv(tmp_path / "i.csv", index=False)
    samples = Sequences(str(tmp_path / "s.parquet"), str(tmp_path / "i.csv")).read()
    data = RecDataModule(source=Sequences(str(tmp_path / "s.parquet"), str(tmp_path / "i.csv")), history_window=3)
    data.table, data.catalogue = samples.table, samples.catalogue
    batch = next(iter(data.sample_loader(np.array([0, 1, 2]))))
    assert batch["history"].tolist() == [[-1, -1, 2], [-1, 0, 1], [0, 1, 3]]
    assert batch["history_age"].tolist() == [[0, 0, 10], [0, 100, 40], [200, 200, 200]]
    nan = math.nan
    wanted = np.float32([[nan, nan, 1], [nan, 5, nan], [2, 3, 4]])
    assert np.array_equal(batch["history_rating"].numpy(), wanted, equal_nan=True)
    assert batch["seen"].tolist() == [[2, -1, -1], [0, 1, -1], [0, 1, 3]]
    frame.drop(columns=["history_timestamp", "history_rating"]).to_parquet(tmp_path / "s.parquet")
    data.table = Sequences(str(tmp_path / "s.parquet"), str(tmp_path / "i.csv")).read().table
    batch = next(iter(data.sample_loader(np.array([0, 1]))))
    assert np.array_equal(batch["history_age"].numpy(), [[0, 0, nan], [0, nan, nan]], equal_nan=True)
    assert "history_rating" not in batch


def test_faults_of_sequences(tmp_path):
    frame = pd.DataFrame(
        {
            "user_id": [1, 1, 2, 2, 3],
            "history_item_id": [[1, 9, 2], [1, 9, 2], [9], [1], []],
            "item_id": [3.0, 3.0, 1.0, 9.0, 1.0],
        }
    )
    items = pd.DataFrame({"item_id": ["1", "2", "3"], "title": ["a", "b", ""]})

    def read(frame):
        frame.to_parquet(tmp_path / "s.parquet")
        items.to_parquet(tmp_path / "i.parquet")
        return Sequences(str(tmp_path / "s.parquet"), str(tmp_path / "i.parquet")).read()

    table, catalogue, _, report, *_ = read(frame)
    assert rows_of(table, catalogue) == [("1", "3", 0.0), ("2", "1", 1.0), ("3", "1", 2.0)]
    assert [table.history(i).tolist() for i in range(3)] == [[0, 1], [], []]
    assert table.eligible.tolist() == [True, False, False]
    assert dict(+report) == {
        "i.parquet: items without a title: the id stands in": 1,
        "s.parquet: sequences whose target is not in the item table: dropped": 1,
        "s.parquet: sequences that repeat one before: dropped": 1,
        "s.parquet: history items that are not in the item table: dropped": 2,
    }
    with pytest.raises(InputError, match=r"s\.parquet, row 1, column history_item_id: '1 2' is not a list: store"):
        read(frame.assign(history_item_id="1 2"))
    with pytest.raises(InputError, match=r"s\.parquet, row 1: history_rating has 1 values and history_item_id 3: give"):
        read(frame.assign(history_rating=[[1.0]] * 5))
    with pytest.raises(InputError, match=r"s\.parquet: no column 'history_item_id' among user_id, item_id:"):
        read(frame.drop(columns="history_item_id"))


datasets = pytest.importorskip("datasets")


def test_a_folder_of_save_to_disk_holds_interactions_or_sequences(tmp_path):
    log = log_frame(4, n=300)
    items, frame = item_frame(log), sequence_frame(log)
    whole = datasets.Dataset.from_pandas(log)
    whole.save_to_disk(tmp_path / "log")
    table, catalogue, name, *_ = HubDataset(str(tmp_path / "log")).read()
    assert name == str(tmp_path / "log")
    assert rows_of(table, catalogue) == in_time(log)
    parts = {
        name: datasets.Dataset.from_pandas(frame[frame["split"] == name].drop(columns="split"), preserve_index=False)
        for name in ("train", "test")
    }
    info = datasets.Dataset.from_pandas(items, preserve_index=False)
    datasets.DatasetDict({**parts, "item_info": info}).save_to_disk(tmp_path / "sequences")
    items.to_csv(tmp_path / "items.csv", index=False)
    frame.to_parquet(tmp_path / "s.parquet")
    items.to_parquet(tmp_path / "i.parquet")
    wanted = Sequences(str(tmp_path / "s.parquet"), str(tmp_path / "i.parquet")).read()
    for where in ("item_info", str(tmp_path / "items.csv")):
        splits = None if where == "item_info" else "train"
        table, catalogue, *_ = HubDataset(str(tmp_path / "sequences"), items=where, split=splits).read()
        assert catalogue.titles == items["title"].tolist()
        if splits is None:
            assert table.fingerprint == wanted.table.fingerprint
            assert table.part.tolist() == wanted.table.part.tolist()
        else:
            assert len(table) == (frame["split"] == "train").sum()
            assert table.part is None
    with pytest.raises(InputError, match=r"sequences has no split 'dev': give one of train, test, item_info$"):
        HubDataset(str(tmp_path / "sequences"), split="dev").read()
    with pytest.raises(InputError, match=r"items='things' is neither a split of .* nor a file"):
        HubDataset(str(tmp_path / "sequences"), items="things").read()


def test_a_dataset_that_cannot_be_had_says_what_to_do(tmp_path):
    (tmp_path / "nothing").mkdir()
    for name in (str(tmp_path / "nothing"), "nobody/nothing-of-this-name"):
        with pytest.raises(
            InputError, match=r"cannot be loaded \(.*save_to_disk\(FOLDER\), copy the folder here"
        ) as raised:
            HubDataset(name).read()
        assert "\n" not in str(raised.value)
