"""`minirec select` by its command line."""

import json
import os

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.cli_tools import sentence
from helpers.paths import GOLDEN
from matplotlib.image import imread

from minirec_pl.cli.main import main
from minirec_pl.selection import SampleSignals, SelectionLedger, SignalStore, fold_curriculum, maxmin_select

FILES = {
    *("ledger.parquet", "selected.npy", "selected.txt", "plan.npy", "plan.txt", "plan.parquet"),
    *("diagnostics.json", "selection.png"),
}


def write_signals(path, n=40, seed=0, **fingerprints):
    random = torch.Generator().manual_seed(seed)
    store = SignalStore(range(10, 10 + n), fingerprints=fingerprints)
    rewards = (torch.rand(n, 4, generator=random) < torch.rand(n, 1, generator=random)).double()
    gradient, embedding = torch.randn(n, 3, generator=random), torch.randn(n, 5, generator=random)
    store.update(SampleSignals(store.sample_ids, rewards, gradient, embedding), epoch=0, step=0, source="score")
    return store.save(path)


def test_files_of_a_selection(tmp_path, capsys):
    signals = write_signals(tmp_path / "s.safetensors", model="m")
    to = tmp_path / "out"
    options = ["--budget", "0.3", "--mode", "official", "--folds", "3", "--seed", "7", "--to", str(to)]
    assert main(["select", str(signals), *options]) == 0
    assert set(os.listdir(to)) == FILES
    ledger = SelectionLedger.from_parquet(to / "ledger.parquet")
    assert ledger.fingerprints == {"model": "m"}
    assert ledger.n_selected == 12
    picks = ledger.selected()
    assert np.load(to / "selected.npy").tolist() == picks
    assert [int(line) for line in (to / "selected.txt").read_text().split()] == picks
    plan = fold_curriculum(picks, ledger.rows(picks)["reward_mean"].to_numpy(copy=True), 3, seed=7)
    assert np.load(to / "plan.npy").tolist() == plan
    assert [int(line) for line in (to / "plan.txt").read_text().split()] == plan
    table = pd.read_parquet(to / "plan.parquet")
    assert table["sample_id"].tolist() == plan
    assert table["fold"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert table["easiness"].tolist() == ledger.rows(plan)["reward_mean"].tolist()
    assert json.loads((to / "diagnostics.json").read_text())["n_selected"] == 12
    assert imread(to / "selection.png").std() > 0.01
    out = capsys.readouterr().out
    assert "12 of 40 samples" in out
    assert str(to / "selection.png") in out


@pytest.mark.parametrize("name", ["PredictedSelector", "MoPPSSelector", "GRESOSelector"])
def test_scores_alone_tell_a_selector_nothing_that_goes_by_the_outcomes_of_training(name, tmp_path, capsys):
    signals, to = write_signals(tmp_path / "s.safetensors"), tmp_path / "out"
    command = ["select", str(signals), "--selector", name, "--to", str(to)]
    assert main(command) == 2
    assert f"{name} goes by the rollouts met in training, and {signals} holds none: give the" in sentence(capsys)
    assert not to.exists()
    store = SignalStore.load(signals)
    store.update(SampleSignals([12], rewards=[[1.0, 0.0]]), epoch=0, step=1, source="train")
    store.save(signals)
    assert main(command) == 0
    assert len(SelectionLedger.from_parquet(to / "ledger.parquet").selected()) == 4


def test_a_second_run_replaces_the_first(tmp_path):
    signals, to = write_signals(tmp_path / "s.safetensors"), tmp_path / "out"
    for k in ("9", "4"):
        assert main(["select", str(signals), "--budget", k, "--mode=official", "--to", str(to)]) == 0
    assert SelectionLedger.from_parquet(to / "ledger.parquet").n_selected == 4
    assert set(os.listdir(to)) == FILES


@pytest.mark.skipif(not GOLDEN.is_file(), reason="the published figures are not on this machine")
def test_published_rewards_and_random_embeddings(tmp_path, capsys):
    published = np.load(GOLDEN)
    rows = zip(published["sample_id"].tolist(), published["rewards"].tolist(), strict=True)
    lines = [json.dumps({"sample_id": str(i), "reward": reward}) for i, reward in rows]
    (tmp_path / "rewards.jsonl").write_text("\n".join(lines))
    embedding = np.random.default_rng(0).standard_normal((len(lines), 64)).astype(np.float16)
    np.save(tmp_path / "e.npy", embedding)
    to = tmp_path / "out"
    vectors = ["--embeddings", str(tmp_path / "e.npy")]
    options = [*vectors, "--mode", "official", "--budget", "256", "--to", str(to)]
    assert main(["select", str(tmp_path / "rewards.jsonl"), *options]) == 0
    assert set(os.listdir(to)) == FILES
    score = torch.from_numpy(published["learnability"]) + 0.5
    assert np.load(to / "selected.npy").tolist() == maxmin_select(embedding, score, 256).indices.tolist()
    warnings = json.loads((to / "diagnostics.json").read_text())["warnings"]
    assert warnings[0].startswith("learnability is below 0.05 for 97% of the scored pool")
    out = " ".join(capsys.readouterr().out.split())
    assert "learnability is below 0.05 for 97%" in out
    assert "representativeness is the same for all samples" in out


def test_selectors_by_name_and_coverage(tmp_path, capsys):
    signals, to = write_signals(tmp_path / "s.safetensors"), tmp_path / "out"
    users = pd.DataFrame({"sample_id": range(10, 50), "user_id": np.arange(40) % 4, "item_id": range(40)})
    users.to_parquet(tmp_path / "samples.parquet")
    options = ["--budget", "6", "--to", str(to)]
    assert main(["select", str(signals), "--selector", "RandomSelector", "--selector.seed=5", *options]) == 0
    first = np.load(to / "selected.npy").tolist()
    assert json.loads((to / "diagnostics.json").read_text())["coverage"]["item_id"] == 6 / 40
    users.head(1).to_csv(tmp_path / "one.csv", index=False)
    name = "--selector=minirec_pl.selection.RandomSelector"
    assert main(["select", str(signals), name, "--selector.seed=5", *options]) == 0
    assert np.load(to / "selected.npy").tolist() == first
    assert main(["select", str(signals), "--samples", str(tmp_path / "one.csv"), *options]) == 2
    assert "no row for sample_id 11" in sentence(capsys)


def test_a_gate_nothing_passes_and_a_short_pick(tmp_path, capsys):
    signals, to = write_signals(tmp_path / "s.safetensors"), tmp_path / "out"
    options = ["--budget", "30", "--to", str(to)]
    assert main(["select", str(signals), "--selector.gate=[0.4,0.6]", *options]) == 0
    diagnostics = json.loads((to / "diagnostics.json").read_text())
    assert diagnostics["n_selected"] < 30
    assert "samples instead of 30" in diagnostics["warnings"][0]
    assert main(["select", str(signals), "--selector.gate=[0.45,0.46]", "--to", str(tmp_path / "none")]) == 2
    assert "widen the gate" in sentence(capsys)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "0"], "budget is 0"),
        (["--budget", "1.5"], "a fraction above 1: give at most 1.0"),
        (["--budget", "41"], "budget is 41 samples but the pool has 40"),
        (["--budget", "many"], "budget"),
        (["--folds", "0", "--budget", "8"], "n_folds is 0: give 1 to 8"),
        (["--mode", "best"], "mode"),
        (["--selector", "NoSelector"], "NoSelector"),
        (["--selector.alfa=1"], "alfa"),
        (["--selector.gate=[0.9,0.1]"], "give [low, high] with low below high"),
        (["--samples", "missing.parquet"], "there is no table of samples at missing.parquet"),
        (["--what"], "what"),
    ],
)
def test_bad_options_are_one_sentence(tmp_path, capsys, options, message):
    signals, to = write_signals(tmp_path / "s.safetensors"), tmp_path / "out"
    assert main(["select", str(signals), "--to", str(to), *options]) == 2
    said = sentence(capsys)
    assert message in said
    assert len(said) < 600
    assert not to.exists()


def test_bad_signals_leave_nothing(tmp_path, capsys):
    to = tmp_path / "out"
    assert main(["select", str(tmp_path / "none.safetensors"), "--to", str(to)]) == 2
    assert "there are no signals at" in sentence(capsys)
    shards = [write_signals(tmp_path / f"{name}.safetensors", model=name) for name in "ab"]
    assert main(["select", *map(str, shards), "--to", str(to)]) == 2
    assert "was measured with another model" in sentence(capsys)
    assert not to.exists()


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    signals = write_signals(tmp_path / "s.safetensors")
    (tmp_path / "file").write_text("")
    assert main(["select", str(signals), "--budget", "4", "--to", str(tmp_path / "file" / "out")]) == 2
    assert "choose another folder with --to" in sentence(capsys)


def test_a_fault_while_writing_leaves_the_old_files(tmp_path, capsys, monkeypatch):
    signals, to = write_signals(tmp_path / "s.safetensors"), tmp_path / "out"
    assert main(["select", str(signals), "--budget", "4", "--to", str(to)]) == 0
    before = {name: (to / name).read_bytes() for name in os.listdir(to)}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    assert main(["select", str(signals), "--budget", "9", "--to", str(to)]) == 2
    assert "no space left on device" in sentence(capsys)
    assert {name: (to / name).read_bytes() for name in os.listdir(to)} == before


def test_help_names_the_options(capsys):
    assert main(["select", "--help"]) == 0
    out = capsys.readouterr().out
    for option in ("--budget", "--mode", "--selector", "--folds", "--embeddings", "--to"):
        assert option in out
