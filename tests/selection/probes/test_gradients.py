"""Closed forms of a softmax head against double backward, sample by sample in float64, and finite differences."""

import pytest
import torch
from helpers.head_steps import drawn, several_steps
from hypothesis import given, settings
from hypothesis import strategies as st

from minirec_pl import InputError
from minirec_pl.selection.probes import gradients
from minirec_pl.selection.probes.gradients import HeadStep, head_gradient, head_hvp, head_signal


def published(state, vectors, target, temperature, allowed, cosine):
    """(g, d(g.g)/dh) of l = -p / stop_gradient(p) for one sample, as the authors' code takes them."""
    h = state.clone().requires_grad_()
    kept = [m for m in range(len(vectors)) if allowed[m]]
    compared = torch.nn.functional.normalize(h, dim=0) if cosine else h
    p = (vectors[kept] @ compared / temperature).softmax(dim=0)[kept.index(target)]
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
    st.booleans(),
    st.sampled_from([0.05, 0.7, 1.0, 3.0]),
    st.integers(0, 10**6),
)
def test_equals_double_backward_sample_by_sample(n, choices, width, shared, cosine, temperature, seed):
    hidden, vectors = drawn(seed, n, width), drawn(seed + 1, *([] if shared else [n]), choices, width)
    vectors = torch.nn.functional.normalize(vectors, dim=-1) if cosine else vectors
    target = torch.randint(choices, (n,), generator=torch.Generator().manual_seed(seed))
    allowed = drawn(seed + 2, n, choices) > -0.5
    allowed[torch.arange(n), target] = True
    options = {"temperature": temperature, "allowed": allowed, "cosine": cosine}
    got = [call(hidden, vectors, target, **options) for call in (head_gradient, head_hvp)]
    for b in range(n):
        own = vectors if shared else vectors[b]
        expected = published(hidden[b], own, int(target[b]), temperature, allowed[b], cosine)
        length = float(hidden[b].norm()) if cosine else 1.0
        for order, ours, truth in zip((1, 3), got, expected, strict=True):  # in powers of 1 / (tau |h|)
            scale = 1 / (temperature * length) ** order
            torch.testing.assert_close(ours[b], truth, rtol=1e-9, atol=1e-12 * scale)


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


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_portions_and_float32_give_the_same(monkeypatch, shared, cosine):
    hidden, vectors = drawn(0, 11, 8), drawn(1, *([] if shared else [11]), 13, 8)
    target = torch.arange(11)
    options = {"temperature": 0.5, "cosine": cosine}
    whole = head_hvp(hidden, vectors, target, **options)
    monkeypatch.setattr(gradients, "_OWN_VECTORS", 2 * 13 * 8)
    monkeypatch.setattr(gradients, "_LOGITS", 3 * 13)
    torch.testing.assert_close(head_hvp(hidden, vectors, target, **options), whole, rtol=1e-12, atol=1e-12)
    single = head_hvp(hidden.float(), vectors.float(), target, **options)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), whole, rtol=1e-4, atol=1e-4)


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
    assert (head_gradient(hidden, vectors, target, allowed=allowed)[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_state_of_zeros_has_no_cosine_and_no_signal(dtype):
    hidden, vectors = drawn(0, 2, 4).to(dtype), torch.nn.functional.normalize(drawn(1, 5, 4), dim=1).to(dtype)
    hidden[0] = 0
    for call in (head_gradient, head_hvp):
        signal = call(hidden, vectors, torch.tensor([1, 3]), cosine=True)
        assert (signal[0] == 0).all()
        torch.testing.assert_close(signal[1:], call(hidden[1:], vectors, torch.tensor([3]), cosine=True))


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
