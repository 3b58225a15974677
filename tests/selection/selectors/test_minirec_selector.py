"""Oracle: the whole selection of a small pool again, in plain NumPy loops from the formulas of the paper."""

import math
import warnings

import numpy as np
import pytest
import torch
from helpers.rival_pool import random_pool

from minirec_pl.selection import MiniRecSelector, RandomSelector, SampleSignals, Selector, Signals, SignalStore
from minirec_pl.utils.errors import InputError


def min_max(values):
    spread = values.max() - values.min()
    return (values - values.min()) / spread if spread > 0 else np.full(len(values), 0.5)


def expected_ranking(signals, k, *, difficulty=None, gate=None, alpha=1.0, mu=0.5):
    ids = signals.sample_id.numpy()
    r = signals.reward_mean.numpy() if difficulty is None else difficulty
    learn = min_max(np.exp(-((r - mu) ** 2) / (2 * r.std() ** 2)))
    u, e = signals.gradient.double().numpy(), signals.embedding.double().numpy()
    represent = min_max((1 + np.array([x @ u.mean(0) / np.linalg.norm(x) for x in u]) / np.linalg.norm(u.mean(0))) / 2)
    score = alpha * learn + represent
    allowed = [i for i in range(len(ids)) if gate is None or gate[0] <= r[i] <= gate[1]]
    chosen: list[int] = []
    while len(chosen) < min(k, len(allowed)):

        def value(i):
            gaps = [1 - e[i] @ e[j] / np.linalg.norm(e[i]) / np.linalg.norm(e[j]) for j in chosen]
            return min(gaps, default=1.0) * score[i]

        chosen.append(max((i for i in allowed if i not in chosen), key=value))
    return [int(ids[i]) for i in chosen]


def test_paper_mode_equals_the_formulas():
    signals = random_pool()
    got = MiniRecSelector(gate=(0.1, 0.8), alpha=0.7).select(signals, 15)
    assert got.selected() == expected_ranking(signals, 15, gate=(0.1, 0.8), alpha=0.7)


def test_official_mode_equals_the_formulas_without_a_gate():
    signals = random_pool(seed=1)
    got = MiniRecSelector("official").select(signals, 40)
    assert got.selected() == expected_ranking(signals, 40)
    assert set(got.table["reason"]) == {"selected", "redundant", "below_budget"}


def test_a_term_with_weight_zero_decides_nothing():
    signals = random_pool()
    got = MiniRecSelector(mode="official", beta=0.0).select(signals, 12).selected()
    assert got == MiniRecSelector(mode="official", beta=0.0).select(without(signals, "gradient"), 12).selected()
    assert got != MiniRecSelector(mode="official").select(signals, 12).selected()
    assert MiniRecSelector(alpha=0.0, gate=(0.0, 1.0), mu=0.9).select(signals, 12).selected() == (
        expected_ranking(signals, 12, alpha=0.0)
    )


def without(signals, name):
    fields = {field: getattr(signals, field) for field in ("sample_id", "reward_mean", "reward_std", "n_rollouts")}
    fields |= {"solve_share": signals.solve_share, "gradient": signals.gradient, "embedding": signals.embedding}
    return Signals(**{**fields, name: None})


@pytest.mark.parametrize("on_short", ["shrink", "fill"])
def test_without_novelty_the_best_are_taken(on_short):
    signals = random_pool()
    selector = MiniRecSelector(gate=(0.1, 0.8), novelty=False, on_short=on_short)
    table = selector.select(signals, 20).table.set_index("sample_id")
    score = table["learnability"] + table["representativeness"]
    inside = table["reward_mean"].between(0.1, 0.8)
    ranked = score[inside].sort_values(ascending=False, kind="stable").index.tolist()
    ranked += score[~inside].sort_values(ascending=False, kind="stable").index.tolist() if on_short == "fill" else []
    picked = table[table["rank"] > 0].sort_values("rank")
    assert picked.index.tolist() == ranked[:20]
    assert (picked["novelty"] == 1).all()
    assert picked["value"].tolist() == pytest.approx(score[picked.index].tolist())


def test_pass_at_group_equals_the_formulas():
    exact = np.random.default_rng(3).uniform(0, 0.2, 60)
    exact[:20] = np.nan
    signals = random_pool(seed=2, solve_probability=exact)
    p = np.where(np.isnan(exact), signals.solve_share.numpy(), exact)
    q = 1 - (1 - p) ** 4
    got = MiniRecSelector(difficulty="pass_at_group", num_generations=4).select(signals, 12)
    assert got.selected() == expected_ranking(signals, 12, difficulty=q, gate=(0.05, 0.95))
    rows = got.rows(signals.sample_id.tolist())
    np.testing.assert_allclose(rows["difficulty"], q, atol=1e-12)


def test_pass_at_group_needs_no_rollouts_where_the_probability_is_exact():
    nan = np.full(60, np.nan)
    signals = random_pool(
        reward_mean=nan, reward_std=nan, solve_share=None, n_rollouts=np.zeros(60), solve_probability=np.full(60, 0.05)
    )
    assert MiniRecSelector(difficulty="pass_at_group").select(signals, 9).n_selected == 9
    with pytest.raises(InputError, match="no sample of the pool has the rewards that difficulty='mean' needs"):
        MiniRecSelector().select(signals, 9)


def test_ledger_rows_tell_terms_and_reasons():
    signals = random_pool()
    ledger = MiniRecSelector(gate=(0.1, 0.8)).select(signals, 5)
    table = ledger.table
    assert len(table) == 60
    easy, hard = table["reward_mean"] > 0.8, table["reward_mean"] < 0.1
    assert easy.any()
    assert hard.any()
    assert (table["reason"][easy] == "too_easy").all()
    assert (table["reason"][hard] == "too_hard").all()
    assert set(table["reason"][~easy & ~hard]) == {"selected", "redundant", "below_budget"}
    for name in ("learnability", "representativeness"):
        assert table[name].min() == 0, "scaled over the pool, before the gate"
        assert table[name].max() == 1
    np.testing.assert_allclose(table["score"], table["learnability"] + table["representativeness"])
    picked = table.dropna(subset=["rank"])
    np.testing.assert_allclose(
        picked["value"], picked["novelty"] * (picked["learnability"] + picked["representativeness"])
    )
    others = table["rank"].isna() & (table["reason"] != "redundant")
    assert table[others][["novelty", "value"]].isna().all(axis=None)
    assert picked.set_index("rank")["novelty"][1] == 1.0


def test_order_of_the_rows_does_not_matter():
    signals = random_pool()
    turned = signals.take(torch.randperm(60, generator=torch.Generator().manual_seed(0)))
    for selector in (MiniRecSelector(), RandomSelector()):
        assert selector.select(signals, 20).selected() == selector.select(turned, 20).selected()


@pytest.mark.parametrize("selector", [MiniRecSelector(), MiniRecSelector("official"), RandomSelector(seed=3)])
def test_smaller_budget_is_a_prefix(selector):
    signals = random_pool()
    largest = selector.select(signals, 25)
    for k in (1, 7, 24):
        assert selector.select(signals, k).selected() == largest.selected(k)


def test_ties_go_to_the_smaller_sample_id():
    same = {
        "reward_mean": np.full(60, 0.5),
        "gradient": np.ones((60, 5)),
        "embedding": np.ones((60, 4)),
    }
    assert MiniRecSelector().select(random_pool(**same), 60).selected() == list(range(100, 160))


def test_short_pool_shrinks_with_a_warning():
    signals = random_pool()
    survivors = int(((signals.reward_mean >= 0.4) & (signals.reward_mean <= 0.6)).sum())
    with pytest.warns(UserWarning, match=rf"picked {survivors} samples instead of 30; of 60 samples 60 have"):
        ledger = MiniRecSelector(gate=(0.4, 0.6)).select(signals, 30)
    assert ledger.n_selected == survivors
    assert "filled" not in set(ledger.table["reason"])


def test_short_pool_is_filled_by_value():
    signals = random_pool()
    selector = MiniRecSelector(gate=(0.4, 0.6), on_short="fill")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ledger = selector.select(signals, 30)
    survivors = int(((signals.reward_mean >= 0.4) & (signals.reward_mean <= 0.6)).sum())
    assert 0 < survivors < 30
    assert ledger.n_selected == 30
    picks = ledger.rows(ledger.selected())
    assert picks["reason"].tolist() == ["selected"] * survivors + ["filled"] * (30 - survivors)

    table = ledger.table.set_index("sample_id")
    score = table["learnability"] + table["representativeness"]
    where = {int(i): row for row, i in enumerate(signals.sample_id)}
    unit = torch.nn.functional.normalize(signals.embedding.double(), dim=1).numpy()
    chosen = ledger.selected()[:survivors]
    for pick in ledger.selected()[survivors:]:
        value = {
            i: min(1 - unit[where[i]] @ unit[where[j]] for j in chosen) * score[i] for i in where if i not in chosen
        }
        assert pick == max(value, key=value.__getitem__)
        assert table["value"][pick] == pytest.approx(value[pick])
        chosen.append(pick)


def test_all_gated_out_is_an_error_or_filled():
    signals = random_pool(reward_mean=np.zeros(60))
    with pytest.raises(InputError, match=r"none of 60 scored samples has a difficulty within gate=\[0\.05, 0\.95\]"):
        MiniRecSelector().select(signals, 5)
    ledger = MiniRecSelector(on_short="fill").select(signals, 5)
    assert set(ledger.rows(ledger.selected())["reason"]) == {"filled"}


def test_samples_without_signals_are_never_scored_and_never_picked():
    reward, known = np.random.default_rng(0).uniform(0.2, 0.8, 60), np.ones(60, dtype=bool)
    reward[:10] = np.nan
    known[10:15] = False
    signals = random_pool(reward_mean=reward, embedding_known=known)
    with pytest.warns(UserWarning, match="picked 45 samples instead of 60"):
        ledger = MiniRecSelector(on_short="fill").select(signals, 60)
    assert set(ledger.rows(signals.sample_id[:15].tolist())["reason"]) == {"never_scored"}
    assert set(ledger.selected()) == set(signals.sample_id[15:].tolist())


def test_sample_without_gradient_counts_as_neutral():
    gradient = np.random.default_rng(5).normal(size=(60, 5))
    gradient[7] = 0
    signals = random_pool(gradient=gradient)
    row = MiniRecSelector("official").select(signals, 1).rows([int(signals.sample_id[7])])
    cosine = gradient @ gradient.mean(axis=0) / np.linalg.norm(gradient.mean(axis=0))
    cosine[np.arange(60) != 7] /= np.linalg.norm(gradient[np.arange(60) != 7], axis=1)
    assert row["representativeness"].item() == pytest.approx(min_max((1 + cosine) / 2)[7])


def test_mean_gradient_uses_fresh_rows_only():
    gradient = np.tile([1.0, 0, 0, 0, 0], (60, 1))
    gradient[30:] = [-1.0, 0.1, 0, 0, 0]
    fresh = np.arange(60) < 20
    signals = random_pool(gradient=gradient, gradient_fresh=fresh)
    table = MiniRecSelector("official").select(signals, 1)
    assert (table.rows(signals.sample_id[:30].tolist())["representativeness"] == 1).all()
    assert (table.rows(signals.sample_id[30:].tolist())["representativeness"] == 0).all()


@pytest.mark.parametrize(
    "changes",
    [{"reward_mean": np.full(60, 0.4)}, {"gradient": np.zeros((60, 5))}, {"embedding": np.zeros((60, 4))}],
    ids=["constant rewards", "zero gradients", "zero embeddings"],
)
@pytest.mark.parametrize("mode", ["paper", "official"])
def test_degenerate_pool_still_gives_k_distinct_picks(changes, mode):
    ledger = MiniRecSelector(mode, gate=(-1, 2)).select(random_pool(**changes), 60)
    assert sorted(ledger.selected()) == list(range(100, 160))
    assert ledger.table[["learnability", "representativeness", "value"]].notna().all(axis=None)


def test_trajectory_goes_by_the_alignment_where_it_is_known():
    random = np.random.default_rng(8)
    alignment = random.uniform(-1, 1, 60)
    alignment[40:] = np.nan
    signals = random_pool(alignment=alignment)
    known, ids = np.arange(60) < 40, signals.sample_id.tolist()
    first = MiniRecSelector().select(signals, 5).rows(ids)["representativeness"].to_numpy()
    got = MiniRecSelector(gradient="trajectory").select(signals, 5).rows(ids)["representativeness"].to_numpy()
    np.testing.assert_allclose(got[known], min_max((1 + alignment[known]) / 2))
    np.testing.assert_array_equal(got[~known], first[~known])
    assert not np.allclose(got[known], first[known])


def test_trajectory_before_training_has_moved_is_the_first_order_signal():
    signals = random_pool()
    expected = MiniRecSelector().select(signals, 20)
    assert MiniRecSelector(gradient="trajectory").select(signals, 20).table.equals(expected.table)
    nowhere = random_pool(alignment=np.full(60, np.nan))
    assert MiniRecSelector(gradient="trajectory").select(nowhere, 20).table.equals(expected.table)


def test_other_gradients_do_not_look_at_the_alignment():
    aligned = random_pool(alignment=np.linspace(-1, 1, 60))
    for selector in (MiniRecSelector(), MiniRecSelector("official")):
        assert selector.select(aligned, 9).table.equals(selector.select(random_pool(), 9).table)


def test_single_sample():
    one = random_pool().take(torch.tensor([3]))
    ledger = MiniRecSelector("official").select(one, 1)
    assert ledger.selected() == one.sample_id.tolist()
    assert ledger.table[["learnability", "representativeness"]].to_numpy().tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("selector", [MiniRecSelector(), RandomSelector()])
@pytest.mark.parametrize("k", [0, -1, 61])
def test_budget_outside_the_pool(selector, k):
    with pytest.raises(InputError, match="give 1 to 60"):
        selector.select(random_pool(), k)


def test_missing_embeddings_are_named():
    with pytest.raises(InputError, match="return `embedding` from sample_signals"):
        MiniRecSelector().select(random_pool(embedding=None), 3)


def test_without_gradients_representativeness_decides_nothing():
    signals = random_pool()
    ledger = MiniRecSelector("official").select(signals, 12)
    without = MiniRecSelector("official").select(random_pool(gradient=None), 12)
    assert set(without.table["representativeness"]) == {0.5}
    assert without.selected() == expected_ranking(random_pool(gradient=torch.ones(60, 5)), 12)
    assert without.selected() != ledger.selected()


@pytest.mark.parametrize("mode", ["paper", "official"])
def test_redundant_samples_equal_a_loop(mode):
    signals = random_pool(seed=5)
    ledger = MiniRecSelector(mode).select(signals, 9)
    rows = ledger.rows(signals.sample_id.tolist())
    unit = torch.nn.functional.normalize(signals.embedding.double(), dim=1).numpy()
    position = {sample_id: row for row, sample_id in enumerate(signals.sample_id.tolist())}
    picks = ledger.selected()
    median = np.sort(rows.loc[picks, "novelty"])[4]
    threshold = rows.loc[picks[-1], "value"]
    seen = set()
    for sample_id, row in rows.iterrows():
        if row["reason"] in ("selected", "too_easy", "too_hard"):
            assert not isinstance(row["redundant_with"], int)
            continue
        distances = [1 - unit[position[sample_id]] @ unit[position[pick]] for pick in picks]
        assert (row["reason"] == "redundant") == (row["score"] * median >= threshold)
        seen.add(row["reason"])
        if row["reason"] == "redundant":
            assert row["redundant_with"] == picks[int(np.argmin(distances))]
            assert row["novelty"] == pytest.approx(min(distances), abs=1e-6)
            assert row["value"] <= threshold + 1e-6
            assert f"too like sample {row['redundant_with']}" in ledger.explain(sample_id)
    assert "redundant" in seen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "best"}, "mode is .best.: give one of paper, official"),
        ({"difficulty": "max"}, "difficulty is .max.: give one of"),
        ({"on_short": "fail"}, "on_short is .fail.: give one of"),
        ({"gradient": "second"}, "gradient is .second.: give one of"),
        ({"alpha": 0.0, "beta": 0.0}, "above 0 if alpha is 0"),
        ({"gradient_space": "head"}, "gradient_space is .head.: give one of answer, lora"),
        ({"gradient_space": "lora", "gradient": "hvp"}, "gradient_space='lora' has no Hessian-vector products"),
        (
            {"gradient_space": "lora", "mode": "official"},
            "which mode='official' takes by default: set gradient to first",
        ),
        ({"calibrate": "mean"}, "calibrate is .mean.: give one of"),
        ({"calibrate": "quantile", "sigma": 0.1}, "leave out sigma"),
        ({"alpha": -1.0}, "alpha"),
        ({"alpha": math.nan}, "alpha"),
        ({"gate": (0.9, 0.1)}, "low below high"),
        ({"sigma": 0.0}, "sigma is 0.0: give a number above 0"),
        ({"num_generations": 0}, "num_generations"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        MiniRecSelector(**options)


def test_gradient_kind_follows_the_mode():
    assert MiniRecSelector().gradient == "first"
    assert MiniRecSelector("official").gradient == "hvp"
    assert MiniRecSelector("official", gradient="first").gradient == "first"


def test_quantile_calibration_moves_the_peak_to_the_pool():
    reward = np.concatenate([np.zeros(30), np.linspace(0.1, 0.2, 30)])
    ledger = MiniRecSelector(calibrate="quantile").select(random_pool(reward_mean=reward), 5)
    best = ledger.table.sort_values("learnability").iloc[-1]
    assert best["reward_mean"] == pytest.approx(0.15, abs=0.002)
    fixed = MiniRecSelector().select(random_pool(reward_mean=reward), 5).table.sort_values("learnability").iloc[-1]
    assert fixed["reward_mean"] == pytest.approx(0.2)


def test_random_draw_depends_on_seed_and_if_asked_on_epoch():
    signals = random_pool()

    def draw(epoch=0, **options):
        return RandomSelector(**options).select(signals, 20, epoch=epoch).selected()

    assert draw(seed=1) == draw(seed=1) == draw(seed=1, epoch=5)
    assert draw(seed=1) != draw(seed=2)
    assert draw(seed=1, redraw=True, epoch=0) != draw(seed=1, redraw=True, epoch=1)
    assert len(set(draw())) == 20


def test_random_draw_is_uniform():
    signals = random_pool(n=10)
    counts = np.zeros(10)
    for epoch in range(300):
        picks = RandomSelector(redraw=True).select(signals, 3, epoch=epoch).selected()
        counts[np.array(picks) - 100] += 1
    assert abs(counts - 90).max() < 5 * math.sqrt(300 * 0.3 * 0.7)


def test_random_draw_needs_no_signals_and_shows_known_rewards():
    store = SignalStore(range(5))
    store.update(SampleSignals([2], rewards=torch.tensor([[0.0, 1.0]])), epoch=0, step=0, source="train")
    ledger = RandomSelector().select(store.pool_view(0), 2)
    assert ledger.rows([2])["reward_mean"].item() == 0.5
    assert ledger.table["reward_mean"].notna().sum() == 1
    assert set(ledger.table["reason"]) == {"selected", "below_budget"}


def test_selectors_share_one_interface():
    selectors: list[Selector] = [MiniRecSelector(), RandomSelector()]
    assert [selector.needs for selector in selectors] == [{"rewards", "gradient", "embedding"}, frozenset()]


def test_selection_follows_new_rewards_in_the_store():
    random = torch.Generator().manual_seed(0)
    store = SignalStore(range(40))
    vectors = {"gradient": torch.randn(40, 3, generator=random), "embedding": torch.randn(40, 3, generator=random)}
    rewards = torch.rand(40, 4, generator=random)
    store.update(SampleSignals(range(40), rewards=rewards, **vectors), epoch=0, step=0, source="score")
    before = MiniRecSelector().select(store.pool_view(0), 10).selected()
    solved = torch.ones(len(before), 4)
    store.update(SampleSignals(before, rewards=solved), epoch=0, step=9, source="train")
    after = MiniRecSelector().select(store.pool_view(1), 10)
    assert not set(before) & set(after.selected())
    assert set(after.rows(before)["reason"]) == {"too_easy"}


def test_published_rewards_through_the_selector(published):
    """R is not reproducible without their gradients: any gradient whose R is the published one will do."""
    target = 2 * published["representativeness"] - 1
    gradient = np.stack([target, np.sqrt(1 - target**2)], axis=1)
    mean_axis = np.zeros(len(target), dtype=bool)
    mean_axis[target.argmax()] = True
    rewards = published["rewards"]
    signals = Signals(
        sample_id=published["sample_id"],
        reward_mean=rewards.mean(axis=1),
        reward_std=rewards.std(axis=1),
        n_rollouts=np.full(len(rewards), 4),
        gradient=gradient,
        gradient_fresh=mean_axis,
        embedding=np.random.default_rng(0).normal(size=(len(rewards), 8)),
    )
    ledger = MiniRecSelector("official").select(signals, 16)
    np.testing.assert_allclose(ledger.table["learnability"], published["learnability"], atol=1e-9)
    np.testing.assert_allclose(ledger.table["representativeness"], published["representativeness"], atol=1e-9)
    assert ledger.selected(1) == [1925]


def test_gate_includes_its_ends():
    reward = np.full(60, 0.5)
    reward[:4] = [0.25, 0.75, 0.2499, 0.7501]
    signals = random_pool(reward_mean=reward)
    ledger = MiniRecSelector(gate=(0.25, 0.75)).select(signals, 58)
    reasons = ledger.rows(signals.sample_id[:4].tolist())["reason"].tolist()
    assert reasons == ["selected", "selected", "too_hard", "too_easy"]
