"""HeadProbe against autograd and finite differences; and that it leaves no trace in the module."""

import contextlib
import random
from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from torch import nn
from transformers import BatchEncoding, BertConfig, BertForTokenClassification

from minirec_pl import InputError
from minirec_pl.probes import HeadProbe

Pair = namedtuple("Pair", "x y")


class Net(nn.Module):
    """Dropout and batch norm, so that a pass in training mode would show."""

    def __init__(self, outputs=4, bias=True):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5))
        self.classifier = nn.Linear(5, outputs, bias=bias)

    def forward(self, x):
        return self.classifier(self.body(x))


def net(**options):
    torch.manual_seed(0)
    return Net(**options)


def batch_of(n=7, classes=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 6, generator=generator), torch.randint(classes, (n,), generator=generator)


def take(module, batch, n=7, gradient="first", **options):
    return HeadProbe(**{"head": "classifier", **options})(module, batch, torch.arange(n), gradient)


def by_autograd(module, x, loss):
    """d loss_i / d h_i in float64, sample by sample."""
    module = module.double().eval()
    rows = []
    for i in range(len(x)):
        h = module.body(x[i : i + 1].double()).detach().requires_grad_()
        (row,) = torch.autograd.grad(loss(module.classifier(h)[0], i), h)
        rows.append(row[0])
    return torch.stack(rows)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 9), st.integers(2, 6), st.booleans())
def test_cross_entropy_gradient_equals_autograd(n, classes, bias):
    module, (x, y) = net(outputs=classes, bias=bias), batch_of(n, classes)
    signals = take(module, (x, y), n)
    expected = by_autograd(module, x, lambda z, i: nn.functional.cross_entropy(z[None], y[i : i + 1]))
    torch.testing.assert_close(signals.gradient.double(), expected, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        hidden = module.body(x.double())
        p = torch.stack(
            [module.classifier(h).exp()[t] / module.classifier(h).exp().sum() for h, t in zip(hidden, y, strict=True)]
        )
    torch.testing.assert_close(signals.embedding.double(), hidden, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(signals.rewards[:, 0].double(), p, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("outputs", [1, 3])
def test_squared_error_gradient_equals_finite_differences(outputs):
    module, (x, _) = net(outputs=outputs), batch_of()
    y = torch.randn(7, outputs).squeeze(1)
    signals = take(module, (x, y))
    module = module.double().eval()
    hidden, step = module.body(x.double()).detach(), 1e-6

    def loss(h, i):
        return float(((module.classifier(h).detach() - y[i]) ** 2).mean())

    for i, h in enumerate(hidden):
        for column in range(5):
            moved = [h.clone(), h.clone()]
            moved[0][column] += step
            moved[1][column] -= step
            slope = (loss(moved[0], i) - loss(moved[1], i)) / (2 * step)
            assert float(signals.gradient[i, column]) == pytest.approx(slope, abs=1e-5)
        error = loss(h, i)
        assert float(signals.rewards[i]) == pytest.approx(1 - error / (1 + error), abs=1e-5)


def test_hvp_is_twice_the_hessian_times_the_gradient():
    module, (x, y) = net(), batch_of()
    signal = take(module, (x, y), gradient="hvp").gradient
    module = module.double().eval()
    for i in range(7):
        h = module.body(x[i : i + 1].double())[0].detach()
        p = float(module.classifier(h).softmax(0)[y[i]].detach())

        def loss(state, i=i, p=p):
            return -module.classifier(state).softmax(dim=0)[y[i]] / p

        hessian = torch.autograd.functional.hessian(loss, h)
        gradient = torch.autograd.functional.jacobian(loss, h)
        torch.testing.assert_close(signal[i].double(), 2 * hessian @ gradient, rtol=1e-4, atol=1e-5)


def test_positions_are_averaged_and_ignored_ones_do_not_count():
    class Sequence(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 5), nn.Linear(5, 9)

        def forward(self, ids):
            return self.head(self.embed(ids))

    torch.manual_seed(0)
    module = Sequence()
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    y = torch.tensor([[2, 3, -100], [-100, -100, 7]])
    signals = take(module, (ids, y), 2, head="head")
    for b in range(2):
        h = module.embed(ids[b]).detach().requires_grad_()
        loss = nn.functional.cross_entropy(module.head(h), y[b])
        (gradient,) = torch.autograd.grad(loss, h)
        torch.testing.assert_close(signals.gradient[b], gradient.sum(dim=0))
        known = y[b] >= 0
        torch.testing.assert_close(signals.embedding[b], h[known].mean(dim=0).detach())
        p = module.head(h).softmax(-1)[known].gather(1, y[b][known][:, None]).mean()
        torch.testing.assert_close(signals.rewards[b, 0], p.detach())


def test_batches_by_position_key_attribute_and_function():
    module, (x, y) = net(), batch_of()
    expected = take(module, (x, y)).gradient
    for batch, forward, target in [
        ({"x": x, "y": y}, "x", "y"),
        (Pair(x, y), "x", "y"),
        ([y, x], 1, 0),
        ({"a": [x], "b": y}, lambda m, b: m(b["a"][0]), lambda b: b["b"]),
    ]:
        assert torch.equal(take(module, batch, forward=forward, target=target).gradient, expected)


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_signals_are_float32_whatever_the_precision_around(values, default):
    """Only the module's own pass is in it: what is made of its output is not rounded."""
    module, (x, y) = net(outputs=1 if values else 4), batch_of()
    y = torch.randn(7, dtype=torch.float64) if values else y
    seen = {}
    module.classifier.register_forward_hook(lambda _, inputs, output: seen.update(h=inputs[0], z=output))
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            signals = take(module, (x, y))
    finally:
        torch.set_default_dtype(before)
    assert {t.dtype for t in (signals.rewards, signals.gradient, signals.embedding)} == {torch.float32}
    z = seen["z"].double()
    slope = 2 * (z - y[:, None]) if values else z.softmax(dim=1) - nn.functional.one_hot(y, 4)
    expected = slope @ module.classifier.weight.detach().double()
    torch.testing.assert_close(signals.gradient.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_reward_of_the_users_own_gets_outputs_and_targets():
    module, (x, y) = net(), batch_of()
    signals = take(module, (x, y), reward=lambda z, t: (z.argmax(dim=1) == t).float())
    with torch.no_grad():
        expected = [float(module.eval()(row[None]).argmax() == target) for row, target in zip(x, y, strict=True)]
    assert signals.rewards[:, 0].tolist() == expected


def test_only_the_signals_asked_for_are_taken():
    signals = take(net(), batch_of(), signals=["reward", "embedding"])
    assert signals.gradient is None
    assert signals.rewards is not None
    assert signals.embedding is not None
    with pytest.raises(InputError, match=r"signals is \['grad'\]: name some of reward, gradient, embedding"):
        HeadProbe("classifier", signals=["grad"])


def test_a_layer_that_is_called_by_keyword():
    class ByKeyword(Net):
        def forward(self, x):
            return self.classifier(input=self.body(x))

    torch.manual_seed(0)
    module = ByKeyword()
    assert torch.equal(take(module, batch_of()).gradient, take(net(), batch_of()).gradient)


class Broken(Net):
    def forward(self, x):
        torch.rand(1), random.random(), np.random.rand()
        self.eval()
        super().forward(x)
        raise RuntimeError("user's own")


@pytest.mark.parametrize("cls", [Net, Broken])
def test_nothing_is_left_behind(cls):
    torch.manual_seed(0)
    module, batch = cls(), batch_of()
    module.body[1].eval()
    own = module.classifier.register_forward_hook(lambda *_: None)
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    modes = [child.training for child in module.modules()]
    random_states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with contextlib.nullcontext() if cls is Net else pytest.raises(RuntimeError, match="user's own"):
        take(module, batch)
    assert [child.training for child in module.modules()] == modes
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    assert list(module.classifier._forward_hooks) == [own.id]
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == random_states[1:]
    assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.is_grad_enabled()


class Twice(Net):
    def forward(self, x):
        return super().forward(x) + super().forward(-x)


class Never(Net):
    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize(
    ("module", "options", "batch", "words"),
    [
        (
            Net(),
            {"head": "body"},
            batch_of(),
            "Net has a Sequential as 'body': name its last nn.Linear .* body.0, classifier",
        ),
        (Net(), {"head": "fc"}, batch_of(), "Net has no layer 'fc': .*classifier"),
        (Twice(), {}, batch_of(), "'classifier' was called 2 times"),
        (Never(), {}, batch_of(), "'classifier' was called 0 times"),
        (Net(), {"forward": "x"}, batch_of(), "the batch, a tuple, has no 'x': set HeadProbe's `forward`"),
        (Net(), {"target": 2}, batch_of(), "the batch, a tuple, has no 2: set HeadProbe's `target`"),
        (Net(), {}, (batch_of()[0], [1] * 7), "the target of HeadProbe is a list"),
        (Net(), {}, batch_of(6), "gives 6 rows for a batch of 7 samples"),
        (Net(), {}, (batch_of()[0], torch.full((7,), 4)), r"has 4 outputs and the targets lie in 4\.\.4"),
        (Net(1), {}, (batch_of()[0], torch.zeros(7).long()), "has 1 outputs.*let `target` give floats"),
        (Net(), {}, (batch_of()[0], torch.zeros(7)), r"gives \[7, 4\] and the targets are \[7\] torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(module, options, batch, words):
    with pytest.raises(InputError, match=words) as error:
        take(module, batch, **options)
    assert "\n" not in str(error.value)


class Named(Net):
    """Its inputs have names."""

    def forward(self, *, x, mask=None, labels=None):
        assert labels is None
        return super().forward(x if mask is None else x * mask)


class Whole(Net):
    def forward(self, batch):
        return super().forward(batch["features"])


class Open(Net):
    def forward(self, **inputs):
        (x,) = inputs.values()
        return super().forward(x)


class NeedsLabels(Net):
    def forward(self, x, labels, other=1):
        assert len(labels) == len(x)
        return super().forward(x)


@pytest.mark.parametrize("kind", [dict, UserDict, BatchEncoding])
def test_a_mapping_is_passed_by_name(kind):
    x, y = batch_of()
    expected = take(net(), (x, y)).gradient
    for cls, batch in [
        (Net, {"x": x, "y": y}),
        (Net, {"x": x, "label": y, "sample_id": torch.arange(7), "items": y}),
        (Named, {"labels": y, "x": x}),
        (Named, {"x": x, "mask": torch.ones(7, 1), "labels": y}),
        (Whole, {"features": x, "target": y}),
        (Open, {"whatever": x, "targets": y}),
        (NeedsLabels, {"x": x, "labels": y}),
    ]:
        torch.manual_seed(0)
        assert torch.equal(take(cls(), kind(batch)).gradient, expected), (cls, list(batch))
    torch.manual_seed(0)
    named = Named()
    for batch, options in [((x, y), {}), (kind({"x": x, "items": y}), {"forward": "x", "target": "items"})]:
        assert torch.equal(take(named, batch, **options).gradient, expected)


class Inside(Net, LightningModule):
    """All that training needs is in `training_step`."""

    forward = LightningModule.forward


@pytest.mark.parametrize(
    ("module", "batch", "words"),
    [
        (Net(), {"x": 0, "a": 0}, "keys x, a, none of them out of labels, label, .*: set HeadProbe's `target`"),
        (Net(), {"x": 0, "labels": 0, "y": 0}, "keys x, labels, y, 2 of them out of .*: set HeadProbe's `target`"),
        (
            Net(),
            {"features": 0, "y": 0},
            "Net.forward takes x and the batch has the keys features, y: .*forward=lambda",
        ),
        (NeedsLabels(), {"x": 0, "y": 0}, "NeedsLabels.forward takes x, labels, other and the batch has the keys x, y"),
        (NeedsLabels(), (0, 0), "NeedsLabels.forward takes x, labels, other and the batch has no names: .*forward="),
        (Inside(), {"x": 0, "y": 0}, "Inside has no forward: say what is run with HeadProbe"),
        (Inside(), (0, 0), "Inside has no forward: say what is run with HeadProbe"),
    ],
)
def test_a_batch_that_could_mean_several_things_is_refused(module, batch, words):
    with pytest.raises(InputError, match=words):
        take(module, batch)


def test_labels_of_several_positions_are_named():
    """They are those of the same positions in one model, and of the next in another."""
    model = BertForTokenClassification(
        BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
        )
    ).eval()
    ids = torch.randint(20, (7, 5))
    batch = BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids % 3})
    with pytest.raises(
        InputError, match=r"called at 5 positions .* shifted by one: set HeadProbe's `target` to 'labels'"
    ):
        take(model, batch)
    signals = take(model, batch, target="labels")
    with torch.no_grad():
        p = model(ids, batch["attention_mask"]).logits.softmax(-1).gather(2, batch["labels"][..., None])
    torch.testing.assert_close(signals.rewards[:, 0], p.mean(dim=(1, 2)))


def compiled_inside(module):
    module.body = torch.compile(module.body, backend="eager")
    module.classifier = torch.compile(module.classifier, backend="eager")
    return module


def compiled_in_place(module):
    module.compile(backend="eager")
    return module


@pytest.mark.parametrize(
    "compile_", [lambda module: torch.compile(module, backend="eager"), compiled_inside, compiled_in_place]
)
@pytest.mark.parametrize("head", ["classifier", "_orig_mod.classifier"])
def test_a_compiled_module_is_read_by_its_own_names_after_it_has_run(compile_, head):
    torch._dynamo.reset()
    (x, y), module = batch_of(), net().eval()
    expected = take(module, (x, y)).gradient
    compiled = compile_(module)
    with torch.no_grad():
        before = compiled(x)  # its graph is made without the hook
        for batch in ((x, y), {"x": x, "y": y}):
            assert torch.equal(HeadProbe(head)(compiled, batch, torch.arange(7)).gradient, expected)
        assert torch.equal(compiled(x), before)
    with pytest.raises(InputError, match=r"Net has no layer 'fc': .*one of body.0, classifier$"):
        HeadProbe("fc")(compiled, (x, y), torch.arange(7))
