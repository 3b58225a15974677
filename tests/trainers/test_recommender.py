"""Evaluation, prediction, checkpoints and the clock that both stages share."""

import math
import time

import pytest
import torch
from helpers.toy_data import random_rows, write_dataset
from lightning.pytorch import Callback

from minirec_pl import GRPORecModule, InputError, RecDataModule, WarmStartModule
from minirec_pl.policy import GenerativePolicy
from minirec_pl.selection.session.identity import IDENTITY_KEY


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_figures_equal_a_loop_over_the_full_ranking(toy_data, tiny_policy, make_trainer, stage):
    data, policy = toy_data(eval_batch_size=7), tiny_policy()
    trainer = make_trainer(limit_val_batches=1.0)
    figures = getattr(trainer, stage)(GRPORecModule(policy), data, verbose=False)[0]
    hits, gains, reciprocal, recommended = [], [], [], set()
    for batch in data.val_dataloader() if stage == "validate" else data.test_dataloader():
        for scores, target, seen in zip(policy.item_logps(batch), batch["target"], batch["seen"], strict=True):
            hidden = set(seen.tolist())
            ranking = sorted((i for i in range(len(scores)) if i not in hidden), key=lambda i: -float(scores[i]))
            rank = ranking.index(int(target)) + 1
            hits.append(rank <= 10)
            gains.append(1 / math.log2(rank + 1) if rank <= 10 else 0.0)
            reciprocal.append(1 / rank)
            recommended |= set(ranking[:10])
    n, prefix = len(hits), "val" if stage == "validate" else "test"
    assert n == len(data.val_ids if stage == "validate" else data.test_ids)
    expected = {"hit_rate@10": sum(hits) / n, "ndcg@10": sum(gains) / n, "mrr": sum(reciprocal) / n}
    expected["coverage@10"] = len(recommended) / len(data.catalogue)
    assert figures == {f"{prefix}/{name}": pytest.approx(value, abs=1e-5) for name, value in expected.items()}


def test_evaluation_knows_no_dropout_and_training_goes_on_with_it(toy_data, tiny_policy, make_trainer):
    module = GRPORecModule(tiny_policy(attention_dropout=0.5))
    first, second = (make_trainer().test(module, toy_data(), verbose=False) for _ in range(2))
    assert first == second
    seen = []

    class Modes(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            seen.append(all(child.training for child in pl_module.policy.modules()))

    make_trainer(limit_val_batches=1, max_epochs=2, limit_train_batches=2, callbacks=[Modes()]).fit(module, toy_data())
    assert seen == [True] * 4


def test_a_policy_is_built_for_the_catalogue_of_the_data(toy_data, make_trainer):
    policy = GenerativePolicy(config={"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1})
    data = toy_data()
    make_trainer(max_epochs=-1, max_steps=1).fit(GRPORecModule(policy, num_generations=2), data)
    assert policy.catalogue.item_ids == data.catalogue.item_ids


def test_no_data_and_no_catalogue(make_trainer):
    module = GRPORecModule(GenerativePolicy(config={"hidden_size": 8}))
    with pytest.raises(InputError, match=r"fit with a RecDataModule, or call policy\.bind\(catalogue\)"):
        module.configure_model()


def other_data(path, n_items):
    write_dataset(path, random_rows(seed=3, n=1500, n_users=25, n_moments=600, n_items=n_items))
    return RecDataModule(str(path), "toy", warm_fraction=0.5, batch_size=8)


@pytest.fixture
def checkpoint(toy_data, tiny_policy, make_trainer, tmp_path):
    trainer = make_trainer(max_epochs=-1, max_steps=1)
    trainer.fit(GRPORecModule(tiny_policy(), num_generations=2), toy_data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


DOES_NOT_FIT = r"the checkpoint does not fit: 'policy\.model\.model\.embed_tokens\.weight' is \[83, 16\] float32 there"


@pytest.mark.parametrize(
    ("n_items", "message", "of_version_0_1", "allowed"),
    [
        (70, r"the checkpoint was made for something else \(there are 70 items here and 80 there", False, False),
        (80, r"\(item 0 of the catalogue has the id 'i\d+' here and 'i\d+' there, and ", False, False),
        (70, DOES_NOT_FIT, False, True),
        (70, DOES_NOT_FIT, True, False),
        (80, "another catalogue with as many items", True, False),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_another_catalogue(
    checkpoint, make_trainer, tmp_path, n_items, message, of_version_0_1, allowed
):
    from helpers.tiny_config import TINY

    if of_version_0_1:
        content = torch.load(checkpoint, weights_only=True)
        del content[IDENTITY_KEY]
        torch.save(content, checkpoint)
    module, trainer = GRPORecModule(GenerativePolicy(config=TINY), num_generations=2), make_trainer()
    trainer.allow_changed_data = allowed
    with pytest.raises(InputError, match=message):
        trainer.test(module, other_data(tmp_path / "other", n_items), ckpt_path=checkpoint, verbose=False)


def test_a_checkpoint_gives_the_same_figures_again(checkpoint, toy_data, make_trainer):
    from helpers.tiny_config import TINY

    stored = torch.load(checkpoint, weights_only=True)
    module = GRPORecModule(GenerativePolicy(config=TINY), num_generations=2)
    make_trainer().test(module, toy_data(), ckpt_path=checkpoint, verbose=False)
    assert all(torch.equal(value, stored["state_dict"][name]) for name, value in module.state_dict().items())
    assert module.cost.state_dict() == stored["cost"]


def test_the_scheduler_moves_once_a_step(toy_data, tiny_policy, make_trainer):
    rates = []

    class Rates(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    module = GRPORecModule(
        tiny_policy(),
        num_generations=2,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    )
    make_trainer(max_epochs=-1, max_steps=3, callbacks=[Rates()]).fit(module, toy_data())
    assert rates == pytest.approx([1.0, 1 / 2, 1 / 3]) or rates == pytest.approx([1 / 2, 1 / 3, 1 / 4])


def test_only_trainable_parameters_are_optimised(toy_data, tiny_policy, make_trainer):
    policy = tiny_policy()
    policy.model.get_input_embeddings().requires_grad_(False)
    module = WarmStartModule(policy)
    trainer = make_trainer(max_epochs=-1, max_steps=1)
    trainer.fit(module, toy_data(train_on="warm"))
    optimised = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
    assert len(optimised) == sum(p.requires_grad for p in policy.parameters()) < len(list(policy.parameters()))


class Slow(Callback):
    """Sleeps where the clock of training must stand still, and once inside a step."""

    def on_fit_start(self, trainer, pl_module):
        time.sleep(0.5)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            time.sleep(0.15)

    def on_validation_epoch_start(self, trainer, pl_module):
        time.sleep(0.5)

    def on_train_epoch_end(self, trainer, pl_module):
        time.sleep(0.5)


def test_seconds_of_training_leave_out_validation_and_what_happens_between_epochs(toy_data, tiny_policy, make_trainer):
    module = GRPORecModule(tiny_policy(), num_generations=2)
    trainer = make_trainer(
        max_epochs=2, limit_train_batches=2, limit_val_batches=1, num_sanity_val_steps=1, callbacks=[Slow()]
    )
    started = time.perf_counter()
    trainer.fit(module, toy_data())
    slept_outside = 0.5 + 3 * 0.5 + 2 * 0.5
    assert 0.3 <= module.cost.seconds["training"] <= time.perf_counter() - started - slept_outside
    assert module.cost.seconds["scoring"] == 0


def test_a_run_resumed_inside_an_epoch_starts_its_clock_anew(toy_data, tiny_policy, make_trainer, tmp_path):
    class SaveHalfway(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    trainer = make_trainer(max_epochs=1, limit_train_batches=4, callbacks=[SaveHalfway()])
    trainer.fit(GRPORecModule(tiny_policy(), num_generations=2), toy_data())
    before = torch.load(tmp_path / "half.ckpt", weights_only=True)["cost"]["seconds"]["training"]
    module = GRPORecModule(tiny_policy(), num_generations=2)
    time.sleep(0.6)
    started = time.perf_counter()
    make_trainer(max_epochs=1, limit_train_batches=4).fit(module, toy_data(), ckpt_path=tmp_path / "half.ckpt")
    assert module.rollout_step == 4
    assert module.cost.seconds["training"] - before <= time.perf_counter() - started


def test_the_cost_of_the_policy_is_part_of_the_run(tiny_policy, tmp_path):
    module = WarmStartModule(tiny_policy())
    module.cost.add("warm_start", forward=50, backward=40, seconds=2.0)
    module.policy.save_pretrained(tmp_path / "policy", module.cost.state_dict())
    run = GRPORecModule(GenerativePolicy(pretrained=str(tmp_path / "policy")))
    run.cost.add("training", forward=5)
    assert run.cost.row()["tokens"] == {"forward": 55, "backward": 40}
    assert run.cost.row()["seconds"]["warm_start"] == 2.0
