import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import TopKLogitsWarper, TopPLogitsWarper

from minirec_pl import InputError
from minirec_pl.policy.language_models.sampling import draw, filter_logps, rollout_generator
from minirec_pl.utils.modules import evaluation_mode


def test_every_submodule_gets_its_own_mode_back_after_an_exception():
    module = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    module[1].eval()
    module[1][0].train()
    before = [child.training for child in module.modules()]
    assert len(set(before)) == 2
    inside = []

    def fail():
        with evaluation_mode(module):
            inside.extend([torch.is_grad_enabled(), *(child.training for child in module.modules())])
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert not any(inside)
    assert [child.training for child in module.modules()] == before
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("top_k", [None, 1, 5, 40, 100])
@pytest.mark.parametrize("top_p", [None, 1e-6, 0.3, 0.9, 1.0])
def test_filters_agree_with_those_of_transformers(top_k, top_p):
    logits = 3 * torch.randn(20, 40, generator=torch.Generator().manual_seed(0))
    expected = logits.clone()
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None:
        expected = TopPLogitsWarper(top_p)(None, expected)
    ours = filter_logps(logits.log_softmax(dim=-1), top_k, top_p)
    torch.testing.assert_close(ours, expected.log_softmax(dim=-1))


def test_filtering_keeps_masked_entries_out():
    logps = torch.tensor([[0.0, 1.0, torch.finfo(torch.float32).min]]).log_softmax(dim=-1)
    assert filter_logps(logps, 3, 0.9999).exp()[0, 2] == 0


def test_draw_is_inversion_of_the_cumulative_probability():
    logps = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0]]).log()
    uniform = torch.tensor([[0.0, 0.25, 0.4999, 0.5, 0.75, 1 - 2**-53]], dtype=torch.float64).expand(2, -1)
    assert draw(logps, uniform).tolist() == [[1, 1, 1, 3, 3, 3], [0] * 6]


def test_draw_refuses_diverged_weights():
    with pytest.raises(InputError, match="weights have diverged"):
        draw(torch.tensor([[0.0, torch.nan]]), torch.zeros(1, 1, dtype=torch.float64))


@given(seed=st.integers(0, 10**6), length=st.integers(4000, 9000), spread=st.sampled_from([0.1, 5.0, 60.0]))
@settings(max_examples=25, deadline=None)
def test_a_long_row_is_drawn_from_as_a_short_one(seed, length, spread):
    random = torch.Generator().manual_seed(seed)
    logps = (spread * torch.randn(3, length, generator=random)).log_softmax(dim=-1)
    logps[torch.rand(logps.shape, generator=random) < 0.5] = -torch.inf
    uniform = torch.rand(3, 50, dtype=torch.float64, generator=random)
    found = draw(logps, uniform)
    mass = logps.double().exp().cumsum(dim=-1)
    upper, lower = mass.gather(1, found), mass.gather(1, found) - logps.double().exp().gather(1, found)
    point = uniform * mass[:, -1:]
    assert bool((logps.gather(1, found) > -torch.inf).all())
    assert bool(((lower - 1e-6 <= point) & (point <= upper + 1e-6)).all())


def test_a_long_row_with_one_possible_entry():
    logps = torch.full((1, 5000), -torch.inf)
    logps[0, 4999] = 0.0
    assert draw(logps, torch.tensor([[0.0, 0.5, 1 - 2**-53]], dtype=torch.float64)).tolist() == [[4999] * 3]
    with pytest.raises(InputError, match="weights have diverged"):
        draw(logps.fill_(torch.nan), torch.zeros(1, 1, dtype=torch.float64))


def test_every_word_of_a_generator_counts():
    words = [(1, 2, 3), (1, 2, 4), (2, 1, 3), (1, 2, 3, 0), (0, 1, 2)]
    draws = [torch.rand(4, generator=rollout_generator(*word)).tolist() for word in words]
    assert len({tuple(row) for row in draws}) == len(words)
    assert draws[0] == torch.rand(4, generator=rollout_generator(1, 2, 3)).tolist()
