"""Generative policies on stand-ins of pretrained models, against their definition in float64."""

import copy
import json

import pytest
import torch
from helpers.chat_models import CATALOGUE, LORA, NO_SYSTEM, PROMPT, TITLES, PlainChat, chat_folder, chat_policy
from helpers.plain_policy import batch_of
from jsonargparse import ArgumentParser
from transformers import AutoModelForCausalLM, AutoTokenizer

from minirec_pl import GRPORecModule, InputError, WarmStartModule
from minirec_pl.cli.export import export
from minirec_pl.cli.main import main
from minirec_pl.data.samples import Catalogue
from minirec_pl.policy import GenerativePolicy, LanguageModel, Lora
from minirec_pl.policy.language_models.sampling import CompletionStates
from minirec_pl.policy.prompt import PromptTemplate
from minirec_pl.policy.semantic_ids import SemanticIds
from minirec_pl.probes import target_signals
from minirec_pl.selection.probes.per_sample import project_gradients
from minirec_pl.selection.probes.trajectory import Trajectory
from minirec_pl.utils.modules import evaluation_mode

HISTORIES = [[3], [0, 5, 2, 7], [0, 5, 2, 7], [], [11, 1]]
SEEN = [[3], [0, 5, 2, 7, 9], [0, 5, 2, 7, 4], [], [1, 11, 0, 2, 3, 4, 5, 6, 7, 8]]
TARGETS = [4, 6, 14, 11, 12]
ITEMS = torch.tensor([[0, 5, 14], [1, 3, 4], [1, 8, 9], [2, 0, 7], [9, 10, 14]])
KINDS = ["title", "semantic", "token"]
SMALL = SemanticIds(levels=2, codes=3)


def make(folder, item_ids, **options):
    if item_ids == "semantic":
        options.setdefault("semantic_ids", SMALL)
    return chat_policy(folder, item_ids=item_ids, **options)


@pytest.fixture(params=KINDS)
def policy(request, tmp_path):
    return make(tmp_path / "base", request.param).eval()


def batch():
    return batch_of(HISTORIES, SEEN, TARGETS)


def close(ours, truth, tolerance=2e-4):
    torch.testing.assert_close(ours.detach().double(), truth.detach(), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("arch", "item_ids"),
    [("llama", "title"), ("llama", "semantic"), ("qwen2", "token"), ("qwen2", "title"), ("gemma2", "semantic")],
)
def test_item_logps_equal_an_unpadded_loop_and_sum_to_one(tmp_path, arch, item_ids):
    policy = make(tmp_path / "base", item_ids, kind=arch)
    plain, scores = PlainChat(policy), policy.item_logps(batch(), chunk=16)
    for row in (1, 4):
        score, truth = scores[row], plain.item_logps(HISTORIES[row], SEEN[row])
        close(score[truth.isfinite()], truth[truth.isfinite()])
        assert float(score[truth.isfinite()].double().exp().sum()) == pytest.approx(1, abs=1e-4)
        assert (score[~truth.isfinite()] == torch.finfo(torch.float32).min).all()


def test_completion_logps_equal_an_unpadded_loop(policy):
    plain = PlainChat(policy)
    logps, mask, entropy = policy.completion_logps(batch(), ITEMS, 0.7)
    for b, (history, seen) in enumerate(zip(HISTORIES, SEEN, strict=True)):
        for g, item in enumerate(ITEMS[b].tolist()):
            steps = plain.steps(history, [i for i in seen if i != item], item, 0.7) if item not in seen else None
            if steps is None:
                continue
            n = len(steps)
            assert mask[b, g].tolist() == [True] * n + [False] * (policy.id_length - n)
            close(logps[b, g, :n], torch.stack([step[0] for step in steps]))
            close(entropy[b, g, :n], torch.stack([step[1] for step in steps]))


def test_ten_thousand_sampled_items_are_in_the_catalogue_and_none_is_masked(policy):
    histories = [[i % 15, (i * 7 + 1) % 15] for i in range(10)]
    seen = [[*row, (i + 3) % 15] for i, row in enumerate(histories)]
    rollouts = policy.generate(
        batch_of(histories, seen), 1000, temperature=2.0, generator=torch.Generator().manual_seed(0)
    )
    assert rollouts.items.shape == (10, 1000)
    assert int(rollouts.items.min()) >= 0
    for items, masked in zip(rollouts.items, seen, strict=True):
        assert not set(items.tolist()) & set(masked)
        assert items.unique().numel() > 8
    ids = policy.trie.item_tokens[rollouts.items]
    assert torch.equal(rollouts.mask, ids >= 0)
    some = rollouts.items[:, :20]
    with torch.no_grad():
        truth = policy.completion_logps(batch_of(histories, seen), some, 2.0)[0]
    torch.testing.assert_close(rollouts.logps[:, :20], truth, rtol=0, atol=1e-4)


def test_equal_prompts_run_once_and_certain_tokens_not_at_all(policy):
    fed = []

    def note(module, args, kwargs):
        fed.append(int(kwargs["attention_mask"][:, -kwargs["input_ids"].shape[1] :].sum()))

    policy.model.get_base_model().base_model.register_forward_pre_hook(note, with_kwargs=True)
    plain = PlainChat(policy)
    hand = sum(len(plain.prompt(history)) for b, history in enumerate(HISTORIES) if b != 2)
    policy.run_prompt(batch())
    assert policy.prompt_tokens(batch()) == sum(fed) == hand
    fed.clear()
    policy.completion_logps(batch(), ITEMS)
    assert sum(fed) - hand == policy.fed_tokens(ITEMS) == sum(unique_prefix(plain, i) - 1 for i in ITEMS.flatten())
    fed.clear()
    items = policy.generate(batch(), 6, generator=torch.Generator().manual_seed(0)).items
    assert sum(fed) - hand == policy.fed_tokens(items)
    fed.clear()
    loss, tokens = policy.supervised_loss(batch())
    assert loss.requires_grad
    assert tokens == sum(fed)


def unique_prefix(plain, item):
    ids = plain.ids[int(item)]
    others = [tokens for i, tokens in enumerate(plain.ids) if i != int(item)]
    return next(n for n in range(1, len(ids) + 1) if all(tokens[:n] != ids[:n] for tokens in others))


def test_the_warm_start_loss_is_that_of_a_loop_without_masked_items(policy):
    plain = PlainChat(policy)
    truth = -sum(plain.item_logp(h, [], t) for h, t in zip(HISTORIES, TARGETS, strict=True)) / 5
    loss, _ = policy.supervised_loss(batch())
    close(loss, truth)
    truth.backward()
    loss.backward()
    theirs = dict(plain.model.named_parameters())
    trained = {name for name, parameter in policy.model.named_parameters() if parameter.requires_grad}
    assert any("trainable_tokens" in name for name in trained) == (policy.chat.kind != "title")
    for name, parameter in policy.model.named_parameters():
        assert ("lora_" in name or "trainable_tokens" in name) == (name in trained)
        assert (parameter.grad is not None) == (name in trained), name
        if name in trained:
            torch.testing.assert_close(parameter.grad.double(), theirs[name].grad, rtol=1e-3, atol=1e-3)


def test_pairs_of_sequences_are_prompts_of_their_own(policy):
    pairs = {"sequence": torch.tensor([[4, 2, 7], [3, 0, -1]])}
    row, position, target = torch.tensor([[0, 0, 2], [0, 1, 7], [1, 0, 0]]).T
    loss = policy.sequence_nll({**pairs, "row": row, "position": position, "target": target})
    single, tokens = policy.supervised_loss(batch_of([[4], [4, 2], [3]], [[], [], []], [2, 7, 0]))
    torch.testing.assert_close(loss, single, rtol=1e-4, atol=1e-4)
    assert policy.sequence_tokens({**pairs, "row": row, "position": position, "target": target}) == tokens


def test_stretches_of_a_list_in_the_answer_share_one_pass(tmp_path):
    listed = PromptTemplate(system="", user="Mine?", item="{id}", separator="", answer="{history}")
    policy = make(tmp_path / "base", "token", prompt=listed, lora=None)
    pairs = {"sequence": torch.tensor([[4, 2, 7, 1], [3, 0, -1, -1]])}
    row, position, target = torch.tensor([[0, 0, 2], [0, 1, 7], [0, 3, 5], [1, 0, 0]]).T
    pairs.update(row=row, position=position, target=target)
    watch = []
    policy.model.base_model.layers[0].register_forward_hook(lambda module, args, output: watch.append(args[0].shape))
    loss = policy.sequence_nll(pairs)
    head = policy.encode({"history": torch.full((1, 1), -1)}).mask.sum().item()
    assert watch == [(2, head + 4, policy.model.config.hidden_size)]
    assert policy.sequence_tokens(pairs) == head + 4 + head + 1
    plain = PlainChat(policy)
    histories = ([4], [4, 2], [4, 2, 7, 1], [3])
    truth = -sum(plain.item_logp(h, [], t) for h, t in zip(histories, target.tolist(), strict=True)) / 4
    close(loss, truth)
    loss.backward()
    truth.backward()
    theirs = dict(plain.model.named_parameters())
    for name, parameter in policy.model.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), theirs[name].grad, rtol=1e-3, atol=1e-3)
    nothing = {**pairs, **dict.fromkeys(("row", "position", "target"), torch.zeros(0, dtype=torch.int64))}
    assert policy.sequence_tokens(nothing) == 0
    policy.zero_grad()
    policy.sequence_nll(nothing).backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in policy.parameters())


@pytest.mark.parametrize("lora", [LORA, None])
def test_a_saved_policy_ranks_the_same(tmp_path, policy, lora):
    if lora is None:
        policy = make(tmp_path / "base", policy.chat.kind, lora=None)
    policy.save_pretrained(tmp_path / "policy", {"seconds": 3})
    assert (tmp_path / "policy" / "model.safetensors").exists() == (lora is None)
    again = GenerativePolicy(pretrained=str(tmp_path / "policy"))
    assert torch.equal(again.item_logps(batch()), policy.item_logps(batch()))
    assert again.chat.id_texts == policy.chat.id_texts
    assert again.chat.prompt == PROMPT
    assert again.training_cost == {"seconds": 3}
    assert (again.catalogue.titles, again.catalogue.texts) == (TITLES, TITLES)
    again.bind(CATALOGUE)
    again.save_pretrained(tmp_path / "policy")
    assert torch.equal(
        GenerativePolicy(pretrained=str(tmp_path / "policy")).item_logps(batch()), policy.item_logps(batch())
    )


def test_an_export_is_a_plain_folder_with_the_same_logits(tmp_path, policy, capsys):
    policy.save_pretrained(tmp_path / "policy")
    for _ in range(2):
        assert main(["export", str(tmp_path / "policy"), "--to", str(tmp_path / "plain")]) == 0
    assert f"model: {tmp_path / 'plain'}" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype="auto").eval()
    assert model.dtype == torch.float32
    encoded = policy.encode(batch_of([[3, 4]], [[3]]))
    with torch.no_grad():
        truth = policy.model(input_ids=encoded.input_ids).logits
        torch.testing.assert_close(model(input_ids=encoded.input_ids).logits, truth, rtol=1e-3, atol=1e-3)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert tokenizer.chat_template == policy.chat.tokenizer.chat_template
    assert len(tokenizer) == len(policy.chat.tokenizer)


def test_exports_that_cannot_be(tmp_path, policy):
    with pytest.raises(InputError, match=r"no policy in '.*base' .*give the folder `policy` of a run"):
        export(tmp_path / "base", tmp_path / "plain")
    policy.save_pretrained(tmp_path / "policy")
    with pytest.raises(InputError, match="is the policy itself"):
        export(tmp_path / "policy", tmp_path / "policy")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("everything")
    with pytest.raises(InputError, match="holds no model: give a new folder"):
        export(tmp_path / "policy", tmp_path / "thesis")


@pytest.mark.parametrize("item_ids", ["title", "semantic"])
def test_beams_rank_what_they_end_with_and_nothing_else(tmp_path, item_ids):
    exact = make(tmp_path / "base", item_ids)
    wide = make(tmp_path / "base", item_ids, evaluation_beams=100)
    truth = exact.item_logps(batch())
    torch.testing.assert_close(wide.item_logps(batch()), truth, rtol=0, atol=1e-4)
    narrow = make(tmp_path / "base", item_ids, evaluation_beams=3)
    scores = narrow.item_logps(batch())
    lowest = torch.finfo(torch.float32).min
    found = scores > lowest
    assert found.sum(dim=1).tolist() == [3] * 5
    torch.testing.assert_close(scores[found], truth[found], rtol=0, atol=1e-4)
    with torch.no_grad():
        beams = exact.beams(exact.eval().run_prompt(batch()), batch()["seen"], 3).items
    assert [set(row) for row in beams.tolist()] == [set(row.nonzero()[:, 0].tolist()) for row in found]


def test_fewer_items_left_than_beams(tmp_path):
    policy = make(tmp_path / "base", "title", evaluation_beams=8)
    scores = policy.item_logps(batch_of([[3]], [list(range(13))]))
    assert (scores > torch.finfo(torch.float32).min).nonzero()[:, 1].tolist() == [13, 14]


@pytest.mark.parametrize(("item_ids", "dtype"), [("title", "bfloat16"), ("semantic", "float32"), ("token", "bfloat16")])
def test_grpo_and_warm_start_run(tmp_path, toy_data, make_trainer, item_ids, dtype):
    options = {"semantic_ids": SMALL} if item_ids == "semantic" else {}
    model = LanguageModel(str(chat_folder(tmp_path / "base", max_position_embeddings=2048)), dtype, LORA, True)
    policy = GenerativePolicy(language_model=model, item_ids=item_ids, prompt=PROMPT, **options)
    optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)  # noqa: E731
    warm = WarmStartModule(policy, optimizer=optimizer)
    make_trainer(max_steps=2).fit(warm, toy_data(train_on="warm", batch_size=2, history_window=3))
    before = copy.deepcopy({name: value for name, value in policy.named_parameters() if value.requires_grad})
    module = GRPORecModule(policy, num_generations=4, temperature=1.5, beta=0.1, optimizer=optimizer)
    data = toy_data(batch_size=3, history_window=3)
    trainer = make_trainer(max_steps=2, limit_val_batches=1)
    trainer.fit(module, data)
    assert trainer.global_step == 2
    assert any(not torch.equal(before[name], value) for name, value in policy.named_parameters() if name in before)
    assert all(bool(value.isfinite().all()) for value in policy.parameters())
    signals = module.sample_signals(next(iter(data.train_dataloader())))
    assert signals.gradient.isfinite().all()
    policy.save_pretrained(tmp_path / "policy")
    assert GenerativePolicy(pretrained=str(tmp_path / "policy")).chat.language_model == model


def test_prompts_may_name_items_by_their_ids(tmp_path):
    policy = make(tmp_path / "base", "semantic", prompt=PromptTemplate(item="{id}", user="{history}"))
    text = policy.chat.tokenizer.decode(policy.encode(batch_of([[3, 7]], [[3]])).input_ids[0])
    assert f"{policy.chat.id_texts[3]}\n{policy.chat.id_texts[7]}" in text
    used = set(policy.encode(batch_of([[3, 7]], [[3]])).input_ids[0].tolist())
    assert set(policy.trie.item_tokens[[3, 7]].flatten().tolist()) - {-1} <= used


def test_a_chat_template_without_a_system_role(tmp_path):
    policy = make(chat_folder(tmp_path / "base", template=NO_SYSTEM), "title")
    assert "<|im_start|>user\nRecommend.\n\nSeen:" in policy.chat.tokenizer.decode(policy.encode(batch()).input_ids[1])


def test_a_model_without_a_chat_template(tmp_path):
    with pytest.raises(InputError, match="no chat template"):
        make(chat_folder(tmp_path / "base", template=None), "title")


def test_a_prompt_longer_than_the_model(tmp_path):
    policy = make(chat_folder(tmp_path / "base", max_position_embeddings=40), "title")
    with pytest.raises(InputError, match=r"the prompt of sample 101 has .* lower --data.history_window"):
        policy.item_logps(batch())


def test_bad_options(tmp_path):
    model = LanguageModel("m")
    for options, message in (
        ({"config": {}, "language_model": model}, "exactly one"),
        ({"language_model": model, "item_ids": "isbn"}, "choose one of title, semantic, token"),
        ({"language_model": model, "semantic_ids": SMALL}, "semantic_ids goes with"),
        ({"config": {}, "prompt": PROMPT}, "prompt goes with a language_model"),
        ({"language_model": model, "evaluation_beams": 0}, "evaluation_beams is 0"),
    ):
        with pytest.raises(InputError, match=message):
            GenerativePolicy(**options)
    with pytest.raises(InputError, match=r"the model 'm' is neither|the tokenizer 'm' is neither"):
        GenerativePolicy(language_model=model).bind(CATALOGUE)


def test_a_saved_policy_that_is_damaged(tmp_path, policy):
    policy.save_pretrained(tmp_path / "policy")
    side = tmp_path / "policy" / "minirec.json"
    good = json.loads(side.read_text())
    for changes in ({"id_texts": ["x"]}, {"prompt": {"x": 1}}, {"language_model": {}}, {"item_tokens": [[9999]] * 15}):
        side.write_text(json.dumps({**good, **changes}))
        with pytest.raises(InputError, match="policy' cannot be read"):
            GenerativePolicy(pretrained=str(tmp_path / "policy"))
    side.write_text(json.dumps(good))
    with pytest.raises(InputError, match="trained for a catalogue of 15 items"):
        GenerativePolicy(pretrained=str(tmp_path / "policy")).bind(Catalogue(["a"]))


@pytest.mark.parametrize(
    ("arch", "item_ids"), [("llama", "token"), ("qwen2", "token"), ("gemma2", "title"), ("gemma2", "semantic")]
)
def test_signals_are_those_of_autograd(tmp_path, arch, item_ids):
    policy = make(tmp_path / "base", item_ids, kind=arch)
    target = batch()["target"][:, None]
    seen = [[item for item in row if item != t] for row, t in zip(SEEN, TARGETS, strict=True)]
    some = batch_of(HISTORIES, seen, TARGETS)

    def signals(kind, space):
        with evaluation_mode(policy):
            states = policy.completion_states(policy.run_prompt(some), target)
        return target_signals(policy, states, some, 0.8, kind, space, Trajectory())

    with evaluation_mode(policy):
        states = policy.completion_states(policy.run_prompt(some), target)
    leaves = [part.requires_grad_() for part in states]
    p = policy.head_logps(CompletionStates(*leaves), target, some["seen"], 0.8)[0].sum(dim=(1, 2)).exp()
    at_prompt, at_rest = torch.autograd.grad(-p.sum(), leaves, allow_unused=True)
    truth = at_prompt if at_rest is None else at_prompt + at_rest[:, 0].sum(dim=1)
    measured = signals("first", "answer")
    torch.testing.assert_close(measured.logp.exp(), p.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(measured.gradient, truth, rtol=1e-3, atol=1e-5)

    trained = {name: value for name, value in policy.named_parameters() if value.requires_grad}
    measured = signals("first", "lora")
    assert all(value is trained[name] for name, value in policy.named_parameters() if name in trained)
    policy.eval()
    for row in range(5):
        one = {name: value[row : row + 1] for name, value in some.items()}
        p = policy.completion_logps(one, target[row : row + 1], 0.8)[0].sum().exp()
        slopes = dict(zip(trained, torch.autograd.grad(-p, list(trained.values())), strict=True))
        alone = project_gradients({name: slope[None] for name, slope in slopes.items()})[0]
        torch.testing.assert_close(measured.gradient[row], alone, rtol=1e-2, atol=1e-4)
    if arch == "gemma2":
        with pytest.raises(InputError, match="not for models that cap their logits"):
            signals("hvp", "answer")


def test_all_options_come_from_yaml(tmp_path):
    folder = chat_folder(tmp_path / "base")
    (tmp_path / "policy.yaml").write_text(f"""
policy:
  class_path: minirec_pl.policy.GenerativePolicy
  init_args:
    language_model:
      name: {folder}
      dtype: float32
      lora: {{r: 2, alpha: 16, dropout: 0.1, target_modules: [q_proj, v_proj]}}
      gradient_checkpointing: true
    item_ids: semantic
    semantic_ids: {{levels: 2, codes: 3}}
    prompt: {{user: "{{history}}", longest_title: 20}}
    evaluation_beams: 4
""")
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_subclass_arguments(GenerativePolicy, "policy")
    options = parser.parse_args(["--config", str(tmp_path / "policy.yaml"), "--policy.language_model.lora.r", "3"])
    policy = parser.instantiate_classes(options).policy
    policy.bind(CATALOGUE)
    assert policy.language_model == LanguageModel(str(folder), "float32", Lora(3, 16, 0.1, ["q_proj", "v_proj"]), True)
    assert policy.semantic_ids == SMALL
    assert policy.chat.prompt == PromptTemplate(user="{history}", longest_title=20)
    assert {len(p) for n, p in policy.named_parameters() if "lora_A" in n} == {3}
    assert policy.evaluation_beams == 4
