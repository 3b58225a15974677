"""The reference policy: what it is, that it stays, and that a resumed run has the same."""

import copy

import pytest
import torch
from helpers.plain_policy import PlainPolicy
from helpers.slow import slow
from lightning.pytorch import Callback

from minirec_pl import GRPORecModule, InputError
from minirec_pl.grpo.reference import adapters_off, is_fresh_lora

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode"),
]
SMALL = {"warm_fraction": 0.9}  # a pool of 77 samples


def popular(completions, **columns):
    """A reward in which most groups differ: 1, 0.5 or 0 by the item's number."""
    return [(int(item.removeprefix("i")) % 3) / 2 for item in completions]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.3)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.05)


class Watch(Callback):
    def __init__(self):
        self.kl, self.policies, self.ref_logps, self.references = [], [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.kl.append(float(trainer.logged_metrics["kl"]))
        self.policies.append(copy.deepcopy(pl_module.policy))
        self.ref_logps.append(pl_module.generation.batches[0])
        self.references.append(copy.deepcopy(pl_module.reference))


class SaveAt(Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


def with_lora(policy, rank=2, fresh=True, dtype=torch.float32):
    """The policy with LoRA in its attention, as transformers and peft put it there."""
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'minirec-pl[dev]'")
    torch.manual_seed(5)
    policy.model.add_adapter(peft.LoraConfig(r=rank, target_modules=["q_proj", "v_proj"], init_lora_weights=fresh))
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return policy


def fit(make_trainer, module, data, extra=(), ckpt_path=None, **options):
    watch = Watch()
    trainer = make_trainer(**{"max_epochs": 1, "log_every_n_steps": 1, **options}, callbacks=[watch, *extra])
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return watch


def check_ref_logps(batch, policy):
    """Its log-probabilities are those of `policy` by definition, a completion at a time."""
    plain = PlainPolicy(policy)
    for b in range(3):
        history, seen = ([i for i in batch.batch[key][b].tolist() if i >= 0] for key in ("history", "seen"))
        for g, item in enumerate(batch.items[b].tolist()):
            truth = float(plain.item_logp(history, seen, item).detach())
            assert float(batch.ref_logps[b, g].sum()) == pytest.approx(truth, abs=1e-4)


def test_a_fresh_lora_is_its_own_reference_with_the_adapter_off(tiny_policy, toy_data, make_trainer):
    base, policy = tiny_policy(), with_lora(tiny_policy())
    module = GRPORecModule(policy, [popular], num_generations=4, optimizer=adam, beta=0.05)
    watch = fit(make_trainer, module, toy_data(**SMALL))
    assert module.reference is None
    assert watch.kl[0] == pytest.approx(0, abs=1e-7)
    assert watch.kl[-1] > 1e-5
    for batch in (watch.ref_logps[0], watch.ref_logps[-1]):
        check_ref_logps(batch, base)
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    weights = base.state_dict()
    for name, value in policy.state_dict().items():
        if "lora_" not in name:
            assert torch.equal(value, weights[name.replace(".base_layer", "")])
    with adapters_off(policy):
        torch.testing.assert_close(
            policy.item_logps(watch.ref_logps[0].batch), base.item_logps(watch.ref_logps[0].batch)
        )
    assert not is_fresh_lora(policy)


def test_adapters_are_put_back_after_an_error(tiny_policy):
    policy = with_lora(tiny_policy(), fresh=False)
    batch = {name: torch.tensor([[1, 2, 3]]) for name in ("history", "seen")}
    before, grads = policy.item_logps(batch), [p.requires_grad for p in policy.parameters()]
    without = []

    def fail():
        with adapters_off(policy):
            without.append(policy.item_logps(batch))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert not torch.allclose(without[0], before)
    assert torch.equal(policy.item_logps(batch), before)
    assert [p.requires_grad for p in policy.parameters()] == grads


@pytest.mark.parametrize("kind", ["trained lora", "lora and embeddings", "synced lora", "all weights"])
def test_otherwise_it_is_a_frozen_copy(tiny_policy, toy_data, make_trainer, kind):
    policy = tiny_policy() if kind == "all weights" else with_lora(tiny_policy(), fresh=kind != "trained lora")
    if kind == "lora and embeddings":
        policy.model.get_input_embeddings().requires_grad_(True)
    start = copy.deepcopy(policy)
    options = {"sync_ref_model": kind == "synced lora"}
    module = GRPORecModule(policy, [popular], num_generations=4, optimizer=adam, beta=0.05, **options)
    watch = fit(make_trainer, module, toy_data(**SMALL))
    assert watch.kl[0] == pytest.approx(0, abs=1e-7)
    assert watch.kl[-1] > 1e-5
    check_ref_logps(watch.ref_logps[-1], start)
    expected = start.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in module.reference.state_dict().items())
    assert not any(p.requires_grad for p in module.reference.parameters())


def test_without_beta_there_is_none(tiny_policy, toy_data, make_trainer):
    module = GRPORecModule(tiny_policy(), [popular], num_generations=4)
    module.configure_model()
    assert module.reference is None
    make_trainer(max_epochs=1).fit(module, toy_data(**SMALL))
    assert module.generation.batches[0].ref_logps is None


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_reference_moves_after_the_policy(tiny_policy, toy_data, make_trainer, accumulate):
    policy = tiny_policy()
    expected = [p.detach().clone() for p in policy.parameters()]
    options = {"sync_ref_model": True, "ref_model_sync_steps": 3, "ref_model_mixup_alpha": 0.25}
    module = GRPORecModule(policy, [popular], num_generations=4, optimizer=sgd, beta=0.05, **options)
    watch = fit(make_trainer, module, toy_data(**SMALL, batch_size=4), accumulate_grad_batches=accumulate, max_epochs=2)
    per_epoch = 20
    moved = steps = 0
    for batch, (policy, reference) in enumerate(zip(watch.policies, watch.references, strict=True)):
        stepped = (batch % per_epoch + 1) % accumulate == 0
        steps += stepped
        if stepped and steps % 3 == 0:
            moved += 1
            expected = [0.25 * p.detach() + 0.75 * old for p, old in zip(policy.parameters(), expected, strict=True)]
        for ours, truth in zip(reference.parameters(), expected, strict=True):
            torch.testing.assert_close(ours, truth)
    assert moved == {1: 13, 2: 6}[accumulate]


@pytest.mark.parametrize("step", [slow(3), 4])
@pytest.mark.parametrize("kind", ["copy", "synced", "lora"])
def test_a_resumed_run_has_the_same_reference(tiny_policy, toy_data, make_trainer, tmp_path, kind, step):
    options = {"sync_ref_model": True, "ref_model_sync_steps": 3} if kind == "synced" else {}

    def run(extra=(), ckpt_path=None):
        policy = with_lora(tiny_policy()) if kind == "lora" else tiny_policy()
        torch.manual_seed(3)
        module = GRPORecModule(policy, [popular], num_generations=4, optimizer=sgd, beta=0.05, **options)
        return module, fit(make_trainer, module, toy_data(**SMALL), extra, ckpt_path)

    whole, watched = run([SaveAt(step, tmp_path / "a.ckpt")])
    resumed, after = run(ckpt_path=tmp_path / "a.ckpt")
    assert after.kl == watched.kl[step:]
    assert after.kl[0] > 0
    state = resumed.state_dict()
    assert any(name.startswith("reference.") for name in state) == (kind != "lora")
    assert all(torch.equal(value, state[name]) for name, value in whole.state_dict().items())


def test_a_lora_checkpoint_that_does_not_fit(tiny_policy, toy_data, make_trainer, tmp_path):
    path = tmp_path / "a.ckpt"
    module = GRPORecModule(with_lora(tiny_policy()), [popular], num_generations=4)
    make_trainer(max_epochs=1, limit_train_batches=2, callbacks=[SaveAt(2, path)]).fit(module, toy_data(**SMALL))

    def resume(policy, **options):
        make_trainer(max_epochs=2).fit(GRPORecModule(policy, [popular], **options), toy_data(**SMALL), ckpt_path=path)

    with pytest.raises(InputError, match=r"lora_A.* is \[2, 16\] float32 there and \[3, 16\] float32 here"):
        resume(with_lora(tiny_policy(), rank=3))
    with pytest.raises(InputError, match=r"lora_A.* is \[2, 16\] float32 there and \[2, 16\] bfloat16 here"):
        resume(with_lora(tiny_policy(), dtype=torch.bfloat16))
    with pytest.raises(InputError, match=r"q_proj\.\S+' is only in the checkpoint; use the adapters"):
        resume(tiny_policy())
    with pytest.raises(InputError, match=r"'reference\..* is only here; use the adapters, the model and the beta"):
        resume(with_lora(tiny_policy(), fresh=False), beta=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sync_ref_model": True}, "sync_ref_model moves the reference, but beta is 0"),
        ({"ref_model_sync_steps": 0}, "ref_model_sync_steps is 0"),
        ({"ref_model_mixup_alpha": 1.1}, r"ref_model_mixup_alpha is 1\.1: it is the policy's share"),
    ],
)
def test_options_out_of_range(tiny_policy, options, message):
    with pytest.raises(InputError, match=message):
        GRPORecModule(tiny_policy(), **options)
