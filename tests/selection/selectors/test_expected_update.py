"""Learnability as the size of the expected update: its curve, its selectors, and what they take from the module."""

import math

import pytest
import torch
from lightning.pytorch import LightningModule

from minirec_pl import GRPORecModule, InputError
from minirec_pl.callbacks.select_samples import told_of
from minirec_pl.selection import ExpectedUpdateSelector, MiniRecSelector, update_learnability
from minirec_pl.selection.signals import Signals

P = torch.tensor([0.0, 0.001, 0.05, 0.2, 0.5, 0.8, 0.99, 1.0], dtype=torch.float64)


def by_definition(p, group, scale, baseline):
    """(1 - p) sum over k of P(K = k) f A_hit with the advantage of a hit, times what (1 - f) of misses adds."""
    total = 0.0
    for k in range(1, group):
        f = k / group
        spread = math.sqrt(f * (1 - f) * group / (group - 1))
        divisor = {"group": spread + 1e-4, "none": 1.0, "mean": f}[scale]
        factor = group / (group - 1) if baseline == "leave_one_out" else 1.0
        total += math.comb(group, k) * p**k * (1 - p) ** (group - k) * factor * f * (1 - f) / divisor
    return total


@pytest.mark.parametrize("group", [2, 8, 64])
@pytest.mark.parametrize("scale", ["group", "none", "mean"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_the_curve_is_the_expected_advantage_of_hits(scale, baseline, group):
    wanted = torch.tensor([by_definition(float(p), group, scale, baseline) for p in P], dtype=torch.float64)
    found = update_learnability(P, group, scale_rewards=scale, baseline=baseline)
    torch.testing.assert_close(found, wanted / wanted.max(), rtol=1e-9, atol=1e-12)
    assert found[0] == found[-1] == 0
    assert found.max() == 1


def test_closed_forms():
    none = update_learnability(P, 16, scale_rewards="none", baseline="leave_one_out")
    torch.testing.assert_close(none, P * (1 - P) / 0.25)
    mean = update_learnability(P, 16, scale_rewards="mean")
    wanted = (1 - P) * (1 - (1 - P) ** 15)
    torch.testing.assert_close(mean, wanted / wanted.max())


@pytest.mark.parametrize("p", [[0.0, 0.0], [1.0, 1.0, 0.0], []])
def test_where_nothing_can_be_learnt_it_is_0(p):
    assert update_learnability(torch.tensor(p), 8).tolist() == [0.0] * len(p)


def test_a_measured_length_stands_for_p_times_1_minus_p():
    lengths = P * (1 - P)
    torch.testing.assert_close(update_learnability(P, 8, lengths=lengths), update_learnability(P, 8))
    twice = update_learnability(P, 8, lengths=lengths * torch.tensor([1, 1, 1, 1, 1, 5, 1, 1]))
    assert int(twice.argmax()) == 5


def signals(p, seed=0, unit=False):
    n = len(p)
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(n, 4, generator=generator)
    if unit:
        gradient = torch.nn.functional.normalize(gradient, dim=1) * (p * (1 - p))[:, None]
    return Signals(
        sample_id=torch.arange(n),
        reward_mean=p.clone(),
        reward_std=torch.zeros(n, dtype=torch.float64),
        n_rollouts=torch.zeros(n, dtype=torch.int64),
        gradient=gradient,
        embedding=torch.randn(n, 6, generator=generator),
        solve_probability=p.clone(),
    )


@pytest.mark.parametrize("measured", [False, True])
def test_the_selector_of_its_own_takes_the_largest(measured):
    p = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ledger = ExpectedUpdateSelector(8, measured=measured).select(signals(p, unit=True), 20)
    size = torch.tensor([by_definition(float(value), 8, "group", "mean") for value in p])
    assert ledger.selected() == size.argsort(descending=True, stable=True)[:20].tolist()


@pytest.mark.parametrize("kind", ["update", "update_length"])
def test_minirec_takes_it_in_place_of_the_gaussian(kind):
    p = torch.rand(100, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) ** 3
    selector = MiniRecSelector(learnability=kind, num_generations=16, gate=(0.0, 1.0), beta=0.0, novelty=False)
    table = selector.select(signals(p, unit=True), 10).table
    size = torch.tensor([by_definition(float(value), 16, "group", "mean") for value in p], dtype=torch.float64)
    torch.testing.assert_close(
        torch.from_numpy(table["learnability"].to_numpy(copy=True)), size / size.max(), rtol=1e-6, atol=1e-9
    )


def test_exact_probabilities_without_rewards_are_enough():
    p = torch.linspace(0.001, 0.999, 200, dtype=torch.float64)
    known = signals(p)
    known.reward_mean = torch.full_like(p, torch.nan)
    chosen = MiniRecSelector(learnability="update", gate=(0.0, 1.0), beta=0.0, novelty=False).select(known, 20).table
    assert chosen.loc[chosen["rank"] > 0, "difficulty"].between(0.4, 0.6).all()
    with pytest.raises(InputError, match="no sample of the pool has the rewards that difficulty='mean' needs"):
        MiniRecSelector(gate=(0.0, 1.0)).select(known, 20)


def test_an_unknown_probability_stays_unknown_and_leaves_the_others_alone():
    p = torch.tensor([0.5, math.nan, 0.1], dtype=torch.float64)
    found = update_learnability(p, 8)
    assert math.isnan(float(found[1]))
    torch.testing.assert_close(found[[0, 2]], update_learnability(p[[0, 2]], 8))


def test_they_take_from_the_module_how_it_trains(tiny_policy):
    module = GRPORecModule(tiny_policy(), num_generations=6, scale_rewards="mean", baseline="leave_one_out")
    for selector in (MiniRecSelector(learnability="update"), ExpectedUpdateSelector()):
        told = told_of(selector, module)
        assert (told.num_generations, told.scale_rewards, told.baseline) == (6, "mean", "leave_one_out")
        assert selector.num_generations is None
    own = told_of(ExpectedUpdateSelector(4, "none", "mean"), module)
    assert (own.num_generations, own.scale_rewards, own.baseline) == (4, "none", "mean")
    batch = told_of(ExpectedUpdateSelector(), GRPORecModule(tiny_policy(), scale_rewards="batch"))
    assert batch.scale_rewards == "group"
    assert told_of(ExpectedUpdateSelector(), LightningModule()).num_generations is None


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: MiniRecSelector(learnability="size"), "learnability is 'size': give one of gaussian, update"),
        (lambda: MiniRecSelector(learnability="update", sigma=0.1), "has no mu and no sigma: leave out"),
        (lambda: MiniRecSelector(learnability="update", calibrate="quantile"), "has no mu and no sigma: leave out"),
        (lambda: MiniRecSelector(mode="official", learnability="update_length"), "set gradient to first or traj"),
        (lambda: ExpectedUpdateSelector(1), "num_generations is 1: "),
        (lambda: ExpectedUpdateSelector(0), "num_generations is 0: "),
        (lambda: MiniRecSelector(learnability="update", num_generations=1), "num_generations is 1: give at least 2"),
        (lambda: ExpectedUpdateSelector(scale_rewards="batch"), "scale_rewards='batch'"),
        (lambda: update_learnability(torch.tensor([1.5]), 4), "outside"),
    ],
)
def test_bad_options(make, sentence):
    with pytest.raises(InputError, match=sentence):
        make()
