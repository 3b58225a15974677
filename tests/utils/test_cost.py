import time

import pytest

from minirec_pl.utils.cost import Cost


def test_totals_by_phase_and_their_row():
    cost = Cost()
    cost.add("warm_start", forward=100, backward=100, seconds=1.5)
    cost.add("scoring", forward=40, rollouts=8, seconds=0.25)
    cost.add("training", forward=20, backward=10, rollouts=4)
    cost.add("training", forward=2, backward=1, rollouts=4, seconds=0.12345)
    assert cost.row() == {
        "rollouts": {"scoring": 8, "training": 8},
        "tokens": {"forward": 162, "backward": 111},
        "seconds": {"warm_start": 1.5, "scoring": 0.25, "selection": 0.0, "training": 0.123},
    }


def test_a_run_includes_what_its_policy_cost():
    warm = Cost()
    warm.add("warm_start", forward=100, backward=90, seconds=1.0)
    run = Cost()
    run.include(warm.state_dict())
    run.include({})
    run.add("training", forward=5, backward=4)
    assert (run.row()["tokens"]["forward"], run.row()["tokens"]["backward"]) == (105, 94)
    assert warm.tokens_forward["training"] == 0


def test_state_is_a_copy_and_is_restored():
    cost = Cost()
    cost.add("scoring", forward=3, rollouts=2, seconds=0.5)
    state = cost.state_dict()
    cost.add("scoring", forward=1)
    other = Cost()
    other.add("training", forward=7)
    other.load_state_dict(state)
    other.add("scoring", forward=10)
    assert other.tokens_forward == {"warm_start": 0, "scoring": 13, "selection": 0, "training": 0}
    assert state["tokens_forward"]["scoring"] == 3


def test_timed_counts_also_when_it_fails():
    cost = Cost()

    def fail():
        with cost.timed("selection"):
            time.sleep(0.02)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert 0.02 <= cost.seconds["selection"] < 2
