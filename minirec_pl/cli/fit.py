"""LightningCLI with run folders, sentences instead of tracebacks, and `--selection`."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.trainer.states import TrainerStatus

from minirec_pl.callbacks.run_folder import RunFolder, best_checkpoint
from minirec_pl.callbacks.select_samples import SelectSamples
from minirec_pl.cli.arguments import without_types
from minirec_pl.cli.early import with_nearest_option
from minirec_pl.cli.made_for import MadeFor
from minirec_pl.cli.process import finish_wandb, own_process_state, quiet_wandb, without_anonymous
from minirec_pl.cli.progress import progress_lines
from minirec_pl.cli.runs import (
    OF_LIGHTNING,
    NothingToTrain,
    Trained,
    checkpoints_of,
    go_on,
    in_working_dir,
    is_complete,
    resumed,
    tidy,
)
from minirec_pl.cli.score import ScoringTrainer
from minirec_pl.cli.sentences import CommentFormatter, sentence_of
from minirec_pl.cli.stages import Stages, WarmStart
from minirec_pl.data.datamodule import RecDataModule
from minirec_pl.policy import LanguageModel
from minirec_pl.selection.session.callback import SessionCallback
from minirec_pl.trainers.recommender import RecModule
from minirec_pl.utils.checkpoints import AtomicCheckpointIO, policy_of
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.files import check_checkpoint
from minirec_pl.utils.metrics_file import METRICS, put_back, set_aside
from minirec_pl.utils.run_folder import (
    CHECKPOINTS,
    CONFIG,
    RUN_DIR_VARIABLE,
    STAGES,
    STARTED_IN_VARIABLE,
    WARM_START,
    WARM_STATE,
    claim_folder,
    csv_logger,
    go_on_logging,
    held,
    is_first,
    pin_policy,
    point_latest,
    put_latest_back,
    send_to,
    write_config,
)
from minirec_pl.utils.seeds import check_seed

NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
LEFT_BY_A_FAILED_START = {CONFIG, "hparams.yaml", METRICS, "wandb", STAGES, WARM_START}
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

    Every run gets a folder of its own, `<trainer.default_root_dir>/version_N`, with its `config.yaml`, as soon as its
    inputs are there; `<trainer.default_root_dir>/latest` points to the fit that began last. A fit that resumes stays in
    the folder of its run.

    Attributes:
        run_dir: folder of the run.
        resumes: whether it is one that another process has begun.
    """

    run_dir: Path
    resumes = False
    words: Sequence[str] = ()
    side_trainer: Trainer | None = None
    new_folders: Sequence[Path] = ()
    more_callbacks: Sequence[Callback] = ()
    usage = "minirec {}"
    first: bool
    closing: contextlib.ExitStack
    _folder: RunFolder | None = None
    _trained: Trained | None = None
    _config_text = ""
    _claimed = _moved_latest = False
    _latest: str | None = None

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
        """Adds `--selection`, `--warm_start`, `--test_stages` and `--working_dir`."""
        selection = parser.add_argument(
            "--selection",
            type=SessionCallback | None,
            default=None,
            help="Which samples an epoch trains on; null for the whole pool, shuffled anew each epoch. "
            "--selection.help=minirec_pl.callbacks.MiniRec lists the options of the usual choice.",
        )
        without_types(selection)
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
        parser.add_argument(
            "--working_dir",
            type=str | None,
            default=None,
            help="Folder that relative paths are in; null for the one that the command runs in, which the config of a "
            "run names.",
        )
        parser.add_argument(
            "--allow_changed_data",
            type=bool,
            default=False,
            help="Go on with a checkpoint or ledger that was made for other data, another prompt or other rewards.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses, then checks the seed and the checkpoint before anything reads them."""
        arguments, sys.argv = sys.argv, sys.argv[:1]
        try:
            super().parse_arguments(parser, args)
        finally:
            sys.argv = arguments
        config = self.config[self.config.subcommand]
        if not isinstance(config.seed_everything, bool):
            check_seed(config.seed_everything, "seed_everything")
        if config.get("ckpt_path") and config.ckpt_path not in OF_LIGHTNING:
            check_checkpoint(Path(config.ckpt_path))
            config.ckpt_path = str(Path(config.ckpt_path).resolve())

    def before_instantiate_classes(self) -> None:
        """Finds the run that a fit resumes, and writes down the config of this one.

        Raises:
            NothingToTrain: if it has come to its end.
            InputError: if its checkpoint holds weights only.
        """
        config = self.config[self.subcommand]
        pin_policy(config)
        config.working_dir = os.getcwd()
        self._config_text = self._dumped(config)
        if self.subcommand == "fit":
            self._find_run()

    def _dumped(self, config: Namespace) -> str:
        text: str = self._parser(self.subcommand).dump(config, skip_none=False)
        return text

    def _find_run(self) -> None:
        config = self.config[self.subcommand]
        self._trained, run = resumed(config, yaml.safe_load(self._config_text), self.words)
        if run is None:
            return
        self.resumes, self.run_dir = True, run
        if self._trained is not None:
            config.ckpt_path, path = None, config.ckpt_path
            self._config_text = self._dumped(config)
            config.ckpt_path = path
        for callback in config.trainer.callbacks or []:
            keeps_one = callback.get("init_args.save_top_k") in (0, 1)
            if keeps_one and str(callback.class_path).endswith("ModelCheckpoint"):
                callback.init_args.enable_version_counter = False

    def instantiate_classes(self) -> None:
        """Makes model and data, begins the run once its inputs are there, and makes loggers and Trainer.

        Raises:
            InputError: for a value that one of them refuses, or an input that is missing.
        """
        config = self.config[self.subcommand]
        loggers, config.trainer.logger = config.trainer.logger, False
        with refusing():
            self.config_init = self.parser.instantiate_classes(self.config)
        self.datamodule, self.model = (self._get(self.config_init, name) for name in ("data", "model"))
        self._check_inputs()
        self._begin()
        with refusing():
            made = self._loggers(loggers)
            self.config_init[self.subcommand].trainer.logger = made
            self.trainer = self.instantiate_trainer()

    def _check_inputs(self) -> None:
        """Looks for data, language model and ledgers before anything is opened."""
        callbacks = [
            self._get(self.config_init, "selection"),
            *(self._get(self.config_init, "trainer").callbacks or ()),
        ]
        for callback in callbacks:
            if isinstance(callback, SelectSamples):
                callback.check_ledger()
        language_model = getattr(getattr(self.model, "policy", None), "language_model", None)
        if isinstance(language_model, LanguageModel):
            language_model.tokenizer()
        if isinstance(self.datamodule, RecDataModule):
            self.datamodule.prepare_data()
            self.datamodule.setup()

    def _begin(self) -> None:
        """Takes the run folder, writes the config into it and points `latest` to it."""
        config = self.config[self.subcommand]
        if self.resumes:
            os.environ[RUN_DIR_VARIABLE] = str(self.run_dir)
        else:
            root = Path(config.trainer.default_root_dir or "runs")
            root = root.absolute() if STARTED_IN_VARIABLE in os.environ else root
            self.new_folders = [folder for folder in (root, *root.parents) if not folder.exists()]
            self.run_dir = claim_folder(root)
        self._claimed = True
        config = self.config_init[self.subcommand]
        config.trainer.default_root_dir = str(self.run_dir)
        for callback in config.trainer.callbacks or []:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str((self.run_dir / CHECKPOINTS).resolve())
        if not self.first:
            return
        self.closing.enter_context(held(self.run_dir))
        if not self.resumes:
            write_config(self.run_dir, self._config_text)
        else:
            tidy(self.run_dir)
        if self.resumes and self._trained is None:
            shutil.rmtree(self.run_dir / "wandb", ignore_errors=True)
        elif self.resumes:
            set_aside(self.run_dir)
        if self.subcommand == "fit":
            self._latest, self._moved_latest = point_latest(self.run_dir), True

    def _loggers(self, loggers: Any) -> Any:
        """Makes the loggers, which write into the run folder."""
        if self.subcommand == "score" or loggers is False:
            return False
        if loggers is None or loggers is True:
            loggers = csv_logger(self.run_dir)
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            send_to(logger, self.run_dir)
            if self.resumes and self._trained is not None:
                go_on_logging(logger, self.run_dir, self._trained.logged_steps)
            if str(getattr(logger, "class_path", "")).endswith("WandbLogger"):
                quiet_wandb(bool(logger.init_args.get("offline")))
        parser = LightningArgumentParser()
        parser.add_argument("--logger", type=Logger | list[Logger])
        return parser.instantiate_classes(Namespace(logger=loggers)).logger  # type: ignore[no-untyped-call]

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with the selection, the run folder's callback and checkpoints that are written whole.

        A line per epoch replaces the progress bar where the output is not a terminal, and a model summary comes only if
        it is asked for.
        """
        selection, given = self._get(self.config_init, "selection"), self._get(self.config_init, "trainer")
        callbacks: list[Callback] = [selection] if selection is not None else []
        # Until then other ranks compare the config of a run that is resumed with theirs.
        self._folder = RunFolder(self._config_text if self.resumes else None)
        checkpoint = self._get(self.config, "ckpt_path") if self.subcommand == "fit" else None
        made_for = MadeFor(self.run_dir, self._config_text, Path(checkpoint) if checkpoint else None)
        callbacks += [*self.more_callbacks, self._folder, made_for]
        if not given.barebones and not any(isinstance(callback, ProgressBar) for callback in given.callbacks or []):
            callbacks += progress_lines(given.enable_progress_bar)
        self.trainer_defaults["callbacks"] = callbacks
        if given.enable_model_summary is None:
            kwargs["enable_model_summary"] = False
        if not given.get("plugins"):
            kwargs["plugins"] = [AtomicCheckpointIO()]
        trainer = super().instantiate_trainer(**kwargs)
        trainer.allow_changed_data = self._get(self.config_init, "allow_changed_data")  # type: ignore[attr-defined]
        for logger in trainer.loggers:
            without_anonymous(logger)
        return trainer

    def discard_failed_start(self) -> None:
        """Removes the folder of a new run that never got as far as leaving something of use; `latest` is put back.

        A run that did not come to resume is left as it was.
        """
        if not self._claimed or not self.first:
            return
        if self.resumes:
            if self._folder is None or not self._folder.begun:
                put_back(self.run_dir)
                self._put_latest_back()
            return
        left = {path.relative_to(self.run_dir).parts[0] for path in self.run_dir.rglob("*") if not path.is_dir()}
        if left <= LEFT_BY_A_FAILED_START and not (self.run_dir / WARM_START / WARM_STATE).is_file():
            self._put_latest_back()
            shutil.rmtree(self.run_dir, ignore_errors=True)
            with contextlib.suppress(OSError):
                for folder in self.new_folders:
                    folder.rmdir()

    def _put_latest_back(self) -> None:
        if self._moved_latest:
            with contextlib.suppress(OSError):
                put_latest_back(self.run_dir, self._latest)

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
                stages.test("warm_start")
        self.trainer.fit(model, datamodule=datamodule, **kwargs)
        if tested:
            with policy_of(model.policy, best_checkpoint(self.trainer)):
                stages.test("trained")
        if self.trainer.is_global_zero:
            stages.finish()

    def _side_trainer(self, **options: Any) -> Trainer:
        """A Trainer on the same devices; Ctrl-C in it is known as one of this run."""
        given = self._get(self.config_init, "trainer")
        shared = {name: given[name] for name in SHARED if name in given}
        options["callbacks"] = [*options.get("callbacks", ()), *progress_lines(given.enable_progress_bar)]
        self.side_trainer = Trainer(**shared, enable_model_summary=False, **options)
        return self.side_trainer


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Says in a sentence which value a class refuses.

    Raises:
        InputError: with it.
    """
    try:
        yield
    except (ValueError, TypeError, MisconfigurationException) as error:
        raise InputError(sentence_of(error)) from error


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
    with in_working_dir(args) as argv:
        _run_in_place(cli, argv)


def _run_in_place(cli: MiniRecCLI, argv: Sequence[str]) -> None:
    cli.words = argv
    made = {name: skipped for name, skipped in cli.subcommands().items() if name == argv[0]}  # a parser takes 0.1 s
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
    cli.more_callbacks, cli.first, cli.closing = callbacks, is_first(), contextlib.ExitStack()
    finished = False
    try:
        with own_process_state():
            _start(cli, args)
        finished = True
    except NothingToTrain as end:
        print(end)
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
        cli.closing.close()
        if not finished:
            cli.discard_failed_start()
    return cli


def _interrupted(cli: MiniRecCLI) -> str:
    if getattr(cli, "subcommand", None) == "predict":
        return "interrupted; the same command resumes after the samples that are done"
    if getattr(cli, "subcommand", None) != "fit" or not hasattr(cli, "run_dir"):
        return "interrupted; nothing was written"
    run_dir, checkpoints = cli.run_dir, checkpoints_of(cli.run_dir)
    if is_complete(run_dir, cli.config["fit"].test_stages):
        return f"interrupted after the last step; the run in {run_dir} is complete"
    if not checkpoints and (run_dir / WARM_START / WARM_STATE).is_file():
        return f"interrupted; {go_on(run_dir)}"
    if not checkpoints:
        return "interrupted before the first checkpoint; there is nothing to resume from, so start again"
    command = ["minirec", "fit", "--config", str(run_dir / CONFIG), "--ckpt_path", str(checkpoints[-1])]
    return f"interrupted; resume with `{shlex.join(command)}`"
