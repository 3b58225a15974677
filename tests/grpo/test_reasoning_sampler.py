"""RecPO through a real Trainer: rewards, gradients and signals against unpadded float64 loops."""

import math

import pytest
import torch
from helpers.text_policy import PlainRetriever, text_policy, toy_batch, toy_catalogue, write_model
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from minirec_pl import GRPORecModule, InputError, WarmStartModule
from minirec_pl.callbacks import MiniRec
from minirec_pl.data.samples import Catalogue
from minirec_pl.policy import RetrievalPolicy
from minirec_pl.policy.item_index import draw_negatives
from minirec_pl.policy.retrieval import SIGNAL_NEGATIVES
from minirec_pl.rewards import NDCGReward, SoftmaxMixReward, hit

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode"),
]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05)


class Watch(Callback):
    """Notes gradients, rollouts and figures of each step."""

    def __init__(self):
        self.gradients, self.generations, self.logged, self.outputs = [], [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append([p.grad.clone() for p in pl_module.policy.parameters() if p.requires_grad])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.generations.append(getattr(pl_module, "generation", None))
        self.outputs.append(outputs)
        self.logged.append({name: float(value) for name, value in trainer.logged_metrics.items()})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def text_data(toy_data):
    """The toy data with histories short enough for the model."""
    return lambda **options: toy_data(**{"history_window": 3, **options})


@pytest.fixture
def make_policy(folder, text_data):
    """A policy on the toy data's catalogue, whose items have words for ids."""
    data = text_data()
    data.setup("fit")
    return lambda **options: text_policy(folder, catalogue=data.catalogue, **{"max_completion_length": 4, **options})


def fit(make_trainer, module, data, steps, callbacks=(), ckpt_path=None, **options):
    watch = Watch()
    options = {"max_epochs": -1, "max_steps": steps, "log_every_n_steps": 1, **options}
    trainer = make_trainer(callbacks=[watch, *callbacks], **options)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return watch


def gain(rank, k):
    return 1 / math.log2(rank + 1) if rank <= k else 0.0


def plain_rewards(plain, part, vectors, k, weight):
    """Rewards [B][G] by ranking the whole catalogue for each reasoning, and the states."""
    rewards, states = [], []
    for row in range(len(part)):
        target = int(part.batch["target"][row])
        seen = [item for item in part.batch["seen"][row].tolist() if item >= 0]
        states.append([plain.state(part.batch, row, text) for text in part.texts[row].tolist()])
        scores = torch.stack([vectors @ (h / h.norm()) for h in states[-1]]) / plain.policy.similarity_temperature
        scores[:, seen] = -torch.inf
        p = scores.softmax(dim=1)[:, target].tolist()
        ranks = ((scores > scores[:, target : target + 1]).sum(dim=1) + 1).tolist()
        rewards.append([weight * gain(rank, k) + (1 - weight) * q for rank, q in zip(ranks, p, strict=True)])
    return torch.tensor(rewards), states


@pytest.mark.parametrize(
    ("loss_type", "accumulate", "options"),
    [
        ("dapo", 1, {"relabel_topk": 1}),
        ("grpo", 2, {"relabel_topk": 2, "temperature": 1.3}),
        ("dr_grpo", 2, {"relabel_topk": 4}),
    ],
)
def test_the_gradient_is_that_of_a_plain_loop(make_policy, text_data, make_trainer, loss_type, accumulate, options):
    group, k, weight = 4, 80, 0.6
    policy = make_policy(cached_negatives=3)
    plain = PlainRetriever(policy)
    module = GRPORecModule(
        policy, [SoftmaxMixReward(k, weight)], num_generations=group, optimizer=sgd, loss_type=loss_type, **options
    )
    watch = fit(make_trainer, module, text_data(batch_size=4 // accumulate), 1, accumulate_grad_batches=accumulate)
    parts = watch.generations[0].batches
    assert len(parts) == accumulate
    tokens = sum(int((part.texts >= 0).sum()) for part in parts)
    temperature, cached, trains = options.get("temperature", 1.0), 0, 0
    with torch.no_grad():
        cache = torch.stack([plain.item(item) for item in range(len(policy.catalogue))])
    for part in parts:
        rewards, states = plain_rewards(plain, part, cache, k, weight)
        torch.testing.assert_close(part.rewards.double(), rewards.double(), rtol=1e-3, atol=1e-4)
        inside = sorted(set(part.batch["target"].tolist()))
        for row in range(len(part)):
            advantages = ((rewards[row] - rewards[row].mean()) / (rewards[row].std() + 1e-4)).tolist()
            best = sorted(range(group), key=lambda g: -advantages[g])[: options["relabel_topk"]]
            target = int(part.batch["target"][row])
            negatives = [item for item in part.batch["negatives"][row].tolist() if item not in inside]
            assert target not in negatives
            assert len(part.batch["negatives"][row]) == 3
            cached += len(negatives)
            loss = torch.zeros((), dtype=torch.float64)
            for g, text in enumerate(part.texts[row].tolist()):
                logps = plain.token_logps(part.batch, row, text, temperature)
                share = {"dapo": tokens, "grpo": 4 * group * len(logps), "dr_grpo": 4 * group * 4}[loss_type]
                loss = loss - advantages[g] * logps.sum() / share
                if g in best:
                    user = states[row][g] / states[row][g].norm()
                    vectors = torch.stack([*map(plain.item, inside), *cache[negatives]])
                    logp = (vectors @ user / policy.similarity_temperature).log_softmax(dim=0)[inside.index(target)]
                    loss = loss - advantages[g] * logp / (4 * group)
            trains += max(map(abs, advantages)) > 0.001
            loss.backward()
    assert trains > 1
    assert cached > 3
    trained = [p for p in plain.model.parameters() if p.requires_grad]
    for ours, truth in zip(watch.gradients[0], trained, strict=True):
        torch.testing.assert_close(ours.double(), truth.grad, rtol=1e-2, atol=1e-4)
    assert max(float(gradient.abs().max()) for gradient in watch.gradients[0]) > 1e-2
    assert watch.logged[0]["item_loss"] != 0


def test_micro_batches_add_up_where_all_share_their_negatives(make_policy, text_data, make_trainer):
    """With one target for all, no sample is another's negative, and micro-batches are the whole batch."""
    gradients = []
    for accumulate in (1, 2, 4):
        data = text_data(batch_size=4 // accumulate)
        data.setup("fit")
        module = GRPORecModule(make_policy(cached_negatives=5), num_generations=3, optimizer=sgd)
        module.rollout_seed = 11

        class OneTarget(Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                for part in batch.get("generation", {}).get("batches", []):
                    part["target"].fill_(7)
                batch["target"].fill_(7)

        options = {"accumulate_grad_batches": accumulate}
        watch = fit(make_trainer, module, data, 1, [OneTarget()], **options)
        texts = torch.cat([part.texts for part in watch.generations[0].batches])
        targets = torch.cat([part.batch["target"] for part in watch.generations[0].batches])
        assert bool((targets == 7).all())
        gradients.append((texts, watch.gradients[0]))
    for texts, gradient in gradients[1:]:
        assert torch.equal(texts, gradients[0][0])
        for ours, truth in zip(gradient, gradients[0][1], strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-3, atol=1e-5)


def test_rewards_get_ranks_probabilities_and_the_text(make_policy, text_data, make_trainer):
    calls = []

    def watcher(completions, target, target_rank, target_probability, recommended, sample_id, logp):
        calls.append((completions, target, target_rank, target_probability, recommended, sample_id))
        return [float(len(text)) for text in completions]

    policy = make_policy()
    module = GRPORecModule(policy, [watcher], num_generations=3, optimizer=sgd)
    watch = fit(make_trainer, module, text_data(batch_size=4), 1)
    part, (completions, target, rank, p, recommended, ids) = watch.generations[0].batches[0], calls[0]
    assert completions == policy.words(part.texts)
    assert len(set(completions)) > 1
    assert ids == part.batch["sample_id"].repeat_interleave(3).tolist()
    names = policy.catalogue.item_ids
    assert target == [names[i] for i in part.batch["target"].repeat_interleave(3).tolist()]
    assert recommended == [names[i] for i in part.items.flatten().tolist()]
    assert all(1 <= place <= len(names) and 0 < q < 1 for place, q in zip(rank, p, strict=True))
    assert all((place == 1) == (best == wanted) for place, best, wanted in zip(rank, recommended, target, strict=True))
    assert watch.logged[0]["completions/mean_length"] == pytest.approx(float((part.texts >= 0).sum(-1).float().mean()))
    signals = watch.outputs[0]["signals"]
    assert signals.solve_probability is None
    assert torch.equal(signals.rewards, part.rewards)


def test_truncated_reasonings_can_be_left_out_of_the_token_loss(make_policy, text_data, make_trainer):
    policy = make_policy()
    module = GRPORecModule(policy, num_generations=4, optimizer=sgd, mask_truncated_completions=True)
    part = fit(make_trainer, module, text_data(batch_size=4), 1).generations[0].batches[0]
    ended = (part.texts == 2).any(dim=-1)
    assert torch.equal(part.mask, (part.texts >= 0) & ended[..., None])
    assert bool((part.texts[~ended] >= 0).all())
    assert not bool(ended.all())


def test_the_reference_is_the_adapter_switched_off(make_policy, text_data, make_trainer):
    policy = make_policy(noise=0.0)
    module = GRPORecModule(policy, num_generations=3, optimizer=sgd, beta=0.1, num_iterations=2)
    watch = fit(make_trainer, module, text_data(batch_size=4), 2)
    part = watch.generations[0].batches[0]
    torch.testing.assert_close(part.ref_logps, part.old_logps)
    assert watch.logged[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert watch.logged[1]["kl"] > 0
    assert module.reference is None


def test_dynamic_sampling_drops_flat_groups(make_policy, text_data, make_trainer):
    def some(completions, sample_id):
        return [float(len(text)) if sample % 2 else 0.0 for text, sample in zip(completions, sample_id, strict=True)]

    module = GRPORecModule(make_policy(), [some], num_generations=4, optimizer=sgd, wasted_groups="dynamic_sampling")
    watch = fit(make_trainer, module, text_data(batch_size=4), 2)
    for generation in watch.generations:
        for part in generation.batches:
            assert not bool(part.flat.any())
            assert bool((part.batch["sample_id"] % 2 == 1).all())


def scored(policy, **options):
    module = GRPORecModule(policy, **{"num_generations": 4, "scoring_generations": 3, **options})
    module.configure_model()
    module.rollout_seed = 5
    return module


@pytest.mark.parametrize("gradient", ["first", "hvp"])
def test_signals_are_those_of_autograd_on_each_sample_alone(folder, gradient):
    policy = text_policy(folder, max_completion_length=4)
    module, batch, plain = scored(policy), toy_batch(), PlainRetriever(policy)
    signals = module.sample_signals(batch, gradient)
    for row in range(4):
        alone = module.sample_signals({name: value[row : row + 1] for name, value in batch.items()}, gradient)
        torch.testing.assert_close(alone.rewards[0], signals.rewards[row], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(alone.gradient[0], signals.gradient[row], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(alone.embedding[0], signals.embedding[row], rtol=1e-4, atol=1e-5)
    numbers = policy.roll_out(batch, module.rollout_options, torch.zeros(4, 3, 4, dtype=torch.float64)).texts
    assert numbers.shape == (4, 3, 4)
    from minirec_pl.grpo.buffer import scoring_numbers

    texts = policy.roll_out(batch, module.rollout_options, scoring_numbers((5, 0), batch["sample_id"], (3, 4))).texts
    others = draw_negatives(12, batch["target"], batch["sample_id"], [5], SIGNAL_NEGATIVES)
    for row in range(4):
        target, rewards = int(batch["target"][row]), signals.rewards[row].double()
        items = [target, *others[row].tolist()]
        assert sorted(items) == list(range(12))
        with torch.no_grad():
            vectors = torch.stack([plain.item(item) for item in items])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        total, embedding = 0.0, 0.0
        for g, text in enumerate(texts[row].tolist()):
            state = plain.state(batch, row, text).detach().requires_grad_()
            p = (vectors @ (state / state.norm()) / policy.similarity_temperature).softmax(dim=0)[0]
            slope = torch.autograd.grad(-p / p.detach(), state, create_graph=True)[0]
            embedding = embedding + state.detach() / state.detach().norm() / 3
            if gradient == "first":
                total = total + advantages[g] * slope.detach() / 3
            elif g == 0:
                total = torch.autograd.grad(slope @ slope, state)[0]
        if gradient == "hvp":
            state = plain.state(batch, row, texts[row, 0].tolist()).detach().requires_grad_()
            logp = (vectors @ (state / state.norm()) / policy.similarity_temperature).log_softmax(dim=0)[0]
            p0 = logp.exp().detach()
            slope = torch.autograd.grad(-logp.exp() / p0, state, create_graph=True)[0]
            total = torch.autograd.grad(slope @ slope, state)[0]
        torch.testing.assert_close(
            signals.gradient[row].double(), total, rtol=1e-2, atol=1e-2 * float(total.norm()) + 1e-4
        )
        torch.testing.assert_close(signals.embedding[row].double(), embedding, rtol=1e-3, atol=1e-4)
    assert float(signals.gradient.abs().max()) > 0
    assert signals.solve_probability is None


def test_other_ranks_targets_are_negatives(folder):
    policy = text_policy(folder, cached_negatives=2)
    batches = [toy_batch(3, seed=seed) for seed in (0, 1)]
    there = torch.tensor([1, 4, 9, 2, 2, 8])

    def reduce(table):
        assert table.shape == (2, 6)
        assert not bool(table[1].any())
        return table + torch.stack([torch.zeros(6), there.double()])

    made = policy.with_negatives(batches, (3, 1), (0, 2), reduce)
    plain = policy.with_negatives(batches, (3, 1), None, reduce)
    for number in range(2):
        assert made[number]["negatives"].shape == (3, 5)
        assert torch.equal(made[number]["negatives"][:, :2], plain[number]["negatives"])
        assert made[number]["negatives"][:, 2:].tolist() == [there[3 * number : 3 * number + 3].tolist()] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distinct_rollouts": True}, "distinct_rollouts is for policies that generate an item"),
        ({"wasted_groups": "preference_pairs"}, "wasted_groups is for policies that generate an item"),
        ({"rollouts": "beam"}, "rollouts is for policies that generate an item"),
        ({"rewards": [hit]}, "the reward hit compares completions with the target"),
        ({"scoring_generations": 0}, "scoring_generations is 0"),
        ({"relabel_topk": 9}, "relabel_topk is 9"),
        ({"max_completion_length": 0}, "max_completion_length is 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(folder, options, message):
    with pytest.raises(InputError, match=message):
        GRPORecModule(text_policy(folder), **options)


@pytest.mark.parametrize(
    "name", ["max_completion_length", "mask_truncated_completions", "negatives_across_ranks", "relabel_topk"]
)
def test_options_of_texts_are_refused_with_items(tiny_policy, name):
    with pytest.raises(InputError, match=f"{name} is for policies that reason in text"):
        GRPORecModule(tiny_policy(), **{name: 5 if name in ("max_completion_length", "relabel_topk") else True})


def test_signals_that_do_not_exist_are_refused(folder):
    module = scored(text_policy(folder))
    for options in ({"gradient": "trajectory"}, {"gradient_space": "lora"}):
        with pytest.raises(InputError, match="at the hidden state of the answer"):
            module.sample_signals(toy_batch(), **options)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_it_learns(folder, make_trainer, seed):
    def adam(parameters):
        return torch.optim.Adam(parameters, lr=0.02)

    torch.manual_seed(seed)
    policy = text_policy(folder, noise=0.0, max_completion_length=2, cached_negatives=4)
    module = GRPORecModule(policy, [SoftmaxMixReward(12, 0.5)], num_generations=4, optimizer=adam)
    watch = Watch()
    trainer = make_trainer(max_epochs=1, log_every_n_steps=1, callbacks=[watch])
    trainer.fit(module, torch.utils.data.DataLoader([toy_batch(8, seed=seed)] * 14, batch_size=None))
    rewards = [logged["reward"] for logged in watch.logged]
    assert sum(rewards[-2:]) > sum(rewards[:2]) + 0.12


def test_a_resumed_run_is_the_same_run(make_policy, text_data, make_trainer, tmp_path):
    def adam(parameters):
        return torch.optim.Adam(parameters, lr=0.01)

    def module():
        torch.manual_seed(6)
        policy = make_policy(cached_negatives=2, refresh_items_every_n_steps=2)
        return GRPORecModule(policy, num_generations=3, optimizer=adam)

    whole = module()
    options = {"enable_checkpointing": True}
    save = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    fit(make_trainer, whole, text_data(batch_size=4), 6, [save], **options)
    resumed = module()
    resumed.policy.index.vectors.fill_(1.0)
    fit(make_trainer, resumed, text_data(batch_size=4), 6, ckpt_path=tmp_path / "kept" / "step=3.ckpt")
    for (name, ours), truth in zip(
        resumed.policy.state_dict().items(), whole.policy.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    assert resumed.cost.tokens_forward == whole.cost.tokens_forward


def test_a_checkpoint_holds_what_was_trained_and_knows_its_model(make_policy, text_data, make_trainer, tmp_path):
    policy = make_policy()
    trainer = make_trainer(max_epochs=-1, max_steps=1)
    trainer.fit(GRPORecModule(policy, num_generations=3, optimizer=sgd), text_data(batch_size=4))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    stored = torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"]
    trained = {f"policy.{name}" for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 7 * 2
    assert trained == {name for name in stored if ".index." not in name}

    again = make_policy(noise=0.0)
    make_trainer().test(
        GRPORecModule(again, num_generations=3), text_data(), ckpt_path=tmp_path / "one.ckpt", verbose=False
    )
    weights = {f"policy.{name}": value for name, value in again.state_dict().items()}
    assert all(torch.equal(weights[name], stored[name]) for name in trained)

    with torch.no_grad():
        again.model.get_base_model().model.norm.weight[0] += 1.0
    with pytest.raises(InputError, match="adapters for a model with other weights"):
        make_trainer().test(
            GRPORecModule(again, num_generations=3), text_data(), ckpt_path=tmp_path / "one.ckpt", verbose=False
        )


@pytest.mark.parametrize("mode", ["paper", "official"])
def test_selection_runs_on_its_signals(make_policy, text_data, make_trainer, mode):
    from minirec_pl.selection import MiniRecSelector

    module = GRPORecModule(
        make_policy(max_completion_length=2), [NDCGReward(20)], num_generations=2, scoring_generations=2
    )
    selector = MiniRecSelector(mode=mode, on_short="fill") if mode == "paper" else MiniRecSelector(mode=mode)
    callback = MiniRec(budget=12, selector=selector)
    data = text_data(batch_size=4, warm_fraction=0.9)
    trainer = make_trainer(max_epochs=2, callbacks=[callback], limit_val_batches=1)
    trainer.fit(module, data)
    assert trainer.global_step == 6
    assert module.cost.rollouts["training"] == 2 * 12 * 2
    assert module.cost.rollouts["scoring"] > 0
    assert 0 <= float(trainer.callback_metrics["val/ndcg@10"]) <= 1


def test_a_warm_start_trains_from_single_samples_and_is_saved_for_grpo(make_policy, text_data, make_trainer, tmp_path):
    def adam(parameters):
        return torch.optim.Adam(parameters, lr=0.01)

    policy = make_policy(cached_negatives=4, max_completion_length=2)
    module = WarmStartModule(policy, optimizer=adam)
    watch = fit(make_trainer, module, text_data(batch_size=8), 15)
    losses = [logged["train/loss"] for logged in watch.logged]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert module.cost.tokens_backward["warm_start"] > 0
    policy.save_pretrained(tmp_path / "warm", module.cost.state_dict())
    trained = GRPORecModule(RetrievalPolicy(pretrained=str(tmp_path / "warm")), num_generations=2, optimizer=sgd)
    fit(make_trainer, trained, text_data(batch_size=4), 1)
    assert trained.cost.tokens_forward["warm_start"] == module.cost.tokens_forward["warm_start"]


def test_a_warm_start_on_sequences_is_refused(make_policy, text_data, make_trainer):
    with pytest.raises(InputError, match="a RetrievalPolicy learns from single samples"):
        fit(make_trainer, WarmStartModule(make_policy()), text_data(train_on="warm"), 1)


def test_evaluation_goes_through_a_large_batch_in_portions(folder, monkeypatch):
    policy = text_policy(folder, max_completion_length=2)
    sizes = []
    monkeypatch.setattr("minirec_pl.trainers.recommender._SCORES", 25)
    module, batch = scored(policy), toy_batch(5)
    whole = policy.item_logps
    policy.item_logps = lambda part: sizes.append(len(part["target"])) or whole(part)
    made = module.predict_step(batch, 0)
    assert sizes == [2, 2, 1]
    logps = whole(batch)
    assert made["items"][:, 0].tolist() == logps.argmax(dim=1).tolist()
    torch.testing.assert_close(made["scores"][:, 0], logps.max(dim=1).values, rtol=1e-4, atol=1e-4)


def test_catalogues_of_words(folder):
    """The texts of the catalogue are read, not its ids."""
    named = text_policy(folder, catalogue=Catalogue(["1", "2"], ["Alien", "Heat"]))
    plain = text_policy(folder, catalogue=toy_catalogue())
    named.refresh_items()
    plain.refresh_items()
    torch.testing.assert_close(named.index.vectors, plain.index.vectors[1:3])
