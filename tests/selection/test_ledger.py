import os

import numpy as np
import pandas as pd
import pytest
import torch

from minirec_pl.selection import SelectionLedger
from minirec_pl.utils.errors import InputError


def table() -> pd.DataFrame:
    nan = np.nan
    return pd.DataFrame(
        {
            "sample_id": [9, 3, 5, 7, 1],
            "rank": pd.array([2, 1, pd.NA, 3, pd.NA], dtype="Int64"),
            "learnability": [0.5, 1.0, 0.0, 0.25, nan],
            "representativeness": [0.5, 0.75, 0.5, 1.0, nan],
            "novelty": [0.5, 1.0, nan, 0.125, nan],
            "value": [0.5, 1.75, nan, 0.15625, nan],
            "reward_mean": [0.25, 0.5, 0.0, 0.75, nan],
            "reward_std": [0.25, 0.5, 0.0, 0.25, nan],
            "n_rollouts": [4, 4, 4, 4, 0],
            "difficulty": [0.25, 0.5, 0.0, 0.75, nan],
            "reason": ["selected", "selected", "too_hard", "filled", "never_scored"],
        }
    )


def test_selected_is_ranked_and_a_smaller_budget_is_a_prefix():
    ledger = SelectionLedger(table())
    assert ledger.selected() == [3, 9, 7]
    assert ledger.selected(2) == [3, 9]
    assert ledger.n_selected == 3
    assert len(ledger) == 5
    assert ledger.table["sample_id"].tolist() == [1, 3, 5, 7, 9]


@pytest.mark.parametrize("k", [0, 4])
def test_budget_beyond_the_picks(k):
    with pytest.raises(InputError, match="3 picks"):
        SelectionLedger(table()).selected(k)


def test_parquet_round_trip(tmp_path):
    ledger = SelectionLedger(table())
    path = ledger.to_parquet(tmp_path / "run" / "ledger.parquet")
    pd.testing.assert_frame_equal(SelectionLedger.from_parquet(path).table, ledger.table)
    assert os.listdir(path.parent) == ["ledger.parquet"]


def test_state_passes_a_weights_only_checkpoint(tmp_path):
    ledger = SelectionLedger(table())
    torch.save(ledger.state_dict(), tmp_path / "ledger.pt")
    loaded = SelectionLedger.from_state_dict(torch.load(tmp_path / "ledger.pt", weights_only=True))
    pd.testing.assert_frame_equal(loaded.table, ledger.table)


@pytest.mark.parametrize(
    ("sample_id", "words"),
    [
        (3, ["pick 1 of 3", "learnability 1", "value 1.75", "reward mean 0.5", "4 rollouts"]),
        (5, ["not picked", "too hard"]),
        (7, ["pick 3 of 3", "fill the budget"]),
        (1, ["not picked", "never measured", "0 rollouts"]),
    ],
)
def test_explain_says_why(sample_id, words):
    sentence = SelectionLedger(table()).explain(sample_id)
    assert sentence.startswith(f"sample {sample_id} ")
    assert all(word in sentence for word in words), sentence
    assert "nan" not in sentence


def test_explain_of_a_stranger():
    with pytest.raises(InputError, match="sample_id 2 is not in the ledger"):
        SelectionLedger(table()).explain(2)


def damaged(name: str) -> pd.DataFrame:
    broken = table()
    if name == "column":
        return broken.drop(columns="novelty")
    if name == "type":
        broken["learnability"] = "high"
    if name == "repeated":
        broken["sample_id"] = [9, 3, 5, 7, 9]
    if name == "ranks":
        broken["rank"] = pd.array([2, 1, pd.NA, 4, pd.NA], dtype="Int64")
    if name == "reason":
        broken["reason"] = ["selected", "selected", "luck", "filled", "never_scored"]
    if name == "disagree":
        broken["reason"] = ["selected", "selected", "selected", "filled", "never_scored"]
    return broken


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("column", "has no column novelty"),
        ("type", "column of a wrong type"),
        ("repeated", "more than one row for sample_id 9"),
        ("ranks", r"ranks that are not 1\.\.3"),
        ("reason", "unknown reason 'luck'"),
        ("disagree", "rank and reason disagree"),
    ],
)
def test_damaged_ledger_is_refused_with_the_file_named(name, message, tmp_path):
    path = tmp_path / "ledger.parquet"
    damaged(name).to_parquet(path)
    with pytest.raises(InputError, match=rf"ledger\.parquet .*{message}"):
        SelectionLedger.from_parquet(path)


def test_unreadable_and_missing_files(tmp_path):
    path = tmp_path / "ledger.parquet"
    with pytest.raises(InputError, match="there is no ledger at"):
        SelectionLedger.from_parquet(path)
    path.write_bytes(b"not parquet")
    with pytest.raises(InputError, match="not a readable parquet file"):
        SelectionLedger.from_parquet(path)
    SelectionLedger(table()).to_parquet(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match="not a readable parquet file"):
        SelectionLedger.from_parquet(path)
