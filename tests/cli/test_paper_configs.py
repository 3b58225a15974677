"""The published configs of a paper's setting, run end to end on a tiny model of the same architecture."""

import json

import pandas as pd
import pytest
import torch
from helpers.cli_tools import QUIET, REPOSITORY
from helpers.own_tables import write_amazon
from helpers.text_policy import write_model
from helpers.toy_data import random_rows

from minirec_pl.cli.main import main
from minirec_pl.policy import RetrievalPolicy

CONFIGS = {"gemma-2-2b": "gemma2", "qwen2.5-3b": "qwen2"}
DAY = 86_400_000
START = 1_664_582_400_000  # 2022-10-01 in milliseconds


def write_dump(folder):
    """A category whose reviews are spread over the year that the configs keep."""
    rows = random_rows(seed=5, n=500, n_users=25, n_moments=300, n_items=30)
    first = min(time for _, _, time in rows)
    reviews = [
        {"user_id": user, "parent_asin": item, "rating": 1.0 + time % 5, "timestamp": START + (time - first) * DAY}
        for user, item, time in rows
    ]
    items = [{"parent_asin": f"i{i}", "title": f"Record {i}", "price": 9.5} for i in range(30)]
    folder.mkdir()
    write_amazon(folder, reviews, items, category="CDs_and_Vinyl")
    return folder


def small(config, model, data, root):
    """The config with a tiny model and sizes to match; every other key is as published."""
    policy = "--model.policy.init_args"
    return [
        *("fit", "--config", str(REPOSITORY / "configs" / "amazon-cds" / f"{config}.yaml")),
        *(f"{policy}.language_model.name={model}", f"{policy}.max_completion_length=6"),
        *(f"--data.source.folder={data}", "--data.source.min_items=0", "--data.source.category_core=0"),
        *("--data.warm_fraction=0.3", "--data.pool_samples=24", "--data.val_samples=8", "--data.test_samples=16"),
        *("--warm_start.samples=16", "--selection.budget=16", "--selection.curriculum.n_folds=4"),
        *(f"--trainer.default_root_dir={root}", "--trainer.max_epochs=2", "--trainer.accelerator=cpu", *QUIET),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_a_published_config_runs_from_check_to_prediction(config, tmp_path, capsys):
    model = write_model(tmp_path / "model", kind=CONFIGS[config], positions=2048)
    data = write_dump(tmp_path / "dump")
    arguments = small(config, model, data, tmp_path / "runs")
    assert main(["check", *arguments[1:]]) == 0
    shown = capsys.readouterr().out
    assert "Record" in shown
    assert "nothing stands in the way" in shown

    assert main(arguments) == 0
    run = tmp_path / "runs" / "version_0"
    results = json.loads((run / "results.json").read_text())
    assert [row["stage"] for row in results["stages"]] == ["popularity", "start", "warm_start", "trained"]
    assert results["samples_per_epoch"] == results["distinct_samples"] == 16
    assert results["rollouts"] == {"scoring": 24 * 4, "training": 2 * 16 * 4}
    assert (pd.read_parquet(run / "ledger.parquet")["rank"].notna()).sum() == 16
    assert (run / "policy" / "adapter_config.json").is_file()

    kept = RetrievalPolicy(pretrained=str(run / "policy")).eval()
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    adapters = {name: value for name, value in kept.state_dict().items() if "lora" in name}
    assert len(adapters) == 2 * 7 * 2
    assert all(torch.equal(value, best[f"policy.{name}"]) for name, value in adapters.items())
    again = RetrievalPolicy(pretrained=str(run / "policy")).eval()
    tokens = torch.randint(3, 200, (2, 9))
    with torch.no_grad():
        assert torch.equal(kept.model(input_ids=tokens).logits, again.model(input_ids=tokens).logits)

    top = tmp_path / "top.parquet"
    command = ["predict", "--ckpt_path", str(run / "checkpoints" / "best.ckpt"), "--to", str(top), "--reasoning=true"]
    assert main(command) == 0
    table = pd.read_parquet(top)
    assert set(table["item_id"]) <= {f"i{i}" for i in range(30)}
    assert table["sample_id"].nunique() == 16
    assert table.groupby("sample_id")["reasoning"].nunique().eq(1).all()
