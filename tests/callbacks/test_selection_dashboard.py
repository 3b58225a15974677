"""What the dashboard logs, against the ledger, the cost and the order of training."""

import json
import struct
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from helpers.cli_tools import CONFIGS, equal_weights, results
from helpers.dashboard_run import EPOCHS, run
from helpers.wandb_file import history, read_run, step_metrics
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader, TensorDataset

from minirec_pl import InputError
from minirec_pl.callbacks import MiniRec, SelectionDashboard
from minirec_pl.cli.main import main
from minirec_pl.probes import HeadProbe
from minirec_pl.reporting.dashboard_rows import table_rows

TERMS = ("difficulty", "learnability", "representativeness", "novelty")
TOTALS = {"cost/rollouts", "cost/tokens", "cost/seconds"}
pytestmark = pytest.mark.filterwarnings("ignore")


def tables_of(folder, rows, key):
    """The tables that the rows of an offline run name."""
    (files,) = folder.glob("wandb/offline-run-*/files")
    found = []
    for row in rows:
        if key in row:
            assert row[key]["_type"] == "table-file"
            content = json.loads((files / row[key]["path"]).read_text())
            found.append(pd.DataFrame(content["data"], columns=content["columns"]))
            assert row[key]["nrows"] == len(found[-1])
    return found


def equal(table, parquet):
    """Every cell of a W&B table is that of the parquet file, missing where that is."""
    assert list(table.columns) == list(parquet.columns)
    for name in parquet:
        theirs = parquet[name].astype(object).where(parquet[name].notna(), None).tolist()
        ours = table[name].astype(object).where(table[name].notna(), None).tolist()
        if ours != theirs:
            return False
    return len(table) == len(parquet)


def test_tables_are_the_ledger_and_the_order_of_training(dashboard_run):
    folder, rows, seen = dashboard_run
    ledgers, plans = (tables_of(folder, rows, key) for key in ("selection/ledger", "curriculum/plan"))
    assert [row["epoch"] for row in rows if "selection/ledger" in row] == list(range(EPOCHS))
    parquet = pd.read_parquet(folder / "run" / "ledger.parquet")
    assert equal(ledgers[-1], parquet)
    assert not equal(ledgers[0], parquet)
    for ledger, plan, trained in zip(ledgers, plans, seen.ids, strict=True):
        assert plan["sample_id"].tolist() == trained
        assert set(trained) == set(ledger.loc[ledger["rank"].notna(), "sample_id"])
        assert plan["position"].tolist() == list(range(len(trained)))
        for _, fold in plan.groupby("fold"):
            assert fold["easiness"].is_monotonic_decreasing
        assert plan["fold"].unique().tolist() == [0, 1]


def test_the_artifact_holds_the_same_table(dashboard_run):
    folder, rows, _ = dashboard_run
    artifacts = [r.artifact for r in read_run(folder) if r.WhichOneof("record_type") == "artifact"]
    names = [artifact.name for artifact in artifacts]
    assert sum("selectionledger" in name for name in names) == EPOCHS
    (files,) = folder.glob("wandb/offline-run-*/files")
    paths = {
        row["selection/ledger"]["sha256"]: files / row["selection/ledger"]["path"]
        for row in rows
        if "selection/ledger" in row
    }
    contents = [path.read_bytes() for path in paths.values()]
    for artifact in artifacts:
        if "selectionledger" in artifact.name:
            (entry,) = artifact.manifest.contents
            assert entry.path == "selection/ledger.table.json"
            assert Path(entry.local_path).read_bytes() in contents


def test_histograms_count_pool_and_picks_in_the_same_bins(dashboard_run):
    folder, rows, _ = dashboard_run
    last = [row for row in rows if "selection/ledger" in row][-1]
    ledger = pd.read_parquet(folder / "run" / "ledger.parquet")
    for term in TERMS:
        pool, picks = (last[f"selection/{term}/{group}"] for group in ("pool", "picks"))
        assert pool["_type"] == picks["_type"] == "histogram"
        assert pool["bins"] == picks["bins"]
        for histogram, part in ((pool, ledger), (picks, ledger[ledger["rank"].notna()])):
            values = part[term].dropna()
            assert histogram["values"] == np.histogram(values, bins=histogram["bins"])[0].tolist()
            assert sum(histogram["values"]) == len(values) > 0


def test_costs_stand_beside_every_figure(dashboard_run):
    folder, rows, seen = dashboard_run
    for name in ("val/ndcg@10", "reward", "train/reward"):
        beside = [row for row in rows if name in row]
        assert len(beside) >= EPOCHS
        assert all(row.keys() >= TOTALS for row in beside)
        assert [row["cost/tokens"] for row in beside] == sorted(row["cost/tokens"] for row in beside)
    ends = [row for row in rows if "cost/training_tokens" in row]
    for row, cost in zip(ends, seen.costs, strict=True):
        tokens = {phase: cost["tokens_forward"][phase] + cost["tokens_backward"][phase] for phase in cost["seconds"]}
        assert row["cost/tokens"] == sum(tokens.values())
        for phase in ("warm_start", "scoring", "training"):
            assert row[f"cost/{phase}_tokens"] == tokens[phase]
        assert row["cost/rollouts"] == row["cost/scoring_rollouts"] + row["cost/training_rollouts"]
        assert row["cost/training_rollouts"] == cost["rollouts"]["training"] > 0
        assert row["cost/training_seconds"] == pytest.approx(cost["seconds"]["training"], rel=1e-6)
    table = pd.read_csv(folder / "run" / "metrics.csv")
    validated = table[table["val/ndcg@10"].notna()]
    assert validated["cost/tokens"].tolist() == [row["cost/tokens"] for row in rows if "val/ndcg@10" in row]
    scalars = {name for row in rows for name, value in row.items() if not isinstance(value, dict) and name[0] != "_"}
    assert scalars - {"trainer/global_step"} <= set(table.columns)


def test_wandb_knows_what_to_plot_over_what(dashboard_run):
    defined = step_metrics(read_run(dashboard_run[0]))
    assert defined["val/ndcg@10"] == "cost/tokens"
    assert defined["reward"] == "cost/rollouts"
    assert set(defined) <= {name for row in dashboard_run[1] for name in row}


def events(folder):
    """What TensorBoard's files hold, by name: [(step, value)]."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in folder.glob("events.*"):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + length])
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value))
            place += length + 16
    return found


def test_tensorboard_gets_histograms_and_scalars_and_nothing_changes(tmp_path):
    plain = run(tmp_path, False)
    shown = run(tmp_path, TensorBoardLogger(tmp_path, name="", version="board"), SelectionDashboard())
    for one, other in zip(plain.state_dict().values(), shown.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    values = events(tmp_path / "board")
    ledger = pd.read_parquet(tmp_path / "board" / "ledger.parquet")
    for term in TERMS:
        for group, part in (("pool", ledger), ("picks", ledger[ledger["rank"].notna()])):
            histograms = values[f"selection/{term}/{group}"]
            assert len(histograms) == EPOCHS
            assert histograms[-1][1].histo.num == part[term].count()
            assert histograms[-1][1].histo.sum == pytest.approx(part[term].sum())
    assert values.keys() >= TOTALS | {"cost/training_tokens", "selection/size", "val/ndcg_10"}  # as it writes "@"


class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.classifier = torch.nn.Linear(4, 3)

    def forward(self, x):
        return self.classifier(x)

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("selection", [True, False])
def test_a_module_of_another_project_logs_no_cost(make_trainer, tmp_path, selection):
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(40, 4, generator=generator), torch.randint(3, (40,), generator=generator))
    minirec = MiniRec(0.5, probe=HeadProbe("classifier", forward=0, target=1))
    callbacks = [SelectionDashboard(), *([minirec] if selection else [])]
    trainer = make_trainer(callbacks=callbacks, logger=CSVLogger(tmp_path, name="", version="own"), log_every_n_steps=1)
    trainer.fit(Classifier(), DataLoader(data, batch_size=8))
    path = tmp_path / "own" / "metrics.csv"
    columns = set(pd.read_csv(path).columns) if path.is_file() else set()
    assert not columns & TOTALS
    assert ("selection/size" in columns) == selection


class SaveAt(Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_a_run_resumed_inside_an_epoch_logs_its_plan_first(tmp_path):
    run(tmp_path, False, SaveAt(7, tmp_path / "middle.ckpt"))
    logger = TensorBoardLogger(tmp_path, name="", version="again")
    run(tmp_path, logger, SelectionDashboard(), ckpt_path=tmp_path / "middle.ckpt")
    logged = events(tmp_path / "again")["selection/novelty/picks"]
    assert [step for step, _ in logged] == [7, 10]


def test_a_large_pool_keeps_its_picks_and_others_at_even_distances():
    rank = pd.array([None] * 100, dtype="Int64")
    rank[[7, 50, 3]] = [1, 2, 3]
    table = pd.DataFrame({"sample_id": np.arange(100), "rank": rank})
    shown = table_rows(table, 13)
    assert len(shown) == 13
    assert {3, 7, 50} <= set(shown["sample_id"])
    assert shown["sample_id"].is_monotonic_increasing
    assert shown["sample_id"].is_unique
    assert shown["sample_id"].diff().max() <= 12
    assert table_rows(table, 2)["sample_id"].tolist() == [7, 50]
    assert table_rows(table, 100) is table


def test_wrong_rows():
    with pytest.raises(InputError, match="max_rows is 0"):
        SelectionDashboard(max_rows=0)


@pytest.mark.slow
def test_the_shipped_quickstart_leaves_its_tables_offline(command, tmp_path):
    arguments = [word for word in command.grpo(tmp_path / "runs") if not word.startswith("--trainer.logger")]
    assert main(arguments) == 0
    folder = tmp_path / "runs" / "version_0"
    rows = history(read_run(folder))
    ledgers = tables_of(folder, rows, "selection/ledger")
    assert len(ledgers) == len(tables_of(folder, rows, "curriculum/plan")) == 2
    assert equal(ledgers[-1], pd.read_parquet(folder / "ledger.parquet"))
    config = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    callbacks = config["trainer"]["callbacks"]
    config["trainer"]["callbacks"] = [one for one in callbacks if "SelectionDashboard" not in one["class_path"]]
    assert len(config["trainer"]["callbacks"]) == len(callbacks) - 1
    (tmp_path / "without.yaml").write_text(yaml.safe_dump(config))
    assert main(command.fit(tmp_path / "without.yaml", tmp_path / "bare", *command.grpo("")[-3:])) == 0
    assert results(folder) == results(tmp_path / "bare" / "version_0")
    assert equal_weights(folder, tmp_path / "bare" / "version_0")
