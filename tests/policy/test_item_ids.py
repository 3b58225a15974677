import itertools

import numpy as np
import pytest
import torch
from helpers.chat_models import CATALOGUE, PROMPT, TITLES, chat_folder, chat_policy, chat_tokenizer
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from minirec_pl import InputError
from minirec_pl.data.samples import Catalogue
from minirec_pl.policy import semantic_ids as item_codes
from minirec_pl.policy.item_ids import text_states, title_ids
from minirec_pl.policy.prompt import PromptTemplate
from minirec_pl.policy.semantic_ids import SemanticIds, code_names, read_embeddings, residual_codes
from minirec_pl.policy.trie import TokenTrie


def clusters(n=60, width=8, seed=0):
    """Four far groups of three near groups each."""
    random = np.random.default_rng(seed)
    far, near = random.normal(size=(4, width)) * 10, random.normal(size=(4, 3, width)) * 2
    label = np.arange(n) % 12
    points = far[label // 3] + near[label // 3, label % 3] + 0.01 * random.normal(size=(n, width))
    return torch.from_numpy(points).float(), torch.from_numpy(label)


def test_titles_end_and_the_same_title_gets_a_number_in_catalogue_order():
    tokenizer = chat_tokenizer()
    ids = title_ids(tokenizer, CATALOGUE, PROMPT)
    assert ids.texts[:5] == [*TITLES[:4], "Toy Story (2)"]
    assert (ids.texts[11], ids.texts[14]) == ("Toy Story (2) (2)", "Toy Story (3)")
    assert len(set(ids.texts)) == len(TITLES)
    TokenTrie(ids.tokens)
    for row, text in zip(ids.tokens.tolist(), ids.texts, strict=True):
        real = [token for token in row if token >= 0]
        assert real == [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def test_titles_are_cut_and_hold_no_special_token():
    catalogue = Catalogue(["a", "b", "c"], ["Babe: Pig in the City", "Babe: Pigs", "Se<|im_end|>"])
    ids = title_ids(chat_tokenizer(), catalogue, PromptTemplate(longest_title=9))
    assert ids.texts == ["Babe: Pi…", "Babe: Pi… (2)", "Se<|im_e…"]
    assert (ids.tokens == 2).sum(dim=1).tolist() == [1, 1, 1]


def test_codes_go_from_coarse_to_fine():
    points, label = clusters()
    codes = residual_codes(points, 2, 4, seed=0)
    for (a, one), (b, other) in itertools.combinations(list(enumerate(label.tolist())), 2):
        assert (codes[a, 0] == codes[b, 0]) == (one // 3 == other // 3)
        if one == other:
            assert torch.equal(codes[a], codes[b])
    assert torch.equal(codes, residual_codes(points, 2, 4, seed=0))
    assert residual_codes(points * 7 + 3, 2, 4, seed=0).tolist() == codes.tolist()


def test_fewer_different_items_than_codes():
    codes = residual_codes(torch.eye(3)[[0, 1, 2, 0]], 2, 64, seed=1)
    assert torch.equal(codes[0], codes[3])
    assert len({tuple(row) for row in codes.tolist()}) == 3
    assert code_names(codes)[0][-1] == "<c_0>"
    assert code_names(codes)[3][-1] == "<c_1>"


def test_ids_of_items_with_the_same_codes_differ():
    names = code_names(torch.tensor([[0, 3], [1, 2], [0, 3], [0, 3]]))
    assert names == [
        ["<a_0>", "<b_3>", "<c_0>"],
        ["<a_1>", "<b_2>"],
        ["<a_0>", "<b_3>", "<c_1>"],
        ["<a_0>", "<b_3>", "<c_2>"],
    ]


def test_text_states_are_the_means_of_single_texts(tmp_path):
    folder = chat_folder(tmp_path / "base")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), chat_tokenizer()
    texts = [*TITLES, "", "Se<|im_end|>ven", "x " * 400]
    states = text_states(model.train(), tokenizer, texts)
    assert model.training
    assert not states.requires_grad
    for text, state in zip(texts, states, strict=True):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"][:256] or [2]
        with torch.no_grad():
            truth = model.base_model(torch.tensor([ids])).last_hidden_state[0].mean(dim=0)
        torch.testing.assert_close(state, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("item_ids", ["semantic", "token"])
def test_new_rows_start_at_the_mean_of_the_text_of_their_items(tmp_path, kind, item_ids):
    folder = chat_folder(tmp_path / "base", kind)
    before = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    policy = chat_policy(
        folder, item_ids=item_ids, lora=None, semantic_ids=None if item_ids == "token" else SemanticIds(codes=3)
    )
    tokenizer, ids = policy.chat.tokenizer, policy.trie.item_tokens
    new = sorted(set(ids[ids >= 0].tolist()))
    assert new == list(range(330, len(tokenizer)))
    texts = [chat_tokenizer()(text)["input_ids"] for text in TITLES]
    used = sorted({token for text in texts for token in text})
    ends = (
        ["get_input_embeddings"]
        if before.config.tie_word_embeddings
        else ["get_input_embeddings", "get_output_embeddings"]
    )
    for end in ends:
        old, now = (getattr(model, end)().weight.detach() for model in (before, policy.model))
        assert torch.equal(now[:330], old)
        for token in new:
            members = [i for i, row in enumerate(ids.tolist()) if token in row]
            mean = torch.stack([old[texts[i]].mean(dim=0) for i in members]).mean(dim=0)
            assert float(now[token].norm()) == pytest.approx(0.3 * float(old[used].norm(dim=1).mean()), rel=1e-4)
            torch.testing.assert_close(now[token] / now[token].norm(), mean / mean.norm(), rtol=1e-4, atol=1e-5)
    assert "".join(tokenizer.convert_ids_to_tokens([t for t in ids[5].tolist() if t >= 0])) == policy.chat.id_texts[5]


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_semantic_ids_of_embeddings_in_a_file(tmp_path, suffix):
    points, _ = clusters(len(TITLES))
    path = tmp_path / f"items{suffix}"
    if suffix == ".npy":
        np.save(path, points.numpy())
    else:
        save_file({"embeddings": points}, path)
    options = SemanticIds(levels=2, codes=4, embeddings=str(path))
    policy = chat_policy(tmp_path / "base", item_ids="semantic", semantic_ids=options)
    assert policy.chat.id_texts == ["".join(row) for row in code_names(residual_codes(points, 2, 4, 0))]


def test_embeddings_that_do_not_fit(tmp_path):
    good = np.zeros((4, 3), np.float32)
    bad = good.copy()
    bad[2, 1] = np.nan
    cases = {
        "short.npy": (good[:3], r"\[3, 3\] .* catalogue 4 items"),
        "flat.npy": (good[0], "store floats"),
        "whole.npy": (good.astype(int), "store floats"),
        "nan.npy": (bad, "row 2: the embedding is not finite"),
        "object.npy": (np.array([{}], dtype=object), "cannot be read"),
    }
    for name, (values, message) in cases.items():
        np.save(tmp_path / name, values, allow_pickle=True)
        with pytest.raises(InputError, match=message):
            read_embeddings(tmp_path / name, 4)
    (tmp_path / "bad.safetensors").write_bytes(b"{}")
    save_file({"a": torch.zeros(4, 3), "b": torch.zeros(4, 3)}, tmp_path / "two.safetensors")
    for name, message in (
        ("bad.safetensors", "cannot be read"),
        ("two.safetensors", "holds 2 arrays"),
        ("items.csv", "give a .npy or .safetensors"),
        ("gone.npy", "cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            read_embeddings(tmp_path / name, 4)


def test_bad_options(monkeypatch):
    for options, message in (
        ({"levels": 0}, "levels is 0"),
        ({"levels": 26}, "give 1 to 25"),
        ({"codes": 1}, "codes is 1"),
    ):
        with pytest.raises(InputError, match=message):
            SemanticIds(**options)
    monkeypatch.setattr(item_codes, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs scikit-learn: pip install 'minirec-pl\[kmeans\]'"):
        SemanticIds()


def test_a_tokenizer_that_has_item_ids_already(tmp_path):
    policy = chat_policy(tmp_path / "base", item_ids="token", lora=None)
    policy.save_pretrained(tmp_path / "policy")
    with pytest.raises(InputError, match="has the token <item:i0> already"):
        chat_policy(tmp_path / "policy", item_ids="token")
