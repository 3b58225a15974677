"""A policy of the user's own: the one of the documentation, with each method returning something else."""

import sys
from dataclasses import replace

import pytest
import torch
from helpers.documents import blocks, run_block
from helpers.paths import REPOSITORY
from torch import nn

from minirec_pl import GRPORecModule, InputError, WarmStartModule
from minirec_pl.callbacks import MiniRec
from minirec_pl.rewards import hit
from minirec_pl.selection import RandomSelector

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def bag(tmp_path, monkeypatch):
    """The class of docs/extending.md."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (block,) = [one for one in blocks(REPOSITORY / "docs" / "extending.md") if "class BagOfItems" in one.text]
    run_block(block)
    from my_policy import BagOfItems

    yield BagOfItems
    del sys.modules["my_policy"]


def with_other(bag, method, change):
    own = getattr(bag, method)
    return type("Bag", (bag,), {method: lambda self, *args, **named: change(own(self, *args, **named))})()


def by_number(completions):
    """A reward that differs in nearly every group."""
    return [int(item.removeprefix("i")) % 7 for item in completions]


def grpo(policy, data, trainer, **options):
    module = GRPORecModule(policy, [by_number], num_generations=4, **options)
    trainer.fit(module, data(history_window=10, pool_samples=16))
    return module


def scored(policy, data, trainer):
    trainer.callbacks.append(MiniRec(8, selector=RandomSelector()))
    grpo(policy, data, trainer)


def warm(policy, data, trainer):
    trainer.fit(WarmStartModule(policy), data(train_on="warm_samples", warm_samples=16))


def evaluated(policy, data, trainer):
    trainer.validate(WarmStartModule(policy), data(val_samples=16))


def predicted(policy, data, trainer):
    trainer.predict(WarmStartModule(policy), data(test_samples=16))


CASES = [
    (grpo, "roll_out", lambda drawn: None, "Bag.roll_out returned a NoneType: return a DrawnGroups, see its docstring"),
    (grpo, "roll_out", lambda drawn: (drawn.items, drawn.logps), "Bag.roll_out returned a tuple: return a DrawnGroups"),
    (
        grpo,
        "roll_out",
        lambda drawn: replace(drawn, items=drawn.items[:, :3]),
        "Bag.roll_out returned items of the shape [8, 3]: return [8, 4]",
    ),
    (
        grpo,
        "roll_out",
        lambda drawn: replace(drawn, logps=drawn.logps[..., 0]),
        "Bag.roll_out returned logps of the shape [8, 4]: return [8, 4, L]",
    ),
    (grpo, "roll_out", lambda drawn: replace(drawn, mask=None), "Bag.roll_out returned a NoneType as mask: return a"),
    (grpo, "roll_out", lambda drawn: replace(drawn, items=drawn.items - 99), "return item indices in 0..79"),
    (scored, "roll_out", lambda drawn: replace(drawn, items=drawn.items + 99), "return item indices in 0..79"),
    (
        grpo,
        "completion_pass",
        lambda passed: passed._replace(logps=passed.logps[..., 0]),
        "Bag.completion_pass returned logps of the shape [",
    ),
    (
        grpo,
        "completion_pass",
        lambda passed: passed.logps,
        "Bag.completion_pass returned a Tensor: return a Completion",
    ),
    (scored, "signals", lambda found: None, "Bag.signals returned a NoneType: return a PolicySignals"),
    (
        scored,
        "signals",
        lambda found: found._replace(gradient=found.gradient[:, 0]),
        "Bag.signals: gradient has the shape [16]: give [16, n], a row per sample_id",
    ),
    (
        scored,
        "signals",
        lambda found: found._replace(embedding=found.embedding / 0),
        "Bag.signals: embedding is NaN or infinite for sample_id ",
    ),
    (evaluated, "item_logps", lambda logps: None, "Bag.item_logps returned a NoneType: return a Tensor"),
    (
        evaluated,
        "item_logps",
        lambda logps: logps[:, 1:],
        "Bag.item_logps returned scores of the shape [16, 79]: return",
    ),
    (
        predicted,
        "item_logps",
        lambda logps: logps[0],
        "Bag.item_logps returned scores of the shape [80]: return [16, 80]",
    ),
    (
        predicted,
        "item_logps",
        lambda logps: logps + float("nan"),
        "Bag.item_logps returned NaN: return the lowest value",
    ),
    (
        warm,
        "warm_start_loss",
        lambda found: found.loss,
        "Bag.warm_start_loss returned a Tensor: return a SupervisedLoss",
    ),
    (
        warm,
        "warm_start_loss",
        lambda found: found._replace(loss=found.loss.expand(3)),
        "Bag.warm_start_loss returned loss of the shape [3]: return a single number",
    ),
]


@pytest.mark.parametrize(("use", "method", "change", "words"), CASES)
def test_a_wrong_return_is_named_in_one_sentence(bag, toy_data, make_trainer, use, method, change, words):
    policy = with_other(bag, method, change)
    with pytest.raises(InputError) as error:
        use(policy, toy_data, make_trainer(max_epochs=1, limit_val_batches=1))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_policy_that_binds_nothing_or_is_none(bag, toy_data, make_trainer):
    class Unbound(bag):
        def bind(self, catalogue):
            pass

    class Narrow(bag):
        def roll_out(self, batch, options):
            pass

    with pytest.raises(InputError, match=r"^Unbound.bind left `catalogue` None: set self.catalogue in it"):
        grpo(Unbound(), toy_data, make_trainer())
    for policy, words in [
        (bag, r"policy is the class BagOfItems: give an object of it, BagOfItems\(\.\.\.\)"),
        (nn.Linear(2, 2), r"policy: Linear is no Policy: derive it from minirec_pl.policy.Policy and define"),
        (Narrow(), r"policy: Narrow.roll_out\(self, batch, options\) does not take what it is given: define `roll_out"),
    ]:
        for module in (GRPORecModule, WarmStartModule):
            with pytest.raises(InputError, match=words):
                module(policy)


def test_rewards_that_are_no_functions(bag):
    class Reward:
        def __call__(self, completions):
            return [0.0] * len(completions)

    for rewards, words in [
        (hit, "rewards is <function hit.*: give a list of functions"),
        ("hit", "rewards is 'hit': give a list of functions"),
        (["hit"], r"rewards is \['hit'\]: give a list of functions"),
        ([Reward], r"the reward Reward is a class: give an object of it, Reward\(\.\.\.\)"),
    ]:
        with pytest.raises(InputError, match=words):
            GRPORecModule(bag(), rewards=rewards)
    assert torch.equal(torch.tensor(GRPORecModule(bag(), rewards=[Reward()]).rewards[0](["a"])), torch.zeros(1))
