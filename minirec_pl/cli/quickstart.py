"""`minirec quickstart`: the shipped configs run one after the other, and the table of what they gained and cost."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from lightning.pytorch import Callback
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from minirec_pl.cli.fit import MiniRecCLI, run
from minirec_pl.metrics.evaluation import FIGURES, popularity_row
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.files import write_json

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

RUNS: dict[str, list[str]] = {  # what each changes in quickstart.yaml
    "sft_pool": ["--model.rollouts=supervised"],
    "grpo_full": [
        "--selection=null",
        "--trainer.max_epochs=2",
        "--model.optimizer.lr=0.0001",
        "--model.lr_scheduler.total_iters=308",
    ],
    "grpo_random": [
        "--selection.selector=minirec_pl.selection.RandomSelector",
        "--selection.selector.redraw=true",
        "--selection.curriculum=shuffled",
    ],
    "grpo_expected": ["--model.rollouts=expected"],
    "grpo_minirec": [],
}
SEEDED = dict.fromkeys(("sft_pool", "grpo_expected", "grpo_minirec"), "--selection.curriculum.seed")
SEEDED["grpo_random"] = "--selection.selector.seed"
NAMES = {
    "warm_start": "warm start",
    "sft_pool": "SFT pool",
    "grpo_full": "GRPO full",
    "grpo_random": "GRPO random",
    "grpo_expected": "GRPO expected",
    "grpo_minirec": "MiniRec",
}
SHOWN = (*FIGURES, *(f"{name}_se_users" for name in FIGURES))
COSTS = ("samples_per_epoch", "distinct_samples", "rollouts", "tokens", "seconds")
WIDTH, TAIL = 100, 12  # characters of a line that is piped, lines of the log of a stage that failed
Row = dict[str, Any]


def quickstart(data: Path, to: Path, configs: Path, seed: int) -> None:
    """Trains a warm start, then GRPO on the full pool, a random part and MiniRec's part, and supervised on that.

    Prints a line per stage and the table. Writes `results.json`, the rows of the table, and per method a folder with
    its runs and `log.txt`, all that they printed.

    Args:
        data: folder that holds `ml-100k/`.
        to: folder for the runs.
        configs: folder with `warm-start.yaml` and `quickstart.yaml`.
        seed: seed of every run.

    Raises:
        InputError: if a run fails for a reason the user can fix.
    """
    warm_config, grpo_config = (configs / name for name in ("warm-start.yaml", "quickstart.yaml"))
    common = [f"--data.path={data}", f"--data.seed={seed}", f"--seed_everything={seed}"]
    policy = f"--model.policy.pretrained={to / 'warm_start' / 'latest' / 'policy'}"
    fits = {"warm_start": ["--config", str(warm_config), *common]}
    for method, overrides in RUNS.items():
        seeded = [f"{SEEDED[method]}={seed}"] if method in SEEDED else []
        fits[method] = ["--config", str(grpo_config), *common, policy, *overrides, *seeded]
    results: dict[str, Row] = {}
    with _stdout() as file:
        console = Console(file=file)
        if not console.is_terminal:
            console = Console(file=file, width=WIDTH)
        for method, arguments in fits.items():
            with _Stage(console, NAMES[method]) as stage:
                root = f"--trainer.default_root_dir={to / method}"
                fitted = stage.run(["fit", *arguments, root], to / method / "log.txt", "w")
                results[method] = _results(fitted)
                stage.show(f"NDCG@10 {results[method]['best']['val/ndcg@10']:.4f} on validation")
            if method == "warm_start":
                popularity = popularity_row(fitted.datamodule)
        rows = [{"method": "popularity", **popularity, "samples_per_epoch": 0, "distinct_samples": 0}]
        with _Stage(console, "tests", len(fits)) as stage:
            for method, fit in results.items():
                arguments = ["test", "--ckpt_path", str(fit["best_checkpoint"])]
                tested = stage.run(arguments, to / method / "log.txt", "a")
                rows.append({"method": method, **fit, **_results(tested)})
            stage.show(f"{len(fits)} policies")
        rows = [{name: row[name] for name in ("method", *SHOWN, *COSTS)} for row in rows]
        write_json(to / "results.json", {"rows": rows})
        console.print(table_of(rows))
        console.print(
            "Test part of MovieLens-100K, the whole catalogue ranked. Tokens and seconds include the warm start, "
            "scoring and selection; evaluation is not counted. Trained on MiniRec's picks: sft_pool (supervised), "
            f"grpo_expected (by the expected gradient), grpo_minirec (with rollouts). {_best_on_validation(results)}",
            style="dim",
            highlight=False,
        )
        picture = to / "grpo_minirec" / "latest" / "curriculum.png"
        drawn = picture if picture.is_file() else "none without matplotlib: pip install 'minirec-pl[report]'"
        for what, where in {"table": to / "results.json", "picture": drawn, "logs": to / "*" / "log.txt"}.items():
            console.print(f"{what + ':':<8} {where}", markup=False, highlight=False, soft_wrap=True)


class _Stage(Callback):
    """A line of the terminal: what runs, how far it is, how long it took, a figure.

    It is a callback of the Trainers that run in it, and what they print goes to a log.

    Args:
        console: that shows the line; without a bar where it is not a terminal.
        name: what runs.
        runs: how many Trainers run one after the other.
    """

    def __init__(self, console: Console, name: str, runs: int = 1) -> None:
        super().__init__()
        bar = [BarColumn()] if console.is_terminal else []
        columns = (TextColumn("{task.description:<13}"), *bar, TimeElapsedColumn(), TextColumn("{task.fields[figure]}"))
        self._progress = Progress(*columns, console=console, redirect_stdout=False, redirect_stderr=False)
        self._task = self._progress.add_task(name, total=runs, figure="")
        self._done = 0

    def __enter__(self) -> _Stage:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def show(self, figure: str) -> None:
        """Ends the line with a figure."""
        self._progress.update(self._task, figure=figure)

    def run(self, arguments: Sequence[str], log: Path, mode: str) -> MiniRecCLI:
        """Runs `minirec` with these arguments, and shows the end of the log if that fails."""
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open(mode, encoding="utf-8") as file:
                file.write(f"$ minirec {shlex.join(arguments)}\n")
        except OSError as error:
            raise InputError(f"cannot write '{log}' ({error.strerror}): choose another folder with --to") from error
        try:
            with _output_to(log):
                finished = run(arguments, [self])
        except BaseException:
            self.show("failed")
            self._progress.stop()
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:]
            text = "\n".join([f"last lines of {log}:", *(f"  {line}" for line in lines)])
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
            raise
        self._done += 1
        self._progress.update(self._task, completed=self._done)
        return finished

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Moves the bar."""
        self._move((trainer.current_epoch + (batch_idx + 1) / trainer.num_training_batches) / (trainer.max_epochs or 1))

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Moves the bar."""
        self._move((batch_idx + 1) / sum(trainer.num_test_batches))

    def _move(self, part: float) -> None:
        self._progress.update(self._task, completed=self._done + part)


@contextlib.contextmanager
def _stdout() -> Iterator[TextIO]:
    """Standard output as it is, for the time that its descriptor points to a log."""
    try:
        descriptor = os.dup(sys.stdout.fileno())
    except io.UnsupportedOperation:
        yield sys.stdout
    else:
        with open(descriptor, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors) as file:
            yield file


@contextlib.contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Appends to a file what this process and its children write to their standard output and error."""
    _flush()
    kept = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    with log.open("a", encoding="utf-8") as file:
        for descriptor in kept:
            os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        _flush()
        for descriptor, copy in kept.items():
            os.dup2(copy, descriptor)
            os.close(copy)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        stream.flush()


def _results(finished: MiniRecCLI) -> Row:
    row: Row = json.loads((finished.run_dir / "results.json").read_text(encoding="utf-8"))
    return row


def _best_on_validation(results: dict[str, Row]) -> str:
    figures = {method: fit["best"]["val/ndcg@10"] for method, fit in results.items()}
    best = max(figures, key=lambda method: figures[method])
    return f"Best on validation: {best}, NDCG@10 {figures[best]:.4f}."


def table_of(rows: list[Row]) -> Table:
    """The rows of `results.json` as a table for the terminal."""
    table = Table(title="MovieLens-100K quickstart")
    columns = ("method", "HR@10", "NDCG@10", "samples per epoch", "distinct", "rollouts scoring + training")
    for column in (*columns, "M tokens forward + backward", "seconds"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=column == "method")
    for row in rows:
        rollouts, tokens, seconds = row["rollouts"], row["tokens"], row["seconds"]
        table.add_row(
            row["method"],
            f"{row['hit_rate@10']:.4f}",
            f"{row['ndcg@10']:.4f}",
            f"{row['samples_per_epoch']:,}",
            f"{row['distinct_samples']:,}",
            f"{rollouts['scoring']:,} + {rollouts['training']:,}",
            f"{tokens['forward'] / 1e6:.2f} + {tokens['backward'] / 1e6:.2f}",
            f"{sum(seconds.values()):.1f}",
        )
    return table
