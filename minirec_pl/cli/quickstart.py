"""`minirec quickstart`: the shipped configs run one after the other, and the table of what they gained and cost."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from minirec_pl.cli.fit import run
from minirec_pl.data.datamodule import RecDataModule
from minirec_pl.metrics.evaluation import FIGURES, popularity_row
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.files import write_json

RUNS: dict[str, list[str]] = {
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
    "grpo_minirec": [],
}
SEEDED = {"grpo_random": "--selection.selector.seed", "grpo_minirec": "--selection.curriculum.seed"}
SHOWN = (*FIGURES, *(f"{name}_se_users" for name in FIGURES))
PIPE_WIDTH = 120
Row = dict[str, Any]


def quickstart(data: Path, to: Path, configs: Path, seed: int) -> None:
    """Warm start once, GRPO from it on the full pool, on a random part and on MiniRec's part; tests and prints all.

    Writes `results.json`, the rows of the printed table, and a folder per run.

    Args:
        data: folder that holds `ml-100k/`.
        to: folder for the runs.
        configs: folder with `warm-start.yaml` and `quickstart.yaml`.
        seed: seed of every run.

    Raises:
        InputError: if a config or the data is missing, or a run fails for a reason the user can mend.
    """
    files = {name: configs / f"{name}.yaml" for name in ("warm-start", "quickstart")}
    for path in files.values():
        if not path.is_file():
            raise InputError(
                f"there is no '{path}': run this in the project's folder, or name its configs with --configs DIR"
            )
    common = [f"--data.path={data}", f"--data.seed={seed}", f"--seed_everything={seed}"]
    warm_root = to / "warm_start"
    warm = ["fit", "--config", str(files["warm-start"]), *common, f"--trainer.default_root_dir={warm_root}"]
    warm_row, warm_data = _fit_and_test("warm_start", warm)
    popularity = popularity_row(warm_data)
    kept = {name: popularity[name] for name in (*SHOWN, "rollouts", "tokens", "seconds")}
    rows = [{"method": "popularity", **kept, "samples_per_epoch": 0, "distinct_samples": 0}, warm_row]
    policy = f"--model.policy.pretrained={warm_root / 'latest' / 'policy'}"
    for method, overrides in RUNS.items():
        root = f"--trainer.default_root_dir={to / method}"
        arguments = ["fit", "--config", str(files["quickstart"]), *common, policy, root, *overrides]
        if method in SEEDED:
            arguments.append(f"{SEEDED[method]}={seed}")
        rows.append(_fit_and_test(method, arguments)[0])
    write_json(to / "results.json", {"rows": rows})
    console = Console() if Console().is_terminal else Console(width=PIPE_WIDTH)
    console.print(table_of(rows))
    console.print(
        "Test part of MovieLens-100K, the whole catalogue ranked. Tokens and seconds include the warm start, scoring "
        "and selection; evaluation is not counted.",
        style="dim",
    )
    print(f"table:   {to / 'results.json'}")
    print(f"picture: {to / 'grpo_minirec' / 'latest' / 'curriculum.png'}")


def _fit_and_test(method: str, arguments: list[str]) -> tuple[Row, RecDataModule]:
    _say(arguments)
    fitted = run(arguments)
    fit = json.loads((fitted.run_dir / "results.json").read_text(encoding="utf-8"))
    test_arguments = ["test", "--ckpt_path", str(fit["best_checkpoint"])]
    _say(test_arguments)
    tested = run(test_arguments)
    test = json.loads((tested.run_dir / "results.json").read_text(encoding="utf-8"))
    costs = ("samples_per_epoch", "distinct_samples", "rollouts", "tokens", "seconds")
    row = {"method": method, **{name: test[name] for name in SHOWN}, **{name: fit[name] for name in costs}}
    return row, fitted.datamodule


def _say(arguments: list[str]) -> None:
    print(f"\n$ minirec {shlex.join(arguments)}", flush=True)


def table_of(rows: list[Row]) -> Table:
    """The rows of `results.json` as a table for the terminal."""
    table = Table(title="MovieLens-100K quickstart")
    columns = ("method", "HR@10", "NDCG@10", "samples an epoch", "distinct", "rollouts scoring + training")
    for column in (*columns, "tokens forward + backward", "seconds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        rollouts, tokens, seconds = row["rollouts"], row["tokens"], row["seconds"]
        table.add_row(
            row["method"],
            f"{row['hit_rate@10']:.4f}",
            f"{row['ndcg@10']:.4f}",
            f"{row['samples_per_epoch']:,}",
            f"{row['distinct_samples']:,}",
            f"{rollouts['scoring']:,} + {rollouts['training']:,}",
            f"{tokens['forward'] / 1e6:.2f} M + {tokens['backward'] / 1e6:.2f} M",
            f"{sum(seconds.values()):.1f}",
        )
    return table
