"""Oracle of the reward rules: a dict of weighted rewards per sample, in plain Python."""

import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minirec_pl.selection import SampleSignals, SignalStore
from minirec_pl.utils.errors import InputError

POOL = [30, 10, 20, 40]


def scored(ids, *, epoch=0, step=0, source="score", store=None, **signals):
    store = SignalStore(POOL) if store is None else store
    store.update(SampleSignals(ids, **signals), epoch=epoch, step=step, source=source)
    return store


rewards = st.sampled_from([0.0, 0.25, 0.6, 1.0])
groups = st.sampled_from([1, 2, 4]).flatmap(lambda size: st.lists(rewards, min_size=size, max_size=size))
updates = st.tuples(
    st.sampled_from(POOL), groups, st.sampled_from(["score", "train"]), st.sampled_from([0.0, 0.3, 1.0])
)


@given(st.lists(updates, max_size=12))
@settings(deadline=None)
def test_reward_rules(history):
    store = SignalStore(POOL)
    known: dict[int, tuple[int, list[tuple[float, float]], list[float], int]] = {}
    for epoch, (sample, group, source, decay) in enumerate(history):
        store.update(
            SampleSignals([sample], rewards=torch.tensor([group])),
            epoch=epoch,
            step=10 * epoch,
            source=source,
            reward_decay=decay,
        )
        size, weighted, _, _ = known.get(sample, (len(group), [], [], 0))
        keep = decay if source == "train" and size != len(group) else 0.0
        weighted = [(w * keep, r) for w, r in weighted] + [((1 - keep) / len(group), r) for r in group]
        known[sample] = (len(group), weighted, group, epoch)

    view = store.read(POOL)
    for row, sample in enumerate(POOL):
        if sample not in known:
            assert view.reward_mean[row].isnan()
            assert view.n_rollouts[row] == 0
            continue
        size, weighted, group, epoch = known[sample]
        mean = math.fsum(w * r for w, r in weighted)
        std = math.sqrt(math.fsum(w * (r - mean) ** 2 for w, r in weighted))
        assert float(view.reward_mean[row]) == pytest.approx(mean, abs=1e-6)
        assert float(view.reward_std[row]) == pytest.approx(std, abs=1e-5)
        assert float(view.solve_share[row]) == pytest.approx(sum(w for w, r in weighted if r > 0.5), abs=1e-9)
        assert int(view.n_rollouts[row]) == size
        last = store.state_dict()["rewards"][store.sample_ids.tolist().index(sample)]
        assert last[: len(group)].tolist() == pytest.approx(group)
        assert last[len(group) :].isnan().all()
        place = store.sample_ids.tolist().index(sample)
        assert int(store.clock("reward_epoch")[place]) == epoch
        assert int(store.clock("reward_step")[place]) == 10 * epoch


def test_equal_rewards_have_no_spread_and_no_rounding():
    view = scored([10], rewards=torch.full((1, 16), 0.1, dtype=torch.float64)).read([10])
    assert float(view.reward_std) == 0.0
    assert float(view.reward_mean) == 0.1


def test_vectors_and_probabilities_are_replaced_and_rows_without_are_marked():
    store = scored(
        [20, 10], gradient=torch.tensor([[1.0, 2.0], [3.0, 4.0]]), solve_probability=torch.tensor([0.2, 0.4])
    )
    scored([10], store=store, epoch=3, source="train", gradient=torch.tensor([[5.0, 6.0]]), embedding=torch.ones(1, 3))
    view = store.read([10, 20, 30])
    assert view.gradient is not None
    assert view.gradient.tolist() == [[5, 6], [1, 2], [0, 0]]
    assert view.gradient_fresh is not None
    assert view.gradient_fresh.tolist() == [True, True, False]
    assert view.embedding_known is not None
    assert view.embedding_known.tolist() == [True, False, False]
    assert view.solve_probability is not None
    assert view.solve_probability.nan_to_num(-1).tolist() == pytest.approx([0.4, 0.2, -1])
    assert view.reward_mean.isnan().all()


def test_reading_without_vectors_leaves_out_gradients_and_embeddings():
    store = scored([10, 20], rewards=torch.tensor([[1.0], [0.0]]), gradient=torch.eye(2), embedding=torch.eye(2))
    view = store.read([20, 10], vectors=False)
    assert view.gradient is view.embedding is view.gradient_known is view.embedding_known is None
    assert view.reward_mean.tolist() == [0.0, 1.0]


def test_each_signal_has_its_own_age():
    store = scored([10], epoch=1, step=5, rewards=torch.ones(1, 2), embedding=torch.ones(1, 2))
    scored([10], store=store, epoch=4, step=9, source="train", rewards=torch.zeros(1, 2))
    ages = {
        name: int(store.clock(name)[0]) for name in ("reward_epoch", "reward_step", "embedding_epoch", "gradient_step")
    }
    assert ages == {"reward_epoch": 4, "reward_step": 9, "embedding_epoch": 1, "gradient_step": -1}


def test_alignment_is_replaced_and_has_an_age_of_its_own():
    store = scored([10, 20], epoch=1, step=5, gradient=torch.ones(2, 2))
    assert store.read([10]).alignment is None
    scored([10, 30], store=store, epoch=2, step=8, alignment=torch.tensor([0.5, -0.25]))
    scored([30], store=store, epoch=3, step=9, alignment=torch.tensor([0.125]))
    view = store.read([10, 20, 30])
    assert view.alignment is not None
    assert view.alignment.nan_to_num(9).tolist() == [0.5, 9, 0.125]
    assert store.clock("alignment_epoch").tolist() == [2, -1, 3, -1]
    assert store.clock("alignment_step").tolist() == [8, -1, 9, -1]
    assert store.clock("gradient_epoch").tolist() == [1, 1, -1, -1]


def test_of_a_sample_that_appears_twice_the_later_row_counts():
    view = scored([10, 20, 10], rewards=torch.tensor([[0.0], [0.5], [1.0]])).read([10, 20])
    assert view.reward_mean.tolist() == [1.0, 0.5]


def test_failed_update_changes_nothing():
    store = scored([10], rewards=torch.ones(1, 2), gradient=torch.ones(1, 3))
    before = store.digest()
    with pytest.raises(InputError, match="gradient had 3 columns, now 2"):
        scored([10], store=store, rewards=torch.zeros(1, 2), gradient=torch.ones(1, 2))
    with pytest.raises(InputError, match=r"sample_id 11, 99 is not in the pool of 4 samples"):
        scored([11, 10, 99], store=store, rewards=torch.zeros(3, 2))
    with pytest.raises(InputError, match="reward_decay"):
        store.update(SampleSignals([10]), epoch=0, step=0, source="train", reward_decay=1.5)
    assert store.digest() == before


def test_pool_view_is_ascending_and_fresh_within_max_age():
    store = SignalStore(POOL)
    for epoch, sample in enumerate([40, 30, 20]):
        scored([sample], store=store, epoch=epoch, gradient=torch.ones(1, 1))

    def fresh(epoch, max_age):
        view = store.pool_view(epoch, max_age)
        assert view.sample_id.tolist() == [10, 20, 30, 40]
        return [i for i, f in zip(view.sample_id.tolist(), view.gradient_fresh.tolist(), strict=True) if f]

    assert fresh(2, 1) == [20, 30]
    assert fresh(2, 0) == [20]
    assert fresh(2, 9) == [20, 30, 40]
    assert fresh(8, 1) == [20], "with none that fresh, the newest count"


def test_empty_store_has_a_view():
    view = SignalStore(POOL).pool_view(0)
    assert view.gradient is None
    assert view.gradient_fresh is None
    assert view.solve_probability is None


def test_stalest_first_never_measured_then_oldest():
    store = SignalStore(range(6))
    scored([0, 1, 2], store=store, epoch=2, rewards=torch.ones(3, 2), gradient=torch.ones(3, 1))
    scored([3, 4], store=store, epoch=1, rewards=torch.ones(2, 2), gradient=torch.ones(2, 1))
    order = store.stalest(9)
    assert order[0] == 5
    assert set(order[1:3]) == {3, 4}
    assert set(order[3:]) == {0, 1, 2}
    assert store.stalest(2) == order[:2]
    assert store.stalest(0) == []


def test_a_sample_is_as_old_as_the_older_of_its_rewards_and_gradient():
    store = scored([10, 20, 30, 40], rewards=torch.ones(4, 2), gradient=torch.ones(4, 1))
    scored([20, 30, 40], store=store, epoch=5, source="train", rewards=torch.ones(3, 2))
    scored([10], store=store, epoch=6, solve_probability=torch.tensor([0.5]), gradient=torch.ones(1, 1))
    assert store.stalest(4)[-1] == 10


def test_ties_of_staleness_fall_in_a_seeded_order():
    orders = {seed: SignalStore(range(50), seed=seed).stalest(50) for seed in (1, 1, 2)}
    assert SignalStore(range(50), seed=1).stalest(50) == orders[1] != orders[2]
    assert orders[1] != sorted(orders[1])


@pytest.mark.parametrize(("ids", "message"), [([], "empty"), ([3, 4, 3], "sample_id 3 occurs more than once")])
def test_bad_pool(ids, message):
    with pytest.raises(InputError, match=message):
        SignalStore(np.array(ids, dtype=np.int64))


@pytest.fixture
def full():
    store = SignalStore(POOL, seed=7, solve_threshold=0.3, fingerprints={"policy": "abc"})
    return scored(
        [10, 40],
        store=store,
        epoch=2,
        step=11,
        rewards=torch.tensor([[0.0, 1.0], [0.25, 0.5]]),
        gradient=torch.ones(2, 3),
        embedding=torch.ones(2, 2),
        solve_probability=torch.tensor([0.1, 0.9]),
        alignment=torch.tensor([0.5, -1.0]),
    )


def test_file_holds_everything(full, tmp_path):
    loaded = SignalStore.load(full.save(tmp_path / "new" / "signals.safetensors"))
    assert loaded.digest() == full.digest()
    assert loaded.stalest(4) == full.stalest(4)
    assert loaded.fingerprints == {"policy": "abc"}
    assert loaded.solve_threshold == 0.3
    assert os.listdir(tmp_path / "new") == ["signals.safetensors"]


def test_digest_tells_stores_apart(full):
    before = full.digest()
    scored([10], store=full, epoch=2, step=11, rewards=torch.tensor([[0.0, 0.9]]))
    assert full.digest() != before


def test_state_dict_passes_a_weights_only_checkpoint(full, tmp_path):
    torch.save(full.state_dict(), tmp_path / "state.pt")
    loaded = SignalStore(POOL)
    loaded.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert loaded.digest() == full.digest()


def test_state_dict_is_a_copy(full):
    state = full.state_dict()
    scored([10], store=full, rewards=torch.tensor([[1.0, 1.0]]))
    assert state["reward_mean"][0] == 0.5


def test_state_of_another_pool_is_refused(full):
    with pytest.raises(InputError, match="another pool"):
        SignalStore([1, 2]).load_state_dict(full.state_dict())


@pytest.mark.parametrize("change", ["missing", "short", "type", "matrix"])
def test_damaged_state_is_refused_and_changes_nothing(full, change):
    state = full.state_dict()
    if change == "missing":
        del state["reward_mean"]
    elif change == "short":
        state["reward_mean"] = state["reward_mean"][:2]
    elif change == "type":
        state["n_rollouts"] = state["n_rollouts"].double()
    else:
        state["gradient"] = state["gradient"][0]
    before = full.digest()
    with pytest.raises(InputError, match="damaged"):
        full.load_state_dict(state)
    assert full.digest() == before


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_truncated_file_is_refused(full, tmp_path, keep):
    path = full.save(tmp_path / "s.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"s\.safetensors is damaged or truncated"):
        SignalStore.load(path)


def test_other_safetensors_and_missing_files_are_refused(full, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(2)}, path)
    with pytest.raises(InputError, match=r"no(t a)? signal store"):
        SignalStore.load(path)
    save_file(
        {k: v for k, v in load_file(full.save(tmp_path / "s.safetensors")).items() if k != "sample_ids"},
        path,
        metadata={"format": "minirec-signals-1"},
    )
    with pytest.raises(InputError, match=r"no(t a)? signal store"):
        SignalStore.load(path)
    with pytest.raises(InputError, match="there are no signals at"):
        SignalStore.load(tmp_path / "none.safetensors")


def test_failed_save_keeps_the_old_file(full, tmp_path, monkeypatch):
    path = full.save(tmp_path / "s.safetensors")
    old = path.read_bytes()

    def no_space(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    scored([20], store=full, rewards=torch.ones(1, 2))
    with pytest.raises(InputError, match=r"cannot write .*s\.safetensors \(No space left on device\)"):
        full.save(path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["s.safetensors"]


def test_folder_that_cannot_be_made_is_named(full, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        full.save(tmp_path / "file" / "s.safetensors")


def test_fresh_rewards_do_not_hide_an_old_gradient():
    store = scored(POOL, rewards=torch.ones(4, 2), gradient=torch.ones(4, 1))
    scored([10, 20, 30], store=store, epoch=3, rewards=torch.ones(3, 2), gradient=torch.ones(3, 1))
    scored([40], store=store, epoch=9, source="train", rewards=torch.ones(1, 2))
    assert store.stalest(1) == [40]


def test_a_rollout_must_beat_the_threshold_to_count_as_solved():
    group = torch.tensor([[0.2, 0.5, 0.75, 1.0]])
    for threshold, share in ((0.5, 0.5), (0.1, 1.0), (0.75, 0.25)):
        store = SignalStore(POOL, solve_threshold=threshold)
        assert scored([10], store=store, rewards=group).read([10]).solve_share.tolist() == [share]
