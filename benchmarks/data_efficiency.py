"""Tables, picture and raw table of a study that `minirec compare` has run.

python benchmarks/data_efficiency.py --from runs/study
"""

from __future__ import annotations

import argparse
import shutil
from itertools import cycle
from pathlib import Path

import numpy as np
import pandas as pd
from measuring import versions

from minirec_pl.cli.compare.comparison import ARM, FIGURE, cell, comparison, interval_columns
from minirec_pl.cli.compare.intervals import LEVEL, Interval, t_interval
from minirec_pl.cli.compare.results import read_cell
from minirec_pl.cli.compare.study import Study
from minirec_pl.cli.compare.tasks import cell_path
from minirec_pl.metrics.evaluation import gains

STUDIES = Path(__file__).resolve().parent / "studies"
RESULTS = Path(__file__).resolve().parent / "results"
HEADLINE = (("minirec_lean", 0.05), ("minirec_lean", 0.1), ("minirec_dynamic", 0.1), ("random_redraw", 0.1))
USERS_AT = 0.1
REFERENCES = ("random_redraw", "full")
SHARES = (0.1, 0.25, 0.5, 1.0)
# Okabe and Ito's colours, told apart by every common colour blindness; grey for those in the background.
STYLES = {
    "full": ("#000000", "*"),
    "random_redraw": ("#0072B2", "o"),
    "random": ("#56B4E9", "s"),
    "minirec_dynamic": ("#D55E00", "^"),
    "minirec_lean": ("#009E73", "P"),
    "minirec_paper": ("#E69F00", "v"),
    "minirec_official": ("#CC79A7", "D"),
}


def main(args=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="folder", required=True, type=Path, metavar="DIR", help="--to of the study")
    parser.add_argument("--study", type=Path, default=STUDIES / "data_efficiency.yaml", help="YAML file of the study")
    parser.add_argument("--ablations", type=Path, default=STUDIES / "ablations.yaml", help="that of its ablations")
    parser.add_argument("--to", type=Path, default=RESULTS, metavar="DIR", help=f"default: {RESULTS}")
    options = parser.parse_args(args)
    options.to.mkdir(parents=True, exist_ok=True)
    study = Study.read(options.study)
    frame = pd.read_parquet(options.folder / f"{options.study.stem}.parquet")
    lines = [*_head(study, frame), *_headline(frame), *_users(study, frame, options.folder), *_by_budget(frame)]
    lines += [*_equal_cost(frame, "tokens", "M tokens", 1e6), *_equal_cost(frame, "seconds", "seconds", 1.0)]
    ablations = options.folder / f"{options.ablations.stem}.parquet"
    if ablations.is_file():
        lines += _ablations(Study.read(options.ablations), pd.read_parquet(ablations))
        shutil.copyfile(ablations, options.to / ablations.name)
    draw(frame, options.to / "data_efficiency.png")
    shutil.copyfile(options.folder / f"{options.study.stem}.parquet", options.to / "data_efficiency.parquet")
    (options.to / "data_efficiency.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _head(study, frame):
    seeds = ", ".join(map(str, sorted(frame["seed"].unique())))
    cells = frame[frame["epoch"] == 0].groupby(
        ["dataset", "window", "method", "setting", "budget", "seed"], observed=True
    )
    return [
        "# Quality against cost of selection methods",
        "",
        f"`minirec compare --config benchmarks/studies/{study.path.name} --to runs/study --jobs 2`, with",
        "the Amazon files in `data/amazon-industrial` or where `--path amazon-industrial=DIR` says, then",
        "`python benchmarks/data_efficiency.py --from runs/study` writes this page. One cell again:",
        f"`minirec compare --config benchmarks/studies/{study.path.name} --to DIR --cell ID`.",
        "",
        f"{cells.ngroups} cells, seeds {seeds}. {versions()}.",
        "",
        "All methods of a data set and seed start from the same warm policy. A cell is evaluated before training and",
        "after each epoch; the epoch is chosen on validation and NDCG@10 reported on test, the whole catalogue ranked.",
        "Tokens (forward and backward) and seconds include warm start, scoring, selection and training, and leave",
        "evaluation out; the headline and the picture count the whole run. [ ] are 95 % intervals over seeds;",
        "differences are paired by seed. The window `all` is the mean of the windows of a seed.",
        "",
        "![NDCG@10 over tokens](data_efficiency.png)",
        "",
    ]


def headline_row(row, full):
    """The row of the headline table of one arm, from its row of `comparison` and that of the full pool."""
    where = " ".join(filter(None, (row["dataset"], row["window"])))
    values = [interval(row, "figure"), *(interval(row, f"minus_{name}") for name in REFERENCES)]
    shown = [cell(values[0]), *(cell(value, signed=True) for value in values[1:])]
    own, whole = (one["tokens_total"] - one["tokens_warm_start"] for one in (row, full))
    spent = f"{own / 1e3:,.0f} ({own / whole:.0%} of full)"
    return f"| {where} | {row['method']} | {row['budget']:.1%} | {' | '.join(shown)} | {spent} |"


def _headline(frame):
    compared = comparison(frame, REFERENCES)
    lines = [
        "## Headline",
        "",
        "| data | method | budget | NDCG@10 | minus random_redraw | minus full | k tokens after the warm start |",
        "| --- | --- " + "| ---: " * 5 + "|",
    ]
    for _, part in compared.groupby(["dataset", "window"], sort=False):
        full = part[part["method"] == "full"]
        for method, budget in HEADLINE:
            rows = part[(part["method"] == method) & np.isclose(part["budget"], budget)]
            lines += [headline_row(row, full.iloc[0]) for row in rows.to_dict("records") if len(full)]
    return [*lines, ""]


def _users(study, frame, folder):
    """Differences at the headline's budget with users as the unit of resampling."""
    lines = [
        f"## Users as the unit: differences at a budget of {USERS_AT:.0%}",
        "",
        "Users are drawn anew 2,000 times, each with all test samples; gains are averaged over seeds first.",
        "",
        "| data | users | method | minus random_redraw | minus full |",
        "| --- | ---: | --- | ---: | ---: |",
    ]
    cells = {}
    for one in study.cells():
        path = cell_path(folder, one)
        if path.is_file() and (one.budget == USERS_AT or not one.method.takes_budget):
            cells.setdefault(one.data.label, {}).setdefault(one.method.name, {})[one.seed] = chosen_gains(path)
    for label, methods in cells.items():
        for method, runs in methods.items():
            found = [_user_interval(runs, methods.get(name, {})) for name in REFERENCES if name != method]
            if method in REFERENCES or not any(found):
                continue
            users = len(np.unique(next(iter(runs.values()))[1]))
            shown = (cell(value, signed=True) if value else "–" for value in found)
            lines.append(f"| {label.replace('/', ' ')} | {users} | {method} | {' | '.join(shown)} |")
    return [*lines, ""]


def _user_interval(runs, rivals):
    seeds = sorted(runs.keys() & rivals.keys())
    if not seeds:
        return None
    own, other = (np.stack([part[seed][0] for seed in seeds]) for part in (runs, rivals))
    return user_bootstrap(own, other, runs[seeds[0]][1])


def _by_budget(frame):
    compared = comparison(frame, ("random_redraw",))
    lines = ["<!-- --8<-- [start:budgets] -->", "## Every method and budget", ""]
    for (dataset, window), part in compared.groupby(["dataset", "window"], sort=False):
        budgets = sorted(part.loc[part["method"] != "full", "budget"].unique())
        full = part[part["method"] == "full"]
        said = f"; full: {cell(interval(full.iloc[0], 'figure'))}" if len(full) else ""
        lines += [
            f"### {dataset} {window}".rstrip() + said,
            "",
            "NDCG@10, and below it the difference to random_redraw.",
            "",
        ]
        lines += ["| method | " + " | ".join(f"{budget:.1%}" for budget in budgets) + " |"]
        lines += ["| --- " + "| ---: " * len(budgets) + "|"]
        for method, rows in part[part["method"] != "full"].groupby("method", sort=False):
            by_budget = rows.set_index("budget")
            lines.append(_line(method, [by_budget.loc[b] if b in by_budget.index else None for b in budgets]))
        lines.append("")
    return [*lines, "<!-- --8<-- [end:budgets] -->", ""]


def _line(method, rows):
    def shown(row):
        if row is None:
            return "–"
        minus = interval(row, "minus_random_redraw")
        return cell(interval(row, "figure")) + (f"<br>{cell(minus, signed=True)}" if minus.n else "")

    return f"| {method} | " + " | ".join(map(shown, rows)) + " |"


def _equal_cost(frame, cost, unit, scale):
    """NDCG@10 where every run had spent as much as the full pool's after its warm start, times a share."""
    lines = [f"## At equal {cost}", "", f"Shares of the {cost} that the full pool spends after the warm start; the", ""]
    lines[-2] += " budget of a method at each is chosen on validation; – where no run's evaluation points cover it."
    full = frame[frame["method"] == "full"]
    if not len(full):
        return []
    for (dataset, window), part in frame.groupby(["dataset", "window"], observed=True, sort=False):
        own = full[(full["dataset"] == dataset) & (full["window"] == window)]
        spent = own.groupby("seed")[cost].agg(["min", "max"]).mean()
        budgets = [spent["min"] + share * (spent["max"] - spent["min"]) for share in SHARES]
        found, guide = (at_equal_cost(rows, cost, budgets) for rows in (part, part[part["split"] == "validation"]))
        if not len(found):
            continue
        lines += [f"### {dataset} {window}".rstrip(), ""]
        titles = (f"{share:.0%}: {budget / scale:,.3g} {unit}" for share, budget in zip(SHARES, budgets, strict=True))
        lines += ["| method | " + " | ".join(titles) + " |", "| --- " + "| ---: " * len(SHARES) + "|"]
        for method, rows in found.groupby("method", sort=False):
            guides = guide[guide["method"] == method]
            best = [_chosen(*(of[of["spent"] == budget] for of in (rows, guides))) for budget in budgets]
            lines.append(f"| {method} | " + " | ".join(best) + " |")
        lines.append("")
    return lines


def _chosen(rows, guides):
    """The arm whose budget has the best validation figure, by the mean of its seeds."""
    if not len(rows):
        return "–"
    row = rows[rows["budget"] == guides.loc[guides["figure"].idxmax(), "budget"]].iloc[0]
    return f"{cell(interval(row, 'figure'))} ({row['budget']:.1%}, n={int(row['figure_n'])})"


def _ablations(study, frame):
    compared = comparison(frame, study.references)
    lines = [f"## Ablations at a budget of {study.methods[0].budgets[0]:.0%}", ""]
    for (dataset, window), part in compared.groupby(["dataset", "window"], sort=False):
        lines += [f"### {dataset} {window}".rstrip(), ""]
        lines += ["| method | NDCG@10 | " + " | ".join(f"minus {name}" for name in study.references) + " |"]
        lines += ["| --- " + "| ---: " * (1 + len(study.references)) + "|"]
        for row in part.to_dict("records"):
            minus = (cell(interval(row, f"minus_{name}"), signed=True) for name in study.references)
            lines.append(f"| {row['method']} | {cell(interval(row, 'figure'))} | {' | '.join(minus)} |")
        lines.append("")
    return lines


def interval(row, name):
    return Interval(row[name], row[f"{name}_low"], row[f"{name}_high"], int(row[f"{name}_n"]))


def draw(frame, path):
    """NDCG@10 at the chosen epoch over what the run spent after its warm start, a panel per data set."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    compared = comparison(frame, ())
    compared = compared[~((compared["window"] != "all") & compared["dataset"].isin(_several(compared)))]
    panels = list(compared.groupby(["dataset", "window"], sort=False))
    figure = Figure(figsize=(5.2 * len(panels), 4.2), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(panels)))
    others = dict(zip(sorted(set(compared["method"]) - STYLES.keys()), cycle("<>hpXd"), strict=False))
    for place, ((dataset, window), part) in zip(axes, panels, strict=True):
        for method, rows in sorted(part.groupby("method"), key=lambda item: item[0] in STYLES):
            rows = rows.sort_values("budget")
            colour, marker = STYLES.get(method) or ("0.55", others[method])
            spent = (rows["tokens_total"] - rows["tokens_warm_start"]) / 1e3
            error = (rows["figure_high"] - rows["figure"]).fillna(0.0) if method in STYLES else None
            front = 3 if method in STYLES else 1
            place.errorbar(spent, rows["figure"], error, color=colour, marker=marker, markersize=6, capsize=2, lw=1.2,
                           label=method, zorder=front)  # fmt: skip
        place.set(xscale="log", xlabel="thousand tokens after the warm start, scoring included")
        place.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        place.xaxis.set_major_formatter(StrMethodFormatter("{x:,.5g}"))
        place.xaxis.set_minor_formatter(NullFormatter())
        place.set_title(
            f"{dataset}, mean of its windows" if window == "all" else f"{dataset} {window}".rstrip(), loc="left"
        )
        place.grid(color="0.92")
        place.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("NDCG@10 on test (95 % over seeds)")
    axes[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=160, format="png")


def _several(compared):
    return [name for name, part in compared.groupby("dataset") if part["window"].nunique() > 1]


def quality_at(cost: np.ndarray, quality: np.ndarray, budgets: np.ndarray) -> np.ndarray:
    """Interpolates the quality of a run when it had spent a budget, linearly between its evaluation points; else NaN.

    Args:
        cost: tokens or seconds at each evaluation point, [p], never decreasing.
        quality: at each, [p].
        budgets: [b].

    Returns:
        [b].

    Example:
        >>> quality_at(np.array([0.0, 10.0]), np.array([0.0, 1.0]), [5.0, 11.0]).tolist()
        [0.5, nan]
    """
    return np.interp(budgets, cost, quality, left=np.nan, right=np.nan)


def user_bootstrap(
    values: np.ndarray,
    reference: np.ndarray,
    users: np.ndarray,
    *,
    draws: int = 2000,
    seed: int = 0,
    level: float = LEVEL,
) -> Interval:
    """Computes the difference of two means over samples, with the percentile interval of drawing users anew.

    A user's samples are not independent, so users are drawn with replacement, each with all samples, and the mean over
    samples is taken again. Values of several seeds are averaged first: their samples and users are the same.

    Args:
        values: gains, [n] or [seeds, n].
        reference: gains of the same samples, of the same shape.
        users: [n], the user of each sample.
        draws: of the bootstrap.
        seed: of the draws.
        level: of the interval.

    Returns:
        The difference, its interval, and the number of users.
    """
    difference = np.asarray(values, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    if difference.ndim == 2:
        difference = difference.mean(axis=0)
    user, n_users = np.unique(users, return_inverse=True)[1], len(np.unique(users))
    sums = np.bincount(user, weights=difference, minlength=n_users)
    counts = np.bincount(user, minlength=n_users)
    weights = np.random.default_rng(seed).multinomial(n_users, np.full(n_users, 1 / n_users), size=draws)
    drawn = (weights @ sums) / (weights @ counts)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(difference.mean()), float(low), float(high), n_users)


def at_equal_cost(frame: pd.DataFrame, cost: str, budgets: list[float]) -> pd.DataFrame:
    """Computes the test NDCG@10 of every arm when its runs had spent the same, linear between evaluation points.

    Args:
        frame: tidy table.
        cost: `tokens` or `seconds`.
        budgets: what was spent, the warm start included.

    Returns:
        A row per data set, window, method, setting, budget and `spent`: `figure`, `figure_low`, `figure_high`, over the
        seeds whose runs cover it. Outside a run's evaluation points nothing is said.
    """
    test = frame[frame["split"] == ("test" if (frame["split"] == "test").any() else "validation")]
    rows = []
    for arm, part in test.groupby(ARM, sort=False, observed=True):
        runs = [run.sort_values("epoch") for _, run in part.groupby("seed")]
        quality = np.array(
            [quality_at(run[cost].to_numpy(float), run[FIGURE].to_numpy(float), budgets) for run in runs]
        )
        for place, spent in enumerate(budgets):
            if not np.isnan(quality[:, place]).all():
                row = dict(zip(ARM, arm, strict=True)) | {"spent": spent}
                rows.append(row | interval_columns("figure", t_interval(quality[:, place])))
    return pd.DataFrame(rows)


def chosen_gains(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Computes NDCG@10 of each test sample where validation NDCG@10 is best, and looks up the sample's user.

    Args:
        path: of a cell that was evaluated on test.

    Returns:
        float64 [n] and int64 [n].
    """
    content, _ = read_cell(path)
    best = int(gains(content["validation_ranks"]).mean(axis=1).argmax())
    return gains(content["test_ranks"][best]), content["test_users"].long().numpy()


if __name__ == "__main__":
    main()
