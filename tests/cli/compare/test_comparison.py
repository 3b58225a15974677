"""Tables of a study against figures worked out by hand."""

import pandas as pd
import pytest

from minirec_pl.cli.compare.comparison import at_equal_cost, chosen_points, comparison

VALIDATION = {"full": (0.1, 0.3, 0.2), "random": (0.1, 0.2, 0.2), "minirec": (0.1, 0.1, 0.4)}
TEST = {"full": (0.1, 0.5, 0.9), "random": (0.1, 0.2, 0.3), "minirec": (0.1, 0.3, 0.6)}


def raw(budgets, seeds=(1, 2, 3)):
    """A raw table in which seed s adds s thousandths to every figure."""
    rows = []
    for method, given in budgets.items():
        for budget in given:
            for seed in seeds:
                for epoch in range(3):
                    run = {"dataset": "one", "window": "", "method": method, "setting": "", "budget": budget}
                    spent = {"tokens": 100 + 50 * epoch, "tokens_warm_start": 100, "tokens_scoring": 0}
                    spent |= {"tokens_training": 50 * epoch, "rollouts": epoch, "seconds": float(epoch)}
                    for split, figures in (("validation", VALIDATION), ("test", TEST)):
                        ndcg = figures[method][epoch] + seed / 1000
                        figure = {"split": split, "epoch": epoch, "seed": seed, "ndcg@10": ndcg, "hit_rate@10": 0.5}
                        rows.append({**run, **spent, **figure})
    return pd.DataFrame(rows)


def test_the_epoch_is_chosen_on_validation_the_earliest_of_equals():
    runs = chosen_points(raw({"full": [1.0], "random": [0.1], "minirec": [0.1]})).set_index(["method", "seed"])
    assert runs["epoch"].groupby("method").first().to_dict() == {"full": 1, "random": 1, "minirec": 2}
    assert runs.loc[("full", 2), "test"] == pytest.approx(0.502)
    assert runs.loc[("full", 2), "tokens"] == 150
    assert runs.loc[("full", 2), "tokens_total"] == 200


def test_differences_are_to_the_same_budget_or_to_the_whole_pool():
    table = comparison(raw({"full": [1.0], "random": [0.1], "minirec": [0.1, 0.2]}), ("random", "full"))
    table = table.set_index(["method", "budget"])
    assert table.loc[("minirec", 0.1), "minus_random"] == pytest.approx(0.4)
    assert table.loc[("minirec", 0.1), "minus_random_n"] == 3
    assert table.loc[("minirec", 0.2), "minus_random_n"] == 0, "random has no such budget"
    assert table.loc[("minirec", 0.2), "minus_full"] == pytest.approx(0.1)
    assert table.loc[("full", 1.0), "minus_random_n"] == 0


def test_at_equal_cost_lines_between_points_are_read():
    table = at_equal_cost(raw({"full": [1.0], "minirec": [0.1]}), "tokens", [125, 150, 500])
    table = table.set_index(["method", "spent"])["figure"]
    assert table.to_dict() == pytest.approx(
        {("full", 125): 0.302, ("full", 150): 0.502, ("minirec", 125): 0.202, ("minirec", 150): 0.302}
    )
