"""The committed study of selection where rollouts are dear says what its raw table holds."""

import re
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from helpers.compare_tools import interval
from helpers.paths import BENCHMARKS

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
                        if name == cells[0] or None in others:
                            assert shown == "–"
                            continue
                        values = [a if a is None else a - b for a, b in zip(values, others, strict=True)]
                    if None in values:
                        assert shown == "–"
                        continue
                    figures = [float(number) for number in re.findall(NUMBER, shown)]
                    assert figures == pytest.approx(interval(values)[: len(figures)], abs=6e-5)
                    checked += 1
    assert checked > 300


@pytest.mark.skipif(not TABLE.is_file(), reason="the study has not been run and committed yet")
def test_the_raw_table_is_small_and_whole():
    frame = pd.read_parquet(TABLE)
    assert TABLE.stat().st_size < 2_000_000
    per_arm = frame.groupby(["dataset", "method"], observed=True)["seed"].nunique()
    assert set(per_arm[per_arm > 0]) == {3}
    assert np.isfinite(frame[["ndcg@10", "tokens", "seconds"]].to_numpy()).all()
