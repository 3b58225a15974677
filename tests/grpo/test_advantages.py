"""Oracle: the statistics module on Python floats, one group at a time."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minirec_pl.grpo.loss import flat_groups, group_advantages
from minirec_pl.utils.errors import InputError

SCALES = ["group", "batch", "none"]
BASELINES = ["mean", "leave_one_out"]


def oracle(groups: list[list[float | None]], scale: str, baseline: str) -> list[list[float]]:
    """Advantages by the formulas; None where no reward applies."""
    known = [[r for r in group if r is not None] for group in groups]
    every = [r for group in known for r in group]
    out = []
    for group, rewards in zip(groups, known, strict=True):
        row = []
        for place, reward in enumerate(group):
            others = [r for i, r in enumerate(group) if r is not None and (baseline == "mean" or i != place)]
            if reward is None or not others or len(set(rewards)) == 1:
                row.append(0.0)
                continue
            spread = {"group": rewards, "batch": every, "none": None}[scale]
            divisor = 1.0 if spread is None else statistics.stdev(spread) + 1e-4
            row.append((reward - statistics.fmean(others)) / divisor)
        out.append(row)
    return out


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_advantages_equal_the_statistics_module(scale: str, baseline: str) -> None:
    rewards = torch.rand(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = group_advantages(rewards, scale_rewards=scale, baseline=baseline)  # type: ignore[arg-type]
    assert torch.allclose(got, torch.tensor(oracle(rewards.tolist(), scale, baseline), dtype=torch.float64), atol=1e-12)


def test_defaults_are_those_of_grpo() -> None:
    rewards = torch.rand(3, 4, dtype=torch.float64)
    truth = torch.tensor(oracle(rewards.tolist(), "group", "mean"), dtype=torch.float64)
    assert torch.allclose(group_advantages(rewards), truth, atol=1e-12)


@given(
    st.lists(st.lists(st.sampled_from([None, 0.0, 0.1, 0.5, 1.0]), min_size=4, max_size=4), min_size=1, max_size=5),
    st.sampled_from(SCALES),
    st.sampled_from(BASELINES),
)
def test_what_no_reward_applies_to_is_left_out(groups: list[list[float | None]], scale: str, baseline: str) -> None:
    if scale == "batch" and sum(r is not None for group in groups for r in group) < 2:
        return
    rewards = torch.tensor([[math.nan if r is None else r for r in group] for group in groups], dtype=torch.float64)
    got = group_advantages(rewards, scale_rewards=scale, baseline=baseline, applies=~rewards.isnan())  # type: ignore[arg-type]
    assert torch.allclose(got, torch.tensor(oracle(groups, scale, baseline), dtype=torch.float64), atol=1e-12)
    assert not got[rewards.isnan()].any()
    flat = [len({r for r in group if r is not None}) < 2 for group in groups]
    assert flat_groups(rewards, ~rewards.isnan()).tolist() == flat


def test_leave_one_out_without_scale_is_unbiased_and_the_group_mean_is_not() -> None:
    """E[A d log pi(a)] over every group of three actions, against the gradient of the expected reward."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    reward = torch.tensor([1.0, 0.2, -0.4], dtype=torch.float64)
    truth = p * (reward - (p * reward).sum())  # gradient of sum p r by the logits
    estimates = {}
    for baseline in BASELINES:
        total = torch.zeros(3, dtype=torch.float64)
        for group in torch.cartesian_prod(*[torch.arange(3)] * 3):
            advantages = group_advantages(reward[group][None], scale_rewards="none", baseline=baseline)[0]  # type: ignore[arg-type]
            scores = torch.nn.functional.one_hot(group, 3) - p
            total += p[group].prod() * (advantages[:, None] * scores).mean(dim=0)
        estimates[baseline] = total
    assert torch.allclose(estimates["leave_one_out"], truth, atol=1e-12)
    assert torch.allclose(estimates["mean"], truth * 2 / 3, atol=1e-12)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_identical_rewards_give_exactly_zero(scale: str, baseline: str, dtype: torch.dtype) -> None:
    rewards = torch.tensor([[0.1] * 7, [1 / 3] * 7, [1e30] * 7, [0.0] * 6 + [1.0]], dtype=dtype)
    got = group_advantages(rewards, scale_rewards=scale, baseline=baseline)  # type: ignore[arg-type]
    assert torch.equal(got[:3], torch.zeros(3, 7, dtype=got.dtype))
    assert got.isfinite().all()
    assert flat_groups(rewards).tolist() == [True, True, True, False]


def test_hits_may_be_integers() -> None:
    got = group_advantages(torch.tensor([[1, 0, 0, 0]]))
    assert got.dtype == torch.float32
    assert got[0].tolist() == pytest.approx([0.75 / 0.5001, *[-0.25 / 0.5001] * 3])


def test_wrong_rewards_are_named() -> None:
    with pytest.raises(InputError, match="num_generations"):
        group_advantages(torch.ones(4, 1))
    with pytest.raises(InputError, match="give \\[B, G\\]"):
        group_advantages(torch.ones(4))
    with pytest.raises(InputError, match="groups \\[1\\] are NaN"):
        group_advantages(torch.tensor([[0.0, 1.0], [math.nan, 0.0]]))
    with pytest.raises(InputError, match="scale_rewards is 'all'"):
        group_advantages(torch.ones(2, 2), scale_rewards="all")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="baseline is 'median': choose one of mean, leave_one_out"):
        group_advantages(torch.ones(2, 2), baseline="median")  # type: ignore[arg-type]
