"""LightningCLI with run folders, sentences instead of tracebacks, and `--selection`."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shlex
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerStatus
from transformers.utils.logging import disable_progress_bar

from minirec_pl.checkpoints import AtomicCheckpointIO, check_checkpoint
from minirec_pl.errors import InputError
from minirec_pl.recommender import RecModule
from minirec_pl.run_folder import RunFolder
from minirec_pl.score import ScoringTrainer
from minirec_pl.selection.session_callback import SessionCallback
from minirec_pl.sentences import check_yaml, one_sentence

RUN_DIR_VARIABLE = "MINIREC_RUN_DIR"
CONFIG = "config.yaml"
NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
LEFT_BY_A_FAILED_START = {CONFIG, "hparams.yaml", "metrics.csv", "wandb"}


class ParserError(ValueError):
    """What jsonargparse found, in its own many lines; nested in those of an outer parser."""


class Parser(LightningArgumentParser):
    """Raises what it finds, rather than print it and exit."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raises ParserError."""
        raise ParserError(message) from ex


class MiniRecCLI(LightningCLI):
    """`minirec fit|validate|test|predict|score`.

    Every run gets a folder of its own, `<trainer.default_root_dir>/version_N`, with its `config.yaml`; after a fit
    `<trainer.default_root_dir>/latest` points to it.
    """

    run_dir: Path
    new_folders: Sequence[Path] = ()

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Those of the Trainer, and `score`."""
        return {**LightningCLI.subcommands(), "score": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `--selection`."""
        parser.add_argument(
            "--selection",
            type=SessionCallback | None,
            default=None,
            help="Which samples an epoch trains on; null for the whole pool, shuffled anew each epoch. "
            "--selection.help=minirec_pl.callbacks.MiniRec lists the options of the usual choice.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses, then checks the checkpoint before anything reads it."""
        arguments, sys.argv = sys.argv, sys.argv[:1]
        try:
            super().parse_arguments(parser, args)
        finally:
            sys.argv = arguments
        checkpoint = self.config[self.config.subcommand].get("ckpt_path")
        if checkpoint and checkpoint not in ("best", "last", "hpc"):
            check_checkpoint(Path(checkpoint))

    def before_instantiate_classes(self) -> None:
        """Claims the run folder, writes the config into it and sends the loggers there."""
        config = self.config[self.subcommand]
        root = Path(config.trainer.default_root_dir or "runs")
        self.new_folders = [folder for folder in (root, *root.parents) if not folder.exists()]
        self.run_dir = _claim(root)
        _pin_policy(config)
        if "LOCAL_RANK" not in os.environ:
            self._parser(self.subcommand).save(config, self.run_dir / CONFIG, skip_none=False, overwrite=True)
        config.trainer.default_root_dir = str(self.run_dir)
        if self.subcommand == "score":
            config.trainer.logger = False
        loggers = config.trainer.logger
        if loggers is None or loggers is True:
            config.trainer.logger = [_csv_logger(self.run_dir)]
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            _send_to(logger, self.run_dir)
        for callback in config.trainer.callbacks or []:
            if str(callback.class_path).endswith("ModelCheckpoint") and callback.init_args.dirpath is None:
                callback.init_args.dirpath = str(self.run_dir / "checkpoints")

    def instantiate_classes(self) -> None:
        """Makes model, data and Trainer.

        Raises:
            InputError: for a value that one of them refuses.
        """
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise InputError(_input_error_in(error) or one_sentence(str(error))) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with the selection, the run folder's callback and checkpoints that are written whole."""
        selection = self._get(self.config_init, "selection")
        callbacks: list[Callback] = [selection] if selection is not None else []
        self.trainer_defaults["callbacks"] = [*callbacks, RunFolder()]
        if not self._get(self.config_init, "trainer").get("plugins"):
            kwargs["plugins"] = [AtomicCheckpointIO()]
        return super().instantiate_trainer(**kwargs)

    def discard_failed_start(self) -> None:
        """Removes the run folder where the run never got as far as leaving something of use."""
        if not hasattr(self, "run_dir") or "LOCAL_RANK" in os.environ:
            return
        left = {path.relative_to(self.run_dir).parts[0] for path in self.run_dir.rglob("*") if not path.is_dir()}
        if left <= LEFT_BY_A_FAILED_START:
            shutil.rmtree(self.run_dir, ignore_errors=True)
            with contextlib.suppress(OSError):
                for folder in self.new_folders:
                    folder.rmdir()

    def after_fit(self) -> None:
        """Points `latest` to this run."""
        if self.trainer.is_global_zero:
            scratch = self.run_dir.with_name(".latest")
            scratch.unlink(missing_ok=True)
            scratch.symlink_to(self.run_dir.name, target_is_directory=True)
            os.replace(scratch, self.run_dir.with_name("latest"))

    def predict(self, model: RecModule, **kwargs: Any) -> None:
        """Writes `predictions.parquet`: user_id, item_id, score, rank with external ids."""
        from minirec_pl.predictions import write_predictions

        batches = self.trainer.predict(model, **kwargs)
        path = write_predictions(batches or [], model, self.datamodule, self.run_dir / "predictions.parquet")
        print(f"predictions: {path}")


def _claim(root: Path) -> Path:
    if RUN_DIR_VARIABLE in os.environ and "LOCAL_RANK" in os.environ:
        return Path(os.environ[RUN_DIR_VARIABLE])
    try:
        root.mkdir(parents=True, exist_ok=True)
        number = 0
        while True:
            folder = root / f"version_{number}"
            try:
                folder.mkdir()
            except FileExistsError:
                number += 1
            else:
                os.environ[RUN_DIR_VARIABLE] = str(folder)
                return folder
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(
            f"cannot make a run folder in '{root}' ({reason}): choose another with --trainer.default_root_dir"
        ) from error


def _pin_policy(config: Any) -> None:
    """Names the run a policy comes from, not `latest`, which moves on."""
    policy: Any = config.get("model.init_args.policy.init_args")
    if policy is not None and policy.get("pretrained") and Path(policy.pretrained).is_dir():
        policy.pretrained = os.path.relpath(Path(policy.pretrained).resolve())


def _csv_logger(folder: Path) -> Any:
    init_args = Namespace(save_dir=str(folder), name="", version="")  # type: ignore[no-untyped-call]
    return Namespace(class_path="lightning.pytorch.loggers.CSVLogger", init_args=init_args)  # type: ignore[no-untyped-call]


def _send_to(logger: Any, folder: Path) -> None:
    kind = str(getattr(logger, "class_path", "")).rsplit(".", 1)[-1]
    if kind in (CSVLogger.__name__, WandbLogger.__name__, "TensorBoardLogger"):
        logger.init_args.save_dir = str(folder)
    if kind in (CSVLogger.__name__, "TensorBoardLogger"):
        logger.init_args.name, logger.init_args.version = "", ""


def run(args: Sequence[str]) -> MiniRecCLI:
    """Runs one of the Trainer's subcommands.

    Args:
        args: as on the command line, the subcommand first.

    Raises:
        InputError: for bad input, and when Ctrl-C stopped the run (the sentence then says how to resume).
    """
    argv = _configs_first([*args, *_config_of_checkpoint(args)])
    for config in _values(argv, "--config", "-c"):
        check_yaml(Path(config))
    cli = MiniRecCLI.__new__(MiniRecCLI)
    finished = False
    try:
        with _own_process_state():
            cli.__init__(  # type: ignore[misc]
                RecModule,
                LightningDataModule,
                trainer_class=ScoringTrainer,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=None,
                auto_configure_optimizers=False,
                seed_everything_default=42,
                parser_class=Parser,
                parser_kwargs={"prog": "minirec"},
                args=argv,
            )
        finished = True
    except (SystemExit, KeyboardInterrupt) as stop:
        trainer = getattr(cli, "trainer", None)
        by_lightning = trainer is not None and trainer.state.status == TrainerStatus.INTERRUPTED
        if isinstance(stop, SystemExit) and not by_lightning:
            raise
        raise InputError(_interrupted(cli)) from stop
    except ParserError as error:
        raise InputError(_input_error_in(error) or one_sentence(str(error))) from error
    except MisconfigurationException as error:
        raise InputError(" ".join(str(error).split())) from error
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        where = error.filename or getattr(cli, "run_dir", "the run folder")
        reason = os.strerror(error.errno).lower()
        raise InputError(
            f"cannot write '{where}' ({reason}): free some space or choose another --trainer.default_root_dir"
        ) from error
    finally:
        _finish_wandb(failed=not finished)
        if not finished:
            cli.discard_failed_start()
    return cli


def _finish_wandb(failed: bool) -> None:
    """Ends the W&B run, so that the next run of this process does not log into it."""
    wandb = sys.modules.get("wandb")
    if wandb is not None and wandb.run is not None:
        with contextlib.suppress(OSError):
            wandb.finish(exit_code=int(failed))


@contextlib.contextmanager
def _own_process_state() -> Iterator[None]:
    """Quiets advertisements, and gives Ctrl-C back at the end."""
    disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)
    handler = signal.getsignal(signal.SIGINT)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Experiment logs directory .* exists and is not empty")
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
            yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage()[:10]


def _input_error_in(error: BaseException | None) -> str | None:
    """The sentence of an InputError that the parser has wrapped."""
    while error is not None:
        if isinstance(error, InputError):
            return str(error)
        error = error.__cause__ or error.__context__
    return None


def _interrupted(cli: MiniRecCLI) -> str:
    if getattr(cli, "subcommand", None) != "fit" or not hasattr(cli, "run_dir"):
        return "interrupted; nothing was written"
    run_dir = cli.run_dir
    checkpoints = sorted((run_dir / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not checkpoints:
        return "interrupted before the first checkpoint; there is nothing to resume from, so start again"
    if (run_dir / "policy").is_dir():
        return f"interrupted after the last step; the run in {run_dir} is complete"
    command = ["minirec", "fit", "--config", str(run_dir / CONFIG), "--ckpt_path", str(checkpoints[-1])]
    return f"interrupted; resume with `{shlex.join(command)}`"


def _config_of_checkpoint(args: Sequence[str]) -> list[str]:
    """The config a run left beside its checkpoints, where only `--ckpt_path` is given."""
    checkpoints = _values(args, "--ckpt_path")
    if not checkpoints or _values(args, "--config", "-c"):
        return []
    check_checkpoint(Path(checkpoints[-1]))
    config = Path(checkpoints[-1]).parent.parent / CONFIG
    if not config.is_file():
        raise InputError(f"there is no '{config}' beside the checkpoint: name the config of its run with --config")
    return ["--config", str(config)]


def _configs_first(args: Sequence[str]) -> list[str]:
    """Moves the config files before all other options, so that none of their keys overrides what the user typed."""
    configs: list[str] = []
    others: list[str] = []
    words = iter(args[1:])
    for word in words:
        if word in ("--config", "-c"):
            configs += [word, *islice(words, 1)]
        else:
            (configs if word.startswith("--config=") else others).append(word)
    return [*args[:1], *configs, *others]


def _values(args: Sequence[str], *options: str) -> list[str]:
    """What is given to an option, as `--option VALUE` or `--option=VALUE`."""
    words = [word for arg in args for word in (arg.split("=", 1) if arg.startswith("--") else [arg])]
    return [value for option, value in pairwise(words) if option in options]
