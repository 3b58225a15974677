import os
import re
import subprocess
import sys

import pytest
from helpers.cli_tools import TINY
from lightning.pytorch.callbacks import ModelSummary, ProgressBar

from minirec_pl.cli.fit import MiniRecCLI, run
from minirec_pl.cli.main import main

UNSET = ["--trainer.enable_progress_bar=null", "--trainer.enable_model_summary=null"]
BAR = "--trainer.callbacks+=lightning.pytorch.callbacks.TQDMProgressBar"
SUMMARY = "--trainer.callbacks+=lightning.pytorch.callbacks.ModelSummary"
WANDB = "--trainer.logger=[{class_path: lightning.pytorch.loggers.WandbLogger, init_args: {offline: true}}]"


def test_a_pipe_gets_a_line_per_epoch(command, tmp_path, capsys):
    capsys.readouterr()
    assert main(command.warm(tmp_path, *UNSET, "--trainer.check_val_every_n_epoch=2")) == 0
    shown = capsys.readouterr()
    figure = r"\d+\.\d{4}"
    first, second = shown.out.splitlines()
    assert re.fullmatch(rf"epoch 1/2  step \d+  train/loss {figure}  \d+ s", first)
    assert re.fullmatch(rf"epoch 2/2  step \d+  train/loss {figure}  val/ndcg@10 {figure}  \d+ s", second)
    assert not re.search("GPU available|TPU available|Tip:|Params", shown.err)


def test_grpo_also_shows_its_reward_and_stages_their_own_epochs(command, tmp_path, capsys):
    capsys.readouterr()
    new = f"{{class_path: minirec_pl.policy.GenerativePolicy, init_args: {{pretrained: null, config: {TINY}}}}}"
    assert main(command.grpo(tmp_path, *UNSET, "--warm_start={epochs: 3}", f"--model.policy={new}")) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3", "1/2", "2/2"]
    assert ["train/reward" in line for line in lines] == [False] * 3 + [True] * 2


@pytest.mark.parametrize(
    ("asked", "bar", "summary"),
    [
        ([], "EpochLines", None),
        (["--trainer.enable_progress_bar=true"], "RichProgressBar", None),
        (["--trainer.enable_progress_bar=false"], None, None),
        ([BAR], "TQDMProgressBar", None),
        (["--trainer.enable_model_summary=true"], "EpochLines", "RichModelSummary"),
        ([SUMMARY], "EpochLines", "ModelSummary"),
    ],
)
def test_what_is_asked_for_is_not_replaced(asked, bar, summary, command, tmp_path, monkeypatch):
    monkeypatch.setattr(MiniRecCLI, "_run_subcommand", lambda self, subcommand: None)
    callbacks = run(command.warm(tmp_path, *UNSET, *asked)).trainer.callbacks
    assert [type(part).__name__ for part in callbacks if isinstance(part, ProgressBar)] == [bar] * (bar is not None)
    summaries = [type(part).__name__ for part in callbacks if isinstance(part, ModelSummary)]
    assert summaries == [summary] * (summary is not None)


@pytest.mark.slow
def test_an_offline_wandb_run_says_only_how_to_upload_it(command, tmp_path):
    """In a process of its own, since W&B reads its variables once."""
    names = ("WANDB_QUIET", "WANDB_SHOW_INFO", "WANDB_SILENT")
    variables = {name: value for name, value in os.environ.items() if name not in names}
    words = [sys.executable, "-m", "minirec_pl", *command.warm(tmp_path, *UNSET, WANDB)]
    done = subprocess.run(words, env=variables, capture_output=True, text=True, check=True)
    said = [line for line in done.stderr.splitlines() if "W&B" in line or line.startswith("wandb")]
    (folder,) = (tmp_path / "version_0" / "wandb").glob("offline-run-*")
    assert said == [f"W&B: offline; to upload this run: wandb sync {folder}"]
