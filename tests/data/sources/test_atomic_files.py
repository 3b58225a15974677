import subprocess
import sys
import time

import numpy as np
import pytest

from minirec_pl.data.sources.atomic_files import read_atomic
from minirec_pl.utils.errors import InputError

HEADER = "user_id:token\titem_id:token\ttags:token_seq\tvector:float_seq\ttimestamp:float\n"


@pytest.fixture
def write(tmp_path):
    def write_text(text, name="toy.inter"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_text


def test_types_order_and_values(write):
    frame = read_atomic(write(HEADER + "007\tNA\ta b\t0.5 1\t881250949\nnull\t2\t\t\t8.5e8\n"))
    assert list(frame.columns) == ["user_id", "item_id", "tags", "vector", "timestamp"]
    assert frame["user_id"].tolist() == ["007", "null"]
    assert frame["item_id"].tolist() == ["NA", "2"]
    assert frame["tags"].tolist() == ["a b", ""]
    assert frame["vector"].tolist() == ["0.5 1", ""]
    assert frame["timestamp"].dtype == np.float64
    assert frame["timestamp"].tolist() == [881250949.0, 8.5e8]


def test_renames_carriage_returns_and_byte_order_mark(write):
    path = write(b"\xef\xbb\xbf" + b"item_id:token\tmovie_title:token_seq\r\n1\tCaf\xc3\xa9\x0b au lait\r\n")
    frame = read_atomic(path, {"movie_title": "title"}, required=("title",))
    assert frame.to_dict("records") == [{"item_id": "1", "title": "Café\x0b au lait"}]


def test_reordered_columns_are_read_by_name(write):
    frame = read_atomic(write("timestamp:float\tuser_id:token\n5\ta\n6\tb"))
    assert frame["user_id"].tolist() == ["a", "b"]
    assert frame["timestamp"].tolist() == [5.0, 6.0]


def test_missing_numbers_are_not_numbers(write):
    frame = read_atomic(write(HEADER + "u\ti\tt\t1\tnan\nu\t\tt\t1\t\nu\ti\tt\t1\tNULL\nu\ti\tt\t1\t5\n"))
    assert np.array_equal(frame["timestamp"], [np.nan, np.nan, np.nan, 5], equal_nan=True)
    assert frame["item_id"].tolist() == ["i", "", "i", "i"]


def test_header_alone_gives_no_rows(write):
    frame = read_atomic(write(HEADER))
    assert len(frame) == 0
    assert frame["timestamp"].dtype == np.float64


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["empty", "header"]),
        ("user_id\titem_id\n1\t2\n", ["line 1", "'user_id'", "name:type"]),
        ("196\t242\t3\t881250949\n", ["line 1", "'196'", "name:type"]),
        ("user_id:int\n1\n", ["line 1", "user_id", "'int'", "token_seq"]),
        ("a:token\ta:float\n1\t2\n", ["line 1", "column a", "twice"]),
        (HEADER + "u\ti\tt\t1\t5\nu\ti\tt\n", ["line 3", "3 fields instead of the 5", "truncated"]),
        (HEADER + "u\ti\tt\n" + "u\ti\tt\t1\t5\n", ["line 2", "3 fields", "fix"]),
        (HEADER + "u\ti\tt\t1\t5\t6\n", ["line 2", "6 fields", "timestamp"]),
        (HEADER + "u\ti\tt\t1\t5\n\nu\ti\tt\t1\t5\n", ["line 3", "0 fields"]),
        (HEADER + "u\ti\tt\t1\t5\nu\ti\tt\t1\tfive\n", ["line 3", "timestamp", "'five'", "finite"]),
        (HEADER + "u\ti\tt\t1\tinf\n", ["line 2", "timestamp", "'inf'"]),
        (HEADER + "u\ti\tt\t1\t881250949\nu\ti\tt\t1\t8812", ["line 3", "timestamp", "'8812'", "truncated"]),
        (HEADER.encode() + b"u\ti\tt\t1\t5\n\xe9\ti\tt\t1\t5\n", ["line 3", "UTF-8"]),
    ],
)
def test_bad_files_get_one_sentence_with_the_place(write, text, parts):
    path = write(text)
    with pytest.raises(InputError) as raised:
        read_atomic(path)
    message = str(raised.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert all(part in message for part in parts), message


def test_missing_file_folder_and_column(tmp_path, write):
    with pytest.raises(InputError, match="does not exist"):
        read_atomic(tmp_path / "none.inter")
    with pytest.raises(InputError, match="is a folder"):
        read_atomic(tmp_path)
    with pytest.raises(InputError, match="no column timestamp among user_id"):
        read_atomic(write("user_id:token\n1\n"), required=("user_id", "timestamp"))


def test_a_hundred_thousand_lines_are_read_fast(write):
    rng = np.random.default_rng(0)
    users, items, times = rng.integers(0, 943, 100_000), rng.integers(0, 1682, 100_000), rng.integers(1, 10**9, 100_000)
    body = "".join(f"{u}\t{i}\ta\t0\t{t}\n" for u, i, t in zip(users, items, times, strict=True))
    path = write(HEADER + body)
    begin = time.process_time()
    frame = read_atomic(path)
    assert time.process_time() - begin < 2
    assert frame["timestamp"].tolist() == times.tolist()
    assert frame["user_id"].tolist() == [str(u) for u in users]


def test_reader_and_fetcher_start_without_torch():
    code = "import sys, minirec_pl.data.sources.atomic_files, minirec_pl.data.fetch; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
