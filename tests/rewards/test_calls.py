"""Oracles: hand-made tables, and counters of what is called."""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from minirec_pl.rewards import hit
from minirec_pl.rewards.calls import call_reward, combine_rewards, reward_name
from minirec_pl.utils.errors import InputError

COMPLETIONS = ["a", "b", "a", "c"]
TARGET = ["a", "a", "a", "c"]
SAMPLE_ID = [40, 40, 12, 12]


def columns(**more: list[Any]) -> dict[str, Callable[[], list[Any]]]:
    values: dict[str, list[Any]] = {"target": TARGET, "sample_id": SAMPLE_ID, **more}
    return {name: functools.partial(list, column) for name, column in values.items()}


def returning(values: Any) -> Callable[..., Any]:
    def broken(completions: list[str]) -> Any:
        return values

    return broken


class Length:
    """A callable object, as a YAML file builds one from class_path and init_args."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, completions: list[str]) -> list[float]:
        return [self.scale * len(completion) for completion in completions]


def test_hit_compares_completion_and_target() -> None:
    total, by_name = combine_rewards([hit], None, COMPLETIONS, columns())
    assert total.tolist() == [1.0, 0.0, 1.0, 1.0]
    assert total.dtype == torch.float32
    assert by_name["hit"].tolist() == total.tolist()


def test_weighted_sum_leaves_out_what_does_not_apply() -> None:
    def bonus(completions: list[str], sample_id: list[int]) -> list[float | None]:
        return [None if sample == 40 else 0.5 for sample in sample_id]

    total, by_name = combine_rewards([hit, bonus], [2.0, -1.0], COMPLETIONS, columns())
    assert total.tolist() == [2.0, 0.0, 1.5, 1.5]
    assert by_name["bonus"].isnan().tolist() == [True, True, False, False]
    assert by_name["bonus"][2:].tolist() == [0.5, 0.5]


def test_a_completion_no_reward_applies_to_is_left_out_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="no reward of broken applies to some completions: they are left out"):
        total, _ = combine_rewards([returning([None, 1.0, 1.0, 1.0])], None, COMPLETIONS, columns())
    assert total.isnan().tolist() == [True, False, False, False]
    assert total[1:].tolist() == [1.0, 1.0, 1.0]


def test_only_the_columns_asked_for_are_made_and_only_once() -> None:
    made: list[str] = []

    def column(name: str, values: list[Any]) -> Callable[[], list[Any]]:
        def make() -> list[Any]:
            made.append(name)
            return values

        return make

    lazy = {"prompts": column("prompts", ["p"] * 4), "target": column("target", TARGET)}
    combine_rewards([hit, functools.partial(hit)], None, COMPLETIONS, lazy)
    assert made == ["target"]

    received: dict[str, Any] = {}

    def curious(completions: list[str], **rest: Any) -> list[float]:
        received.update(rest, completions=completions)
        return [0.0] * 4

    combine_rewards([curious], None, COMPLETIONS, lazy)
    assert received == {"completions": COMPLETIONS, "prompts": ["p"] * 4, "target": TARGET}


def test_a_default_parameter_that_is_no_column_is_left_alone() -> None:
    def scaled(completions: list[str], target: list[str] | None = None, scale: float = 3.0) -> list[float]:
        return [scale if target else 0.0] * len(completions)

    assert combine_rewards([scaled], None, COMPLETIONS, columns())[0].tolist() == [3.0] * 4


def test_names() -> None:
    assert reward_name(hit) == "hit"
    assert reward_name(functools.partial(hit, target=[])) == "hit"
    assert reward_name(Length(1.0)) == "Length"
    assert reward_name(lambda completions: [0.0]) == "lambda"
    total, by_name = combine_rewards([Length(1.0), Length(10.0), Length(100.0)], None, COMPLETIONS, columns())
    assert list(by_name) == ["Length", "Length_2", "Length_3"]
    assert total.tolist() == [111.0] * 4


@pytest.mark.parametrize(
    "values",
    [
        (1, 0, True, 2.5),
        np.array([1.0, 0.0, 1.0, 2.5]),
        [np.float32(1), np.int64(0), np.bool_(True), 2.5],
        torch.tensor([1.0, 0.0, 1.0, 2.5]),
        [torch.tensor(1.0), torch.tensor(0), torch.tensor(True), torch.tensor([2.5])],
    ],
)
def test_every_kind_of_number_is_taken(values: Any) -> None:
    assert call_reward(returning(values), "broken", COMPLETIONS, columns()).tolist() == [1.0, 0.0, 1.0, 2.5]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.0, 0.0, math.nan, 1.0], "reward broken returned nan for sample_id 12:"),
        ([0.0, math.inf, 0.0, -math.inf], "reward broken returned inf for sample_id 40, 12:"),
        ([None, 0.0, torch.tensor(math.nan), 0.0], "reward broken returned .*nan.* for sample_id 12:"),
        ([0.0, 1e300, 0.0, 0.0], "reward broken returned 1e\\+300 for sample_id 40:"),
        ([0.0, 0.0, 0.0, "1.5"], "reward broken returned '1.5' for sample_id 12:"),
        ([0.0, [1.0], 0.0, 0.0], "reward broken returned \\[1.0\\] for sample_id 40:"),
        ([0.0, 0.0, 0.0], "reward broken returned 3 values for 4 completions \\(sample_id 40, 12\\)"),
        ([], "reward broken returned 0 values"),
        (1.0, "reward broken returned float:"),
        (None, "reward broken returned NoneType:"),
        ("abcd", "reward broken returned str:"),
        (torch.zeros(4, 1), "reward broken returned \\[0.0\\] for sample_id 40:"),
    ],
)
def test_a_wrong_return_names_the_reward_and_the_sample(values: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        combine_rewards([hit, returning(values)], None, COMPLETIONS, columns())


def test_without_sample_ids_the_completion_is_named() -> None:
    with pytest.raises(InputError, match="for completion 1, 2, 3, 4, 5 and others:"):
        combine_rewards([returning([0.0] + [math.nan] * 7)], None, ["a"] * 8, {})


def test_wrong_signatures_and_weights_are_named() -> None:
    def asks(completions: list[str], titles: list[str]) -> list[float]:
        return [0.0] * 4

    def positional(completions: list[str], /) -> list[float]:
        return [0.0] * 4

    with pytest.raises(InputError, match=r"asks for .titles.: .+ keyword for one of completions, target, sample_id"):
        combine_rewards([asks], None, COMPLETIONS, columns())
    assert combine_rewards([asks], None, COMPLETIONS, columns(titles=["t"] * 4))[0].tolist() == [0.0] * 4
    with pytest.raises(InputError, match="by keyword"):
        combine_rewards([positional], None, COMPLETIONS, columns())
    with pytest.raises(InputError, match="1 reward functions but 2 reward weights"):
        combine_rewards([hit], [1.0, 2.0], COMPLETIONS, columns())
    with pytest.raises(InputError, match="finite"):
        combine_rewards([hit], [math.nan], COMPLETIONS, columns())
    with pytest.raises(InputError, match="no reward function"):
        combine_rewards([], None, COMPLETIONS, columns())


def test_a_scoring_pass_is_cheap() -> None:
    completions = [str(row % 1682) for row in range(160_000)]
    target = [str(row // 16 % 1682) for row in range(160_000)]
    start = time.perf_counter()
    total, _ = combine_rewards([hit], None, completions, {"target": lambda: target})
    assert time.perf_counter() - start < 0.5
    assert float(total.sum()) == sum(row % 1682 == row // 16 % 1682 for row in range(160_000))
