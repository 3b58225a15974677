import copy

import pytest
import torch
from torch.utils.data.distributed import DistributedSampler

from minirec_pl.data.sampler import CurriculumSampler, OrderedSampler
from minirec_pl.utils.errors import InputError

IDS = [3, 14, 15, 92, 65, 35, 89]


def test_shuffles_all_ids_by_seed_and_epoch():
    sampler = CurriculumSampler(IDS, seed=1)
    first = list(sampler)
    assert sorted(first) == sorted(IDS)
    assert list(sampler) == first == list(CurriculumSampler(IDS, seed=1))
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(CurriculumSampler(IDS, seed=2)) != first


def test_a_plan_is_followed_exactly_and_can_be_changed_or_dropped():
    sampler = CurriculumSampler(IDS)
    shuffled = list(sampler)
    sampler.set_plan([92, 3, 92])
    assert (list(sampler), len(sampler), sampler.plan) == ([92, 3, 92], 3, [92, 3, 92])
    running = iter(sampler)
    next(running)
    sampler.set_plan([65])
    assert list(running) == [3, 92]
    assert list(sampler) == [65]
    sampler.set_plan(None)
    assert (list(sampler), len(sampler), sampler.plan) == (shuffled, 7, None)


def test_the_caller_may_change_its_list_afterwards():
    plan = [3, 14]
    sampler = CurriculumSampler(IDS)
    sampler.set_plan(plan)
    plan[0] = 15
    sampler.plan.append(1)
    assert list(sampler) == [3, 14]


@pytest.mark.parametrize("replicas", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("plan", [None, [92, 3, 65, 14, 15], [92, 3, 92]])
def test_ranks_share_one_order(replicas, plan):
    n = len(plan or IDS)
    for ragged in ("repeat", "drop"):
        ranks = [CurriculumSampler(IDS, num_replicas=replicas, rank=rank, ragged=ragged) for rank in range(replicas)]
        for sampler in ranks:
            sampler.set_plan(plan)
            sampler.set_epoch(4)
        whole = plan or list(ranks[0].order())
        taken = [list(sampler) for sampler in ranks]
        assert {len(ids) for ids in taken} == {len(sampler) for sampler in ranks}
        assert len({len(ids) for ids in taken}) == 1
        interleaved = [ids[step] for step in range(len(taken[0])) for ids in taken]
        if ragged == "repeat":
            assert interleaved == (whole * 9)[: len(interleaved)]
            assert len(interleaved) - n == ranks[0].ragged_count < replicas
            assert [sampler.repeats_its_last for sampler in ranks] == [
                len(taken[0]) * replicas - replicas + rank >= n for rank in range(replicas)
            ]
        else:
            assert not any(sampler.repeats_its_last for sampler in ranks)
            assert interleaved == whole[: len(interleaved)]
            assert n - len(interleaved) == ranks[0].ragged_count < replicas


def test_two_ranks_of_evaluation_see_each_sample_once():
    ranks = [OrderedSampler(IDS, num_replicas=2, rank=rank) for rank in range(2)]
    assert [list(sampler) for sampler in ranks] == [[3, 15, 65, 89], [14, 92, 35]]
    assert [len(sampler) for sampler in ranks] == [4, 3]
    assert list(OrderedSampler(IDS)) == IDS


def test_plan_outside_the_pool_or_empty():
    sampler = CurriculumSampler(IDS)
    with pytest.raises(InputError, match=r"2 sample_ids outside the pool, the first is 7:"):
        sampler.set_plan([3, 7, 8])
    with pytest.raises(InputError, match="plan of the epoch is empty"):
        sampler.set_plan([])
    assert sampler.plan is None
    with pytest.raises(InputError, match="no sample to train on"):
        CurriculumSampler([])


@pytest.mark.parametrize("plan", [None, [92, 3]])
def test_state_comes_back_from_a_weights_only_file(tmp_path, plan):
    sampler = CurriculumSampler(IDS, seed=5)
    sampler.set_plan(plan)
    sampler.set_epoch(3)
    torch.save(sampler.state_dict(), tmp_path / "state.pt")
    other = CurriculumSampler(IDS)
    other.set_plan([14])
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (list(other), other.plan, other.epoch, other.seed) == (list(sampler), plan, 3, 5)
    with pytest.raises(InputError, match="outside the pool"):
        CurriculumSampler([1, 2]).load_state_dict({**sampler.state_dict(), "plan": torch.tensor([3])})


def test_is_a_distributed_sampler_that_needs_no_process_group_and_copies():
    sampler = CurriculumSampler(IDS)
    sampler.set_plan([15, 3])
    assert isinstance(sampler, DistributedSampler)
    assert not torch.distributed.is_initialized()
    assert (sampler.num_replicas, sampler.rank) == (1, 0)
    assert list(copy.deepcopy(sampler)) == [15, 3]


def test_rank_and_replicas_come_from_the_process_group(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        sampler = CurriculumSampler(IDS)
        assert (sampler.num_replicas, sampler.rank) == (1, 0)
    finally:
        torch.distributed.destroy_process_group()
