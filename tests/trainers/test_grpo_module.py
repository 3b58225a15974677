"""Warm start and GRPO through a real Trainer."""

import copy
from itertools import chain

import numpy as np
import pytest
import torch
from helpers.plain_policy import PlainPolicy
from helpers.slow import slow
from helpers.watch import Watch, fit

from minirec_pl import GRPORecModule, InputError, WarmStartModule
from minirec_pl.rewards import hit
from minirec_pl.utils.modules import evaluation_mode


def popular(completions, **columns):
    """A reward in which most groups differ: 1, 0.5 or 0 by the item's number."""
    return [(int(item.removeprefix("i")) % 3) / 2 for item in completions]


class Recorder:
    """A reward that notes what it was asked."""

    def __init__(self, reward=popular):
        self.reward, self.calls = reward, []

    def __call__(self, completions, **columns):
        self.calls.append({"completions": completions, **columns})
        return self.reward(completions, target=columns["target"], sample_id=columns["sample_id"])


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize("loss_type", ["dapo", slow("grpo"), slow("dr_grpo")])
def test_the_gradient_is_that_of_a_plain_policy_gradient_loop(policy, toy_data, make_trainer, loss_type):
    plain, reward, group = PlainPolicy(policy), Recorder(), 4
    module = GRPORecModule(policy, [reward], num_generations=group, optimizer=sgd, loss_type=loss_type, temperature=1.3)
    watch = fit(make_trainer, module, toy_data(batch_size=6), 1)
    batch, call = watch.batches[0], reward.calls[0]
    index = {item: i for i, item in enumerate(policy.catalogue.item_ids)}
    items = np.array([index[item] for item in call["completions"]]).reshape(6, group)
    rewards = np.array(popular(call["completions"])).reshape(6, group)
    assert rewards.std() > 0
    tokens = sum(len(plain.ids[item]) for item in items.flatten())
    for b in range(6):
        history = [i for i in batch["history"][b].tolist() if i >= 0]
        seen = [i for i in batch["seen"][b].tolist() if i >= 0]
        spread = rewards[b].std(ddof=1) + 1e-4
        for g in range(group):
            advantage = (rewards[b, g] - rewards[b].mean()) / spread
            logp = plain.item_logp(history, seen, int(items[b, g]), 1.3)
            length = len(plain.ids[items[b, g]])
            share = {"dapo": tokens, "grpo": 6 * group * length, "dr_grpo": 6 * group * policy.id_length}[loss_type]
            (-advantage * logp / share).backward()
    for ours, truth in zip(watch.gradients[0], plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours.double(), truth.grad, rtol=2e-3, atol=2e-5)
    assert max(float(gradient.abs().max()) for gradient in watch.gradients[0]) > 1e-3


def test_rewards_get_external_ids_group_after_group(policy, toy_data, make_trainer):
    reward, plain = Recorder(), PlainPolicy(policy)
    watch = fit(make_trainer, GRPORecModule(policy, [reward], num_generations=3), toy_data(batch_size=4), 1)
    batch, call, ids = watch.batches[0], reward.calls[0], policy.catalogue.item_ids
    expected = {"completions", "prompts", "target", "sample_id", "history", "group", "user", "logp", "recommended"}
    assert set(call) == expected
    assert {len(column) for column in call.values()} == {12}
    for n in range(12):
        b = n // 3
        history, masked = ([i for i in batch[key][b].tolist() if i >= 0] for key in ("history", "seen"))
        assert call["history"][n] == [ids[i] for i in history]
        assert (call["user"][n], call["group"][n]) == (int(batch["user"][b]), b)
        logp = plain.item_logp(history, masked, ids.index(call["completions"][n]))
        assert call["logp"][n] == pytest.approx(float(logp.detach()), abs=1e-3)
        assert call["sample_id"][n] == int(batch["sample_id"][b])
        assert call["target"][n] == ids[int(batch["target"][b])]
        assert call["prompts"][n] == " ".join(ids[i] for i in batch["history"][b].tolist() if i >= 0)
        seen = {ids[i] for i in batch["seen"][b].tolist() if i >= 0}
        assert call["completions"][n] in set(ids) - seen


def test_figures_under_the_names_of_trl(policy, toy_data, make_trainer):
    group = 4
    first, second = Recorder(), Recorder(lambda completions, **columns: [0.1] * len(completions))
    module = GRPORecModule(policy, [first, second], [1.0, 2.0], num_generations=group, optimizer=sgd)
    plain = PlainPolicy(policy)
    watch = fit(make_trainer, module, toy_data(batch_size=5), 1)
    logged, batch, output = watch.logged[0], watch.batches[0], watch.outputs[0]
    rewards = np.array(popular(first.calls[0]["completions"])).reshape(5, group)
    assert logged["reward"] == pytest.approx(rewards.mean() + 0.2, abs=1e-6)
    assert logged["reward_std"] == pytest.approx(rewards.std(axis=1, ddof=1).mean(), abs=1e-6)
    flat = (rewards == rewards[:, :1]).all(axis=1)
    assert logged["frac_reward_zero_std"] == pytest.approx(flat.mean())
    assert logged["rewards/Recorder/mean"] == pytest.approx(rewards.mean(), abs=1e-6)
    assert logged["rewards/Recorder_2/mean"] == pytest.approx(0.1, abs=1e-6)
    assert logged["clip_ratio/low_mean"] == logged["clip_ratio/high_mean"] == 0
    assert "kl" not in logged
    entropies, lengths = [], []
    index = {item: i for i, item in enumerate(policy.catalogue.item_ids)}
    for n, item in enumerate(first.calls[0]["completions"]):
        history, seen = ([i for i in batch[key][n // group].tolist() if i >= 0] for key in ("history", "seen"))
        steps = plain.steps(history, seen, index[item])
        entropies += [float(entropy.detach()) for _, entropy in steps]
        lengths.append(len(steps))
    assert logged["entropy"] == pytest.approx(np.mean(entropies), abs=1e-4)
    assert logged["completions/mean_length"] == pytest.approx(np.mean(lengths))
    signals = output["signals"]
    np.testing.assert_allclose(signals.rewards.numpy(), rewards + 0.2, rtol=1e-6)
    assert signals.sample_id.tolist() == batch["sample_id"].tolist()
    for b in range(5):
        history, seen = ([i for i in batch[key][b].tolist() if i >= 0] for key in ("history", "seen"))
        truth = float(plain.item_logp(history, seen, int(batch["target"][b])).detach().exp())
        assert float(signals.solve_probability[b]) == pytest.approx(truth, rel=1e-3, abs=1e-9)


def test_equal_rewards_that_no_float_can_hold_count_as_equal(tiny_policy, toy_data, make_trainer):
    def tenth(completions):
        return [0.1] * len(completions)

    watch = fit(make_trainer, GRPORecModule(tiny_policy(), [tenth], num_generations=7), toy_data(), 1)
    assert watch.logged[0]["frac_reward_zero_std"] == 1


def test_the_solve_probability_met_in_training_knows_no_dropout(tiny_policy, toy_data, make_trainer):
    policy = tiny_policy(attention_dropout=0.6)
    before = copy.deepcopy(policy)
    watch = fit(make_trainer, GRPORecModule(policy, num_generations=2), toy_data(), 1)
    batch = watch.batches[0]
    exact = before.item_logps(batch).gather(1, batch["target"][:, None])[:, 0].exp()
    torch.testing.assert_close(watch.outputs[0]["signals"].solve_probability.float(), exact)


def test_without_reward_nothing_is_learnt(policy, toy_data, make_trainer):
    def nothing(completions):
        return [0.0] * len(completions)

    before = copy.deepcopy(policy.state_dict())
    watch = fit(make_trainer, GRPORecModule(policy, [nothing], num_generations=4, optimizer=sgd), toy_data(), 2)
    assert all(not gradient.any() for step in watch.gradients for gradient in step)
    assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    assert watch.logged[0]["frac_reward_zero_std"] == 1


def test_the_reference_stays_where_the_policy_started(tiny_policy, toy_data, make_trainer):
    policy = tiny_policy()
    before = copy.deepcopy(policy.state_dict())
    module = GRPORecModule(policy, [popular], num_generations=4, optimizer=sgd, beta=0.5)
    watch = fit(make_trainer, module, toy_data(), 4)
    assert watch.logged[0]["kl"] == pytest.approx(0, abs=1e-7)
    assert watch.logged[3]["kl"] > 1e-6
    assert all(torch.equal(value, before[name]) for name, value in module.reference.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in module.reference.parameters())
    assert not any(child.training for child in module.reference.modules())
    assert any(not torch.equal(value, before[name]) for name, value in policy.state_dict().items())
    prompts = sum(policy.prompt_tokens(batch) for batch in watch.batches)
    assert module.cost.tokens_forward["training"] == 3 * prompts


@pytest.mark.parametrize("correct", [True, False])
def test_the_kl_term_pulls_back_to_the_reference(tiny_policy, toy_data, make_trainer, correct):
    policy = tiny_policy()
    options = {"beta": 2.0, "use_bias_correction_kl": correct}
    module = GRPORecModule(policy, [popular], num_generations=2, optimizer=sgd, **options)
    module.configure_model()
    with torch.no_grad():
        for parameter in module.reference.parameters():
            parameter.mul_(1.5)
    plain, fixed = PlainPolicy(policy), PlainPolicy(module.reference)
    reward = Recorder(lambda completions, **columns: [1.0] * len(completions))
    module.rewards = [reward]
    watch = fit(make_trainer, module, toy_data(batch_size=3), 1)
    index = {item: i for i, item in enumerate(policy.catalogue.item_ids)}
    for n, item in enumerate(reward.calls[0]["completions"]):
        row = [watch.batches[0][key][n // 2].tolist() for key in ("history", "seen")]
        history, seen = ([i for i in values if i >= 0] for values in row)
        logp = plain.item_logp(history, seen, index[item])
        difference = fixed.item_logp(history, seen, index[item]).detach() - logp
        ratio = (logp - logp.detach()).exp() if correct else 1.0
        (2.0 * ratio * (difference.exp() - difference - 1) / 6).backward()
    for ours, truth in zip(watch.gradients[0], plain.model.parameters(), strict=True):
        torch.testing.assert_close(ours.double(), truth.grad, rtol=2e-3, atol=2e-5)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tiny_policy, toy_data, make_trainer):
    runs = []
    for seed in (1, 1, 2):
        policy, reward = tiny_policy(), Recorder()
        torch.manual_seed(seed)
        fit(make_trainer, GRPORecModule(policy, [reward], num_generations=4), toy_data(), 3)
        runs.append([call["completions"] for call in reward.calls])
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert runs[0][0] != runs[0][1]


def test_a_checkpoint_keeps_the_random_numbers_going(tiny_policy, toy_data, make_trainer, tmp_path):
    module = GRPORecModule(tiny_policy(), [popular], num_generations=2)
    trainer = make_trainer(max_epochs=-1, max_steps=2)
    trainer.fit(module, toy_data())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    torch.manual_seed(99)
    other = GRPORecModule(tiny_policy(), [popular], num_generations=2)
    make_trainer(max_epochs=-1, max_steps=2).fit(other, toy_data(), ckpt_path=tmp_path / "a.ckpt")
    assert (other.rollout_seed, other.rollout_step) == (module.rollout_seed, 2)
    assert other.cost.tokens_forward == module.cost.tokens_forward


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda n: [float("nan")] * n, "reward broken returned nan for sample_id"),
        (lambda n: [1.0] * (n - 1), "reward broken returned 15 values for 16 completions .*sample_id"),
        (lambda n: 1.0, "reward broken returned float"),
    ],
)
def test_a_broken_reward_is_named_with_its_sample(tiny_policy, toy_data, make_trainer, returned, message):
    def broken(completions):
        return returned(len(completions))

    with pytest.raises(InputError, match=message):
        fit(make_trainer, GRPORecModule(tiny_policy(), [broken], num_generations=2), toy_data(), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 1}, "num_generations is 1: .* at least 2"),
        ({"scoring_generations": 1}, "scoring_generations is 1: give 0"),
        ({"scoring_generations": -2}, "scoring_generations is -2"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"epsilon": -0.1}, "epsilon is -0.1"),
        ({"beta": -1.0}, "beta is -1.0"),
        ({"loss_type": "ppo"}, "loss_type is 'ppo'"),
        ({"scale_rewards": "all"}, "scale_rewards is 'all'"),
        ({"rewards": [hit], "reward_weights": [1.0, 2.0]}, "reward_weights has 2 numbers for 1 reward"),
        ({"predict_k": 0}, "predict_k is 0"),
    ],
)
def test_options_out_of_range(tiny_policy, options, message):
    with pytest.raises(InputError, match=message):
        GRPORecModule(tiny_policy(), **options)


def test_batches_of_the_other_stage(tiny_policy, toy_data, make_trainer):
    with pytest.raises(InputError, match=r"set data\.train_on to `pool`"):
        fit(make_trainer, GRPORecModule(tiny_policy()), toy_data(train_on="warm"), 1)
    module = WarmStartModule(tiny_policy())
    fit(make_trainer, module, toy_data(), 1)
    assert module.cost.tokens_backward["warm_start"] > 0


# Scoring


def pool_batch(data, n=9):
    data.setup("fit")
    return next(iter(data.sample_loader(data.pool_ids[:n], batch_size=n)))


def part_of(batch, rows):
    return {name: value[rows] for name, value in batch.items()}


def scored(policy, **options):
    torch.manual_seed(5)
    module = GRPORecModule(policy, [popular], **options)
    module.configure_model()
    return module


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_scores_are_exact(policy, toy_data, temperature):
    batch, plain = pool_batch(toy_data()), PlainPolicy(policy)
    signals = scored(policy, scoring_generations=6, temperature=temperature).sample_signals(batch)
    assert signals.rewards.shape == (9, 6)
    assert set(signals.rewards.flatten().tolist()) <= {0.0, 0.5, 1.0}
    assert signals.gradient.shape == signals.embedding.shape == (9, 16)
    for b in range(9):
        history, seen = ([i for i in batch[key][b].tolist() if i >= 0] for key in ("history", "seen"))
        truth = plain.item_logp(history, seen, int(batch["target"][b]), temperature).detach().exp()
        assert float(signals.solve_probability[b]) == pytest.approx(float(truth), rel=1e-3, abs=1e-9)
        last = plain.model.base_model(torch.tensor([plain.prompt(history)])).last_hidden_state[0, -1]
        torch.testing.assert_close(signals.embedding[b].double(), last.double().detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"top_k": 5, "top_p": 0.9}])
@pytest.mark.parametrize("gradient", ["first", "hvp"])
def test_a_score_does_not_depend_on_the_batch(policy, toy_data, gradient, options):
    batch = pool_batch(toy_data())
    module = scored(policy, scoring_generations=16, **options)
    together = module.sample_signals(batch, gradient)
    for rows in ([4], [8, 2, 5]):
        alone = module.sample_signals(part_of(batch, rows), gradient)
        assert torch.equal(alone.rewards, together.rewards[rows])
        for name in ("gradient", "embedding", "solve_probability"):
            torch.testing.assert_close(getattr(alone, name), getattr(together, name)[rows], rtol=1e-3, atol=1e-5)
    module.rollout_step += 1
    assert not torch.equal(module.sample_signals(batch).rewards, together.rewards)


def test_scoring_leaves_mode_weights_and_random_numbers_alone(tiny_policy, toy_data):
    policy = tiny_policy(attention_dropout=0.5)
    module, batch = scored(policy, scoring_generations=4), pool_batch(toy_data())
    module.policy.model.get_input_embeddings().eval()
    modes = [child.training for child in module.modules()]
    assert len(set(modes)) == 2
    state = torch.get_rng_state()
    first, second = module.sample_signals(batch), module.sample_signals(batch)
    assert torch.equal(first.solve_probability, second.solve_probability)
    assert torch.equal(state, torch.get_rng_state())
    assert [child.training for child in module.modules()] == modes
    assert all(p.grad is None for p in module.parameters())


def test_scoring_under_inference_and_without_rollouts(policy, toy_data):
    batch, module = pool_batch(toy_data()), scored(policy, scoring_generations=0)
    plain = module.sample_signals(batch)
    assert plain.rewards is None
    with torch.inference_mode(), evaluation_mode(module):
        inside = module.sample_signals({name: value.clone() for name, value in batch.items()})
    torch.testing.assert_close(inside.gradient, plain.gradient)


@pytest.mark.parametrize("space", ["answer", "lora"])
def test_trajectory_is_measured_once_training_has_moved_and_survives_a_checkpoint(
    policy, toy_data, make_trainer, tmp_path, space
):
    data = toy_data()
    batch = pool_batch(data)
    module = scored(policy, num_generations=4, optimizer=sgd)
    before = module.sample_signals(batch, "trajectory", space)
    assert before.alignment is None
    torch.testing.assert_close(before.gradient, module.sample_signals(batch, "first", space).gradient)
    assert before.gradient.shape == (9, {"answer": 16, "lora": 512}[space])
    trainer = make_trainer(max_epochs=-1, max_steps=3)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    after = module.sample_signals(batch, "trajectory", space)
    assert after.alignment.shape == (9,)
    assert float(after.alignment.abs().max()) > 1e-3

    other = GRPORecModule(copy.deepcopy(policy), [popular], num_generations=4, optimizer=sgd)
    make_trainer(max_epochs=-1, max_steps=3).fit(other, data, ckpt_path=tmp_path / "a.ckpt")
    with torch.inference_mode():
        part = {name: value[[1, 7]].clone() for name, value in batch.items()}
        again = other.sample_signals(part, "trajectory", space)
    torch.testing.assert_close(again.alignment, after.alignment[[1, 7]], rtol=1e-4, atol=1e-6)


def test_a_checkpoint_has_no_start_of_a_trajectory_nobody_asked_for(tiny_policy, toy_data, make_trainer, tmp_path):
    module, data = GRPORecModule(tiny_policy(), [popular], num_generations=2), toy_data()
    trainer = make_trainer(max_epochs=-1, max_steps=1)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert "trajectory_start" not in torch.load(tmp_path / "a.ckpt", weights_only=True)
    module.sample_signals(pool_batch(data), "trajectory")
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    start = torch.load(tmp_path / "a.ckpt", weights_only=True)["trajectory_start"]
    assert torch.equal(start["head"], module.policy.model.get_output_embeddings().weight)


def test_scoring_leaves_the_gradients_of_the_run_alone(policy, toy_data):
    batch, module = pool_batch(toy_data()), scored(policy, scoring_generations=0)
    for parameter in module.policy.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    for options in ({}, {"gradient": "hvp"}, {"gradient": "trajectory"}, {"gradient_space": "lora"}):
        module.sample_signals(batch, **options)
    assert all((parameter.grad == 7).all() for parameter in module.policy.parameters())


# Cost


def test_the_space_lora_is_charged_a_backward_pass_of_each_sample(policy, toy_data):
    length = [sum(t >= 0 for t in row) for row in policy.trie.item_tokens.tolist()]
    batch, module = pool_batch(toy_data()), scored(policy, scoring_generations=0)
    module.sample_signals(batch)
    plain = module.cost.tokens_forward["scoring"]
    module.sample_signals(batch, gradient_space="lora")
    histories = [sum(length[i] for i in row if i >= 0) for row in batch["history"].tolist()]
    each = sum(
        1 + history + length[item] - 1 for history, item in zip(histories, batch["target"].tolist(), strict=True)
    )
    assert module.cost.tokens_forward["scoring"] == 2 * plain + each
    assert module.cost.tokens_backward["scoring"] == each


def test_tokens_equal_a_count_by_hand(policy, toy_data, make_trainer):
    length = [sum(t >= 0 for t in row) for row in policy.trie.item_tokens.tolist()]
    decided = policy.trie.decided.tolist()
    index = {item: i for i, item in enumerate(policy.catalogue.item_ids)}
    data, reward = toy_data(batch_size=6), Recorder()
    module = GRPORecModule(policy, [reward], num_generations=3, scoring_generations=2)
    watch = fit(make_trainer, module, data, 2)

    def fed(items):
        return sum(decided[item] - 1 for item in items)

    def prompts(batch, kept=None):
        rows = [tuple(i for i in row if i >= 0) for row in batch["history"].tolist()]
        rows = rows if kept is None else [rows[b] for b in kept]
        return sum(1 + sum(length[i] for i in row) for n, row in enumerate(rows) if n == 0 or row != rows[n - 1])

    forward = backward = flat_groups = 0
    for batch, call in zip(watch.batches, reward.calls, strict=True):
        groups = [call["completions"][b * 3 : b * 3 + 3] for b in range(6)]
        mixed = [b for b in range(6) if len(set(popular(groups[b]))) > 1]
        groups = [[index[item] for item in group] for group in groups]
        every, taught = list(chain(*groups)), list(chain(*(groups[b] for b in mixed)))
        flat_groups += 6 - len(mixed)
        rolled_out = prompts(batch) + fed(every) + fed(batch["target"].tolist())
        trained = prompts(batch, mixed) + fed(taught)
        forward += rolled_out + trained + fed(every) - fed(taught)  # the entropy of what is not trained on
        backward += trained
    assert flat_groups > 0
    cost = module.cost
    assert (cost.tokens_forward["training"], cost.tokens_backward["training"]) == (forward, backward)
    assert cost.rollouts["training"] == 2 * 6 * 3

    batch = pool_batch(data)
    module.sample_signals(batch)
    scoring = prompts(batch) + fed(batch["target"].tolist()) + fed(index[i] for i in reward.calls[-1]["completions"])
    assert cost.tokens_forward["scoring"] == scoring
    assert cost.tokens_backward["scoring"] == 0
    assert cost.rollouts["scoring"] == 18


def test_a_warm_start_learns_and_counts_its_tokens(tiny_policy, toy_data, make_trainer):
    policy, watch = tiny_policy(), Watch()
    module = WarmStartModule(policy, optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.02))
    trainer = make_trainer(max_epochs=8, log_every_n_steps=1, callbacks=[watch])
    trainer.fit(module, toy_data(train_on="warm"))
    losses = [logged["train/loss"] for logged in watch.logged]
    assert losses[0] == pytest.approx(np.log(80), abs=0.5)
    assert losses[-1] < losses[0] - 0.2
    tokens = sum(int((batch["sequence"] >= 0).sum()) + len(batch["sequence"]) for batch in watch.batches)
    assert module.cost.tokens_forward["warm_start"] == module.cost.tokens_backward["warm_start"] == tokens
    assert module.cost.tokens_forward["training"] == 0
    assert module.cost.seconds["warm_start"] > 0
