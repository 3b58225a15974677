"""Warm start, reset of the proxy and tests of every stage inside one `minirec fit`."""

import io
import json
import os
import shlex
import signal

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from helpers import cli_tools
from helpers.cli_tools import TINY, equal_weights, interrupt, results, sentence
from rich.console import Console
from safetensors import safe_open

from minirec_pl import RecDataModule, WarmStartModule
from minirec_pl.cli.main import main
from minirec_pl.cli.stages import WarmStart, stage_table
from minirec_pl.metrics.evaluation import ranking_figures
from minirec_pl.policy import GenerativePolicy
from minirec_pl.selection.fingerprints import weights_fingerprint
from minirec_pl.utils.errors import InputError

WARM = {"epochs": 2, "batch_size": 8, "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}}
MADE_NEW = f"{{pretrained: null, config: {TINY}}}"
NEW = [f"--model.policy={{class_path: minirec_pl.policy.GenerativePolicy, init_args: {MADE_NEW}}}"]
ONCE = ["--selection.every_n_epochs=5", "--selection.rescore_fraction=0.0"]


def fit(command, root, *more, warm=WARM, **options):
    """GRPO from a new policy, after a warm start, every stage tested."""
    warm_start = f"--warm_start={json.dumps({**warm, **options})}"
    return command.grpo(root, *NEW, warm_start, "--test_stages=true", *more)


def stages(run):
    return {row["stage"]: row for row in json.loads((run / "results.json").read_text())["stages"]}


def without_clock(run):
    values = results(run)
    return {**values, "stages": [{k: v for k, v in row.items() if k != "seconds"} for row in values["stages"]]}


@pytest.fixture(scope="module")
def whole(command):
    root = command.folder / "stages"
    assert main(fit(command, root)) == 0
    return root / "version_0"


def test_every_stage_is_tested_and_paid_for(whole, capsys):
    rows = stages(whole)
    assert list(rows) == ["popularity", "start", "warm_start", "trained"]
    assert len({row["samples"] for row in rows.values()}) == len({row["users"] for row in rows.values()}) == 1
    assert all(0 < row["ndcg@10_se"] < 0.1 for row in rows.values())
    assert rows["start"]["tokens"] == rows["popularity"]["tokens"] == {"forward": 0, "backward": 0}
    assert rows["warm_start"]["tokens"]["backward"] > 0
    assert rows["warm_start"]["rollouts"] == {"scoring": 0, "training": 0}
    assert rows["trained"]["tokens"]["backward"] > rows["warm_start"]["tokens"]["backward"]
    assert rows["trained"]["rollouts"]["training"] > 0
    values = json.loads((whole / "results.json").read_text())
    assert values["stage"] == "fit"
    assert values["seconds"]["warm_start"] > 0
    assert {name: values[name] for name in ("tokens", "rollouts")} == {
        name: rows["trained"][name] for name in ("tokens", "rollouts")
    }
    assert not (whole / "stages.json").exists()


def test_the_last_stage_is_the_best_checkpoint(whole, capsys):
    assert main(["test", "--ckpt_path", str(whole / "checkpoints" / "best.ckpt")]) == 0
    (run,) = set(whole.parent.glob("version_*")) - {whole}
    tested, row = results(run), stages(whole)["trained"]
    for name in ("ndcg@10", "hit_rate@10", "ndcg@10_se", "hit_rate@10_se_users", "samples", "users"):
        assert tested[name] == pytest.approx(row[name], abs=1e-6)


def test_the_warm_start_is_the_one_of_the_module_by_hand(command, whole, make_trainer):
    from lightning.pytorch import seed_everything

    seed_everything(42, verbose=False)
    data = RecDataModule(
        str(command.data), "toy", train_on="warm", warm_fraction=0.8, history_window=10, warm_batch_size=8
    )
    data.setup("fit")
    policy = GenerativePolicy(config=yaml.safe_load(TINY))
    policy.bind(data.catalogue)
    module = WarmStartModule(policy, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01))
    trainer = make_trainer(max_epochs=2, gradient_clip_val=1.0)
    losses = []
    module.log = lambda name, value, **options: losses.append(float(value))
    trainer.fit(module, datamodule=data)
    kept = GenerativePolicy(pretrained=str(whole / "warm_start" / "policy"))
    logged = pd.read_csv(whole / "warm_start" / "metrics.csv")["train/loss"].dropna()
    assert losses[-1] < losses[0]
    assert logged.iloc[-1] < logged.iloc[0] or len(logged) == 1
    assert kept.training_cost["tokens_backward"]["warm_start"] == module.cost.tokens_backward["warm_start"]
    shared = kept.state_dict()
    for name, value in policy.state_dict().items():
        torch.testing.assert_close(value, shared[name])


@pytest.mark.slow
def test_tests_of_the_stages_change_nothing(command, whole, tmp_path):
    assert main([*fit(command, tmp_path / "runs"), "--test_stages=false"]) == 0
    run = tmp_path / "runs" / "version_0"
    assert equal_weights(run, whole)
    assert {**results(run), "stages": None} == {**results(whole), "stages": None}


def test_the_proxy_selects_and_training_starts_from_the_original_weights(command, tmp_path):
    still = ["--model.optimizer.lr=0.0", "--model.optimizer.weight_decay=0.0"]
    assert main(fit(command, tmp_path / "runs", *ONCE, *still, reset_policy=True)) == 0
    run = tmp_path / "runs" / "version_0"
    rows = stages(run)
    for name in ("ndcg@10", "hit_rate@10"):
        assert rows["trained"][name] == rows["start"][name] != rows["warm_start"][name]
    proxy = GenerativePolicy(pretrained=str(run / "warm_start" / "policy"))
    with safe_open(run / "signals.safetensors", framework="pt") as signals:
        settings = signals.metadata()["settings"]
    assert weights_fingerprint(proxy) in settings
    assert not equal_weights(run, run / "warm_start")


@pytest.mark.slow
def test_the_reference_of_the_kl_term_is_reset_too(command, tmp_path):
    still = ["--model.optimizer.lr=0.0", "--model.beta=0.1", "--trainer.max_epochs=1"]
    arguments = fit(command, tmp_path / "runs", *ONCE, *still, reset_policy=True)
    logger = "--trainer.logger=lightning.pytorch.loggers.CSVLogger"
    arguments = [word.replace("dropout: 0.3", "dropout: 0.0") for word in arguments if "logger" not in word]
    assert main([*arguments, logger, "--trainer.logger.save_dir=.", "--trainer.log_every_n_steps=1"]) == 0
    kl = pd.read_csv(tmp_path / "runs" / "version_0" / "metrics.csv")["kl"].dropna()
    assert len(kl) > 0
    assert kl.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ([], ("selection.every_n_epochs to trainer.max_epochs at least", "1 and 2")),
        ([*ONCE, "--selection.warmup_epochs=1"], ("selection.warmup_epochs to 0 (it is 1)",)),
    ],
)
def test_a_proxy_that_would_not_be_the_one_that_selects(command, tmp_path, capsys, options, fragments):
    capsys.readouterr()
    assert main(fit(command, tmp_path / "runs", *options, reset_policy=True)) == 2
    said = sentence(capsys)
    assert all(fragment in said for fragment in fragments)
    assert not (tmp_path / "runs").exists()


def test_a_proxy_without_a_selection(command, tmp_path, capsys):
    arguments = [word for word in fit(command, tmp_path / "runs", reset_policy=True) if "selection" not in word]
    capsys.readouterr()
    assert main([*arguments, "--selection=null"]) == 2
    assert "nothing selects" in sentence(capsys)


@pytest.mark.slow
def test_patience_keeps_the_best_epoch(command, tmp_path):
    assert (
        main(
            fit(
                command,
                tmp_path / "runs",
                epochs=6,
                patience=1,
                optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": 0.0}},
            )
        )
        == 0
    )
    run = tmp_path / "runs" / "version_0"
    logged = pd.read_csv(run / "warm_start" / "metrics.csv")
    assert logged["val/ndcg@10"].notna().sum() == 2
    assert stages(run)["start"]["ndcg@10"] == stages(run)["warm_start"]["ndcg@10"]
    assert not list((run / "warm_start").glob("*.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_epoch_end"])
def test_a_resumed_run_skips_the_warm_start(command, whole, tmp_path, capsys, monkeypatch, hook):
    capsys.readouterr()
    assert main(fit(command, tmp_path / "runs", *interrupt(hook, 1))) == 2
    resume = shlex.split(sentence(capsys).split("resume with `")[1].split("`")[0])
    monkeypatch.setattr(cli_tools.InterruptAt, "armed", False)
    monkeypatch.setattr(WarmStartModule, "training_step", None)
    assert main(resume[1:]) == 0
    resumed = tmp_path / "runs" / "latest"
    assert without_clock(resumed) == without_clock(whole)
    assert equal_weights(resumed, whole)


def test_ctrl_c_in_the_warm_start(command, tmp_path, capsys, monkeypatch):
    step = WarmStartModule.training_step

    def interrupted(self, batch, batch_idx):
        if batch_idx == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(WarmStartModule, "training_step", interrupted)
    capsys.readouterr()
    assert main(fit(command, tmp_path / "runs")) == 2
    assert "start again" in sentence(capsys)
    assert not (tmp_path / "runs").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.slow
def test_ctrl_c_between_warm_start_and_first_checkpoint(command, whole, tmp_path, capsys, monkeypatch):
    capsys.readouterr()
    assert main(fit(command, tmp_path / "runs", *interrupt("on_fit_start"))) == 2
    said = sentence(capsys)
    assert "go on from the end of its warm start" in said
    command_line = shlex.split(said.split("with `")[1].split("`")[0])
    monkeypatch.setattr(cli_tools.InterruptAt, "armed", False)
    monkeypatch.setattr(WarmStartModule, "training_step", None)
    assert main(command_line[1:]) == 0
    resumed = tmp_path / "runs" / "version_0"
    assert without_clock(resumed) == without_clock(whole)
    assert equal_weights(resumed, whole)
    assert not (resumed / "warm_start" / "end.ckpt").exists()


@pytest.mark.slow
def test_a_proxy_that_has_selected_is_not_trained_again(command, tmp_path, capsys, monkeypatch):
    roots = tmp_path / "whole", tmp_path / "runs"
    assert main(fit(command, roots[0], *ONCE, reset_policy=True)) == 0
    capsys.readouterr()
    assert main(fit(command, roots[1], *ONCE, *interrupt("on_train_start"), reset_policy=True)) == 2
    command_line = shlex.split(sentence(capsys).split("with `")[1].split("`")[0])
    monkeypatch.setattr(cli_tools.InterruptAt, "armed", False)
    monkeypatch.setattr(WarmStartModule, "training_step", None)
    assert main(command_line[1:]) == 0
    one, other = (root / "version_0" for root in roots)
    assert without_clock(one) == without_clock(other)
    assert equal_weights(one, other)


def test_a_warm_start_before_a_warm_start(command, tmp_path, capsys):
    capsys.readouterr()
    assert main(command.warm(tmp_path / "runs", f"--warm_start={json.dumps(WARM)}")) == 2
    assert "set warm_start to null" in sentence(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "warm_start.epochs is 0"),
        ({"batch_size": -1}, "warm_start.batch_size is -1"),
        ({"patience": 0}, "warm_start.patience is 0"),
        ({"samples": 5}, "set warm_start.train_on to warm_samples"),
    ],
)
def test_options_of_the_warm_start(options, message):
    with pytest.raises(InputError, match=message):
        WarmStart(**options)


def test_the_table_shows_every_stage():
    figures = ranking_figures(torch.tensor([1, 50]), np.array([0, 1]))
    cost = {"rollouts": {"scoring": 7, "training": 1234}, "tokens": {"forward": 2_000_000, "backward": 0}}
    row = {"stage": "warm_start", **figures, **cost, "seconds": {"warm_start": 1.5, "training": 2.0}}
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(stage_table([row]))
    shown = console.export_text()
    for text in ("warm start", "0.5000 ± 0.5000", "7 + 1,234", "2.00 M + 0.00 M", "3.5", "2 samples of 2 users"):
        assert text in shown
