import json
import shlex
import signal

import pandas as pd
import pytest
import torch
from helpers import cli_tools
from helpers.cli_tools import equal_weights, interrupt, results, sentence
from helpers.slow import slow

from minirec_pl.callbacks.run_folder import RunFolder
from minirec_pl.cli.main import main

EPOCHS = "--trainer.max_epochs=3"


def fit(command, kind, root, *more):
    return (command.warm if kind == "warm" else command.grpo)(root, EPOCHS, *more)


@pytest.fixture(scope="module")
def whole(command):
    """Folders of runs that nobody interrupted."""
    roots = {kind: command.folder / f"whole-{kind}" for kind in ("warm", "grpo")}
    for kind, root in roots.items():
        assert main(fit(command, kind, root)) == 0
    return {kind: root / "version_0" for kind, root in roots.items()}


@pytest.mark.parametrize(
    ("kind", "hook", "call", "times", "kept"),
    [
        slow("warm", "on_train_batch_start", 2, 1, "interrupted.ckpt"),
        slow("warm", "on_validation_start", 1, 1, "interrupted.ckpt"),
        slow("warm", "on_train_epoch_end", 2, 1, "interrupted.ckpt"),
        ("warm", "on_validation_start", 2, 2, "last.ckpt"),
        ("grpo", "on_train_batch_start", 3, 1, "interrupted.ckpt"),
        slow("grpo", "on_train_epoch_end", 1, 1, "interrupted.ckpt"),
        slow("grpo", "on_train_epoch_start", 2, 1, "interrupted.ckpt"),
    ],
)
def test_ctrl_c_and_the_command_it_prints_end_like_one_run(
    kind, hook, call, times, kept, command, whole, tmp_path, capsys, monkeypatch
):
    capsys.readouterr()
    assert main(fit(command, kind, tmp_path / "runs", *interrupt(hook, call, times))) == 2
    said = sentence(capsys)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resume = shlex.split(said.split("resume with `")[1].split("`")[0])
    assert resume[:2] == ["minirec", "fit"]
    assert resume[-1].endswith(kept)
    first = tmp_path / "runs" / "version_0"
    assert not (first / "policy").exists()
    assert not (first / "results.json").exists()
    monkeypatch.setattr(cli_tools.InterruptAt, "armed", False)
    assert main(resume[1:]) == 0
    resumed = tmp_path / "runs" / "latest"
    assert results(resumed) == results(whole[kind])
    one, other = (pd.read_csv(run / "evaluations.csv").drop(columns="seconds") for run in (resumed, whole[kind]))
    pd.testing.assert_frame_equal(one, other)
    assert equal_weights(resumed, whole[kind])
    assert resumed.resolve() == first
    assert [path.name for path in first.parent.glob("version_*")] == ["version_0"]


def test_ctrl_c_after_the_last_step_leaves_a_complete_run(command, whole, tmp_path, capsys):
    capsys.readouterr()
    assert main(fit(command, "warm", tmp_path / "runs", *interrupt("on_train_end"))) == 2
    assert "complete" in sentence(capsys)
    assert results(tmp_path / "runs" / "version_0") == results(whole["warm"])
    assert equal_weights(tmp_path / "runs" / "version_0", whole["warm"])


def test_a_second_ctrl_c_before_any_checkpoint(command, tmp_path, capsys):
    capsys.readouterr()
    assert main(fit(command, "warm", tmp_path / "runs", *interrupt("on_train_batch_start", 2, 2))) == 2
    assert "start again" in sentence(capsys)
    assert not (tmp_path / "runs").exists()


def test_results_count_each_sample(whole):
    values = json.loads((whole["grpo"] / "results.json").read_text())
    assert values["stage"] == "fit"
    assert values["epochs"] == 3
    assert values["rollouts"]["training"] == 3 * 4 * values["samples_per_epoch"]
    assert values["samples_per_epoch"] <= values["distinct_samples"] <= 3 * values["samples_per_epoch"]
    assert values["best"]["val/ndcg@10"] >= values["validation"]["ndcg@10"]
    assert all(seconds > 0 for seconds in values["seconds"].values())
    assert values["best_checkpoint"] == str(whole["grpo"] / "checkpoints" / "best.ckpt")


def test_the_policy_has_the_weights_of_the_best_checkpoint(whole):
    from minirec_pl.policy import GenerativePolicy

    for run in whole.values():
        saved = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
        policy = GenerativePolicy(pretrained=str(run / "policy")).state_dict()
        assert {f"policy.{name}" for name in policy} <= saved.keys()
        assert all(torch.equal(value, saved[f"policy.{name}"]) for name, value in policy.items())


def test_a_warm_start_keeps_its_cost_with_the_policy(command, whole):
    warm = json.loads((command.folder / "warm" / "version_0" / "results.json").read_text())
    grpo = json.loads((whole["grpo"] / "results.json").read_text())
    assert grpo["seconds"]["warm_start"] == pytest.approx(warm["seconds"]["warm_start"], abs=1e-3)
    assert grpo["tokens"]["backward"] > warm["tokens"]["backward"] > 0


def test_in_a_trainer_of_ones_own(toy_data, tiny_policy, make_trainer, tmp_path):
    from minirec_pl import GRPORecModule

    trainer = make_trainer(callbacks=[RunFolder()], max_epochs=1, limit_train_batches=2)
    trainer.fit(GRPORecModule(tiny_policy(), num_generations=2), datamodule=toy_data())
    values = json.loads((tmp_path / "run" / "results.json").read_text())
    assert values["best_checkpoint"] is None
    assert values["samples_per_epoch"] == values["distinct_samples"] == 16
    assert (tmp_path / "run" / "policy" / "model.safetensors").is_file()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
