"""Files of cells, and the tidy table made of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from minirec_pl.metrics.evaluation import K, gains
from minirec_pl.utils.cost import PHASES
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.files import load_tensors, save_tensors, write_atomically

SPLITS = ("validation", "test")


class Point(NamedTuple):
    """One evaluation point of a cell.

    Attributes:
        epoch: epochs trained; 0 is the warm policy.
        cost: `Cost.state_dict()` at that moment, the warm start included.
        ranks: rank of the target of each sample, int64 [n], by split.
    """

    epoch: int
    cost: Mapping[str, Any]
    ranks: Mapping[str, Tensor]


def write_cell(path: Path, points: Sequence[Point], settings: Mapping[str, Any], index: Mapping[str, Tensor]) -> None:
    """Writes what came of a cell, whole or not at all.

    Args:
        path: file to make, safetensors.
        points: evaluation points, the first before any training.
        settings: what the cell was, in what JSON can hold.
        index: further tensors: `<split>_users` int32 [n], the user of each sample, and `selected_<epoch>` int32 [k].

    Raises:
        InputError: if it cannot be written.
    """
    tensors = {
        f"{split}_ranks": torch.stack([point.ranks[split] for point in points]).to(torch.int32)
        for split in points[0].ranks
    }
    costs = [{"epoch": point.epoch, **point.cost} for point in points]
    save_tensors(path, {**tensors, **index}, {**settings, "points": costs})


def read_cell(path: Path) -> tuple[dict[str, Tensor | Any], dict[str, Any]]:
    """Reads the tensors and the settings of a file of `write_cell`.

    Raises:
        InputError: if it is missing or damaged.
    """
    try:
        tensors, settings = load_tensors(path)
    except InputError as error:
        raise InputError(f"{path} is missing or damaged: delete it and run the same command again") from error
    return {**tensors, "points": settings["points"]}, settings


def points_of(content: Mapping[str, Any]) -> list[Point]:
    """Lists the evaluation points of what `read_cell` gave."""
    ranks = {split: content[f"{split}_ranks"].long() for split in SPLITS if f"{split}_ranks" in content}
    return [
        Point(
            cost["epoch"],
            {name: totals for name, totals in cost.items() if name != "epoch"},
            {s: r[i] for s, r in ranks.items()},
        )
        for i, cost in enumerate(content["points"])
    ]


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Makes the rows of the tidy table that a cell gives: one per evaluation point and split."""
    content, settings = read_cell(path)
    made = []
    for point in points_of(content):
        forward, backward = point.cost["tokens_forward"], point.cost["tokens_backward"]
        tokens = {phase: forward[phase] + backward[phase] for phase in PHASES}
        for split, ranks in point.ranks.items():
            made.append(
                {
                    **{name: settings[name] for name in ("dataset", "window", "method", "setting", "budget", "seed")},
                    "epoch": point.epoch,
                    "split": split,
                    "ndcg@10": float(gains(ranks).mean()),
                    "hit_rate@10": float((ranks <= K).double().mean()),
                    "tokens": sum(tokens.values()),
                    **{f"tokens_{phase}": tokens[phase] for phase in ("warm_start", "scoring", "training")},
                    "rollouts": sum(point.cost["rollouts"].values()),
                    "rollouts_scoring": point.cost["rollouts"]["scoring"],
                    "seconds": sum(point.cost["seconds"].values()),
                    **{f"seconds_{phase}": point.cost["seconds"][phase] for phase in PHASES},
                    "n_samples": len(ranks),
                    "n_users": len(content[f"{split}_users"].unique()),
                }
            )
    return made


def tidy(paths: Iterable[Path]) -> pd.DataFrame:
    """Makes the tidy table of cells: a row per cell, evaluation point and split.

    Columns: dataset, window, method, setting, budget (share of the pool), seed, epoch (0 is the warm policy), split,
    ndcg@10, hit_rate@10; tokens, forward and backward, of everything until then, the warm start included, and those
    of the phases; rollouts; seconds likewise; n_samples and n_users of the split.
    """
    frame = pd.DataFrame([row for path in paths for row in rows_of(path)])
    text = ["dataset", "window", "method", "setting", "split"]
    small = {"seed": "int32", "epoch": "int16", "n_samples": "int32", "n_users": "int32", "rollouts": "int32"}
    types = {**dict.fromkeys(text, "category"), **small, "rollouts_scoring": "int32"}
    types |= {str(name): "float32" for name in frame if str(name).startswith("seconds")}
    return frame.astype(types) if len(frame) else frame


def write_tidy(frame: pd.DataFrame, path: Path) -> None:
    """Writes the table as parquet (zstd), whole or not at all."""
    write_atomically(path, lambda scratch: frame.to_parquet(scratch, index=False, compression="zstd"))
