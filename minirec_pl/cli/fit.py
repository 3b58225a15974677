"""LightningCLI with run folders, sentences instead of tracebacks, and `--selection`."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.trainer.states import TrainerStatus

from minirec_pl.callbacks.run_folder import RunFolder, best_checkpoint
from minirec_pl.cli.arguments import class_of, config_of_checkpoint, configs_first, values_of
from minirec_pl.cli.early import with_nearest_option
from minirec_pl.cli.process import finish_wandb, own_process_state, quiet_wandb, without_anonymous
from minirec_pl.cli.progress import progress_lines
from minirec_pl.cli.score import ScoringTrainer
from minirec_pl.cli.sentences import CommentFormatter, check_yaml, sentence_of
from minirec_pl.cli.stages import STAGES, WARM_START, Stages, WarmStart
from minirec_pl.policy import Policy
from minirec_pl.selection.session.callback import SessionCallback
from minirec_pl.trainers.recommender import RecModule
from minirec_pl.utils.checkpoints import AtomicCheckpointIO, policy_of
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.files import check_checkpoint, write_atomically
from minirec_pl.utils.run_folder import CONFIG, claim_folder, csv_logger, is_first, pin_policy, send_to
from minirec_pl.utils.seeds import check_seed

NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
LEFT_BY_A_FAILED_START = {CONFIG, "hparams.yaml", "metrics.csv", "wandb", STAGES, WARM_START}
SHARED = (  # what the Trainers of a run have in common
    "accelerator",
    "strategy",
    "devices",
    "num_nodes",
    "precision",
    "fast_dev_run",
    "limit_test_batches",
    "log_every_n_steps",
    "enable_progress_bar",
    "deterministic",
    "benchmark",
)


class ParserError(ValueError):
    """What jsonargparse found, in its own many lines; nested in those of an outer parser."""


class Parser(LightningArgumentParser):
    """Raises errors instead of printing them and exiting; prints a config with one line of comment per option."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raises ParserError."""
        raise ParserError(message) from ex

    def dump(self, *args: Any, with_comments: bool = False, **kwargs: Any) -> str:
        """The config as YAML, with a line of comment above each option if asked for."""
        usual = self.formatter_class
        self.formatter_class = CommentFormatter if with_comments else usual
        try:
            text: str = super().dump(*args, with_comments=with_comments, **kwargs)
        finally:
            self.formatter_class = usual
        return text


CLI_OPTIONS: dict[str, Any] = {
    "trainer_class": ScoringTrainer,
    "subclass_mode_model": True,
    "subclass_mode_data": True,
    "save_config_callback": None,
    "auto_configure_optimizers": False,
    "seed_everything_default": 42,
    "parser_class": Parser,
}


class MiniRecCLI(LightningCLI):
    """`minirec fit|validate|test|predict|score`.

    Every run gets a folder of its own, `<trainer.default_root_dir>/version_N`, with its `config.yaml`; after a fit
    `<trainer.default_root_dir>/latest` points to it.
    """

    run_dir: Path
    side_trainer: Trainer | None = None
    new_folders: Sequence[Path] = ()
    more_callbacks: Sequence[Callback] = ()
    usage = "minirec {}"

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Those of the Trainer, and `score`."""
        return {**LightningCLI.subcommands(), "score": {"model", "datamodule"}}

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        """Makes the parsers, whose usage lines name the command as it is typed."""
        super().setup_parser(*args, **kwargs)
        for name, parser in getattr(self, "_subcommand_parsers", {}).items():
            parser.prog = self.usage.format(name)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds `--selection`, `--warm_start` and `--test_stages`."""
        parser.add_argument(
            "--selection",
            type=SessionCallback | None,
            default=None,
            help="Which samples an epoch trains on; null for the whole pool, shuffled anew each epoch. "
            "--selection.help=minirec_pl.callbacks.MiniRec lists the options of the usual choice.",
        )
        parser.add_argument(
            "--warm_start",
            type=WarmStart | None,
            default=None,
            help="The supervised stage before GRPO, in the same run; null to start from the policy as it is.",
        )
        parser.add_argument(
            "--test_stages",
            type=bool,
            default=False,
            help="Test the policy before the fit, after the warm start and at the end, next to popularity.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses, then checks the seed and the checkpoint before anything reads them."""
        arguments, sys.argv = sys.argv, sys.argv[:1]
        try:
            super().parse_arguments(parser, args)
        finally:
            sys.argv = arguments
        given = self.config[self.config.subcommand]
        if not isinstance(given.seed_everything, bool):
            check_seed(given.seed_everything, "seed_everything")
        checkpoint = given.get("ckpt_path")
        if checkpoint and checkpoint not in ("best", "last", "hpc"):
            check_checkpoint(Path(checkpoint))

    def before_instantiate_classes(self) -> None:
        """Claims the run folder, writes the config into it and sends the loggers there."""
        config = self.config[self.subcommand]
        root = Path(config.trainer.default_root_dir or "runs")
        self.new_folders = [folder for folder in (root, *root.parents) if not folder.exists()]
        self.run_dir = claim_folder(root)
        pin_policy(config)
        if is_first():
            self._parser(self.subcommand).save(config, self.run_dir / CONFIG, skip_none=False, overwrite=True)
        config.trainer.default_root_dir = str(self.run_dir)
        if self.subcommand == "score":
            config.trainer.logger = False
        loggers = config.trainer.logger
        if loggers is None or loggers is True:
            config.trainer.logger = [csv_logger(self.run_dir)]
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            send_to(logger, self.run_dir)
            if str(getattr(logger, "class_path", "")).endswith("WandbLogger"):
                quiet_wandb(bool(logger.init_args.get("offline")))
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
            raise InputError(sentence_of(error)) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with the selection, the run folder's callback and checkpoints that are written whole.

        A line per epoch replaces the progress bar where the output is not a terminal, and a model summary comes only if
        it is asked for.
        """
        selection, given = self._get(self.config_init, "selection"), self._get(self.config_init, "trainer")
        callbacks: list[Callback] = [selection] if selection is not None else []
        callbacks += [*self.more_callbacks, RunFolder()]
        if not given.barebones and not any(isinstance(callback, ProgressBar) for callback in given.callbacks or []):
            callbacks += progress_lines(given.enable_progress_bar)
        self.trainer_defaults["callbacks"] = callbacks
        if given.enable_model_summary is None:
            kwargs["enable_model_summary"] = False
        if not given.get("plugins"):
            kwargs["plugins"] = [AtomicCheckpointIO()]
        trainer = super().instantiate_trainer(**kwargs)
        for logger in trainer.loggers:
            without_anonymous(logger)
        return trainer

    def discard_failed_start(self) -> None:
        """Removes the run folder where the run never got as far as leaving something of use."""
        if not hasattr(self, "run_dir") or not is_first():
            return
        left = {path.relative_to(self.run_dir).parts[0] for path in self.run_dir.rglob("*") if not path.is_dir()}
        if left <= LEFT_BY_A_FAILED_START and not (self.run_dir / WARM_START / "policy").is_dir():
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

    def fit(self, model: RecModule, datamodule: LightningDataModule, **kwargs: Any) -> None:
        """The warm start if there is one, GRPO, and the tests of the stages; a checkpoint resumes GRPO."""
        warm, tested = self._get(self.config_init, "warm_start"), self._get(self.config_init, "test_stages")
        stages = Stages(self._side_trainer, self.run_dir, model, datamodule, tested)  # type: ignore[arg-type]
        if kwargs.get("ckpt_path"):
            stages.take_over(Path(kwargs["ckpt_path"]))
        elif warm is not None or tested:
            stages.prepare(warm, self.trainer)
            stages.test("start")
            if warm is not None:
                stages.warm_start(warm, self.trainer)
                self._write_config_after_warm_start()
                stages.test("warm_start")
        self.trainer.fit(model, datamodule=datamodule, **kwargs)
        if tested:
            with policy_of(model.policy, best_checkpoint(self.trainer)):
                stages.test("trained")
            if self.trainer.is_global_zero:
                stages.finish()

    def _write_config_after_warm_start(self) -> None:
        """The config of a fit that starts from the warm policy, for a run that breaks before its first checkpoint."""
        folder = self.run_dir / WARM_START
        config = yaml.safe_load((self.run_dir / CONFIG).read_text(encoding="utf-8"))
        text = yaml.safe_dump(config_after_warm_start(config, folder / "policy"), sort_keys=False)
        write_atomically(folder / CONFIG, lambda scratch: scratch.write_text(text, encoding="utf-8"))

    def _side_trainer(self, **options: Any) -> Trainer:
        """A Trainer on the same devices; Ctrl-C in it is known as one of this run."""
        given = self._get(self.config_init, "trainer")
        shared = {name: given[name] for name in SHARED if name in given}
        options["callbacks"] = [*options.get("callbacks", ()), *progress_lines(given.enable_progress_bar)]
        self.side_trainer = Trainer(**shared, enable_model_summary=False, **options)
        return self.side_trainer


def config_after_warm_start(config: dict[str, Any], policy: Path) -> dict[str, Any]:
    """The config of a fit that starts from a warm policy instead of making one.

    Args:
        config: of a fit with a warm start; its policy is changed in place.
        policy: folder of the warm policy.
    """
    given = config["model"]["init_args"]["policy"]
    kind: type[Policy] = class_of(given["class_path"])
    given["init_args"] |= dict.fromkeys(kind.made_of & set(given["init_args"]))
    given["init_args"]["pretrained"] = str(policy)
    return {**config, "warm_start": None}


class _ParsedOnly(MiniRecCLI):
    """For `minirec check`: nothing is made or run."""

    usage = "minirec check"

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def parsed(args: Sequence[str]) -> Namespace:
    """The config of a subcommand, defaults filled in; no class of it is made.

    Args:
        args: as on the command line, the subcommand first.

    Raises:
        InputError: if it cannot be parsed.
    """
    cli = _ParsedOnly.__new__(_ParsedOnly)
    try:
        with own_process_state():
            _start(cli, args)
    except ParserError as error:
        raise InputError(with_nearest_option(sentence_of(error), args[0], args[1:])) from error
    config: Namespace = cli.config[cli.subcommand]
    return config


def _start(cli: MiniRecCLI, args: Sequence[str]) -> None:
    argv = configs_first([*args, *config_of_checkpoint(args)])
    for config in values_of(argv, "--config", "-c"):
        check_yaml(Path(config))
    made = {name: skipped for name, skipped in cli.subcommands().items() if name == args[0]}  # a parser takes 0.1 s
    cli.subcommands = lambda: made  # type: ignore[method-assign]
    cli.__init__(  # type: ignore[misc]
        RecModule, LightningDataModule, **CLI_OPTIONS, parser_kwargs={"prog": "minirec"}, args=argv
    )


def run(args: Sequence[str], callbacks: Sequence[Callback] = ()) -> MiniRecCLI:
    """Runs one of the Trainer's subcommands.

    Args:
        args: as on the command line, the subcommand first.
        callbacks: for the Trainer, besides those of the config.

    Raises:
        InputError: for bad input, and when Ctrl-C stopped the run (the sentence then says how to resume).
    """
    cli = MiniRecCLI.__new__(MiniRecCLI)
    cli.more_callbacks = callbacks
    finished = False
    try:
        with own_process_state():
            _start(cli, args)
        finished = True
    except (SystemExit, KeyboardInterrupt) as stop:
        trainers = (getattr(cli, "trainer", None), cli.side_trainer)
        by_lightning = any(trainer and trainer.state.status == TrainerStatus.INTERRUPTED for trainer in trainers)
        if isinstance(stop, SystemExit) and not by_lightning:
            raise
        raise InputError(_interrupted(cli)) from stop
    except ParserError as error:
        raise InputError(with_nearest_option(sentence_of(error), args[0], args[1:])) from error
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
        finish_wandb(failed=not finished)
        if not finished:
            cli.discard_failed_start()
    return cli


def _interrupted(cli: MiniRecCLI) -> str:
    if getattr(cli, "subcommand", None) == "predict":
        return "interrupted; the same command resumes after the samples that are done"
    if getattr(cli, "subcommand", None) != "fit" or not hasattr(cli, "run_dir"):
        return "interrupted; nothing was written"
    run_dir = cli.run_dir
    checkpoints = sorted((run_dir / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not checkpoints and (run_dir / WARM_START / "policy").is_dir():
        return _go_on_from_warm_start(cli)
    if not checkpoints:
        return "interrupted before the first checkpoint; there is nothing to resume from, so start again"
    if (run_dir / "policy").is_dir():
        return f"interrupted after the last step; the run in {run_dir} is complete"
    command = ["minirec", "fit", "--config", str(run_dir / CONFIG), "--ckpt_path", str(checkpoints[-1])]
    return f"interrupted; resume with `{shlex.join(command)}`"


def _go_on_from_warm_start(cli: MiniRecCLI) -> str:
    folder = cli.run_dir / WARM_START
    if cli.config[cli.subcommand].warm_start.reset_policy:
        return f"interrupted before the first checkpoint; the policy in {folder} only selects, so start again"
    command = ["minirec", "fit", "--config", str(folder / CONFIG)]
    return f"interrupted after the warm start; continue from its policy with `{shlex.join(command)}`"
