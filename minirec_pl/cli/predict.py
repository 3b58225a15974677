"""Recommendations as a table with external ids, written in parts so that an interrupted run resumes."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor

from minirec_pl.data.batches import SampleDataset, identity
from minirec_pl.data.columns import Columns
from minirec_pl.data.datamodule import RecDataModule
from minirec_pl.data.loader import SampleLoader
from minirec_pl.data.sampler import OrderedSampler
from minirec_pl.data.samples import Catalogue, IntArray, SampleTable
from minirec_pl.data.sequence_table import SequenceTable
from minirec_pl.data.sources.assemble import INTERACTION_COLUMNS, Faults, whole_rows
from minirec_pl.data.sources.files import TextFormat, read_table, read_text
from minirec_pl.data.sources.tables import (
    Table,
    as_id,
    flat_values,
    ids_of,
    lengths_of,
    numbers_of,
    times_of,
    unique_ids,
)
from minirec_pl.selection.fingerprints import weights_fingerprint
from minirec_pl.trainers.recommender import RecModule
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.files import write_atomically, write_json
from minirec_pl.utils.identity import Identity, fact

REASONING = "reasoning"
SECONDS_A_PART = 30.0
HISTORY_TEXT = TextFormat(prefix="--history_")
_PARTS, _FACTS = ".predictions-", "made_for.json"


def rows_of(outputs: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Makes a row per sample of what `RecModule.predict_step` returned: sample_id, user, items, scores, reasoning."""
    columns: dict[str, Any] = {
        name: np.concatenate([output[name].cpu().numpy() for output in outputs])
        for name in (Columns.SAMPLE_ID, "user", "items", "scores")
    }
    rows = {name: list(values) if values.ndim > 1 else values for name, values in columns.items()}
    if REASONING in outputs[0]:
        rows[REASONING] = [text for output in outputs for text in output[REASONING]]
    return pd.DataFrame(rows)


def table_of(rows: pd.DataFrame, item_ids: Sequence[str], user_ids: Sequence[str]) -> pd.DataFrame:
    """Makes a row per recommendation.

    Args:
        rows: of `rows_of`.
        item_ids: external id of each item index.
        user_ids: external id of each user index.

    Returns:
        sample_id, user_id, item_id, score, rank (from 1) and, where there is one, the reasoning.
    """
    items, scores = np.stack(rows["items"].tolist()), np.stack(rows["scores"].tolist())
    n, k = items.shape
    keep = items.ravel() >= 0
    users = np.asarray(user_ids, dtype=object)[rows["user"].to_numpy()]
    table = {
        Columns.SAMPLE_ID: rows[Columns.SAMPLE_ID].to_numpy().repeat(k)[keep],
        Columns.USER_ID: users.repeat(k)[keep],
        Columns.ITEM_ID: np.asarray(item_ids, dtype=object)[items.ravel()[keep]],
        "score": scores.ravel()[keep],
        "rank": np.tile(np.arange(1, k + 1), n)[keep],
    }
    if REASONING in rows:
        table[REASONING] = rows[REASONING].to_numpy().repeat(k)[keep]
    return pd.DataFrame(table)


class RequestData(LightningDataModule):
    """The requests of one prediction that no part answers yet.

    Args:
        data: of the recommender.
        history: file of users to serve; None serves the test part.
        candidates: file of the items that may be recommended; None for all.
        parts: folder in which parts are kept, in a folder of their own for each kind of request.
        columns: names of columns in the history file that differ from the library's; None takes those of the source.
        text: how the history file is written.
    """

    folder: Path
    made_for: Identity
    requests: Requests

    def __init__(
        self,
        data: RecDataModule,
        history: Path | None,
        candidates: Path | None,
        parts: Path,
        columns: Mapping[str, str] | None = None,
        text: TextFormat = HISTORY_TEXT,
    ) -> None:
        super().__init__()
        self.data, self.history, self.candidates, self.parts = data, history, candidates, parts
        self.columns, self.text = columns, text

    @property
    def catalogue(self) -> Catalogue:
        """That of the data."""
        return self.data.catalogue

    def prepare_data(self) -> None:
        """Prepares the data."""
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        """Reads the data and the requests."""
        self.data.setup(stage)
        if self.history is None:
            self.requests = Requests(self.data.table, self.data.test_ids, [])
        else:
            likely = getattr(self.data.source, "columns", {})
            self.requests = read_history(self.history, self.catalogue, self.columns, self.text, likely)
        module: Any = self.trainer.lightning_module  # type: ignore[union-attr]
        likely = {**getattr(self.data.source, "columns", {}), **getattr(self.data.source, "item_columns", {})}
        module.candidates = (
            None if self.candidates is None else read_candidates(self.candidates, self.catalogue, likely)
        )

    def predict_dataloader(self) -> SampleLoader:
        """Makes the loader of what is not done; called when the weights of a checkpoint are in place."""
        module: Any = self.trainer.lightning_module  # type: ignore[union-attr]
        self.made_for = self._made_for(module)
        compared = sorted((name, value.rpartition(" #")[2]) for name, value in self.made_for.facts.items())
        self.folder = self.parts / f"{_PARTS}{hashlib.sha256(json.dumps(compared).encode()).hexdigest()[:16]}"
        done = [pd.read_parquet(path, columns=[Columns.SAMPLE_ID]) for path in self.finished()]
        ids = self.requests.sample_ids
        if done:
            ids = ids[~np.isin(ids, pd.concat(done)[Columns.SAMPLE_ID])]
        self.trainer.strategy.barrier()  # type: ignore[union-attr] # no rank writes before all have looked
        if self.trainer.is_global_zero:  # type: ignore[union-attr]
            for text in self.requests.dropped:
                print(f"history: {text}")
            self._tell_of_others()
            if done:
                print(f"resuming after {len(self.requests.sample_ids) - len(ids):,} finished samples")
        table, window = self.requests.table, self.data.history_window
        return SampleLoader(
            SampleDataset(table, window, self.requests.sample_ids, "the requests"),
            batch_size=self.data.eval_batch_size,
            sampler=OrderedSampler(ids),
            collate_fn=identity,
            num_workers=self.data.num_workers,
        )

    def _tell_of_others(self) -> None:
        """Says how predictions that were not finished, and lie where these do, differ from these."""
        for path in sorted(self.parts.glob(f"{_PARTS}*/{_FACTS}")):
            if path.parent != self.folder:
                stored = json.loads(path.read_text(encoding="utf-8"))
                differences = "; ".join(self.made_for.differences(stored)) or "something else"
                print(f"not resumed: the unfinished predictions in '{path.parent}' were made otherwise ({differences})")

    def finished(self) -> list[Path]:
        """Lists the parts there are."""
        return sorted(self.folder.glob("part-*.parquet"))

    @property
    def identity(self) -> Identity:
        """What of the data predictions are made for; those for a history file do not depend on the samples."""
        names = ("catalogue", "history_window", "samples", "split")
        return self.data.identity.only(names if self.history is None else names[:2])

    def _made_for(self, module: RecModule) -> Identity:
        """All that predictions depend on: weights, settings, requests and data."""
        settings = {
            f"setting.{name}": fact(value, value.encode())
            for part in (module.policy, module)
            for name, value in sorted((name, repr(v)) for name, v in vars(part).items() if _is_setting(name, v))
        }
        files = {"history": self.history, "candidates": self.candidates}
        own = {
            **{name: "none" if path is None else fact(str(path), path.read_bytes()) for name, path in files.items()},
            "history_format": f"{self.columns} {self.text}",
            "weights": weights_fingerprint(module.policy),
            "requests": fact(f"{len(self.requests.sample_ids):,} samples", self.requests.sample_ids.tobytes()),
        }
        return Identity.of([self.identity, module.policy.identity, Identity({**own, **settings})])


def _is_setting(name: str, value: Any) -> bool:
    if name.startswith("_") or name == "training":
        return False
    return value is None or isinstance(value, (bool, int, float, str, tuple)) or is_dataclass(value)


class PartWriter(Callback):
    """Writes predictions to the folder of `RequestData` every half minute, and what is left when a run ends or breaks.

    Each rank writes files of its own.
    """

    def __init__(self, data: RequestData) -> None:
        super().__init__()
        self._data = data
        self._outputs: list[Mapping[str, Any]] = []
        self._written = time.perf_counter()

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Keeps the batch."""
        kept = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in outputs.items()}
        self._outputs.append(kept)
        if time.perf_counter() - self._written >= SECONDS_A_PART:
            self.flush(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Loses nothing to Ctrl-C."""
        self.flush(trainer)

    def flush(self, trainer: Trainer) -> None:
        """Writes what is not written yet."""
        self._written = time.perf_counter()
        if not self._outputs:
            return
        rows = rows_of(self._outputs)
        first = int(rows[Columns.SAMPLE_ID].iloc[0])
        if trainer.is_global_zero and not (self._data.folder / _FACTS).is_file():
            write_json(self._data.folder / _FACTS, self._data.made_for.facts)
        path = self._data.folder / f"part-{trainer.global_rank:04d}-{first:012d}.parquet"
        write_atomically(path, lambda temporary: rows.to_parquet(temporary, index=False))
        self._outputs = []


def merge_parts(data: RequestData, path: Path) -> None:
    """Makes one file of all parts and removes them.

    Args:
        data: all of whose requests are answered.
        path: parquet file to write: user_id, item_id, score, rank, the reasoning where it is kept, and sample_id where
            samples of the test part are served.
    """
    rows = pd.concat([pd.read_parquet(part) for part in data.finished()], ignore_index=True)
    rows = rows.drop_duplicates(Columns.SAMPLE_ID)
    order = pd.Series(np.arange(len(data.requests.sample_ids)), index=data.requests.sample_ids)
    rows = rows.iloc[np.argsort(order.loc[rows[Columns.SAMPLE_ID]].to_numpy())]
    table = table_of(rows, data.catalogue.item_ids, data.requests.table.user_ids)
    if data.history is not None:
        table = table.drop(columns=Columns.SAMPLE_ID)
    table.attrs = {"fingerprints": data.made_for.facts}
    write_atomically(path, lambda temporary: table.to_parquet(temporary, index=False))
    shutil.rmtree(data.folder, ignore_errors=True)


class Requests(NamedTuple):
    """What is asked for.

    Attributes:
        table: a sample for each request; its target means nothing where the request comes from a history file.
        sample_ids: int64 [n], in the order in which they are answered.
        dropped: what was left out and why, in words.
    """

    table: SampleTable
    sample_ids: IntArray
    dropped: list[str]


def read_history(
    path: Path,
    catalogue: Catalogue,
    columns: Mapping[str, str] | None = None,
    text: TextFormat = HISTORY_TEXT,
    likely: Mapping[str, str] | None = None,
) -> Requests:
    """Reads one request per user of a file, who may be unknown to training: what comes after all of the history.

    The file has a row per interaction (`user_id`, `item_id`, `timestamp`, perhaps `rating`, in any order) or a row per
    user (`user_id`, `history_item_id`: a list, oldest first; parquet and JSON lines). Times ago are counted from the
    newest timestamp of the file.

    What lacks an id or time is dropped and counted, and so are items that are not in the catalogue, and users who have
    no others.

    Args:
        path: of the file, of the kinds that `read_table` reads.
        catalogue: the items that the policy knows.
        columns: names of columns in the file that differ from the library's, from ours to theirs.
        text: how a text is written.
        likely: names that columns may have, if `columns` is None and the library's are not there.

    Raises:
        InputError: if the file cannot be read, has neither kind of columns, or no user is left.
    """
    table = read_table(path, text)
    if not len(table.frame):
        raise InputError(f"{path} has no rows: give at least one user's history")
    named = _found(table, likely or {}) if columns is None else columns
    lists = Columns.HISTORY_ITEM_ID in {*table.frame, *named}
    required = (Columns.USER_ID, Columns.HISTORY_ITEM_ID) if lists else INTERACTION_COLUMNS
    faults = Faults()
    table = table.select(named, required, "--history_columns")
    table = whole_rows(table, [name for name in required if name != Columns.HISTORY_ITEM_ID], faults, "drop")
    rows = _of_lists(table, faults) if lists else _of_log(table)
    known = rows.assign(item=catalogue.indices_of(rows["item"].tolist()))
    known = known[known["item"] >= 0]
    dropped = [f"{what} {count:,}" for what, count in faults.items() if count]
    if len(known) < len(rows):
        dropped.append(f"{len(rows) - len(known):,} of {len(rows):,} history items are not in the catalogue: dropped")
    users = known["user"].unique()
    n_users = rows["user"].nunique()
    if not len(users):
        example = rows["item"].iloc[0]
        raise InputError(
            f"{path}: none of its items is in the catalogue of {len(catalogue)}, ids are like {example!r} in the one "
            f"and like {catalogue.item_ids[0]!r} in the other: fix the column item_id"
        )
    if len(users) < n_users:
        dropped.append(f"{n_users - len(users):,} of {n_users:,} users have no history item left: dropped")
    groups = [group for _, group in known.groupby("user", sort=False)]
    timed = not known["time"].isna().any()
    now = float(known["time"].max()) if timed else 0.0
    rated = not known["rating"].isna().all()
    requests = SequenceTable(
        [str(user) for user in users],
        np.zeros(len(users), dtype=np.int64),
        [group["item"].to_numpy(dtype=np.int64) for group in groups],
        len(catalogue),
        timestamps=np.full(len(users), now),
        history_times=[group["time"].to_numpy(dtype=np.float64) for group in groups] if timed else None,
        history_ratings=[group["rating"].to_numpy(dtype=np.float64) for group in groups] if rated else None,
    )
    return Requests(requests, np.arange(len(users), dtype=np.int64), dropped)


def _found(table: Table, likely: Mapping[str, str]) -> dict[str, str]:
    """Those of some likely names that a table has, for columns that are not there by the library's own name."""
    return {ours: name for ours, name in likely.items() if ours not in table.frame and name in table.frame}


def _of_log(table: Table) -> pd.DataFrame:
    """Columns user, item, time and rating, users by first appearance, each user's rows by time."""
    rated = Columns.RATING in table.frame
    rows = pd.DataFrame(
        {
            "user": ids_of(table, Columns.USER_ID),
            "item": ids_of(table, Columns.ITEM_ID),
            "time": times_of(table, Columns.TIMESTAMP),
            "rating": numbers_of(table, Columns.RATING, required=False) if rated else np.nan,
        }
    )
    first = rows.groupby("user", sort=False).ngroup()
    return rows.iloc[np.lexsort((rows["time"], first))]


def _of_lists(table: Table, faults: Faults) -> pd.DataFrame:
    users, lengths = ids_of(table, Columns.USER_ID), lengths_of(table, Columns.HISTORY_ITEM_ID)
    again = pd.Series(users).duplicated().to_numpy()
    if again.any():
        row = int(np.argmax(again))
        raise InputError(f"{table.where(row)}: the user {users[row]!r} comes twice: give each user one row")
    items = unique_ids(flat_values(table, Columns.HISTORY_ITEM_ID))
    owners = np.repeat(np.array(users, dtype=object), lengths)
    rows = pd.DataFrame({"user": owners, "item": items, "time": np.nan, "rating": np.nan})
    faults[f"{table.file}: history items without an id: dropped"] += int((rows["item"] == "").sum())
    return rows[rows["item"] != ""]


def read_candidates(path: Path, catalogue: Catalogue, likely: Mapping[str, str] | None = None) -> Tensor:
    """Reads which items may be recommended, bool [n_items].

    Args:
        path: text with one id per line (.txt), or another table with a column `item_id`.
        catalogue: the items that the policy knows.
        likely: names that the column may have if that is not there, from the library's to the file's.

    Raises:
        InputError: if the file cannot be read, is empty, or names an item that is not in the catalogue, with its line.
    """
    if path.suffix == ".txt":
        if not path.is_file():
            raise InputError(f"{path} does not exist: give a file of item ids, one per line")
        lines = [(number, as_id(line)) for number, line in enumerate(read_text(path).splitlines(), start=1)]
        found = [(f"{path}, line {number}", item_id) for number, item_id in lines if item_id]
    else:
        table = read_table(path)
        table = table.select(_found(table, likely or {}), (Columns.ITEM_ID,), "data.source.item_columns")
        ids = unique_ids(table.frame[Columns.ITEM_ID])
        found = [(table.where(row), item_id) for row, item_id in enumerate(ids) if item_id]
    if not found:
        raise InputError(f"{path} has no candidates: give at least one item id")
    mask = torch.zeros(len(catalogue), dtype=torch.bool)
    for where, item_id in found:
        if item_id not in catalogue:
            raise InputError(
                f"{where}: the item {item_id!r} is not in the catalogue of {len(catalogue)}: remove the line or add "
                "the item to the data"
            )
        mask[catalogue.index_of(item_id)] = True
    return mask
