"""Signals of a policy against its plain definition in float64: autograd sample by sample and finite differences."""

import copy

import pytest
import torch
from helpers.plain_policy import PlainPolicy, batch_of, many_token_policy, one_token_policy
from peft import LoraConfig, inject_adapter_in_model

from minirec_pl import InputError
from minirec_pl.policy import target_signals as probes
from minirec_pl.probes import target_signals
from minirec_pl.selection.probes.per_sample import project_gradients
from minirec_pl.selection.probes.trajectory import Trajectory
from minirec_pl.utils.modules import evaluation_mode

HISTORIES, SEEN = [[3], [0, 5, 2, 7], [], [11, 1], [4]], [[3], [0, 5, 2, 7, 9], [], [1, 11], [4, 10]]
TARGETS = [0, 8, 6, 4, 10]  # the last one is among the seen items
TEMPERATURE = 0.8


@pytest.fixture(params=["one token", "many tokens"])
def policy(request, tmp_path):
    return one_token_policy() if request.param == "one token" else many_token_policy(tmp_path / "policy")


def with_adapters(policy):
    """LoRA by peft, its B matrices away from their zeros, dropout on."""
    config = LoraConfig(r=2, lora_dropout=0.4, target_modules=["q_proj", "v_proj", "down_proj"])
    inject_adapter_in_model(config, policy.model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return policy


def batch():
    return batch_of(HISTORIES, SEEN, TARGETS)


def measure(policy, kind="first", space="answer", trajectory=None, rows=None):
    some = batch() if rows is None else {name: value[rows] for name, value in batch().items()}
    with evaluation_mode(policy):
        states = policy.completion_states(policy.run_prompt(some), some["target"][:, None])
    return target_signals(policy, states, some, TEMPERATURE, kind, space, trajectory or Trajectory())


@pytest.fixture
def at_the_head(policy):
    """(states in float64, from states and head to log p of one sample) by the definition of the constrained policy."""
    some = batch()
    with evaluation_mode(policy):
        states = policy.completion_states(policy.run_prompt(some), some["target"][:, None])
    head = policy.model.get_output_embeddings().weight.detach().double()
    ids = [[t for t in row if t >= 0] for row in policy.trie.item_tokens.tolist()]

    def log_p(b, leaves, weight=head):
        prompt, rest = leaves
        total = 0.0
        for depth, token in enumerate(ids[TARGETS[b]]):
            state = prompt[b] if depth == 0 else rest[b, 0, depth - 1]
            open_ids = [t for i, t in enumerate(ids) if i not in SEEN[b] and t[:depth] == ids[TARGETS[b]][:depth]]
            allowed = sorted({t[depth] for t in open_ids if len(t) > depth})
            logits = weight[allowed] @ state / TEMPERATURE
            total = total + logits.log_softmax(dim=0)[allowed.index(token)]
        return total

    return [part.double() for part in states], head, log_p


def test_first_equals_finite_differences_of_p(policy, at_the_head):
    exact, _, log_p = at_the_head
    measured = measure(policy)
    assert measured.tokens == 0
    width, step = exact[0].shape[-1], 1e-5
    for b in range(4):
        assert float(measured.logp[b]) == pytest.approx(float(log_p(b, exact)), abs=1e-5)
        expected = torch.zeros(width, dtype=torch.float64)
        for which, part in enumerate(exact):
            for column in range(part[b].numel()):
                moved = []
                for sign in (1, -1):
                    changed = part.clone()
                    changed[b].view(-1)[column] += sign * step
                    moved.append(log_p(b, [changed if i == which else other for i, other in enumerate(exact)]).exp())
                expected[column % width] -= (moved[0] - moved[1]) / (2 * step)
        torch.testing.assert_close(measured.gradient[b].double(), expected, rtol=1e-4, atol=1e-6)


def test_hvp_equals_the_published_formula_sample_by_sample(policy, at_the_head):
    exact, _, log_p = at_the_head
    signal = measure(policy, "hvp").gradient
    for b in range(4):
        leaves = [part.clone().requires_grad_() for part in exact]
        used = [leaf for leaf in leaves if leaf.numel()]
        p = log_p(b, leaves).exp()
        gradient = torch.autograd.grad(-p / p.detach(), used, create_graph=True)
        product = torch.autograd.grad(sum((g[b] * g[b]).sum() for g in gradient), used)
        expected = sum(g[b].reshape(-1, g.shape[-1]).sum(dim=0) for g in product)
        torch.testing.assert_close(signal[b].double(), expected, rtol=1e-4, atol=1e-5)


def test_log_p_is_that_of_the_policy(policy):
    some = batch()
    logps, _, _ = policy.completion_logps(some, some["target"][:, None], TEMPERATURE)
    torch.testing.assert_close(measure(policy).logp[:4], logps.sum(dim=(1, 2))[:4])


@pytest.mark.parametrize("space", ["answer", "lora"])
@pytest.mark.parametrize("kind", ["first", "hvp", "trajectory"])
def test_a_target_that_cannot_be_generated_has_no_signal(policy, kind, space):
    if (kind, space) == ("hvp", "lora"):
        return
    trajectory = started(policy, kind, space)
    measured = measure(policy, kind, space, trajectory)
    assert measured.logp[4] == -torch.inf
    assert (measured.gradient[4] == 0).all()
    assert torch.isfinite(measured.gradient).all()
    assert kind != "trajectory" or measured.alignment[4] == 0


def plain_gradients(policy):
    """d log p / dtheta [4, ...] by name for the trainable parameters, in float64."""
    plain = PlainPolicy(policy)
    trained = {f"model.{n}": p for n, p in plain.model.named_parameters() if p.requires_grad}
    rows = [
        torch.autograd.grad(
            plain.item_logp(HISTORIES[b], SEEN[b], TARGETS[b], TEMPERATURE),
            list(trained.values()),
            materialize_grads=True,
        )
        for b in range(4)
    ]
    return {name: torch.stack(parts) for name, parts in zip(trained, zip(*rows, strict=True), strict=True)}


@pytest.mark.parametrize("adapters", [True, False])
def test_lora_is_the_gradient_of_p_by_the_trainable_parameters(policy, adapters):
    policy = with_adapters(policy) if adapters else policy
    policy.train()
    measured = measure(policy, space="lora")
    truth = plain_gradients(policy)
    assert all(("lora" in name) == adapters for name in truth)
    expected = -measured.logp[:4].double().exp()[:, None] * project_gradients(truth)
    assert measured.gradient.shape == (5, 512)
    torch.testing.assert_close(measured.gradient[:4].double(), expected, rtol=1e-3, atol=1e-5)
    assert float(expected.abs().max()) > 1e-2
    lengths = [1 + sum(len(PlainPolicy(policy).ids[i]) for i in history) for history in HISTORIES]
    fed = [len(PlainPolicy(policy).ids[target]) - 1 for target in TARGETS]
    assert measured.tokens == sum(lengths) + sum(fed)


def started(policy, kind, space):
    """A trajectory on which every trainable parameter has moved by known numbers."""
    trajectory = Trajectory()
    if kind == "trajectory":
        assert measure(policy, kind, space, trajectory).alignment is None
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return trajectory


def test_trajectory_in_the_space_answer_is_the_cosine_on_the_head(policy):
    before = policy.model.get_output_embeddings().weight.detach().clone()
    trajectory = started(policy, "trajectory", "answer")
    head = policy.model.get_output_embeddings().weight.detach()
    measured = measure(policy, "trajectory", trajectory=trajectory)
    torch.testing.assert_close(measured.gradient, measure(policy).gradient, rtol=0, atol=0)
    plain = PlainPolicy(policy)
    for parameter in plain.model.parameters():
        parameter.requires_grad_(False)
    weight = plain.model.get_output_embeddings().weight.requires_grad_()
    rows = sorted({token for item in plain.ids for token in item})
    way = (head - before).double()[rows].flatten()
    for b in range(4):
        (gradient,) = torch.autograd.grad(plain.item_logp(HISTORIES[b], SEEN[b], TARGETS[b], TEMPERATURE), weight)
        truth = torch.nn.functional.cosine_similarity(gradient[rows].flatten(), way, dim=0)
        assert float(measured.alignment[b]) == pytest.approx(float(truth), abs=1e-4)
    assert measured.alignment.abs().max() > 0.02


def test_trajectory_in_the_space_lora_is_the_cosine_on_the_adapters(policy):
    policy = with_adapters(policy)
    before = {name: parameter.detach().double().clone() for name, parameter in policy.named_parameters()}
    trajectory = started(policy, "trajectory", "lora")
    measured = measure(policy, "trajectory", "lora", trajectory)
    gradients = plain_gradients(policy)
    now = dict(policy.named_parameters())
    way = torch.cat([(now[name].detach().double() - before[name]).flatten() for name in gradients])
    long = torch.cat([gradient.flatten(1) for gradient in gradients.values()], dim=1)
    truth = torch.nn.functional.cosine_similarity(long, way[None], dim=1)
    torch.testing.assert_close(measured.alignment[:4].double(), truth, rtol=0, atol=1e-4)
    assert set(trajectory.start) == set(gradients)


CASES = [("first", "answer"), ("hvp", "answer"), ("trajectory", "answer"), ("first", "lora"), ("trajectory", "lora")]


@pytest.mark.parametrize(("kind", "space"), CASES)
def test_neither_batch_nor_portions_nor_mode_nor_inference_matter(policy, kind, space, monkeypatch):
    policy = with_adapters(policy) if space == "lora" else policy
    trajectory = started(policy, kind, space)
    policy.eval()
    whole = measure(policy, kind, space, trajectory)

    def same(other, rows):
        torch.testing.assert_close(other.gradient, whole.gradient[rows], rtol=1e-4, atol=1e-5)
        assert not other.gradient.requires_grad
        if kind == "trajectory":
            torch.testing.assert_close(other.alignment, whole.alignment[rows], rtol=1e-4, atol=1e-5)

    for rows in ([2], [3, 0, 2]):
        same(measure(policy, kind, space, trajectory, rows), rows)
    policy.train()
    with torch.inference_mode():
        same(measure(policy, kind, space, trajectory), slice(None))
    assert all(child.training for child in policy.modules())
    monkeypatch.setattr(probes, "_TOKENS", 1)
    monkeypatch.setattr(probes, "_VALUES", 1)
    same(measure(policy, kind, space, trajectory), slice(None))
    assert all(parameter.grad is None for parameter in policy.parameters())


def test_a_trajectory_of_the_start_is_kept_whatever_happens_to_the_weights(policy):
    head = policy.model.get_output_embeddings().weight
    before = head.detach().clone()
    with torch.inference_mode():
        trajectory = started(policy, "trajectory", "answer")
    assert torch.equal(trajectory.start["head"], before)
    assert not trajectory.start["head"].is_inference()
    resumed = Trajectory()
    resumed.start = copy.deepcopy(trajectory.start)
    first = measure(policy, "trajectory", trajectory=trajectory)
    assert torch.equal(measure(policy, "trajectory", trajectory=resumed).alignment, first.alignment)
    with torch.no_grad():
        head.copy_(before)
    assert measure(policy, "trajectory", trajectory=trajectory).alignment is None


def test_what_cannot_be_measured_is_refused(policy):
    with pytest.raises(InputError, match=r"gradient='hvp' needs a second backward pass .* set gradient_space='answer'"):
        measure(policy, "hvp", "lora")
    policy = with_adapters(policy)
    with pytest.raises(InputError, match=r"the head, which is not trained here: set gradient_space='lora'"):
        measure(policy, "trajectory", "answer")
    policy.requires_grad_(False)
    with pytest.raises(InputError, match=r"the trainable parameters, and the policy has none"):
        measure(policy, "first", "lora")
