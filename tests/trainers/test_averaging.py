"""Callbacks that average weights, on a policy with adapters: what their checkpoints hold and how they resume."""

import pytest
import torch
from helpers.text_policy import write_model
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging

from minirec_pl import GRPORecModule, RecDataModule
from minirec_pl.policy import LanguageModel, Lora, PromptTemplate, RetrievalPolicy
from minirec_pl.utils.checkpoints import load_policy_weights, weights_digest, weights_under_adapters

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
CALLBACKS = {
    "none": lambda: [],
    "ema": lambda: [EMAWeightAveraging(decay=0.7)],
    "mean": lambda: [WeightAveraging()],
    "swa": lambda: [StochasticWeightAveraging(0.05, swa_epoch_start=1)],
}


class SaveAt(Callback):
    def __init__(self, path, hook, visit):
        self.path, self.visit, self.visits = path, visit, 0
        setattr(self, hook, self._pass)

    def _pass(self, trainer, *_):
        self.visits += 1
        if self.visits == self.visit:
            trainer.save_checkpoint(self.path)


@pytest.fixture
def fit(tmp_path, toy_path, make_trainer):
    """Trains a policy with adapters: (module, its state, that of its average if there is one, its trainer)."""

    def policy():
        if not (tmp_path / "model").is_dir():
            write_model(tmp_path / "model")
        model = LanguageModel(str(tmp_path / "model"), dtype="float32", lora=Lora(r=2, alpha=4, dropout=0.2))
        return RetrievalPolicy(
            model,
            prompt=PromptTemplate(system="", user="{history}", age=""),
            max_completion_length=2,
            similarity_temperature=0.1,
        )

    def run(callbacks, place=None, ckpt_path=None, beta=0.0, **options):
        torch.manual_seed(0)
        module = GRPORecModule(
            policy(),
            num_generations=3,
            beta=beta,
            sync_ref_model=beta > 0,
            ref_model_sync_steps=3,
            optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        )
        savers = [] if place is None else [SaveAt(tmp_path / "saved.ckpt", *place)]
        made = CALLBACKS[callbacks]()
        trainer = make_trainer(
            callbacks=[*made, *savers],
            limit_train_batches=4,
            limit_val_batches=1,
            val_check_interval=2,
            accumulate_grad_batches=2,
            **options,
        )
        data = RecDataModule(
            str(toy_path), "toy", warm_fraction=0.5, batch_size=3, eval_batch_size=4, seed=1, history_window=2
        )
        trainer.fit(module, data, ckpt_path=ckpt_path)
        average = getattr(made[0], "_average_model", None) if made else None
        own, averaged = (
            {} if one is None else {name: value.clone() for name, value in one.state_dict().items()}
            for one in (module, average)
        )
        return module, own, averaged, trainer

    run.policy = policy
    return run


def names_in(value):
    """The names of all tensors in a checkpoint, at any depth."""
    if isinstance(value, dict):
        return [
            name for key, part in value.items() for name in ([str(key)] if torch.is_tensor(part) else names_in(part))
        ]
    return [name for part in value for name in names_in(part)] if isinstance(value, list | tuple) else []


def bits(value):
    return value.reshape(-1).contiguous().view(torch.uint8)


def different(one, other):
    assert one.keys() == other.keys()
    return [name for name, value in one.items() if not torch.equal(bits(value), bits(other[name]))]


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("callbacks", ["ema", "mean", "swa", "none"])
def test_no_checkpoint_holds_what_is_under_the_adapters(fit, tmp_path, callbacks, beta):
    module, *_ = fit(
        callbacks, ("on_train_epoch_start", 2) if callbacks == "swa" else ("on_train_batch_end", 6), beta=beta
    )
    stored = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    fixed = weights_under_adapters(module.policy)
    assert len(fixed) > 10
    assert [name for name in names_in(stored) if any(name.endswith(fixed_name) for fixed_name in fixed)] == []
    kept = {name for name in module.state_dict() if not any(name.endswith(fixed_name) for fixed_name in fixed)}
    assert stored["state_dict"].keys() == kept
    if callbacks in ("ema", "mean"):
        assert stored["current_model_state"].keys() == kept
        assert "n_averaged" in stored["averaging_state"]


@pytest.mark.parametrize("callbacks", ["ema", "mean"])
def test_a_checkpoint_is_about_as_small_as_without_the_callback(fit, tmp_path, callbacks):
    sizes = []
    for each in ("none", callbacks):
        module, *_ = fit(each, ("on_train_batch_end", 6))
        stored = torch.load(tmp_path / "saved.ckpt", weights_only=True)
        sizes.append((tmp_path / "saved.ckpt").stat().st_size)
    extra = sum(v.numel() * v.element_size() for v in stored["current_model_state"].values())
    base = sum(v.numel() * v.element_size() for v in weights_under_adapters(module.policy).values())
    assert extra < 0.4 * base
    assert sizes[1] - sizes[0] < extra + 60_000  # names and what is left out, in words


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize(
    "place", [("on_train_batch_end", 3), ("on_train_batch_end", 2), ("on_validation_end", 2), ("on_train_epoch_end", 1)]
)
@pytest.mark.parametrize("callbacks", ["ema", "mean"])
def test_weights_and_their_average_resume_bit_for_bit(fit, tmp_path, callbacks, place, beta):
    _, own, averaged, _ = fit(callbacks, place, beta=beta)
    _, own_after, averaged_after, _ = fit(callbacks, ckpt_path=tmp_path / "saved.ckpt", beta=beta)
    assert averaged
    index = {n for n in averaged if "index." in n}  # a validation that is passed over would have encoded these anew
    assert set(different(own, own_after)) <= ({n.removeprefix("module.") for n in index} if place[1] == 2 else set())
    assert set(different(averaged, averaged_after)) <= (index if place[1] == 2 else set())


def test_swa_resumes_bit_for_bit(fit, tmp_path):
    _, own, *_ = fit("swa", ("on_train_epoch_end", 2), max_epochs=4)
    stored = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    (state,) = (s for s in stored["callbacks"].values() if "average_model_state" in s)
    assert state["average_model_state"] is not None
    _, own_after, *_ = fit("swa", ckpt_path=tmp_path / "saved.ckpt", max_epochs=4)
    assert different(own, own_after) == []


def test_averaging_leaves_frozen_weights_as_they_are(fit, tmp_path):
    module, _, averaged, _ = fit("ema")
    fresh = fit.policy()
    fresh.bind(module.policy.catalogue)
    before = weights_digest(weights_under_adapters(fresh))
    assert weights_digest(weights_under_adapters(module.policy)) == before
    inside = {n.removeprefix("module.policy."): v for n, v in averaged.items()}
    assert weights_digest({name: inside[name] for name in weights_under_adapters(fresh)}) == before


@pytest.mark.parametrize("with_callback", [False, True])
def test_the_average_is_what_is_validated_tested_and_served(fit, tmp_path, toy_path, make_trainer, with_callback):
    module, _, averaged, trainer = fit("ema", ("on_train_epoch_end", 2))
    data = RecDataModule(str(toy_path), "toy", warm_fraction=0.5, eval_batch_size=4, seed=1, history_window=2)
    trainer = make_trainer(callbacks=CALLBACKS["ema"]() if with_callback else [], limit_test_batches=2)
    expected = trainer.test(module, data, verbose=False)
    again = GRPORecModule(fit.policy(), num_generations=3)
    assert trainer.test(again, data, ckpt_path=tmp_path / "saved.ckpt", verbose=False) == expected
    served = fit.policy()
    served.bind(module.policy.catalogue)
    load_policy_weights(served, tmp_path / "saved.ckpt")
    trained = {n: p for n, p in served.named_parameters() if p.requires_grad}
    assert all(torch.equal(value, averaged[f"module.policy.{name}"]) for name, value in trained.items())


def test_a_checkpoint_of_0_1_resumes(fit, tmp_path):
    _, own, *_ = fit("none", ("on_train_epoch_end", 1))
    stored = torch.load(tmp_path / "saved.ckpt", weights_only=True)
    del stored["copies_left_out"]
    torch.save(stored, tmp_path / "old.ckpt")
    _, own_after, *_ = fit("none", ckpt_path=tmp_path / "old.ckpt")
    assert different(own, own_after) == []
