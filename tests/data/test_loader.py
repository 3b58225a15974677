"""The resumable loader by itself and inside a Trainer: what reaches `training_step` is written down and compared."""

import pytest
import torch
from helpers.slow import slow
from helpers.toy_data import random_rows, write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import RandomSampler

from minirec_pl.data.batches import identity
from minirec_pl.data.datamodule import RecDataModule
from minirec_pl.data.loader import ResumableLoader
from minirec_pl.data.sampler import CurriculumSampler
from minirec_pl.utils.errors import InputError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:You requested to overfit"),
]
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


class Numbers(torch.utils.data.Dataset):
    """Gives sample_ids back; counts in the main process what was loaded."""

    def __init__(self):
        self.loaded = []

    def __len__(self):
        return 100

    def __getitems__(self, ids):
        self.loaded += ids
        return torch.tensor(ids)


def loader_of(ids, workers=0, batch_size=3, **options):
    sampler = CurriculumSampler(range(100))
    sampler.set_plan(ids)
    return ResumableLoader(
        Numbers(), batch_size=batch_size, sampler=sampler, collate_fn=identity, num_workers=workers, **options
    )


def lists(loader):
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_after_the_batches_the_consumer_got(workers):
    loader = loader_of(list(range(10)), workers)
    running = iter(loader)
    assert [next(running).tolist() for _ in range(2)] == [[0, 1, 2], [3, 4, 5]]
    state = loader.state_dict()
    assert state["batches"] == 2
    other = loader_of(list(range(10)), workers)
    other.load_state_dict(state)
    assert len(other) == 4
    resumed = iter(other)
    assert next(resumed).tolist() == [6, 7, 8]
    assert other.state_dict()["batches"] == 3
    assert [batch.tolist() for batch in resumed] == [[9]]
    assert lists(other) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]


class Samples(Numbers):
    def __getitems__(self, ids):
        return {"history": super().__getitems__(ids)[:, None]}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("steps", "iterations"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("skip", [0, 4])
def test_a_sample_repeated_for_the_other_ranks_is_marked(workers, steps, iterations, skip):
    """Of 15 samples on 2 ranks, 8 each, the second rank's last is the first rank's first."""
    for rank in range(2):
        sampler = CurriculumSampler(range(100), num_replicas=2, rank=rank)
        sampler.set_plan(list(range(15)))
        loader = ResumableLoader(Samples(), batch_size=3, sampler=sampler, collate_fn=identity, num_workers=workers)
        loader.steps, loader.iterations = steps, iterations
        loader._skip = skip // 4 * steps * iterations
        marked = [(b["history"].flatten().tolist(), b["repeated"].tolist()) for b in loader if "repeated" in b]
        assert marked == ([] if rank == 0 else [([13, 0], [False, True])] * iterations)


def test_skipped_batches_are_not_loaded():
    loader = loader_of(list(range(10)))
    loader.load_state_dict({"batches": 2, "epoch": 0, "batch_size": 3})
    lists(loader)
    assert loader.dataset.loaded == [6, 7, 8, 9]


def test_a_finished_epoch_means_the_start_of_the_next_even_when_its_plan_is_longer():
    loader = loader_of(list(range(6)))
    lists(loader)
    loader.sampler.set_plan(list(range(30)))
    state = loader.state_dict()
    assert (state["batches"], state["epoch"]) == (0, 1)
    other = loader_of(list(range(30)))
    other.load_state_dict(state)
    assert other.sampler.epoch == 1
    assert len(lists(other)) == 10


def test_skips_with_persistent_workers_and_without_batches_made_by_the_loader():
    loader = loader_of(list(range(6)), workers=1, persistent_workers=True)
    loader.load_state_dict({"batches": 1, "epoch": 0, "batch_size": 3})
    assert [lists(loader), lists(loader)] == [[[3, 4, 5]], [[0, 1, 2], [3, 4, 5]]]
    sampler = CurriculumSampler(range(100))
    sampler.set_plan([5, 6, 7])
    single = ResumableLoader(range(100), batch_size=None, sampler=sampler)
    single.load_state_dict({"batches": 1, "epoch": 0, "batch_size": 1})
    assert list(single) == [6, 7]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_new_plan_holds_from_the_next_epoch(workers):
    loader = loader_of([1, 2, 3, 4], workers)
    assert lists(loader) == [[1, 2, 3], [4]]
    loader.sampler.set_plan([9, 8])
    assert (lists(loader), len(loader)) == ([[9, 8]], 1)


def test_another_batch_size_inside_an_epoch():
    with pytest.raises(InputError, match=r"batch_size=3, .*batch_size=8: resume with that"):
        loader_of([1, 2]).load_state_dict({"batches": 1, "epoch": 0, "batch_size": 8})
    loader_of([1, 2]).load_state_dict({"batches": 0, "epoch": 1, "batch_size": 8})


class Rows(Numbers):
    """Gives batches as dictionaries."""

    def __getitems__(self, ids):
        return {"sample_id": super().__getitems__(ids)}


def rounds_of(n, steps, iterations, workers=0, limit=None):
    sampler = CurriculumSampler(range(100))
    sampler.set_plan(list(range(n)))
    loader = ResumableLoader(Rows(), batch_size=2, sampler=sampler, collate_fn=identity, num_workers=workers)
    loader.steps, loader.iterations, loader.batches_per_epoch = steps, iterations, limit
    return loader


def expected_rounds(n, steps, iterations, limit):
    """(ids, position, positions, ids read ahead) of every batch, by hand."""
    batches = [list(range(i, min(i + 2, n))) for i in range(0, n, 2)]
    out, left = [], limit or len(batches) * iterations
    for start in range(0, len(batches), steps):
        block = batches[start : start + steps][: max(left, 0)]
        positions = min(len(block) * iterations, left)
        out += [(block[i % len(block)], i, positions, block if i == 0 else None) for i in range(positions)]
        left -= positions
    return out


def met_rounds(batches):
    return [
        (
            batch["sample_id"].tolist(),
            batch["generation"]["position"],
            batch["generation"]["positions"],
            [part["sample_id"].tolist() for part in batch["generation"]["batches"]]
            if "batches" in batch["generation"]
            else None,
        )
        for batch in batches
    ]


def test_batches_used_together_come_round_as_often_as_asked():
    loader = rounds_of(9, steps=2, iterations=2)
    met = met_rounds(loader)
    assert [ids for ids, *_ in met] == [[0, 1], [2, 3], [0, 1], [2, 3], [4, 5], [6, 7], [4, 5], [6, 7], [8], [8]]
    assert [ahead for *_, ahead in met if ahead] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8]]]
    assert len(loader) == 10
    assert met == expected_rounds(9, 2, 2, None)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 15), st.integers(1, 4), st.integers(1, 3), st.integers(0, 30), st.integers(0, 30))
def test_any_schedule_stops_and_goes_on_anywhere(n, steps, iterations, limit, stop):
    steps += int(steps * iterations == 1)
    limit = limit if 0 < limit < -(-n // 2) * iterations else None
    expected = expected_rounds(n, steps, iterations, limit)
    assert met_rounds(rounds_of(n, steps, iterations, limit=limit)) == expected
    loader, stop = rounds_of(n, steps, iterations, limit=limit), min(stop, len(expected))
    running = iter(loader)
    first = [next(running) for _ in range(stop)]
    other = rounds_of(n, steps, iterations, limit=limit)
    other.load_state_dict(loader.state_dict())
    second = list(other)
    if stop == len(expected):
        assert met_rounds(second) == expected
        return
    assert met_rounds(first + second) == expected
    start = stop - expected[stop][1]
    assert min(other.dataset.loaded) == expected[start][0][0]  # of what was used up nothing is loaded again


@pytest.mark.parametrize("workers", [0, 2])
def test_rounds_with_workers(workers):
    loader = rounds_of(13, 3, 2, workers)
    assert met_rounds(loader) == expected_rounds(13, 3, 2, None)
    assert met_rounds(loader) == expected_rounds(13, 3, 2, None)
    running = iter(loader)
    for _ in range(4):
        next(running)
    other = rounds_of(13, 3, 2, workers)
    other.load_state_dict(loader.state_dict())
    assert met_rounds(other) == expected_rounds(13, 3, 2, None)[4:]


def test_another_schedule_inside_an_epoch():
    running = iter(loader := rounds_of(9, 2, 2))
    next(running)
    for steps, iterations, said in ((3, 2, "steps_per_generation=3, .*=2:"), (2, 1, "num_iterations=1, .*=2:")):
        with pytest.raises(InputError, match=said):
            rounds_of(9, steps, iterations).load_state_dict(loader.state_dict())
    with pytest.raises(InputError, match=r"steps_per_generation=2, .*=1: resume with that"):
        rounds_of(9, 2, 1).load_state_dict({"batches": 2, "epoch": 0, "batch_size": 2})


class Recorder(LightningModule):
    """Writes down the sample_ids of each training batch; `seen` survives only as long as the object."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen, self.stages = [], {"validation": [], "test": []}

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, batch["sample_id"].tolist()))
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch, batch_idx):
        self.stages["validation"] += batch["sample_id"].tolist()

    def test_step(self, batch, batch_idx):
        self.stages["test"] += batch["sample_id"].tolist()

    def predict_step(self, batch, batch_idx):
        return batch["sample_id"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class StopAt(Callback):
    """Ends a run as a crash would, before the step after the checkpoint."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            raise RuntimeError("crash")


@pytest.fixture
def toy_path(tmp_path):
    write_dataset(tmp_path, random_rows(n=700, n_items=2000))
    return tmp_path


def data_of(path, **options):
    return RecDataModule(
        str(path), "toy", warm_fraction=0.5, batch_size=32, warm_batch_size=4, history_window=9, **options
    )


@pytest.mark.parametrize("train_on", ["pool", "warm"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("step", "limit"), [(3, 1.0), slow("end", 1.0), slow(5, 4), (4, 4)])
def test_a_crashed_run_goes_on_with_the_batches_it_had_not_seen(toy_path, tmp_path, train_on, workers, step, limit):
    def run(checkpoint=None, callbacks=()):
        module = Recorder()
        trainer = Trainer(
            **QUIET,
            max_epochs=3,
            limit_train_batches=limit,
            limit_val_batches=0,
            callbacks=list(callbacks),
            default_root_dir=tmp_path,
            enable_checkpointing=bool(callbacks),
        )
        error = None
        try:
            trainer.fit(
                module, datamodule=data_of(toy_path, train_on=train_on, num_workers=workers), ckpt_path=checkpoint
            )
        except RuntimeError as raised:
            error = raised
        return module.seen, error, trainer

    whole, error, trainer = run()
    assert error is None
    per_epoch = trainer.num_training_batches
    assert per_epoch >= 4
    assert len(whole) == 3 * per_epoch
    assert whole[0][2] != whole[per_epoch][2]
    stop = per_epoch if step == "end" else step
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=stop, save_top_k=-1, filename="{step}")
    first, error, _ = run(callbacks=[saver, StopAt(stop)])
    assert str(error) == "crash"
    second, error, _ = run(checkpoint=tmp_path / "saved" / f"step={stop}.ckpt")
    assert error is None
    assert first + second == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_a_checkpoint_of_an_epochs_end_goes_on_with_the_next_epoch(toy_path, tmp_path, workers):
    def run(max_epochs, folder, checkpoint=None):
        saver = ModelCheckpoint(tmp_path / folder, save_last=True, save_on_train_epoch_end=True)
        trainer = Trainer(
            **QUIET, max_epochs=max_epochs, callbacks=[saver], default_root_dir=tmp_path, limit_train_batches=4
        )
        module = Recorder()
        trainer.fit(module, datamodule=data_of(toy_path, num_workers=workers), ckpt_path=checkpoint)
        return module.seen

    whole = run(4, "whole")
    assert run(2, "first") + run(4, "second", tmp_path / "first" / "last.ckpt") == whole


class Plans(Callback):
    def __init__(self, plans):
        self.plans = plans

    def on_fit_start(self, trainer, module):
        trainer.datamodule.train_sampler.set_plan(self.plans[0])

    def on_train_epoch_end(self, trainer, module):
        trainer.datamodule.train_sampler.set_plan(self.plans[min(trainer.current_epoch + 1, len(self.plans) - 1)])


@pytest.mark.parametrize("workers", [0, 2])
def test_plans_of_different_lengths_reach_training_step_in_their_order(toy_path, workers):
    data, module = data_of(toy_path, num_workers=workers), Recorder()
    data.setup()
    pool = data.pool_ids.tolist()
    plans = [pool[:70], pool[::-1], pool[5:20]]
    trainer = Trainer(
        **QUIET, max_epochs=3, callbacks=[Plans(plans)], enable_checkpointing=False, reload_dataloaders_every_n_epochs=1
    )
    trainer.fit(module, datamodule=data)
    trained = [[i for epoch, _, ids in module.seen if epoch == number for i in ids] for number in range(3)]
    assert trained == plans
    assert module.stages["validation"] == data.val_ids.tolist() * 3
    trainer.test(module, datamodule=data, verbose=False)
    assert module.stages["test"] == data.test_ids.tolist()
    assert torch.cat(trainer.predict(module, datamodule=data)).tolist() == data.test_ids.tolist()


def test_lightning_leaves_our_samplers_alone_on_several_ranks(toy_path):
    data = data_of(toy_path)
    data.setup()
    trainer = Trainer(**QUIET, strategy="ddp", devices=2, enable_checkpointing=False)
    prepare = trainer._data_connector._prepare_dataloader
    foreign = ResumableLoader(Numbers(), sampler=RandomSampler(Numbers()))
    assert prepare(foreign, shuffle=True, mode=None).sampler is not foreign.sampler
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert prepare(loader, shuffle=True, mode=None) is loader


class Ranks(Recorder):
    """Writes what each rank met to a file of its own."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_fit_end(self):
        torch.save((self.seen, self.stages), self.folder / f"rank-{self.global_rank}.pt")


def test_two_ranks_train_on_the_pool_once_and_validate_without_repeats(toy_path, tmp_path):
    data = data_of(toy_path)
    data.setup()
    trainer = Trainer(**QUIET, max_epochs=2, strategy="ddp_fork", devices=2, enable_checkpointing=False)
    trainer.fit(Ranks(tmp_path), datamodule=data)
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    pool = set(data.pool_ids.tolist())
    for epoch in range(2):
        parts = [[i for when, _, ids in seen if when == epoch for i in ids] for seen, _ in ranks]
        assert len(parts[0]) == len(parts[1]) == -(-len(pool) // 2)
        assert set(parts[0]) | set(parts[1]) == pool
    validated = sorted(ranks[0][1]["validation"] + ranks[1][1]["validation"])
    assert validated == sorted(data.val_ids.tolist() * 2)


def test_overfit_batches_is_refused_with_the_way_out(toy_path):
    for train_on in ("pool", "warm"):
        trainer = Trainer(**QUIET, max_epochs=1, overfit_batches=2, enable_checkpointing=False)
        with pytest.raises(InputError, match="use limit_train_batches, not overfit_batches"):
            trainer.fit(Recorder(), datamodule=data_of(toy_path, train_on=train_on))
