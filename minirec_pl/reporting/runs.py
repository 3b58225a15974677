"""What run folders hold, read for a report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from minirec_pl.metrics.evaluation import FIGURES
from minirec_pl.selection.ledger import SelectionLedger
from minirec_pl.selection.session.run_files import DIAGNOSTICS, EXAMPLES, LEDGER, PLAN, SIGNALS
from minirec_pl.selection.signals import Signals
from minirec_pl.selection.store import SignalStore
from minirec_pl.utils.cost import PHASES
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.run_folder import CONFIG, EVALUATIONS, SIDE_FILE

RESULTS = "results.json"
Row = dict[str, Any]


@dataclass
class Run:
    """One run; a part that it did not leave is None or empty.

    Attributes:
        name: how the report calls it, its folder and that around it.
        folder: where it is.
        method: what trained on which samples, in words.
        rows: of the headline table, as `results.json` has them, each with `label`, `part` (test or validation) and
            `data`, a digest of its samples or None.
        evaluations: a row per validation, see `minirec_pl.callbacks.run_folder.RunFolder`.
        ledger: of the last selection.
        plan: of the last planned epoch, see `minirec_pl.selection.session.run_files.plan_table`.
        signals: of the pool.
        examples: samples in words, indexed by sample_id.
        warnings: of the diagnostics.
        cost: `seconds`, `rollouts`, `tokens_forward` and `tokens_backward` by phase.
        config: YAML.
    """

    name: str
    folder: Path
    method: str = ""
    rows: list[Row] = field(default_factory=list)
    evaluations: pd.DataFrame | None = None
    ledger: SelectionLedger | None = None
    plan: pd.DataFrame | None = None
    signals: Signals | None = None
    examples: pd.DataFrame | None = None
    warnings: list[str] = field(default_factory=list)
    cost: dict[str, dict[str, float]] = field(default_factory=dict)
    config: str | None = None


def read_runs(folders: Sequence[Path]) -> tuple[list[Row], list[Run]]:
    """Reads run folders.

    Args:
        folders: of fits, of a `minirec quickstart`, or with a ledger alone, as `minirec select` or a Trainer of one's
            own leaves it; a folder of runs stands for its `latest`.

    Returns:
        The rows of the headline table, and the runs.

    Raises:
        InputError: if a folder holds none of these, a run has not finished, or a file of it cannot be read.
    """
    rows: list[Row] = []
    runs: list[Run] = []
    for folder in folders:
        latest = folder / "latest"
        place = latest if not (folder / RESULTS).is_file() and latest.is_dir() else folder
        results = _results(place)
        if "rows" in results:
            rows += [{"label": row["method"], "part": "test", **row} for row in results["rows"]]
            methods = [(row["method"], place / row["method"] / "latest") for row in results["rows"]]
            for method, latest in methods:
                if latest.is_dir():
                    resolved = latest.resolve()
                    runs.append(_read(resolved, f"{method}/{resolved.name}", _results(latest)))
        else:
            resolved = place.resolve()
            run = _read(resolved, f"{resolved.parent.name}/{resolved.name}".strip("/"), results)
            rows += run.rows
            runs.append(run)
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = str(run.folder)
    return rows, runs


def _results(folder: Path) -> Row:
    if not folder.is_dir():
        raise InputError(f"there is no run folder '{folder}': give a folder that `minirec fit` or `quickstart` left")
    if not (folder / RESULTS).is_file():
        if (folder / CONFIG).is_file():
            raise InputError(
                f"the run in '{folder}' has not finished ({RESULTS} is missing): let it end, or resume it from its "
                "last checkpoint"
            )
        if (folder / LEDGER).is_file():
            return {}
        raise InputError(f"'{folder}' is not a run folder ({RESULTS} is missing): give one that `minirec fit` left")
    results = _json(folder / RESULTS)
    if "rows" not in results and results.get("stage") != "fit":
        raise InputError(
            f"'{folder}' is a run of `minirec {results.get('stage', '?')}`, which trains nothing: give the folder of a "
            "fit, whose test is found beside it"
        )
    return results


def _json(path: Path) -> Row:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}): copy it again or repeat the run") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged (it is not a mapping): copy it again or repeat the run")
    return content


def _table(path: Path) -> pd.DataFrame | None:
    if not path.is_file():
        return None
    try:
        return pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}): copy it again or repeat the run") from error


def _read(folder: Path, name: str, results: Row) -> Run:
    run = Run(name, folder)
    run.evaluations, run.plan = _table(folder / EVALUATIONS), _table(folder / PLAN)
    examples = _table(folder / EXAMPLES)
    run.examples = None if examples is None else examples.set_index("sample_id")
    if (folder / LEDGER).is_file():
        run.ledger = SelectionLedger.from_parquet(folder / LEDGER)
    if (folder / SIGNALS).is_file():
        run.signals = SignalStore.load(folder / SIGNALS).pool_view(0)
    if (folder / DIAGNOSTICS).is_file():
        run.warnings = _json(folder / DIAGNOSTICS).get("warnings", [])
    if (folder / CONFIG).is_file():
        run.config = (folder / CONFIG).read_text(encoding="utf-8", errors="replace")
        run.method = _method(run.config)
    run.cost = _cost(folder, results)
    run.rows = _rows(run, results)
    return run


def _method(config: str) -> str:
    """What a config trains, in words: "GRPO on picks of MiniRec", "warm start"; empty where it does not say."""
    try:
        parts = yaml.safe_load(config)
        module = _class(parts["model"])
        if module != "GRPORecModule":
            return {"WarmStartModule": "warm start"}.get(module, module)
        selection = parts.get("selection")
        if selection is None:
            return "GRPO on the whole pool"
        options = selection.get("init_args") or {}
        if options.get("ledger"):
            return f"GRPO on {options['ledger']}"
        selector = options.get("selector")
        return f"GRPO on picks of {_class(selector).removesuffix('Selector') if selector else 'MiniRec'}"
    except (yaml.YAMLError, KeyError, TypeError, AttributeError):
        return ""


def _class(part: Row) -> str:
    return str(part["class_path"]).rpartition(".")[2]


def _cost(folder: Path, results: Row) -> dict[str, dict[str, float]]:
    """What a run spent by phase; tokens by phase are kept with its policy."""
    side = folder / "policy" / SIDE_FILE
    spent = _json(side).get("training_cost", {}) if side.is_file() else {}
    cost: dict[str, dict[str, float]] = {}
    for name in ("seconds", "rollouts"):
        if name in results:
            cost[name] = dict(results[name])
    for name in ("tokens_forward", "tokens_backward"):
        if spent.get(name):
            cost[name] = {phase: spent[name].get(phase, 0) for phase in PHASES}
    return cost


def _rows(run: Run, results: Row) -> list[Row]:
    if not results:
        return []
    counts = {
        name: results[name] for name in ("samples_per_epoch", "distinct_samples", "rollouts", "tokens", "seconds")
    }
    if "stages" in results:
        own = {"trained": counts}
        return [
            {**own.get(row["stage"], {}), **row, "label": f"{run.name}: {row['stage']}", **_part("test", results)}
            for row in results["stages"]
        ]
    tested = _test_beside(run.folder, results.get("best_checkpoint"))
    if tested is not None:
        return [{**counts, **tested, "label": run.name, **_part("test", tested)}]
    shown = [*FIGURES, *(f"{name}_se_users" for name in FIGURES)]
    figures = {name: results["validation"][name] for name in shown if name in results["validation"]}
    return [{**counts, **figures, "label": run.name, **_part("validation", results)}]


def _part(name: str, results: Row) -> Row:
    """The part that figures are of, and a digest of its data where the run says."""
    return {"part": name, "data": (results.get("data") or {}).get(name)}


def _test_beside(folder: Path, checkpoint: str | None) -> Row | None:
    """The figures of a `minirec test` of a run's best checkpoint, which has the next folder of the same root."""
    if checkpoint is None:
        return None
    wanted = (folder.name, *Path(checkpoint).parts[-2:])
    for path in sorted(folder.parent.glob(f"*/{RESULTS}")):
        config = path.with_name(CONFIG)
        if path.parent == folder or not config.is_file():
            continue
        results = _json(path)
        if results.get("stage") == "test":
            tested = (yaml.safe_load(config.read_text(encoding="utf-8")) or {}).get("ckpt_path") or ""
            if Path(tested).parts[-3:] == wanted:
                return {name: value for name, value in results.items() if name != "stage"}
    return None
