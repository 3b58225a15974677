"""Gradient signals against finite differences and a sample-by-sample double backward."""

import pytest
import torch
from plain_policy import batch_of, many_token_policy, one_token_policy

from minirec_pl.probes import head_signal

HISTORIES, SEEN = [[3], [0, 5, 2, 7], [], [11, 1]], [[3], [0, 5, 2, 7, 9], [], [1, 11]]
TARGETS = [0, 8, 6, 4]


@pytest.fixture(params=["one token", "many tokens"])
def case(request, tmp_path):
    """(states in float64, from states to log p, D) of four samples, the head in float64."""
    policy = one_token_policy() if request.param == "one token" else many_token_policy(tmp_path / "policy")
    batch = batch_of(HISTORIES, SEEN, TARGETS)
    target = batch["target"][:, None]
    with torch.no_grad():
        states = policy.completion_states(policy.run_prompt(batch), target)
    head = policy.model.get_output_embeddings().weight.detach().double()
    ids = [[t for t in row if t >= 0] for row in policy.trie.item_tokens.tolist()]

    def log_p(leaves):
        prompt, rest = leaves
        rows = []
        for b, (seen, item) in enumerate(zip(SEEN, TARGETS, strict=True)):
            total = 0.0
            for depth, token in enumerate(ids[item]):
                state = prompt[b] if depth == 0 else rest[b, 0, depth - 1]
                open_ids = [t for i, t in enumerate(ids) if i not in seen and t[:depth] == ids[item][:depth]]
                allowed = sorted({t[depth] for t in open_ids if len(t) > depth})
                total = total + (head[allowed] @ state).log_softmax(dim=0)[allowed.index(token)]
            rows.append(total)
        return torch.stack(rows)

    return policy, batch, states, [part.double() for part in states], log_p


def ours(policy, batch, states, kind):
    def log_p(leaves):
        return policy.head_logps(type(states)(*leaves), batch["target"][:, None], batch["seen"])[0].sum(dim=(1, 2))

    return head_signal(log_p, states, kind)


def test_first_equals_finite_differences_of_p(case):
    policy, batch, states, exact, log_p = case
    signal, logp = ours(policy, batch, states, "first")
    torch.testing.assert_close(logp.double(), log_p(exact), rtol=0, atol=1e-5)
    width, step = exact[0].shape[-1], 1e-5
    expected = torch.zeros(4, width, dtype=torch.float64)
    for which, part in enumerate(exact):
        flat = part.reshape(4, -1)
        for column in range(flat.shape[1]):
            moved = []
            for sign in (1, -1):
                changed = flat.clone()
                changed[:, column] += sign * step
                leaves = [changed.view_as(part) if i == which else other for i, other in enumerate(exact)]
                moved.append(log_p(leaves).exp())
            expected[:, column % width] -= (moved[0] - moved[1]) / (2 * step)
    torch.testing.assert_close(signal.double(), expected, rtol=1e-4, atol=1e-6)


def test_hvp_equals_the_published_formula_sample_by_sample(case):
    policy, batch, states, exact, log_p = case
    signal, _ = ours(policy, batch, states, "hvp")
    for b in range(4):
        leaves = [part.clone().requires_grad_() for part in exact]
        used = [leaf for leaf in leaves if leaf.numel()]
        p = log_p(leaves)[b].exp()
        gradient = torch.autograd.grad(-p / p.detach(), used, create_graph=True)
        product = torch.autograd.grad(sum((g[b] * g[b]).sum() for g in gradient), used)
        expected = sum(g[b].reshape(-1, g.shape[-1]).sum(dim=0) for g in product)
        torch.testing.assert_close(signal[b].double(), expected, rtol=1e-4, atol=1e-5)


def test_hvp_is_twice_the_hessian_times_the_gradient():
    weight = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    state = torch.randn(1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    signal, logp = head_signal(lambda leaves: (leaves[0] @ weight.T).log_softmax(dim=-1)[:, 2], [state], "hvp")

    def loss(h):
        return -(weight @ h).softmax(dim=0)[2] / logp.exp()[0]

    hessian = torch.autograd.functional.hessian(loss, state[0])
    gradient = torch.autograd.functional.jacobian(loss, state[0])
    torch.testing.assert_close(signal[0], (2 * hessian @ gradient).float())


@pytest.mark.parametrize("kind", ["first", "hvp"])
def test_works_under_inference_mode_and_leaves_no_gradient(kind):
    policy = one_token_policy()
    batch = batch_of(HISTORIES, SEEN, TARGETS)
    plain = ours(policy, batch, policy.completion_states(policy.run_prompt(batch), batch["target"][:, None]), kind)
    with torch.inference_mode():
        batch = {name: value.clone() for name, value in batch.items()}
        states = policy.completion_states(policy.run_prompt(batch), batch["target"][:, None])
        signal, logp = ours(policy, batch, states, kind)
    torch.testing.assert_close(signal, plain[0])
    assert not signal.requires_grad
    assert not logp.requires_grad
    assert all(parameter.grad is None for parameter in policy.parameters())
