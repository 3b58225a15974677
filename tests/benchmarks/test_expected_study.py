"""The committed study of rollouts and their expectation says what its raw table holds."""

import re

import numpy as np
import pandas as pd
import pytest
from helpers.compare_tools import chosen, interval
from helpers.paths import BENCHMARKS

TABLE, PAGE = (BENCHMARKS / "results" / f"expected.{end}" for end in ("parquet", "md"))
NUMBER = r"[-+]?\d\.\d+"


def arms(frame, dataset, window):
    """Test NDCG@10 of each arm by seed, of the window `all` as the mean of the windows."""
    windows = [w for w in frame[frame["dataset"] == dataset]["window"].unique() if window in (w, "all")]
    found = {}
    for method, rows in frame[frame["dataset"] == dataset].groupby("method"):
        parts = [chosen(frame, dataset, w, method, rows["budget"].iloc[0]) for w in windows]
        found[method] = {seed: np.mean([part[seed] for part in parts]) for seed in parts[0]}
    first = frame[(frame["epoch"] == 0) & (frame["split"] == "test") & (frame["method"] == "sft_full")]
    first = first[(first["dataset"] == dataset) & first["window"].isin(windows)]
    return {**found, "warm_start": first.groupby("seed")["ndcg@10"].mean().to_dict()}


@pytest.mark.skipif(not (TABLE.is_file() and PAGE.is_file()), reason="the study has not been run and committed yet")
def test_the_committed_page_follows_from_the_raw_table():
    frame = pd.read_parquet(TABLE).astype({"dataset": str, "window": str, "method": str, "split": str})
    checked = 0
    for section in PAGE.read_text().split("\n## ")[1:]:
        title, _, text = section.partition("\n")
        dataset, _, window = title.partition(" ")
        if dataset not in set(frame["dataset"]):
            continue
        found = arms(frame, dataset, window)
        for line in text.splitlines():
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if len(cells) < 8 or not re.match(NUMBER, cells[2]):
                continue
            samples, training = cells[:2]
            own = found[f"{training}_{samples}" if samples else "warm_start"]
            rivals = ["warm_start", f"sft_{samples}", f"sample_{samples}", f"{training}_full", f"{training}_random"]
            rivals += [f"{training}_gaussian"]
            expected = [list(own.values())]
            expected += [[own[seed] - found[rival][seed] for seed in own] if rival in found else [] for rival in rivals]
            for shown, values in zip(cells[2:9], expected, strict=True):
                if shown != "–":
                    figures = [float(number) for number in re.findall(NUMBER, shown)]
                    assert figures == pytest.approx(interval(values), abs=5.1e-5)
                    checked += 1
    assert checked > 4 * 12 * 3
