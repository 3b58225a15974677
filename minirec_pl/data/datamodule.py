"""RecDataModule: from a folder of atomic files to batches."""

from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerStatus
from torch.utils.data import DataLoader, Dataset

from minirec_pl.data.atomic import read_atomic
from minirec_pl.data.batches import Batch, SampleDataset, identity
from minirec_pl.data.columns import Columns
from minirec_pl.data.sampler import CurriculumSampler, GenerationSchedule, OrderedSampler, ResumableLoader, world
from minirec_pl.data.samples import Catalogue, IntArray, SampleTable, TimeSplit, digest, split_by_time
from minirec_pl.data.warm import WarmChunkSampler, WarmDataset
from minirec_pl.errors import InputError

TITLE_COLUMNS = {"movie_title": Columns.TITLE}


class RecDataModule(LightningDataModule):
    """Next-item samples in global time order from RecBole atomic files.

    Reads ``<path>/<dataset>/<dataset>.inter`` and, where they exist, ``.item`` (the catalogue, in its order) and
    ``.user``. The first share of the train part in time feeds the warm start, the rest is the pool of RL; they do not
    overlap. Only samples with a history and a target that is new to the user are served. ``setup`` fills the
    attributes.

    Args:
        path: Folder that holds a folder per dataset.
        dataset: Name of the dataset's folder and files.
        train_on: ``warm`` trains on sequences of the warm part, ``pool`` on single samples of the pool.
        split: Shares of train, validation and test in time.
        warm_fraction: Share of the train part kept for the warm start.
        history_window: Longest history, in items.
        batch_size: Samples a training batch from the pool.
        warm_batch_size: Sequences a training batch of the warm start.
        eval_batch_size: Samples a batch in validation, test and scoring.
        num_workers: Loader processes; 0 loads in the main process, which is fastest on few cores.
        seed: Seed of the training order.

    Attributes:
        table: All samples.
        catalogue: All items.
        split: Where the parts begin and end, in sample_ids.
        warm_ids: Eligible sample_ids of the warm part, int64; likewise ``pool_ids``, ``val_ids`` and ``test_ids``.
        item_popularity: Interactions of each item in the train part (warm and pool), [n_items] int64.
        train_sampler: The sampler of the training loader; it lives as long as the DataModule.

    Example:
        >>> data = RecDataModule("data", "ml-100k", train_on="pool", batch_size=64)  # doctest: +SKIP
        >>> data.setup("fit")  # doctest: +SKIP
        >>> len(data.pool_ids)  # doctest: +SKIP
        9803
    """

    table: SampleTable
    catalogue: Catalogue
    split: TimeSplit
    warm_ids: IntArray
    pool_ids: IntArray
    val_ids: IntArray
    test_ids: IntArray
    item_popularity: IntArray
    train_sampler: CurriculumSampler | WarmChunkSampler

    def __init__(
        self,
        path: str,
        dataset: str = "ml-100k",
        train_on: Literal["warm", "pool"] = "pool",
        split: tuple[float, float, float] = (0.8, 0.1, 0.1),
        warm_fraction: float = 0.875,
        history_window: int = 50,
        batch_size: int = 64,
        warm_batch_size: int = 16,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 42,
    ) -> None:
        super().__init__()
        if train_on not in ("warm", "pool"):
            raise InputError(f"train_on={train_on!r}: give 'warm' or 'pool'.")
        counts = {
            "history_window": history_window,
            "batch_size": batch_size,
            "warm_batch_size": warm_batch_size,
            "eval_batch_size": eval_batch_size,
        }
        for name, value in counts.items():
            if value < 1:
                raise InputError(f"{name}={value}: give a whole number of at least 1.")
        self.path, self.dataset, self.train_on = path, dataset, train_on
        self.ratios, self.warm_fraction, self.history_window = split, warm_fraction, history_window
        self.batch_size, self.warm_batch_size, self.eval_batch_size = batch_size, warm_batch_size, eval_batch_size
        self.num_workers, self.seed = num_workers, seed
        self._ready = False
        self.save_hyperparameters()

    def setup(self, stage: str | None = None) -> None:
        """Read the files once and build the training sampler for the current number of ranks.

        Raises:
            InputError: A file is missing or wrong, or a part that is needed holds no eligible sample.
        """
        if not self._ready:
            self._read()
            self._ready = True
        sampler = getattr(self, "train_sampler", None)
        if sampler is None or (sampler.num_replicas, sampler.rank) != world():
            self.train_sampler = (
                CurriculumSampler(self.pool_ids, seed=self.seed)
                if self.train_on == "pool"
                else WarmChunkSampler(self.table, self.split.warm_end, self.history_window, seed=self.seed)
            )

    def _read(self) -> None:
        folder = Path(self.path, self.dataset)
        interactions = folder / f"{self.dataset}.inter"
        if not interactions.is_file():
            fetch = f"run 'minirec fetch {self.dataset} --to {self.path}'"
            other = f"put {self.dataset}.inter and {self.dataset}.item (RecBole atomic files) there"
            raise InputError(f"{interactions} is missing; {fetch if self.dataset == 'ml-100k' else other}.")
        needed = (Columns.USER_ID, Columns.ITEM_ID, Columns.TIMESTAMP)
        frame = read_atomic(interactions, required=needed)
        if frame[Columns.TIMESTAMP].dtype != np.float64:
            raise InputError(
                f"{interactions}, line 1, column timestamp: it must be 'timestamp:float', in unix seconds."
            )
        if Columns.RATING in frame and frame[Columns.RATING].dtype != np.float64:
            frame = frame.drop(columns=Columns.RATING)
        self.catalogue = self._read_catalogue(folder / f"{self.dataset}.item", frame[Columns.ITEM_ID].tolist())
        self._check_users(folder / f"{self.dataset}.user", interactions, frame[Columns.USER_ID].tolist())
        self.table = SampleTable.from_interactions(frame, self.catalogue, source=str(interactions))
        self.split = split_by_time(self.table, self.ratios, warm_fraction=self.warm_fraction)
        cuts = (0, *self.split)
        self.warm_ids, self.pool_ids, self.val_ids, self.test_ids = (
            begin + np.flatnonzero(self.table.eligible[begin:end]) for begin, end in pairwise(cuts)
        )
        train = self.table.item[: self.split.train_end]
        self.item_popularity = np.bincount(train, minlength=len(self.catalogue)).astype(np.int64)
        self._check_parts(interactions)

    def _read_catalogue(self, path: Path, interacted: list[str]) -> Catalogue:
        if not path.is_file():
            return Catalogue(list(dict.fromkeys(interacted)))
        items = read_atomic(path, TITLE_COLUMNS, required=(Columns.ITEM_ID,))
        twice = items[Columns.ITEM_ID].duplicated()
        if twice.any():
            row = int(np.argmax(twice))
            raise InputError(
                f"{path}, line {row + 2}: the item {items[Columns.ITEM_ID].iloc[row]!r} comes twice; keep one row."
            )
        titles = items[Columns.TITLE].tolist() if Columns.TITLE in items else None
        return Catalogue(items[Columns.ITEM_ID].tolist(), titles, _texts(items) if titles else None)

    def _check_users(self, path: Path, interactions: Path, user_ids: list[str]) -> None:
        if not path.is_file():
            return
        known = set(read_atomic(path, required=(Columns.USER_ID,))[Columns.USER_ID])
        row = next((row for row, user_id in enumerate(user_ids) if user_id not in known), None)
        if row is not None:
            raise InputError(
                f"{interactions}, line {row + 2}: the user {user_ids[row]!r} is not in {path.name}; add it there or "
                "mend the order of the columns."
            )

    def _check_parts(self, source: Path) -> None:
        train = ("warm-start", self.warm_ids) if self.train_on == "warm" else ("pool", self.pool_ids)
        options = {"warm-start": "warm_fraction", "pool": "warm_fraction"}
        for name, ids in (train, ("validation", self.val_ids), ("test", self.test_ids)):
            if len(ids) == 0:
                moments = len(np.unique(self.table.timestamp))
                raise InputError(
                    f"{source}: the {name} part is empty, no sample in it has a history and a new item "
                    f"(split={self.ratios}, warm_fraction={self.warm_fraction}, {len(self.table)} interactions at "
                    f"{moments} different timestamps); change {options.get(name, 'split')} or check the timestamps."
                )

    def train_dataloader(self) -> ResumableLoader:
        """Batches of the pool (see SampleDataset) or of the warm start (see WarmDataset), resumable inside an epoch.

        A module with a ``generation_schedule`` gets the batches of the pool as that says.
        """
        sampler = self.train_sampler
        schedule = GenerationSchedule()
        dataset: Dataset[Batch]
        if isinstance(sampler, WarmChunkSampler):
            dataset, batch_size = WarmDataset(self.table, sampler.n_chunks), self.warm_batch_size
        else:
            dataset = SampleDataset(self.table, self.history_window, self.pool_ids, "the pool")
            module = None if self.trainer is None else self.trainer.lightning_module
            schedule = getattr(module, "generation_schedule", schedule)
            batch_size = round(self.batch_size * schedule.oversample)
        # An own generator keeps the loader from drawing on torch's global one, and so from changing dropout.
        loader = ResumableLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            collate_fn=identity,
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(self.seed),
        )
        loader.steps, loader.iterations = schedule.steps, schedule.iterations
        if self.trainer is not None and self.trainer.state.status == TrainerStatus.RUNNING:
            # Lightning builds the iterator of a resumed run before it calls set_epoch, and workers read ahead at once.
            progress: Any = self.trainer.fit_loop.epoch_progress.current
            sampler.set_epoch(progress.processed)
            limit, n = self.trainer.limit_train_batches, len(loader)
            loader.batches_per_epoch = min(limit, n) if isinstance(limit, int) else int(n * limit)
        return loader

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation samples in time order."""
        return self.sample_loader(self.val_ids)

    def test_dataloader(self) -> DataLoader[Any]:
        """Test samples in time order."""
        return self.sample_loader(self.test_ids)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Test samples in time order."""
        return self.sample_loader(self.test_ids)

    def sample_loader(self, sample_ids: IntArray, batch_size: int | None = None) -> DataLoader[Any]:
        """Any eligible samples in the given order, each once, shared out over the ranks; for evaluation and scoring.

        Args:
            sample_ids: [n] ids.
            batch_size: Samples a batch; None: ``eval_batch_size``.
        """
        dataset = SampleDataset(
            self.table, self.history_window, np.flatnonzero(self.table.eligible), "the eligible samples"
        )
        return DataLoader(
            dataset,
            batch_size=batch_size or self.eval_batch_size,
            sampler=OrderedSampler(sample_ids),
            collate_fn=identity,
            num_workers=self.num_workers,
        )

    def users_and_items(self, sample_ids: IntArray) -> pd.DataFrame:
        """External user and target item of samples: columns sample_id, user_id and item_id, [n] rows."""
        users, items = np.asarray(self.table.user_ids, dtype=object), np.asarray(self.catalogue.item_ids, dtype=object)
        return pd.DataFrame(
            {
                "sample_id": sample_ids,
                Columns.USER_ID: users[self.table.user[sample_ids]],
                Columns.ITEM_ID: items[self.table.item[sample_ids]],
            }
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of catalogue and samples: equal fingerprints mean equal sample_ids and item indices."""
        return digest((self.catalogue.fingerprint, self.table.fingerprint))

    def describe(self) -> dict[str, int]:
        """Counts for printing: what there is, rows and eligible samples of each part, what was left out and why."""
        table, split = self.table, self.split
        return {
            "users": len(table.user_ids),
            "items": len(self.catalogue),
            "interactions": len(table),
            "warm_rows": split.warm_end,
            "pool_rows": split.train_end - split.warm_end,
            "validation_rows": split.val_end - split.train_end,
            "test_rows": split.end - split.val_end,
            "warm": len(self.warm_ids),
            "pool": len(self.pool_ids),
            "validation": len(self.val_ids),
            "test": len(self.test_ids),
            "test_users": len(np.unique(table.user[self.test_ids])),
            "no_history": int((table.n_earlier == 0).sum()),
            "repeats": int(table.repeated.sum()),
        }


def _texts(items: pd.DataFrame) -> list[str]:
    """`title (year), genre, genre` as far as the file has them."""
    nothing = [""] * len(items)
    years = items["release_year"].tolist() if "release_year" in items else nothing
    genres = items["class"].tolist() if "class" in items else nothing
    return [
        ", ".join(filter(None, [f"{title} ({year})" if title and year else title, *genre.split()]))
        for title, year, genre in zip(items[Columns.TITLE].tolist(), years, genres, strict=True)
    ]
