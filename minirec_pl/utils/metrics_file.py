"""`metrics.csv` of a run that is resumed in its folder: rows until the checkpoint stay, those after it go.

Lightning's CSVLogger removes the file as soon as it opens it, so that it is set aside before.
"""

from __future__ import annotations

import csv
import os
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger

from minirec_pl.utils.files import write_atomically

METRICS, SET_ASIDE = "metrics.csv", ".metrics.csv"


def set_aside(run: Path) -> None:
    """Saves the file of a run from the logger that is about to be made."""
    if (run / METRICS).is_file() and not (run / SET_ASIDE).is_file():
        os.replace(run / METRICS, run / SET_ASIDE)


def put_back(run: Path) -> None:
    """Undoes `set_aside` where the run did not come to `go_on_after`."""
    if (run / SET_ASIDE).is_file():
        os.replace(run / SET_ASIDE, run / METRICS)


def count_rows(logger: CSVLogger) -> int:
    """Has a logger write what it still holds, and counts the rows of its file."""
    logger.save()
    return len(_read(Path(logger.experiment.metrics_file_path))[1])


def go_on_after(logger: CSVLogger, rows: int, steps: int) -> None:
    """Gives a logger that has just been opened the rows that its run had written before a checkpoint.

    Args:
        logger: whose file was set aside; without one, nothing is done.
        rows: that the file had when the checkpoint was taken.
        steps: steps of the logger until the checkpoint; rows of earlier ones that came after it are kept, too.
    """
    target = Path(logger.experiment.metrics_file_path)
    earlier = target.with_name(SET_ASIDE)
    if not earlier.is_file():
        return
    names, found = _read(earlier)
    kept = found[:rows] + [row for row in found[rows:] if int(row["step"]) < steps]

    def write(scratch: Path) -> None:
        with scratch.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=names)
            writer.writeheader()
            writer.writerows(kept)

    if kept:
        write_atomically(target, write)
        logger.experiment.metrics_keys = names
    earlier.unlink()


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows, without a last line that is not whole."""
    if not path.is_file():
        return [], []
    with path.open(newline="") as file:
        text = file.read()
    reader = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    rows = [row for row in reader if None not in row.values()]
    return list(reader.fieldnames or ()), rows
