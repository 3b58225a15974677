"""`minirec select`: from a file of signals to a subset, its order and what to know about it. No model, no GPU."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from rich.markup import escape
from rich.table import Table

from minirec_pl.cli.arguments import without_types
from minirec_pl.cli.terminal import CommandParser, console
from minirec_pl.selection.budget import budget_count, check_budget
from minirec_pl.selection.curriculum import default_folds, fold_curriculum, fold_starts
from minirec_pl.selection.diagnostics import Diagnostics, diagnose, easiness_of
from minirec_pl.selection.ledger import SelectionLedger
from minirec_pl.selection.remedies import Situation, Source
from minirec_pl.selection.selectors.checked import check_selector, pick
from minirec_pl.selection.selectors.picks import outcomes
from minirec_pl.selection.selectors.protocol import Selector, goes_by_outcomes
from minirec_pl.selection.signal_sources import read_signals
from minirec_pl.selection.signals import Signals
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.files import write_json
from minirec_pl.utils.seeds import check_seed

PACKAGE = "minirec_pl.selection"
SAMPLES = "samples.parquet"  # as `minirec score` leaves it beside the signals
LEDGER = "ledger.parquet"


def parser() -> CommandParser:
    """Makes the parser of `minirec select`."""
    made = CommandParser(
        prog="minirec select",
        description="Picks a subset from the signals of a pool and orders it from easy to hard. Writes ledger.parquet "
        "(every sample's terms, rank and reason), selected.npy and .txt (sample_ids, best first), plan.npy, .txt and "
        ".parquet (sample_ids in training order), diagnostics.json and selection.png.",
    )
    made.add_argument("signals", nargs="+", help="signals.safetensors (several shards are merged), .parquet or .jsonl")
    made.add_argument("--embeddings", default=None, help=".npy [N, D], rows by ascending sample_id or by --ids")
    made.add_argument("--gradients", default=None, help=".npy [N, D], rows as of --embeddings")
    made.add_argument("--ids", default=None, help=".npy or text: the sample_id of each row of the .npy arrays")
    made.add_argument(
        "--samples", default=None, help="parquet or CSV with sample_id and user_id, item_id, ...: states their coverage"
    )
    made.add_argument("--budget", type=int | float, default=0.1, help="fraction (0.1) or number (1024) of samples")
    selector = made.add_argument(
        "--selector",
        type=Selector,
        default={"class_path": f"{PACKAGE}.MiniRecSelector"},
        help="a class of minirec_pl.selection such as RandomSelector, or any dotted path; its options follow as "
        f"--selector.NAME, listed by --selector.help {PACKAGE}.MiniRecSelector",
    )
    without_types(selector)
    made.add_argument("--mode", choices=["paper", "official"], help="short for --selector.mode, of MiniRecSelector")
    made.add_argument("--folds", type=int | None, default=None, help="easy-to-hard stretches; one per 64 samples")
    made.add_argument("--seed", type=int, default=42, help="seed of the shuffle into folds")
    made.add_argument("--to", default="selection", help="folder to write")
    return made


def run(arguments: Sequence[str]) -> None:
    """Runs `minirec select` on the words that follow it."""
    words = [_short(word, before) for word, before in zip(arguments, ["", *arguments], strict=False)]
    made = parser()
    config = made.parse_args(words)
    selector = check_selector(made.instantiate_classes(config).selector)
    check_budget(config.budget)
    check_seed(config.seed, "--seed")
    paths = [Path(path) for path in config.signals]
    vectors = {name: _path(config[name]) for name in ("embeddings", "gradients", "ids")}
    found = read_signals(paths, **vectors)
    _check_outcomes(selector, found.signals, paths)
    samples = _read_samples(_path(config.samples), paths)
    ledger, warned = _select(selector, found.signals, budget_count(config.budget, len(found.signals)))
    ledger.fingerprints = found.fingerprints
    plan = plan_table(ledger, config.folds, config.seed)
    source: Source = "store" if paths[0].suffix == ".safetensors" else "table"
    diagnostics = diagnose(ledger, samples, Situation(found.signals, source))
    diagnostics.warnings = [*warned, *diagnostics.warnings]
    to = Path(config.to)
    write_selection(to, found.signals, ledger, plan, diagnostics)
    _show(diagnostics, ledger, to)


def _check_outcomes(selector: Selector, signals: Signals, paths: Sequence[Path]) -> None:
    """Refuses signals that tell a selector nothing, so that it would pick at random, as it does when a run begins.

    Raises:
        InputError: if the selector goes by the outcomes of training and there are none.
    """
    if not goes_by_outcomes(selector):
        return
    (hits, misses), prior = outcomes(signals, selector), signals.prior_hits
    if not bool((hits + misses).any()) and (prior is None or bool(prior.isnan().all())):
        raise InputError(
            f"{type(selector).__name__} goes by the rollouts met in training, and {paths[0]} holds none: give the "
            "signals.safetensors of a run, or use the selector in one"
        )


def plan_table(ledger: SelectionLedger, n_folds: int | None, seed: int) -> pd.DataFrame:
    """Puts the picks in training order.

    Args:
        ledger: of the selection.
        n_folds: easy-to-hard stretches; None for one per 64 samples.
        seed: of the shuffle into folds.

    Returns:
        A row per pick: position, fold (from 0), sample_id, easiness (see `easiness_of`; an unknown one counts as the
        mean) and measure, what the easiness is.

    Raises:
        InputError: If `n_folds` is not in 1..n.
    """
    ids = ledger.selected()
    easiness = easiness_of(ledger).loc[ids]
    measure = easiness.name if easiness.notna().any() else "unknown"
    easiness = easiness.fillna(easiness.mean() if easiness.notna().any() else 0.0)
    folds = default_folds(len(ids)) if n_folds is None else n_folds
    order = fold_curriculum(ids, easiness.to_numpy(copy=True), folds, seed=seed)
    position = np.arange(len(order))
    fold = np.searchsorted(fold_starts(len(order), folds), position, side="right") - 1
    columns = {"position": position, "fold": fold, "sample_id": order, "easiness": easiness.loc[order].to_numpy()}
    return pd.DataFrame({**columns, "measure": measure})


def write_selection(
    to: Path, signals: Signals, ledger: SelectionLedger, plan: pd.DataFrame, diagnostics: Diagnostics
) -> None:
    """Writes the files of one selection, all of them or none.

    Args:
        to: folder, made if it is missing.
        signals: [N] of the pool, for the picture.
        ledger: of the selection.
        plan: from `plan_table`.
        diagnostics: of the selection.

    Raises:
        InputError: If the folder cannot be written.
    """
    try:
        to.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".select-", dir=to))
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"cannot write to '{to}' ({reason}): choose another folder with --to") from error
    try:
        ledger.to_parquet(scratch / LEDGER)
        for name, ids in (("selected", ledger.selected()), ("plan", plan["sample_id"].tolist())):
            np.save(scratch / f"{name}.npy", np.asarray(ids, dtype=np.int64))
            (scratch / f"{name}.txt").write_text("".join(f"{sample_id}\n" for sample_id in ids), encoding="utf-8")
        plan.to_parquet(scratch / "plan.parquet", index=False)
        write_json(scratch / "diagnostics.json", diagnostics.as_dict())
        _draw(signals, ledger, plan, scratch / "selection.png")
        for path in sorted(scratch.iterdir()):
            os.replace(path, to / path.name)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"cannot write to '{to}' ({reason}): free some space or choose another --to") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _draw(signals: Signals, ledger: SelectionLedger, plan: pd.DataFrame, path: Path) -> None:
    try:
        from minirec_pl.reporting.plots import draw_selection
    except ModuleNotFoundError:
        warnings.warn("selection.png needs matplotlib: pip install 'minirec-pl[report]'", stacklevel=2)
        return
    draw_selection(signals, ledger, plan, path)


def _select(selector: Selector, signals: Signals, k: int) -> tuple[SelectionLedger, list[str]]:
    """The ledger, and what the selector warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        ledger = pick(selector, signals, k)
    return ledger, [str(warning.message) for warning in caught if warning.category is UserWarning]


def _short(word: str, before: str) -> str:
    """`--mode X` as the selector's option, and a selector's bare name as its dotted path."""
    if word == "--mode" or word.startswith("--mode="):
        return "--selector.mode" + word.removeprefix("--mode")
    option, equals, value = word.partition("=")
    if option == "--selector" and equals and "." not in value:
        return f"{option}={PACKAGE}.{value}"
    return f"{PACKAGE}.{word}" if before == "--selector" and "." not in word else word


def _path(value: str | None) -> Path | None:
    return None if value is None else Path(value)


def _read_samples(path: Path | None, signals: Sequence[Path]) -> pd.DataFrame | None:
    """The table of samples, by default what `minirec score` left beside each file of signals."""
    if path is None:
        beside = sorted({file.with_name(SAMPLES) for file in signals})
        if not all(table.is_file() for table in beside):
            return None
        return pd.concat([pd.read_parquet(table) for table in beside]).drop_duplicates("sample_id")
    if not path.is_file():
        raise InputError(f"there is no table of samples at {path}: leave out --samples or give a parquet or CSV file")
    try:
        return pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}): give a parquet or CSV table") from error


def _show(diagnostics: Diagnostics, ledger: SelectionLedger, to: Path) -> None:
    screen = console()
    table = Table(title=f"{diagnostics.n_selected:,} of {diagnostics.n_pool:,} samples")
    table.add_column("what", no_wrap=True)
    table.add_column("value", justify="right")
    for reason, count in ledger.table["reason"].value_counts().items():
        table.add_row(str(reason).replace("_", " "), f"{count:,}")
    table.add_section()
    for text, value in (
        ("picks with a reward or difficulty near zero", diagnostics.share_near_zero),
        ("pool with the same", diagnostics.pool_share_near_zero),
        ("pool with a learnability near zero", diagnostics.learnability_near_zero),
        ("weight of learnability in the score", diagnostics.learnability_weight),
        ("picks decided by novelty", diagnostics.novelty_share),
        *((f"coverage of {name}", share) for name, share in diagnostics.coverage.items()),
    ):
        table.add_row(text, "-" if math.isnan(value) else f"{value:.1%}")
    correlation = diagnostics.correlation
    table.add_row("correlation of L and R", "-" if math.isnan(correlation) else f"{correlation:+.2f}")
    screen.print(table)
    for warning in diagnostics.warnings:
        screen.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True, highlight=False)
    for name in (LEDGER, "plan.txt", "diagnostics.json", "selection.png"):
        print(f"{name.partition('.')[0]}: {to / name}")
