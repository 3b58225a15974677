"""Which folder a run has, what `latest` points to, and what a resume changes."""

import os
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
import yaml
from helpers import cli_tools
from helpers.cli_tools import CONFIGS, equal_weights, interrupt, results, sentence
from helpers.paths import DOCS, REPOSITORY

from minirec_pl.cli import fit as cli_fit
from minirec_pl.cli import runs
from minirec_pl.cli.main import main
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.metrics_file import METRICS
from minirec_pl.utils.run_folder import held, point_latest, put_latest_back

CSV = "--trainer.logger=lightning.pytorch.loggers.CSVLogger"
LOGGED = [CSV, "--trainer.logger.save_dir=.", "--trainer.log_every_n_steps=1"]


@pytest.fixture(scope="module")
def done(command):
    """A finished run of two epochs, and one of three."""
    root = command.folder / "runs_of_two"
    assert main([*command.grpo(root), *LOGGED]) == 0
    assert main([*command.grpo(command.folder / "run_of_three"), *LOGGED, "--trainer.max_epochs=3"]) == 0
    return root / "version_0", command.folder / "run_of_three" / "version_0"


@pytest.fixture
def run(done, tmp_path):
    """The run of two epochs in a folder of its own, where its config says it is."""
    import shutil

    folder = tmp_path / "runs" / "version_0"
    shutil.copytree(done[0], folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["trainer"]["default_root_dir"] = str(folder.parent)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    point_latest(folder)
    return folder


def snapshot(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def resume(run, *more, checkpoint="last.ckpt"):
    return main(["fit", f"--ckpt_path={run.parent / 'latest' / 'checkpoints' / checkpoint}", *more])


@pytest.mark.parametrize("more", [[], ["--trainer.max_epochs=1"], ["--trainer.default_root_dir=other"]])
def test_a_complete_run_has_nothing_left_to_train(run, tmp_path, monkeypatch, capsys, more):
    monkeypatch.chdir(tmp_path)
    (run.parent / "version_1").mkdir()
    before = snapshot(tmp_path)
    capsys.readouterr()
    assert resume(run, *more) == 0
    assert f"nothing left to train: the run in {run} is at epoch 2, step 8" in capsys.readouterr().out
    assert snapshot(tmp_path) == before
    assert os.readlink(run.parent / "latest") == "version_0"
    assert not (tmp_path / "other").exists()


def test_training_longer_stays_in_the_folder_and_goes_on_with_its_files(run, done, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert resume(run, "--trainer.max_epochs=3") == 0
    assert sorted(os.listdir(tmp_path / "runs")) == ["latest", "version_0"]
    assert equal_weights(run, done[1])
    assert results(run) == results(done[1])
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_epochs"] == 3
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    for name in (METRICS, "evaluations.csv"):
        one, other = (pd.read_csv(folder / name) for folder in (run, done[1]))
        columns = [column for column in other if "second" not in column]
        # The selection of the third epoch comes after what was logged at the end of the second.
        one, other = (rows[columns].sort_values(columns, ignore_index=True) for rows in (one, other))
        pd.testing.assert_frame_equal(one, other)


def test_an_earlier_checkpoint_writes_over_what_came_after_it(run, done):
    (run / "results.json").unlink()
    assert resume(run, "--trainer.max_epochs=3", checkpoint="best.ckpt") == 0
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert equal_weights(run, done[1])


def test_another_root_is_another_run(run, tmp_path):
    before = snapshot(run)
    assert resume(run, "--trainer.max_epochs=3", f"--trainer.default_root_dir={tmp_path / 'other'}") == 0
    assert snapshot(run) == before
    assert sorted(os.listdir(tmp_path / "other")) == ["latest", "version_0"]


def test_a_resume_that_fails_leaves_the_run_as_it_was(run, capsys):
    (run.parent / "version_1").mkdir()
    point_latest(run.parent / "version_1")
    before = snapshot(run.parent)
    capsys.readouterr()
    last = run / "checkpoints" / "last.ckpt"
    assert main(["fit", f"--ckpt_path={last}", "--trainer.max_epochs=3", "--model.beta=0.5"]) == 2
    assert "the checkpoint does not fit" in sentence(capsys)
    assert snapshot(run.parent) == before
    assert os.readlink(run.parent / "latest") == "version_1"


def test_ctrl_c_after_going_on_names_the_same_run(run, capsys, monkeypatch):
    capsys.readouterr()
    assert resume(run, "--trainer.max_epochs=3", *interrupt("on_train_batch_start", 2)) == 2
    said = sentence(capsys)
    assert f"{run}/checkpoints/interrupted.ckpt" in said
    monkeypatch.setattr(cli_tools.InterruptAt, "armed", False)
    assert main(said.split("`")[1].split()[1:]) == 0
    assert results(run)["epochs"] == 3


def test_two_processes_do_not_share_a_folder(run, capsys, tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from minirec_pl.utils.run_folder import held\n"
        "with held(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, run], stdout=subprocess.PIPE, text=True, cwd=REPOSITORY
    ) as other:
        try:
            assert other.stdout.readline() == "held\n"
            before = snapshot(run)
            assert resume(run, "--trainer.max_epochs=3") == 2
            assert "is still going" in sentence(capsys)
            assert snapshot(run) == before
        finally:
            other.kill()
    with held(run):
        pass


def test_latest_moves_when_a_fit_begins_and_goes_back_when_it_fails(command, tmp_path, monkeypatch, capsys):
    root, seen = tmp_path / "runs", []
    for name in ("version_0", "version_7"):
        (root / name).mkdir(parents=True)
    point_latest(root / "version_7")

    def failing(self, *args, **kwargs):
        seen.append(os.readlink(root / "latest"))
        raise InputError("no: yes")

    monkeypatch.setattr(cli_fit.MiniRecCLI, "fit", failing)
    assert main(command.grpo(root)) == 2
    assert seen == ["version_1"]
    assert os.readlink(root / "latest") == "version_7"
    assert sorted(os.listdir(root)) == ["latest", "version_0", "version_7"]


def test_latest_is_not_taken_from_a_run_that_began_since(tmp_path):
    for name in ("version_0", "version_1", "version_2"):
        (tmp_path / name).mkdir()
    assert point_latest(tmp_path / "version_0") is None
    assert point_latest(tmp_path / "version_1") == "version_0"
    assert point_latest(tmp_path / "version_2") == "version_1"
    put_latest_back(tmp_path / "version_1", "version_0")
    assert os.readlink(tmp_path / "latest") == "version_2"
    put_latest_back(tmp_path / "version_2", None)
    assert not (tmp_path / "latest").is_symlink()


MISSING = {
    "data": (["--data.path=nowhere"], "toy.inter"),
    "policy": (["--model.policy.pretrained=nowhere"], "no policy in 'nowhere'"),
    "ledger": (
        [
            "--trainer.callbacks+=minirec_pl.callbacks.SelectSamples",
            "--trainer.callbacks.ledger=no.parquet",
            "--selection=null",
        ],
        "no ledger",
    ),
    "model": (
        [
            "--model.policy={class_path: minirec_pl.policy.GenerativePolicy, init_args: "
            "{pretrained: null, language_model: {name: no/model}}}"
        ],
        "no/model",
    ),
}


@pytest.mark.parametrize("what", MISSING)
def test_nothing_is_opened_before_the_inputs_are_there(what, command, tmp_path, monkeypatch, capsys):
    def opened(*args, **kwargs):
        raise AssertionError("a run folder was made")

    monkeypatch.setattr(cli_fit, "claim_folder", opened)
    monkeypatch.chdir(tmp_path)
    words, fragment = MISSING[what]
    arguments = [word for word in command.grpo("runs") if not word.startswith("--trainer.logger")]
    if what == "ledger":
        arguments = [word for word in arguments if not word.startswith("--selection")]
    capsys.readouterr()
    assert main([*arguments, *words]) == 2
    assert fragment in sentence(capsys)
    assert os.listdir(tmp_path) == []


def test_only_fits_move_latest(run):
    assert main(["test", f"--ckpt_path={run.parent / 'latest' / 'checkpoints' / 'best.ckpt'}"]) == 0
    assert sorted(os.listdir(run.parent)) == ["latest", "version_0", "version_1"]
    assert os.readlink(run.parent / "latest") == "version_0"
    tested = yaml.safe_load((run.parent / "version_1" / "config.yaml").read_text())
    assert tested["ckpt_path"] == str(run / "checkpoints" / "best.ckpt")


def test_a_test_from_another_folder_finds_relative_paths(run, command, tmp_path, monkeypatch):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["init_args"]["path"] = os.path.relpath(command.data, command.folder)
    policy = config["model"]["init_args"]["policy"]["init_args"]
    policy["pretrained"] = os.path.relpath(policy["pretrained"], command.folder)
    config["trainer"]["default_root_dir"] = os.path.relpath(run.parent, command.folder)
    config["working_dir"] = str(command.folder)
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert main(["predict", "--ckpt_path=../runs/latest/checkpoints/best.ckpt", "--to=top.parquet"]) == 0
    assert os.listdir(tmp_path / "here") == ["top.parquet"]
    assert os.getcwd() == str(tmp_path / "here")
    assert (run.parent / "version_1" / "config.yaml").is_file()


def test_the_parts_of_an_offline_run_have_one_id(run):
    logger = "--trainer.logger=lightning.pytorch.loggers.WandbLogger"
    for epochs in (3, 4):
        assert resume(run, logger, "--trainer.logger.offline=true", f"--trainer.max_epochs={epochs}") == 0
        time.sleep(1)  # a folder's name has seconds
    parts = [path.name.split("-") for path in (run / "wandb").glob("offline-run-*")]
    assert len(parts) == 2
    assert len({part[-1] for part in parts}) == 1
    assert len({part[-2] for part in parts}) == 2


def test_tensorboard_goes_on(run):
    logger = "--trainer.logger=lightning.pytorch.loggers.TensorBoardLogger"
    assert resume(run, logger, "--trainer.logger.save_dir=.", "--trainer.max_epochs=3") == 0
    assert len(list(run.glob("events.out.tfevents.*"))) == 1


def test_a_checkpoint_of_weights_alone_does_not_resume(run, capsys):
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    del content["optimizer_states"]
    torch.save(content, run / "checkpoints" / "weights.ckpt")
    assert resume(run, checkpoint="weights.ckpt") == 2
    assert "holds weights only" in sentence(capsys)


@pytest.mark.parametrize("path", sorted(CONFIGS.parent.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_writes_a_last_checkpoint_to_resume_from(path):
    callbacks = yaml.safe_load(path.read_text())["trainer"]["callbacks"]
    savers = [entry["init_args"] for entry in callbacks if entry["class_path"].endswith("ModelCheckpoint")]
    assert [saver["filename"] for saver in savers][-1:] == ["last"]
    assert not any("save_weights_only" in saver or "monitor" in saver for saver in savers[-1:])


def test_typed_paths_are_those_of_the_present_folder(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    words = ["predict", "--working_dir=work", "--data.path=data", "--data.dataset=toy", "--to", "top.parquet"]
    words += ["--history", "none.csv", "--model.rewards=[data]"]
    with runs.in_working_dir(words) as argv:
        assert os.getcwd() == str(tmp_path / "work")
        assert f"--data.path={tmp_path / 'data'}" in argv
        assert argv[argv.index("--to") + 1] == str(tmp_path / "top.parquet")
        assert {"--data.dataset=toy", "none.csv", "--model.rewards=[data]"} <= set(argv)
    assert os.getcwd() == str(tmp_path)
    with (
        pytest.raises(InputError, match="working_dir is 'nowhere'"),
        runs.in_working_dir(["fit", "--working_dir=nowhere"]),
    ):
        pass


def test_a_copied_project_uses_its_own_paths(tmp_path, monkeypatch):
    for project in ("one", "two"):
        run = tmp_path / project / "runs" / "version_0"
        run.mkdir(parents=True)
        config = {"working_dir": str(tmp_path / "one"), "trainer": {"default_root_dir": "runs"}}
        (run / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path / "two")
    for config, folder in ((run / "config.yaml", "two"), (tmp_path / "one/runs/version_0/config.yaml", "one")):
        with runs.in_working_dir(["fit", f"--config={config}"]):
            assert os.getcwd() == str(tmp_path / folder)


def test_the_documented_command_is_the_tested_one():
    text = (DOCS / "getting-started.md").read_text()
    assert "\nminirec fit --ckpt_path runs/ml-100k/quickstart/latest/checkpoints/last.ckpt\n" in text


@pytest.mark.slow
def test_the_processes_of_two_ranks_resume_the_same_run_from_another_folder(command, tmp_path):
    words = [word for word in command.grpo("runs") if not word.startswith(("--data.path", "--model.policy.pretrained"))]
    words += ["--data.path=data", "--model.policy.pretrained=policy", "--trainer.devices=2", "--trainer.strategy=ddp"]
    os.symlink(command.data, tmp_path / "data")
    os.symlink(command.policy.resolve(), tmp_path / "policy")
    (tmp_path / "here").mkdir()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])}
    again = ["fit", "--ckpt_path=../runs/latest/checkpoints/last.ckpt", "--trainer.max_epochs=3"]
    for arguments, folder in ((words, tmp_path), (again, tmp_path / "here")):
        minirec = [sys.executable, "-m", "minirec_pl", *arguments]
        ended = subprocess.run(minirec, cwd=folder, env=env, capture_output=True, text=True, timeout=500)
        assert ended.returncode == 0, ended.stderr
    assert sorted(os.listdir(tmp_path / "runs")) == ["latest", "version_0"]
    assert os.listdir(tmp_path / "here") == []
    assert results(tmp_path / "runs" / "version_0")["epochs"] == 3
