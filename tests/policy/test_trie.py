import pytest
import torch
from helpers.plain_policy import padded, unequal_ids

from minirec_pl import InputError
from minirec_pl.policy.trie import TokenTrie


def test_prefixes_of_unequal_ids_agree_with_brute_force():
    ids = unequal_ids(30)
    trie = TokenTrie(padded(ids))
    assert trie.depth == 4
    assert trie.n_items == 30
    generator = torch.Generator().manual_seed(1)
    for n_seen in (0, 1, 7, 29):
        hidden = torch.randperm(30, generator=generator)[:n_seen].tolist()
        open_ids = [tokens for i, tokens in enumerate(ids) if i not in hidden]
        seen = torch.tensor([[*hidden, -1, *hidden[:1]]])
        counts = trie.available_below(seen)
        assert int(counts[0, -1]) == 30 - n_seen
        for depth in range(trie.depth):
            token, low, high = trie.level(depth)
            for prefix in {tuple(tokens[:depth]) for tokens in ids if len(tokens) > depth}:
                under = [i for i in range(30) if tuple(ids[i][:depth]) == prefix]
                ranks = trie.rank[under]
                bounds = ranks.min()[None], ranks.max()[None] + 1
                assert int(bounds[1] - bounds[0]) == len(under)
                allowed = trie.allowed_children(depth, *bounds, counts)[0]
                truth = {tokens[depth] for tokens in open_ids if tuple(tokens[:depth]) == prefix}
                assert sorted(token[allowed].tolist()) == sorted(truth)
            for i, tokens in enumerate(ids):
                child = int(trie.child_of[i, depth])
                assert (child >= 0) == (len(tokens) > depth)
                if child >= 0:
                    assert int(token[child]) == tokens[depth]
                    below = trie.order[int(low[child]) : int(high[child])].tolist()
                    assert sorted(below) == [j for j in range(30) if ids[j][: depth + 1] == tokens[: depth + 1]]


def test_rows_of_a_batch_have_their_own_seen_items():
    trie = TokenTrie(torch.tensor([[5, 8], [5, 9], [6, 8]]))
    counts = trie.available_below(torch.tensor([[0, 1], [2, -1], [-1, -1]]))
    zero, three = torch.zeros(3, dtype=torch.int64), torch.full((3,), 3)
    assert trie.allowed_children(0, zero, three, counts).tolist() == [[False, True], [True, False], [True, True]]


def test_no_seen_column_at_all():
    counts = TokenTrie(torch.tensor([[5], [4]])).available_below(torch.empty(2, 0, dtype=torch.int64))
    assert counts.tolist() == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.empty(0, 1, dtype=torch.int64), "catalogue is empty"),
        (torch.tensor([[3, 4], [-1, -1]]), "item index 1 has no token"),
        (torch.tensor([[3, 4, 5], [3, -1, 5]]), "item index 1 has a gap"),
        (torch.tensor([[7, 8], [9, 1], [7, 8]]), "index 0 and 2 .* must differ"),
        (torch.tensor([[7, 8, 2], [7, 9, 1], [7, -1, -1]]), "index 2 and 0 .* begins with the other"),
    ],
)
def test_ids_that_no_trie_can_hold(tokens, message):
    with pytest.raises(InputError, match=message):
        TokenTrie(tokens)


def test_a_user_who_has_seen_everything():
    with pytest.raises(InputError, match="row 1 of the batch has seen the whole catalogue"):
        TokenTrie(torch.tensor([[5], [4]])).available_below(torch.tensor([[0, -1], [1, 0]]))


@pytest.mark.parametrize("ids", [unequal_ids(30), [[7], [3], [9]]])
def test_items_are_found_by_their_ids(ids):
    tokens = padded(ids)
    trie = TokenTrie(tokens)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    assert torch.equal(trie.items_of(tokens[order]), order)
    wrong = tokens.clone()
    wrong[:, 0] += 50
    assert trie.items_of(wrong).tolist() == [-1] * len(ids)
    short = tokens.clone()
    short[torch.arange(len(ids)), (tokens >= 0).sum(dim=1) - 1] = -1
    last = [len(row) - 1 for row in ids]
    alone = [all(other[:n] != row[:n] for other in ids if other is not row) for row, n in zip(ids, last, strict=True)]
    assert trie.items_of(short).tolist() == [i if n and alone[i] else -1 for i, n in enumerate(last)]


def test_an_item_is_decided_where_its_id_differs_from_all_others():
    ids = unequal_ids(30)
    for item, decided in enumerate(TokenTrie(padded(ids)).decided.tolist()):
        others = [tokens for i, tokens in enumerate(ids) if i != item]
        assert all(tokens[:decided] != ids[item][:decided] for tokens in others)
        assert any(tokens[: decided - 1] == ids[item][: decided - 1] for tokens in others)
    assert TokenTrie(torch.tensor([[5, 8, 2]])).decided.tolist() == [1]
