"""LightningCLI with run folders, sentences instead of tracebacks, and `--selection`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerStatus

from minirec_pl.callbacks import MiniRec, RunFolder
from minirec_pl.callbacks.run_folder import INTERRUPTED
from minirec_pl.errors import InputError
from minirec_pl.recommender import RecModule

RUN_DIR_VARIABLE = "MINIREC_RUN_DIR"


class Parser(LightningArgumentParser):
    """Says what is wrong in one sentence."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raises InputError in place of printing the usage."""
        raise InputError(" ".join(str(message).split())) from ex


class MiniRecCLI(LightningCLI):
    """`minirec fit|validate|test|predict`.

    Every run gets a folder of its own, `<trainer.default_root_dir>/version_N`, with its `config.yaml`; after a fit
    `<trainer.default_root_dir>/latest` points to it.
    """

    run_dir: Path

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `--selection`."""
        parser.add_argument(
            "--selection",
            type=MiniRec | None,
            default=None,
            help="Which samples an epoch trains on; null for the whole pool, shuffled anew each epoch.",
        )

    def before_instantiate_classes(self) -> None:
        """Claims the run folder, writes the config into it and sends the loggers there."""
        config = self.config[self.subcommand]
        ckpt_path = config.get("ckpt_path")
        if ckpt_path and ckpt_path not in ("best", "last", "hpc") and not Path(ckpt_path).is_file():
            raise InputError(
                f"there is no checkpoint '{ckpt_path}': give --ckpt_path a file from a run's checkpoints/ folder"
            )
        root = Path(config.trainer.default_root_dir or "runs")
        self.run_dir = _claim(root)
        if "LOCAL_RANK" not in os.environ:
            self._parser(self.subcommand).save(config, self.run_dir / "config.yaml", skip_none=False, overwrite=True)
        config.trainer.default_root_dir = str(self.run_dir)
        loggers = config.trainer.logger
        if loggers is None or loggers is True:
            config.trainer.logger = [_csv_logger(self.run_dir)]
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            _send_to(logger, self.run_dir)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with the selection and the run folder's callback."""
        selection = self._get(self.config_init, "selection")
        callbacks: list[Callback] = [selection] if selection is not None else []
        self.trainer_defaults["callbacks"] = [*callbacks, RunFolder()]
        return super().instantiate_trainer(**kwargs)

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


def _csv_logger(folder: Path) -> Any:
    init_args = Namespace(save_dir=str(folder), name="", version="")  # type: ignore[no-untyped-call]
    return Namespace(class_path="lightning.pytorch.loggers.CSVLogger", init_args=init_args)  # type: ignore[no-untyped-call]


def _send_to(logger: Any, folder: Path) -> None:
    kind = str(getattr(logger, "class_path", "")).rsplit(".", 1)[-1]
    if kind in (CSVLogger.__name__, WandbLogger.__name__, "TensorBoardLogger"):
        logger.init_args.save_dir = str(folder)
    if kind == CSVLogger.__name__:
        logger.init_args.name, logger.init_args.version = "", ""


def run(args: Sequence[str]) -> MiniRecCLI:
    """Runs one of the Trainer's subcommands.

    Args:
        args: as on the command line, the subcommand first.

    Raises:
        InputError: for bad input, and when Ctrl-C stopped a fit (the sentence then says how to resume).
    """
    argv = [*args, *_config_of_checkpoint(args)]
    before, sys.argv = sys.argv, sys.argv[:1]
    cli = MiniRecCLI.__new__(MiniRecCLI)
    try:
        cli.__init__(  # type: ignore[misc]
            RecModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            auto_configure_optimizers=False,
            seed_everything_default=42,
            parser_class=Parser,
            parser_kwargs={"prog": "minirec"},
            args=argv,
        )
    except SystemExit as stop:
        trainer = getattr(cli, "trainer", None)
        if trainer is None or trainer.state.status != TrainerStatus.INTERRUPTED:
            raise
        raise InputError(_interrupted(cli, argv)) from stop
    finally:
        sys.argv = before
    return cli


def _interrupted(cli: MiniRecCLI, argv: Sequence[str]) -> str:
    kept = cli.run_dir / "checkpoints" / INTERRUPTED
    if not kept.is_file():
        return "interrupted before the first training step: nothing to resume from"
    config = cli.run_dir / "config.yaml"
    return f"interrupted; resume with `minirec fit --config {config} --ckpt_path {kept}`"


def _config_of_checkpoint(args: Sequence[str]) -> list[str]:
    """The config a run left beside its checkpoints, where only `--ckpt_path` is given."""
    words = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--") else [arg])]
    if "--config" in words or "-c" in words or "--ckpt_path" not in words[:-1]:
        return []
    config = Path(words[words.index("--ckpt_path") + 1]).parent.parent / "config.yaml"
    return ["--config", str(config)] if config.is_file() else []
