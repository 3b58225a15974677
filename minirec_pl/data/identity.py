"""What samples, catalogue and split are, as facts; see `minirec_pl.utils.identity`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from minirec_pl.data.batches import identity as unchanged
from minirec_pl.data.samples import Catalogue, IntArray, SampleTable
from minirec_pl.data.sequence_table import SequenceTable
from minirec_pl.data.splits import Parts
from minirec_pl.utils.identity import Column, Hashes, Identity, Table, fact, mixed
from minirec_pl.utils.seeds import isolated_random_state

PROBED = 16  # items of a foreign dataset


def catalogue_table(catalogue: Catalogue) -> Table:
    """The items in their order."""
    return Table({"item": Column("id", catalogue.item_ids)}, lambda row: f"item {row} of the catalogue", "items")


def text_table(catalogue: Catalogue) -> Table:
    """What a policy reads of the items, in their order."""
    titles = catalogue.titles or catalogue.item_ids
    columns = {"title": Column("title", titles), "text": Column("text", catalogue.texts)}
    return Table(columns, lambda row: f"the item {catalogue.item_ids[row]!r}", "texts")


def sample_table(table: SampleTable, catalogue: Catalogue, parts: Parts) -> Table:
    """The samples: user, time and target; the ratings where there are some; the histories where they are given."""
    columns = {
        "target": Column("target item", catalogue.item_ids, table.item),
        "user": Column("user", table.user_ids, table.user),
        "time": Column("time", table.timestamp),
    }
    if table.rating is not None:
        columns["rating"] = Column("rating", table.rating)
    if isinstance(table, SequenceTable):
        columns["history"] = Column("history", hashes=_histories(table, columns["target"]))

    def one(row: int) -> str:
        part = next((name for name, ids in parts._asdict().items() if row in ids), None)
        return f"sample {row}" if part is None else f"sample {row} of {PART_NAMES[part]}"

    return Table(columns, one, "samples")


PART_NAMES = {"warm": "the warm part", "pool": "the pool", "validation": "validation", "test": "test"}


def part_facts(
    parts: Parts, split: str, trained_on: tuple[str, IntArray], others: Mapping[str, IntArray]
) -> dict[str, str]:
    """Makes the facts of a split.

    Args:
        parts: all samples of each part.
        split: how they came about, in words.
        trained_on: the part that training draws from, and the samples of it that are used.
        others: those of the other parts, by name.
    """
    part, ids = trained_on
    trained = fact(f"{part}, {len(ids):,} samples", part.encode(), ids.tobytes())
    used = {name: fact(f"{len(rows):,} samples", rows.tobytes()) for name, rows in others.items()}
    return {"split": fact(split, *(rows.tobytes() for rows in parts)), "training_part": trained, **used}


def _histories(table: SequenceTable, targets: Column) -> Hashes:
    """A hash of the history of each sample, uint64 [N]: items, their times and ratings, in order."""
    items = Column("item", targets.values, table.grouped_item).hashes()
    own = mixed(items)
    for values in (table.grouped_time, table.grouped_rating):
        if values is not None:
            own = mixed(own + Column("", values).hashes())
    place = np.arange(len(items)) - table.history_begin.repeat(table.n_earlier)
    sums = np.concatenate([[np.uint64(0)], np.cumsum(mixed(own + place.astype(np.uint64)), dtype=np.uint64)])
    of_samples: Hashes = sums[table.history_end] - sums[table.history_begin]
    return of_samples


def loader_identity(loader: DataLoader[Any], sample_ids: IntArray) -> Identity:
    """What can be known of a dataset of another project: its sample_ids and 16 of its items, at even distances.

    A dataset with an attribute `fingerprint`, a text, is known by that instead. An item is left out where reading it
    twice gives two values, or one that is not made of tensors, arrays, numbers and texts.

    Args:
        loader: of the training; one of its workers reads the items, if it has some.
        sample_ids: [N], of its sampler.
    """
    dataset: Any = loader.dataset
    own = getattr(dataset, "fingerprint", None)
    found = {
        "dataset": fact(f"{len(sample_ids):,} samples", np.sort(sample_ids).tobytes()),
        "dataset_fingerprint": own if isinstance(own, str) else "none",
    }
    if isinstance(own, str):
        return Identity(found)
    places = np.unique(np.linspace(0, len(sample_ids) - 1, PROBED).astype(np.int64))
    asked = getattr(loader, "foreign_sampler", None)
    ids = np.sort(sample_ids)[places].tolist()
    rows = ids if asked is None else asked.rows(ids)
    options: dict[str, Any] = {}
    if loader.num_workers:
        options = {name: getattr(loader, name) for name in ("worker_init_fn", "multiprocessing_context", "timeout")}
    reader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=None,
        sampler=[*rows, *rows],
        collate_fn=unchanged,
        num_workers=min(1, loader.num_workers),
        generator=torch.Generator(),
        **options,
    )
    with isolated_random_state():
        read = [content(item) for item in reader]
    for sample_id, one, again in zip(ids, read[: len(rows)], read[len(rows) :], strict=True):
        if one is not None and one == again:
            found[f"item_{sample_id}_of_the_dataset"] = fact("", one)
    return Identity(found)


def content(value: Any) -> bytes | None:
    """Puts tensors, arrays, numbers, texts and what is made of them into bytes; None for anything else."""
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_quantized:
            return None
        flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return f"{value.dtype}{tuple(value.shape)}".encode() + flat.numpy().tobytes()
    if isinstance(value, np.ndarray | np.generic) and value.dtype != object:
        return f"{value.dtype}{value.shape}".encode() + value.tobytes()
    if value is None or isinstance(value, str | int | float | bytes):
        return repr(value).encode()
    if isinstance(value, Mapping):
        value = [part for pair in sorted(value.items(), key=lambda pair: str(pair[0])) for part in pair]
    elif not isinstance(value, list | tuple):
        value = list(vars(value).values()) if hasattr(value, "__dict__") else [...]
    parts = [None if part is ... else content(part) for part in value]
    return None if None in parts else b"".join(f"{len(part)}:".encode() + part for part in parts if part is not None)
