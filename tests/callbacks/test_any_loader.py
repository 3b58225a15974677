"""One callback in projects that know nothing of us: whatever the loader, batches stay what they were."""

import pytest
import torch
from helpers.foreign import Classifier, Data, N, Points, loader_of, x_and_y
from helpers.paths import REPOSITORY
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Subset, WeightedRandomSampler

from minirec_pl import InputError
from minirec_pl.callbacks import EasyToHardCurriculum, MiniRec, RescoreSamples, RewardHistory
from minirec_pl.data.foreign_loader import ForeignLoader, rebuild
from minirec_pl.probes import HeadProbe
from minirec_pl.selection import MiniRecSelector, RandomSelector, SampleSignals
from minirec_pl.selection.session.session import session_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:selection"),
    pytest.mark.filterwarnings("ignore:picked"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


def probe():
    return HeadProbe("classifier", forward=lambda m, b: m(x_and_y(b)[0]), target=lambda b: x_and_y(b)[1])


def minirec(budget=0.5, **options):
    selector = MiniRecSelector(gate=(-1.0, 2.0))
    return MiniRec(budget, **{"rescore_fraction": 1.0, "selector": selector, "probe": probe(), **options})


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["tuple", "tensor", "dict", "dataclass"])
def test_training_step_gets_the_selected_rows_of_any_dataset(make_trainer, kind, workers):
    module = Classifier()
    trainer = make_trainer(callbacks=[minirec(curriculum=EasyToHardCurriculum(n_folds=1))])
    trainer.fit(module, loader_of(kind, num_workers=workers, shuffle=True))
    session = session_of(trainer)
    assert module.rows(1) == session.plan
    assert sorted(module.rows(1)) == sorted(session.ledger.selected())
    assert [len(batch) for batch in module.seen[1]] == [8, 8, 8, 6]
    stored = session.store.read(module.rows(1))
    assert stored.embedding.shape == (30, 8)
    assert stored.reward_mean.tolist() == sorted(stored.reward_mean.tolist(), reverse=True)
    assert bool((session.store.clock("gradient_epoch") == 1).all())


@pytest.mark.parametrize("source", ["module", "datamodule", "fit"])
def test_loader_of_module_datamodule_or_fit_is_asked_for_once(make_trainer, source):
    def make():
        return loader_of(shuffle=True)

    module, data = Classifier(loader=make), Data(make)
    given = {"module": {}, "datamodule": {"datamodule": data}, "fit": {"train_dataloaders": make()}}[source]
    trainer = make_trainer(callbacks=[minirec(0.25)], max_epochs=3)
    trainer.fit(module, **given)
    assert [len(module.rows(epoch)) for epoch in range(3)] == [15] * 3
    assert (module.calls, data.calls) == {"module": (1, 0), "datamodule": (0, 1), "fit": (0, 0)}[source]


def test_every_public_argument_is_kept():
    def seed(worker):
        torch.manual_seed(worker)

    def collate(rows):
        return rows

    generator = torch.Generator()
    given = {
        "batch_size": 7,
        "num_workers": 2,
        "collate_fn": collate,
        "pin_memory": True,
        "drop_last": True,
        "timeout": 9,
        "worker_init_fn": seed,
        "multiprocessing_context": "fork",
        "generator": generator,
        "prefetch_factor": 5,
        "persistent_workers": True,
        "in_order": False,
    }
    user = DataLoader(Points(), shuffle=True, **given)
    ours = rebuild(user)
    given["multiprocessing_context"] = user.multiprocessing_context
    assert {name: getattr(ours, name) for name in given} == given
    assert ours.dataset is user.dataset
    assert len(ours) == len(user)
    import inspect

    covered = {*given, "dataset", "shuffle", "sampler", "batch_sampler", "pin_memory_device"}
    assert set(inspect.signature(DataLoader.__init__).parameters) - {"self"} == covered


@pytest.mark.parametrize(
    ("callbacks", "workers", "drop_last"),
    [
        ("minirec", 0, False),
        ("minirec", 0, True),
        ("minirec", 2, False),
        ("rescore", 0, False),
        ("rescore", 2, True),
        ("all picked", 0, False),
    ],
)
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("own_generator", [False, True])
def test_without_a_plan_batches_are_those_of_the_users_loader(
    make_trainer, callbacks, workers, drop_last, shuffle, own_generator
):
    """Also with augmentations that draw random numbers in workers or in the main process, and dropout."""

    def run(made):
        generator = torch.Generator().manual_seed(3) if own_generator else None
        module = Classifier(dropout=0.4)
        loader = loader_of(noise=True, num_workers=workers, shuffle=shuffle, generator=generator, drop_last=drop_last)
        make_trainer(callbacks=made, accumulate_grad_batches=3, max_epochs=2).fit(module, loader)
        return module.batches, torch.stack(module.path)

    made = {
        "rescore": lambda: RescoreSamples(0.5, probe()),
        "minirec": lambda: minirec(1.0, curriculum="shuffled"),
        "all picked": lambda: minirec(N, curriculum="shuffled"),
    }
    batches, path = run([made[callbacks]()])
    plain_batches, plain_path = run([])
    assert batches == plain_batches
    assert torch.equal(path, plain_path)


def test_sample_ids_of_the_dataset_are_used_where_it_has_them(make_trainer):
    class Keyed(Points):
        sample_ids = tuple(1000 - 7 * row for row in range(N))

    module = Classifier()
    trainer = make_trainer(callbacks=[minirec()], max_epochs=1)
    trainer.fit(module, DataLoader(Keyed(), batch_size=8))
    assert session_of(trainer).plan == [1000 - 7 * row for row in module.rows(0)]
    Keyed.sample_ids = (1,) * N
    with pytest.raises(InputError, match=r"Keyed\.sample_ids must hold 60 different integers"):
        make_trainer(callbacks=[minirec()]).fit(Classifier(), DataLoader(Keyed(), batch_size=8))


@pytest.mark.parametrize("workers", [0, 2])
def test_rewards_met_in_training_go_to_the_samples_of_the_batch(make_trainer, workers):
    class Rewarding(Classifier):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            rewards = (batch[0][:, :1] * 1000).expand(-1, 2)
            return {"loss": loss, "signals": SampleSignals(torch.arange(len(rewards)), rewards=rewards)}

    trainer = make_trainer(callbacks=[RewardHistory()], max_epochs=1)
    trainer.fit(Rewarding(), loader_of(num_workers=workers, shuffle=True))
    stored = session_of(trainer).store.read(range(N)).reward_mean
    torch.testing.assert_close(stored, torch.arange(N).double(), rtol=1e-5, atol=1e-4)


class Own(Classifier):
    def sample_signals(self, batch):
        x = batch[0]
        return SampleSignals(torch.zeros(len(x)).long(), rewards=x[:, :1] * 10, gradient=x, embedding=x)


def test_a_module_with_sample_signals_needs_no_ids_in_its_batches(make_trainer):
    trainer = make_trainer(callbacks=[minirec(probe=None)], max_epochs=1)
    trainer.fit(Own(), loader_of())
    rewards = session_of(trainer).store.read(range(N)).reward_mean
    torch.testing.assert_close(rewards, torch.arange(N).double() / 100)


class Open(Own):
    def sample_signals(self, batch, **options):
        self.options = options
        return super().sample_signals(batch)


class Mapped(Own):
    def sample_signals(self, batch):
        return {"rewards": batch[0]}


def test_signals_that_sample_signals_does_not_give_are_refused(make_trainer):
    def fit(module, selector=None):
        make_trainer(callbacks=[MiniRec(0.5, selector=selector)], max_epochs=1).fit(module, loader_of())
        return module

    official = MiniRecSelector(mode="official")
    with pytest.raises(InputError, match=r"asks Own.sample_signals for gradient='hvp', .* set gradient='first'"):
        fit(Own(), official)
    assert fit(Open(), official).options == {"gradient": "hvp"}
    with pytest.raises(InputError, match=r"Mapped.sample_signals returned a dict: return SampleSignals\("):
        fit(Mapped())


def test_reload_asks_the_users_source_again_and_keeps_the_samples(make_trainer):
    sizes = iter([N, N, N, N, 70])
    module = Classifier(loader=lambda: loader_of(n=next(sizes), shuffle=True))
    trainer = make_trainer(callbacks=[minirec(20)], max_epochs=6, reload_dataloaders_every_n_epochs=2)
    trainer.fit(module)
    assert module.calls == 3
    assert [len(module.rows(epoch)) for epoch in range(6)] == [20] * 6
    trainer.fit_loop.max_epochs = 9
    with pytest.raises(InputError, match=r"the reloaded training dataset has other samples \(70, before 60\)"):
        trainer.fit(module)


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(Points().x, Points().y, strict=True)


class Odd(DataLoader):
    def __iter__(self):
        yield from [[1], [2]]


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        (DataLoader(Stream(), batch_size=8), "cannot pick samples of Stream.*give a map-style dataset"),
        (
            DataLoader(Points(), batch_sampler=BatchSampler(RandomSampler(Points()), 8, False)),
            r"a batch_sampler of its own: give it batch_size=",
        ),
        (DataLoader(Points(), batch_size=None), "has batch_size=None: give it batch_size="),
        ({"a": loader_of(), "b": loader_of()}, "several training loaders: join the datasets"),
        ([loader_of(), loader_of()], "several training loaders"),
        (CombinedLoader([loader_of()]), "got a CombinedLoader: join"),
        ([[1, 2], [3, 4]], "several training loaders"),
        (loader_of(sampler=WeightedRandomSampler([1.0] * N, N)), "a WeightedRandomSampler of its own: use shuffle="),
        (loader_of(sampler=RandomSampler(Points(), replacement=True)), "a RandomSampler of its own"),
        (loader_of(sampler=RandomSampler(Points(), num_samples=9)), "draws 9 samples per epoch"),
        (Odd(Points(), batch_size=8), "Odd makes batches in its own way"),
    ],
)
def test_loaders_that_cannot_be_rebuilt_are_refused_with_the_way_out(make_trainer, loader, words):
    with pytest.raises(InputError, match=words) as error:
        make_trainer(callbacks=[minirec()]).fit(Classifier(), loader)
    assert "\n" not in str(error.value)


class Hooked(Classifier):
    """Makes the features out of what its collate_fn left."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return {"x": x.flip(1), "y": y}

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return {"x": batch["x"].flip(1), "y": batch["y"]}


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_batch_is_scored_as_training_step_gets_it(make_trainer, precision):
    """After the module's batch hooks, in the Trainer's precision."""
    probed = []

    def forward(module, batch):
        probed.append((set(batch), batch["x"].dtype))
        return module(batch["x"])

    callback = minirec(probe=HeadProbe("classifier", forward, target="y"))
    module = Hooked()
    trainer = make_trainer(callbacks=[callback], precision=precision, max_epochs=1)
    module.training_step = lambda batch, batch_idx: nn.functional.cross_entropy(module(batch["x"]), batch["y"])
    trainer.fit(module, loader_of())
    assert set(map(str, probed)) == {str(({"x", "y"}, module.dtype))}
    assert module.dtype == {"bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]


def test_a_subset_is_a_pool(make_trainer):
    module = Classifier()
    make_trainer(callbacks=[minirec(1.0)], max_epochs=1).fit(module, DataLoader(Subset(Points(), range(5, 20)), 4))
    assert sorted(module.rows(0)) == list(range(5, 20))


def test_a_module_without_signals_is_told_of_the_probe(make_trainer):
    with pytest.raises(InputError, match=r"Classifier cannot be scored: .*probe=HeadProbe"):
        make_trainer(callbacks=[minirec(probe=None)]).fit(Classifier(), loader_of())


def test_random_selection_needs_no_probe(make_trainer):
    module = Classifier()
    callback = MiniRec(12, selector=RandomSelector(redraw=True), curriculum="shuffled")
    make_trainer(callbacks=[callback]).fit(module, loader_of())
    assert [len(module.rows(epoch)) for epoch in range(2)] == [12, 12]
    assert set(module.rows(0)) != set(module.rows(1))


def test_what_install_touches_of_lightning_is_there(make_trainer):
    """In the lowest supported release (`make test-lowest`) as in the installed one."""
    trainer = make_trainer()
    assert {"_data_source", "_combined_loader", "_data_fetcher"} <= set(vars(trainer.fit_loop))
    assert {"instance", "name"} <= set(vars(trainer.fit_loop._data_source))
    assert callable(trainer.fit_loop._data_source.dataloader)
    assert callable(trainer.fit_loop.setup_data)
    assert callable(trainer.fit_loop.epoch_loop._should_check_val_fx)
    module = Classifier()
    assert callable(module._on_before_batch_transfer)
    trainer.fit(module, loader_of())
    loader = loader_of()
    trainer.fit_loop._data_source.instance = loader
    assert trainer.fit_loop._data_source.dataloader() is loader
    vars(trainer.fit_loop._data_source)["dataloader"] = lambda: "ours"
    assert trainer.fit_loop._data_source.dataloader() == "ours"
    del vars(trainer.fit_loop._data_source)["dataloader"]
    assert trainer.fit_loop._data_source.dataloader() is loader
    trainer.fit_loop._combined_loader = None
    assert trainer.train_dataloader is None
    trainer.fit_loop.setup_data()
    assert trainer.train_dataloader is loader
    assert not isinstance(loader, ForeignLoader)


def test_only_the_train_loader_touches_what_lightning_keeps_private():
    import re

    package = REPOSITORY
    files = [*(package / "minirec_pl").rglob("*.py"), *(package / "callbacks").glob("*.py")]
    touched = {}
    for path in files:
        for name in re.findall(r"(?:trainer|module|loop|source|strategy|connector)\.(_[a-z]\w*)", path.read_text()):
            touched.setdefault(path.name, set()).add(name)
    expected = {
        "_data_source",
        "_combined_loader",
        "_data_fetcher",
        "_should_check_val_fx",
        "_on_before_batch_transfer",
    }
    assert touched == {"train_loader.py": expected}


def test_a_selection_smaller_than_a_batch_that_is_dropped(make_trainer):
    with pytest.raises(InputError, match=r"an epoch of 6 samples is less than one batch of 8 .* raise the budget"):
        make_trainer(callbacks=[minirec(6)]).fit(Classifier(), loader_of(drop_last=True))


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"budget": "0.1"}, "budget is '0.1': give a fraction"),
        ({"budget": None}, "budget is None: give a fraction .* or 1.0 for all"),
        ({"curriculum": "shuffle"}, "curriculum is 'shuffle': give 'shuffled'"),
        ({"selector": "minirec"}, "selector is 'minirec': give an object"),
        ({"probe": "classifier"}, r"probe is 'classifier': give an object such as HeadProbe\('classifier'"),
    ],
)
def test_arguments_of_another_type(option, words):
    with pytest.raises(InputError, match=words):
        MiniRec(**option)
