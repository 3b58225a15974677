"""`minirec score`: the signals of a pool, measured with a given policy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor

from minirec_pl.cli.predict import HISTORY_TEXT, PartWriter, RequestData, merge_parts
from minirec_pl.data.datamodule import RecDataModule
from minirec_pl.selection.fingerprints import fingerprints_of
from minirec_pl.selection.merge import merge_stores
from minirec_pl.selection.selectors.protocol import signal_options
from minirec_pl.selection.session.callback import SessionCallback
from minirec_pl.selection.session.identity import of_signals
from minirec_pl.selection.session.scorers import Scorer
from minirec_pl.selection.store import SignalStore
from minirec_pl.trainers.grpo import GRPORecModule
from minirec_pl.trainers.policy_data import tell_of_other_data
from minirec_pl.trainers.recommender import RecModule
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.files import write_atomically, write_json
from minirec_pl.utils.run_folder import run_folder

SIGNALS, SAMPLES = "signals.safetensors", "samples.parquet"


class ScoringTrainer(Trainer):
    """The Trainer of the command line: it can also score, and writes what it predicts."""

    def predict(
        self,
        *args: Any,
        to: str | None = None,
        history: str | None = None,
        history_columns: dict[str, str] | None = None,
        history_separator: str | None = None,
        history_encoding: str | None = None,
        candidates: str | None = None,
        mask_seen: bool = True,
        reasoning: bool = False,
        **kwargs: Any,
    ) -> None:
        """Writes the best items of each sample of the test part, or of each user of a history file, as parquet.

        Columns user_id, item_id, score and rank with external ids; sample_id too where the test part is served. Parts
        are kept until all is done: the same command resumes where an interrupted one stopped.

        Args:
            args: as of `Trainer.predict`.
            to: file to write, by default predictions.parquet in the run folder.
            history: table of the users to serve, who may be new: user_id, item_id and timestamp, or user_id and
                history_item_id, a list. By default the test part is served.
            history_columns: names of columns in the history file that differ from these, such as {user_id: customer}.
                By default those that data.source.columns names are tried.
            history_separator: what separates the values of a text; null to have it found in the header.
            history_encoding: of a text, such as cp1252; null for UTF-8 or what a byte order mark says.
            candidates: the only items that may be recommended: text, one id per line, or a table with item_id.
            mask_seen: leave out what the user has had already.
            reasoning: keep the text that a recommendation rests on, in the column reasoning.
            kwargs: as of `Trainer.predict`.

        Raises:
            InputError: if model or data are not those of this library, or a file cannot be used.
        """
        model, data = kwargs["model"], kwargs["datamodule"]
        if not isinstance(data, RecDataModule) or not isinstance(model, RecModule):
            raise InputError("minirec predict needs a RecDataModule and a module of minirec_pl: set data and model so")
        model.mask_seen, model.keep_reasoning = mask_seen, reasoning
        run = run_folder(self) or Path(self.default_root_dir)
        path = Path(to) if to else run / "predictions.parquet"
        parts = path.parent if to else run.parent
        text = HISTORY_TEXT._replace(separator=history_separator, encoding=history_encoding)
        requests = RequestData(data, _path(history), _path(candidates), parts, history_columns, text)
        writer = PartWriter(requests)
        self.callbacks.append(writer)  # type: ignore[attr-defined]
        kwargs["datamodule"], kwargs["return_predictions"] = requests, False
        super().predict(*args, **kwargs)
        writer.flush(self)
        self.strategy.barrier()
        if self.is_global_zero:
            merge_parts(requests, path)
            print(f"predictions: {path}")

    def score(
        self, model: LightningModule, datamodule: LightningDataModule, to: str | None = None, shard: str = "1/1"
    ) -> None:
        """Measures rewards, gradient signals and embeddings of the pool in one pass.

        Writes `signals.safetensors`, and `samples.parquet` with user and item of every sample.

        Args:
            model: with `sample_signals(batch)`, as `GRPORecModule` has, unless the selection has a probe.
            datamodule: a `RecDataModule`.
            to: folder to write, by default the run folder.
            shard: which part of the pool, for several machines: 2/4 is the second quarter. `minirec select` takes all.

        Raises:
            InputError: if the model cannot be scored, or the shard is not one of its number.
        """
        parts = self._selection()
        probe = next((part.probe for part in parts if getattr(part, "probe", None) is not None), None)
        if probe is None and not callable(getattr(model, "sample_signals", None)):
            raise InputError(
                f"{type(model).__name__} cannot be scored, it has no sample_signals(batch): set model to "
                "GRPORecModule, or selection.probe to a function"
            )
        if not isinstance(datamodule, RecDataModule) or not isinstance(model, RecModule):
            raise InputError("minirec score needs a RecDataModule and a module of minirec_pl: set data and model so")
        number, count = _shard(shard)
        folder = Path(to or self.log_dir or self.default_root_dir)
        datamodule.keep_columns(getattr(model, "reward_arguments", ()))
        datamodule.setup("fit")
        if isinstance(model, GRPORecModule):
            model.use_columns(datamodule.own_columns)
        model.policy.bind(datamodule.catalogue)
        pool = datamodule.pool_ids[number - 1 :: count]
        if not len(pool):
            raise InputError(
                f"shard {shard} is empty: the pool has {len(datamodule.pool_ids)} samples, make fewer shards"
            )
        asked = next((signal_options(part.selector) for part in parts if part.selector is not None), {})
        tell_of_other_data(self, model.policy, datamodule)
        made_for = of_signals(datamodule.identity, model)
        made_for |= fingerprints_of(model, datamodule, datamodule.pool_ids, asked)
        store = SignalStore(pool, fingerprints=made_for)
        scorer = _Scorer(model, store, Scorer(model, probe, asked, foreign=False), folder / SIGNALS)
        with model.cost.timed("scoring"):
            super().predict(scorer, dataloaders=datamodule.sample_loader(pool), return_predictions=False)
        if not self.is_global_zero:
            return
        samples = datamodule.users_and_items(pool)
        write_atomically(folder / SAMPLES, lambda scratch: samples.to_parquet(scratch, index=False))
        write_json(folder / "results.json", {"stage": "score", "samples": len(pool), **model.cost.row()})
        print(f"signals: {folder / SIGNALS}")

    def _selection(self) -> list[Any]:
        """The selection callbacks of the config, and their parts."""
        given = [callback for callback in self.callbacks if isinstance(callback, SessionCallback)]  # type: ignore[attr-defined]
        return [part for callback in given for part in (callback, *getattr(callback, "parts", ()))]


class _Scorer(LightningModule):
    def __init__(self, module: RecModule, store: SignalStore, scorer: Scorer, path: Path) -> None:
        super().__init__()
        self.module, self.store, self.scorer, self.path = module, store, scorer, path

    def configure_model(self) -> None:
        self.module.configure_model()

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        self.store.update(self.scorer(batch, batch["sample_id"].cpu()), epoch=0, step=0, source="score")
        return batch["sample_id"]

    def on_predict_end(self) -> None:
        """Each rank writes what it measured; the first merges it."""
        trainer: Any = self.trainer
        if trainer.world_size == 1:
            self.store.save(self.path)
            return
        parts = [self.path.with_name(f".{self.path.name}.rank{rank}") for rank in range(trainer.world_size)]
        self.store.save(parts[trainer.global_rank])
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            merge_stores([SignalStore.load(part) for part in parts]).save(self.path)
            for part in parts:
                part.unlink()


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise InputError(f"shard is {text!r}: write 2/4 for the second of four parts")
    return int(match[1]), int(match[2])


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
