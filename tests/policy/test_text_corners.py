"""Groups of texts in odd corners: unpadded float64 loops, and counters of what is fed through the model."""

import copy
import json

import pytest
import torch
from helpers.text_policy import PlainRetriever, text_policy, toy_batch, write_model
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from minirec_pl import GRPORecModule
from minirec_pl.policy.language_models import logps
from minirec_pl.rewards import SoftmaxMixReward

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:Found .* in eval mode"),
]
ENDS = (0, 2)  # the first is the padding token
REWARD = SoftmaxMixReward(12, 0.5)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05)


class SeveralEnds(PlainRetriever):
    @staticmethod
    def before_end(text):
        return [token for token in text if token not in (-1, *ENDS)]


class Watch(Callback):
    def __init__(self):
        self.gradients, self.parts, self.losses = [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.gradients.append([p.grad.clone() for p in pl_module.policy.parameters() if p.requires_grad])

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.parts.append(copy.deepcopy(pl_module.generation.at(pl_module.generation.position)))
        self.losses.append(float(outputs["loss"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that often ends a text at once, with two ends of sequence."""
    path = write_model(tmp_path_factory.mktemp("qwen2"), "qwen2")
    policy = text_policy(path, lora=False)
    with torch.no_grad():
        pull = policy.run(policy.encode(toy_batch())).states.mean(dim=0)
        weight = policy.model.get_output_embeddings().weight
        for end in ENDS:
            weight[end] = 4.5 * pull / pull.square().sum()
    policy.model.save_pretrained(path)
    config = path / "generation_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": list(ENDS), "pad_token_id": 0}))
    return path


def one_step(make_trainer, module, batch, **options):
    watch = Watch()
    trainer = make_trainer(max_epochs=1, callbacks=[watch], log_every_n_steps=1, **options)
    trainer.fit(module, DataLoader([batch], batch_size=None))
    return watch


def assert_same(ours, truth):
    for mine, wanted in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine.double(), wanted, rtol=1e-2, atol=1e-4)
    assert max(float(gradient.abs().max()) for gradient in ours) > 1e-2


@pytest.mark.parametrize(("loss_type", "level"), [("dapo", "token"), ("grpo", "sequence")])
@pytest.mark.parametrize("mask_truncated", [False, True])
def test_texts_that_end_at_once_early_or_not_at_all(folder, make_trainer, loss_type, level, mask_truncated):
    """Ends are in the loss, whichever of them it is, also the one that pads; the item loss sees every text."""
    group, length, temperature = 4, 4, 1.2
    policy = text_policy(folder, max_completion_length=length)
    plain, trained = SeveralEnds(policy), [p for p in policy.parameters() if p.requires_grad]
    options = {"loss_type": loss_type, "importance_sampling_level": level, "temperature": temperature}
    module = GRPORecModule(
        policy, [REWARD], num_generations=group, optimizer=sgd, mask_truncated_completions=mask_truncated, **options
    )
    batch = toy_batch(6)
    watch = one_step(make_trainer, module, batch)
    (part,) = watch.parts
    texts = [[[t for t in text if t >= 0] for text in row] for row in part.texts.tolist()]
    ended = [[text[-1] in ENDS for text in row] for row in texts]
    flat = [text for row in texts for text in row]
    assert {text[-1] for text in flat if text[-1] in ENDS} == set(ENDS)
    assert {len(text) for text in flat} >= {1, length}
    assert not any(token in ENDS for text in flat for token in text[:-1])
    assert not all(end for row in ended for end in row)
    left_out = [[mask_truncated and not end for end in row] for row in ended]
    counts = [[0 if left_out[row][g] else len(text) for g, text in enumerate(texts[row])] for row in range(6)]
    assert part.mask.sum(dim=-1).tolist() == counts
    tokens = sum(map(sum, counts))
    items = sorted(set(batch["target"].tolist()))
    for row in range(6):
        rewards = part.rewards[row].double()
        advantages = ((rewards - rewards.mean()) / (rewards.std() + 1e-4)).tolist()
        best, target, loss = max(range(group), key=lambda g, a=advantages: a[g]), int(batch["target"][row]), 0.0
        for g, text in enumerate(texts[row]):
            found = plain.token_logps(batch, row, text, temperature)
            if counts[row][g]:
                share = tokens if loss_type == "dapo" else 6 * group * len(text)
                loss = loss - advantages[g] * found.sum() / share
            if g == best:
                state = plain.state(batch, row, text)
                loss = loss - advantages[g] * plain.target_logp(state, target, items) / (6 * group)
        loss.backward()
    assert_same(watch.gradients[0], [p.grad for p in plain.model.parameters() if p.requires_grad])
    assert len(trained) == len(watch.gradients[0])


def test_a_batch_whose_texts_are_all_truncated_trains_on_the_items_alone(tmp_path, make_trainer):
    policy = text_policy(write_model(tmp_path / "llama"), max_completion_length=2)
    plain, batch = PlainRetriever(policy), toy_batch(4)
    module = GRPORecModule(policy, [REWARD], num_generations=3, optimizer=sgd, mask_truncated_completions=True)
    watch = one_step(make_trainer, module, batch)
    (part,) = watch.parts
    assert not part.mask.any()
    items = sorted(set(batch["target"].tolist()))
    expected = 0.0
    for row in range(4):
        rewards = part.rewards[row].double()
        advantages = ((rewards - rewards.mean()) / (rewards.std() + 1e-4)).tolist()
        best = max(range(3), key=lambda g, a=advantages: a[g])
        state = plain.state(batch, row, part.texts[row, best].tolist())
        loss = -advantages[best] * plain.target_logp(state, int(batch["target"][row]), items) / 12
        loss.backward()
        expected -= advantages[best] / 12
    assert watch.losses[0] == pytest.approx(expected, abs=1e-4)  # the ratio is 1
    assert_same(watch.gradients[0], [p.grad for p in plain.model.parameters() if p.requires_grad])


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_side_a_tokenizer_pads_on_plays_no_part(folder, side):
    policy, batch = text_policy(folder), toy_batch()
    expected = policy.encode(batch), policy.item_logps(batch)
    policy.tokenizer.padding_side = side
    assert all(torch.equal(a, b) for a, b in zip(policy.encode(batch), expected[0], strict=True))
    assert torch.equal(policy.item_logps(batch), expected[1])


class Fed:
    """Counts the real tokens that go through the model, a call at a time."""

    def __init__(self, policy):
        self.calls = []
        body = policy.model.get_base_model().base_model
        self.hook = body.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, given):
        length = given["input_ids"].shape[1]
        self.calls.append((len(given["input_ids"]), int(given["attention_mask"][:, -length:].sum())))

    @property
    def tokens(self):
        return sum(tokens for _, tokens in self.calls)


def test_a_rollout_runs_each_prompt_once_and_ended_texts_leave(folder):
    policy = text_policy(folder, max_completion_length=6)
    module = GRPORecModule(policy, [REWARD], num_generations=8)
    module.configure_model()
    policy.refresh_items()
    batch = toy_batch(3)
    plain, marker = SeveralEnds(policy), len(policy.marker)
    prompts = sum(len(plain.prompt(batch, row)) for row in range(3))
    uniform = torch.rand(3, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fed = Fed(policy)
    drawn = module.policy.roll_out(batch, module.rollout_options, uniform)
    fed.hook.remove()
    texts = [[t for t in text if t >= 0] for text in drawn.texts.flatten(0, 1).tolist()]
    kept = sum(len(plain.before_end(text)) for text in texts)
    assert len({len(text) for text in texts}) > 2
    steps = [sum(len(text) > step for text in texts) for step in range(1, max(map(len, texts)))]
    of_steps = [rows for rows, tokens in fed.calls if rows == tokens]
    assert of_steps[: len(steps)] == steps
    assert fed.tokens == prompts + sum(steps) + kept + len(texts) * marker


def test_an_update_runs_each_prompt_once(folder):
    policy = text_policy(folder, max_completion_length=6)
    batch = toy_batch(3)
    plain, prompts = SeveralEnds(policy), policy.encode(batch)
    texts = policy.reason(prompts, 8).texts
    fed = Fed(policy)
    policy.read(prompts, texts)
    fed.hook.remove()
    kept = sum(len(plain.before_end(text)) for text in texts.flatten(0, 1).tolist())
    read = sum(len(plain.prompt(batch, row)) for row in range(3))
    assert fed.tokens == read + kept + 24 * len(policy.marker)


class Rows(TorchDispatchMode):
    """The most rows over the vocabulary that a tensor made inside has."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary, self.most = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and self.vocabulary in value.shape:
                self.most = max(self.most, value.numel() // self.vocabulary)
        return result


def test_a_training_step_never_holds_the_logits_of_all_tokens(folder, make_trainer, monkeypatch):
    monkeypatch.setattr(logps, "_TILE_TOKENS", 16)
    monkeypatch.setattr(logps, "_TILE_ENTRIES", 16 * 64)
    policy = text_policy(folder, max_completion_length=8)
    module = GRPORecModule(policy, [REWARD], num_generations=12, optimizer=sgd)
    batch = toy_batch(8)
    with Rows(len(policy.tokenizer)) as rows:
        watch = one_step(make_trainer, module, batch)
    assert any(gradient.any() for gradient in watch.gradients[0])
    assert 48 < rows.most <= 96  # those of a step of the decoding loop
    assert int((watch.parts[0].texts >= 0).sum()) > 3 * rows.most


def test_a_run_resumed_inside_a_generation_of_texts_ends_like_one_never_stopped(
    folder, make_trainer, tmp_path, toy_data
):
    path = tmp_path / "inside.ckpt"
    data = toy_data(history_window=3, batch_size=4, warm_fraction=0.9)
    data.setup("fit")

    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 3 and not path.exists():
                trainer.save_checkpoint(path)

    def run(ckpt_path=None):
        torch.manual_seed(3)
        policy = text_policy(folder, catalogue=data.catalogue, max_completion_length=3, cached_negatives=2)
        torch.manual_seed(4)
        options = {"num_iterations": 2, "steps_per_generation": 2, "beta": 0.1}
        module = GRPORecModule(policy, [REWARD], num_generations=3, optimizer=sgd, **options)
        trainer = make_trainer(max_epochs=1, limit_train_batches=6, callbacks=[Save()])
        trainer.fit(module, toy_data(history_window=3, batch_size=4, warm_fraction=0.9), ckpt_path=ckpt_path)
        return module

    whole = run()
    (held,) = torch.load(path, weights_only=True)["generation"]
    assert 0 <= held["position"] < held["positions"] - 1
    resumed = run(path)
    expected = whole.state_dict()
    for name, value in resumed.state_dict().items():
        assert torch.equal(value.nan_to_num(nan=-1.0), expected[name].nan_to_num(nan=-1.0)), name
    assert resumed.cost.tokens_forward == whole.cost.tokens_forward
