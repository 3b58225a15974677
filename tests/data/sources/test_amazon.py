"""A small dump in the format of Amazon Reviews 2023, filtered by the library and by plain loops."""

import gzip
import json
from collections import Counter
from datetime import UTC, datetime

import numpy as np
import pytest
from helpers.own_tables import write_amazon

from minirec_pl.data.sources import AmazonReviews2023
from minirec_pl.utils.errors import InputError


def day(text):
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1000)


def random_dump(seed=0, n=1500, n_users=40, n_items=60):
    rng = np.random.default_rng(seed)
    users, items = rng.integers(0, n_users, n) ** 2 // n_users, rng.integers(0, n_items, n) ** 2 // n_items
    times = rng.integers(day("2021-06-01"), day("2023-12-01"), n)
    reviews = [
        {
            "rating": float(rng.integers(1, 6)),
            "title": "fine",
            "text": "x",
            "asin": f"V{item}",
            "parent_asin": f"P{item}",
            "user_id": f"U{user}",
            "timestamp": int(time),
        }
        for user, item, time in zip(users, items, times, strict=True)
    ]
    titles = [f"Record {i} &amp; &quot;more&quot;" for i in range(n_items)]
    titles[3], titles[4], titles[5], titles[6] = None, "x", '<span id="t">T</span>', "long " * 21
    metadata = [
        {"parent_asin": f"P{i}", "title": title, "price": None if i == 7 else "9.99", "store": f"S{i}", "details": {}}
        for i, title in reversed(list(enumerate(titles)))
        if i != 8
    ]
    return reviews, metadata


def core(rows, k):
    while True:
        users, items = Counter(row["user_id"] for row in rows), Counter(row["parent_asin"] for row in rows)
        kept = [row for row in rows if users[row["user_id"]] >= k and items[row["parent_asin"]] >= k]
        if len(kept) == len(rows):
            return rows
        rows = kept


def plain_protocol(reviews, *, starts, end, k, category_core, min_items, unpriced=False):
    earliest = {}
    for row in sorted(reviews, key=lambda row: row["timestamp"]):
        earliest.setdefault((row["user_id"], row["parent_asin"]), row)
    bad = {"P3", "P4", "P5", "P6", "P8"} | (set() if unpriced else {"P7"})
    rows = [row for row in core(list(earliest.values()), category_core) if row["parent_asin"] not in bad]
    for start in starts:
        kept = core([row for row in rows if day(start) <= row["timestamp"] <= day(end)], k)
        if len({row["parent_asin"] for row in kept}) >= min_items:
            break
    return kept


@pytest.mark.parametrize(
    ("k", "category_core", "min_items", "unpriced"),
    [(0, 5, 0, False), (2, 0, 0, True), (4, 5, 40, False), (2, 5, 999, False)],
)
def test_the_protocol_equals_plain_loops(k, category_core, min_items, unpriced, tmp_path):
    reviews, metadata = random_dump()
    write_amazon(tmp_path, reviews, metadata)
    options = {"k_core": k, "category_core": category_core, "min_items": min_items, "priced_only": not unpriced}
    source = AmazonReviews2023(
        "Toys", str(tmp_path), "2023-05-01", "2023-10-01", item_text=["title", "store"], **options
    )
    table, catalogue, _, report, *_ = source.read()
    starts = (
        ["2023-05-01"]
        if not min_items
        else ["2023-05-01", "2023-02-01", "2022-11-01", "2022-08-01", "2022-05-01", "2022-02-01", "2021-11-01"]
    )
    wanted = plain_protocol(
        reviews,
        starts=starts,
        end="2023-10-01",
        k=k,
        category_core=category_core,
        min_items=min_items,
        unpriced=unpriced,
    )
    got = [
        (table.user_ids[user], catalogue.item_ids[item], round(time * 1000), rating)
        for user, item, time, rating in zip(table.user, table.item, table.timestamp, table.rating, strict=True)
    ]
    assert sorted(got) == sorted((r["user_id"], r["parent_asin"], r["timestamp"], r["rating"]) for r in wanted)
    assert 0 < len(got) < len(reviews)
    used = {row["parent_asin"] for row in wanted}
    assert catalogue.item_ids == [item["parent_asin"] for item in metadata if item["parent_asin"] in used]
    number = catalogue.item_ids[0].removeprefix("P")
    assert catalogue.titles[0] == f'Record {number} & "more'
    assert catalogue.texts[0] == f'Record {number} & "more, S{number}'
    dropped = {
        "without a title": 2,
        "whose title is HTML": 1,
        "with a title of more than 20 words": 1,
        "without a price": 0 if unpriced else 1,
    }
    for what, count in dropped.items():
        assert report[f"meta_Toys.jsonl.gz: items {what}: dropped"] == count
    moved = report["months that start was moved back to reach min_items"]
    assert (moved > 0) == (min_items > 0)


def test_the_rating_only_file_is_taken_where_it_is(tmp_path):
    reviews, metadata = random_dump(1)
    write_amazon(tmp_path, reviews, metadata)
    options = {"start": "2022-01-01", "end": "2023-10-01", "min_items": 0}
    raw = AmazonReviews2023("Toys", str(tmp_path), **options).read()
    earliest = {}
    for row in sorted(reviews, key=lambda row: row["timestamp"]):
        earliest.setdefault((row["user_id"], row["parent_asin"]), row)
    names = ("user_id", "parent_asin", "rating", "timestamp")
    lines = [",".join(names), *(",".join(str(row[name]) for name in names) for row in core(list(earliest.values()), 5))]
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "Toys.csv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    table, catalogue, name, report, *_ = AmazonReviews2023("Toys", str(tmp_path), **options).read()
    assert name.endswith("Toys.csv.gz")
    assert catalogue.fingerprint == raw.catalogue.fingerprint
    assert sorted(zip(table.timestamp, table.item, strict=True)) == sorted(
        zip(raw.table.timestamp, raw.table.item, strict=True)
    )
    assert report["Toys.csv.gz: reviews outside of the 5-core of the category: dropped"] == 0


def test_an_empty_category_and_an_empty_window(tmp_path):
    reviews, metadata = random_dump()
    write_amazon(tmp_path, [], metadata)
    with pytest.raises(InputError, match=r"Toys\.jsonl\.gz holds no reviews: give the file of another category"):
        AmazonReviews2023("Toys", str(tmp_path)).read()
    write_amazon(tmp_path, reviews, metadata)
    with pytest.raises(InputError, match=r"no review of Toys is left of \d+ between 2024-01-01 and 2024-02-01 with"):
        AmazonReviews2023("Toys", str(tmp_path), "2024-01-01", "2024-02-01", min_items=0).read()
    with pytest.raises(InputError, match="start='soon' is not a date: write YYYY-MM-DD"):
        AmazonReviews2023("Toys", str(tmp_path), "soon").read()


def test_missing_and_damaged_files_are_named(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"does not hold Music\.csv or Music\.jsonl \(or \.gz\): download .* into it"):
        AmazonReviews2023("Music", str(tmp_path)).read()
    write_amazon(tmp_path, *random_dump())
    path = tmp_path / "Toys.jsonl.gz"
    whole = gzip.decompress(path.read_bytes())
    lines = whole.splitlines(keepends=True)
    for broken in (
        b"{no json}\n",
        b'["a list"]\n',
        json.dumps({"user_id": "é"}, ensure_ascii=False).encode("cp1252") + b"\n",
    ):
        path.write_bytes(gzip.compress(b"".join([*lines[:2], broken, *lines[3:]])))
        with pytest.raises(
            InputError, match=r"Toys\.jsonl\.gz, line 3: not (a JSON object|UTF-8 text.*: save the)"
        ) as raised:
            AmazonReviews2023("Toys", str(tmp_path)).read()
        assert "\n" not in str(raised.value)
    path.write_bytes(gzip.compress(whole)[:-20])
    with pytest.raises(InputError, match=r"Toys\.jsonl\.gz, after line \d+: damaged or truncated"):
        AmazonReviews2023("Toys", str(tmp_path)).read()
    (tmp_path / "meta_Toys.jsonl.gz").unlink()
    path.write_bytes(gzip.compress(whole))
    with pytest.raises(InputError, match=r"does not hold meta_Toys\.jsonl"):
        AmazonReviews2023("Toys", str(tmp_path)).read()


def test_a_hub_out_of_reach_says_which_folder_to_fill():
    with pytest.raises(InputError, match=r"cannot be downloaded \(.*put them into a folder and give that") as raised:
        AmazonReviews2023("CDs_and_Vinyl").read()
    assert "meta_CDs_and_Vinyl.jsonl.gz" in str(raised.value)
    assert "\n" not in str(raised.value)
