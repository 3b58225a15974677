"""The policy that reasons and ranks: states, scores, losses and folders, against unpadded float64 loops."""

import copy

import pytest
import torch
from helpers.text_policy import PlainRetriever, text_policy, toy_batch, toy_catalogue, write_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minirec_pl import InputError
from minirec_pl.data.samples import Catalogue
from minirec_pl.policy import LanguageModel, Lora, PromptTemplate, RetrievalPolicy, Sampling
from minirec_pl.policy.item_index import ItemIndex, draw_negatives
from minirec_pl.utils.modules import evaluation_mode

EOS = 2


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def folder(request, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama"))


def trained(module):
    return [p for p in module.parameters() if p.requires_grad]


def texts_of_all_kinds(batch):
    """Reasonings that end at once, early, late and not at all, [B, 2, 5]."""
    rows = [[[EOS, -1, -1, -1, -1], [40, 41, EOS, -1, -1]], [[50, 60, 70, 80, EOS], [90, 91, 92, 93, 94]]]
    return torch.tensor(rows).repeat(len(batch["target"]) // 2, 1, 1)


def test_prompts_are_the_chat_template_of_the_tokenizer(folder):
    policy, batch = text_policy(folder), toy_batch()
    prompts = policy.encode(batch)
    for row in range(4):
        ids, mask = prompts.input_ids[prompts.row[row]], prompts.mask[prompts.row[row]]
        assert ids[mask.bool()].tolist() == PlainRetriever(policy).prompt(batch, row)


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_states_and_log_probabilities_are_those_of_single_sequences(folder, temperature):
    policy, batch = text_policy(folder), toy_batch()
    texts, plain = texts_of_all_kinds(batch), PlainRetriever(policy)
    passed = policy.read(policy.encode(batch), texts, temperature)
    for row in range(4):
        for g in range(2):
            text = texts[row, g].tolist()
            state = plain.state(batch, row, text)
            torch.testing.assert_close(passed.states[row, g].double(), state, rtol=1e-4, atol=1e-5)
            truth = torch.zeros(5, dtype=torch.float64)
            truth[: sum(token >= 0 for token in text)] = plain.token_logps(batch, row, text, temperature).detach()
            torch.testing.assert_close(passed.logps[row, g].detach().double(), truth, rtol=1e-4, atol=1e-5)
    tokens = [len(plain.prompt(batch, row)) for row in range(4)]
    kept = sum(len(plain.before_end(text)) for text in texts.flatten(0, 1).tolist())
    assert passed.tokens == sum(tokens) + kept + 8 * len(plain.marker)


def test_reasoning_ends_at_the_end_of_sequence_or_the_length(llama):
    policy, batch = text_policy(llama, max_completion_length=5), toy_batch()
    prompts = policy.encode(batch)
    uniform = torch.rand(4, 16, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    end, pull = policy.model.get_output_embeddings().weight, policy.read(prompts, texts_of_all_kinds(batch)).states
    for _ in range(40):
        made = policy.reason(prompts, 16, uniform=uniform)
        ended = (made.texts == EOS).any(dim=-1)
        if int(ended.sum()) > 5:
            break
        with torch.no_grad():
            end[EOS] += 0.01 * pull.mean((0, 1))
    lengths = (made.texts >= 0).sum(dim=-1)
    assert made.texts.shape == (4, 16, 5)
    assert bool(ended.any())
    assert not bool(ended.all())
    assert bool((lengths[~ended] == 5).all())
    assert torch.equal(policy.truncated(made.texts), ~ended)
    again = policy.read(prompts, made.texts)
    torch.testing.assert_close(again.logps.detach(), made.logps, rtol=1e-4, atol=1e-5)
    assert policy.words(made.texts)[0] == policy.tokenizer.decode([t for t in made.texts[0, 0].tolist() if t > EOS])


@pytest.mark.parametrize("length", [0, 4])
def test_item_logps_rank_the_catalogue_after_greedy_reasoning(folder, length):
    policy, batch = text_policy(folder, max_completion_length=length), toy_batch()
    plain, logps = PlainRetriever(policy), policy.item_logps(batch)
    for row in range(4):
        state = plain.state(batch, row, plain.greedy(batch, row, length))
        truth = plain.scores(state, batch["seen"][row].tolist()).log_softmax(dim=0).detach()
        seen = truth.isneginf()
        torch.testing.assert_close(logps[row][~seen].double(), truth[~seen], rtol=1e-3, atol=1e-3)
        assert bool((logps[row][seen] == torch.finfo(torch.float32).min).all())
    alone = {name: value[1:2] for name, value in batch.items()}
    torch.testing.assert_close(policy.item_logps(alone), logps[1:2], rtol=1e-4, atol=1e-4)


def test_long_items_are_cut_and_texts_are_what_is_read(llama):
    catalogue = Catalogue(["a", "b"], ["Alien", "Heat"], ["A crew in space. " * 30, ""])
    policy = text_policy(llama, catalogue=catalogue, item_prompt="Film: {text}", longest_item=20)
    plain = PlainRetriever(policy)
    vectors = policy.index.encode(policy.model, torch.tensor([1, 0]))
    assert policy.index.lengths.tolist()[0] == 20 + len(plain.marker)
    for place, item in enumerate([1, 0]):
        torch.testing.assert_close(vectors[place].double(), plain.item(item), rtol=1e-4, atol=1e-5)


def test_contrast_with_batch_and_cache_is_a_plain_softmax_with_its_gradient(folder):
    policy, plain = text_policy(folder), None
    policy.refresh_items()
    batch = toy_batch()
    batch["target"][3] = batch["target"][0]
    plain = PlainRetriever(policy)
    target = batch["target"]
    others = [item for item in range(12) if item not in target.tolist()]
    negatives = torch.tensor([[others[0], others[1], others[1], -1]]).repeat(4, 1)
    negatives[1, 3] = target[0]
    texts = texts_of_all_kinds(batch)[:, :1]
    states = policy.read(policy.encode(batch), texts).states[:, 0]
    logps = policy.target_logps(states, target, target, negatives)
    truth = []
    for row in range(4):
        state = plain.state(batch, row, texts[row, 0].tolist())
        inside = sorted(set(target.tolist()))
        user = state / state.norm()
        vectors = [plain.item(item) for item in inside] + [plain.item(item).detach() for item in others[:2]]
        logits = torch.stack([user @ vector for vector in vectors]) / policy.similarity_temperature
        truth.append(logits.log_softmax(dim=0)[inside.index(int(target[row]))])
    torch.testing.assert_close(logps.double(), torch.stack(truth), rtol=1e-3, atol=1e-4)
    logps.sum().backward()
    torch.stack(truth).sum().backward()
    assert {name for name, p in policy.named_parameters() if p.grad is not None} == {
        name for name, _ in policy.named_parameters() if "lora_" in name
    }
    for ours, wanted in zip(trained(policy), trained(plain.model), strict=True):
        torch.testing.assert_close(ours.grad.double(), wanted.grad, rtol=5e-3, atol=1e-4)


def test_supervised_loss_right_after_the_prompt(llama):
    policy, batch = text_policy(llama, reason_in_warm_start=False), toy_batch()
    batch["target"][2] = batch["target"][0]
    loss, tokens = policy.supervised_loss(batch)
    plain, items = PlainRetriever(policy), set(batch["target"].tolist())
    wanted = [plain.target_logp(plain.state(batch, row, []), int(batch["target"][row]), items) for row in range(4)]
    truth = -torch.stack(wanted).mean()
    assert float(loss) == pytest.approx(float(truth), rel=1e-3)
    loss.backward()
    truth.backward()
    for ours, other in zip(trained(policy), trained(plain.model), strict=True):
        torch.testing.assert_close(ours.grad.double(), other.grad, rtol=5e-3, atol=1e-4)
    prompts = sum(len(plain.prompt(batch, row)) for row in range(4))
    read = sum(len(policy.index.tokens[item]) for item in items)
    assert tokens == prompts + 4 * len(plain.marker) + read


def test_supervised_loss_after_a_sampled_reasoning(llama):
    policy, batch = text_policy(llama, max_completion_length=3, cached_negatives=2), toy_batch()
    policy.refresh_items()
    torch.manual_seed(4)
    loss, _ = policy.supervised_loss(batch)
    torch.manual_seed(4)
    prompts = policy.encode(batch)
    texts = policy.reason(prompts).texts
    words = torch.randint(2**31, (1,)).tolist()
    negatives = draw_negatives(12, batch["target"], batch["sample_id"], words, 2)
    plain, truth = PlainRetriever(policy), []
    for row in range(4):
        items = {*batch["target"].tolist(), *negatives[row].tolist()}
        truth.append(
            plain.target_logp(plain.state(batch, row, texts[row, 0].tolist()), int(batch["target"][row]), items)
        )
    assert float(loss) == pytest.approx(-float(torch.stack(truth).mean()), rel=1e-3)
    assert bool((texts >= 0).any())


def test_a_warm_start_learns_the_pairs(llama):
    policy, batch = (
        text_policy(llama, noise=0.0, reason_in_warm_start=False, max_completion_length=0),
        toy_batch(8, seed=2),
    )
    first = policy.item_logps(batch).gather(1, batch["target"][:, None]).mean()
    optimizer = torch.optim.Adam(trained(policy), lr=0.02)
    for _ in range(12):
        optimizer.zero_grad()
        policy.supervised_loss(batch)[0].backward()
        optimizer.step()
    assert float(policy.item_logps(batch).gather(1, batch["target"][:, None]).mean()) > float(first) + 1.0


def test_negatives_depend_on_their_sample_and_never_hold_the_target():
    target, ids = torch.tensor([3, 0, 9]), torch.tensor([11, 5, 8])
    drawn = draw_negatives(10, target, ids, [7], 6)
    assert drawn.shape == (3, 6)
    assert not bool((drawn == target[:, None]).any())
    assert all(len(set(row)) == 6 and set(row) <= set(range(10)) for row in drawn.tolist())
    assert torch.equal(draw_negatives(10, target[1:2], ids[1:2], [7], 6), drawn[1:2])
    assert not torch.equal(draw_negatives(10, target, ids, [8], 6), drawn)
    every = {
        tuple(sorted(draw_negatives(3, torch.tensor([1]), torch.tensor([i]), [0], 5)[0].tolist())) for i in range(9)
    }
    assert every == {(0, 2)}
    assert draw_negatives(10, target, ids, [7], 0).shape == (3, 0)


def test_rollouts_get_items_by_schedule_and_evaluation_gets_fresh_ones(llama):
    policy = text_policy(llama, refresh_items_every_n_steps=3)
    whole = int(policy.index.lengths.sum())
    assert policy.refresh_items(0) == whole
    old = policy.index.vectors.clone()
    with torch.no_grad():
        trained(policy)[0].add_(0.5)
    assert policy.refresh_items(2) == 0
    assert torch.equal(policy.index.vectors, old)
    assert policy.refresh_items(3) == whole
    assert not torch.equal(policy.index.vectors, old)
    with torch.no_grad():
        trained(policy)[0].add_(0.5)
    logps = policy.item_logps(toy_batch())
    fresh = text_policy(llama)
    fresh.load_state_dict({**fresh.state_dict(), **{n: p for n, p in policy.state_dict().items() if "lora" in n}})
    torch.testing.assert_close(logps, fresh.item_logps(toy_batch()))
    assert policy.refresh_items(9) == 0


def test_a_budget_takes_the_stalest_and_shortest_items_first(llama):
    lengths = [4, 9, 3, 7, 5]
    index = ItemIndex([[5] * length for length in lengths], 4, torch.float32, 0)
    assert index.due(1.0, 0, 2, 8).tolist() == [0, 1, 2, 3, 4]
    index.step.zero_()
    index.encoded_with.fill_(1.0)
    assert index.due(2.0, 1, 2, 8).tolist() == []
    assert index.due(2.0, 2, 2, 8).tolist() == [0, 2]
    index.step[[0, 2]], index.encoded_with[[0, 2]] = 2, 2.0
    assert index.due(2.0, 4, 2, 8).tolist() == [4]
    assert index.due(3.0, 4, 2, 22).tolist() == [1, 3, 4]
    assert index.due(3.0, 4, 2, 1).tolist() == [4]
    assert index.due(3.0, None, 2, 1).tolist() == [0, 1, 2, 3, 4]
    assert index.due(2.0, None, 2, 1).tolist() == [1, 3, 4]


class Largest(TorchDispatchMode):
    """Notes the largest storage, in bytes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, torch.Tensor):
                self.bytes = max(self.bytes, value.untyped_storage().nbytes())
        return made


@pytest.mark.slow
def test_a_large_catalogue_is_ranked_in_blocks():
    index = ItemIndex([[5]] * 100_000, 8, torch.bfloat16, 0)
    random = torch.Generator().manual_seed(0)
    index.vectors.copy_(torch.nn.functional.normalize(torch.randn(100_000, 8, generator=random), dim=1))
    states, target = torch.randn(1000, 8, generator=random), torch.randint(100_000, (1000,), generator=random)
    seen = torch.randint(100_000, (1000, 5), generator=random)
    with Largest() as largest:
        ranking = index.rank(states, target, seen, 0.1)
    assert largest.bytes <= 2**28
    row = 999
    scores = (index.vectors.double() @ (states[row] / states[row].norm()).double()).float()
    scores[seen[row]] = -torch.inf
    assert abs(int(ranking.rank[row]) - 1 - int((scores > scores[target[row]]).sum())) <= 20


def test_blocks_do_not_change_a_ranking(monkeypatch):
    index = ItemIndex([[5]] * 30, 4, torch.float32, 0)
    index.vectors.copy_(torch.nn.functional.normalize(torch.randn(30, 4), dim=1))
    index.vectors[7] = index.vectors[3]
    states, target = torch.randn(9, 4), torch.tensor([3, 7, 1, 2, 0, 29, 5, 5, 4])
    seen = torch.tensor([[-1, -1], [1, -1], [1, 2], *[[0, 11]] * 6])
    whole = index.rank(states, target, seen, 0.2)
    logps = index.log_softmax(states, seen, 0.2)
    monkeypatch.setattr("minirec_pl.policy.item_index._SCORES", 70)
    monkeypatch.setattr("minirec_pl.policy.item_index._VALUES", 13)
    for ours, truth in zip(index.rank(states, target, seen, 0.2), whole, strict=True):
        torch.testing.assert_close(ours, truth)
    torch.testing.assert_close(index.log_softmax(states, seen, 0.2), logps)
    assert whole.rank[2] == 0
    assert whole.probability[2] == 0
    assert whole.rank[4] == 0
    for row in (0, 1, 3, 5):
        hidden = [i for i in seen[row].tolist() if i >= 0]
        cosines = (index.vectors.double() @ (states[row] / states[row].norm()).double()).tolist()
        order = sorted((i for i in range(30) if i not in hidden), key=lambda i: (-round(cosines[i], 6), i))
        assert order.index(int(target[row])) + 1 == int(whole.rank[row])
        assert order[0] == int(whole.best[row])
        assert float(whole.probability[row]) == pytest.approx(float(logps[row, target[row]].exp()), rel=1e-4)


@pytest.mark.parametrize("lora", [True, False])
def test_a_saved_policy_has_the_same_scores_and_need_not_read_its_items_again(folder, tmp_path, lora):
    prompt = PromptTemplate(system="Be kind.")
    policy, batch = text_policy(folder, lora=lora, prompt=prompt, max_completion_length=3), toy_batch()
    logps = policy.item_logps(batch)
    policy.save_pretrained(tmp_path / "policy", {"rollouts": {"training": 7}})
    again = RetrievalPolicy(pretrained=str(tmp_path / "policy"))
    again.bind(toy_catalogue())
    assert again.text == policy.text
    assert again.training_cost == {"rollouts": {"training": 7}}
    assert len(trained(again)) == len(trained(policy))
    assert again.refresh_items() == 0
    torch.testing.assert_close(again.item_logps(batch), logps, rtol=1e-5, atol=1e-5)
    other = RetrievalPolicy(pretrained=str(tmp_path / "policy"), max_completion_length=0)
    other.bind(toy_catalogue(15))
    assert other.refresh_items() == int(other.index.lengths.sum())
    assert other.max_completion_length == 0
    again.save_pretrained(tmp_path / "policy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy"]


def test_stale_or_foreign_vectors_are_made_again(llama, tmp_path):
    policy = text_policy(llama)
    policy.refresh_items()
    with torch.no_grad():
        trained(policy)[0].add_(0.5)
    policy.save_pretrained(tmp_path / "stale")
    assert not (tmp_path / "stale" / "items.safetensors").exists()
    policy.refresh_items()
    policy.save_pretrained(tmp_path / "fresh")
    weights = (tmp_path / "stale" / "adapter_model.safetensors").read_bytes()
    assert weights == (tmp_path / "fresh" / "adapter_model.safetensors").read_bytes()
    text_policy(llama, noise=0.0).save_pretrained(tmp_path / "other")
    (tmp_path / "fresh" / "adapter_model.safetensors").write_bytes(
        (tmp_path / "other" / "adapter_model.safetensors").read_bytes()
    )
    swapped = RetrievalPolicy(pretrained=str(tmp_path / "fresh"))
    swapped.bind(toy_catalogue())
    assert swapped.refresh_items() > 0


def test_a_policy_binds_to_any_catalogue(llama):
    policy = text_policy(llama)
    policy.refresh_items()
    index = policy.index
    policy.bind(toy_catalogue())
    assert policy.index is index
    policy.bind(toy_catalogue(20))
    assert len(policy.index) == 20
    assert policy.item_logps(toy_batch()).shape == (4, 20)


def test_half_precision_vectors_and_copies(llama):
    policy, batch = text_policy(llama, item_dtype="bfloat16", max_completion_length=0), toy_batch()
    assert policy.item_logps(batch).dtype == torch.float32
    assert policy.index.vectors.dtype == torch.bfloat16
    other = text_policy(llama, max_completion_length=0)
    torch.testing.assert_close(policy.item_logps(batch), other.item_logps(batch), rtol=0.05, atol=0.2)
    torch.testing.assert_close(copy.deepcopy(other).item_logps(batch), other.item_logps(batch))


def test_diverged_weights_are_named(llama):
    policy = text_policy(llama)
    with torch.no_grad():
        first, second = [p for p in policy.model.parameters() if p.requires_grad][:2]
        first.flatten()[0], second.flatten()[0] = torch.inf, -torch.inf
    with pytest.raises(InputError, match="weights have diverged, so lower the learning rate"):
        policy.item_logps(toy_batch())


def test_evaluation_leaves_modes_and_random_numbers_alone(llama):
    policy = text_policy(llama).train()
    state = torch.random.get_rng_state()
    policy.item_logps(toy_batch())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert policy.training
    assert policy.model.training
    with evaluation_mode(policy):
        made = policy.reason(policy.encode(toy_batch()), sampling=Sampling("greedy"))
    assert made.texts.shape == (4, 1, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"similarity_temperature": 0.0}, "similarity_temperature is 0.0"),
        ({"item_prompt": "an item"}, r"put \{text\} into it"),
        ({"answer_marker": ""}, "answer_marker is empty"),
        ({"max_completion_length": -1}, "max_completion_length is -1"),
        ({"longest_item": 0}, "longest_item 0"),
        ({"refresh_items_every_n_steps": 0}, "refresh_items_every_n_steps 0"),
        ({"cached_negatives": -2}, "cached_negatives is -2"),
        ({"refresh_budget": 0}, "refresh_budget 0"),
        ({"pretrained": "somewhere"}, "exactly one of"),
    ],
)
def test_options_out_of_range_are_refused(llama, options, message):
    with pytest.raises(InputError, match=message):
        RetrievalPolicy(LanguageModel(str(llama), dtype="float32"), **options)


def test_folders_that_hold_no_retrieval_policy_are_refused(llama, tmp_path, tiny_policy):
    with pytest.raises(InputError, match="exactly one of"):
        RetrievalPolicy()
    with pytest.raises(InputError, match="no policy in"):
        RetrievalPolicy(pretrained=str(tmp_path))
    tiny_policy().save_pretrained(tmp_path / "items")
    with pytest.raises(InputError, match="load it as a GenerativePolicy"):
        RetrievalPolicy(pretrained=str(tmp_path / "items"))
    policy = text_policy(llama)
    policy.save_pretrained(tmp_path / "mine")
    (tmp_path / "mine" / "minirec.json").write_text('{"kind": "retrieval"}')
    with pytest.raises(InputError, match="cannot be read"):
        RetrievalPolicy(pretrained=str(tmp_path / "mine"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(InputError, match="holds no policy"):
        policy.save_pretrained(tmp_path / "full")


def test_a_prompt_that_leaves_no_room_is_refused_by_its_sample(llama):
    policy = text_policy(llama, max_completion_length=500)
    with pytest.raises(InputError, match=r"the prompt of sample \d+ has \d+ tokens"):
        policy.item_logps(toy_batch())


@pytest.mark.filterwarnings("ignore:.*use_cache=True. is incompatible")
def test_half_precision_and_gradient_checkpointing_change_little(llama):
    batch = toy_batch()
    plain = text_policy(llama, noise=0.3, reason_in_warm_start=False)
    adapters = {name: value for name, value in plain.state_dict().items() if "lora" in name}
    losses, slopes = [], []
    for options in ({"dtype": "float32"}, {"dtype": "float32", "gradient_checkpointing": True}, {"dtype": "bfloat16"}):
        model = LanguageModel(str(llama), lora=Lora(r=2, alpha=4, dropout=0.0), **options)
        policy = RetrievalPolicy(
            model, prompt=plain.text.prompt, similarity_temperature=0.1, reason_in_warm_start=False
        ).train()
        policy.bind(toy_catalogue())
        policy.load_state_dict(adapters, strict=False)
        loss, _ = policy.supervised_loss(batch)
        loss.backward()
        losses.append(float(loss.detach()))
        slopes.append(torch.cat([p.grad.flatten().float() for p in trained(policy)]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-3, atol=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=0.1)
    assert float(torch.nn.functional.cosine_similarity(slopes[2], slopes[0], dim=0)) > 0.97
