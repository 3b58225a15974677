"""Users' data from file to training to predictions, and the options of RecDataModule that go with it."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.own_tables import item_frame, log_frame, sequence_frame, write_amazon
from helpers.paths import CONFIGS
from helpers.tiny_config import TINY
from test_amazon import random_dump

from minirec_pl.cli.main import main
from minirec_pl.data.datamodule import RecDataModule
from minirec_pl.data.sources import InteractionTable, Sequences
from minirec_pl.utils.errors import InputError

TEMPLATE = CONFIGS / "own-data" / "template.yaml"
QUIET = ["--trainer.logger=null", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
SMALL = [
    f"--model.policy.config={json.dumps(TINY)}",
    "--model.num_generations=4",
    "--trainer.accelerator=cpu",
    "--trainer.max_epochs=1",
    "--data.history_window=5",
    "--data.batch_size=8",
]


def fit_and_predict(root, *data):
    """Two steps of GRPO through the template, then `minirec predict`; returns the predictions."""
    arguments = ["--config", str(TEMPLATE), *SMALL, *QUIET, *data, f"--trainer.default_root_dir={root}"]
    assert main(["fit", *arguments, "--trainer.limit_train_batches=2", "--selection=null"]) == 0
    assert main(["predict", "--ckpt_path", str(root / "latest" / "checkpoints" / "best.ckpt")]) == 0
    return pd.read_parquet(next(root.rglob("predictions.parquet")))


@pytest.fixture
def sequences(tmp_path):
    """Sequences and items in files; returns (log, options of Sequences)."""
    log = log_frame(8, n=600, n_items=90)
    sequence_frame(log).to_parquet(tmp_path / "sequences.parquet")
    item_frame(log).to_parquet(tmp_path / "items.parquet")
    return log, {"sequences": str(tmp_path / "sequences.parquet"), "items": str(tmp_path / "items.parquet")}


def test_the_template_trains_on_sequences_with_only_paths_changed_and_ids_survive(sequences, tmp_path):
    log, paths = sequences
    data = [f"--data.source.{name}={path}" for name, path in paths.items()]
    predictions = fit_and_predict(tmp_path / "runs", *data)
    test = sequence_frame(log).query("split == 'test'")
    assert set(predictions["user_id"]) <= set(test["user_id"])
    assert set(predictions["item_id"]) <= set(log["item_id"])
    assert predictions.groupby("sample_id").size().eq(10).all()
    by_sample = dict(enumerate(sequence_frame(log).itertuples()))
    for sample_id, own in predictions.groupby("sample_id"):
        assert own["user_id"].unique().tolist() == [by_sample[sample_id].user_id]
        assert not set(own["item_id"]) & set(by_sample[sample_id].history_item_id)


def test_it_trains_on_an_amazon_dump_and_ids_survive(tmp_path):
    reviews, metadata = random_dump(2)
    write_amazon(tmp_path, reviews, metadata)
    init_args = {"category": "Toys", "folder": str(tmp_path), "start": "2022-01-01", "min_items": 0}
    source = {"class_path": "minirec_pl.data.sources.AmazonReviews2023", "init_args": init_args}
    predictions = fit_and_predict(
        tmp_path / "runs", f"--data.source={json.dumps(source)}", "--data.split=[0.8,0.1,0.1]"
    )
    assert len(predictions)
    assert set(predictions["user_id"]) <= {row["user_id"] for row in reviews}
    assert set(predictions["item_id"]) <= {row["parent_asin"] for row in metadata}
    assert set(predictions["rank"]) == set(range(1, 11))


@pytest.mark.parametrize("train_on", ["warm", "warm_samples"])
def test_warm_batches_of_sequences(sequences, train_on):
    paths = sequences[1]
    data = RecDataModule(source=Sequences(**paths), split="given", train_on=train_on, history_window=3, warm_samples=40)
    data.setup()
    table = data.table
    assert len(data.warm_ids) == 40
    assert set(data.warm_ids.tolist()) <= set(data.parts.warm.tolist())
    targets, steps = {}, []
    for batch in data.train_dataloader():
        if train_on == "warm_samples":
            for history, target, sample_id in zip(batch["history"], batch["target"], batch["sample_id"], strict=True):
                assert history[history >= 0].tolist() == table.history(int(sample_id), 3).tolist()
                targets[int(sample_id)] = int(target)
            continue
        for row, position, target, sample_id in zip(
            *(batch[key].tolist() for key in ("row", "position", "target", "sample_id")), strict=True
        ):
            history = table.history(sample_id, 3).tolist()
            assert batch["sequence"][row].tolist() == history + [-1] * (batch["sequence"].shape[1] - len(history))
            assert target == [*history, table.item[sample_id]][position + 1]
            assert target not in history[: position + 1]
            steps.append((table.user[sample_id], history[position], target))
            if position + 1 == len(history):
                targets[sample_id] = target
    assert sorted(targets) == data.warm_ids.tolist()
    assert all(table.item[sample_id] == target for sample_id, target in targets.items())
    if train_on == "warm":
        own = {(table.user[i], int(table.history(i)[-1]), int(table.item[i])) for i in data.warm_ids.tolist()}
        whole = [(table.user[i], table.history(i, 3).tolist()) for i in data.warm_ids.tolist()]
        inner = {(u, h[p], h[p + 1]) for u, h in whole for p in range(len(h) - 1) if h[p + 1] not in h[: p + 1]}
        assert set(steps) == own | inner
        assert len(steps) == len(targets) + len(inner - own)
        assert inner - own


def test_a_warm_start_on_sequences_learns(sequences, make_trainer, tmp_path):
    from minirec_pl import WarmStartModule
    from minirec_pl.policy import GenerativePolicy

    _, paths = sequences
    losses = []

    class Module(WarmStartModule):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            losses.append(float(loss.detach()))
            return loss

    torch.manual_seed(0)
    data = RecDataModule(source=Sequences(**paths), split="given", train_on="warm", history_window=5)
    module = Module(GenerativePolicy(config=TINY), optimizer=lambda params: torch.optim.AdamW(params, lr=0.01))
    make_trainer(max_epochs=4).fit(module, data)
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3


@pytest.fixture
def log_path(tmp_path):
    log_frame(9, n=1500, n_items=300).to_csv(tmp_path / "log.csv", index=False)
    return str(tmp_path / "log.csv")


def ready(path, **options):
    data = RecDataModule(source=InteractionTable(path), **options)
    data.setup()
    return data


def test_random_subsets_are_seeded_and_those_of_evaluation_do_not_follow_the_seed(log_path):
    whole = ready(log_path, warm_fraction=0.5)
    sizes = {"warm_samples": 30, "pool_samples": 20, "val_samples": 11, "test_samples": 12}
    one, two = (ready(log_path, warm_fraction=0.5, train_on="warm_samples", seed=seed, **sizes) for seed in (1, 2))
    for name, size in (("warm", 30), ("pool", 20), ("val", 11), ("test", 12)):
        part, other = getattr(one, f"{name}_ids"), getattr(two, f"{name}_ids")
        assert len(part) == size
        assert set(part.tolist()) <= set(getattr(whole, f"{name}_ids").tolist())
        assert (part.tolist() == other.tolist()) == (name in ("val", "test"))
    assert one.item_popularity.tolist() == whole.item_popularity.tolist()
    met = torch.cat([batch["sample_id"] for batch in one.train_dataloader()])
    assert sorted(met.tolist()) == one.warm_ids.tolist()
    assert torch.cat([batch["sample_id"] for batch in one.test_dataloader()]).tolist() == one.test_ids.tolist()
    assert len(ready(log_path, test_samples=10**6).test_ids) == len(ready(log_path).test_ids)


def test_leave_one_out_serves_each_users_last_and_trains_on_the_rest(log_path):
    data = ready(log_path, split="leave_one_out", warm_fraction=0.5, train_on="warm", history_window=6)
    for part, ids in (("validation", data.val_ids), ("test", data.test_ids)):
        users = data.table.user[ids]
        assert len(users) == len(set(users.tolist())) > 5, part
    trained = {i for batch in data.train_dataloader() for i in batch["sample_id"].tolist()}
    assert trained <= set(data.warm_ids.tolist())
    assert data.split is None
    counts = data.describe()
    assert sum(counts[f"{part}_rows"] for part in ("warm", "pool", "validation", "test")) == len(data.table)


def test_options_that_do_not_go_together(log_path, tmp_path):
    with pytest.raises(InputError, match="warm_samples=5 does not fit train_on='warm', which trains on whole"):
        ready(log_path, train_on="warm", warm_samples=5)
    with pytest.raises(InputError, match="pool_samples=0: give a whole number of at least 1"):
        RecDataModule(pool_samples=0)
    with pytest.raises(InputError, match=r"log\.csv: the warm-start part is empty"):
        ready(log_path, train_on="warm_samples", warm_fraction=0.0)
    assert "source" not in ready(log_path).hparams
