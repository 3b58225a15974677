"""Which run a command goes on with: its folder, its checkpoint, and the folder that its paths are relative to."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from minirec_pl.cli.arguments import config_of_checkpoint, configs_first, values_of
from minirec_pl.cli.sentences import check_yaml
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.files import check_checkpoint
from minirec_pl.utils.run_folder import (
    CHECKPOINT_VARIABLE,
    CHECKPOINTS,
    CONFIG,
    RESULTS,
    STARTED_IN_VARIABLE,
    WARM_START,
    WARM_STATE,
)

OF_LIGHTNING = ("best", "last", "hpc")  # which it finds by itself
_WRITTEN = ("to", "default_root_dir", "dirpath", "save_dir")  # options that name what need not exist yet
_EPOCHS = 1000  # of a Trainer that is given no limit


class NothingToTrain(Exception):
    """A fit that has nothing left to do; the message says why."""


@dataclass(frozen=True)
class Trained:
    """How far a checkpoint is.

    Attributes:
        epochs: that were trained to their last batch.
        steps: of the optimizer.
        logged_steps: as Lightning counts them for loggers.
    """

    epochs: int
    steps: int
    logged_steps: int

    @classmethod
    def until(cls, checkpoint: Path) -> Trained:
        """Reads it from a checkpoint.

        Raises:
            InputError: if the checkpoint holds weights only.
        """
        import torch

        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        if "loops" not in content or "optimizer_states" not in content:
            raise InputError(
                f"'{checkpoint}' holds weights only, so that no run resumes from it: start from the run's policy/ with "
                "`pretrained`, and leave save_weights_only out of the ModelCheckpoint"
            )
        loop = content["loops"]["fit_loop"]
        epochs, batches = loop["epoch_progress"]["current"], loop["epoch_loop.batch_progress"]
        inside = epochs["processed"] < epochs["ready"]
        whole = batches["is_last_batch"] and batches["current"]["processed"] >= batches["current"]["ready"]
        logged = loop["epoch_loop.state_dict"]["_batches_that_stepped"]
        return cls(epochs["processed"] + int(inside and whole), content["global_step"], logged)

    def reaches(self, max_epochs: int | None, max_steps: int) -> bool:
        """Says whether a Trainer with these limits has nothing left to train."""
        if max_epochs is None:
            max_epochs = _EPOCHS if max_steps < 0 else -1
        return 0 <= max_epochs <= self.epochs or 0 <= max_steps <= self.steps


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint lies in, if it lies in one."""
    folder = checkpoint.parent.parent
    return folder if checkpoint.parent.name == CHECKPOINTS and (folder / CONFIG).is_file() else None


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((run / CHECKPOINTS).glob("*.ckpt"), key=lambda path: path.stat().st_mtime)


def is_complete(run: Path, tested: bool) -> bool:
    """Says whether a fit has written its last file.

    Args:
        run: its folder.
        tested: whether it tests its stages.
    """
    if not (run / RESULTS).is_file():
        return False
    results = json.loads((run / RESULTS).read_text(encoding="utf-8"))
    return results["stage"] == "fit" and (not tested or "stages" in results)


def stopped_before_a_checkpoint(config: Path, content: Any) -> Path | None:
    """The folder of the run that a config is of, if that run was killed before it had a checkpoint.

    Args:
        config: file that was given.
        content: of the config that results from it and from what was typed; None unless both are the same.
    """
    run = config.resolve().parent
    if config.name != CONFIG or checkpoints_of(run) or (run / RESULTS).is_file():
        return None
    written = _content(config)
    root = Path(written["trainer"]["default_root_dir"] or "runs").resolve() if written.get("working_dir") else None
    return run if root == run.parent and same_run(written, content) else None


def same_run(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Compares two configs of fits, but for where they are and where they go on."""
    one, other = (
        {**config, "trainer": {**config["trainer"], "default_root_dir": None}, "ckpt_path": None, "working_dir": None}
        for config in (one, other)
    )
    return one == other


def resumed(config: Any, content: dict[str, Any], words: Sequence[str]) -> tuple[Trained | None, Path | None]:
    """Finds what a fit goes on with.

    Args:
        config: of the fit.
        content: the same as YAML has it.
        words: of the command line.

    Returns:
        How far its checkpoint is, if it has one; the folder of the run that it stays in, if it resumes one there.

    Raises:
        NothingToTrain: if the run has come to its end.
        InputError: if the checkpoint holds weights only.
    """
    given = [Path(path) for path in values_of(words, "--config", "-c")]
    elsewhere = bool(values_of(words, "--trainer.default_root_dir"))
    if config.ckpt_path in OF_LIGHTNING:
        return None, None
    if not config.ckpt_path:
        run = stopped_before_a_checkpoint(given[-1], content) if given else None
        return None, None if elsewhere else run
    checkpoint = Path(config.ckpt_path)
    trained, run = Trained.until(checkpoint), run_of(checkpoint)
    if run is not None and any(path.resolve() != run / CONFIG for path in given):
        elsewhere |= Path(config.trainer.default_root_dir or "runs").resolve() != run.parent
    if run is None or is_complete(run, config.test_stages):
        where = f"{'the checkpoint' if run is None else f'the run in {run}'} is at epoch {trained.epochs}"
        if trained.reaches(config.trainer.max_epochs, config.trainer.max_steps):
            raise NothingToTrain(
                f"nothing left to train: {where}, step {trained.steps}; raise --trainer.max_epochs or max_steps"
            )
        if run is not None and not elsewhere and same_run(_content(run / CONFIG), content):
            raise NothingToTrain(f"nothing left to train: {where}, where it was stopped early; leave out what did that")
    return trained, None if elsewhere else run


def _content(config: Path) -> Any:
    return yaml.safe_load(config.read_text(encoding="utf-8"))


def _resolved(args: Sequence[str]) -> list[str]:
    """The words with the real path of `--ckpt_path`, so that a `latest` that moves later changes nothing.

    Raises:
        InputError: if there is no such checkpoint.
    """
    words, checkpoints = list(args), values_of(args, "--ckpt_path")
    if not checkpoints or checkpoints[-1] in OF_LIGHTNING:
        os.environ.pop(CHECKPOINT_VARIABLE, None)
        return words
    if "LOCAL_RANK" not in os.environ or CHECKPOINT_VARIABLE not in os.environ:
        path = Path(checkpoints[-1]).resolve()
        if not path.is_file():
            raise InputError(_missing(Path(checkpoints[-1]), path))
        check_checkpoint(path)
        os.environ[CHECKPOINT_VARIABLE] = str(path)
    return [*words, f"--ckpt_path={os.environ[CHECKPOINT_VARIABLE]}"]


def _missing(given: Path, path: Path) -> str:
    run, what = run_of(path), f"there is no checkpoint '{given}'"
    if run is None:
        return f"{what}: give --ckpt_path a file from a run's {CHECKPOINTS}/ folder"
    if checkpoints := checkpoints_of(run):
        return f"{what}: the newest of its run is {checkpoints[-1]}, so give --ckpt_path that"
    return f"{what}: its run was stopped before its first, or has not come to it yet; {go_on(run)}"


def go_on(run: Path) -> str:
    """Says how a run that was stopped before its first checkpoint goes on."""
    command = shlex.join(["minirec", "fit", "--config", str(run / CONFIG)])
    if (run / WARM_START / WARM_STATE).is_file():
        return f"after a stop, go on from the end of its warm start with `{command}`"
    return f"after a stop, start it again with `{command}`"


def tidy(run: Path) -> None:
    """Removes what a killed process had half-written in its run folder."""
    for path in list(run.rglob(".*")):
        if path.name.endswith(".tmp") and path.is_file():
            path.unlink(missing_ok=True)
        elif path.is_dir() and path.name.startswith(".policy-"):
            shutil.rmtree(path, ignore_errors=True)


def _working_dir(args: Sequence[str]) -> Path | None:
    """The folder that paths in the configs are relative to, if it is another than the present one.

    A run's config names the folder that the run was started in. If the whole folder was copied and the copy is the
    present one, it counts.

    Args:
        args: of the command line, with configs that have been checked.

    Raises:
        InputError: if the folder is typed and does not exist.
    """
    typed = values_of(args, "--working_dir")
    if typed and typed[-1] != "null" and not Path(typed[-1]).is_dir():
        raise InputError(f"working_dir is '{typed[-1]}', which is no folder: give the one that relative paths are in")
    given: Any = typed[-1] if typed else None
    for config in values_of(args, "--config", "-c") if not typed else ():
        content = _content(Path(config))
        named, root = content.get("working_dir"), (content.get("trainer") or {}).get("default_root_dir")
        run = Path(config).resolve().parent
        if named and not (root and not Path(root).is_absolute() and Path(root).resolve() == run.parent):
            given = named
    folder = None if given in (None, "null") else Path(given).resolve()
    return folder if folder is not None and folder.is_dir() and folder != Path.cwd() else None


def _from_here(args: Sequence[str]) -> list[str]:
    """The words with absolute paths where they name what is there, or what is to be written."""
    words, option = list[str](), ""
    for word in args:
        name, equals, value = word.partition("=")
        if not word.startswith("-"):
            name, equals, value = option, "", word
        known = value and (name.rpartition(".")[2].lstrip("-") in _WRITTEN or Path(value).exists())
        words.append(f"{name}{equals}{os.path.abspath(value)}" if equals and known else word)
        if not equals and known and not word.startswith("-"):
            words[-1] = os.path.abspath(value)
        option = word if word.startswith("-") else ""
    return words


@contextlib.contextmanager
def in_working_dir(args: Sequence[str]) -> Iterator[list[str]]:
    """Lends the words of a command, checkpoint and config named, and the folder that their paths are relative to.

    Raises:
        InputError: if the checkpoint or a config is not there.
    """
    first = os.environ.get(STARTED_IN_VARIABLE) if "LOCAL_RANK" in os.environ else None
    with _inside(None if first is None else Path(first)):
        words = _resolved(args)
        words = configs_first([*words, *config_of_checkpoint(words)])
        for config in values_of(words, "--config", "-c"):
            check_yaml(Path(config))
        folder = _working_dir(words)
        if folder is not None:
            os.environ[STARTED_IN_VARIABLE] = os.getcwd()
            words = _from_here(words)
        with _inside(folder):
            yield words


@contextlib.contextmanager
def _inside(folder: Path | None) -> Iterator[None]:
    """Works in a folder, in which modules are found too; None stays where it is."""
    if folder is None:
        yield
        return
    here, path = os.getcwd(), sys.path
    try:
        os.chdir(folder)
        sys.path = [*path, str(folder)]
        yield
    finally:
        os.chdir(here)
        sys.path = path
