"""Oracle: a loop over pairs and tokens in Python floats; bounds of the gradient by autograd."""

import math

import pytest
import torch

from minirec_pl.grpo.loss import pair_weights, preference_loss


def case(seed, p=3, g=4, length=5):
    """P groups off-policy enough to leave the clip range, float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    old_chosen, old_rejected = -2 + 0.5 * normal(p, length), -2 + 0.5 * normal(p, g, length)
    lengths = torch.randint(1, length + 1, (p, g + 1), generator=generator)
    return {
        "chosen": old_chosen + 0.4 * normal(p, length),
        "rejected": old_rejected + 0.4 * normal(p, g, length),
        "chosen_mask": torch.arange(length) < lengths[:, :1],
        "rejected_mask": torch.arange(length) < lengths[:, 1:, None],
        "weights": pair_weights(torch.randint(0, 3, (p, g), generator=generator)).double(),
        "old_chosen": old_chosen,
        "old_rejected": old_rejected,
    }


def oracle(inputs, low, high):
    losses = []
    for p in range(len(inputs["chosen"])):

        def score(name, index, bound, keep):
            terms = []
            for t in range(int(inputs[f"{name}_mask"][index].sum())):
                new, old = float(inputs[name][index][t]), float(inputs[f"old_{name}"][index][t])
                terms.append(old + math.log(keep(math.exp(new - old), bound)))
            return math.fsum(terms) / len(terms)

        good = score("chosen", p, 1 + high, min)
        total = 0.0
        for g in range(inputs["rejected"].shape[1]):
            margin = good - score("rejected", (p, g), 1 - low, max)
            total += float(inputs["weights"][p, g]) * math.log(1 + math.exp(-margin))
        losses.append(total)
    return losses


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("epsilon_high", [None, 0.4])
def test_loss_equals_the_loop(seed, epsilon_high):
    inputs = case(seed)
    got = preference_loss(**inputs, epsilon=0.2, epsilon_high=epsilon_high)
    assert got.tolist() == pytest.approx(oracle(inputs, 0.2, epsilon_high or 0.2), abs=1e-12)


def test_gradient_is_that_of_the_loss():
    inputs = case(4)
    rest = {name: value for name, value in inputs.items() if name not in ("chosen", "rejected")}
    leaves = inputs["chosen"].requires_grad_(), inputs["rejected"].requires_grad_()
    assert torch.autograd.gradcheck(lambda c, r: preference_loss(c, r, **rest), leaves)


def test_what_a_token_moves_is_bounded_twice():
    dead = alive = 0
    for seed in range(5):
        inputs = case(seed)
        chosen, rejected = inputs["chosen"].requires_grad_(), inputs["rejected"].requires_grad_()
        loss = preference_loss(**inputs, epsilon=0.2, epsilon_high=0.3).sum()
        up, down = torch.autograd.grad(loss, (chosen, rejected))
        for gradient, name, side in ((up, "chosen", -1), (down, "rejected", 1)):
            mask = inputs[f"{name}_mask"]
            ratio = (inputs[name] - inputs[f"old_{name}"]).exp()
            outside = ratio > 1.3 if name == "chosen" else ratio < 0.8
            assert not gradient[~mask].any()
            assert not gradient[mask & outside].any()
            inside = (gradient * side)[mask & ~outside]
            assert (inside >= 0).all()
            bound = (1 / mask.sum(-1, keepdim=True)).expand_as(mask)[mask & ~outside]
            assert (inside <= bound).all()
            dead, alive = dead + int((mask & outside).sum()), alive + int((inside > 0).sum())
    assert dead > 20
    assert alive > 20


def test_no_lower_bound_and_garbage_where_masked():
    inputs = case(1)
    clean = preference_loss(**inputs, epsilon=1.0)
    assert clean.isfinite().all()
    for name in ("chosen", "rejected", "old_chosen", "old_rejected"):
        inputs[name][~inputs[f"{name.removeprefix('old_')}_mask"]] = math.nan
    assert torch.equal(preference_loss(**inputs, epsilon=1.0), clean)


def test_no_gradient_reaches_the_old_policy():
    inputs = case(2)
    old = [inputs[name].requires_grad_() for name in ("old_chosen", "old_rejected")]
    inputs["chosen"].requires_grad_()
    preference_loss(**inputs).sum().backward()
    assert all(tensor.grad is None for tensor in old)


def test_each_different_item_counts_once():
    items = torch.tensor([[4, 7, 4, 9], [1, 1, 1, 1]])
    for row, weights in zip(items.tolist(), pair_weights(items).tolist(), strict=True):
        assert weights == pytest.approx([1 / row.count(item) / len(set(row)) for item in row])
