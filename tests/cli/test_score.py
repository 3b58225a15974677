"""`minirec score`, and the paper's three steps as three commands."""

import json
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.cli_tools import REPOSITORY, results, sentence

from minirec_pl import RecDataModule
from minirec_pl.callbacks import EasyToHardCurriculum
from minirec_pl.cli.main import main
from minirec_pl.selection import SelectionLedger, SignalStore


def score(command, root, *more):
    return ["score", *command.grpo(root, *more)[1:]]


@pytest.fixture
def data(command):
    made = RecDataModule(str(command.data), "toy", warm_fraction=0.8, history_window=10)
    made.setup("fit")
    return made


def test_the_three_steps(command, data, tmp_path, capsys):
    assert main(score(command, tmp_path / "runs", "--to", str(tmp_path / "score"))) == 0
    assert f"signals: {tmp_path / 'score' / 'signals.safetensors'}" in capsys.readouterr().out
    store = SignalStore.load(tmp_path / "score" / "signals.safetensors")
    assert store.sample_ids.tolist() == data.pool_ids.tolist()
    assert store.fingerprints["data"] == data.fingerprint
    assert len(store.fingerprints["model"]) == 64
    assert store.fingerprints["seed"] == "42"
    samples = pd.read_parquet(tmp_path / "score" / "samples.parquet")
    row = samples.set_index("sample_id").loc[data.pool_ids[3]]
    assert row["user_id"] == data.table.user_ids[data.table.user[data.pool_ids[3]]]
    assert row["item_id"] == data.catalogue.item_ids[data.table.item[data.pool_ids[3]]]
    cost = json.loads((tmp_path / "score" / "results.json").read_text())
    assert cost["tokens"]["forward"] > 0
    assert cost["seconds"]["scoring"] > 0

    options = ["--selector.difficulty=pass_at_group", "--selector.gate=[0,1]", "--folds=4"]
    signals = str(tmp_path / "score" / "signals.safetensors")
    assert main(["select", signals, "--budget=24", *options, "--to", str(tmp_path / "select")]) == 0
    ledger = tmp_path / "select" / "ledger.parquet"
    assert set(json.loads((tmp_path / "select" / "diagnostics.json").read_text())["coverage"]) == {"user_id", "item_id"}

    fit = [
        "--selection=minirec_pl.callbacks.SelectSamples",
        f"--selection.ledger={ledger}",
        "--selection.budget=null",
        "--trainer.callbacks+=minirec_pl.callbacks.EasyToHardCurriculum",
        "--trainer.callbacks.n_folds=4",
    ]
    arguments = command.fit("quickstart.yaml", tmp_path / "fit", *fit, "--model.num_generations=4")
    assert main([*arguments, f"--model.policy.pretrained={command.policy}"]) == 0
    run = tmp_path / "fit" / "latest"
    trained = json.loads((run / "results.json").read_text())
    assert (trained["samples_per_epoch"], trained["distinct_samples"]) == (24, 24)
    assert trained["rollouts"]["scoring"] == 0
    assert (
        SelectionLedger.from_parquet(run / "ledger.parquet").selected()
        == np.load(ledger.parent / "selected.npy").tolist()
    )


def test_a_fixed_ledger_is_trained_easy_to_hard_by_its_own_plan(command, data, tmp_path, make_trainer):
    from lightning.pytorch import Callback

    from minirec_pl import GRPORecModule
    from minirec_pl.callbacks import SelectSamples
    from minirec_pl.policy import GenerativePolicy

    assert main(score(command, tmp_path / "runs", "--to", str(tmp_path / "score"))) == 0
    signals = str(tmp_path / "score" / "signals.safetensors")
    options = ["--selector.difficulty=pass_at_group", "--selector.gate=[0,1]", "--folds=2", "--budget=20"]
    assert main(["select", signals, *options, "--to", str(tmp_path / "select")]) == 0

    class Seen(Callback):
        def __init__(self):
            self.ids = []

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.ids += batch["sample_id"].tolist()

    seen = Seen()
    parts = [SelectSamples(None, ledger=str(tmp_path / "select" / "ledger.parquet")), EasyToHardCurriculum(n_folds=2)]
    policy = GenerativePolicy(pretrained=str(command.policy))
    make_trainer(callbacks=[*parts, seen], max_epochs=1).fit(GRPORecModule(policy, num_generations=4), data)
    assert seen.ids == np.load(tmp_path / "select" / "plan.npy").tolist()


def test_a_ledger_of_other_data_is_refused(command, data, tmp_path, capsys):
    assert main(score(command, tmp_path / "runs", "--to", str(tmp_path / "score"))) == 0
    signals = str(tmp_path / "score" / "signals.safetensors")
    assert main(["select", signals, "--selector=RandomSelector", "--budget=9", "--to", str(tmp_path / "select")]) == 0
    path = tmp_path / "select" / "ledger.parquet"
    ledger = SelectionLedger.from_parquet(path)
    ledger.fingerprints["data"] = "0" * 64
    ledger.to_parquet(path)
    fit = ["--selection=minirec_pl.callbacks.SelectSamples", f"--selection.ledger={path}"]
    arguments = command.fit("quickstart.yaml", tmp_path / "fit", *fit, "--model.num_generations=4")
    assert main([*arguments, f"--model.policy.pretrained={command.policy}"]) == 2
    assert "ledger.parquet was made for other data" in sentence(capsys)


@pytest.mark.slow
def test_shards_make_the_whole(command, tmp_path):
    for part in ("1/1", "1/3", "2/3", "3/3"):
        to = tmp_path / part.replace("/", "of")
        assert main(score(command, tmp_path / "runs", "--to", str(to), "--shard", part)) == 0
    shards = [str(tmp_path / f"{part}of3" / "signals.safetensors") for part in (1, 2, 3)]
    options = ["--selector.difficulty=pass_at_group", "--selector.gate=[0,1]", "--budget=24"]
    assert main(["select", *shards, *options, "--to", str(tmp_path / "a")]) == 0
    assert main(["select", str(tmp_path / "1of1" / "signals.safetensors"), *options, "--to", str(tmp_path / "b")]) == 0
    assert np.load(tmp_path / "a" / "plan.npy").tolist() == np.load(tmp_path / "b" / "plan.npy").tolist()


@pytest.mark.slow
def test_two_processes_score_like_one(command, tmp_path):
    assert main(score(command, tmp_path / "runs", "--to", str(tmp_path / "one"))) == 0
    ranks = ["--trainer.devices=2", "--trainer.strategy=ddp", "--to", str(tmp_path / "two")]
    arguments = score(command, tmp_path / "runs", *ranks)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("MINIREC_RUN_DIR", "LOCAL_RANK", "MASTER_PORT"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, "-m", "minirec_pl", *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    one, two = (SignalStore.load(tmp_path / name / "signals.safetensors") for name in ("one", "two"))
    for name in ("reward_mean", "solve_probability", "gradient", "embedding"):
        wanted, found = (getattr(store.read(store.sample_ids), name) for store in (one, two))
        torch.testing.assert_close(found, wanted, equal_nan=True)
    assert sorted(os.listdir(tmp_path / "two")) == ["results.json", "samples.parquet", "signals.safetensors"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard=4/3"], "shard is '4/3': write 2/4"),
        (["--shard=0/3"], "shard is '0/3'"),
        (["--shard=1"], "shard is '1'"),
        (["--shard=5000/5000"], "shard 5000/5000 is empty"),
    ],
)
def test_bad_shards(command, tmp_path, capsys, options, message):
    assert main(score(command, tmp_path / "runs", *options)) == 2
    assert message in sentence(capsys)


def test_a_module_that_cannot_be_scored(command, tmp_path, capsys):
    assert main(["score", *command.warm(tmp_path / "runs")[1:]]) == 2
    assert "WarmStartModule cannot be scored" in sentence(capsys)


def test_scoring_leaves_a_run_folder_without_loggers(command, tmp_path):
    loggers = ["--trainer.logger=lightning.pytorch.loggers.WandbLogger"]
    assert main(score(command, tmp_path / "runs", *loggers)) == 0
    run = tmp_path / "runs" / "version_0"
    assert sorted(os.listdir(run)) == ["config.yaml", "results.json", "samples.parquet", "signals.safetensors"]
    assert results(run)["stage"] == "score"
