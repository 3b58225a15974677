"""Which rollouts a step trains on, and that splitting the work changes nothing: by a loop over single completions."""

import copy
import warnings
from itertools import chain

import numpy as np
import pytest
import torch
from helpers.plain_policy import PlainPolicy, many_token_policy
from helpers.slow import slow
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader

from minirec_pl import GRPORecModule, InputError

pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec")


def popular(completions, **columns):
    """A reward in which most groups differ: 1, 0.5 or 0 by the item's number."""
    return [(int(item.removeprefix("i")) % 3) / 2 for item in completions]


SMALL = {"warm_fraction": 0.9}  # a pool of 77 samples


def sgd(lr=0.1):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


class Watch(Callback):
    """Notes what each training step was made of, and the gradient of each optimizer step."""

    def __init__(self):
        self.gradients, self.steps, self.policies, self.ids, self.signals = [], [], [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.policies.append(copy.deepcopy(pl_module.policy))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append([p.grad.clone() for p in pl_module.policy.parameters()])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        generation = pl_module.generation
        self.steps.append((generation, generation.position, generation.at(generation.position)))
        self.ids.append((batch["sample_id"].tolist(), outputs["trained"].tolist()))
        self.signals.append(outputs.get("signals"))


@pytest.fixture
def many_tokens(toy_data, tmp_path):
    """Makes a policy whose items have ids of one to four letters, the same each time."""
    data = toy_data()
    data.setup("fit")
    folder = tmp_path / "policy"
    return lambda: many_token_policy(folder, data.catalogue)


def fit(make_trainer, module, data, extra=(), **options):
    watch = Watch()
    torch.manual_seed(7)
    module.rollout_seed = torch.initial_seed()
    trainer = make_trainer(**{"max_epochs": 1, "log_every_n_steps": 1, **options}, callbacks=[watch, *extra])
    trainer.fit(module, data)
    return watch


def close(gradients, others, **tolerance):
    return all(
        torch.allclose(one, other, **{"rtol": 1e-3, "atol": 1e-6, **tolerance})
        for one, other in zip(gradients, others, strict=True)
    )


@pytest.mark.parametrize(
    ("loss_type", "workers"), [slow("grpo", 0), slow("dr_grpo", 0), ("dapo", 0), slow("dapo", 2), ("bnpo", 0)]
)
def test_accumulation_gives_the_gradient_of_the_whole_batch(many_tokens, toy_data, make_trainer, loss_type, workers):
    """Also of the last, ragged one, whose last micro-batch is smaller; bnpo is local and does not."""

    def gradients(accumulate, batch_size, **options):
        options = {"loss_type": loss_type, "scale_rewards": "batch", "optimizer": sgd(0.0), **options}
        module = GRPORecModule(many_tokens(), [popular], num_generations=3, **options)
        data = toy_data(**SMALL, batch_size=batch_size, num_workers=workers if accumulate > 1 else 0)
        watch = fit(make_trainer, module, data, accumulate_grad_batches=accumulate)
        n = len(data.pool_ids)
        assert len(watch.gradients) == -(-n // (batch_size * accumulate))
        assert n % batch_size
        assert accumulate == 1 or batch_size < n % (batch_size * accumulate) < 3 * batch_size
        return watch.gradients

    whole, parts = gradients(1, 32), gradients(4, 8)
    same = [close(one, other) for one, other in zip(whole, parts, strict=True)]
    assert same == [loss_type != "bnpo"] * len(whole)
    assert max(float(g.abs().max()) for g in whole[-1]) > 1e-3


def test_accumulation_trains_to_the_same_weights(many_tokens, toy_data, make_trainer):
    weights = []
    for accumulate, batch_size in ((1, 32), (4, 8)):
        module = GRPORecModule(many_tokens(), [popular], num_generations=3, optimizer=sgd(0.05))
        fit(make_trainer, module, toy_data(**SMALL, batch_size=batch_size), accumulate_grad_batches=accumulate)
        weights.append([p.detach().clone() for p in module.policy.parameters()])
    start = list(many_tokens().parameters())
    assert close(*weights, atol=1e-4)
    assert not close(weights[0], start, atol=1e-2)


def plain_gradient(watch, window, *, low=0.2, level="token", group=3):
    """Gradient of dapo's objective over the training steps `window`, a completion at a time in float64."""
    policies = {}
    rows, tokens = [], 0
    for step in window:
        _, position, rollouts = watch.steps[step]
        new = policies.setdefault(("new", step), PlainPolicy(watch.policies[step]))
        old = policies.setdefault(("old", step - position), PlainPolicy(watch.policies[step - position]))
        for b in range(len(rollouts)):
            history, seen = ([i for i in rollouts.batch[k][b].tolist() if i >= 0] for k in ("history", "seen"))
            rewards = np.array(rollouts.rewards[b].tolist())
            advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
            for g, item in enumerate(rollouts.items[b].tolist()):
                tokens += len(new.ids[item])
                rows.append((new, old, history, seen, item, float(advantages[g])))
    total, ratios = 0.0, []
    for new, old, history, seen, item, advantage in rows:
        if advantage == 0:
            continue
        logps = [logp for logp, _ in new.steps(history, seen, item)]
        before = [float(logp.detach()) for logp, _ in old.steps(history, seen, item)]
        differences = torch.stack([logp - kept for logp, kept in zip(logps, before, strict=True)])
        ratio = differences.exp() if level == "token" else differences.mean().exp().expand(len(logps))
        ratios += ratio.tolist()
        clipped = ratio.clamp(1 - low, 1 + low)
        total = total - torch.minimum(ratio * advantage, clipped * advantage).sum() / tokens
    models = {id(new.model): new.model for new, *_ in rows}
    assert len(models) == len(window)
    gradients = torch.autograd.grad(total, [p for model in models.values() for p in model.parameters()])
    size = len(gradients) // len(models)
    summed = [sum(gradients[i::size]) for i in range(size)]
    return summed, ratios


@pytest.mark.slow
@pytest.mark.parametrize(("level", "low"), [("token", 0.2), ("sequence", 0.05)])
def test_inner_updates_go_by_the_policy_that_sampled(many_tokens, toy_data, make_trainer, level, low):
    """Two batches sampled together, each trained on twice, at every one of the optimizer steps."""
    module = GRPORecModule(
        many_tokens(),
        [popular],
        num_generations=3,
        optimizer=sgd(0.3),
        num_iterations=2,
        steps_per_generation=2,
        importance_sampling_level=level,
        epsilon=low,
    )
    watch = fit(make_trainer, module, toy_data(batch_size=5), limit_train_batches=6)
    assert [position for _, position, _ in watch.steps] == [0, 1, 2, 3, 0, 1]
    spread = []
    for step in range(4):
        truth, ratios = plain_gradient(watch, [step], low=low, level=level)
        spread.append(max(abs(ratio - 1) for ratio in ratios))
        for ours, theirs in zip(watch.gradients[step], truth, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=2e-3, atol=2e-5)
    assert spread[0] == 0
    assert min(spread[1:]) > 0.01
    assert max(spread) > low


@pytest.mark.slow
def test_inner_updates_under_accumulation_see_the_tokens_of_their_optimizer_step(many_tokens, toy_data, make_trainer):
    module = GRPORecModule(
        many_tokens(), [popular], num_generations=3, optimizer=sgd(0.3), num_iterations=2, steps_per_generation=4
    )
    data = toy_data(batch_size=3)
    watch = fit(make_trainer, module, data, accumulate_grad_batches=2, limit_train_batches=8)
    for n, window in enumerate(([0, 1], [2, 3], [4, 5], [6, 7])):
        truth, _ = plain_gradient(watch, window)
        for ours, theirs in zip(watch.gradients[n], truth, strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("workers", [0, slow(2)])
def test_each_batch_is_trained_on_as_often_as_asked_and_drawn_for_once(tiny_policy, toy_data, make_trainer, workers):
    module = GRPORecModule(tiny_policy(), [popular], num_generations=3, num_iterations=2, steps_per_generation=4)
    data = toy_data(**SMALL, batch_size=8, num_workers=workers)
    watch = fit(make_trainer, module, data, accumulate_grad_batches=2, max_epochs=2)
    n = len(data.pool_ids)
    per_epoch = 2 * -(-n // 8)
    assert len(watch.ids) == 2 * per_epoch
    for epoch in range(2):
        steps = watch.ids[epoch * per_epoch : (epoch + 1) * per_epoch]
        batches = [ids for ids, _ in steps]
        starts = range(0, per_epoch, 8)
        for start in starts:
            block = batches[start : start + 8]
            assert block[: len(block) // 2] == block[len(block) // 2 :]
        assert sorted(chain(*(trained for _, trained in steps))) == sorted(data.pool_ids.tolist())
        assert all(
            not trained for start in starts for _, trained in steps[start + 4 : start + 8] if start + 8 <= per_epoch
        )
        signals = [s for s in watch.signals[epoch * per_epoch : (epoch + 1) * per_epoch] if s is not None]
        assert len(signals) == len(starts)
        assert sorted(chain(*(s.sample_id.tolist() for s in signals))) == sorted(data.pool_ids.tolist())
    assert module.cost.rollouts["training"] == 2 * n * 3
    assert module.rollout_step == 2 * len(starts)
    assert len({id(generation) for generation, _, _ in watch.steps}) == 2 * len(starts)


class SaveAt(Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("workers", [0, slow(2)])
@pytest.mark.parametrize(
    ("options", "accumulate", "limit"),
    [
        slow({"num_iterations": 3, "steps_per_generation": 2}, 1, 1.0),
        ({"num_iterations": 2, "steps_per_generation": 4, "beta": 0.1}, 2, 7),
        ({"wasted_groups": "dynamic_sampling", "num_iterations": 2}, 1, 1.0),
        slow({"wasted_groups": "preference_pairs", "num_iterations": 2}, 1, 1.0),
    ],
)
def test_a_run_resumed_inside_a_generation_ends_like_one_never_stopped(
    tiny_policy, toy_data, make_trainer, tmp_path, options, accumulate, limit, workers
):
    path = tmp_path / "inside.ckpt"

    def run(ckpt_path=None, extra=()):
        torch.manual_seed(3)
        module = GRPORecModule(tiny_policy(), [popular], num_generations=3, optimizer=sgd(0.3), **options)
        watch = Watch()
        trainer = make_trainer(
            max_epochs=2, accumulate_grad_batches=accumulate, limit_train_batches=limit, callbacks=[watch, *extra]
        )
        trainer.fit(module, toy_data(**SMALL, batch_size=16, num_workers=workers), ckpt_path=ckpt_path)
        return module, watch

    whole, watched = run(extra=[SaveAt(3, path)])
    (held,) = torch.load(path, weights_only=True)["generation"]
    assert 0 <= held["position"] < held["positions"] - 1
    torch.manual_seed(99)
    resumed, after = run(path)
    assert after.ids == watched.ids[3 * accumulate :]
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.state_dict().items())
    assert not torch.equal(next(iter(expected.values())), next(iter(tiny_policy().state_dict().values())))
    for name in ("rollouts", "tokens_forward", "tokens_backward"):
        assert getattr(resumed.cost, name) == getattr(whole.cost, name)


def test_a_checkpoint_between_generations_holds_no_rollouts(tiny_policy, toy_data, make_trainer, tmp_path):
    module = GRPORecModule(tiny_policy(), [popular], num_generations=3)
    fit(make_trainer, module, toy_data(), extra=[SaveAt(3, tmp_path / "a.ckpt")], limit_train_batches=4)
    assert "generation" not in torch.load(tmp_path / "a.ckpt", weights_only=True)


class Ranks(Callback):
    """Each rank writes what it trained on and the gradient it stepped with."""

    def __init__(self, folder):
        self.folder, self.made, self.gradients = folder, [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append([p.grad.clone() for p in pl_module.policy.parameters()])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        rollouts = pl_module.generation.at(pl_module.generation.position)
        self.made.append({"items": rollouts.items, "rewards": rollouts.rewards, **rollouts.batch})

    def on_fit_end(self, trainer, pl_module):
        torch.save((self.made, self.gradients), self.folder / f"rank-{trainer.global_rank}.pt")


@pytest.mark.parametrize(("loss_type", "scale"), [("dapo", "batch"), slow("grpo", "group"), slow("dr_grpo", "none")])
def test_two_ranks_give_the_gradient_of_the_whole_batch(
    many_tokens, toy_data, make_trainer, tmp_path, loss_type, scale
):
    policy = many_tokens()
    plain = PlainPolicy(policy)
    module = GRPORecModule(
        policy, [popular], num_generations=3, optimizer=sgd(0.0), loss_type=loss_type, scale_rewards=scale
    )
    options = {"strategy": "ddp_fork", "devices": 2, "max_epochs": 1, "limit_train_batches": 2}
    trainer = make_trainer(callbacks=[Ranks(tmp_path)], accumulate_grad_batches=2, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, toy_data(batch_size=4))
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    made = [part for parts, _ in ranks for part in parts]
    assert len(made) == 4
    assert len({i for part in made for i in part["sample_id"].tolist()}) == 16
    rewards = np.concatenate([part["rewards"].numpy() for part in made]).astype(float)
    tokens = sum(len(plain.ids[i]) for part in made for i in part["items"].flatten().tolist())
    row = 0
    for part in made:
        for b in range(4):
            history, seen = ([i for i in part[k][b].tolist() if i >= 0] for k in ("history", "seen"))
            spread = {"batch": rewards.std(ddof=1) + 1e-4, "group": rewards[row].std(ddof=1) + 1e-4, "none": 1.0}[scale]
            for g, item in enumerate(part["items"][b].tolist()):
                advantage = (rewards[row, g] - rewards[row].mean()) / spread
                length = len(plain.ids[item])
                share = {"dapo": tokens, "grpo": 48 * length, "dr_grpo": 48 * policy.id_length}[loss_type]
                if advantage:
                    (-advantage * plain.item_logp(history, seen, item) / share).backward()
            row += 1
    for _, (gradient,) in ranks:
        for ours, truth in zip(gradient, plain.model.parameters(), strict=True):
            torch.testing.assert_close(ours.double(), truth.grad, rtol=2e-3, atol=2e-5)


def test_ranks_draw_different_completions_of_the_same_prompts(tiny_policy, toy_data, make_trainer, tmp_path):
    data = toy_data(batch_size=6)
    data.setup("fit")
    batch = next(iter(data.sample_loader(data.pool_ids[:6])))
    loader = DataLoader([batch] * 4, batch_size=None)
    module = GRPORecModule(tiny_policy(), [popular], num_generations=4)
    trainer = make_trainer(callbacks=[Ranks(tmp_path)], max_epochs=1, strategy="ddp_fork", devices=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, loader)
    (one, _), (two, _) = (torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2))
    assert torch.equal(one[0]["sample_id"], two[0]["sample_id"])
    items = [part["items"] for part in one + two]
    assert all(not torch.equal(a, b) for i, a in enumerate(items) for b in items[:i])


def test_each_rank_goes_on_with_its_own_rollouts(tiny_policy, toy_data, make_trainer, tmp_path):
    path = tmp_path / "inside.ckpt"

    def run(name, ckpt_path=None, devices=2):
        (tmp_path / name).mkdir()
        torch.manual_seed(3)
        module = GRPORecModule(
            tiny_policy(), [popular], num_generations=3, optimizer=sgd(0.3), num_iterations=2, steps_per_generation=2
        )
        ranks = {"strategy": "ddp_fork", "devices": devices} if devices > 1 else {}
        trainer = make_trainer(
            max_epochs=1, limit_train_batches=4, callbacks=[Ranks(tmp_path / name), SaveAt(2, path)], **ranks
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, toy_data(batch_size=4), ckpt_path=ckpt_path)

    run("whole")
    run("resumed", path)
    for rank in range(2):
        (made, steps), (again, rest) = (
            torch.load(tmp_path / name / f"rank-{rank}.pt", weights_only=True) for name in ("whole", "resumed")
        )
        assert len(again) == 2
        assert all(torch.equal(a["items"], b["items"]) for a, b in zip(again, made[2:], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(chain(*rest), chain(*steps[2:]), strict=True))
    with pytest.raises(InputError, match="unfinished rollouts of 2 ranks and there are 1: resume on 2"):
        run("alone", path, devices=1)


def test_clipping_precision_and_schedulers_are_lightnings(tiny_policy, toy_data, make_trainer):
    rates, norms = [], []

    class Note(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            gradients = [p.grad for p in pl_module.policy.parameters() if p.grad is not None]
            if gradients:
                norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))
                rates.append(optimizer.param_groups[0]["lr"])

    module = GRPORecModule(
        tiny_policy(),
        [popular],
        num_generations=3,
        num_iterations=2,
        optimizer=sgd(0.5),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=4),
    )
    options = {"precision": "bf16-mixed", "gradient_clip_val": 1e-3, "accumulate_grad_batches": 2}
    fit(make_trainer, module, toy_data(batch_size=16), extra=[Note()], limit_train_batches=10, **options)
    taken = [norms[i] for i in range(0, len(norms), 2)]
    assert module.trainer.global_step == 5
    assert module.lr_schedulers().last_epoch == 5
    assert max(taken) <= 1e-3 * 1.01
    assert rates[0] > rates[-1]
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in module.policy.parameters())


def test_schedules_that_do_not_fit(tiny_policy, toy_data, make_trainer, tmp_path):
    module = GRPORecModule(tiny_policy(), steps_per_generation=3)
    with pytest.raises(
        InputError, match=r"steps_per_generation is 3 and trainer.accumulate_grad_batches 2: .* multiple"
    ):
        fit(make_trainer, module, toy_data(), accumulate_grad_batches=2)
    changing = GradientAccumulationScheduler({0: 1, 1: 2})
    module = GRPORecModule(tiny_policy(), steps_per_generation=3)
    with pytest.raises(InputError, match=r"steps_per_generation is 3 and trainer.accumulate_grad_batches 2"):
        fit(make_trainer, module, toy_data(), extra=[changing], max_epochs=2, limit_train_batches=3)
    data = toy_data()
    data.setup("fit")
    batch = next(iter(data.sample_loader(data.pool_ids[:6])))
    for options, trainer in (({"num_iterations": 2}, {}), ({}, {"accumulate_grad_batches": 2})):
        module = GRPORecModule(tiny_policy(), **options)
        with pytest.raises(InputError, match=r"the training loader serves single batches.* RecDataModule"):
            fit(make_trainer, module, DataLoader([batch] * 4, batch_size=None), **trainer)


def test_rollouts_missing_from_a_checkpoint(tiny_policy, toy_data, make_trainer, tmp_path):
    path = tmp_path / "a.ckpt"
    module = GRPORecModule(tiny_policy(), [popular], num_generations=3, num_iterations=2)
    fit(make_trainer, module, toy_data(), extra=[SaveAt(3, path)], limit_train_batches=4)
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["generation"]
    torch.save(checkpoint, path)
    again = GRPORecModule(tiny_policy(), [popular], num_generations=3, num_iterations=2)
    with pytest.raises(InputError, match="the rollouts of the running generation are missing"):
        make_trainer(max_epochs=2).fit(again, toy_data(), ckpt_path=path)
