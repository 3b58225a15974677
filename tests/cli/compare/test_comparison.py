"""Tables of a study against figures worked out by hand."""

import pytest
from helpers.compare_tools import raw

from minirec_pl.cli.compare.comparison import chosen_points, comparison


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
