"""Groups that a beam search ends with, trained on by GRPO."""

import pytest
import torch
from helpers.plain_policy import PlainPolicy, many_token_policy

from minirec_pl import GRPORecModule, InputError
from minirec_pl.callbacks import MiniRec
from minirec_pl.selection import MiniRecSelector


def popular(completions, **columns):
    """A reward in which most groups differ: 1, 0.5 or 0 by the item's number."""
    return [(int(item.removeprefix("i")) % 3) / 2 for item in completions]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def one_step(make_trainer, module, data):
    trainer = make_trainer(max_epochs=-1, max_steps=1, log_every_n_steps=1)
    trainer.fit(module, data)
    return module.generation.batches[0]


@pytest.mark.parametrize("many", [False, True])
def test_the_group_is_the_most_likely_items(tiny_policy, toy_data, make_trainer, tmp_path, many):
    data = toy_data(batch_size=4)
    data.setup("fit")
    policy = many_token_policy(tmp_path / "policy", data.catalogue) if many else tiny_policy()
    plain = PlainPolicy(policy)
    part = one_step(
        make_trainer, GRPORecModule(policy, [popular], num_generations=5, rollouts="beam", optimizer=sgd), data
    )
    for row in range(4):
        history, seen = ([i for i in part.batch[key][row].tolist() if i >= 0] for key in ("history", "seen"))
        items = part.items[row].tolist()
        assert len(set(items)) == 5
        assert not set(items) & set(seen)
        logps = [float(plain.item_logp(history, seen, item).detach()) for item in items]
        assert logps == sorted(logps, reverse=True)
        if not many:
            every = sorted(
                (float(plain.item_logp(history, seen, i).detach()) for i in range(80) if i not in seen), reverse=True
            )
            assert logps == pytest.approx(every[:5], abs=1e-4)


def test_selection_goes_by_exact_probabilities(tiny_policy, toy_data, make_trainer):
    outputs = []

    class Module(GRPORecModule):
        def training_step(self, batch, batch_idx):
            outputs.append(super().training_step(batch, batch_idx))
            return outputs[-1]

    one_step(make_trainer, Module(tiny_policy(), [popular], num_generations=3, rollouts="beam"), toy_data(batch_size=4))
    signals = outputs[0]["signals"]
    assert signals.rewards is None
    assert signals.solve_probability is not None


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.9}, {"distinct_rollouts": True}])
def test_options_of_sampling_are_refused_with_beams(tiny_policy, options):
    with pytest.raises(InputError, match=r"takes the most likely items|draws from the whole"):
        GRPORecModule(tiny_policy(), rollouts="beam", **options)
    with pytest.raises(InputError, match="rollouts is 'best'"):
        GRPORecModule(tiny_policy(), rollouts="best")


def test_a_selector_that_goes_by_mean_rewards_is_refused(tiny_policy, toy_data, make_trainer):
    module = GRPORecModule(tiny_policy(), rollouts="beam", num_generations=3)
    callback = MiniRec(budget=10, selector=MiniRecSelector(mode="official"))
    with pytest.raises(InputError, match="as do beams"):
        make_trainer(callbacks=[callback]).fit(module, toy_data())
