"""Scores, selections, plans and the store do not depend on the order in which samples come, nor on their parts."""

import functools

import numpy as np
import pytest
import torch
from helpers.batch_cases import Case, Entry, close, drawn, laws, limits, rows
from hypothesis import strategies as st

from minirec_pl.selection import (
    DEALRecSelector,
    EL2NSelector,
    FullSelector,
    GraNdSelector,
    KCenterSelector,
    LearnAlignSelector,
    MiniRecSelector,
    RandomSelector,
    RewardVarianceSelector,
    SampleSignals,
    Signals,
    SignalStore,
    fold_curriculum,
    gaussian_curriculum,
    group_difficulty,
    hard_to_easy_curriculum,
    learnability,
    maxmin_select,
    merge_stores,
    representativeness,
    shuffled_curriculum,
    target_curriculum,
)

pytestmark = pytest.mark.filterwarnings("error", "ignore:picked")


def scores_of_rows(case):
    """Those without a scale over the pool; the mean gradient is that of rows which are there in any batch."""

    def run(batch):
        learn = learnability(batch["rewards"], mu=0.4, sigma=0.3, normalize=False)
        return {"learnability": learn, "difficulty": group_difficulty(batch["p"], 4)}

    return Entry(run, {"rewards": case.uniform(case.n, case.count(1, 4)), "p": case.uniform(case.n)})


def stored(case):
    """What a store says of samples, in the order asked for."""
    store = SignalStore(torch.arange(30))
    known = case.permutation(30)[: case.count(1, 30)]
    store.update(signals_of(case, known), epoch=2, step=9, source="score")

    def run(batch):
        wasted = store.wasted_groups(batch["ids"])
        if len(batch["ids"].unique()) < len(batch["ids"]):
            found = [store.read(batch["ids"][row, None]) for row in range(len(batch["ids"]))]
            values = {name: torch.cat([getattr(one, name) for one in found]) for name in ("reward_mean", "gradient")}
        else:
            found = store.read(batch["ids"])
            values = {name: getattr(found, name) for name in ("reward_mean", "gradient")}
        return {"wasted": wasted, **values}

    return Entry(run, {"ids": case.permutation(30)[: case.n]})


test_a_row_is_scored_alone, test_no_rows_at_all = laws({"learnability": scores_of_rows, "SignalStore.read": stored})


def signals_of(case, ids, group=3):
    n = len(ids)
    vectors = {"gradient": case.normal(n, 4).float(), "embedding": case.normal(n, 4).float()}
    return SampleSignals(ids, case.uniform(n, group), solve_probability=case.uniform(n), **vectors)


def take(signals, index):
    names = ("sample_id", "rewards", "gradient", "embedding", "solve_probability")
    return SampleSignals(**{name: rows(getattr(signals, name), index) for name in names})


def same_stores(one, other):
    """Exactly but for the rounding of means and deviations."""
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for name, value in first.items():
        close(second[name], value, name)


@drawn
def test_scores_over_a_pool_move_with_its_rows(data):
    """Duplicates get equal scores."""
    case = Case(data, data.draw(st.integers(0, 30)))
    rewards, gradients = case.integers(0, 4, case.n).double() / 3, case.normal(case.n, case.count(1, 5))
    fresh = case.flags(case.n)
    if case.n > 1:
        rewards[-1], gradients[-1], fresh[-1] = rewards[0], gradients[0], fresh[0]
    order, normalize = case.permutation(case.n), case.pick(False, True)
    for function in (
        lambda index: learnability(rewards[index], normalize=normalize),
        lambda index: representativeness(gradients[index], fresh=fresh[index], normalize=normalize),
    ):
        with limits(case):
            whole = function(torch.arange(case.n))
        with limits(case):
            close(function(order), whole[order])
        if case.n > 1:
            close(whole[-1], whole[0])


@drawn
def test_max_min_picks_are_the_same_rows_in_any_order(data):
    case = Case(data, data.draw(st.integers(1, 40)))
    embeddings, scores = case.normal(case.n, case.count(2, 6)), 0.1 + case.uniform(case.n)
    k = case.count(1, case.n)
    left = case.n - k
    initial = case.permutation(case.n)[: case.random.randint(0, left)]
    pool = case.pick(None, case.random.randint(k, case.n - len(initial)))
    order = case.permutation(case.n)
    with limits(case):
        whole = maxmin_select(embeddings, scores, k, initial=initial, pool=pool)
    place = torch.argsort(order)
    with limits(case):
        moved = maxmin_select(embeddings[order], scores[order], k, initial=place[initial], pool=pool)
    assert order[moved.indices].tolist() == whole.indices.tolist()
    close(moved.novelty, whole.novelty)


SELECTORS = {
    "MiniRec": lambda: MiniRecSelector(gate=(0.0, 1.0)),
    "MiniRec filled": lambda: MiniRecSelector(on_short="fill", calibrate="quantile"),
    "k-center": KCenterSelector,
    "random": lambda: RandomSelector(redraw=True),
    "full": FullSelector,
    "GraNd": GraNdSelector,
    "EL2N": EL2NSelector,
    "variance": RewardVarianceSelector,
    "LearnAlign": LearnAlignSelector,
    "DEALRec": lambda: DEALRecSelector(n_groups=4),
}


@pytest.mark.parametrize("name", SELECTORS)
@drawn
def test_a_selector_takes_signals_in_any_order(name, data):
    case = Case(data, data.draw(st.integers(1, 30)))
    n, known = case.n, case.flags(case.n, share=0.9)
    known[0] = True
    mean = case.uniform(n) * 0.8 + 0.1
    signals = Signals(
        sample_id=case.permutation(3 * n)[:n],
        reward_mean=mean,
        reward_std=case.uniform(n),
        n_rollouts=torch.full((n,), 4),
        solve_probability=mean,
        gradient=case.normal(n, 4),
        gradient_known=known,
        gradient_fresh=known & case.flags(n, share=0.8) | (torch.arange(n) == 0),
        embedding=case.normal(n, 4),
    )
    selector, k, epoch = SELECTORS[name](), case.count(1, n), case.count(0, 3)
    with limits(case):
        whole = selector.select(signals, k, epoch=epoch).table
    with limits(case):
        moved = selector.select(signals.take(case.permutation(n)), k, epoch=epoch).table
    for column in whole:
        if whole[column].dtype == np.float64:
            np.testing.assert_allclose(moved[column], whole[column], rtol=1e-9, atol=1e-9)
        else:
            assert moved[column].astype(str).tolist() == whole[column].astype(str).tolist()


CURRICULA = {
    "folds": lambda ids, rewards, case: fold_curriculum(ids, rewards, min(len(ids), case.count(1, 4))),
    "hard to easy": lambda ids, rewards, case: hard_to_easy_curriculum(ids, rewards),
    "shuffled": lambda ids, rewards, case: shuffled_curriculum(ids),
    "target": lambda ids, rewards, case: target_curriculum(ids, rewards, 0.4),
    "gaussian": lambda ids, rewards, case: gaussian_curriculum(ids, rewards, epoch=1, epochs=3, n_levels=1),
}


@pytest.mark.parametrize("name", CURRICULA)
@drawn
def test_a_plan_does_not_depend_on_the_order_of_the_selection(name, data):
    case = Case(data, data.draw(st.integers(1, 30)))
    ids, rewards = case.permutation(99)[: case.n], case.integers(0, 4, case.n).double() / 3  # with ties
    order, plan = case.permutation(case.n), functools.partial(CURRICULA[name], case=case)
    if name == "folds":
        folds = min(case.n, case.count(1, 4))
        plan = functools.partial(fold_curriculum, n_folds=folds)
    whole = plan(ids, rewards)
    assert plan(ids[order], rewards[order]) == whole
    assert sorted(whole) == sorted(ids.tolist())


@drawn
def test_a_store_takes_measurements_in_any_order_and_in_parts(data):
    """Of a sample that comes twice the later row counts."""
    case = Case(data, data.draw(st.integers(0, 9)))
    pool, source = torch.arange(20), case.pick("score", "train")
    one, other = SignalStore(pool[case.permutation(20)]), SignalStore(pool)
    earlier = signals_of(case, case.permutation(20)[: case.count(0, 9)], case.pick(3, 4))
    signals = signals_of(case, case.permutation(20)[: case.n])
    order = case.permutation(case.n).tolist()
    cut = case.random.randint(0, case.n)
    for store in (one, other):
        store.update(earlier, epoch=0, step=1, source="score")
    if case.n and source == "score":
        wrong = case.random.choice(order)
        stale = take(signals, [wrong])
        stale.rewards = stale.rewards + 1.0
        one.update(SampleSignals.cat([stale, signals]), epoch=1, step=2, source=source)
    else:
        one.update(signals, epoch=1, step=2, source=source)
    for part in (order[:cut], order[cut:]):
        other.update(take(signals, part), epoch=1, step=2, source=source)
    same_stores(one, other)
    assert one.stalest(9) == other.stalest(9)


@drawn
def test_parts_of_a_pool_merge_to_the_whole_in_any_order(data):
    case = Case(data, data.draw(st.integers(2, 20)))
    ids = case.permutation(40)[: case.n]
    signals, cut = signals_of(case, ids), data.draw(st.integers(1, case.n - 1))
    whole, parts = SignalStore(ids), []
    whole.update(signals, epoch=1, step=3, source="score")
    for index in (list(range(cut)), list(range(cut, case.n))):
        parts.append(SignalStore(rows(ids, index)))
        parts[-1].update(take(signals, index), epoch=1, step=3, source="score")
    for order in (parts, parts[::-1]):
        same_stores(merge_stores(order), whole)
