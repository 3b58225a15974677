"""Small models of a config with ids of several tokens: codes from the log, through warm start, GRPO and a folder."""

import numpy as np
import pytest
import torch
from helpers.plain_policy import CONFIG, PlainPolicy

from minirec_pl import GRPORecModule, InputError, WarmStartModule
from minirec_pl.data.samples import Catalogue
from minirec_pl.policy import GenerativePolicy, SemanticIds
from minirec_pl.policy.semantic_ids import item_factors

pytestmark = pytest.mark.filterwarnings("ignore")


def made(**options):
    torch.manual_seed(0)
    semantic = SemanticIds(**{"levels": 2, "codes": 4, **options})
    return GenerativePolicy(config=CONFIG, item_ids="semantic", semantic_ids=semantic)


def test_factors_are_those_of_a_plain_decomposition():
    rng = np.random.default_rng(0)
    pairs = np.stack([rng.integers(0, 30, 400), rng.integers(0, 12, 400)], axis=1)
    found = item_factors(pairs, 14, seed=0).double().numpy()
    matrix = np.zeros((30, 14))
    matrix[pairs[:, 0], pairs[:, 1]] = 1
    matrix = matrix / np.sqrt(np.maximum(matrix.sum(1, keepdims=True) * matrix.sum(0, keepdims=True), 1))
    assert found.shape == (14, 13)
    np.testing.assert_allclose(found @ found.T, matrix.T @ matrix, atol=1e-6)
    assert not found[12:].any()


def test_items_of_the_same_users_share_codes():
    """Two camps of users that never meet: the first code tells their items apart."""
    rng = np.random.default_rng(0)
    users = rng.integers(0, 40, 2000)
    pairs = np.stack([users, rng.integers(0, 8, 2000) + 8 * (users % 2)], axis=1)
    catalogue = Catalogue([f"i{i}" for i in range(16)])
    catalogue.interactions = lambda: pairs
    policy = made(codes=2, levels=1)
    policy.bind(catalogue)
    first = policy.trie.item_tokens[:, 0].tolist()
    assert len(set(first[:8])) == len(set(first[8:])) == 1
    assert first[0] != first[8]


@pytest.mark.filterwarnings("error")
def test_users_of_the_same_items():
    factors = item_factors(np.array([[user, item] for user in range(3) for item in range(4)]), 4, 0)
    assert bool(factors.isfinite().all())
    assert torch.allclose(factors, factors[:1].expand_as(factors), atol=1e-6)


def test_a_policy_trains_is_saved_and_read(toy_data, make_trainer, tmp_path):
    policy, data = made(), toy_data(train_on="warm")
    make_trainer(max_epochs=1).fit(WarmStartModule(policy), data)
    assert policy.id_length > 1
    policy.save_pretrained(tmp_path / "policy")
    again = GenerativePolicy(pretrained=str(tmp_path / "policy"))
    assert again.id_words == policy.id_words
    assert torch.equal(again.trie.item_tokens, policy.trie.item_tokens)
    batch = next(iter(data.sample_loader(data.val_ids[:4])))
    scores = again.item_logps(batch)
    torch.testing.assert_close(scores, policy.item_logps(batch))
    plain = PlainPolicy(again)
    for row in range(2):
        history, seen = ([i for i in batch[k][row].tolist() if i >= 0] for k in ("history", "seen"))
        wanted = plain.item_logps(history, seen)
        known = ~wanted.isneginf()
        torch.testing.assert_close(scores[row][known].double(), wanted[known], rtol=1e-4, atol=1e-4)
    for options in ({}, {"rollouts": "expected", "loss_type": "dr_grpo"}):
        make_trainer(max_epochs=1, limit_train_batches=2).fit(GRPORecModule(again, **options), toy_data())
    again.save_pretrained(tmp_path / "second")
    third = GenerativePolicy(pretrained=str(tmp_path / "second"))
    assert third.id_words == policy.id_words


def test_the_codes_know_nothing_of_validation_and_test(toy_data):
    data = toy_data()
    data.setup("fit")
    train = np.concatenate([data.parts.warm, data.parts.pool])
    pairs = data.catalogue.interactions()
    assert sorted(map(tuple, pairs.tolist())) == sorted(
        zip(data.table.user[train].tolist(), data.table.item[train].tolist(), strict=True)
    )


def test_given_embeddings_take_the_place_of_the_log(tmp_path):
    catalogue = Catalogue([f"i{i}" for i in range(6)])
    np.save(tmp_path / "e.npy", np.repeat(np.eye(3, dtype=np.float32), 2, axis=0))
    policy = made(levels=1, codes=3, embeddings=str(tmp_path / "e.npy"))
    policy.bind(catalogue)
    first = policy.trie.item_tokens[:, 0].tolist()
    assert first[0] == first[1] != first[2] == first[3]


def test_without_a_log_the_sentence_says_what_to_do():
    with pytest.raises(
        InputError, match="takes its codes from the log: fit with a RecDataModule, or give semantic_ids"
    ):
        made().bind(Catalogue(["a", "b"]))
    with pytest.raises(InputError, match="at least two users and two items"):
        item_factors(np.array([[0, 0], [0, 1]]), 2, 0)
    with pytest.raises(InputError, match="semantic_ids goes with"):
        GenerativePolicy(config=CONFIG, semantic_ids=SemanticIds())


def test_one_token_per_item_needs_no_scikit_learn(monkeypatch):
    monkeypatch.setattr("minirec_pl.policy.semantic_ids.find_spec", lambda name: None)
    policy = GenerativePolicy(config=CONFIG)
    policy.bind(Catalogue(["a", "b"]))
    assert policy.id_length == 1
    with pytest.raises(InputError, match="item_ids 'semantic' needs scikit-learn"):
        SemanticIds()
