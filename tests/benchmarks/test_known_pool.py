"""The kinds are what they claim, by an oracle that knows the rules, and a tiny run leaves its files."""

import json

import known_files
import numpy as np
import pandas as pd
import pytest
from known_cells import Settings
from known_kinds import KINDS, KnownKinds, Rules, counts_of
from known_pool import at_tokens, main, pools
from known_report import interval

from minirec_pl import RecDataModule
from minirec_pl.data.sources import Sequences
from minirec_pl.policy import GenerativePolicy
from minirec_pl.policy.trie import TokenTrie

SHARES = dict.fromkeys(KINDS, 0.2)


@pytest.fixture(scope="module")
def source():
    return KnownKinds(3, counts_of(SHARES, 2_000), warm_repeats=1)


def oracle_hits(source, kind, part):
    """Share of the samples of a kind whose target follows from the last item by the rules, and how many there are."""
    table, rules = source.read().table, Rules(source)
    told = {
        key: candidates[0]
        for name in ("solved", "useful", "redundant", "coin")
        for key, candidates in zip(rules.keys[name], rules.candidates[name], strict=True)
    }
    n_warm = round(source.warm_fraction * (table.part == "train").sum())
    rows = np.flatnonzero((source.kinds == kind) & (table.part == ("train" if part == "pool" else part)))
    rows = rows[rows >= n_warm]
    return np.mean([told.get(table.history(row)[-1]) == table.item[row] for row in rows]), len(rows)


def test_an_oracle_tells_the_rules_and_nothing_else(source):
    for kind in ("solved", "useful", "redundant"):
        assert oracle_hits(source, kind, "pool") == (1.0, 400)
    for part in ("validation", "test"):
        assert oracle_hits(source, "solved", part) == (1.0, 96)
        assert oracle_hits(source, "useful", part) == (1.0, 96)
    assert oracle_hits(source, "hopeless", "pool") == (0.0, 400)  # no history of theirs ends with a key
    share, n = oracle_hits(source, "coin", "pool")
    assert share == pytest.approx(1 / 16, abs=4 * np.sqrt(1 / 16 * 15 / 16 / n))


def test_hopeless_targets_are_spread_over_the_catalogue(source):
    table = source.read().table
    items = table.item[source.kinds == "hopeless"]
    counts = np.bincount(items * 10 // source.n_items, minlength=10)
    assert np.all(np.abs(counts - len(items) / 10) < 4 * np.sqrt(len(items) / 10))


def test_redundant_histories_are_near_copies_and_the_others_are_not(source):
    table = source.read().table

    def shared(kind):
        rows = np.flatnonzero((source.kinds == kind) & (np.arange(len(table)) >= len(table) - 2_384))[:200]
        sets = [set(table.history(row).tolist()) for row in rows]
        return np.median(
            [max(len(own & other) for j, other in enumerate(sets) if j != i) for i, own in enumerate(sets)]
        )

    assert shared("redundant") >= 5
    assert shared("useful") <= 2


def test_the_warm_part_teaches_solved_and_half_teaches_the_rest():
    source = KnownKinds(3, {"useful": 1}, warm_repeats=2)
    table = source.read().table
    warm = np.arange(len(table)) < round(source.warm_fraction * (table.part == "train").sum())
    for kind, n_targets in (("solved", 1), ("useful", 16), ("redundant", 16), ("coin", 16)):
        rows = np.flatnonzero((source.kinds == kind) & warm)
        targets = {}
        for row in rows:
            targets.setdefault(int(table.history(row)[-1]), []).append(int(table.item[row]))
        for seen in targets.values():
            _, counts = np.unique(seen, return_counts=True)
            assert len(counts) == n_targets
            assert set(counts) == {32 // n_targets}


def test_another_pool_keeps_rules_and_held_out_parts(source):
    other = source.with_pool({"hopeless": 50})
    mine, theirs = source.read().table, other.read().table
    own, new = np.flatnonzero(mine.part == "test"), np.flatnonzero(theirs.part == "test")
    assert mine.item[own].tolist() == theirs.item[new].tolist()
    assert [mine.history(i).tolist() for i in own] == [theirs.history(i).tolist() for i in new]


def test_counts_and_figures():
    for shares in pools().values():
        assert sum(shares.values()) == pytest.approx(1)
        assert sum(counts_of(shares, 640).values()) == 640
    mean, half = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean, half) == (3.0, pytest.approx(2.7764 * np.sqrt(2.5 / 5), rel=1e-4))
    names = ("ndcg@10", "hit_rate@10", "ndcg@10 solved", "ndcg@10 useful")
    points = [{"tokens": 0} | dict.fromkeys(names, 0.2), {"tokens": 100} | dict.fromkeys(names, 0.6)]
    assert at_tokens(points, 25)["ndcg@10"] == pytest.approx(0.3)


@pytest.mark.slow
def test_a_tiny_run_leaves_its_files(monkeypatch, tmp_path):
    import known_pool

    chosen = {"10% useful, rest solved": {"useful": 0.1, "solved": 0.9}}
    monkeypatch.setattr(known_pool, "pools", lambda: chosen)
    monkeypatch.setattr(known_pool, "Settings", lambda: Settings(n_pool=160, epochs=3, batch_size=16))
    main(["--seeds", "2", "--json", str(tmp_path / "k.json")])
    result = json.loads((tmp_path / "k.json").read_text())
    assert [row["seed"] for row in result["rows"]] == [0, 1]
    for row in result["rows"]:
        methods = row["methods"]
        assert methods["minirec"]["warm"]["ndcg@10 solved"] > 0.95
        assert 0.1 < methods["minirec"]["warm"]["ndcg@10 useful"] < 0.5
        assert methods["minirec"]["picks"]["solved"] == 0  # the gate leaves out what the warm start has solved
        assert methods["random"]["picks"]["solved"] > methods["random"]["picks"]["useful"] > 0
        assert methods["minirec"]["tokens"]["scoring"] == 3 * 160 * 7  # a pass over seven tokens a sample and epoch
        assert methods["random"]["tokens"]["scoring"] == methods["full"]["tokens"]["scoring"] == 0
        spent = sum(methods["minirec"]["tokens"].values())
        assert methods["minirec"]["samples"]["tokens"] == spent  # the last point comes after the last step
        assert methods["random"]["tokens"]["training"] >= spent
        assert methods["full"]["tokens"]["training"] >= spent
    text = (tmp_path / "k.md").read_text()
    assert "## MiniRec less its rivals" in text
    assert "10% useful, rest solved" in text
    before = text
    main(["--report", "--json", str(tmp_path / "k.json")])
    assert (tmp_path / "k.md").read_text() == before
    assert (tmp_path / "k.png").stat().st_size > 10_000


def test_long_ids_are_known_at_their_last_token_only():
    for length in known_files.LENGTHS:
        ids, words = known_files.long_ids(1_682, length)
        trie = TokenTrie(ids)
        assert ids.shape == (1_682, length)
        assert int(ids.max()) < len(words)
        assert trie.decided.tolist() == [length] * 1_682
        decisions = [depth for depth in range(length) if int((ids[:, depth] > 0).sum())]
        assert decisions == [length // 2 - 1, length - 1]


def test_files_of_a_seed_are_read_as_they_were_drawn(tmp_path):
    source = known_files.source_of(5)
    known_files.write(tmp_path, 5, source, lengths=[16])
    files = Sequences(str(tmp_path / "5/sequences.parquet"), str(tmp_path / "5/items.parquet"))
    data = RecDataModule(source=files, split="given", warm_fraction=0.8085758, history_window=known_files.HISTORY)
    data.setup("fit")
    kinds = pd.read_parquet(tmp_path / "5/sequences.parquet")["kind"].to_numpy()
    assert (kinds == source.kinds).all()
    assert (data.table.item == source.read().table.item).all()
    assert pd.Series(kinds[data.pool_ids]).value_counts().to_dict() == source.pool
    policy = GenerativePolicy(pretrained=str(tmp_path / "5/policy-16"))
    policy.bind(data.catalogue)
    batch = next(iter(data.sample_loader(data.val_ids[:4])))
    assert policy.prompt_tokens(batch) == 4 * (1 + 3 * 16)
    assert policy.generate(batch, 2).mask.sum() == 4 * 2 * 16


def outside_and_useful(source):
    """Samples that are not in the pool, in order, and the useful ones of the pool."""
    table = source.read().table
    samples = [(table.item[row], *table.history(row)) for row in range(len(table.item))]
    pool = np.flatnonzero(table.part == "train")[-sum(source.pool.values()) :]
    useful = {samples[row] for row in pool if source.kinds[row] == "useful"}
    return [samples[row] for row in np.setdiff1d(np.arange(len(samples)), pool)], useful


def test_other_pools_of_a_seed_differ_in_nothing_else():
    outside, useful = outside_and_useful(known_files.source_of(5))
    fewer = outside_and_useful(known_files.source_of(5, 0.05))
    only = outside_and_useful(known_files.source_of(5, 1.0, 200))
    assert outside == fewer[0] == only[0]
    assert fewer[1] < useful == only[1]
