"""kill -9 anywhere in a run, then the documented command: one run, in its folder, the same as one never killed."""

import os
import re
import shlex

import pandas as pd
import pytest
import torch
import yaml
from helpers.cli_tools import CONFIGS, TINY, equal_weights, results, write_toy
from helpers.kill_places import minirec

pytestmark = pytest.mark.slow

WARM = "{epochs: 2, batch_size: 8, optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.01}}}"
MADE_NEW = f"{{pretrained: null, config: {TINY}}}"
POLICY = f"{{class_path: minirec_pl.policy.GenerativePolicy, init_args: {MADE_NEW}}}"
FIT = [
    "fit",
    f"--config={CONFIGS / 'quickstart.yaml'}",
    "--data.path=data",
    "--data.dataset=toy",
    "--data.warm_fraction=0.8",
    "--data.history_window=10",
    "--data.batch_size=8",
    f"--model.policy={POLICY}",
    "--model.num_generations=4",
    "--model.optimizer.lr=0.01",
    "--selection.budget=0.4",
    f"--warm_start={WARM}",
    "--test_stages=true",
    "--trainer.default_root_dir=runs",
    "--trainer.max_epochs=3",
    "--trainer.accelerator=cpu",
    "--trainer.logger=null",
    "--trainer.log_every_n_steps=2",
    "--trainer.enable_progress_bar=false",
    "--trainer.callbacks+=helpers.kill_places.Killer",
]
STEP = "step:minirec_pl.trainers"
PLACES = {
    "before anything is trained": "setup:1",
    "during the warm start": f"{STEP}.warm_start.WarmStartModule.training_step:5",
    "while the warm policy is tested": f"{STEP}.recommender.RecModule.test_step:2",
    "while scoring": f"{STEP}.grpo.GRPORecModule.sample_signals:1",
    "before the first checkpoint": "on_train_batch_start:3",
    "while writing the first checkpoint": "file:best.ckpt:1",
    "between the best and the last checkpoint": "file:last.ckpt:1",
    "while writing a later checkpoint": "file:last.ckpt:2",
    "at an epoch's end": "on_train_epoch_end:2",
    "between epochs": "on_train_epoch_start:2",
    "inside a later epoch": "on_train_batch_start:14",
    "during a validation": "on_validation_batch_start:2",
    "while the vectors of a selection are written": "file:signals:2",
    "while the files of the last selection are written": "file:ledger.parquet:1",
    "after the last step": "on_train_end:1",
    "before the results are written": "file:results.json:1",
    "while the trained policy is tested": f"{STEP}.recommender.RecModule.test_step:3",
    "while the stages are added to the results": "file:results.json:2",
}
CLOCK = re.compile("second|time")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that is let be, and the folder it was started in."""
    folder = tmp_path_factory.mktemp("whole")
    write_toy(folder / "data")
    code, said = minirec(FIT, folder, folder / "log")
    assert code == 0, said
    return folder / "runs" / "version_0"


def table(path):
    frame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    return frame[[name for name in frame if not CLOCK.search(name)]]


def without_clock(run):
    values = results(run)
    return {**values, "stages": [{k: v for k, v in row.items() if k != "seconds"} for row in values["stages"]]}


def assert_same_run(run, whole, lost=0):
    """Whether all that a run leaves is that of another, but for rows of `metrics.csv` that were lost."""
    assert equal_weights(run, whole)
    for name in ("best.ckpt", "last.ckpt"):
        one, other = (torch.load(r / "checkpoints" / name, weights_only=True) for r in (run, whole))
        assert one["epoch"] == other["epoch"]
        assert all(torch.equal(one["state_dict"][key], value) for key, value in other["state_dict"].items())
    assert without_clock(run) == without_clock(whole)
    one, other = (table(r / "metrics.csv").to_csv(index=False).splitlines() for r in (run, whole))
    assert len(one) == len(other) - lost
    assert [line for line in other if line in one] == one
    for name in ("evaluations.csv", "ledger.parquet", "plan.parquet", "completions.parquet"):
        pd.testing.assert_frame_equal(table(run / name), table(whole / name), check_exact=True)
    configs = [yaml.safe_load((r / "config.yaml").read_text()) for r in (run, whole)]
    assert all(config.pop("working_dir") for config in configs)
    assert configs[0] == configs[1]
    assert {path.name for path in run.rglob("*")} == {path.name for path in whole.rglob("*")}


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_run_goes_on_in_its_folder(place, whole, tmp_path):
    os.symlink(whole.parents[1] / "data", tmp_path / "data")
    code, said = minirec(FIT, tmp_path, tmp_path / "log", kill=PLACES[place])
    assert code == -9, said
    run = tmp_path / "runs" / "version_0"
    assert (tmp_path / "runs" / "latest").resolve() == run
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder, path = (elsewhere, "../runs") if list(PLACES).index(place) % 2 else (tmp_path, "runs")
    code, said = minirec(["fit", f"--ckpt_path={path}/latest/checkpoints/last.ckpt"], folder, tmp_path / "log")
    if code:
        assert not (run / "checkpoints" / "last.ckpt").exists()
        assert "there is no checkpoint" in said
        told = re.search("`(.*)`", said)
        newest = re.search(r"newest of its run is (\S+),", said)
        words = ["fit", f"--ckpt_path={newest[1]}"] if newest else shlex.split(told[1])[1:]
        code, said = minirec(words, folder, tmp_path / "log")
    assert code == 0, said
    assert sorted(os.listdir(tmp_path / "runs")) == ["latest", "version_0"]
    assert os.listdir(elsewhere) == []
    assert (tmp_path / "runs" / "latest").resolve() == run
    # What is logged at an epoch's end follows its checkpoints, and was lost between them.
    assert_same_run(run, whole, lost=int(place == "between the best and the last checkpoint"))


def test_a_run_that_was_stopped_early_stays_so(whole, tmp_path):
    """Killed between its last checkpoint and its results."""
    os.symlink(whole.parents[1] / "data", tmp_path / "data")
    early = ["--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.patience=1"]
    early += ["--trainer.callbacks.monitor=val/ndcg@10", "--trainer.callbacks.mode=max"]
    words = [word for word in FIT if not word.startswith(("--warm_start", "--test_stages"))]
    words = [*words, *early, "--model.optimizer.lr=0.0", "--trainer.max_epochs=9"]
    for kill, wanted in ((None, 0), ("on_train_end:1", -9)):
        code, said = minirec(words, tmp_path, tmp_path / "log", kill=kill)
        assert code == wanted, said
    for expected in ("", "nothing left to train"):
        command = ["fit", "--ckpt_path=runs/latest/checkpoints/last.ckpt"]
        code, said = minirec(command, tmp_path, tmp_path / "log")
        assert code == 0, said
        assert expected in said
    one, other = (tmp_path / "runs" / name for name in ("version_1", "version_0"))
    assert results(one) == results(other)
    assert results(one)["epochs"] == 2
    assert table(one / "evaluations.csv").equals(table(other / "evaluations.csv"))
