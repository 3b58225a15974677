"""One cell of a study, run in a worker process: model, data and Trainer as of `minirec fit`, and what came of it."""

from __future__ import annotations

import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch import Tensor

from minirec_pl.cli.arguments import class_of
from minirec_pl.cli.compare.results import Point, points_of, read_cell, write_cell
from minirec_pl.cli.compare.study import POLICY, Cell, Data, Study, as_words, seeded
from minirec_pl.cli.fit import CLI_OPTIONS, MiniRecCLI, ParserError, refusing
from minirec_pl.cli.sentences import sentence_of
from minirec_pl.cli.stages import Stages, WarmStart
from minirec_pl.data.datamodule import RecDataModule
from minirec_pl.data.sources.assemble import Samples, Source, samples_of
from minirec_pl.metrics.evaluation import sample_ranks
from minirec_pl.policy.identity import base_fact, texts_identity
from minirec_pl.policy.interface import Policy
from minirec_pl.selection.session.session import session_of
from minirec_pl.trainers.grpo import GRPORecModule
from minirec_pl.trainers.recommender import RecModule
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.files import replace_folder
from minirec_pl.utils.identity import Identity, refuse_changed

WARM, CELLS, START = "warm", "cells", "start.safetensors"
QUIET = {
    "trainer.logger": False,
    "trainer.callbacks": None,
    "trainer.enable_checkpointing": False,
    "trainer.enable_progress_bar": False,
    "trainer.enable_model_summary": False,
    "trainer.num_sanity_val_steps": 0,
    "trainer.limit_val_batches": 0,
    "test_stages": False,
}
_COMPARED = ("catalogue", "samples", "split", "validation_part", "test_part", "tokenizer", "base_model", "base_weights")
_read: dict[str, Samples] = {}


class Parts(MiniRecCLI):
    """Model, data and Trainer of a fit config; nothing is run and no run folder claimed.

    Args:
        words: as on the command line of `minirec fit`.
        observers: callbacks that come before the selection.

    Raises:
        InputError: if the words cannot be parsed, or a value is refused.
    """

    def __init__(self, words: Sequence[str], observers: Sequence[Callback] = ()) -> None:
        self._observers = list(observers)
        try:
            super().__init__(RecModule, LightningDataModule, **CLI_OPTIONS, args=list(words), run=False)
        except ParserError as error:
            raise InputError(sentence_of(error)) from error

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses what is given, and nothing of this process's own command line."""
        argv, sys.argv = sys.argv, sys.argv[:1]
        try:
            LightningCLI.parse_arguments(self, parser, args)
        finally:
            sys.argv = argv

    def before_instantiate_classes(self) -> None:
        """Leaves everything as it was given."""

    def instantiate_classes(self) -> None:
        """Makes model, data and Trainer."""
        with refusing():
            LightningCLI.instantiate_classes(self)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with the observers and the selection."""
        selection = self._get(self.config_init, "selection")
        self.trainer_defaults["callbacks"] = [*self._observers, *([selection] if selection is not None else [])]
        return LightningCLI.instantiate_trainer(self, **kwargs)

    def read(self) -> tuple[GRPORecModule, RecDataModule]:
        """Reads the data and binds the model to them; a source that this process has read before is not read again.

        Raises:
            InputError: if they are not those that can be compared, or the data cannot be read.
        """
        if not isinstance(self.model, GRPORecModule) or not isinstance(self.datamodule, RecDataModule):
            raise InputError("a study compares fits of a GRPORecModule on a RecDataModule: set model and data so")
        self.datamodule.source = _ReadOnce(self.datamodule.source)
        self.datamodule.prepare_data()
        self.datamodule.setup("fit")
        self.model.policy.bind(self.datamodule.catalogue)
        return self.model, self.datamodule


class _ReadOnce:
    def __init__(self, source: Source) -> None:
        self.source = source

    def read(self) -> Samples:
        if not is_dataclass(self.source):  # whose repr says nothing of what it reads
            return samples_of(self.source)
        key = repr(self.source)
        if key not in _read:
            _read[key] = samples_of(self.source)
        return _read[key]


class _Observer(Callback):
    """Evaluates after each epoch, before the next selection is paid for; keeps the selection, leaves no files."""

    def __init__(self, splits: Sequence[str]) -> None:
        super().__init__()
        self.splits, self.points, self.selected = splits, list[Point](), list[Tensor]()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        self.points.append(evaluate(module, trainer.datamodule, self.splits, len(self.points) + 1))  # type: ignore[attr-defined]
        session = session_of(trainer)
        self.selected.append(torch.tensor(session.selected or [], dtype=torch.int32))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        session = session_of(trainer)
        session.plan_easiness, session.ledger = [], None


def evaluate(module: RecModule, data: RecDataModule, splits: Sequence[str], epoch: int) -> Point:
    """Ranks the targets of each split, and notes what was spent until now."""
    ids = {"validation": data.val_ids, "test": data.test_ids}
    return Point(
        epoch, module.cost.state_dict(), {name: sample_ranks(module.policy, data, ids[name]) for name in splits}
    )


def warm_folder(to: Path, study: Study, data: Data, seed: int) -> Path:
    """Names the folder of the warm start of a data set and seed."""
    return to / WARM / data.label.replace("/", "-") / f"{seed}-{study.warm_fingerprint(data, seed)[:12]}"


def cell_path(to: Path, cell: Cell) -> Path:
    """Names the file of a cell."""
    return to / CELLS / f"{cell.id}.safetensors"


def check(study: Study, cells: Sequence[Cell]) -> None:
    """Refuses overrides that the fit config does not take; makes the selection, but neither reads nor trains.

    Raises:
        InputError: naming the method and the option.
    """
    for cell in cells:
        warm = cell.data.for_warm_start(cell.seed)
        words = [*_config(study), *as_words(warm), *cell.words(1000, 64), *as_words(QUIET)]
        try:
            _quiet(lambda words=words: Parts(words))
        except InputError as error:
            raise InputError(f"{study.path}, cell {cell.id}: {error}") from error


def warm_start(study: Study, data: Data, seed: int, to: Path) -> float:
    """Trains the policy that all cells of a data set and seed start from, evaluates and keeps it.

    Returns:
        Seconds.

    Raises:
        InputError: as a fit does, or if the config has no `warm_start`.
    """
    started = time.perf_counter()
    folder = warm_folder(to, study, data, seed)
    if (folder / START).is_file():
        return 0.0
    words = as_words({**data.filled(seed), **seeded(seed), "selection": None, **QUIET})

    def write(new: Path) -> None:
        parts = Parts([*_config(study), *words])
        options = parts._get(parts.config_init, "warm_start")
        if not isinstance(options, WarmStart):
            raise InputError(f"{study.config}: warm_start is missing: add it, all cells of a seed start from one")
        module, table = parts.read()
        shared = study.warm_fingerprint(data, seed if data.by_seed else None)
        starts = [path for path in folder.parent.glob(f"*/{START}") if path.parent != folder]
        others = [path for path in starts if read_cell(path)[1].get("shared") == shared]
        same_data(table, data.label, others, module.policy)
        identity = _identity(table, module.policy).brief()
        seed_everything(seed, verbose=False)
        stages = Stages(parts._side_trainer, new, module, table, tested=False)
        stages.warm_start(options, parts.trainer)
        (new / "warm_start" / "policy").rename(new / "policy")
        point = evaluate(module, table, ("validation", "test"), 0)
        facts = {
            "pool": len(table.pool_ids),
            "batch_size": table.batch_size,
            "data": table.fingerprint,
            "identity": identity,
            "shared": shared,
        }
        write_cell(new / START, [point], facts, _user_index(table))

    _quiet(lambda: replace_folder(folder, write, holds=START, what="warm start"))
    return time.perf_counter() - started


def config_after_warm_start(config: dict[str, Any], policy: Path, data: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a fit that starts from a warm policy instead of making one.

    Args:
        config: of a fit with a warm start; its policy is changed in place.
        policy: folder of the warm policy.
        data: overrides of the data set, of which those of the policy are put into the config.
    """
    model = config["model"]["init_args"]
    model["policy"] = data.get(POLICY[:-1], model["policy"])
    given = model["policy"]
    for key, value in data.items():
        *above, last = key.removeprefix(POLICY).removeprefix("init_args.").split(".")
        if key.startswith(POLICY):
            reduce(lambda part, name: part.setdefault(name, {}), above, given.setdefault("init_args", {}))[last] = value
    kind: type[Policy] = class_of(given["class_path"])
    options = given.setdefault("init_args", {})
    options |= dict.fromkeys(kind.made_of & set(options))
    options["pretrained"] = str(policy)
    return {**config, "warm_start": None}


def same_data(data: RecDataModule, label: str, starts: Sequence[Path], policy: Policy | None = None) -> None:
    """Refuses data, or a language model, other than those that warm starts of the same data set were made with.

    Args:
        data: read.
        label: of the data set.
        starts: files of warm starts.
        policy: that is to have a warm start of its own; None for a cell.

    Raises:
        InputError: naming the first difference.
    """
    here = Identity.of([_identity(data, policy).only(_COMPARED), texts_identity(data.catalogue)])
    for start in starts:
        facts = read_cell(start)[1]
        found = here.differences(facts.get("identity", {}))
        if not found and facts["data"] != data.fingerprint:
            found = ["samples or catalogue differ"]
        refuse_changed(
            f"the data and model of {label} are not those that {start.parent} was made with",
            found,
            "put them back, or choose another --to for a study of the new ones",
        )


def _identity(data: RecDataModule, policy: Policy | None) -> Identity:
    """What a warm start is made with; of a model in words before it is trained, its weights too."""
    parts = [data.identity, *([] if policy is None else [policy.identity])]
    if policy is not None and "tokenizer" in policy.identity.facts:
        parts.append(Identity({"base_weights": base_fact(policy.model)}))  # type: ignore[arg-type]
    return Identity.of(parts)


def run_cell(study: Study, cell: Cell, to: Path) -> dict[str, Any]:
    """Runs one cell and writes its file.

    Returns:
        Its settings, as in the file.

    Raises:
        InputError: as a fit does.
    """
    started, cpu = time.perf_counter(), time.process_time()
    warm = warm_folder(to, study, cell.data, cell.seed)
    start, facts = read_cell(warm / START)
    splits = ("validation",) if study.grid else ("validation", "test")
    words = cell.words(facts["pool"], facts["batch_size"])
    observer = _Observer(splits)
    phases = {}
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch, "config.yaml")
        content = yaml.safe_load(study.config.read_text(encoding="utf-8"))
        own = cell.data.filled(cell.seed)
        config.write_text(yaml.safe_dump(config_after_warm_start(content, warm / "policy", own)), encoding="utf-8")
        words = ["--config", str(config), *words, *as_words({**QUIET, "trainer.default_root_dir": scratch})]

        def fit() -> None:
            parts = Parts(words, [observer])
            phases["parsing"] = time.perf_counter() - started
            module, data = parts.read()
            same_data(data, cell.data.label, [warm / START])
            phases["reading"] = time.perf_counter() - started - phases["parsing"]
            seed_everything(cell.seed, verbose=False)
            parts.trainer.fit(module, datamodule=data)

        _quiet(fit)
    first = points_of(start)[0]
    ranks = {name: first.ranks[name] for name in splits}
    points = [Point(0, first.cost, ranks), *observer.points]
    seconds = time.perf_counter() - started
    row = {
        "cell": cell.id,
        "fingerprint": study.fingerprint(cell),
        "dataset": cell.data.name,
        "window": cell.data.window,
        "method": cell.method.name,
        "setting": cell.setting,
        "budget": cell.budget,
        "seed": cell.seed,
        "pool": facts["pool"],
        "data": facts["data"],
        "wall_seconds": round(seconds, 3),
        "cpu_seconds": round(time.process_time() - cpu, 3),
        "phases": {name: round(value, 3) for name, value in phases.items()},
    }
    index = {f"{name}_users": start[f"{name}_users"] for name in splits}
    index |= {f"selected_{epoch}": ids for epoch, ids in enumerate(observer.selected) if len(ids)}
    write_cell(cell_path(to, cell), points, row, index)
    return row


def _config(study: Study) -> list[str]:
    return ["--config", str(study.config)]


def _user_index(data: RecDataModule) -> dict[str, Tensor]:
    parts = {"validation": data.val_ids, "test": data.test_ids}
    return {f"{name}_users": torch.from_numpy(data.table.user[ids].astype(np.int32)) for name, ids in parts.items()}


def _quiet(work: Any) -> None:
    """Runs without Lightning's announcements and without warnings, which the table of results stands for."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        work()
