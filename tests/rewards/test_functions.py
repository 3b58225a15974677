"""Oracles: hand-made tables, scikit-learn's NDCG, and loops by the formulas of the papers."""

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from minirec_pl.cli.main import main
from minirec_pl.rewards import (
    FormatReward,
    NDCGReward,
    ReciprocalRankReward,
    SoftmaxMixReward,
    hit,
    rank_penalty,
)
from minirec_pl.rewards.calls import combine_rewards, reward_name
from minirec_pl.utils.errors import InputError

LISTS = [["a", "b", "c"], ["b", "a", "c"], ["b", "c", "d"], [], "a", "b"]
TARGET = ["a"] * 6


def test_hit_takes_items_and_lists() -> None:
    assert hit(LISTS, TARGET) == [1.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    assert hit(["ab", "a"], ["a", "ab"]) == [0.0, 0.0]


def test_ranks_of_lists() -> None:
    assert NDCGReward(k=2)(LISTS, TARGET) == pytest.approx([1.0, 1 / math.log2(3), 0.0, 0.0, 1.0, 0.0])
    assert NDCGReward(k=1)(LISTS, TARGET) == [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    assert ReciprocalRankReward()(LISTS, TARGET) == [1.0, 0.5, 0.0, 0.0, 1.0, 0.0]
    assert ReciprocalRankReward(k=1)(LISTS, TARGET) == [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]


@given(st.permutations(list("abcdefgh")), st.integers(1, 9))
def test_ndcg_is_that_of_scikit_learn(order: list[str], k: int) -> None:
    truth = ndcg_score([[float(item == "a") for item in order]], [list(range(8, 0, -1))], k=k)
    assert NDCGReward(k)([order], ["a"]) == pytest.approx([truth])
    assert NDCGReward(k)(["x"], ["a"], target_rank=[order.index("a") + 1]) == pytest.approx([truth])


def test_a_catalogue_ranking_comes_before_the_completion() -> None:
    columns = {"target": lambda: ["a", "a"], "target_rank": lambda: [2, None]}
    total, by_name = combine_rewards([NDCGReward(), ReciprocalRankReward(5)], None, ["a", "b"], columns)
    assert list(by_name) == ["ndcg@10", "reciprocal_rank@5"]
    assert total.tolist() == pytest.approx([1 / math.log2(3) + 0.5, 0.0])


def test_the_papers_mix() -> None:
    rank, p = [1, 2, 1000, 1001, None], [0.9, 0.3, 0.001, 0.0005, 0.0]
    truth = [0.95 / math.log2(r + 1) if r is not None and r <= 1000 else 0.0 for r in rank]
    columns = {"target_rank": lambda: rank, "target_probability": lambda: p}
    total, by_name = combine_rewards([SoftmaxMixReward()], None, ["-"] * 5, columns)
    assert total.tolist() == pytest.approx([gain + 0.05 * q for gain, q in zip(truth, p, strict=True)])
    assert list(by_name) == ["softmax_mix"]
    assert SoftmaxMixReward(k=1, weight=0.5)(rank[:2], p[:2]) == pytest.approx([0.95, 0.15])


def test_a_policy_that_does_not_rank_for_each_rollout_is_refused() -> None:
    with pytest.raises(InputError, match=r"reward softmax_mix asks for 'target_rank': .* completions, target"):
        combine_rewards([SoftmaxMixReward()], None, ["a"], {"target": lambda: ["a"]})


def plain_penalty(items: list[str], target: str, logps: dict[str, float]) -> list[float]:
    """ReRe's formula for one group: the rollouts ordered by probability, most likely first."""
    if target not in items:
        return [0.0] * len(items)
    weights = [1 / math.log2(place + 1) for place in range(1, len(items) + 1)]
    ordered = sorted(items, key=lambda item: -logps[item])
    return [0.0 if item == target else -weights[ordered.index(item)] / sum(weights) for item in items]


@given(
    st.lists(st.lists(st.sampled_from("abcdef"), min_size=4, max_size=4), min_size=1, max_size=4),
    st.permutations([-0.5, -1.0, -1.5, -2.0, -2.5, -3.0]),
)
def test_likely_mistakes_are_punished_most(groups: list[list[str]], values: list[float]) -> None:
    logps = dict(zip("abcdef", values, strict=True))
    flat = [item for group in groups for item in group]
    number = [n for n, group in enumerate(groups) for _ in group]
    got = rank_penalty(flat, ["a"] * len(flat), number, [logps[item] for item in flat])
    assert got == pytest.approx([value for group in groups for value in plain_penalty(group, "a", logps)])


def test_a_penalised_group_by_hand() -> None:
    """As in the authors' code: -1/log2(place + 2) for places from 0, scaled to the sum -1, 0 for the target."""
    weights = [1.0, 1 / math.log2(3), 0.5]
    got = rank_penalty(["b", "a", "c"], ["a"] * 3, [7, 7, 7], [-1.0, -2.0, -3.0])
    assert got == pytest.approx([-weights[0] / sum(weights), 0.0, -weights[2] / sum(weights)])


def test_format_is_that_of_the_whole_text() -> None:
    reward = FormatReward(r"<think>.*</think>\s*<answer>.+</answer>")
    good = "<think>line\nline</think>\n<answer>50</answer>"
    assert reward([good, good + "x", "x" + good, "<answer>50</answer>"]) == [1.0, 0.0, 0.0, 0.0]
    assert reward_name(reward) == "format"


def test_options_out_of_range() -> None:
    for make in (NDCGReward, ReciprocalRankReward, SoftmaxMixReward):
        with pytest.raises(InputError, match="k is 0: give at least 1"):
            make(k=0)
    with pytest.raises(InputError, match=r"weight is 1\.5"):
        SoftmaxMixReward(weight=1.5)
    with pytest.raises(InputError, match=re.escape("pattern '(' is not a regular expression")):
        FormatReward("(")


def test_rewards_by_path_and_by_class_in_a_run(command, tmp_path) -> None:
    """Functions and classes with options, weighted, each logged under its name."""
    import pandas as pd

    rewards = [
        "minirec_pl.rewards.rank_penalty",
        {"class_path": "minirec_pl.rewards.NDCGReward", "init_args": {"k": 5}},
    ]
    arguments = [word for word in command.grpo(tmp_path / "runs") if not word.startswith("--trainer.logger")]
    options = [f"--model.rewards={json.dumps(rewards)}", "--model.reward_weights=[1.0, 2.0]"]
    logger = "--trainer.logger=lightning.pytorch.loggers.CSVLogger"
    assert main([*arguments, *options, "--trainer.log_every_n_steps=1", logger, "--trainer.logger.save_dir=."]) == 0
    logged = pd.read_csv(tmp_path / "runs" / "version_0" / "metrics.csv")
    rows = logged[["reward", "rewards/rank_penalty/mean", "rewards/ndcg@5/mean"]].dropna()
    assert len(rows) > 3
    assert rows["rewards/ndcg@5/mean"].max() > 0
    assert rows["rewards/rank_penalty/mean"].min() < 0
    weighted = rows["rewards/rank_penalty/mean"] + 2 * rows["rewards/ndcg@5/mean"]
    np.testing.assert_allclose(rows["reward"], weighted, atol=1e-6)
