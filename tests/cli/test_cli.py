import json
import os
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import yaml
from helpers.cli_tools import CONFIGS, REPOSITORY, equal_weights, results, sentence
from safetensors.torch import load_file

from minirec_pl.cli.main import main

MINIREC = [sys.executable, "-m", "minirec_pl"]


@pytest.fixture(scope="module")
def fitted(command):
    """A finished GRPO run."""
    root = command.folder / "grpo"
    assert main(command.grpo(root)) == 0
    return root / "version_0"


def test_no_arguments_shows_the_help(capsys):
    assert main([]) == 2
    shown = capsys.readouterr()
    assert "usage: minirec" in shown.err
    assert not shown.out


def test_help_of_a_class(capsys):
    for arguments, wanted in (
        (["fit", "--selection.help=minirec_pl.callbacks.MiniRec"], "budget"),
        (["fit", "--model.help=minirec_pl.GRPORecModule"], "num_generations"),
        (["fit", "--data.help=minirec_pl.RecDataModule"], "history_window"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        assert wanted in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "where", "value"),
    [
        ("--selection=null", ("selection",), None),
        ("--selection.budget=0.05", ("selection", "init_args", "budget"), 0.05),
        ("--selection.budget=64", ("selection", "init_args", "budget"), 64),
        ("--model.num_generations=4", ("model", "init_args", "num_generations"), 4),
        ("--data.batch_size=32", ("data", "init_args", "batch_size"), 32),
        ("--trainer.max_epochs=3", ("trainer", "max_epochs"), 3),
    ],
)
def test_print_config_shows_overrides_and_parses_again(override, where, value, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(CONFIGS / "quickstart.yaml"), override, "--print_config"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    found = yaml.safe_load(shown)
    for key in where:
        found = found[key]
    assert found == value
    (tmp_path / "again.yaml").write_text(shown)
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(tmp_path / "again.yaml"), "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(shown)


def test_a_run_leaves_everything_in_its_folder(fitted):
    here = {path.name for path in fitted.iterdir()}
    wanted = {"config.yaml", "results.json", "ledger.parquet", "signals.safetensors", "curriculum.png", "metrics.csv"}
    assert wanted | {"checkpoints", "policy"} <= here
    assert {path.name for path in (fitted / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert (fitted / "curriculum.png").read_bytes().startswith(b"\x89PNG")
    assert not [path for path in fitted.rglob("*") if path.name.endswith(".tmp") or path.name.startswith(".")]
    config = yaml.safe_load((fitted / "config.yaml").read_text())
    assert config["selection"]["init_args"]["budget"] == 0.4
    ledger = pd.read_parquet(fitted / "ledger.parquet")
    assert ledger["rank"].notna().sum() == int(0.4 * len(ledger))


def test_two_runs_in_a_row_do_not_collide_and_are_equal(command, tmp_path):
    for _ in range(2):
        assert main(command.grpo(tmp_path / "runs")) == 0
    first, second = tmp_path / "runs" / "version_0", tmp_path / "runs" / "version_1"
    assert results(first) == results(second)
    assert equal_weights(first, second)
    assert (tmp_path / "runs" / "latest").resolve() == second.resolve()
    pd.testing.assert_frame_equal(
        pd.read_parquet(first / "ledger.parquet"), pd.read_parquet(second / "ledger.parquet"), check_exact=True
    )


@pytest.mark.parametrize("space", ["answer", "lora"])
def test_gradient_signal_and_its_space_are_options(command, fitted, tmp_path, space):
    options = [f"--selection.selector.init_args.{name}" for name in ("gradient=trajectory", f"gradient_space={space}")]
    assert main(command.grpo(tmp_path / "runs", *options)) == 0
    run = tmp_path / "runs" / "version_0"
    signals = load_file(run / "signals.safetensors")
    assert (signals["alignment_epoch"] == 1).all()
    assert signals["alignment"].isfinite().all()
    assert signals["gradient"].shape[1] == {"answer": 16, "lora": 512}[space]
    assert results(run).keys() == results(fitted).keys()


def test_a_gradient_that_a_space_does_not_have(command, tmp_path, capsys):
    options = [f"--selection.selector.init_args.{name}" for name in ("gradient=hvp", "gradient_space=lora")]
    assert main(command.grpo(tmp_path / "runs", *options)) == 2
    assert "gradient_space='lora' has no Hessian-vector products" in sentence(capsys)
    assert not (tmp_path / "runs").exists()


def test_another_seed_gives_another_run(command, fitted, tmp_path):
    assert main(command.grpo(tmp_path / "runs", "--seed_everything=7")) == 0
    assert not equal_weights(fitted, tmp_path / "runs" / "version_0")


def test_test_finds_the_config_beside_the_checkpoint(fitted):
    checkpoint = str(fitted / "checkpoints" / "best.ckpt")
    figures = []
    for arguments in (["--ckpt_path", checkpoint], [f"--ckpt_path={checkpoint}", f"--config={fitted / 'config.yaml'}"]):
        before = set(fitted.parent.iterdir())
        assert main(["test", *arguments]) == 0
        (run,) = set(fitted.parent.iterdir()) - before
        figures.append(results(run))
    assert figures[0] == figures[1]
    assert figures[0]["stage"] == "test"
    assert {"hit_rate@10", "ndcg@10", "mrr", "coverage@10"} <= figures[0].keys()
    assert (fitted.parent / "latest").resolve() == fitted.resolve()


def test_validate_of_the_best_checkpoint_repeats_its_figure(fitted):
    before = set(fitted.parent.iterdir())
    assert main(["validate", "--ckpt_path", str(fitted / "checkpoints" / "best.ckpt")]) == 0
    (run,) = set(fitted.parent.iterdir()) - before
    assert results(run)["ndcg@10"] == pytest.approx(results(fitted)["best"]["val/ndcg@10"], abs=1e-6)


def test_predict_writes_unseen_items_with_external_ids(command, fitted, capsys):
    assert main(["predict", "--ckpt_path", str(fitted / "checkpoints" / "best.ckpt"), "--model.predict_k=3"]) == 0
    path = capsys.readouterr().out.split("predictions: ")[1].strip()
    table = pd.read_parquet(path)
    rows = pd.read_csv(command.data / "toy" / "toy.inter", sep="\t")
    rows.columns = [name.split(":")[0] for name in rows]
    rows = rows.sort_values("timestamp", kind="stable", ignore_index=True)
    assert list(table.columns) == ["sample_id", "user_id", "item_id", "score", "rank"]
    assert set(table["rank"]) == {1, 2, 3}
    assert set(table["item_id"]) <= set(rows["item_id"])
    assert (table["score"] <= 0).all()
    for sample_id, recommended in table.groupby("sample_id"):
        sample = rows.loc[sample_id]
        assert set(recommended["user_id"]) == {sample["user_id"]}
        assert recommended["score"].is_monotonic_decreasing
        earlier = rows[(rows["user_id"] == sample["user_id"]) & (rows["timestamp"] < sample["timestamp"])]
        assert not set(recommended["item_id"]) & set(earlier["item_id"])


def test_minirec_among_the_callbacks_of_a_yaml_is_the_same(command, fitted, tmp_path):
    config = yaml.safe_load((fitted / "config.yaml").read_text())
    config["trainer"]["callbacks"].insert(0, config["selection"])
    config["selection"] = None
    config["trainer"]["default_root_dir"] = str(tmp_path / "runs")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(tmp_path / "config.yaml")]) == 0
    assert results(tmp_path / "runs" / "latest") == results(fitted)
    assert equal_weights(tmp_path / "runs" / "latest", fitted)


def test_without_selection_an_epoch_is_the_whole_pool(command, fitted, tmp_path):
    arguments = [word for word in command.grpo(tmp_path / "runs") if not word.startswith("--selection")]
    assert main([*arguments, "--selection=null"]) == 0
    values = results(tmp_path / "runs" / "latest")
    pool = len(pd.read_parquet(fitted / "ledger.parquet"))
    assert values["samples_per_epoch"] == values["distinct_samples"] == pool
    assert values["rollouts"] == {"scoring": 0, "training": 2 * 4 * pool}
    assert not (tmp_path / "runs" / "latest" / "ledger.parquet").exists()


def test_training_on_a_fixed_ledger(command, fitted, tmp_path):
    name = "--trainer.callbacks"
    ledger = fitted / "ledger.parquet"
    select = [f"{name}+=minirec_pl.callbacks.SelectSamples", f"{name}.ledger={ledger}", f"{name}.budget=20"]
    arguments = [word for word in command.grpo(tmp_path / "runs") if not word.startswith("--selection")]
    assert main([*arguments, "--selection=null", *select]) == 0
    values = results(tmp_path / "runs" / "latest")
    assert values["samples_per_epoch"] == 20
    assert values["distinct_samples"] == 20
    assert values["rollouts"] == {"scoring": 0, "training": 20 * 2 * 4}


def test_going_on_from_a_checkpoint_equals_one_long_run(command, fitted, tmp_path):
    assert main(command.grpo(tmp_path / "long", "--trainer.max_epochs=3")) == 0
    checkpoint = fitted / "checkpoints" / "last.ckpt"
    go_on = ["--trainer.max_epochs=3", f"--trainer.default_root_dir={tmp_path / 'more'}"]
    assert main(["fit", "--config", str(fitted / "config.yaml"), "--ckpt_path", str(checkpoint), *go_on]) == 0
    assert results(tmp_path / "more" / "latest") == results(tmp_path / "long" / "latest")
    assert equal_weights(tmp_path / "more" / "latest", tmp_path / "long" / "latest")


def test_advertisements_are_hidden_and_warnings_are_not(command, tmp_path, capfd):
    with pytest.warns(UserWarning, match="no reward of silent_reward applies"):
        assert main(command.grpo(tmp_path / "runs", "--model.rewards=[helpers.cli_tools.silent_reward]")) == 0
    err = capfd.readouterr().err
    for noise in ("Tip:", "Loading weights", "Writing model shards", "exists and is not empty"):
        assert noise not in err


def test_the_shipped_loggers_work_offline(command, tmp_path, capfd):
    arguments = command.grpo(tmp_path / "runs", "--trainer.log_every_n_steps=2")
    arguments = [word for word in arguments if not word.startswith("--trainer.logger")]
    assert main(arguments) == 0
    run = tmp_path / "runs" / "version_0"
    logged = pd.read_csv(run / "metrics.csv")
    assert {"reward", "frac_reward_zero_std", "entropy", "val/ndcg@10", "selection/size"} <= set(logged.columns)
    assert np.isfinite(logged["val/ndcg@10"].dropna()).all()
    (offline,) = (run / "wandb").glob("offline-run-*/run-*.wandb")
    assert offline.stat().st_size > 1000
    assert sys.modules["wandb"].run is None
    assert "Tip:" not in capfd.readouterr().err


@pytest.mark.slow
def test_ctrl_c_of_the_real_command_keeps_a_checkpoint_that_resumes(command, tmp_path):
    workers = ["--trainer.max_epochs=100000", "--data.num_workers=2"]
    arguments = MINIREC + command.grpo(tmp_path / "runs", *workers)
    with subprocess.Popen(arguments, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, start_new_session=True) as run:
        last, deadline = tmp_path / "runs" / "version_0" / "checkpoints" / "last.ckpt", time.monotonic() + 120
        while not last.exists() and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        os.killpg(run.pid, signal.SIGINT)
        err = run.communicate(timeout=60)[1]
    assert run.returncode == 2, err
    assert "Traceback" not in err
    assert err.count("stopping at the next safe point") == 1  # the loader workers say nothing
    resume = shlex.split(err.split("resume with `")[1].split("`")[0])
    assert resume[:2] == ["minirec", "fit"]
    checkpoint = resume[resume.index("--ckpt_path") + 1]
    assert checkpoint.endswith("interrupted.ckpt")
    import torch

    epoch = torch.load(checkpoint, weights_only=True)["epoch"]
    assert main([*resume[1:], f"--trainer.max_epochs={epoch + 1}", "--data.num_workers=0"]) == 0
    assert json.loads((tmp_path / "runs" / "latest" / "results.json").read_text())["epochs"] == epoch + 1


def test_a_config_may_name_what_lies_in_the_folder_it_is_run_in(tmp_path, monkeypatch, capsys):
    (tmp_path / "rewards_of_a_shop.py").write_text("def bought(completions, target):\n    return [0.0] * len(target)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    options = ["--model.rewards=[rewards_of_a_shop.bought]", "--print_config"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(CONFIGS / "quickstart.yaml"), *options])
    assert stop.value.code in (0, None)
    assert "- rewards_of_a_shop.bought" in capsys.readouterr().out
    assert str(tmp_path) not in sys.path
