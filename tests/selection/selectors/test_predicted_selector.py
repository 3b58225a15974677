"""Oracle: the draw, then MiniRec's value, gate and greedy in plain loops."""

import math

import numpy as np
import pytest
import torch

from minirec_pl.selection import MiniRecSelector, PredictedDifficulty, PredictedSelector, SampleSignals, SignalStore
from minirec_pl.utils.errors import InputError

N = 40


def view_of(seed=0, met=N, vectors=True, **changes):
    random = np.random.default_rng(seed)
    store = SignalStore(range(100, 100 + N))
    rewards = torch.from_numpy(random.integers(0, 2, size=(met, 4)).astype(float))
    store.update(SampleSignals(list(range(100, 100 + met)), rewards=rewards), epoch=0, step=0, source="train")
    store.set_prior(torch.from_numpy(random.uniform(0.05, 0.6, size=N)), 8.0, epoch=1, step=1)
    view = store.pool_view(1)
    if vectors:
        view.vectors = torch.from_numpy(random.normal(size=(N, 3)))
    for name, value in changes.items():
        setattr(view, name, value)
    return view


def cosine(one, other):
    return float(one @ other) / math.sqrt(float(one @ one) * float(other @ other))


def expected_picks(view, k, vectors, epoch=1, low=0.02, high=0.5, group=8):
    """The greedy of MiniRec on drawn solve probabilities; L is the expected deviation within a group."""
    alpha, beta = view.prior_hits + view.hits, view.prior_misses + view.misses
    drawn = np.random.default_rng([42, epoch]).beta(alpha.numpy(), beta.numpy())

    def size(p):
        shares = [h / group for h in range(group + 1)]
        ways = [math.comb(group, h) * p**h * (1 - p) ** (group - h) for h in range(group + 1)]
        return sum(w * math.sqrt(f * (1 - f)) for w, f in zip(ways, shares, strict=True))

    worth = [size(p) for p in drawn]
    inside = [row for row in range(N) if low <= drawn[row] <= high]
    picks = []
    while len(picks) < k:

        def value(row):
            near = [1.0] if not picks or vectors is None else [1 - cosine(vectors[row], vectors[s]) for s in picks]
            return min(near) * worth[row]

        picks.append(max((row for row in inside if row not in picks), key=lambda row: (value(row), -row)))
    return [100 + row for row in picks]


def test_the_gate_leaves_out_what_is_likeliest_already():
    assert PredictedSelector().gate == (0.02, 0.5)
    assert PredictedSelector(difficulty="pass_at_group").gate == (0.02, 0.95)
    assert PredictedSelector(gate=(0, 1)).gate == (0.0, 1.0)
    for difficulty in ("mean", "pass_at_group"):
        view = view_of()
        ledger = PredictedSelector(difficulty=difficulty, on_short="shrink", novelty=False).select(view, 12, epoch=1)
        drawn = np.random.default_rng([42, 1]).beta(
            (view.prior_hits + view.hits).numpy(), (view.prior_misses + view.misses).numpy()
        )
        q = drawn if difficulty == "mean" else 1 - (1 - drawn) ** 8
        high = 0.5 if difficulty == "mean" else 0.95
        assert all(0.02 <= q[sample - 100] <= high for sample in ledger.selected())


def test_picks_equal_a_plain_greedy_on_item_factors():
    view = view_of()
    ledger = PredictedSelector().select(view, 12, epoch=1)
    assert ledger.selected() == expected_picks(view, 12, view.vectors)
    assert PredictedSelector().select(view, 5, epoch=1).selected() == ledger.selected()[:5]
    assert PredictedSelector().select(view, 12, epoch=2).selected() != ledger.selected()
    assert ledger.difficulty_name == "drawn solve probability"
    assert torch.equal(torch.from_numpy(ledger.columns["reward_mean"]), view.reward_mean)


def test_embeddings_of_all_samples_come_first_and_without_vectors_the_value_is_that_of_the_draw():
    embedding = torch.from_numpy(np.random.default_rng(9).normal(size=(N, 6)))
    view = view_of(embedding=embedding)
    assert PredictedSelector().select(view, 12, epoch=1).selected() == expected_picks(view, 12, embedding)
    some = view_of(embedding=embedding, embedding_known=torch.arange(N) > 0)
    assert PredictedSelector().select(some, 12, epoch=1).selected() == expected_picks(some, 12, some.vectors)
    bare = view_of(vectors=False)
    assert PredictedSelector().select(bare, 12, epoch=1).selected() == expected_picks(bare, 12, None)
    assert PredictedSelector(novelty=False).select(view, 12, epoch=1).selected() == expected_picks(bare, 12, None)


def test_samples_that_were_never_met_are_picked_and_the_gate_is_filled_up():
    view = view_of(met=3)
    ledger = PredictedSelector().select(view, 20, epoch=1)
    assert len([i for i in ledger.selected() if i > 102]) > 10
    tight = PredictedSelector(gate=(0.45, 0.55)).select(view, 20, epoch=1)
    assert set(tight.columns["reason"]) >= {"selected", "filled"}
    with pytest.warns(UserWarning, match="picked .* samples instead of 20"):
        PredictedSelector(gate=(0.45, 0.55), on_short="shrink").select(view, 20, epoch=1)


def test_before_the_first_outcome_the_picks_are_random():
    store = SignalStore(range(N))
    store.set_prior(torch.full((N,), 0.5), 16.0, epoch=0, step=0)
    view = store.pool_view(0)
    view.vectors = torch.eye(N)[:, :5]
    picks = [PredictedSelector(seed=seed).select(view, 5).selected() for seed in range(200)]
    counts = np.bincount(np.concatenate(picks), minlength=N)
    assert counts.min() > 8
    assert counts.max() < 50


def test_without_outcomes_or_predictions_it_is_refused():
    with pytest.raises(InputError, match="goes by the rollouts met in training, and these signals hold none"):
        PredictedSelector().select(SignalStore(range(5)).pool_view(0), 2)
    with pytest.raises(InputError, match="learnability is 'update_length': give update or gaussian"):
        PredictedSelector(learnability="update_length")
    with pytest.raises(InputError, match="gate is"):
        PredictedSelector(gate=(0.9, 0.1))


def test_minirec_takes_its_difficulty_from_the_prediction():
    embedding = torch.from_numpy(np.random.default_rng(9).normal(size=(N, 6)))
    view = view_of(embedding=embedding)
    mean = (view.prior_hits + view.hits) / (view.prior_hits + view.hits + view.prior_misses + view.misses)
    selector = MiniRecSelector(signals="predicted", predictor=PredictedDifficulty(strength=4))
    assert selector.needs == {"gradient", "embedding"}
    assert selector.predictor.strength == 4
    ledger = selector.select(view, 10)
    assert ledger.difficulty_name == "predicted solve probability"
    assert torch.equal(torch.from_numpy(ledger.columns["difficulty"]), mean)
    known = view_of(embedding=embedding, reward_mean=mean)
    assert ledger.selected() == MiniRecSelector().select(known, 10).selected()
    with pytest.raises(InputError, match="needs an embedding per sample"):
        selector.select(view_of(), 10)
    with pytest.raises(InputError, match="predictor goes with signals='predicted'"):
        MiniRecSelector(predictor=PredictedDifficulty())
    with pytest.raises(InputError, match="signals is 'guessed': give one of scored, predicted"):
        MiniRecSelector(signals="guessed")


@pytest.mark.parametrize("gate", [(), (0.1,), (0.1, 0.5, 0.9), (0.9, 0.1), (0.5, float("nan"))])
def test_a_gate_of_other_than_two_ascending_numbers_is_refused(gate):
    with pytest.raises(InputError, match=r"gate is \[.*\]: give \[low, high\] with low below high"):
        PredictedSelector(gate=gate)
