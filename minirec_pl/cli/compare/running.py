"""Runs the cells of a study and prints what came of them."""

from __future__ import annotations

import fnmatch
import os
import time
from datetime import timedelta
from pathlib import Path

from jsonargparse import Namespace

from minirec_pl.cli.compare.comparison import tables_of
from minirec_pl.cli.compare.results import read_cell, tidy, write_tidy
from minirec_pl.cli.compare.study import Cell, Study
from minirec_pl.cli.compare.tasks import cell_path, check, run_cell, warm_folder, warm_start
from minirec_pl.cli.compare.workers import Workers
from minirec_pl.cli.terminal import console
from minirec_pl.utils.errors import InputError


def compare(study: Study, options: Namespace) -> int:
    """Runs the cells of a study and prints what came of them; returns 1 if a cell failed, else 0.

    Args:
        study: that the command line names.
        options: of the command line.
    """
    to = Path(options.to)
    cells = _chosen(study, options.cell, options.only)
    open_cells = [cell for cell in cells if not _finished(study, cell, to)]
    print(f"{len(cells)} cells, {len(cells) - len(open_cells)} of them finished in {to}", flush=True)
    failed: dict[str, str] = {}
    if open_cells:
        _check_folder(to)
        deadline = None if options.time_limit is None else time.monotonic() + 60 * options.time_limit
        failed = _run(study, open_cells, to, options.jobs, deadline)
    paths = {cell_path(to, cell): cell for cell in study.cells() if cell_path(to, cell).is_file()}
    done = [path for path, cell in paths.items() if _is_of(study, cell, path)]
    if len(done) < len(paths):
        print(f"left out: {len(paths) - len(done)} cells in {to} that were run with another study")
    if done:
        frame, path = tidy(done), to / f"{study.path.stem}.parquet"
        write_tidy(frame, path)
        screen = console(pipe_width=160)
        for table in tables_of(frame, study.references):
            screen.print(table)
        print(f"table: {path}, {len(done)} of {len(study.cells())} cells")
    for name, sentence in failed.items():
        print(f"failed: {name}: {sentence}")
    return 1 if failed else 0


def _run(study: Study, cells: list[Cell], to: Path, jobs: int, deadline: float | None) -> dict[str, str]:
    """The sentences of the cells that failed, by id."""
    failed: dict[str, str] = {}
    with Workers(jobs) as workers:
        for done in workers.run(check, [(study, part) for part in _representative(cells, jobs)]):
            if done.error:
                raise InputError(done.error)
        starts = {warm_folder(to, study, cell.data, cell.seed): (cell.data, cell.seed) for cell in cells}
        tasks = [(study, data, seed, to) for folder, (data, seed) in starts.items() if not folder.is_dir()]
        broken: dict[Path, str] = {}
        for number, done in enumerate(workers.run(warm_start, tasks, deadline), start=1):
            _, data, seed, _ = done.task
            what = f"failed: {done.error}" if done.error else f"{done.result:.1f} s"
            print(f"[warm start {number}/{len(tasks)}] {data.label}/{seed}  {what}", flush=True)
            if done.error:
                broken[warm_folder(to, study, data, seed)] = done.error
        ready = []
        for cell in cells:
            folder = warm_folder(to, study, cell.data, cell.seed)
            if folder in broken:
                failed[cell.id] = f"its warm start failed: {broken[folder]}"
            elif folder.is_dir():
                ready.append(cell)
        started = time.monotonic()
        for number, done in enumerate(workers.run(run_cell, [(study, cell, to) for cell in ready], deadline), start=1):
            cell = done.task[1]
            spent = time.monotonic() - started
            left = timedelta(seconds=round(spent / number * (len(ready) - number)))
            what = f"failed: {done.error}" if done.error else f"{done.result['wall_seconds']:.1f} s"
            print(f"[{number}/{len(ready)}] {cell.id}  {what}, {left} left", flush=True)
            if done.error:
                failed[cell.id] = done.error
    return failed


def _representative(cells: list[Cell], jobs: int) -> list[list[Cell]]:
    """A cell of each method, setting and data set, dealt out to the workers."""
    chosen: dict[object, Cell] = {}
    for cell in cells:
        new = [key for key in ((cell.method.name, cell.setting), cell.data.label) if key not in chosen]
        chosen |= dict.fromkeys(new, cell)
    different = list(dict.fromkeys(chosen.values()))
    return [part for part in (different[number::jobs] for number in range(jobs)) if part]


def _chosen(study: Study, cell: str | None, only: str | None) -> list[Cell]:
    cells = study.cells()
    if cell is not None:
        found = [one for one in cells if one.id == cell]
        if not found:
            raise InputError(f"there is no cell {cell!r} in {study.path}: give one like {cells[0].id!r}")
        return found
    if only is not None:
        cells = [one for one in cells if fnmatch.fnmatchcase(one.id, only)]
        if not cells:
            raise InputError(
                f"--only {only!r} matches no cell of {study.path}: write it like '{study.cells()[0].data.name}/*'"
            )
    return cells


def _finished(study: Study, cell: Cell, to: Path) -> bool:
    path = cell_path(to, cell)
    if not path.is_file():
        return False
    if not _is_of(study, cell, path):
        raise InputError(
            f"{path} was run with another study: its config, overrides, epochs or budget differ from {study.path}: "
            "choose another --to, or delete the file to run the cell again"
        )
    return True


def _is_of(study: Study, cell: Cell, path: Path) -> bool:
    return bool(read_cell(path)[1].get("fingerprint") == study.fingerprint(cell))


def _check_folder(to: Path) -> None:
    try:
        to.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"cannot make '{to}' ({(error.strerror or str(error)).lower()}): choose another --to"
        ) from error
    if not os.access(to, os.W_OK):
        raise InputError(f"'{to}' cannot be written: choose another --to")
