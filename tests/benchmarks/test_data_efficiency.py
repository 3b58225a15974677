"""The committed study says what its raw table holds, and the page can be made from any study."""

import re

import numpy as np
import pandas as pd
import pytest
from data_efficiency import at_equal_cost, quality_at, user_bootstrap
from helpers.compare_tools import chosen, interval, raw
from helpers.paths import BENCHMARKS
from scipy import stats

RESULTS = BENCHMARKS / "results"
TABLE, PAGE = RESULTS / "data_efficiency.parquet", RESULTS / "data_efficiency.md"
NUMBER = r"[-+]?\d\.\d+"


def check_headline(page, frame):
    """Every row of the headline table against the raw table."""
    section = page.split("## Headline")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][2:]
    assert rows
    for data, method, budget, *figures, _ in rows:
        dataset, _, window = data.partition(" ")
        share = float(budget.rstrip("%")) / 100
        windows = [w for w in frame[frame["dataset"] == dataset]["window"].unique() if window in (w, "all")]

        def mean(method, share, dataset=dataset, windows=windows):
            parts = [chosen(frame, dataset, w, method, share) for w in windows]
            return {seed: np.mean([part[seed] for part in parts]) for seed in set.intersection(*map(set, parts))}

        own = mean(method, share)
        expected = [interval(list(own.values()))]
        rivals = [mean("random_redraw", share)] if method != "random_redraw" else []
        for rival in (*rivals, mean("full", 1.0)):
            expected.append(interval([own[seed] - rival[seed] for seed in own.keys() & rival.keys()]))
        shown = [[float(number) for number in re.findall(NUMBER, figure)] for figure in figures if figure != "–"]
        assert np.array(shown) == pytest.approx(np.array(expected), abs=5.1e-5)


@pytest.mark.skipif(not (TABLE.is_file() and PAGE.is_file()), reason="the study has not been run and committed yet")
def test_headline_of_the_committed_page_follows_from_the_raw_table():
    assert TABLE.stat().st_size < 2 * 2**20
    frame = pd.read_parquet(TABLE).astype({"dataset": str, "window": str, "method": str, "split": str})
    check_headline(PAGE.read_text(), frame)


def made_up():
    """A raw table of two data sets, three seeds and three methods, with figures out of thin air."""
    random, rows = np.random.default_rng(0), []
    for dataset, window in (("one", "early"), ("one", "late"), ("two", "")):
        for method, budget in (("full", 1.0), ("random_redraw", 0.1), ("minirec_dynamic", 0.1)):
            for seed in (1, 2, 3):
                for epoch in range(3):
                    for split in ("validation", "test"):
                        row = {"dataset": dataset, "window": window, "method": method, "setting": "", "seed": seed}
                        row |= {"budget": budget, "epoch": epoch, "split": split, "ndcg@10": random.uniform(0.05, 0.1)}
                        row |= {"hit_rate@10": 0.2, "tokens": 1000 + 100 * epoch, "tokens_warm_start": 1000}
                        row |= {"tokens_scoring": 0, "tokens_training": 100 * epoch, "rollouts": 10, "seconds": epoch}
                        rows.append(row)
    return pd.DataFrame(rows)


def test_the_page_of_a_study_holds_its_figures(tmp_path):
    from data_efficiency import main
    from helpers.compare_tools import STUDY, write_study

    frame = made_up()
    methods = {**STUDY["methods"], "random_redraw": {}, "minirec_dynamic": {}}
    study = write_study(tmp_path, methods=methods)
    frame.to_parquet(tmp_path / "study.parquet")
    main(["--from", str(tmp_path), "--study", str(study), "--to", str(tmp_path / "made")])
    page = (tmp_path / "made" / "data_efficiency.md").read_text()
    check_headline(page, frame)
    assert "one all" in page
    assert (tmp_path / "made" / "data_efficiency.png").read_bytes().startswith(b"\x89PNG")
    assert pd.read_parquet(tmp_path / "made" / "data_efficiency.parquet").equals(frame)


def test_bootstrap_draws_whole_users():
    rng = np.random.default_rng(2)
    users = rng.integers(0, 9, 80)
    values, reference = rng.random((3, 80)), rng.random((3, 80))
    found = user_bootstrap(values, reference, users, draws=500, seed=5)
    draws = np.random.default_rng(5).multinomial(9, np.full(9, 1 / 9), size=500)
    plain = []
    for times in draws:
        rows = [row for user in range(9) for _ in range(times[user]) for row in np.flatnonzero(users == user)]
        plain.append(np.mean([values[seed][row] - reference[seed][row] for row in rows for seed in range(3)]))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(plain, [0.025, 0.975])), rel=1e-9)
    assert found.mean == pytest.approx((values - reference).mean())
    assert found.n == 9


def test_bootstrap_of_users_with_one_sample_each_is_near_students_interval():
    rng = np.random.default_rng(3)
    values = rng.normal(0.2, 1, 400)
    found = user_bootstrap(values, np.zeros(400), np.arange(400), draws=4000)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)


def test_quality_at_a_cost_is_linear_between_points_and_nothing_outside():
    cost, quality = np.array([100.0, 200.0, 400.0]), np.array([0.1, 0.3, 0.2])
    found = quality_at(cost, quality, [100, 150, 300, 400, 99, 401])
    assert found[:4] == pytest.approx([0.1, 0.2, 0.25, 0.2])
    assert np.isnan(found[4:]).all()


def test_at_equal_cost_lines_between_points_are_read():
    table = at_equal_cost(raw({"full": [1.0], "minirec": [0.1]}), "tokens", [125, 150, 500])
    table = table.set_index(["method", "spent"])["figure"]
    assert table.to_dict() == pytest.approx(
        {("full", 125): 0.302, ("full", 150): 0.502, ("minirec", 125): 0.202, ("minirec", 150): 0.302}
    )
