"""Oracle: for each sample and signal the newest measurement, found in plain Python."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minirec_pl.selection import SampleSignals, SignalStore, merge_stores
from minirec_pl.utils.errors import InputError

PRINTS = {"model": "a", "data": "b", "seed": "1"}
measurements = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(0, 3), st.integers(0, 3), st.sampled_from("rge")),
    max_size=12,
)
outcomes = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 3), st.sampled_from("rp"), st.integers(0, 8)), max_size=9
)


def signals_of(kind, sample, value):
    if kind == "r":
        return SampleSignals([sample], rewards=[[value, 0.0]])
    return SampleSignals([sample], **{"gradient" if kind == "g" else "embedding": [[value, 1.0, 2.0]]})


@given(measurements)
@settings(deadline=None, max_examples=60)
def test_the_newest_measurement_counts(history):
    pools = ([0, 1, 2, 3], [2, 3, 4], [4, 5])
    stores = [SignalStore(pool, fingerprints=PRINTS) for pool in pools]
    known = {}
    for which, sample, epoch, step, kind in history:
        if sample not in pools[which]:
            continue
        value = (which + 1) / 8 + sample / 64 + epoch / 128 + step / 512
        stores[which].update(signals_of(kind, sample, value), epoch=epoch, step=step, source="score")
        known[which, sample, kind] = (epoch, step, value)
    merged = merge_stores(stores)
    assert merged.sample_ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert merged.fingerprints == PRINTS
    view = merged.read(range(6))
    for sample in range(6):
        for kind, field in (("r", "reward"), ("g", "gradient"), ("e", "embedding")):
            found = [known[which, sample, kind] for which in range(3) if (which, sample, kind) in known]
            epoch, step, value = max(found, key=lambda m: m[:2], default=(-1, -1, None))
            assert int(merged.clock(f"{field}_epoch")[sample]) == epoch
            assert int(merged.clock(f"{field}_step")[sample]) == step
            if kind == "r":
                mean = float(view.reward_mean[sample])
                assert np.isnan(mean) if value is None else mean == pytest.approx(value / 2)
            elif value is not None:
                assert getattr(view, field)[sample].tolist() == pytest.approx([value, 1.0, 2.0])


@given(outcomes)
@settings(deadline=None, max_examples=60)
def test_counts_of_what_training_met_are_of_the_store_that_met_a_sample_last(history):
    stores, last = [SignalStore(range(4)), SignalStore(range(4))], {}
    for step, (which, sample, kind, hits) in enumerate(history):
        if kind == "r":
            met = SampleSignals([sample], rewards=[[1.0] * hits + [0.0] * (8 - hits)])
        else:
            met = SampleSignals([sample], solve_probability=[hits / 8])
        stores[which].update(met, epoch=0, step=step, source="train")
        last[sample] = which
    merged = merge_stores(stores)
    for sample in range(4):
        alpha, beta = stores[last.get(sample, 0)].posterior([sample])
        assert [float(part) for part in merged.posterior([sample])] == [float(alpha), float(beta)]


def test_shards_of_a_pool_make_the_pool(tmp_path):
    torch.manual_seed(0)
    whole = SignalStore(range(20), fingerprints=PRINTS)
    batch = SampleSignals(
        torch.arange(20), rewards=torch.rand(20, 4), gradient=torch.randn(20, 3), solve_probability=torch.rand(20)
    )
    whole.update(batch, epoch=1, step=5, source="score")
    shards = []
    for rank in range(3):
        ids = torch.arange(rank, 20, 3)
        shard = SignalStore(ids, fingerprints=PRINTS)
        part = SampleSignals(ids, batch.rewards[ids], batch.gradient[ids], None, batch.solve_probability[ids])
        shard.update(part, epoch=1, step=5, source="score")
        shards.append(SignalStore.load(shard.save(tmp_path / f"{rank}.safetensors")))
    assert merge_stores(shards).digest() == whole.digest()
    assert merge_stores([whole]).digest() == whole.digest()


def test_groups_of_unlike_size_keep_their_rewards():
    one, other = SignalStore([1, 2]), SignalStore([2, 3])
    one.update(SampleSignals([1, 2], rewards=[[1.0, 0.0], [1.0, 1.0]]), epoch=0, step=0, source="score")
    other.update(SampleSignals([2], rewards=[[0.0, 0.0, 1.0]]), epoch=1, step=0, source="score")
    group = merge_stores([one, other]).state_dict()["rewards"]
    torch.testing.assert_close(
        group, torch.tensor([[1.0, 0.0, torch.nan], [0.0, 0.0, 1.0], [torch.nan] * 3]), equal_nan=True
    )


def test_unlike_stores_are_refused():
    def store(gradient=None, **options):
        made = SignalStore([1, 2], **{"fingerprints": PRINTS, **options})
        if gradient is not None:
            made.update(SampleSignals([1], gradient=[gradient]), epoch=0, step=0, source="score")
        return made

    with pytest.raises(InputError, match=r"^b was measured with another model than a \(z, not a\)"):
        merge_stores([store(), store(fingerprints={**PRINTS, "model": "z"})], ["a", "b"])
    with pytest.raises(InputError, match="another seed than store 1"):
        merge_stores([store(), store(fingerprints={"model": "a", "data": "b"})])
    with pytest.raises(InputError, match=r"above 0\.9 as solved"):
        merge_stores([store(), store(solve_threshold=0.9)])
    with pytest.raises(InputError, match="gradient of 3 columns, store 1 one of 2"):
        merge_stores([store([1.0, 2.0]), store([1.0, 2.0, 3.0])])
    with pytest.raises(InputError, match="at least one"):
        merge_stores([])
