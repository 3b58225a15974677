"""The expected gradient against exact enumeration of groups of rollouts, through the sampled objective."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from minirec_pl import InputError
from minirec_pl.grpo import group_advantages, policy_loss
from minirec_pl.grpo.expected import exact_kl, expected_loss
from minirec_pl.grpo.loss import kl_k3
from minirec_pl.rewards.hit_or_miss import HitValues
from minirec_pl.selection.expected_update import expected_update, group_moments

SCALES, BASELINES = ("group", "none", "mean"), ("mean", "leave_one_out")
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
EQUAL = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]  # ids as tokens of a trie
UNEQUAL = [(0,), (1, 0), (1, 1, 0), (1, 1, 1), (2, 0), (2, 1)]
TARGET = 3


class Trie:
    """A tabular policy over a few ids: free logits at each node, in float64."""

    def __init__(self, ids: list[tuple[int, ...]], seed: int = 0) -> None:
        self.ids = ids
        nodes = sorted({id_[:depth] for id_ in ids for depth in range(len(id_))})
        self.children = {
            node: sorted({i[len(node)] for i in ids if i[: len(node)] == node and len(i) > len(node)}) for node in nodes
        }
        self.offset, total = {}, 0
        for node in nodes:
            self.offset[node] = total
            total += len(self.children[node])
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(total, dtype=torch.float64, generator=generator).requires_grad_()

    def logps(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the tokens of each id, [n, L], and which exist."""
        longest = max(map(len, self.ids))
        rows, mask = [], torch.zeros(len(self.ids), longest, dtype=torch.bool)
        for number, id_ in enumerate(self.ids):
            row = []
            for depth, token in enumerate(id_):
                node = id_[:depth]
                start, children = self.offset[node], self.children[node]
                row.append(self.logits[start : start + len(children)].log_softmax(0)[children.index(token)])
            mask[number, : len(id_)] = True
            rows.append(torch.stack([*row, *[torch.zeros((), dtype=torch.float64)] * (longest - len(id_))]))
        return torch.stack(rows), mask


def enumerated(trie: Trie, group: int, scale: str, baseline: str, loss_type: str, values: HitValues) -> Tensor:
    """Sum over all groups of probability times the gradient of the sampled objective."""
    logps, mask = trie.logps()
    p = logps.detach().sum(dim=1).exp()
    total = torch.zeros((), dtype=torch.float64)
    for items in itertools.combinations_with_replacement(range(len(trie.ids)), group):
        orders = math.factorial(group) / math.prod(math.factorial(n) for n in Counter(items).values())
        chance = orders * float(p[list(items)].prod())
        hits = torch.tensor([[values.hit if item == TARGET else values.miss for item in items]], dtype=torch.float64)
        advantages = group_advantages(hits, scale_rewards=scale, baseline=baseline)
        drawn = logps[list(items)][None]
        found = policy_loss(
            drawn,
            drawn.detach(),
            advantages,
            mask[list(items)][None],
            loss_type=loss_type,
            max_completion_length=mask.shape[1],
        )
        total = total + chance * found.loss
    (gradient,) = torch.autograd.grad(total, trie.logits)
    return gradient


def expected(trie: Trie, group: int, scale: str, baseline: str, values: HitValues) -> Tensor:
    logps, mask = trie.logps()
    logp = logps[TARGET].sum()[None]
    weight = group_moments(logp, group, scale_rewards=scale, baseline=baseline, **values._asdict()).weight
    (gradient,) = torch.autograd.grad(expected_loss(logp, weight).losses.sum() / mask.shape[1], trie.logits)
    return gradient


def groups_of(slow: tuple[int, ...] = (4, 5)) -> list:
    return [2, 3, *(pytest.param(group, marks=pytest.mark.slow) for group in slow)]


@pytest.mark.parametrize("values", [HitValues(), HitValues(2.0, 0.5), HitValues(0.25, 1.0)], ids=str)
@pytest.mark.parametrize("group", groups_of())
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SCALES)
def test_every_loss_type_has_this_expectation_with_ids_of_equal_length(scale, baseline, group, values) -> None:
    trie = Trie(EQUAL)
    ours = expected(trie, group, scale, baseline, values)
    for loss_type in LOSS_TYPES:
        theirs = enumerated(trie, group, scale, baseline, loss_type, values)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("group", groups_of())
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SCALES)
def test_only_dr_grpo_has_it_with_ids_of_unequal_length(scale, baseline, group) -> None:
    trie, values = Trie(UNEQUAL), HitValues()
    ours = expected(trie, group, scale, baseline, values)
    torch.testing.assert_close(ours, enumerated(trie, group, scale, baseline, "dr_grpo", values), rtol=0, atol=1e-10)
    for loss_type in ("grpo", "bnpo", "dapo"):
        theirs = enumerated(trie, group, scale, baseline, loss_type, values)
        best = float(theirs @ ours / (ours @ ours))  # no factor brings them together
        assert float((theirs - best * ours).norm() / theirs.norm()) > 1e-3, loss_type


@pytest.mark.parametrize(("scale", "depends"), [("group", True), ("mean", True), ("none", True)])
def test_a_wrong_group_size_is_found(scale, depends) -> None:
    trie = Trie(EQUAL)
    theirs = enumerated(trie, 4, scale, "mean", "grpo", HitValues())
    assert depends == (float((expected(trie, 5, scale, "mean", HitValues()) - theirs).norm()) > 1e-3)
    # With the others' mean as baseline nothing depends on G where nothing is scaled.
    alone = enumerated(trie, 4, "none", "leave_one_out", "grpo", HitValues())
    torch.testing.assert_close(expected(trie, 5, "none", "leave_one_out", HitValues()), alone, rtol=0, atol=1e-10)


def test_batch_scaling_has_no_closed_form() -> None:
    with pytest.raises(InputError, match=r"scale_rewards='batch' .*: use group, none or mean, or rollouts='sample'"):
        group_moments(torch.tensor([-1.0]), 4, scale_rewards="batch")
    # Two prompts whose p differ: the deviation of one group's rewards is not that of both.
    far, near = 0.1, 0.6
    found = []
    for other in (far, near):
        total = 0.0
        for hits in itertools.product([0.0, 1.0], repeat=4):
            rewards = torch.tensor(hits, dtype=torch.float64).view(2, 2)
            chance = math.prod(
                p if hit else 1 - p for p, row in zip((0.3, other), rewards.tolist(), strict=True) for hit in row
            )
            advantage = group_advantages(rewards, scale_rewards="batch")[0]
            total += chance * float((advantage * torch.where(rewards[0] > 0, 1 / 0.3, -1 / 0.7)).mean())
        found.append(total)
    assert abs(found[0] - found[1]) > 0.02


@pytest.mark.parametrize("group", [2, 3, 8, 64, 511, 4096])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_the_weight_is_stable(scale, baseline, group) -> None:
    logp = torch.tensor([-100.0, -87.0, -50.0, -20.0, -5.0, -0.7, -0.1, -1e-3, -1e-7], dtype=torch.float64)
    weight = group_moments(logp, group, scale_rewards=scale, baseline=baseline).weight
    assert torch.isfinite(weight).all()
    wanted = [oracle(float(value), group, scale) for value in logp]
    factor = group / (group - 1) if baseline == "leave_one_out" else 1.0
    torch.testing.assert_close(weight, torch.tensor(wanted, dtype=torch.float64) * factor, rtol=1e-8, atol=0)


def oracle(logp: float, group: int, scale: str) -> float:
    """w_G(p) term by term in decimals of 60 digits."""
    from decimal import Decimal, localcontext

    with localcontext() as context:
        context.prec, context.Emin, context.Emax = 60, -(10**8), 10**8
        p, total = Decimal(logp).exp(), Decimal(0)
        q = 1 - p
        chance = q**group
        for hits in range(group + 1):
            if 0 < hits < group:
                f = Decimal(hits) / group
                spread = (f * (1 - f) * group / (group - 1)).sqrt()
                divisor = {"group": spread + Decimal("0.0001"), "none": Decimal(1), "mean": f}[scale]
                total += chance * f * (1 - f) / divisor
            chance = chance * (group - hits) / (hits + 1) * p / q
        return float(total / (p * q))


def test_closed_forms() -> None:
    p = torch.linspace(1e-6, 1 - 1e-6, 101, dtype=torch.float64)
    for group in (2, 4, 16, 64):
        none = group_moments(p.log(), group, scale_rewards="none").weight
        torch.testing.assert_close(none, torch.full_like(p, (group - 1) / group))
        mean = group_moments(p.log(), group, scale_rewards="mean").weight
        torch.testing.assert_close(mean, (1 - (1 - p) ** (group - 1)) / p, rtol=1e-9, atol=0)
        found = group_moments(p.log(), group, eps=0.0)
        size = expected_update(p.log(), found.weight)
        torch.testing.assert_close(size, found.deviation * (group - 1) / group)
        torch.testing.assert_close(found.flat, p**group + (1 - p) ** group)


def test_the_ends_teach_nothing() -> None:
    for scale, baseline in itertools.product(SCALES, BASELINES):
        logp = torch.tensor([-math.inf, 0.0, 1e-9])
        weight = group_moments(logp, 8, scale_rewards=scale, baseline=baseline).weight
        assert expected_update(logp, weight).tolist() == [0.0, 0.0, 0.0]


def test_an_underflow_counts_as_nothing() -> None:
    logp = torch.tensor([-100.0, -1.0], requires_grad=True)
    weight = group_moments(logp, 8, scale_rewards="none").weight
    found = expected_loss(logp, weight)
    found.losses.sum().backward()
    assert int(found.underflow) == 1
    assert logp.grad is not None
    assert logp.grad[0] == 0
    assert logp.grad[1] != 0
    logp.grad = None
    likelihood = expected_loss(logp, None)
    likelihood.losses.sum().backward()
    assert logp.grad.tolist() == [-1.0, -1.0]
    assert int(likelihood.underflow) == 0


@pytest.mark.parametrize("correction", [True, False])
def test_the_exact_kl_is_the_expectation_of_the_sampled_one(correction) -> None:
    generator = torch.Generator().manual_seed(1)
    logits, other = torch.randn(2, 5, dtype=torch.float64, generator=generator)
    logits.requires_grad_()
    logps, ref = logits.log_softmax(0), other.log_softmax(0)
    ratio = (logps - logps.detach()).exp()
    token = kl_k3(logps, ref) * (ratio if correction else 1.0)
    (theirs,) = torch.autograd.grad((logps.detach().exp() * token).sum(), logits, retain_graph=True)
    loss, value = exact_kl(logps[None], ref[None], use_bias_correction_kl=correction)
    (ours,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(value[0], (logps.exp() * (logps - ref)).sum().detach())


def test_kl_leaves_out_what_is_impossible() -> None:
    low = torch.finfo(torch.float32).min
    logps = torch.tensor([[0.5, 0.5, 0.0]]).log().clamp(min=low).requires_grad_()
    ref = torch.tensor([[0.25, 0.75, 0.0]]).log().clamp(min=low)
    loss, value = exact_kl(logps, ref)
    (gradient,) = torch.autograd.grad(loss.sum(), logps)
    assert gradient.isfinite().all()
    assert value.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_generations": 1}, "num_generations is 1: a group has at least 2 rollouts"),
        ({"scale_rewards": "std"}, "scale_rewards is 'std': choose one of group, none, mean"),
        ({"baseline": "best"}, "baseline is 'best': choose one of mean, leave_one_out"),
        ({"scale_rewards": "mean", "miss": -0.5}, "use group or none, or rewards of at least 0"),
    ],
)
def test_bad_options(options, sentence) -> None:
    with pytest.raises(InputError, match=sentence):
        group_moments(torch.tensor([-1.0]), **{"num_generations": 4, **options})
