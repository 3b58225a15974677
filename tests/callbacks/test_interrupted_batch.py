"""A checkpoint saved on an error inside `training_step`: the batch in hand is trained on when the run goes on."""

import contextlib

import pytest
import torch
from helpers.foreign import Classifier, loader_of
from helpers.slow import slow
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from minirec_pl import GRPORecModule
from minirec_pl.callbacks import MiniRec
from minirec_pl.probes import HeadProbe
from minirec_pl.selection import MiniRecSelector
from minirec_pl.selection.session.resume import RUNNING_KEY
from minirec_pl.selection.session.session import CHECKPOINT_KEY

pytestmark = pytest.mark.filterwarnings("ignore")


class Failing(Classifier):
    at = None

    def training_step(self, batch, batch_idx):
        if (self.current_epoch, batch_idx) == self.at:
            raise RuntimeError("out of luck")
        return super().training_step(batch, batch_idx)


class FailingLate(Classifier):
    """Fails when random numbers have been drawn, and gradients added."""

    at = None

    def __init__(self):
        super().__init__(dropout=0.4)

    def on_after_backward(self):
        if (self.current_epoch, self.trainer.fit_loop.epoch_loop.batch_idx) == self.at:
            raise RuntimeError("out of luck")


class FailingPolicy(GRPORecModule):
    """Fails after its rollouts are made."""

    at = None

    def training_step(self, batch, batch_idx):
        output = super().training_step(batch, batch_idx)
        if (self.current_epoch, batch_idx) == self.at:
            raise RuntimeError("out of luck")
        self.met = [*getattr(self, "met", ()), (self.current_epoch, batch["sample_id"].tolist())]
        return output


def keep(folder):
    return ModelCheckpoint(folder, save_on_exception=True, every_n_train_steps=10**6)


def three_runs(fit, at, folder):
    """One never stopped, one that fails, and the one that goes on from there."""
    whole, broken = fit(), fit(at, [keep(folder)])
    (path,) = folder.glob("*.ckpt")
    return whole, broken, fit(ckpt_path=path)


@pytest.mark.parametrize(  # an epoch of 30 samples has four batches
    ("at", "accumulate", "workers"),
    [slow((0, 2), 1, 0), ((1, 0), 3, 0), slow((1, 1), 3, 2), ((1, 3), 1, 0), slow((2, 3), 3, 0)],
)
def test_it_goes_on_with_the_very_batch(make_trainer, tmp_path, at, accumulate, workers):
    def fit(at=None, extra=(), ckpt_path=None):
        torch.manual_seed(3)
        module = Failing()
        module.at = at
        selector, probe = MiniRecSelector(gate=(-1.0, 2.0)), HeadProbe("classifier")
        trainer = make_trainer(
            callbacks=[MiniRec(30, selector=selector, rescore_fraction=0.5, probe=probe), *extra],
            max_epochs=3,
            accumulate_grad_batches=accumulate,
            enable_checkpointing=bool(extra),
        )
        with contextlib.nullcontext() if at is None else pytest.raises(RuntimeError, match="out of luck"):
            trainer.fit(module, loader_of(shuffle=True, num_workers=workers), ckpt_path=ckpt_path)
        return module

    whole, broken, resumed = three_runs(fit, at, tmp_path)
    assert broken.batches + resumed.batches == whole.batches
    assert torch.equal(resumed.path[-1], whole.path[-1])


@pytest.mark.parametrize("own_generator", [False, True])
@pytest.mark.parametrize(
    ("at", "accumulate"), [slow((0, 1), 1), ((0, 3), 2), slow((1, 0), 3), ((1, 1), 3), slow((2, 2), 1)]
)
def test_numbers_and_gradients_of_the_batch_come_back(make_trainer, tmp_path, at, accumulate, own_generator):
    def fit(at=None, extra=(), ckpt_path=None):
        torch.manual_seed(3 if ckpt_path is None else 4)
        module = FailingLate()
        torch.manual_seed(5 if ckpt_path is None else 6)
        module.at = at
        selector = MiniRecSelector(gate=(-1.0, 2.0))
        trainer = make_trainer(
            callbacks=[MiniRec(1.0, selector=selector, warmup_epochs=3, probe=HeadProbe("classifier")), *extra],
            max_epochs=3,
            accumulate_grad_batches=accumulate,
            enable_checkpointing=bool(extra),
        )
        generator = torch.Generator().manual_seed(8) if own_generator else None
        loader = loader_of(shuffle=True, noise=True, generator=generator)
        with contextlib.nullcontext() if at is None else pytest.raises(RuntimeError, match="out of luck"):
            trainer.fit(module, loader, ckpt_path=ckpt_path)
        return module

    whole, _, resumed = three_runs(fit, at, tmp_path)
    assert torch.equal(resumed.path[-1], whole.path[-1])


@pytest.mark.parametrize(
    ("iterations", "at"), [slow(1, (0, 1)), (1, (1, 4)), slow(2, (0, 1)), slow(2, (1, 3)), (2, (1, 9))]
)
def test_rollouts_in_hand_are_used(make_trainer, tmp_path, toy_data, tiny_policy, iterations, at):
    def fit(at=None, extra=(), ckpt_path=None):
        module = FailingPolicy(
            tiny_policy(),
            num_generations=4,
            scoring_generations=0,
            num_iterations=iterations,
            optimizer=lambda p: torch.optim.AdamW(p, lr=0.01),
        )
        module.at = at
        selector = MiniRecSelector(gate=(-1.0, 2.0), difficulty="pass_at_group")
        trainer = make_trainer(callbacks=[MiniRec(40, selector=selector), *extra], enable_checkpointing=bool(extra))
        with contextlib.nullcontext() if at is None else pytest.raises(RuntimeError, match="out of luck"):
            trainer.fit(module, toy_data(), ckpt_path=ckpt_path)
        return module

    whole, broken, resumed = three_runs(fit, at, tmp_path)
    assert broken.met + resumed.met == whole.met
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)


def test_a_checkpoint_of_0_1_resumes_inside_an_accumulation(make_trainer, tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (1, 1):
                trainer.save_checkpoint(tmp_path / "new.ckpt")

    def fit(extra=(), ckpt_path=None):
        torch.manual_seed(3 if ckpt_path is None else 4)
        selector, probe = MiniRecSelector(gate=(-1.0, 2.0)), HeadProbe("classifier")
        trainer = make_trainer(
            callbacks=[MiniRec(30, selector=selector, probe=probe), *extra], accumulate_grad_batches=3
        )
        module = Classifier(dropout=0.4)
        trainer.fit(module, loader_of(shuffle=True), ckpt_path=ckpt_path)
        return module

    whole = fit([Save()])
    stored = torch.load(tmp_path / "new.ckpt", weights_only=True)
    for rank, running in zip(stored[CHECKPOINT_KEY]["ranks"], stored.pop(RUNNING_KEY), strict=True):
        rank["running"] = {name: running[name] for name in ("random", "gradients", "validation_follows")}
    torch.save(stored, tmp_path / "old.ckpt")
    assert torch.equal(fit(ckpt_path=tmp_path / "old.ckpt").path[-1], whole.path[-1])
