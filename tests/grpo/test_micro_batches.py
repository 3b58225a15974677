"""What micro-batches and ranks add up to where some prompts are left out: by a loop over single completions."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from helpers.plain_policy import PlainPolicy, many_token_policy
from helpers.slow import slow
from lightning.pytorch import Callback

from minirec_pl import GRPORecModule
from minirec_pl.grpo.buffer import RolloutBatch, figures_of
from minirec_pl.grpo.objective import Objective

pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec")
SMALL = {"warm_fraction": 0.9}  # a pool of 77 samples


def rare(completions, **columns):
    """A reward that leaves many groups of three without variance."""
    return [float(int(item.removeprefix("i")) % 5 == 0) for item in completions]


def still(parameters):
    return torch.optim.SGD(parameters, lr=0.0)


@pytest.fixture
def policy(toy_data, tmp_path):
    """Its items have ids of one to four letters."""
    data = toy_data()
    data.setup("fit")
    return many_token_policy(tmp_path / "policy", data.catalogue)


class Steps(Callback):
    """Notes the micro-batches and the gradient of each optimizer step, and writes them by rank."""

    def __init__(self, folder=None):
        self.folder, self.parts, self.steps, self.losses = folder, [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        position = pl_module.generation.position
        self.parts.append(copy.deepcopy(pl_module.generation.at(position)))
        self.steps.append((self.parts, [p.grad.clone() for p in pl_module.policy.parameters()]))
        self.parts = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))
        if (batch_idx + 1) % trainer.accumulate_grad_batches and batch_idx + 1 < trainer.num_training_batches:
            self.parts.append(copy.deepcopy(pl_module.generation.at(pl_module.generation.position)))

    def on_fit_end(self, trainer, pl_module):
        if self.folder is not None:
            groups = [[{"items": p.items, "rewards": p.rewards, **p.batch} for p in parts] for parts, _ in self.steps]
            steps = list(zip(groups, [gradient for _, gradient in self.steps], strict=True))
            torch.save((steps, self.losses), self.folder / f"rank-{trainer.global_rank}.pt")


def plain_gradient(policy, parts, loss_type, pairs=False):
    """Gradient of the objective over groups given as dictionaries, float64, a completion at a time."""
    plain = PlainPolicy(policy)
    every = [item for part in parts for item in part["items"].flatten().tolist()]
    tokens, groups = sum(len(plain.ids[item]) for item in every), sum(len(part["items"]) for part in parts)
    for part in parts:
        for b, items in enumerate(part["items"].tolist()):
            history, seen = ([i for i in part[key][b].tolist() if i >= 0] for key in ("history", "seen"))
            rewards, target = np.array(part["rewards"][b].tolist()), int(part["target"][b])
            if rewards.std() > 0:
                for reward, item in zip(rewards, items, strict=True):
                    advantage, length = (reward - rewards.mean()) / (rewards.std(ddof=1) + 1e-4), len(plain.ids[item])
                    share = {"dapo": tokens, "grpo": len(every) * length, "dr_grpo": len(every) * policy.id_length}
                    (-advantage * plain.item_logp(history, seen, item) / share[loss_type]).backward()
            elif pairs and target not in items:
                for item in set(items):
                    margin = plain.item_logp(history, seen, target) / len(plain.ids[target])
                    margin = margin - plain.item_logp(history, seen, item) / len(plain.ids[item])
                    (torch.log1p(torch.exp(-margin)) / len(set(items)) / groups).backward()
    return [p.grad for p in plain.model.parameters()]


def assert_same(ours, truth):
    for mine, wanted in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=2e-3, atol=2e-5)
    assert max(float(gradient.abs().max()) for gradient in ours) > 1e-3


@pytest.mark.parametrize(
    ("treatment", "loss_type"),
    [
        ("dynamic_sampling", "dapo"),
        slow("dynamic_sampling", "grpo"),
        slow("preference_pairs", "dapo"),
        ("preference_pairs", "grpo"),
    ],
)
def test_accumulated_steps_average_over_what_their_micro_batches_kept(
    policy, toy_data, make_trainer, treatment, loss_type
):
    """Also the last window of an epoch, which has fewer micro-batches than the others."""
    module = GRPORecModule(
        policy, [rare], num_generations=3, optimizer=still, wasted_groups=treatment, loss_type=loss_type
    )
    steps = Steps()
    n_batches = {"dynamic_sampling": 5, "preference_pairs": 10}[treatment]
    trainer = make_trainer(max_epochs=1, accumulate_grad_batches=4, callbacks=[steps])
    trainer.fit(module, toy_data(**SMALL, batch_size=8))
    assert trainer.num_training_batches == n_batches
    assert [len(parts) for parts, _ in steps.steps] == [4] * (n_batches // 4) + [n_batches % 4]
    sizes = {len(part) for parts, _ in steps.steps for part in parts}
    assert len(sizes) > 1
    for parts, gradient in (steps.steps[0], steps.steps[-1]):
        rows = [{"items": part.items, "rewards": part.rewards, **part.batch} for part in parts]
        assert_same(gradient, plain_gradient(policy, rows, loss_type, treatment == "preference_pairs"))


@pytest.mark.parametrize(("loss_type", "batch_size"), [slow("dapo", 13), ("grpo", 38)])
def test_a_sample_repeated_to_make_ranks_equal_has_no_weight(
    policy, toy_data, make_trainer, tmp_path, loss_type, batch_size
):
    """77 samples on two ranks; in batches of 38 the last one of the second rank has the repeated sample alone."""
    module = GRPORecModule(policy, [rare], num_generations=3, optimizer=still, loss_type=loss_type)
    trainer = make_trainer(callbacks=[Steps(tmp_path)], max_epochs=1, strategy="ddp_fork", devices=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, toy_data(**SMALL, batch_size=batch_size))
    ranks, losses = zip(
        *(torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2)), strict=True
    )
    ids = [i for steps in ranks for parts, _ in steps for part in parts for i in part["sample_id"].tolist()]
    assert len(ids) == len(set(ids)) == 77
    assert all(math.isfinite(loss) for rank in losses for loss in rank)
    last = [steps[-1] for steps in ranks]
    assert [len(parts[0]["items"]) for parts, _ in last] == {13: [13, 12], 38: [1, 0]}[batch_size]
    for step in (0, -1):
        parts = [part for steps in ranks for part in steps[step][0]]
        truth = plain_gradient(policy, parts, loss_type)
        for steps in ranks:
            if any(gradient is not None and gradient.any() for gradient in truth):
                assert_same(steps[step][1], truth)


def rollouts(rewards, **changes):
    """A batch of rollouts whose rewards [B, G] are NaN where none applies."""
    rewards = torch.tensor(rewards)
    shape = (*rewards.shape, 2)
    given = {
        "batch": {"sample_id": torch.arange(len(rewards))},
        "items": torch.zeros_like(rewards, dtype=torch.int64),
        "rewards": rewards.nan_to_num(nan=0.0),
        "applies": ~rewards.isnan(),
        "rewards_by_name": {"some": rewards},
        "mask": torch.ones(shape, dtype=torch.bool),
        "entropy": torch.zeros(shape),
        "advantages": torch.zeros_like(rewards),
        "learns": torch.ones(len(rewards), dtype=torch.bool),
        "pairs": torch.zeros(len(rewards), dtype=torch.bool),
        **dict.fromkeys(("target_logps", "target_mask", "old_logps", "ref_logps")),
    }
    return RolloutBatch(**{**given, **changes})


def test_figures_leave_out_what_no_reward_applies_to():
    none = math.nan
    figures = figures_of([rollouts([[1.0, 0.0, none, none]]), rollouts([[none] * 4, [0.5, none, none, none]])])
    assert float(figures["reward"]) == pytest.approx(0.5)
    assert float(figures["reward_std"]) == pytest.approx(math.sqrt(0.5) / 2)
    assert float(figures["frac_reward_zero_std"]) == pytest.approx(2 / 3)
    assert float(figures["rewards/some/mean"]) == pytest.approx(0.5)
    nothing = figures_of([rollouts([[none, none]])])
    assert [float(nothing[name]) for name in ("reward", "reward_std", "frac_reward_zero_std")] == [0.0, 0.0, 1.0]


def test_the_length_of_a_completion_is_that_of_masked_ones_too():
    texts = torch.tensor([[[5, 6, -1], [5, 6, 7]]])
    mask = torch.tensor([[[True, True, False], [False] * 3]])
    assert float(figures_of([rollouts([[1.0, 0.0]], texts=texts, mask=mask)])["completions/mean_length"]) == 2.5


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_ranks_to_none_of_whose_rollouts_a_reward_applies(scale):
    batch = rollouts([[math.nan] * 3] * 2)
    Objective(scale_rewards=scale).set_advantages([batch], reduce=lambda values: 2 * values)
    assert torch.equal(batch.advantages, torch.zeros(2, 3))


def test_ranks_scale_by_the_deviation_of_all_their_rewards():
    rewards = [[[0.0, 1.0, math.nan]], [[0.5, 0.5, 0.25], [2.0, 0.0, 1.0]]]
    known = [r for rank in rewards for group in rank for r in group if not math.isnan(r)]
    batches = [rollouts(rank) for rank in rewards]
    sums = torch.tensor([len(known), sum(known), sum(r * r for r in known)], dtype=torch.float64)
    for batch, groups in zip(batches, rewards, strict=True):
        Objective(scale_rewards="batch").set_advantages([batch], reduce=lambda _: sums)
        for row, group in zip(batch.advantages.tolist(), groups, strict=True):
            mean = np.nanmean(group)
            spread = np.std(known, ddof=1) + 1e-4
            truth = [0.0 if math.isnan(r) else (r - mean) / spread for r in group]
            assert row == pytest.approx(truth, abs=1e-6)


def test_a_group_no_reward_applies_to_is_no_pair(policy, toy_data, make_trainer):
    def silent(completions, sample_id):
        return [None if i % 2 else 0.0 for i in sample_id]

    module = GRPORecModule(policy, [silent], num_generations=3, optimizer=still, wasted_groups="preference_pairs")
    trainer = make_trainer(max_epochs=1, limit_train_batches=1)
    with pytest.warns(UserWarning, match="no reward of silent applies"):
        trainer.fit(module, toy_data(**SMALL, batch_size=16))
    part = module.generation.batches[0]
    found = (part.items == part.batch["target"][:, None]).any(dim=1)
    assert torch.equal(part.pairs, (part.batch["sample_id"] % 2 == 0) & ~found)
    assert torch.equal(part.learns, part.pairs)
    assert part.pairs.any()
