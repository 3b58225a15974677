"""The order that reaches `training_step` under each curriculum, also after a resume."""

import math

import pytest
import torch
import yaml
from helpers.cli_tools import CONFIGS
from helpers.slow import slow
from lightning.pytorch import Callback

from minirec_pl import GRPORecModule, InputError
from minirec_pl.callbacks import (
    EasyToHardCurriculum,
    GaussianCurriculum,
    HardToEasyCurriculum,
    MiniRec,
    MovingTargetCurriculum,
    RescoreSamples,
    SelectSamples,
)
from minirec_pl.cli.fit import MiniRecCLI, run
from minirec_pl.cli.main import main
from minirec_pl.selection import RandomSelector, gaussian_curriculum, session_of
from minirec_pl.selection.session.session import CHECKPOINT_KEY

CURRICULA = [EasyToHardCurriculum, HardToEasyCurriculum, MovingTargetCurriculum, GaussianCurriculum]
SELECTORS = [slow("Full"), "Random", "KMeans", slow("KCenter"), "GraNd", slow("EL2N")]
SELECTORS += [slow("RewardVariance"), "LearnAlign", "DEALRec"]


class Watch(Callback):
    """Notes of every epoch: the ids trained on, the plan, its easiness, the target and the rewards met."""

    def __init__(self):
        self.ids, self.plans, self.easiness, self.targets, self.rewards = [], [], [], [], []

    def on_train_epoch_start(self, trainer, pl_module):
        session = session_of(trainer)
        self.ids.append([])
        self.rewards.append([])
        self.plans.append(session.plan)
        plan = session.plan or []
        self.easiness.append(dict(zip(plan, session.easiness(plan).tolist(), strict=True)) if plan else {})
        self.targets.append(session.target_difficulty)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.ids:  # a resumed epoch has no start
            self.ids.append([])
            self.targets.append(session_of(trainer).target_difficulty)
        self.ids[-1] += batch["sample_id"].tolist()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.rewards:
            signals = outputs["signals"]
            met = signals.solve_probability if signals.rewards is None else signals.rewards.mean(dim=1)
            self.rewards[-1] += met.tolist()


class SaveAt(Callback):
    """Writes a checkpoint after an optimizer step, or at the end of an epoch."""

    def __init__(self, path, step=None, epoch=None):
        self.path, self.step, self.epoch = path, step, epoch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


@pytest.fixture
def fit(toy_data, tiny_policy, make_trainer):
    def fit(curriculum, *callbacks, budget=40, epochs=3, ckpt_path=None, rollouts="sample", **options):
        watch = Watch()
        torch.manual_seed(3)
        module = GRPORecModule(
            tiny_policy(),
            rollouts=rollouts,
            num_generations=4,
            scoring_generations=4,
            optimizer=lambda p: torch.optim.AdamW(p, lr=0.05),
        )
        options = {"selector": RandomSelector(redraw=True), "rescore_fraction": 0.5, **options}
        minirec = MiniRec(budget, curriculum=curriculum, **options)
        trainer = make_trainer(callbacks=[minirec, watch, *callbacks], max_epochs=epochs)
        trainer.fit(module, toy_data(), ckpt_path=ckpt_path)
        return watch

    return fit


def test_hard_to_easy(fit):
    watch = fit(HardToEasyCurriculum())
    for ids, plan, easiness in zip(watch.ids, watch.plans, watch.easiness, strict=True):
        assert ids == plan
        assert len(set(ids)) == 40
        assert len(set(easiness.values())) > 1
        assert [easiness[i] for i in ids] == sorted(easiness.values())


def test_gaussian_plans_each_epoch_by_its_place_in_the_training(fit):
    watch = fit(GaussianCurriculum(n_levels=3, exponent=0.7, width=0.6, seed=5))
    for epoch, (ids, easiness) in enumerate(zip(watch.ids, watch.easiness, strict=True)):
        options = {"epoch": epoch, "epochs": 3, "n_levels": 3, "exponent": 0.7, "width": 0.6, "seed": 5}
        assert ids == gaussian_curriculum(list(easiness), list(easiness.values()), **options)


@pytest.mark.parametrize("rollouts", ["sample", "expected"])
def test_moving_target_follows_the_reward_met_in_training(fit, rollouts):
    options = {"target": 0.9, "step_size": 0.3, "sensitivity": 1.5, "target_reward": 0.2}
    watch = fit(MovingTargetCurriculum(**options), rollouts=rollouts)
    assert watch.targets[0] == 0.9
    for epoch, (ids, easiness) in enumerate(zip(watch.ids, watch.easiness, strict=True)):
        distance = [abs(1 - easiness[i] - watch.targets[epoch]) for i in ids]
        assert distance == sorted(distance)
        if epoch:
            mean = sum(watch.rewards[epoch - 1]) / len(watch.rewards[epoch - 1])
            moved = watch.targets[epoch - 1] + 0.3 * math.tanh(1.5 * (mean - 0.2))
            assert watch.targets[epoch] == pytest.approx(min(max(moved, 0), 1))
    assert len(set(watch.targets)) == 3


def test_the_whole_pool_is_ordered_before_the_first_selection(fit, toy_data):
    watch = fit(HardToEasyCurriculum(), warmup_epochs=1, epochs=2)
    data = toy_data()
    data.setup("fit")
    assert sorted(watch.ids[0]) == sorted(data.pool_ids.tolist())
    assert [watch.easiness[0][i] for i in watch.ids[0]] == sorted(watch.easiness[0].values())
    assert len(watch.ids[1]) == 40


@pytest.mark.parametrize("make", [lambda: MovingTargetCurriculum(target=0.9, step_size=0.2), slow(GaussianCurriculum)])
@pytest.mark.parametrize(
    "place",
    [slow({"epoch": 1}), {"step": 8}, {"step": 10}],
    ids=["after an epoch", "inside an epoch", "on its last batch"],
)
def test_resume_goes_on_as_if_never_stopped(fit, make, place, tmp_path):
    path = tmp_path / "stopped.ckpt"
    whole = fit(make(), SaveAt(path, **place), epochs=4)
    resumed = fit(make(), epochs=4, ckpt_path=path)
    assert [len(ids) for ids in whole.ids] == [40] * 4, "five steps an epoch"
    assert len(resumed.ids) == (3 if place == {"step": 8} else 2)
    assert resumed.ids[-2:] == whole.ids[-2:]
    assert resumed.targets[-2:] == whole.targets[-2:]
    assert whole.ids[-3] != whole.ids[-2] != whole.ids[-1]


def test_a_checkpoint_of_an_earlier_version_that_counts_groups_alone_is_resumed(fit, tmp_path):
    path = tmp_path / "stopped.ckpt"
    whole = fit(MovingTargetCurriculum(target=0.9, step_size=0.2), SaveAt(path, step=8), epochs=4)
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint[CHECKPOINT_KEY]["trained"]["samples"]
    torch.save(checkpoint, path)
    resumed = fit(MovingTargetCurriculum(target=0.9, step_size=0.2), epochs=4, ckpt_path=path)
    assert resumed.targets[-2:] == whole.targets[-2:]


@pytest.mark.parametrize("cls", CURRICULA)
def test_the_last_plan_is_drawn(fit, cls, tmp_path):
    fit(cls(), epochs=1)
    assert (tmp_path / "run" / "curriculum.png").read_bytes().startswith(b"\x89PNG")


def test_moving_target_without_training_rewards_is_refused(toy_data, tiny_policy, make_trainer):
    parts = [RescoreSamples(), SelectSamples(20, RandomSelector()), MovingTargetCurriculum()]
    module = GRPORecModule(tiny_policy(), num_generations=4, scoring_generations=0)
    with pytest.raises(InputError, match=r"epoch 1 met none: add the callback RewardHistory\(\)"):
        make_trainer(callbacks=parts).fit(module, toy_data())


def test_gaussian_without_a_number_of_epochs_is_refused(toy_data, tiny_policy, make_trainer):
    module = GRPORecModule(tiny_policy(), num_generations=4, scoring_generations=0)
    trainer = make_trainer(callbacks=[MiniRec(20, curriculum=GaussianCurriculum())], max_epochs=-1, max_steps=5)
    with pytest.raises(InputError, match=r"set `trainer.max_epochs`"):
        trainer.fit(module, toy_data())


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        (MovingTargetCurriculum, {"target": 1.5}, "target is 1.5"),
        (MovingTargetCurriculum, {"step_size": 0.0}, "step_size is 0.0"),
        (MovingTargetCurriculum, {"sensitivity": math.inf}, "sensitivity is inf"),
        (MovingTargetCurriculum, {"target_reward": math.nan}, "target_reward is nan"),
        (GaussianCurriculum, {"n_levels": 0}, "n_levels is 0"),
        (GaussianCurriculum, {"width": -1.0}, "width is -1.0"),
        (GaussianCurriculum, {"exponent": math.nan}, "exponent is nan"),
    ],
)
def test_bad_options_are_refused_at_once(cls, options, words):
    with pytest.raises(InputError, match=words):
        cls(**options)


@pytest.mark.filterwarnings("ignore:picked:UserWarning")
@pytest.mark.parametrize("name", SELECTORS)
def test_every_selector_trains_on_its_picks(fit, name):
    import minirec_pl.selection as selection

    selector = getattr(selection, f"{name}Selector")()
    ledgers = []

    class Ledgers(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            ledgers.append(session_of(trainer).ledger)

    watch = fit("shuffled" if name in ("Full", "Random") else None, Ledgers(), budget=24, epochs=2, selector=selector)
    for ids, ledger in zip(watch.ids, ledgers, strict=True):
        assert sorted(ids) == sorted(ledger.selected())
        assert 0 < len(ids) <= (len(ledger) if name == "Full" else 24)


@pytest.mark.parametrize(
    ("curriculum", "selector"),
    [
        slow("EasyToHardCurriculum", "KMeans"),
        slow("HardToEasyCurriculum", "EL2N"),
        slow("MovingTargetCurriculum", "LearnAlign"),
        ("GaussianCurriculum", "DEALRec"),
    ],
)
def test_both_are_reached_from_the_command_line(curriculum, selector, command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(MiniRecCLI, "_run_subcommand", lambda self, subcommand: None)
    chosen = [
        f"--selection.selector=minirec_pl.selection.{selector}Selector",
        f"--selection.curriculum=minirec_pl.callbacks.{curriculum}",
        "--selection.curriculum.seed=7",
        f"--model.policy.pretrained={command.policy}",
        f"--data.path={command.data}",
        "--data.dataset=toy",
    ]
    arguments = ["fit", "--config", str(CONFIGS / "quickstart.yaml"), f"--trainer.default_root_dir={tmp_path}", *chosen]
    cli = run(arguments)
    (minirec,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, MiniRec)]
    picks, order = minirec.parts[1], minirec.parts[-1]
    assert (type(picks.selector).__name__, type(order).__name__) == (f"{selector}Selector", curriculum)
    assert order.seed == 7
    with pytest.raises(SystemExit):
        main([*arguments, "--print_config"])
    shown = yaml.safe_load(capsys.readouterr().out)["selection"]["init_args"]
    assert shown["selector"]["class_path"] == f"minirec_pl.selection.{selector}Selector"
    assert shown["curriculum"]["class_path"] == f"minirec_pl.callbacks.{curriculum}"
