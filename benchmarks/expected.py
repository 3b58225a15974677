"""Tables of benchmarks/studies/expected.yaml: GRPO with rollouts, by its expected gradient, and supervised training.

python benchmarks/expected.py --from runs/expected --alone runs/expected-alone --tuning runs/tuning-expected
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from data_efficiency import RESULTS, STUDIES, at_equal_cost, chosen_gains, interval, user_bootstrap
from measuring import versions

from minirec_pl.cli.compare.comparison import cell, chosen_points, with_all_windows
from minirec_pl.cli.compare.intervals import paired_interval, t_interval
from minirec_pl.cli.compare.results import tidy, write_tidy
from minirec_pl.cli.compare.study import Study
from minirec_pl.cli.compare.tasks import CELLS, cell_path

TRAINING = ("sample", "expected", "sft")
SAMPLES = ("full", "random", "gaussian", "update")
WARM = "warm_start"
KEYS = ["dataset", "window", "method", "setting", "budget", "seed", "epoch", "split"]
SHARES = (0.1, 0.25, 1.0)


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="folder", required=True, type=Path, metavar="DIR", help="--to of the study")
    parser.add_argument("--alone", required=True, type=Path, metavar="DIR", help="--to of the cells that ran alone")
    parser.add_argument("--tuning", required=True, type=Path, metavar="DIR", help="--to of tuning_expected.yaml")
    parser.add_argument("--to", type=Path, default=RESULTS, metavar="DIR", help=f"default: {RESULTS}")
    options = parser.parse_args(args)
    study = Study.read(STUDIES / "expected.yaml")
    frame, alone = (pd.read_parquet(folder / "expected.parquet") for folder in (options.folder, options.alone))
    frame = frame.merge(alone[KEYS].assign(seconds_alone=alone["seconds"] - alone["seconds_warm_start"]), how="left")
    lines = _head(frame)
    for (dataset, window), runs in runs_of(frame).groupby(["dataset", "window"], sort=False):
        lines += [f"## {dataset} {window}".rstrip(), "", *table(runs), ""]
    lines += [*_users(study, options.folder), *_equal_cost(frame)]
    lines += _rates(study, tidy(sorted(options.tuning.glob(f"{CELLS}/**/*.safetensors"))))
    options.to.mkdir(parents=True, exist_ok=True)
    write_tidy(frame, options.to / "expected.parquet")
    (options.to / "expected.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _head(frame):
    seeds = ", ".join(map(str, sorted(frame["seed"].unique())))
    cells = frame.groupby(["dataset", "window", "method", "budget", "seed"], observed=True).ngroups
    return [
        "# Rollouts, their expectation, and supervised training",
        "",
        "Of `benchmarks/studies/`, `tuning_expected.yaml` ran with `minirec compare --config FILE --to",
        "runs/tuning-expected --jobs 2`, `expected.yaml` the same way to `runs/expected`, and its first seed once more",
        "with `--only '*/1' --to runs/expected-alone`, a cell at a time. `python benchmarks/expected.py --from",
        "runs/expected --alone runs/expected-alone --tuning runs/tuning-expected` writes this page. The Amazon files",
        "are in `data/amazon-industrial` or where `--path amazon-industrial=DIR` says.",
        "",
        f"{cells} cells, seeds {seeds}. {versions()}.",
        "",
        "All arms of a data set and seed start from the same warm policy and differ in two things. Training: GRPO with",
        "16 rollouts (`sample`), by its expected gradient (`expected`), and supervised on the same samples (`sft`).",
        "Samples: the full pool, or a tenth of it chosen anew for each of four epochs, at random, by MiniRec with its",
        "Gaussian, or by MiniRec with the size of the expected update. The Gaussian is that of the probability that",
        "a group holds a hit, within a gate of 0.02 to 0.95; the update has no gate. MiniRec scores the whole pool",
        "before an epoch.",
        "The epoch, the warm start as epoch 0 among them, is chosen on validation. NDCG@10 is that of test, the whole",
        "catalogue ranked. [ ] are 95 % intervals over seeds, differences paired by seed. Tokens (forward and",
        "backward), rollouts and seconds are those of the whole run after its warm start, scoring and selection",
        "included, evaluation not; seconds are of seed 1, whose cells ran alone. `minus sft` and `minus sample`",
        "compare with the same samples, the columns after them with the same training.",
        "The window `all` is the mean of the windows of a seed.",
        "",
    ]


def runs_of(frame):
    """One row per run at the epoch chosen on validation, the warm start of each seed among them, by arm."""
    first = frame[(frame["epoch"] == 0) & (frame["method"] == "sample_full")].assign(method=WARM)
    whole = frame.astype({"method": str})
    whole = pd.concat([whole, first.astype({"method": str})], ignore_index=True)
    runs = chosen_points(whole)
    last = whole[whole["split"] == "test"].groupby(["dataset", "window", "method", "seed"], observed=True)
    spent = last[["seconds_alone", "rollouts", "tokens", "tokens_warm_start"]].max()
    spent["tokens_after"] = spent["tokens"] - spent["tokens_warm_start"]
    spent["rollouts_total"] = spent["rollouts"]
    columns = ["seconds_alone", "tokens_after", "rollouts_total"]
    runs = runs.merge(spent[columns].reset_index().astype({"dataset": str, "window": str, "method": str}))
    return with_all_windows(runs)


def difference(runs, arm, rival):
    """NDCG@10 of an arm minus that of another, paired by seed."""
    own, other = (runs[runs["method"] == name].set_index("seed")["test"].sort_index() for name in (arm, rival))
    if arm == rival or not len(own) or not own.index.equals(other.index):
        return t_interval([])
    return paired_interval(own.to_numpy(), other.to_numpy())


def table(runs):
    """The arms of one data set."""
    titles = ["NDCG@10", "minus warm start", "minus sft", "minus sample", "minus full", "minus random"]
    titles += ["minus Gaussian", "k tokens", "rollouts", "s"]
    lines = ["| samples | training | " + " | ".join(titles) + " |", "| --- | --- " + "| ---: " * len(titles) + "|"]
    for samples, training in [("", "warm start"), *((s, t) for s in SAMPLES for t in TRAINING)]:
        arm = f"{training}_{samples}" if samples else WARM
        own = runs[runs["method"] == arm]
        rivals = [WARM, f"sft_{samples}", f"sample_{samples}"]
        rivals += [f"{training}_full", f"{training}_random", f"{training}_gaussian" if samples == "update" else ""]
        shown = [cell(t_interval(own["test"].to_numpy()))]
        shown += [cell(difference(runs, arm, rival), signed=True) for rival in rivals]
        shown += [f"{own['tokens_after'].mean() / 1e3:,.0f}", f"{own['rollouts_total'].mean():,.0f}"]
        shown += [f"{own['seconds_alone'].mean():.1f}"]
        lines.append(f"| {samples} | {training} | {' | '.join(shown)} |")
    return lines


def _users(study, folder):
    """The main differences with users as the unit of resampling."""
    pairs = [(f"expected_{s}", f"{t}_{s}") for t in ("sample", "sft") for s in SAMPLES]
    pairs += [(f"{t}_update", f"{t}_gaussian") for t in TRAINING]
    pairs += [(f"{t}_{s}", f"{t}_random") for t in TRAINING for s in ("gaussian", "update")]
    found = {}
    for one in study.cells():
        path = cell_path(folder, one)
        if path.is_file():
            found.setdefault(one.data.label, {}).setdefault(one.method.name, []).append(chosen_gains(path))
    lines = [
        "## Users as the unit",
        "",
        "Users are drawn anew 2,000 times, each with all test samples; gains are averaged over seeds first.",
        "",
        f"| difference | {' | '.join(found).replace('/', ' ')} |",
        "| --- " + "| ---: " * len(found) + "|",
    ]
    for arm, rival in pairs:
        shown = []
        for methods in found.values():
            own, other = (np.stack([gains for gains, _ in methods[name]]) for name in (arm, rival))
            shown.append(cell(user_bootstrap(own, other, methods[arm][0][1]), signed=True))
        lines.append(f"| {arm} - {rival} | {' | '.join(shown)} |")
    return [*lines, ""]


def _equal_cost(frame):
    lines = ["## At equal tokens", "", "Shares of the tokens that `sample_full` spends after the warm start, linear"]
    lines += ["between the evaluation points of a run; – where not all seeds cover it.", ""]
    for (dataset, window), part in frame.groupby(["dataset", "window"], observed=True, sort=False):
        spent = part[part["method"] == "sample_full"].groupby("seed")["tokens"].agg(["min", "max"]).mean()
        budgets = [spent["min"] + share * (spent["max"] - spent["min"]) for share in SHARES]
        made, n_seeds = at_equal_cost(part, "tokens", budgets), part["seed"].nunique()
        titles = (f"{share:.0%}: {budget / 1e3:,.0f} k" for share, budget in zip(SHARES, budgets, strict=True))
        lines += [f"### {dataset} {window}".rstrip(), "", "| arm | " + " | ".join(titles) + " |"]
        lines += ["| --- " + "| ---: " * len(SHARES) + "|"]
        for samples in SAMPLES:
            for training in TRAINING:
                rows = made[made["method"] == f"{training}_{samples}"].set_index("spent")
                whole = [b for b in budgets if b in rows.index and rows.loc[b, "figure_n"] == n_seeds]
                shown = [cell(interval(rows.loc[b], "figure")) if b in whole else "–" for b in budgets]
                lines.append(f"| {training}_{samples} | {' | '.join(shown)} |")
        lines.append("")
    return lines


def _rates(study, frame):
    """What the learning rates were chosen by."""
    runs = chosen_points(frame)
    settings = sorted(runs["setting"].unique(), key=lambda name: float(name.removeprefix("lr")))
    lines = [
        "## Learning rates",
        "",
        "NDCG@10 on validation, mean over two seeds that the study does not use. The rates",
    ]
    lines += ["of one window of MovieLens-100K serve for all.", ""]
    lines += [
        "| data | arm | " + " | ".join(settings) + " | used |",
        "| --- | --- " + "| ---: " * (len(settings) + 1) + "|",
    ]
    at_edge = 0
    for (dataset, window), part in runs.groupby(["dataset", "window"], sort=False):
        means = part.groupby(["method", "setting"])["validation"].mean()
        for method in study.methods:
            shown = (f"{means[method.name, name]:.4f}" if (method.name, name) in means else "–" for name in settings)
            where = " ".join(filter(None, (dataset, window)))
            used = method.per_dataset[dataset]["model.optimizer.lr"]
            at_edge += used in (float(settings[0].removeprefix("lr")), float(settings[-1].removeprefix("lr")))
            lines.append(f"| {where} | {method.name} | {' | '.join(shown)} | {used:g} |")
    return [*lines, "", f"{at_edge} of the rates used are at an end of the grid: a wider one could be better.", ""]


if __name__ == "__main__":
    main()
