import copy
from collections import Counter

import numpy as np
import pytest
import torch
from helpers.toy_data import known_before, random_rows, write_dataset

from minirec_pl.data.datamodule import RecDataModule
from minirec_pl.data.loader import ResumableLoader
from minirec_pl.data.sampler import CurriculumSampler
from minirec_pl.data.warm_batches import WarmChunkSampler
from minirec_pl.utils.errors import InputError


def ready(root, **options):
    data = RecDataModule(str(root), "toy", **options)
    data.setup()
    return data


def test_batches_have_the_documented_shapes_and_types(toy):
    data = ready(toy[0], history_window=5, batch_size=8)
    loader = data.train_dataloader()
    assert isinstance(loader, ResumableLoader)
    assert isinstance(data.train_sampler, CurriculumSampler)
    batch = next(iter(loader))
    assert set(batch) == {"sample_id", "user", "history", "history_age", "history_rating", "target", "seen"}
    floats = {"history_age", "history_rating"}
    for name, value in batch.items():
        assert value.dtype == (torch.float32 if name in floats else torch.int64)
        assert value.device.type == "cpu"
    assert [batch[key].shape for key in ("sample_id", "user", "target")] == [(8,)] * 3
    assert batch["history"].shape == (8, 5)
    assert batch["history_age"].shape == batch["history_rating"].shape == (8, 5)
    for history, seen in zip(batch["history"], batch["seen"], strict=True):
        assert history.ne(-1).any()
        assert history.ne(-1).tolist() == sorted(history.ne(-1).tolist())
        assert seen.ne(-1).tolist() == sorted(seen.ne(-1).tolist(), reverse=True)
        known = seen[seen != -1]
        assert len(known.unique()) == len(known)
    assert batch["seen"].ne(-1).any(dim=0).all()


def test_every_sample_of_each_part_comes_once_and_evaluation_is_in_order(toy):
    data = ready(toy[0])
    trained = torch.cat([batch["sample_id"] for batch in data.train_dataloader()])
    assert sorted(trained.tolist()) == data.pool_ids.tolist()
    assert trained.tolist() != data.pool_ids.tolist()
    for loader, ids in ((data.val_dataloader(), data.val_ids), (data.test_dataloader(), data.test_ids)):
        assert torch.cat([batch["sample_id"] for batch in loader]).tolist() == ids.tolist()
    some = data.pool_ids[::-3]
    given = [batch["sample_id"].tolist() for batch in data.sample_loader(some, batch_size=2)]
    assert [i for ids in given for i in ids] == some.tolist()
    assert max(map(len, given)) == 2


def test_workers_give_the_same_batches(toy):
    with_none, with_two = (ready(toy[0], num_workers=workers) for workers in (0, 2))
    for first, second in (
        (with_none.train_dataloader(), with_two.train_dataloader()),
        (with_none.val_dataloader(), with_two.val_dataloader()),
    ):
        for a, b in zip(first, second, strict=True):
            for key in a:
                torch.testing.assert_close(a[key], b[key], rtol=0, atol=0, equal_nan=True)


def test_catalogue_follows_the_item_file_or_first_appearance(tmp_path):
    rows = random_rows(n=300, n_items=30)
    write_dataset(tmp_path, rows)
    assert ready(tmp_path).catalogue.item_ids == list(dict.fromkeys(item for _, item, _ in rows))
    assert ready(tmp_path).catalogue.titles is None
    items = [(f"i{number}", f"Film {number}") for number in range(40, -1, -1)]
    write_dataset(tmp_path, rows, items)
    for options in ({}, {"split": (0.5, 0.25, 0.25)}, {"train_on": "warm"}):
        catalogue = ready(tmp_path, **options).catalogue
        assert catalogue.item_ids == [item for item, _ in items]
        assert catalogue.titles == [title for _, title in items]


def test_samples_in_words(tmp_path):
    rows = random_rows(3)
    titles = {f"i{item}": f"Title {item}" for item in range(60)}
    write_dataset(tmp_path, rows, items=titles.items())
    data = ready(tmp_path)
    texts = data.sample_texts(data.pool_ids, last=4)
    assert texts["sample_id"].tolist() == data.pool_ids.tolist()
    known = known_before(rows)
    for text in texts.itertuples():
        user, item, _, history = known[text.sample_id]
        assert (text.user_id, text.target) == (user, titles[item])
        assert text.history == [titles[earlier] for earlier in history[-4:]]
    write_dataset(tmp_path / "untitled", rows)
    untitled = ready(tmp_path / "untitled")
    (text,) = untitled.sample_texts(untitled.pool_ids[:1]).itertuples()
    assert text.target == known[text.sample_id][1]


def test_popularity_counts_the_train_part_only(toy):
    data = ready(toy[0])
    ordered = known_before(toy[1])
    counts = Counter(item for _, item, _, _ in ordered[: data.split.train_end])
    assert data.item_popularity.tolist() == [counts[item_id] for item_id in data.catalogue.item_ids]
    assert data.item_popularity.sum() == data.split.train_end < len(ordered)


def test_describe_adds_up(toy):
    data, rows = ready(toy[0]), toy[1]
    counts = data.describe()
    truth = known_before(rows)
    assert counts["interactions"] == len(rows)
    assert counts["users"] == len({user for user, _, _ in rows})
    assert counts["items"] == len({item for _, item, _ in rows})
    assert sum(counts[f"{part}_rows"] for part in ("warm", "pool", "validation", "test")) == len(rows)
    assert counts["no_history"] == sum(not before for *_, before in truth)
    assert counts["repeats"] == sum(item in before for _, item, _, before in truth)
    eligible = sum(counts[part] for part in ("warm", "pool", "validation", "test"))
    assert eligible + counts["no_history"] + counts["repeats"] == len(rows)
    assert counts["test_users"] == len({truth[sample_id][0] for sample_id in data.test_ids})


def test_the_sampler_outlives_setup_and_loaders(toy):
    data = RecDataModule(str(toy[0]), "toy")
    data.setup("fit")
    sampler, table = data.train_sampler, data.table
    data.setup("test")
    assert data.train_sampler is sampler is data.train_dataloader().sampler is data.train_dataloader().sampler
    assert data.table is table


def test_hyperparameters_are_primitives_and_datasets_pickle(toy):
    data = ready(toy[0])
    assert dict(data.hparams) == {
        "path": str(toy[0]),
        "dataset": "toy",
        "train_on": "pool",
        "split": (0.8, 0.1, 0.1),
        "warm_fraction": 0.875,
        "history_window": 50,
        "batch_size": 64,
        "warm_batch_size": 16,
        "eval_batch_size": 256,
        "num_workers": 0,
        "seed": 42,
        "warm_samples": None,
        "pool_samples": None,
        "val_samples": None,
        "test_samples": None,
        "window": None,
        "whole_sequences": False,
    }
    dataset = copy.deepcopy(data.train_dataloader().dataset)
    assert dataset.__getitems__([data.pool_ids[0]])["sample_id"].item() == data.pool_ids[0]


def test_ten_thousand_samples_are_served_once_in_order(tmp_path):
    write_dataset(tmp_path, random_rows(n=20_000, n_users=30, n_moments=5000, n_items=5000))
    data = ready(tmp_path, split=(0.6, 0.3, 0.1), warm_fraction=0.1)
    ids = np.concatenate([data.pool_ids, data.val_ids])[:10_000]
    assert len(ids) == 10_000
    loader = data.sample_loader(ids, batch_size=64)
    assert np.array_equal(np.concatenate([batch["sample_id"] for batch in loader]), ids)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_on": "all"}, "train_on='all': give 'warm', 'pool' or 'warm_samples'"),
        ({"history_window": 0}, "history_window=0: give a whole number of at least 1"),
        ({"batch_size": -1}, "batch_size=-1: give"),
        ({"warm_batch_size": 0}, "warm_batch_size=0: give"),
        ({"eval_batch_size": 0}, "eval_batch_size=0: give"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError) as raised:
        RecDataModule("data", **options)
    assert str(raised.value).startswith(message)


def test_missing_folder_says_how_to_get_it(tmp_path):
    with pytest.raises(InputError) as raised:
        RecDataModule(str(tmp_path)).setup()
    path = tmp_path / "ml-100k" / "ml-100k.inter"
    assert str(raised.value) == f"{path} is missing: run 'minirec fetch ml-100k --to {tmp_path}'"
    with pytest.raises(InputError, match=r"own\.inter is missing: put own\.inter and own\.item"):
        RecDataModule(str(tmp_path), "own").setup()


def bad_setup(root, match, **options):
    with pytest.raises(InputError, match=match) as raised:
        ready(root, **options)
    assert "\n" not in str(raised.value)


def test_bad_files_are_named_with_line_and_id(tmp_path):
    rows = random_rows(n=100, n_items=9)
    items = [(f"i{number}", "t") for number in range(9)]
    folder = write_dataset(tmp_path, [*rows, ("u1", "i77", 1)], items)
    bad_setup(tmp_path, r"toy\.inter, line 102: the item 'i77' is not in the item file: add it there or remove")
    write_dataset(tmp_path, rows, [*items, ("i3", "again")])
    bad_setup(tmp_path, r"toy\.item, line 11: the item 'i3' comes twice")
    write_dataset(tmp_path, rows, items, users=[f"u{number}" for number in range(12)])
    ready(tmp_path)
    write_dataset(tmp_path, [*rows, ("i3", "i4", 1)], items)
    bad_setup(tmp_path, r"toy\.inter, line 102: the user 'i3' is not in toy\.user: .* order of the columns")
    write_dataset(tmp_path, rows, items, users=["u1", "u2"])
    bad_setup(tmp_path, r"toy\.inter, line \d+: the user 'u\d+' is not in toy\.user")
    inter = folder / "toy.inter"
    inter.write_text(inter.read_text().replace("timestamp:float", "timestamp:token"))
    bad_setup(tmp_path, r"toy\.inter, line 1, column timestamp: not a float: write 'timestamp:float'")
    inter.write_text(inter.read_text().replace("timestamp:token", "time:float"))
    bad_setup(tmp_path, r"toy\.inter, line 1: no column timestamp")


def test_truncated_file_is_named(toy):
    path = toy[0] / "toy" / "toy.inter"
    whole = path.read_text()
    last = whole.rindex("\n", 0, -1) + 1
    for end in range(last + 1, len(whole) - 1):
        path.write_text(whole[:end])
        bad_setup(toy[0], r"toy\.inter, line 901.*truncated")
    path.write_text(whole[:-1])
    assert len(ready(toy[0]).table) == 900


@pytest.mark.parametrize(
    ("part", "options"),
    [
        ("pool", {"warm_fraction": 1.0}),
        ("warm-start", {"warm_fraction": 0.0, "train_on": "warm"}),
        ("validation", {"split": (0.9, 0.0001, 0.0999)}),
        ("test", {"split": (0.5, 0.4999, 0.0001)}),
    ],
)
def test_empty_part_is_named(tmp_path, part, options):
    write_dataset(tmp_path, random_rows(n_items=2000))
    bad_setup(tmp_path, rf"toy\.inter: the {part} part is empty, .* change (warm_fraction|split) or check", **options)


def test_columns_in_the_wrong_order_leave_an_empty_part(tmp_path):
    write_dataset(tmp_path, [(user, item, number % 5 + 1) for number, (user, item, _) in enumerate(random_rows())])
    bad_setup(tmp_path, "part is empty.*900 interactions at 5 different timestamps.*check the timestamps")


def test_a_part_that_is_not_trained_on_may_be_empty(tmp_path):
    write_dataset(tmp_path, random_rows(n_items=2000))
    assert len(ready(tmp_path, warm_fraction=1.0, train_on="warm").pool_ids) == 0
    assert len(ready(tmp_path, warm_fraction=0.0).warm_ids) == 0


def test_a_sample_of_another_part_is_refused(toy):
    data = ready(toy[0])
    dataset = data.train_dataloader().dataset
    for sample_id in (data.warm_ids[0], data.val_ids[0], -1, 10**6):
        with pytest.raises(InputError, match=rf"sample_id {sample_id} is not in the pool"):
            dataset.__getitems__([data.pool_ids[0], sample_id])
    assert isinstance(ready(toy[0], train_on="warm").train_sampler, WarmChunkSampler)


class Gives:
    """A source of the user's own, whatever it gives."""

    def __init__(self, given=None):
        self.given = given

    def read(self):
        return self.given


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (Gives, r"source is the class Gives: give an object of it, Gives\(\.\.\.\)"),
        ("log.csv", r"source is 'log.csv': give an object with `read\(\)`, such as InteractionTable"),
        (Gives(), r"Gives.read returned a NoneType: return Samples, as .*from_interactions makes them"),
        (Gives([[1, 2, 3]]), r"Gives.read returned a list: return Samples"),
        (Gives((1, 2, 3, 4)), r"Gives.read returned a tuple: return Samples"),
    ],
)
def test_a_source_of_ones_own_that_gives_no_samples(source, words):
    with pytest.raises(InputError, match=words):
        RecDataModule(source=source).setup("fit")
