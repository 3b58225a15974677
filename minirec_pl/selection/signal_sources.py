"""Signals from files: a run's own safetensors, a parquet table, or JSON lines of rewards beside `.npy` vectors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from minirec_pl.selection.merge import merge_stores
from minirec_pl.selection.signals import SampleSignals, Signals, as_ids, name_ids, repeated_ids
from minirec_pl.selection.store import SignalStore
from minirec_pl.utils.errors import InputError

SUFFIXES = (".safetensors", ".parquet", ".jsonl")
_NAMES = {"reward": "rewards"}


@dataclass
class SignalFile:
    """The signals of a file.

    Attributes:
        signals: [N] rows, ascending by sample_id.
        fingerprints: what the signals were measured with; empty where the file does not say.
    """

    signals: Signals
    fingerprints: dict[str, str] = field(default_factory=dict)


def read_signals(
    paths: Sequence[Path],
    *,
    embeddings: Path | None = None,
    gradients: Path | None = None,
    ids: Path | None = None,
) -> SignalFile:
    """Reads the signals of a pool.

    * `.safetensors`: what a run or `minirec score` left; several shards of one pool are merged (`merge_stores`).
    * `.parquet`: a row per sample with `sample_id`, `rewards` (list of numbers) or `solve_probability`, and, if they
      are known, `gradient` and `embedding` (lists).
    * `.jsonl`: a line per sample, an object with the same names; `reward` is taken as `rewards`, as in the published
      code of MiniRec.

    Vectors of `.parquet` and `.jsonl` files can come as `.npy` arrays [N, D], memory-mapped: row i is that of the i-th
    sample_id in ascending order, or of the i-th entry of `ids`.

    Args:
        paths: one file, or several `.safetensors`.
        embeddings: `.npy` file.
        gradients: `.npy` file.
        ids: `.npy` or text file with the sample_id of each row of the `.npy` files.

    Returns:
        The signals and their fingerprints.

    Raises:
        InputError: If a file is missing, damaged or of an unknown kind, an id is missing or comes twice, or a value
            has the wrong type, is NaN or infinite; names file, line and sample_id.
    """
    kinds = {path.suffix for path in paths}
    for path in paths:
        if not path.is_file():
            raise InputError(f"there are no signals at {path}: give the file that `minirec score` or a run wrote")
    if kinds == {".safetensors"}:
        if embeddings or gradients or ids:
            raise InputError("a .safetensors file has its own vectors: leave out --embeddings, --gradients and --ids")
        store = merge_stores([SignalStore.load(path) for path in paths], [str(path) for path in paths])
        newest = max(int(store.clock(f"{name}_epoch").max()) for name in ("reward", "solve_probability", "gradient"))
        return SignalFile(store.pool_view(max(newest, 0)), store.fingerprints)
    if len(paths) != 1 or not kinds <= set(SUFFIXES):
        raise InputError(
            f"cannot read {', '.join(map(str, paths))}: give one file that ends in {', '.join(SUFFIXES)}, or several "
            ".safetensors"
        )
    columns = _read_parquet(paths[0]) if kinds == {".parquet"} else _read_json_lines(paths[0])
    return SignalFile(_signals(columns, str(paths[0]), embeddings, gradients, ids))


def _signals(
    columns: Mapping[str, Any], source: str, embeddings: Path | None, gradients: Path | None, ids: Path | None
) -> Signals:
    sample_id = as_ids(columns["sample_id"])
    if len(twice := repeated_ids(sample_id)):
        raise InputError(f"{source}: sample_id {name_ids(twice)} comes more than once: keep one row per sample")
    if columns.get("rewards") is None and columns.get("solve_probability") is None:
        raise InputError(f"{source} has neither rewards nor solve_probability: give one of them")
    order = sample_id.argsort()
    try:
        batch = SampleSignals(sample_id, **{name: value for name, value in columns.items() if name != "sample_id"})
        store = SignalStore(sample_id)
        store.update(batch, epoch=0, step=0, source="score")
        signals = store.pool_view(0)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    listed = None if ids is None else _read_ids(ids)
    rows = None if listed is None else _rows_of(sample_id[order], listed, str(ids))
    for name, path in (("embedding", embeddings), ("gradient", gradients)):
        if path is not None:
            counted = f"{source} has {len(sample_id)} sample_ids" if listed is None else f"{ids} names {len(listed)}"
            vectors = _read_vectors(path, len(sample_id) if listed is None else len(listed), counted)
            setattr(signals, name, torch.from_numpy(vectors if rows is None else vectors[rows]))
    signals.__post_init__()
    return signals


def _read_vectors(path: Path, n: int, counted: str) -> npt.NDArray[Any]:
    if not path.is_file():
        raise InputError(f"there are no vectors at {path}: give a .npy array with a row per sample")
    try:
        vectors: npt.NDArray[Any] = np.load(path, mmap_mode="c", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(
            f"{path} is not a readable .npy array of numbers ({error}): save it with numpy.save"
        ) from error
    if vectors.ndim != 2 or not np.issubdtype(vectors.dtype, np.floating):
        raise InputError(f"{path} holds {vectors.dtype} of shape {list(vectors.shape)}: save floats [N, D]")
    if len(vectors) != n:
        raise InputError(f"{path} has {len(vectors)} rows but {counted}: give one row each, or name them with --ids")
    return vectors


def _read_ids(path: Path) -> torch.Tensor:
    if not path.is_file():
        raise InputError(f"there are no ids at {path}: give the sample_id of each row as .npy or as text, one per line")
    try:
        is_array = path.suffix == ".npy"
        listed = np.load(path, allow_pickle=False) if is_array else np.loadtxt(path, dtype=np.int64, ndmin=1)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path} is not a list of integers ({error}): give one sample_id per line") from error
    ids = as_ids(listed)
    if len(twice := repeated_ids(ids)):
        raise InputError(f"{path}: sample_id {name_ids(twice)} comes more than once: give each row an id of its own")
    return ids


def _rows_of(sample_id: torch.Tensor, listed: torch.Tensor, source: str) -> npt.NDArray[np.int64] | None:
    """Row of each sample_id in vectors whose ids are `listed`; None where they are in order already."""
    if torch.equal(sample_id, listed):
        return None
    row: npt.NDArray[np.int64] = pd.Index(listed.numpy()).get_indexer(sample_id.numpy()).astype(np.int64)
    missing = sample_id[torch.from_numpy(row < 0)]
    if len(missing):
        raise InputError(f"{source} has no row for sample_id {name_ids(missing)}: give one per scored sample")
    return row


def _read_parquet(path: Path) -> dict[str, Any]:
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable parquet file: copy it again or score again") from error
    table = table.rename(columns={old: new for old, new in _NAMES.items() if new not in table})
    if "sample_id" not in table or not pd.api.types.is_integer_dtype(table["sample_id"]):
        raise InputError(f"{path} has no column sample_id of integers: give each row the id of its sample")
    columns: dict[str, Any] = {"sample_id": table["sample_id"].to_numpy(dtype=np.int64)}
    for name in ("rewards", "gradient", "embedding"):
        if name in table:
            columns[name] = _stack(table[name].tolist(), name, str(path), table["sample_id"].tolist())
    if "solve_probability" in table:
        columns["solve_probability"] = table["solve_probability"].to_numpy(dtype=np.float64)
    return columns


def _read_json_lines(path: Path) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                rows.append(_json_row(line, f"{path}, line {number}"))
    if not rows:
        raise InputError(f'{path} is empty: give a line per sample, such as {{"sample_id": 0, "rewards": [1.0, 0.0]}}')
    names = set().union(*rows) & {"rewards", "gradient", "embedding", "solve_probability"}
    ids = [row["sample_id"] for row in rows]
    columns: dict[str, Any] = {"sample_id": np.asarray(ids, dtype=np.int64)}
    for name in sorted(names):
        lacking = next((row["sample_id"] for row in rows if name not in row), None)
        if lacking is not None:
            raise InputError(f"{path}: sample_id {lacking} has no {name} but others have: give it to all or to none")
        values = [row[name] for row in rows]
        columns[name] = (
            np.asarray(_numbers(values, name, str(path), ids))
            if name == "solve_probability"
            else _stack(values, name, str(path), ids)
        )
    return columns


def _json_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        sample_id = int(row["sample_id"])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{where} is not a JSON object with an integer sample_id: fix or remove the line") from error
    return {**{_NAMES.get(name, name): value for name, value in row.items()}, "sample_id": sample_id}


def _stack(values: list[Any], name: str, source: str, ids: list[int]) -> npt.NDArray[np.float64]:
    """Lists of one length as an array; names the sample whose list is not like the first."""
    width = None
    for value, sample_id in zip(values, ids, strict=True):
        if not isinstance(value, (list, np.ndarray)) or len(value) == 0:
            raise InputError(f"{source}: {name} of sample_id {sample_id} is not a list of numbers: give one")
        width = len(value) if width is None else width
        if len(value) != width:
            raise InputError(
                f"{source}: {name} of sample_id {sample_id} has {len(value)} numbers, that of sample_id {ids[0]} "
                f"{width}: give all equally many"
            )
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        for value, sample_id in zip(values, ids, strict=True):
            _numbers(list(value), name, source, [sample_id] * len(value))
        raise


def _numbers(values: list[Any], name: str, source: str, ids: list[int]) -> list[float]:
    for value, sample_id in zip(values, ids, strict=True):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
            raise InputError(f"{source}: {name} of sample_id {sample_id} holds {value!r}: give only numbers")
    return [float(value) for value in values]
