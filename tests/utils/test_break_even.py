"""What selection can save, against an epoch in which every token is counted one by one."""

import math

import pytest

from minirec_pl import InputError
from minirec_pl.utils.break_even import BreakEven, schedules

PATTERNS = {
    "none flat": [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    "a fifth": [1, 0, 0, 0, 0, 1, 0, 0, 0, 0],
    "most": [1, 1, 1, 0, 1, 1, 0, 1, 1, 1],
    "nine of ten": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0],
}
SIZES = [(20, 0, 16, 20), (30, 3, 8, 33), (50, 40, 4, 130)]  # P, C, G, S
POOL = 1000


class Counter:
    def __init__(self):
        self.tokens = 0

    def run(self, n):
        for _ in range(n):
            self.tokens += 1


def draw(counter, prompt, completion, group):
    counter.run(prompt)
    for _ in range(group):
        counter.run(completion)


def train(counter, prompt, completion, group):
    for _ in ("forward", "backward"):
        draw(counter, prompt, completion, group)


def epoch(flat, sizes, budget, *, perfect, scored):
    """Goes through a pool, each sample's group flat or not, until enough mixed groups were trained on."""
    prompt, completion, group, scoring = sizes
    counter = Counter()
    for _ in range(round(scored * len(flat))):
        counter.run(scoring)
    wanted = min(round(budget * len(flat)), flat.count(0))
    for is_flat in flat:
        if wanted == 0:
            break
        if is_flat and perfect:
            continue
        draw(counter, prompt, completion, group)
        if not is_flat:
            train(counter, prompt, completion, group)
            wanted -= 1
    return counter.tokens


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("budget", [0.1, 1.0])
def test_an_epoch_in_which_tokens_are_counted(pattern, sizes, budget):
    repeats = POOL // 10
    flat = PATTERNS[pattern] * repeats
    f = sum(PATTERNS[pattern]) / 10
    setting = BreakEven(*sizes, flat_share=f, budget=budget)
    before = epoch(flat, sizes, budget, perfect=False, scored=0.0)
    # the last flat groups of the pattern come before or after the last mixed one
    slack = 10 * setting.draw / before
    assert setting.unselected * POOL == pytest.approx(before, rel=slack)
    for scored in (0.0, 0.1, 0.25, 1.0):
        after = epoch(flat, sizes, budget, perfect=True, scored=scored)
        assert setting.trained * (setting.draw + setting.train) * POOL + scored * sizes[3] * POOL == pytest.approx(
            after
        )
        assert setting.saving(scored) == pytest.approx(1 - after / before, abs=2 * slack * after / before)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("budget", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("scored", [0.05, 0.5, 1.0])
def test_the_share_of_flat_groups_at_which_it_breaks_even(sizes, budget, scored):
    needed = BreakEven(*sizes, budget=budget).needed(scored)
    savings = [(f / 1000, BreakEven(*sizes, flat_share=f / 1000, budget=budget).saving(scored)) for f in range(1000)]
    if needed is None:
        assert all(saving < 0 for _, saving in savings)
        return
    assert BreakEven(*sizes, flat_share=needed, budget=budget).saving(scored) == pytest.approx(0, abs=1e-12)
    assert all((saving > 0) == (f > needed) for f, saving in savings if abs(f - needed) > 1e-9)


def test_where_a_rollout_costs_nothing_scoring_every_epoch_never_pays():
    assert BreakEven(prompt=20, completion=0, num_generations=16, scoring=20).needed(1.0) is None


def test_a_decoded_token_may_cost_more_than_one_of_a_prompt():
    sizes = {"prompt": 100, "completion": 10, "num_generations": 8, "scoring": 100, "flat_share": 0.5}
    savings = [BreakEven(**sizes, decoding=decoding).saving(1.0) for decoding in (1, 10, 100)]
    assert savings == sorted(savings)
    assert BreakEven(**sizes, decoding=10).draw == 100 + 10 * 8 * 10


def test_how_much_is_scored_an_epoch_by_counting():
    for epochs in (1, 2, 5):
        for fraction in (0.0, 0.1, 0.5, 1.0):
            total = sum(1.0 if epoch == 0 else fraction for epoch in range(epochs))
            always, some, once = schedules(epochs, fraction).values()
            assert (always, once) == (1.0, 1 / epochs)
            assert some == pytest.approx(total / epochs)


@pytest.mark.parametrize(
    ("sizes", "beginning"),
    [
        ({"completion": 50, "flat_share": 0.0}, "Selection cannot pay here: 0% of the groups are flat"),
        ({"completion": 50, "flat_share": 0.05}, "Selection cannot pay here: 5% of the groups are flat"),
        ({"completion": 0, "flat_share": 0.3, "budget": 0.05}, "Selection that scores cannot pay here: 30%"),
        ({"completion": 50, "flat_share": 0.8}, "Selection can save 57% of the tokens at most, as 80% of the groups"),
    ],
)
def test_the_sentence(sizes, beginning):
    setting = BreakEven(**{"prompt": 100, "num_generations": 16, "scoring": 100, **sizes})
    text = setting.verdict(schedules(4))
    assert text.startswith(beginning)
    if "After scoring" in text:
        assert "there remain 49% (the whole pool before every epoch), " in text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"flat_share": 1.0}, "flat_share is 1.0: .* below 1; where all are flat, nothing can be learnt"),
        ({"flat_share": math.nan}, "flat_share is nan"),
        ({"budget": 0.0}, "budget is 0.0: give a share of the pool"),
        ({"prompt": 0}, "prompt is 0: give a finite number of at least 1"),
        ({"completion": -1}, "completion is -1: give a finite number of at least 0"),
        ({"num_generations": 1}, "num_generations is 1: give a finite number of at least 2"),
        ({"decoding": math.nan}, "decoding is nan"),
        ({"decoding": math.inf}, "decoding is inf: give a finite number"),
        ({"prompt": math.inf}, "prompt is inf: give a finite number"),
        ({"scoring": math.inf}, "scoring is inf: give a finite number"),
    ],
)
def test_numbers_out_of_range(wrong, message):
    with pytest.raises(InputError, match=message):
        BreakEven(**{"prompt": 10, "completion": 1, "num_generations": 4, "scoring": 10, **wrong})


def test_a_selection_that_scores_nothing_is_not_told_what_scoring_costs():
    setting = BreakEven(prompt=20, completion=0, num_generations=16, scoring=20, flat_share=0.8, budget=0.1)
    assert setting.verdict({}) == (
        "Selection that scores nothing can save 57% of the tokens at most, as 80% of the groups are flat."
    )


@pytest.mark.parametrize("scored", [-0.1, math.nan, math.inf])
def test_a_share_of_the_pool_that_nobody_can_score(scored):
    setting = BreakEven(prompt=20, completion=0, num_generations=16, scoring=20, flat_share=0.8)
    for ask in (setting.saving, setting.needed):
        with pytest.raises(InputError, match=f"scored is {scored}: give the samples scored per epoch"):
            ask(scored)


@pytest.mark.parametrize("numbers", [(0,), (3, -0.1), (3, 1.1), (3, math.nan)])
def test_schedules_out_of_range(numbers):
    with pytest.raises(InputError, match="give at least 1, and a share from 0 to 1"):
        schedules(*numbers)
