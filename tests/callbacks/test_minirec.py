"""What the parts of `MiniRec` are told: all that callbacks of the Trainer's own are."""

import pytest
import torch
from helpers.foreign import Classifier, loader_of
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from minirec_pl import InputError
from minirec_pl.callbacks import EasyToHardCurriculum, MiniRec, RescoreSamples, RewardHistory, SelectSamples
from minirec_pl.probes import HeadProbe
from minirec_pl.selection import MiniRecSelector

pytestmark = pytest.mark.filterwarnings("ignore")
HOOKS = {name for name in dir(Callback) if name[0] != "_" and callable(getattr(Callback, name))}


class Recorder(EasyToHardCurriculum):
    """Notes every hook with what it is given; counts batches and plans, the batches also in checkpoints."""

    state_key = "a curriculum of the user's"

    def __init__(self, fail_at=None):
        super().__init__(n_folds=2)
        self.calls, self.batches, self.planned, self.fail_at = [], 0, [], fail_at

    def __getattribute__(self, name):
        found = super().__getattribute__(name)
        if name not in HOOKS:
            return found

        def noted(*args, **kwargs):
            self.calls.append((name, [type(arg) for arg in args], sorted(kwargs)))
            return found(*args, **kwargs)

        return noted

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.fail_at:
            raise RuntimeError("no more memory")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.batches += 1

    def state_dict(self):
        return {"batches": self.batches}

    def load_state_dict(self, state_dict):
        self.batches = state_dict["batches"]

    def plan(self, session, trainer, chosen, easiness, epoch):
        self.planned.append(epoch)
        return super().plan(session, trainer, chosen, easiness, epoch)


class Evaluated(Classifier):
    def test_step(self, batch, batch_idx):
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch, batch_idx):
        return self(batch[0])


def recorded(make_trainer, folder, as_part):
    """The recorders of a fit, one resumed from its first epoch, one that fails, and of evaluations."""

    def trainer_of(recorder, epochs=2):
        selector, probe = MiniRecSelector(gate=(-1.0, 2.0)), HeadProbe("classifier")
        parts = [RewardHistory(), SelectSamples(24, selector), RescoreSamples(0.5, probe), recorder]
        one = MiniRec(24, rescore_fraction=0.5, selector=selector, probe=probe, curriculum=recorder)
        save = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        callbacks = [one] if as_part else parts
        return make_trainer(
            callbacks=[*callbacks, save],
            max_epochs=epochs,
            enable_checkpointing=True,
            limit_val_batches=2,
            num_sanity_val_steps=1,
        )

    loaders, module = {"train_dataloaders": loader_of(), "val_dataloaders": loader_of()}, Evaluated()
    whole, resumed, failing = Recorder(), Recorder(), Recorder(fail_at=2)
    torch.manual_seed(3)
    trainer = trainer_of(whole)
    trainer.fit(module, **loaders)
    for evaluate in (trainer.validate, trainer.test, trainer.predict):
        evaluate(module, loader_of())
    later = Evaluated()
    trainer_of(resumed, epochs=3).fit(later, **loaders, ckpt_path=folder / "epoch=0.ckpt")
    with pytest.raises(RuntimeError, match="no more memory"):
        trainer_of(failing).fit(Evaluated(), **loaders)
    return [whole, resumed, failing], [module.seen, later.seen]


def test_a_curriculum_gets_every_hook_once_as_one_of_the_trainers_own_does(make_trainer, tmp_path):
    parts, seen = recorded(make_trainer, tmp_path / "part", as_part=True)
    alone, seen_alone = recorded(make_trainer, tmp_path / "own", as_part=False)
    for one, other in zip(parts, alone, strict=True):
        assert one.calls == other.calls
        assert one.planned == other.planned
    assert {name for one in parts for name, *_ in one.calls} == HOOKS
    assert seen == seen_alone

    whole, resumed, failing = parts
    assert [one.planned for one in parts] == [[0, 1], [2], [0]]  # the checkpoint has the plan of epoch 1
    assert (whole.batches, resumed.batches, failing.batches) == (6, 9, 2)
    assert sum(name == "on_before_optimizer_step" for name, *_ in whole.calls) == 6


def test_a_second_minirec_is_refused_in_a_sentence(make_trainer):
    trainer = make_trainer(callbacks=[MiniRec(24), MiniRec(12)])
    with pytest.raises(InputError, match="two callbacks of one Trainer are responsible for the phase 'record'"):
        trainer.fit(Classifier(), loader_of())
