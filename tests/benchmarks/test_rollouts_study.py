"""The committed study of selection where rollouts are dear says what its raw table holds."""

import re
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import rollouts
from helpers.compare_tools import interval
from helpers.paths import BENCHMARKS

from minirec_pl.cli.compare.results import write_tidy

TABLE, PAGE = (BENCHMARKS / "results" / f"rollouts.{end}" for end in ("parquet", "md"))
NUMBER = r"[-+]?\d\.\d+"
SHARES = (0.1, 0.2, 0.5, 1.0)


def at(points, spent):
    """The value where so much was spent, on the straight line between the two neighbours among sorted points."""
    for (low, before), (high, after) in pairwise(points):
        if low <= spent <= high:
            return before + (after - before) * (spent - low) / (high - low)
    return None


def read(frame, method, seed, cost, spent):
    rows = frame[(frame["method"] == method) & (frame["seed"] == seed)].sort_values("epoch")
    points = list(zip(rows[cost].astype(float), rows["ndcg@10"], strict=True))
    if method in ("supervised", "expected") and spent > points[-1][0]:
        return points[-1][1]
    return at(points, spent)


@pytest.mark.skipif(not (TABLE.is_file() and PAGE.is_file()), reason="the study has not been run and committed yet")
def test_the_committed_page_follows_from_the_raw_table():
    frame = pd.read_parquet(TABLE).astype({"dataset": str, "method": str, "split": str})
    frame = frame[frame["split"] == "test"]
    checked, text = 0, PAGE.read_text()
    for section in text.split("\n## ")[1:]:
        own = frame[frame["dataset"] == section.split("\n")[0].strip()]
        seeds = sorted(own["seed"].unique())
        for cost in ("seconds", "tokens") if len(own) else ():
            part = section.split(f"### At equal {cost}")[1].split("### ")[0]
            titles = [title.strip() for title in re.search(r"\| arm \|(.*)\|", part)[1].split("|")]
            whole = {s: own[(own["method"] == "full") & (own["seed"] == s)][cost].astype(float).max() for s in seeds}
            for line in part.splitlines():
                cells = [one.strip() for one in line.strip("|").split("|")]
                if len(cells) != len(titles) + 1 or cells[0] not in set(own["method"]):
                    continue
                for title, shown in zip(titles, cells[1:], strict=True):
                    share, _, rival = title.partition("%: minus ")
                    share = float(share.rstrip("%")) / 100
                    values = [read(own, cells[0], seed, cost, share * whole[seed]) for seed in seeds]
                    if rival:
                        name, _, later = rival.partition(" at ")
                        there = float(later.rstrip("%")) / 100 if later else share
                        others = [read(own, name, seed, cost, there * whole[seed]) for seed in seeds]
                        if (name == cells[0] and not later) or None in others:
                            assert shown == "–"
                            continue
                        values = [a if a is None else a - b for a, b in zip(values, others, strict=True)]
                    if None in values:
                        assert shown == "–"
                        continue
                    figures = [float(number) for number in re.findall(NUMBER, shown)]
                    assert figures == pytest.approx(interval(values)[: len(figures)], abs=6e-5)
                    checked += 1
    assert checked > 800


@pytest.mark.skipif(not TABLE.is_file(), reason="the study has not been run and committed yet")
def test_the_raw_table_is_small_and_whole():
    frame = pd.read_parquet(TABLE)
    assert TABLE.stat().st_size < 2_000_000
    per_arm = frame.groupby(["dataset", "method"], observed=True)["seed"].nunique()
    for (dataset, method), seeds in per_arm[per_arm > 0].items():
        assert seeds == (6 if dataset == "known-16-again" else 3), (dataset, method)
    assert np.isfinite(frame[["ndcg@10", "tokens", "seconds"]].to_numpy()).all()


def first_time(points, value):
    """What was spent when the value is first reached, on the straight line between two neighbours; None if never."""
    for (low, before), (high, after) in pairwise(points):
        if after >= value > before:
            return low + (high - low) * (value - before) / (after - before)
    return None


def test_what_reaching_the_full_pool_takes_follows_from_the_raw_table():
    frame = pd.read_parquet(TABLE).astype({"dataset": str, "method": str, "split": str})
    frame = frame[frame["split"] == "test"].sort_values("epoch")
    part = PAGE.read_text().split("## What it takes to reach the full pool")[1].split("\n## ")[0]
    lines = [
        [one.strip() for one in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("| k")
    ]
    checked = 0
    for dataset, _, method, *shown in lines:
        rival = "known-16" if method == "oracle" else dataset
        for cost, text in zip(("seconds", "tokens"), shown, strict=False):
            expected = []
            for seed in sorted(frame.loc[frame["dataset"] == dataset, "seed"].unique()):
                full = frame[(frame["dataset"] == rival) & (frame["method"] == "full") & (frame["seed"] == seed)]
                full = full.iloc[-1]
                own = frame[(frame["dataset"] == dataset) & (frame["method"] == method) & (frame["seed"] == seed)]
                spent = first_time(list(zip(own[cost].astype(float), own["ndcg@10"], strict=True)), full["ndcg@10"])
                expected.append(None if spent is None else 100 * spent / full[cost])
            each = re.search(r"\((.*)\)", text)[1].split(", ")
            assert [one == "–" for one in each] == [one is None for one in expected]
            for one, value in zip(each, expected, strict=True):
                assert value is None or float(one.rstrip("%")) == pytest.approx(value, abs=0.51)
                checked += value is not None
    assert len(lines) == 12
    assert checked >= 30


def test_no_selection_is_shown_above_the_expected_gradient_at_equal_seconds():
    frame = pd.read_parquet(TABLE).astype({"dataset": str, "method": str, "split": str})
    frame = frame[frame["split"] == "test"]
    checked = set()
    for dataset in frame.loc[frame["method"] == "expected", "dataset"].unique():
        own = frame[frame["dataset"] == dataset]
        whole = own[own["method"] == "full"].groupby("seed")["seconds"].max().astype(float)
        for method in set(own["method"]) - {"full", "full_filter", "supervised", "expected"}:
            ahead = [
                read(own, method, seed, "seconds", 0.2 * spent) - read(own, "expected", seed, "seconds", 0.2 * spent)
                for seed, spent in whole.items()
            ]
            assert interval(ahead)[1] <= 0, (dataset, method)
            checked.add(dataset)
    assert checked == {f"{name}-g{size}" for name in ("ml-100k", "amazon-industrial") for size in (16, 64)}
    assert "No selection is shown to be" in PAGE.read_text()


def made(methods, seeds=(1, 2, 3)):
    """A raw table in which quality grows straight with the cost, faster by the place of the method."""
    rows = []
    for place, (method, epochs) in enumerate(methods.items()):
        for seed in seeds:
            for epoch in range(epochs + 1):
                cost = {"seconds": 10.0 * epoch, "tokens": 1e3 * epoch, "seconds_warm_start": 0.0}
                row = {"dataset": "known-16", "window": "", "method": method, "setting": "", "seed": seed, **cost}
                row |= {"epoch": epoch, "tokens_warm_start": 0, "split": "test"}
                rows.append(row | {"ndcg@10": 0.1 + 0.01 * (place + 1) * epoch + seed / 1000})
    return pd.DataFrame(rows)


def test_values_at_equal_cost_are_on_the_line_or_not_there():
    frame = made({"full": 10, "random": 6, "predicted": 3, "supervised": 1})
    found = rollouts.at_cost(frame, "seconds", 0.25)
    assert found["full"].tolist() == pytest.approx([0.126, 0.127, 0.128])
    assert found["predicted"].tolist() == pytest.approx([0.176, 0.177, 0.178])
    assert found["supervised"].tolist() == pytest.approx([0.141, 0.142, 0.143])  # what it had at its end
    later = rollouts.at_cost(frame, "tokens", 0.5)
    assert later["random"].tolist() == pytest.approx([0.201, 0.202, 0.203])
    assert later["predicted"].isna().all()


def test_a_quality_is_first_reached_between_two_points_or_at_the_start_or_never():
    run = made({"full": 3}, [1]).assign(useful=[None, 3, 5, 4], solved=[None, 7, 5, 6], redundant=0, hopeless=0)
    assert rollouts.reached(run, "seconds", 0.116) == pytest.approx(15.0)
    assert rollouts.reached(run.iloc[::-1], "tokens", 0.121) == pytest.approx(2000.0)
    assert rollouts.reached(run, "seconds", 0.1) == 0.0
    assert np.isnan(rollouts.reached(run, "seconds", 0.2))
    assert rollouts.useful_until(run, 10.0) == pytest.approx(0.3)
    assert rollouts.useful_until(run, 15.0) == pytest.approx(5.5 / 15)


def test_the_study_may_run_in_pieces(tmp_path, monkeypatch):
    first, second = made({"full": 2}, (1, 2)), made({"full": 3, "random": 1}, (2, 3))
    monkeypatch.setattr(rollouts, "tidy", lambda paths: second)
    order = ["known-16"], ["full", "random"]
    write_tidy(first, tmp_path / "table.parquet")
    table = rollouts._together(tmp_path / "table.parquet", tmp_path, order, None)
    assert table.groupby(["method", "seed"])["epoch"].max().to_dict() == {
        ("full", 1): 2,
        ("full", 2): 3,  # run anew
        ("full", 3): 3,
        ("random", 2): 1,
        ("random", 3): 1,
    }
    again = rollouts._together(tmp_path / "table.parquet", None, order, None)
    pd.testing.assert_frame_equal(again, table, check_dtype=False)
