import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from minirec_pl.selection import SampleSignals, SignalStore
from minirec_pl.selection.signal_sources import read_signals
from minirec_pl.utils.errors import InputError

REWARDS = {7: [1.0, 0.0], 3: [0.25, 0.75], 5: [0.0, 0.0]}


def write_lines(path, rows):
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def lines(tmp_path, **more):
    rows = [{"sample_id": str(i), "reward": r, "ndcg": r, **more} for i, r in REWARDS.items()]
    return write_lines(tmp_path / "rewards.jsonl", rows)


def test_json_lines_as_published(tmp_path):
    np.save(tmp_path / "e.npy", np.arange(12, dtype=np.float16).reshape(3, 4))
    signals = read_signals([lines(tmp_path)], embeddings=tmp_path / "e.npy").signals
    assert signals.sample_id.tolist() == [3, 5, 7]
    assert signals.reward_mean.tolist() == [0.5, 0.0, 0.5]
    assert signals.reward_std.tolist() == [0.25, 0.0, 0.5]
    assert signals.n_rollouts.tolist() == [2, 2, 2]
    assert signals.embedding.dtype == torch.float16
    assert signals.embedding[:, 0].tolist() == [0, 4, 8]
    assert signals.gradient is None


def test_ids_name_the_rows_of_arrays(tmp_path):
    np.save(tmp_path / "g.npy", np.arange(8.0).reshape(4, 2))
    (tmp_path / "ids.txt").write_text("5\n7\n99\n3\n")
    np.save(tmp_path / "ids.npy", np.array([5, 7, 99, 3]))
    for ids in ("ids.txt", "ids.npy"):
        got = read_signals([lines(tmp_path)], gradients=tmp_path / "g.npy", ids=tmp_path / ids).signals
        assert got.gradient[:, 0].tolist() == [6, 0, 2]


def test_parquet_and_store_and_json_say_the_same(tmp_path):
    torch.manual_seed(0)
    ids, rewards, gradient = torch.tensor([4, 1, 9]), torch.rand(3, 2).double(), torch.randn(3, 5)
    embedding, solve = torch.randn(3, 2), torch.rand(3).double()
    store = SignalStore(ids, fingerprints={"model": "m"})
    store.update(SampleSignals(ids, rewards, gradient, embedding, solve), epoch=3, step=9, source="score")
    columns = {
        "sample_id": ids.tolist(),
        "rewards": rewards.tolist(),
        "gradient": gradient.tolist(),
        "embedding": embedding.tolist(),
        "solve_probability": solve.tolist(),
    }
    pd.DataFrame(columns).to_parquet(tmp_path / "s.parquet")
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    read = [
        read_signals([store.save(tmp_path / "s.safetensors")]),
        read_signals([tmp_path / "s.parquet"]),
        read_signals([write_lines(tmp_path / "s.jsonl", rows)]),
    ]
    assert [found.fingerprints for found in read] == [{"model": "m"}, {}, {}]
    for found in read[1:]:
        for name in ("sample_id", "reward_mean", "reward_std", "solve_probability", "gradient", "embedding"):
            assert torch.equal(getattr(found.signals, name), getattr(read[0].signals, name)), name


def test_shards_are_merged(tmp_path):
    for rank in range(2):
        store = SignalStore([rank, rank + 2], fingerprints={"model": "m"})
        store.update(SampleSignals([rank], rewards=[[1.0, 0.0]]), epoch=0, step=0, source="score")
        store.save(tmp_path / f"{rank}.safetensors")
    found = read_signals([tmp_path / "0.safetensors", tmp_path / "1.safetensors"])
    assert found.signals.sample_id.tolist() == [0, 1, 2, 3]
    assert found.signals.n_rollouts.tolist() == [2, 2, 0, 0]
    other = SignalStore([8], fingerprints={"model": "n"}).save(tmp_path / "2.safetensors")
    with pytest.raises(InputError, match=r"2\.safetensors was measured with another model than .*0\.safetensors"):
        read_signals([tmp_path / "0.safetensors", other])


GOOD = {"sample_id": 1, "rewards": [1.0, 0.0]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "is empty: give a line per sample"),
        ([GOOD, "{"], "line 2 is not a JSON object with an integer sample_id"),
        ([GOOD, "[1]"], "line 2 is not a JSON object"),
        ([{"sample_id": "x", "rewards": [1.0]}], "line 1 is not a JSON object with an integer sample_id"),
        ([GOOD, GOOD], "sample_id 1 comes more than once"),
        ([{"sample_id": 1}], "neither rewards nor solve_probability"),
        ([GOOD, {"sample_id": 2}], "sample_id 2 has no rewards but others have"),
        ([GOOD, {"sample_id": 2, "rewards": [1.0]}], "rewards of sample_id 2 has 1 numbers, that of sample_id 1 2"),
        ([GOOD, {"sample_id": 2, "rewards": []}], "rewards of sample_id 2 is not a list of numbers"),
        ([GOOD, {"sample_id": 2, "rewards": 0.5}], "rewards of sample_id 2 is not a list of numbers"),
        ([GOOD, {"sample_id": 2, "rewards": [1.0, "a"]}], "rewards of sample_id 2 holds 'a'"),
        ([GOOD, {"sample_id": 2, "rewards": [1.0, None]}], "rewards of sample_id 2 .*None|NaN.* sample_id 2"),
        ([GOOD, '{"sample_id": 2, "rewards": [1.0, NaN]}'], "rewards is NaN or infinite for sample_id 2"),
        ([{"sample_id": 3, "solve_probability": 1.5}], r"solve_probability is outside \[0, 1\] for sample_id 3"),
        ([{"sample_id": 3, "solve_probability": "1"}], "solve_probability of sample_id 3 holds '1'"),
    ],
)
def test_bad_lines_are_named(tmp_path, rows, message):
    path = write_lines(tmp_path / "rewards.jsonl", rows)
    with pytest.raises(InputError, match=message) as error:
        read_signals([path])
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_arrays_are_named(tmp_path):
    path, array, ids = lines(tmp_path), tmp_path / "e.npy", tmp_path / "ids.txt"
    ids.write_text("3\n5\n7\n")

    def refuse(message, **options):
        with pytest.raises(InputError, match=message):
            read_signals([path], embeddings=array, **options)

    refuse("there are no vectors at")
    array.write_bytes(b"no array")
    refuse("is not a readable .npy array")
    np.save(array, np.array([{}, {}, {}]), allow_pickle=True)
    refuse("is not a readable .npy array")
    np.save(array, np.ones((3, 2), dtype=np.int64))
    refuse(r"save floats \[N, D\]")
    np.save(array, np.ones((2, 2)))
    refuse(r"has 2 rows but .*rewards\.jsonl has 3 sample_ids")
    refuse(r"has 2 rows but .*ids\.txt names 3", ids=ids)
    np.save(array, np.array([[1.0], [np.nan], [2.0]]))
    refuse("embedding is NaN or infinite for sample_id 5")
    np.save(array, np.ones((3, 2)))
    ids.write_text("3\n5\n5\n")
    refuse("sample_id 5 comes more than once", ids=ids)
    ids.write_text("3\n5\n8\n")
    refuse("has no row for sample_id 7", ids=ids)
    ids.write_text("three\n")
    refuse("is not a list of integers", ids=ids)
    refuse("there are no ids at", ids=tmp_path / "none.txt")


def test_bad_files_are_named(tmp_path):
    with pytest.raises(InputError, match="there are no signals at"):
        read_signals([tmp_path / "none.jsonl"])
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(InputError, match=r"ends in \.safetensors, \.parquet, \.jsonl"):
        read_signals([tmp_path / "a.csv"])
    (tmp_path / "a.parquet").write_text("x")
    with pytest.raises(InputError, match="not a readable parquet file"):
        read_signals([tmp_path / "a.parquet"])
    pd.DataFrame({"sample_id": ["a"], "rewards": [[1.0]]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="no column sample_id of integers"):
        read_signals([tmp_path / "a.parquet"])
    path = SignalStore([1]).save(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="has its own vectors"):
        read_signals([path], embeddings=tmp_path / "a.npy")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="is damaged or truncated"):
        read_signals([path])


def test_an_array_is_not_read_whole(tmp_path):
    np.save(tmp_path / "e.npy", np.ones((3, 4), dtype=np.float16))
    signals = read_signals([lines(tmp_path)], embeddings=tmp_path / "e.npy").signals
    mapped = Path("/proc/self/maps")
    if mapped.is_file():
        assert str(tmp_path / "e.npy") in mapped.read_text()
    assert signals.embedding.shape == (3, 4)
