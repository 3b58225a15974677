"""RecDataModule: from a source of samples to batches."""

from collections.abc import Collection
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerStatus
from torch.utils.data import DataLoader, Dataset

from minirec_pl.data.batches import Batch, SampleDataset, identity
from minirec_pl.data.columns import Columns
from minirec_pl.data.identity import catalogue_table, part_facts, sample_table
from minirec_pl.data.loader import GenerationSchedule, ResumableLoader, SampleLoader, limited
from minirec_pl.data.own_columns import OwnColumns
from minirec_pl.data.sample_features import SampleFeatures, sample_features
from minirec_pl.data.sampler import CurriculumSampler, OrderedSampler
from minirec_pl.data.samples import Catalogue, IntArray, SampleTable, digest
from minirec_pl.data.sequence_table import SequenceTable
from minirec_pl.data.sources.assemble import Faults, Samples, Source, check_source, samples_of
from minirec_pl.data.sources.atomic_files import AtomicFiles
from minirec_pl.data.splits import Parts, TimeSplit, random_part, split_table
from minirec_pl.data.train_loader import end_workers
from minirec_pl.data.warm_batches import WarmChunkSampler, WarmDataset, WarmSequenceDataset
from minirec_pl.utils.errors import InputError, check_whole
from minirec_pl.utils.identity import Identity, Table
from minirec_pl.utils.ranks import world
from minirec_pl.utils.seeds import check_seed

TRAIN_ON = ("warm", "pool", "warm_samples")
_EVALUATION_SEED = 0


class RecDataModule(LightningDataModule):
    """Next-item samples from any source, in global time order.

    The first share of the train part in time feeds the warm start, the rest is the pool of RL; they do not overlap.
    Only samples with a history and a target that is new to the user are served. ``setup`` fills the attributes. It also
    sets ``split``, in sample_ids, to where the parts begin and end, or to None if they are not stretches of time.

    Args:
        path: Folder that holds a folder per dataset of RecBole atomic files; not used with ``source``.
        dataset: Name of the dataset's folder and files; not used with ``source``.
        train_on: ``warm`` trains on sequences of the warm part, ``pool`` on single samples of the pool,
            ``warm_samples`` on single samples of the warm part.
        split: Shares of train, validation and test in global time, or ``given``, or ``leave_one_out``. ``given``
            follows the column ``split`` of the data (train, validation, test); without validation the latest tenth of
            train becomes that. ``leave_one_out`` takes each user's last sample for test and the one before for
            validation, which leaks the future of other users into training.
        warm_fraction: Share of the train part kept for the warm start, earliest first.
        history_window: Longest history, in items.
        batch_size: Samples per training batch, from the pool or of ``warm_samples``.
        warm_batch_size: Sequences per training batch, with ``train_on: warm``.
        eval_batch_size: Samples per batch in validation, test and scoring.
        num_workers: Loader processes; 0 loads in the main process, which is fastest on few cores.
        seed: Seed of the training order and of the subsets of warm part and pool.
        source: Where the samples come from, a class of ``minirec_pl.data.sources``; None takes the atomic files in
            ``path``.
        warm_samples: Samples of the warm part to use, a random subset of this size; None for all. Needs ``train_on``
            other than ``warm``, which trains on stretches, unless the source gives ready-made sequences.
        pool_samples: Samples of the pool to use, a random subset of this size; None for all.
        val_samples: Samples of validation to use, the same random subset for every seed; None for all.
        test_samples: Samples of test to use, the same random subset for every seed; None for all.
        window: Stretch of global time that warm part, pool, validation and test are cut from, as shares of the samples
            in time order, such as ``[0.2, 0.8]``; None for all of it. Needs a ``split`` in global time. Samples outside
            are in no part, but what a user did before the window stays in histories and masked items, as it was known
            by then.
        whole_sequences: Serve the samples of a user that an epoch trains on one after the other, with histories that
            begin at every (history_window / 2)-th item, so that training without rollouts runs the sequence of a user
            once for all of them. A user comes where the first of its samples would; of the pool and ``warm_samples``.

    Attributes:
        table: All samples.
        catalogue: All items.
        report: What was dropped or fixed while reading, by file and in words, and how often.
        own_columns: Columns of interactions and items that the module's rewards ask for.
        parts: All sample_ids of each part.
        warm_ids: Eligible sample_ids of the warm part, int64; likewise ``pool_ids``, ``val_ids`` and ``test_ids``.
        item_popularity: Interactions of each item in the train part (warm and pool), [n_items] int64; of ready-made
            sequences the users that have it there.
        train_sampler: The sampler of the training loader; it lives as long as the DataModule.

    Example:
        >>> data = RecDataModule("data", "ml-100k", train_on="pool", batch_size=64)  # doctest: +SKIP
        >>> data.setup("fit")  # doctest: +SKIP
        >>> len(data.pool_ids)  # doctest: +SKIP
        9803
    """

    table: SampleTable
    catalogue: Catalogue
    report: Faults
    own_columns: OwnColumns
    parts: Parts
    split: TimeSplit | None
    warm_ids: IntArray
    pool_ids: IntArray
    val_ids: IntArray
    test_ids: IntArray
    item_popularity: IntArray
    train_sampler: CurriculumSampler | WarmChunkSampler

    def __init__(
        self,
        path: str = "data",
        dataset: str = "ml-100k",
        train_on: Literal["warm", "pool", "warm_samples"] = "pool",
        split: tuple[float, float, float] | Literal["leave_one_out", "given"] = (0.8, 0.1, 0.1),
        warm_fraction: float = 0.875,
        history_window: int = 50,
        batch_size: int = 64,
        warm_batch_size: int = 16,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 42,
        source: Source | None = None,
        warm_samples: int | None = None,
        pool_samples: int | None = None,
        val_samples: int | None = None,
        test_samples: int | None = None,
        window: tuple[float, float] | None = None,
        whole_sequences: bool = False,
    ) -> None:
        super().__init__()
        if train_on not in TRAIN_ON:
            raise InputError(f"train_on={train_on!r}: give 'warm', 'pool' or 'warm_samples'")
        counts = {
            "history_window": history_window,
            "batch_size": batch_size,
            "warm_batch_size": warm_batch_size,
            "eval_batch_size": eval_batch_size,
            "warm_samples": warm_samples,
            "pool_samples": pool_samples,
            "val_samples": val_samples,
            "test_samples": test_samples,
        }
        check_whole(**counts)
        for name, value in counts.items():
            if value is not None and value < 1:
                raise InputError(f"{name}={value}: give a whole number of at least 1")
        if source is not None:
            check_source(source)
        self.source = AtomicFiles(path, dataset) if source is None else source
        self.train_on = train_on
        self.split_by, self.warm_fraction, self.history_window = split, warm_fraction, history_window
        self.window, self.whole_sequences = window, whole_sequences
        self.batch_size, self.warm_batch_size, self.eval_batch_size = batch_size, warm_batch_size, eval_batch_size
        self.num_workers, self.seed = num_workers, check_seed(seed)
        self.sizes = (warm_samples, pool_samples, val_samples, test_samples)
        self._ready = False
        self._asked: frozenset[str] = frozenset()
        self._table_facts: dict[str, str] = {}
        self.save_hyperparameters(ignore=["source"])

    def setup(self, stage: str | None = None) -> None:
        """Read the data once and build the training sampler for the current number of ranks.

        Raises:
            InputError: The data are missing or wrong, or a part that is needed holds no eligible sample.
        """
        module = None if self.trainer is None else self.trainer.lightning_module
        self.keep_columns(getattr(module, "reward_arguments", ()))
        if not self._ready:
            self._read()
            self._ready = True
        sampler = getattr(self, "train_sampler", None)
        if sampler is None or (sampler.num_replicas, sampler.rank) != world():
            self.train_sampler = self._make_sampler()

    def keep_columns(self, names: Collection[str]) -> None:
        """Keeps the columns of interactions and items that rewards ask for; data that are read already are read again.

        Args:
            names: What rewards ask for, see :class:`OwnColumns`; what is no column is ignored.

        Raises:
            InputError: The data have changed since they were read.
        """
        new = frozenset(names) - self._asked
        self._asked |= new
        if self._ready and any(self.own_columns.places(name) for name in new):
            samples = samples_of(self.source)
            if digest((samples.catalogue.fingerprint, samples.table.fingerprint)) != self.fingerprint:
                raise InputError(f"{samples.name} has changed since it was read: start again")
            self._keep(samples)

    def _keep(self, samples: Samples) -> None:
        table, catalogue = self.table, self.catalogue
        interactions, items = (
            pd.DataFrame() if frame is None else frame.reset_index(drop=True)
            for frame in (samples.interactions, samples.items)
        )
        interactions = interactions.iloc[table.source_row if len(interactions) else []].reset_index(drop=True)
        interactions[Columns.USER_ID] = np.asarray(table.user_ids, dtype=object)[table.user]
        if Columns.TIMESTAMP in interactions or not isinstance(table, SequenceTable):
            interactions[Columns.TIMESTAMP] = table.timestamp
        if table.rating is not None and Columns.RATING not in interactions:
            interactions[Columns.RATING] = table.rating
        if catalogue.titles is not None:
            items[Columns.TITLE] = catalogue.titles
        self.own_columns = OwnColumns.keep(interactions, items, self._asked)

    def _make_sampler(self) -> CurriculumSampler | WarmChunkSampler:
        if self.train_on != "warm" or isinstance(self.table, SequenceTable):
            ids = self.pool_ids if self.train_on == "pool" else self.warm_ids
            together = self.table.user[ids] if self.whole_sequences and self.train_on != "warm" else None
            return CurriculumSampler(ids, seed=self.seed, together=together)
        if self.sizes[0] is not None:
            raise InputError(
                f"warm_samples={self.sizes[0]} does not fit train_on='warm', which trains on whole stretches of users' "
                "interactions: set train_on to 'warm_samples', or leave warm_samples out"
            )
        return WarmChunkSampler(self.table, self.parts.warm, self.history_window, seed=self.seed)

    def _read(self) -> None:
        samples = samples_of(self.source)
        self.table, self.catalogue, self.report = samples.table, samples.catalogue, samples.report
        self._keep(samples)
        self.parts, self.split = split_table(self.table, self.split_by, self.warm_fraction, self.window)
        seeds = (self.seed, self.seed, _EVALUATION_SEED, _EVALUATION_SEED)
        self.warm_ids, self.pool_ids, self.val_ids, self.test_ids = (
            random_part(rows[self.table.eligible[rows]], size, seed)
            for rows, size, seed in zip(self.parts, self.sizes, seeds, strict=True)
        )
        train = np.concatenate([self.parts.warm, self.parts.pool])
        self.item_popularity = self.table.item_counts(train)
        self.catalogue.interactions = partial(self.table.interactions, train)
        self._check_parts(samples.name)

    def _check_parts(self, source: str) -> None:
        train = ("pool", self.pool_ids) if self.train_on == "pool" else ("warm-start", self.warm_ids)
        options = {"warm-start": "warm_fraction", "pool": "warm_fraction"}
        for name, ids in (train, ("validation", self.val_ids), ("test", self.test_ids)):
            if len(ids) == 0:
                moments = len(np.unique(self.table.timestamp))
                raise InputError(
                    f"{source}: the {name} part is empty, no sample in it has a history and a new item "
                    f"(split={self.split_by}, warm_fraction={self.warm_fraction}, {len(self.table)} interactions at "
                    f"{moments} different timestamps): change {options.get(name, 'split')} or check the timestamps"
                )

    def train_dataloader(self) -> ResumableLoader:
        """Makes the training loader: single samples (see SampleDataset) or the warm start (see WarmDataset), resumable.

        A module with a ``generation_schedule`` gets the batches of single samples as that says.
        """
        sampler = self.train_sampler
        schedule = GenerationSchedule()
        dataset: Dataset[Batch]
        if isinstance(sampler, WarmChunkSampler):
            dataset, batch_size = WarmDataset(self.table, sampler.n_chunks), self.warm_batch_size
        elif self.train_on == "warm" and isinstance(self.table, SequenceTable):
            dataset = WarmSequenceDataset(self.table, self.history_window, self.warm_ids)
            batch_size = self.warm_batch_size
        else:
            ids, part = (self.pool_ids, "the pool") if self.train_on == "pool" else (self.warm_ids, "the warm part")
            stride = -(-self.history_window // 2) if self.whole_sequences else 1
            dataset = SampleDataset(self.table, self.history_window, ids, part, stride)
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
            loader.progress = self.trainer.fit_loop.epoch_loop.batch_progress
            loader.batches_per_epoch = limited(len(loader), self.trainer.limit_train_batches)
        return loader

    def val_dataloader(self) -> DataLoader[Any]:
        """Makes the loader of the validation samples, in time order."""
        return self.sample_loader(self.val_ids)

    def test_dataloader(self) -> DataLoader[Any]:
        """Makes the loader of the test samples, in time order."""
        return self.sample_loader(self.test_ids)

    def predict_dataloader(self) -> DataLoader[Any]:
        """Makes the loader of the test samples, in time order."""
        return self.sample_loader(self.test_ids)

    def sample_loader(self, sample_ids: IntArray, batch_size: int | None = None) -> DataLoader[Any]:
        """Makes a loader of eligible samples in the given order, each once, over the ranks; for evaluation and scoring.

        Args:
            sample_ids: [n] ids.
            batch_size: Samples per batch; None: ``eval_batch_size``.
        """
        dataset = SampleDataset(
            self.table, self.history_window, np.flatnonzero(self.table.eligible), "the eligible samples"
        )
        return SampleLoader(
            dataset,
            batch_size=batch_size or self.eval_batch_size,
            sampler=OrderedSampler(sample_ids),
            collate_fn=identity,
            num_workers=self.num_workers,
        )

    def on_exception(self, exception: BaseException) -> None:
        """Ends the workers of a run that fails or is interrupted."""
        if self.trainer is not None:
            end_workers(self.trainer)

    def users_and_items(self, sample_ids: IntArray) -> pd.DataFrame:
        """Looks up external user and target item of samples: columns sample_id, user_id and item_id, [n] rows."""
        users, items = np.asarray(self.table.user_ids, dtype=object), np.asarray(self.catalogue.item_ids, dtype=object)
        return pd.DataFrame(
            {
                "sample_id": sample_ids,
                Columns.USER_ID: users[self.table.user[sample_ids]],
                Columns.ITEM_ID: items[self.table.item[sample_ids]],
            }
        )

    def sample_features(self, sample_ids: IntArray) -> SampleFeatures:
        """Computes features of samples that need no language model, for predicted difficulty, see `SampleFeatures`.

        Popularity and item factors are of the warm part, which the policy knows; without one, of the pool.

        Args:
            sample_ids: [n].
        """
        known = self.parts.warm if len(self.parts.warm) else self.parts.pool
        train = np.concatenate([self.parts.warm, self.parts.pool])
        return sample_features(self.table, sample_ids, known, train)

    def sample_texts(self, sample_ids: IntArray, last: int = 8) -> pd.DataFrame:
        """Puts samples in words: sample_id, user_id, history (list of titles, most recent last) and target, [n] rows.

        Args:
            sample_ids: [n].
            last: Items of the history at most.
        """
        titles = np.asarray(self.catalogue.titles or self.catalogue.item_ids, dtype=object)
        table = self.users_and_items(sample_ids).drop(columns=Columns.ITEM_ID)
        table["history"] = [titles[self.table.history(sample_id, last)].tolist() for sample_id in sample_ids.tolist()]
        table["target"] = titles[self.table.item[sample_ids]]
        return table

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of catalogue and samples: equal fingerprints mean equal sample_ids and item indices."""
        return digest((self.catalogue.fingerprint, self.table.fingerprint))

    @property
    def identity(self) -> Identity:
        """What is made with these data is made for: samples, catalogue, split and what is trained on; after `setup`."""
        if not self._table_facts:
            tables = self._tables().items()
            self._table_facts = {f"{name}.{column}": f for name, t in tables for column, f in t.facts().items()}
        window = "" if self.window is None else f", window {list(self.window)}"
        split = self.split_by if isinstance(self.split_by, str) else list(self.split_by)
        parts = {"validation_part": self.val_ids, "test_part": self.test_ids}
        trained = ("the pool", self.pool_ids) if self.train_on == "pool" else ("the warm part", self.warm_ids)
        facts = part_facts(self.parts, f"{split}, warm_fraction {self.warm_fraction}{window}", trained, parts)
        return Identity({**self._table_facts, **facts, "history_window": str(self.history_window)}, self._tables)

    def _tables(self) -> dict[str, Table]:
        samples = sample_table(self.table, self.catalogue, self.parts)
        return {"catalogue": catalogue_table(self.catalogue), "samples": samples}

    def describe(self) -> dict[str, int]:
        """Counts what there is: rows and eligible samples of each part, what was left out and why."""
        table, parts = self.table, self.parts
        return {
            "users": len(table.user_ids),
            "items": len(self.catalogue),
            "interactions": len(table),
            "warm_rows": len(parts.warm),
            "pool_rows": len(parts.pool),
            "validation_rows": len(parts.validation),
            "test_rows": len(parts.test),
            "warm": len(self.warm_ids),
            "pool": len(self.pool_ids),
            "validation": len(self.val_ids),
            "test": len(self.test_ids),
            "test_users": len(np.unique(table.user[self.test_ids])),
            "no_history": int((table.n_earlier == 0).sum()),
            "repeats": int(table.repeated.sum()),
        }
