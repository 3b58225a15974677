"""The `minirec` command on a toy dataset, and faults to meet on the way."""

import json
import os
import signal
from pathlib import Path

import torch
from lightning.pytorch import Callback

from .paths import REPOSITORY
from .toy_data import random_rows, write_dataset

CONFIGS = REPOSITORY / "configs" / "ml-100k"
TINY = (
    "{model_type: llama, hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2, "
    "max_position_embeddings: 64, attention_dropout: 0.3}"
)
QUIET = ["--trainer.logger=null", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


def write_toy(root, name="toy", n_items=80, seed=0):
    """A dataset of 1,500 interactions."""
    return write_dataset(root, random_rows(seed, n=1500, n_users=25, n_moments=600, n_items=n_items), name=name)


class Command:
    """Arguments of `minirec fit` for the shipped configs on the toy dataset."""

    def __init__(self, folder):
        self.folder = folder
        self.data = folder / "data"
        self.policy = folder / "warm" / "latest" / "policy"

    def fit(self, config, root, *more):
        data = [f"--data.path={self.data}", "--data.dataset=toy", "--data.warm_fraction=0.8", "--data.batch_size=16"]
        trainer = [f"--trainer.default_root_dir={root}", "--trainer.max_epochs=2", "--trainer.accelerator=cpu", *QUIET]
        trainer += ["--trainer.check_val_every_n_epoch=1"]
        window = ["--data.history_window=10"]
        return ["fit", "--config", str(CONFIGS / config), *data, *window, *trainer, *more]

    def warm(self, root, *more):
        return self.fit("warm-start.yaml", root, f"--model.policy.config={TINY}", *more)

    def grpo(self, root, *more):
        options = ["--selection.budget=0.4", "--model.num_generations=4", f"--model.policy.pretrained={self.policy}"]
        return self.fit("quickstart.yaml", root, *options, *more)


def results(run):
    """`results.json` of a run folder without what depends on the clock, the folder and where the run was resumed."""
    values = json.loads((Path(run) / "results.json").read_text())
    return {name: value for name, value in values.items() if name not in ("seconds", "best_checkpoint", "changed")}


def weights(run):
    from safetensors.torch import load_file

    return load_file(Path(run) / "policy" / "model.safetensors")


def equal_weights(one, other):
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class InterruptAt(Callback):
    """Presses Ctrl-C when a hook is called for the n-th time."""

    armed = True

    def __init__(self, hook: str, call: int = 1, times: int = 1):
        self.left, self.times = call, times
        setattr(self, hook, self._press)

    def _press(self, *args, **kwargs):
        self.left -= 1
        if self.left == 0 and self.armed:
            for _ in range(self.times):
                os.kill(os.getpid(), signal.SIGINT)


def interrupt(hook, call=1, times=1):
    """Options that add InterruptAt."""
    name = "--trainer.callbacks"
    return [
        f"{name}+=helpers.cli_tools.InterruptAt",
        f"{name}.hook={hook}",
        f"{name}.call={call}",
        f"{name}.times={times}",
    ]


def sentence(capsys):
    """The one sentence on stderr; nothing there may be a traceback."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("minirec: error: ")]
    assert len(lines) == 1, err
    return lines[0].removeprefix("minirec: error: ")


def nan_reward(completions, sample_id):
    return [float("nan")] * len(completions)


def short_reward(completions, sample_id):
    return [1.0]


def interrupting_reward(completions):
    os.kill(os.getpid(), signal.SIGINT)
    return [1.0] * len(completions)


def silent_reward(completions):
    return [None] * len(completions)
