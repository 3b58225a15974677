"""Tables and picture of benchmarks/studies/rollouts*.yaml: selection where rollouts are dear.

python benchmarks/rollouts.py --from runs/rollouts --tuning runs/rollouts-tuning

Cells of the tables that are there already stay in them unless a folder has them anew, so the study may run in pieces.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from data_efficiency import RESULTS, STUDIES, quality_at
from known_files import SAMPLES
from known_kinds import KINDS
from measuring import versions

from minirec_pl.cli.compare.comparison import cell, chosen_points
from minirec_pl.cli.compare.intervals import paired_interval, t_interval
from minirec_pl.cli.compare.results import read_cell, tidy, write_tidy
from minirec_pl.cli.compare.study import Study
from minirec_pl.cli.compare.tasks import CELLS, cell_path

FILES = ("rollouts_known", "rollouts_again", "rollouts")
MOVED, MOVED_FROM = "rollouts_moved", "known-16"
USEFUL = {
    "known-64": "10 %",
    "known-16": "10 %",
    "known-16-again": "10 %",
    "known-16-5": "5 %",
    "known-16-20": "20 %",
    "known-oracle": "10 %",
}
SHARES = (0.1, 0.2, 0.5, 1.0)
AT = 0.2  # of what the full pool spends: where arms are compared
CHEAP = ("supervised", "expected")  # have no rollouts, end early and are then taken as they are
RIVALS = ("random", "random_filter")
REACHING = ("random", "predicted", "predicted_64", "oracle")
NAMES = ["dataset", "window", "method", "setting", "split"]
CELL = ["dataset", "method", "setting", "seed"]
COSTS = {"seconds": ("s", 1.0), "tokens": ("k tokens", 1e3)}
# Okabe and Ito's colours; the same hue without and with the filter.
STYLES = {
    "full": ("#000000", "-"),
    "full_filter": ("#000000", "--"),
    "random": ("#0072B2", "-"),
    "random_filter": ("#0072B2", "--"),
    "greso": ("#56B4E9", "-"),
    "predicted": ("#D55E00", "-"),
    "predicted_filter": ("#D55E00", "--"),
    "predicted_64": ("#E69F00", "-"),
    "minirec_lean": ("#009E73", "-"),
    "supervised": ("0.6", "-"),
    "expected": ("#CC79A7", "-"),
}


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="folder", type=Path, metavar="DIR", help="--to of both studies")
    parser.add_argument("--tuning", type=Path, metavar="DIR", help="--to of their tuning")
    parser.add_argument("--to", type=Path, default=RESULTS, metavar="DIR", help=f"default: {RESULTS}")
    options = parser.parse_args(args)
    options.to.mkdir(parents=True, exist_ok=True)
    studies = [Study.read(STUDIES / f"{name}.yaml") for name in FILES]
    moved = Study.read(STUDIES / f"{MOVED}.yaml")
    often = Study.read(STUDIES / "tuning_rollouts_often.yaml")
    methods = [method.name for study in (studies[2], often, moved) for method in study.methods]
    order = [data.name for study in (*studies, moved) for data in study.data], list(dict.fromkeys(methods))
    known = (*studies[:2], moved)
    picks = pd.concat([_picks(one, options.folder) for one in known]) if options.folder else None
    frame = _together(options.to / "rollouts.parquet", options.folder, order, picks)
    tuning = _together(options.to / "rollouts_tuning.parquet", options.tuning, order, None)
    lines = _head(frame)
    apart = {data.name for data in moved.data}
    shown = frame[~frame["dataset"].isin(apart)]
    for dataset in dict.fromkeys(shown["dataset"]):
        lines += _section(shown[shown["dataset"] == dataset])
    if apart <= set(frame["dataset"]):
        lines += _moved(frame)
    lines += _rates(studies, tuning) + _often(tuning)
    draw(shown, options.to / "rollouts.png")
    (options.to / "rollouts.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _together(path, folder, order, picks):
    """The table at a path with the cells of a folder, which replace those that it has already; written again."""
    new = pd.DataFrame()
    if folder:
        new = after_warm_start(tidy(sorted(folder.glob(f"{CELLS}/**/*.safetensors"))))
        new = new if picks is None else new.merge(picks, how="left")
    if path.is_file():
        old = pd.read_parquet(path).astype(dict.fromkeys(NAMES, str))
        anew = set(map(tuple, new[CELL].to_numpy())) if len(new) else set()
        new = pd.concat([old[[key not in anew for key in map(tuple, old[CELL].to_numpy())]], new], ignore_index=True)
    new = new.sort_values(["setting", "seed", "epoch", "split"], kind="stable")
    for name, known in zip(("method", "dataset"), reversed(order), strict=True):
        new = new.sort_values(name, key=lambda names, known=known: names.map(known.index), kind="stable")
    new = new.reset_index(drop=True)
    write_tidy(new, path)
    return new


def after_warm_start(frame):
    """Costs without those of the warm start, which all arms share; names as text."""
    frame = frame.astype(dict.fromkeys(NAMES, str))
    for cost in COSTS:
        frame[cost] -= frame[f"{cost}_warm_start"]
    return frame


def at_cost(frame, cost, share):
    """Test NDCG@10 of each arm and seed at a share of what `full` spends in all, [seeds] by arm.

    Straight between evaluation points. NaN where a run does not go so far, but for those of `CHEAP`, which end early.
    """
    test = frame[frame["split"] == "test"].sort_values("epoch", kind="stable")
    budgets = share * test[test["method"] == "full"].groupby("seed")[cost].max()
    found = {}
    for method, rows in test.groupby("method", sort=False):
        values = pd.Series(np.nan, index=budgets.index)
        for seed, run in rows.groupby("seed"):
            spent = min(budgets[seed], run[cost].max()) if method in CHEAP else budgets[seed]
            values[seed] = quality_at(run[cost].to_numpy(float), run["ndcg@10"].to_numpy(float), [spent])[0]
        found[method] = values
    return found


def _section(frame):
    """What there is of one data set."""
    dataset = frame["dataset"].iloc[0]
    lines = [f"## {dataset}", ""]
    start = frame[(frame["epoch"] == 0) & (frame["split"] == "test") & (frame["method"] == "random")]["ndcg@10"]
    lines += [f"Warm start: {cell(t_interval(start.to_numpy()))}.", ""]
    for cost, (unit, scale) in COSTS.items():
        lines += _table(frame, cost, unit, scale)
    if "useful" in frame and frame["useful"].notna().any():
        lines += _kinds(frame)
    return lines


def _table(frame, cost, unit, scale):
    whole = frame[(frame["method"] == "full") & (frame["split"] == "test")].groupby("seed")[cost].max()
    points = {share: at_cost(frame, cost, share) for share in SHARES}
    full = points[1.0]["full"]
    rivals = {**{f"minus {name}": points[AT][name] for name in RIVALS}, "minus full at 100%": full}
    if "expected" in points[AT]:
        rivals["minus expected"] = points[AT]["expected"]
    lines = [f"### At equal {cost}: shares of the {whole.mean() / scale:,.0f} {unit} of `full`", ""]
    titles = [f"{share:.0%}" for share in SHARES] + [f"{AT:.0%}: {name}" for name in rivals]
    lines += ["| arm | " + " | ".join(titles) + " |", "| --- " + "| ---: " * len(titles) + "|"]
    for method in points[AT]:
        there = [point[method] for point in points.values()]
        shown = [cell(t_interval(values.to_numpy())) if _all(values) else "–" for values in there]
        own = points[AT][method]
        for name, rival in rivals.items():
            itself = name.removeprefix("minus ") == method or not (_all(own) and _all(rival))
            shown.append("–" if itself else cell(paired_interval(own.to_numpy(), rival.to_numpy()), signed=True))
        lines.append(f"| {method} | {' | '.join(shown)} |")
    return [*lines, ""]


def _all(values):
    return len(values) > 0 and bool(values.notna().all())


def _picks(study, folder):
    """Samples of each kind that an epoch was to train on, a row per cell and epoch of the known pools."""
    rows = []
    for one in study.cells():
        path = cell_path(folder, one)
        if not path.is_file():
            continue
        kinds = pd.read_parquet(Path(one.data.path) / str(one.seed) / "sequences.parquet")["kind"]
        content, _ = read_cell(path)
        for epoch in range(one.method.epochs):
            if f"selected_{epoch}" in content:
                counts = kinds.iloc[content[f"selected_{epoch}"].numpy()].value_counts()
                picked = [int(counts.get(kind, 0)) for kind in KINDS[:-1]]
                rows.append([one.data.name, one.method.name, one.seed, epoch + 1, *picked])
    return pd.DataFrame(rows, columns=["dataset", "method", "seed", "epoch", *KINDS[:-1]])


def _kinds(frame):
    lines = ["### What an epoch was to train on, samples by kind, mean over seeds", ""]
    lines += ["| arm | epoch | " + " | ".join(KINDS[:-1]) + " |", "| --- | ---: " + "| ---: " * 4 + "|"]
    picked = frame[(frame["split"] == "test") & frame["useful"].notna()]
    for method, rows in picked.groupby("method", sort=False):
        for epoch in (1, 2, rows["epoch"].max()):
            means = rows[rows["epoch"] == epoch][list(KINDS[:-1])].mean()
            lines.append(f"| {method} | {epoch} | " + " | ".join(f"{value:.0f}" for value in means) + " |")
    return [*lines, ""]


def reached(run, cost, value):
    """What a run has spent when its quality first reaches a value, between evaluation points as `at_cost`; else NaN."""
    run = run.sort_values("epoch", kind="stable")
    spent, quality = run[cost].to_numpy(float), run["ndcg@10"].to_numpy(float)
    if not (quality >= value).any():
        return np.nan
    first = int(np.argmax(quality >= value))
    before = max(first - 1, 0)
    return float(np.interp(value, quality[before : first + 1], spent[before : first + 1]))


def useful_until(run, spent):
    """Share of the samples trained on that are useful, until so many seconds are spent; NaN where nobody picked."""
    run = run.sort_values("epoch", kind="stable")
    picked = run[list(KINDS[:-1])].fillna(0.0)
    useful, every = picked["useful"].cumsum(), picked.sum(axis=1).cumsum()
    at = [np.interp(spent, run["seconds"].to_numpy(float), counts.to_numpy(float)) for counts in (useful, every)]
    return at[0] / at[1] if at[1] else np.nan


def _moved(frame):
    """What it takes to reach the quality of the full pool, by data set and arm."""
    test = frame[frame["split"] == "test"]
    ends = test[test["method"] == "full"].sort_values("epoch").groupby(["dataset", "seed"]).tail(1)
    ends = ends.set_index(["dataset", "seed"])
    lines = [
        "## What it takes to reach the full pool",
        "",
        "What an arm has spent when it first reaches the quality that `full` has at its end, as a share of what `full`",
        "spends, and how many of the samples that it trained on until then are useful; `full` trains on the pool as",
        f"it is. `oracle` trains on the useful samples of `{MOVED_FROM}`, all of them each epoch, and on nothing else.",
        "Mean over seeds, and each seed; – where a run ends before. Who knows the useful samples needs a twentieth of",
        "what `full` spends. What `predicted` lacks to a fifth is to tell them: its first epoch is drawn at random,",
        "and then a third to a half of what it picks is useful. That fewer or more samples are useful does not bring",
        "it nearer. Picking anew after 64 samples (`predicted_64`) does at a tenth and at a fifth of the seconds.",
        "",
        "| data | useful in the pool | arm | seconds | tokens | useful in what it trained on |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for dataset, share in USEFUL.items():
        runs = test[(test["dataset"] == dataset) & test["method"].isin(REACHING)]
        for method, arm in runs.groupby("method", sort=False):
            figures = {"seconds": [], "tokens": [], "useful": []}
            for seed, run in arm.groupby("seed"):
                end = ends.loc[(MOVED_FROM if method == "oracle" else dataset, seed)]
                spent = {cost: reached(run, cost, end["ndcg@10"]) for cost in COSTS}
                for cost, value in spent.items():
                    figures[cost].append(value / float(end[cost]))
                figures["useful"].append(1.0 if method == "oracle" else useful_until(run, spent["seconds"]))
            shown = " | ".join(_percentages(values) for values in figures.values())
            lines.append(f"| {dataset} | {share} | {method} | {shown} |")
    return [*lines, ""]


def _percentages(values):
    each = ", ".join("–" if np.isnan(value) else f"{value:.0%}" for value in values)
    return f"{'–' if np.isnan(values).any() else f'{np.mean(values):.0%}'} ({each})"


def _head(frame):
    seeds = ", ".join(map(str, sorted(frame["seed"].unique())))
    cells = frame.groupby(["dataset", "method", "seed"]).ngroups
    return [
        "# Selection where rollouts cost something",
        "",
        "`python benchmarks/known_files.py --to data/known` writes the known pools. Of `benchmarks/studies/`,",
        "`tuning_rollouts_known.yaml`, `tuning_rollouts.yaml` and `tuning_rollouts_often.yaml` ran with `minirec",
        "compare --config FILE --to runs/rollouts-tuning`, then `rollouts_known.yaml`, `rollouts.yaml`,",
        "`rollouts_again.yaml` and `rollouts_moved.yaml` (which names its own files) the same way to `runs/rollouts`,",
        "a cell at a time. `python benchmarks/rollouts.py --from runs/rollouts --tuning runs/rollouts-tuning` writes",
        "this page. The Amazon files are in `data/amazon-industrial` or where `--path amazon-industrial-g16=DIR` says.",
        "One cell again: `--cell ID`, such as `--cell known-16/predicted/0.1/1`.",
        "",
        f"{cells} cells, seeds {seeds}. {versions()}.",
        "",
        "Known pools: 2,000 samples, 10 % of them useful, 30 % each solved, redundant and hopeless",
        "(`benchmarks/known_kinds.py`), with completions of 16 and of 64 tokens that hit only as a whole; each seed",
        "has rules, samples and weights of its own. MovieLens-100K (middle window) and Amazon Industrial: pools of",
        "2,000, items of four tokens, 16 and 64 rollouts. All arms of a data set and seed start from the same warm",
        "policy and train at a constant rate; the study says for how many epochs. `full`, `supervised` and `expected`",
        "train on the whole pool, the last two without rollouts; all others on a tenth of it, chosen anew each epoch.",
        "`filter` draws rollouts until a batch is full of mixed groups. `minirec_lean` scores a quarter of the pool",
        "at first and a tenth after each epoch, in the known pools with 4 rollouts. Known pools leave `expected` out:",
        "they stand for completions whose probability of a hit has no closed form. The gate of `predicted`, now the",
        "default, was chosen with the learning rates: on `known-16` NDCG@10 is 0.979 on validation with 0.02 to 0.5,",
        "and 0.928 with 0.05 to 0.95. `known-16-again` is `known-16` with six new seeds, run after the others; there",
        "`predicted_64` picks 64 samples per epoch instead of 200.",
        "",
        "NDCG@10 on test, of beams of 10. Tokens, forward and backward, and seconds are those after the warm start:",
        "decoding, scoring and selection count, evaluation does not. Values between two evaluation points are on the",
        "straight line between them; – where a run ends before. [ ] are 95 % intervals over seeds, differences paired",
        f"by seed. The last columns compare at {AT:.0%} of what `full` spends.",
        "",
        "On MovieLens-100K and Amazon Industrial a saving counts only if the arm is also above `expected` on the full",
        "pool at equal seconds. No selection is shown to be: all intervals of their last column reach zero or lie",
        "below it. So selection pays only where `expected` is refused, for which the known pools stand.",
        "",
        "![NDCG@10 over seconds and tokens](rollouts.png)",
        "",
    ]


def _rates(studies, frame):
    runs = chosen_points(frame)
    runs = runs[runs["setting"] != ""]
    settings = sorted(runs["setting"].unique(), key=lambda name: float(name.removeprefix("lr")))
    lines = ["## Learning rates", "", "NDCG@10 on validation at the best epoch, of a seed that the studies do not use."]
    lines += ["The rate of `random` serves for all arms with rollouts and for `expected`.", ""]
    lines += ["| data | arm | " + " | ".join(settings) + " | used |"]
    lines += ["| --- | --- " + "| ---: " * (len(settings) + 1) + "|"]
    used = {
        (data, method.name): overrides["model.optimizer.lr"]
        for study in studies
        for method in study.methods
        for data, overrides in method.per_dataset.items()
    }
    for (dataset, method), part in runs.groupby(["dataset", "method"], sort=False):
        means = part.groupby("setting")["validation"].mean()
        shown = (f"{means[name]:.4f}" if name in means else "–" for name in settings)
        lines.append(f"| {dataset} | {method} | {' | '.join(shown)} | {used[dataset, method]:g} |")
    return [*lines, ""]


def _often(frame):
    """What it brings to pick fewer samples more often."""
    lines = ["## How often to pick anew", ""]
    lines += [
        "The seed of the learning rates, on validation at the best epoch, with 800 samples trained on in all.",
        "",
    ]
    lines += ["| data | arm | samples per epoch | epochs | NDCG@10 | seconds | of them selection |"]
    lines += ["| --- | --- | ---: | ---: | ---: | ---: | ---: |"]
    frame = frame[frame["setting"] == ""]
    best = chosen_points(frame).set_index(["dataset", "method"])["validation"] if len(frame) else {}
    for (dataset, method), run in frame.groupby(["dataset", "method"], sort=False):
        end = run.loc[run["epoch"].idxmax()]
        picked = f"{SAMPLES * end['budget']:.0f} | {end['epoch']}"
        spent = f"{end['seconds']:.1f} | {end['seconds_selection']:.1f}"
        lines.append(f"| {dataset} | {method} | {picked} | {best[dataset, method]:.4f} | {spent} |")
    return [*lines, ""]


def draw(frame, path):
    """NDCG@10 on test over seconds and over tokens, a row of two panels per data set."""
    from matplotlib.figure import Figure

    datasets = list(dict.fromkeys(frame["dataset"]))
    figure = Figure(figsize=(11, 3.1 * len(datasets)), layout="constrained")
    axes = figure.subplots(len(datasets), 2, squeeze=False)
    for row, dataset in zip(axes, datasets, strict=True):
        test = frame[(frame["dataset"] == dataset) & (frame["split"] == "test")]
        for place, (cost, (unit, scale)) in zip(row, COSTS.items(), strict=True):
            for method, (colour, line) in STYLES.items():
                means = test[test["method"] == method].groupby("epoch")[["ndcg@10", cost]].mean()
                style = {"color": colour, "linestyle": line, "marker": ".", "linewidth": 1.3, "label": method}
                if len(means):
                    place.plot(means[cost] / scale, means["ndcg@10"], **style)
            place.set(xlabel=f"{unit} after the warm start", ylabel="NDCG@10 on test")
            place.set_title(f"{dataset}: {cost}", loc="left")
            place.grid(color="0.92")
            place.spines[["top", "right"]].set_visible(False)
        row[1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=130, format="png")


if __name__ == "__main__":
    main()
