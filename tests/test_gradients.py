"""Closed forms of a softmax head against double backward, sample by sample in float64, and finite differences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirec_pl import InputError, gradients
from minirec_pl.gradients import HeadStep, head_alignment, head_gradient, head_hvp, head_signal


def drawn(seed, *shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def published(state, vectors, target, temperature=1.0, allowed=None):
    """(g, d(g.g)/dh) of l = -p / stop_gradient(p) for one sample, as the authors' code takes them."""
    h = state.clone().requires_grad_()
    kept = [m for m in range(len(vectors)) if allowed is None or allowed[m]]
    p = (vectors[kept] @ h / temperature).softmax(dim=0)[kept.index(target)]
    loss = -p / p.detach()
    (first,) = torch.autograd.grad(loss, h, create_graph=True)
    (product,) = torch.autograd.grad((first * first).sum(), h)
    return first.detach(), product


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 5),
    st.integers(1, 9),
    st.integers(1, 7),
    st.booleans(),
    st.sampled_from([0.05, 0.7, 1.0, 3.0]),
    st.integers(0, 10**6),
)
def test_equals_double_backward_sample_by_sample(n, choices, width, shared, temperature, seed):
    hidden, vectors = drawn(seed, n, width), drawn(seed + 1, *([] if shared else [n]), choices, width)
    target = torch.randint(choices, (n,), generator=torch.Generator().manual_seed(seed))
    allowed = drawn(seed + 2, n, choices) > -0.5
    allowed[torch.arange(n), target] = True
    got = [
        call(hidden, vectors, target, temperature=temperature, allowed=allowed) for call in (head_gradient, head_hvp)
    ]
    for b in range(n):
        own = vectors if shared else vectors[b]
        for ours, truth in zip(got, published(hidden[b], own, int(target[b]), temperature, allowed[b]), strict=True):
            torch.testing.assert_close(ours[b], truth, rtol=1e-9, atol=1e-9 * (1 + float(truth.abs().max())))


def test_hvp_equals_finite_differences():
    hidden, vectors, step = drawn(0, 5), drawn(1, 6, 5), 1e-3
    constant = (vectors @ hidden).softmax(dim=0)[2]

    def loss(h):
        return -(vectors @ h).softmax(dim=0)[2] / constant

    def difference(function, h):
        moves = step * torch.eye(5, dtype=torch.float64)
        return torch.stack([(function(h + move) - function(h - move)) / (2 * step) for move in moves])

    gradient = difference(loss, hidden)
    expected = difference(lambda h: difference(loss, h).square().sum(), hidden)
    target = torch.tensor([2])
    torch.testing.assert_close(head_gradient(hidden[None], vectors, target)[0], gradient, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head_hvp(hidden[None], vectors, target)[0], expected, rtol=1e-4, atol=1e-5)


def test_hvp_is_twice_the_hessian_times_the_gradient():
    hidden, vectors = drawn(0, 4), drawn(1, 6, 4)
    p = (vectors @ hidden).softmax(dim=0)[3]

    def loss(h):
        return -(vectors @ h).softmax(dim=0)[3] / p

    hessian = torch.autograd.functional.hessian(loss, hidden)
    gradient = torch.autograd.functional.jacobian(loss, hidden)
    torch.testing.assert_close(head_hvp(hidden[None], vectors, torch.tensor([3]))[0], 2 * hessian @ gradient)


@pytest.mark.parametrize("shared", [True, False])
def test_portions_and_float32_give_the_same(monkeypatch, shared):
    hidden, vectors = drawn(0, 11, 8), drawn(1, *([] if shared else [11]), 13, 8)
    target = torch.arange(11)
    whole = head_hvp(hidden, vectors, target, temperature=0.5)
    monkeypatch.setattr(gradients, "_OWN_VECTORS", 2 * 13 * 8)
    monkeypatch.setattr(gradients, "_LOGITS", 3 * 13)
    torch.testing.assert_close(head_hvp(hidden, vectors, target, temperature=0.5), whole, rtol=1e-12, atol=1e-12)
    single = head_hvp(hidden.float(), vectors.float(), target, temperature=0.5)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), whole, rtol=1e-4, atol=1e-4)


def several_steps():
    """Steps with biases, ids of unequal length and rows of W that several steps share; and log p by its definition."""
    n, width, temperature = 4, 5, 0.7
    weight, bias = drawn(0, 9, width), drawn(1, 9)
    rows = [torch.tensor([1, 4, 7]), torch.tensor([4, 2, 4, 8]), torch.tensor([3, 7])]
    targets = [[0, 2, 1, 1], [1, 3, -1, 0], [1, -1, -1, 0]]
    allowed = [drawn(2 + t, n, len(row)) > 0 for t, row in enumerate(rows)]
    allowed[1][:, 2] &= ~allowed[1][:, 0]  # a token leads to one child of a node at most
    for mask, target in zip(allowed, targets, strict=True):
        for b, place in enumerate(target):
            mask[b, place] |= place >= 0
    allowed[1][3] = torch.tensor([True, True, False, True])
    states = [drawn(20 + t, n, width) for t in range(3)]
    steps = [
        HeadStep(states[t], weight[rows[t]], torch.tensor(targets[t]), allowed[t], bias[rows[t]], temperature)
        for t in range(3)
    ]

    def logp(b, states, weight):
        total = torch.zeros((), dtype=torch.float64)
        for t in range(3):
            if targets[t][b] >= 0:
                kept = [m for m in range(len(rows[t])) if allowed[t][b, m]]
                logits = (weight[rows[t][kept]] @ states[t][b] + bias[rows[t][kept]]) / temperature
                total = total + logits.log_softmax(dim=0)[kept.index(targets[t][b])]
        return total

    return steps, rows, weight, states, logp


def test_signals_of_targets_of_several_tokens():
    steps, _, weight, states, logp = several_steps()
    first, first_logp = head_signal(steps, "first")
    product, product_logp = head_signal(steps, "hvp")
    for b in range(4):
        leaves = [state.clone().requires_grad_() for state in states]
        p = logp(b, leaves, weight).exp()
        torch.testing.assert_close(first_logp[b].exp(), p.detach())
        torch.testing.assert_close(product_logp[b].exp(), p.detach())
        torch.testing.assert_close(
            first[b], sum(g[b] for g in torch.autograd.grad(-p, leaves, retain_graph=True, materialize_grads=True))
        )
        used = [leaf for t, leaf in enumerate(leaves) if steps[t].target[b] >= 0]
        gradient = torch.autograd.grad(-p / p.detach(), used, create_graph=True)
        truth = torch.autograd.grad(sum(g.square().sum() for g in gradient), used)
        torch.testing.assert_close(product[b], sum(g[b] for g in truth))


def test_alignment_equals_the_cosine_of_the_heads_own_gradient():
    steps, rows, weight, states, logp = several_steps()
    displacement = drawn(50, 9, 5)
    got = head_alignment(steps, rows, displacement)
    reached = torch.cat(rows).unique()
    for b in range(4):
        leaf = weight.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(logp(b, states, leaf), leaf)
        truth = torch.nn.functional.cosine_similarity(
            gradient[reached].flatten(), displacement[reached].flatten(), dim=0
        )
        torch.testing.assert_close(got[b], truth)
    assert got.abs().max() > 0.05
    torch.testing.assert_close(head_alignment(steps, rows, -7 * displacement), -got)
    assert (head_alignment(steps, rows, torch.zeros_like(displacement)) == 0).all()


def test_alignment_is_one_after_a_step_along_the_samples_own_gradient():
    steps, rows, weight, states, logp = several_steps()
    leaf = weight.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(logp(2, states, leaf), leaf)
    assert float(head_alignment(steps, rows, 1e-3 * gradient)[2]) == pytest.approx(1, abs=1e-9)


def test_a_target_that_is_not_allowed_has_no_signal_and_disturbs_no_other():
    hidden, vectors, target = drawn(0, 2, 4), drawn(1, 5, 4), torch.tensor([1, 3])
    allowed = torch.ones(2, 5, dtype=torch.bool)
    allowed[0, 1] = False
    step = HeadStep(hidden, vectors, target, allowed)
    for kind in ("first", "hvp"):
        signal, logp = head_signal([step], kind)
        assert logp[0] == -torch.inf
        assert (signal[0] == 0).all()
        torch.testing.assert_close(signal[1:], head_signal([HeadStep(hidden[1:], vectors, target[1:])], kind)[0])
    assert head_alignment([step], [torch.arange(5)], drawn(2, 5, 4))[0] == 0
    assert (head_gradient(hidden, vectors, target, allowed=allowed)[0] == 0).all()


def test_certain_targets_and_lone_choices_have_no_signal():
    hidden, vectors = torch.tensor([[60.0, 0.0]]), torch.tensor([[60.0, 0.0], [-60.0, 0.0]])
    for call in (head_gradient, head_hvp):
        assert (call(hidden, vectors, torch.tensor([0])) == 0).all()
        assert (call(hidden, vectors[:1], torch.tensor([0])) == 0).all()
        assert torch.isfinite(call(hidden, vectors, torch.tensor([1]))).all()


@pytest.mark.parametrize(
    ("hidden", "vectors", "target", "allowed", "message"),
    [
        ((2, 3), (4, 5), [0, 0], None, r"hidden states \[2, 3\] and item vectors \[4, 5\] do not fit"),
        ((2, 3), (3, 4, 3), [0, 0], None, r"item vectors \[3, 4, 3\] do not fit"),
        ((2, 3), (4, 3), [0, 4], None, r"one position in 0\.\.3 for each of 2 samples"),
        ((2, 3), (4, 3), [0], None, r"one position in 0\.\.3 for each of 2 samples"),
        ((2, 3), (4, 3), [0, 0], (4,), r"allowed must have the shape \[2, 4\], not \[4\]"),
    ],
)
def test_shapes_that_do_not_fit(hidden, vectors, target, allowed, message):
    mask = None if allowed is None else torch.ones(allowed, dtype=torch.bool)
    with pytest.raises(InputError, match=message):
        head_hvp(torch.ones(hidden), torch.ones(vectors), torch.tensor(target), allowed=mask)
