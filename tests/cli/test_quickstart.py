import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
import yaml
from helpers.cli_tools import CONFIGS, REPOSITORY, equal_weights, write_toy

from minirec_pl.cli.main import main

METHODS = ["popularity", "warm_start", "sft_pool", "grpo_full", "grpo_random", "grpo_expected", "grpo_minirec"]
COSTS = {
    "rollouts": {"scoring", "training"},
    "tokens": {"forward", "backward"},
    "seconds": {"warm_start", "scoring", "selection", "training"},
}


def short_configs(folder):
    """The shipped files, with two epochs each and the CSV logger only."""
    folder.mkdir()
    for path in CONFIGS.glob("*.yaml"):
        config = yaml.safe_load(path.read_text())
        config["trainer"]["max_epochs"] = 2
        config["trainer"]["logger"] = [entry for entry in config["trainer"]["logger"] if "CSV" in entry["class_path"]]
        config["trainer"] |= {"enable_progress_bar": False, "enable_model_summary": False}
        (folder / path.name).write_text(yaml.safe_dump(config))
    return folder


def without_clock(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def arguments(folder, name):
    places = {"data": "data", "configs": "configs", "to": name}
    return ["quickstart", *(word for option, place in places.items() for word in (f"--{option}", str(folder / place)))]


def rows_of(folder, name):
    return json.loads((folder / name / "results.json").read_text())["rows"]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A quickstart "one" on a toy MovieLens: its folder, rows and text."""
    from contextlib import redirect_stdout
    from io import StringIO

    folder = tmp_path_factory.mktemp("quickstart")
    write_toy(folder / "data", name="ml-100k")
    short_configs(folder / "configs")
    text = StringIO()
    with redirect_stdout(text):
        assert main(arguments(folder, "one")) == 0
    return folder, rows_of(folder, "one"), text.getvalue()


@pytest.fixture(scope="module")
def piped(shown):
    """Another, "two", whose output is piped: its folder, rows and text."""
    folder = shown[0]
    done = subprocess.run(
        [sys.executable, "-m", "minirec_pl", *arguments(folder, "two")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return folder, rows_of(folder, "two"), done.stdout


def check_rows(rows):
    assert [row["method"] for row in rows] == METHODS
    for row in rows:
        for name, parts in COSTS.items():
            assert set(row[name]) == parts
            assert all(value >= 0 for value in row[name].values())
        assert 0 <= row["ndcg@10"] <= row["hit_rate@10"] <= 1
        assert isinstance(row["samples_per_epoch"], int)
        assert isinstance(row["distinct_samples"], int)
        figures = {"hit_rate@10", "hit_rate@10_se_users", "ndcg@10", "ndcg@10_se_users"}
        known = {"method", "samples_per_epoch", "distinct_samples", *figures, *COSTS}
        assert set(row) == known


def test_rows_and_their_costs(shown):
    _, rows, _ = shown
    check_rows(rows)
    popularity, warm, supervised, full, random, expected, minirec = rows
    assert popularity["tokens"] == {"forward": 0, "backward": 0}
    assert warm["rollouts"] == {"scoring": 0, "training": 0}
    assert warm["seconds"]["warm_start"] > 0
    for row in (supervised, full, random, expected, minirec):
        assert row["seconds"]["warm_start"] == pytest.approx(warm["seconds"]["warm_start"], abs=1e-3)
        assert row["tokens"]["forward"] > warm["tokens"]["forward"]
    assert full["samples_per_epoch"] == full["distinct_samples"]
    assert random["samples_per_epoch"] < full["samples_per_epoch"]
    for row in (supervised, expected, minirec):
        assert row["samples_per_epoch"] <= random["samples_per_epoch"]
        assert row["seconds"]["scoring"] > 0
    assert [row["method"] for row in rows if row["rollouts"]["training"]] == [
        "grpo_full",
        "grpo_random",
        "grpo_minirec",
    ]
    assert random["seconds"]["scoring"] == full["seconds"]["scoring"] == 0
    assert len({(row["ndcg@10"], row["hit_rate@10"]) for row in rows}) > 3


def test_the_table_is_results_json(shown):
    _, rows, text = shown
    for row in rows:
        (line,) = [line for line in text.splitlines() if f" {row['method']} " in line and "│" in line]
        cells = [cell.strip() for cell in line.strip("│ ").split("│")]
        assert cells[0] == row["method"]
        assert cells[1:3] == [f"{row['hit_rate@10']:.4f}", f"{row['ndcg@10']:.4f}"]
        assert cells[3:5] == [f"{row['samples_per_epoch']:,}", f"{row['distinct_samples']:,}"]
        assert cells[5] == f"{row['rollouts']['scoring']:,} + {row['rollouts']['training']:,}"
        assert cells[-1] == f"{sum(row['seconds'].values()):.1f}"


@pytest.mark.slow
def test_a_pipe_gets_a_line_per_stage_the_table_and_the_paths(piped):
    folder, _, text = piped
    lines = text.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 100 + len(str(folder))  # paths are not broken
    assert not {"\r", "\x1b"} & set(text)
    stages = ["warm start", "SFT pool", "GRPO full", "GRPO random", "GRPO expected", "MiniRec", "tests"]
    assert [line[:13].strip() for line in lines[:7]] == stages
    assert all("NDCG@10 0." in line for line in lines[:6])
    assert re.search(r"Best\s+on\s+validation:\s+\w+,\s+NDCG@10\s+0\.\d{4}\.", " ".join(lines))
    assert f"picture: {folder / 'two' / 'grpo_minirec' / 'latest' / 'curriculum.png'}" in lines
    for method in METHODS[1:]:
        log = (folder / "two" / method / "log.txt").read_text()
        assert log.count("$ minirec ") == 2
        assert "Test metric" in log


def test_a_stage_that_fails_shows_the_end_of_its_log(shown, tmp_path, capfd):
    folder, _, _ = shown
    for path in (folder / "configs").glob("*.yaml"):
        config = yaml.safe_load(path.read_text())
        config["trainer"]["callbacks"] = [
            {"class_path": "helpers.cli_tools.InterruptAt", "init_args": {"hook": "on_train_start"}}
        ]
        (tmp_path / path.name).write_text(yaml.safe_dump(config))
    to = tmp_path / "runs"
    assert main(["quickstart", "--data", str(folder / "data"), "--to", str(to), "--configs", str(tmp_path)]) == 2
    shown = capfd.readouterr()
    assert f"last lines of {to / 'warm_start' / 'log.txt'}" in shown.out
    assert "$ minirec fit" in shown.out
    assert "minirec: error: interrupted" in shown.err


@pytest.mark.slow
def test_two_quickstarts_with_one_seed_are_equal(shown, piped):
    (folder, one, _), (_, two, _) = shown, piped
    assert without_clock(one) == without_clock(two)
    for method in METHODS[1:]:
        assert equal_weights(folder / "one" / method / "latest", folder / "two" / method / "latest")


@pytest.mark.slow
def test_each_logged_fit_and_test_gives_the_row(shown, tmp_path, capsys):
    folder, rows, _ = shown
    logs = [line for name in METHODS[1:] for line in (folder / "one" / name / "log.txt").read_text().splitlines()]
    commands = [shlex.split(line[2:]) for line in logs if line.startswith("$ minirec ")]
    assert [command[1] for command in commands] == ["fit", "test"] * 6
    fit = commands[-2]
    assert main([*fit[1:], f"--trainer.default_root_dir={tmp_path}"]) == 0
    assert main(["test", "--ckpt_path", str(tmp_path / "version_0" / "checkpoints" / "best.ckpt")]) == 0
    figures = json.loads((tmp_path / "version_1" / "results.json").read_text())
    costs = json.loads((tmp_path / "version_0" / "results.json").read_text())
    for name in ("hit_rate@10", "ndcg@10"):
        assert figures[name] == pytest.approx(rows[-1][name], abs=1e-6)
    for name in ("samples_per_epoch", "distinct_samples", "rollouts", "tokens"):
        assert costs[name] == rows[-1][name]


def test_the_test_figures_are_those_of_the_best_checkpoint(shown):
    """An oracle that shares no code with Trainer.test: load the exported policy and rank by hand."""
    import numpy as np

    from minirec_pl import RecDataModule
    from minirec_pl.policy import GenerativePolicy

    folder, rows, _ = shown
    data = RecDataModule(str(folder / "data"))
    data.setup("test")
    for row in rows[1:]:
        policy = GenerativePolicy(pretrained=str(folder / "one" / row["method"] / "latest" / "policy")).eval()
        gains = []
        for batch in data.test_dataloader():
            with torch.no_grad():
                scores = policy.item_logps(batch).double().numpy()
            for line, target, seen in zip(scores, batch["target"].tolist(), batch["seen"].tolist(), strict=True):
                masked = {item for item in seen if item >= 0}
                better = [i for i, score in enumerate(line) if i not in masked and score > line[target]]
                gains.append(1 / np.log2(len(better) + 2) if len(better) < 10 else 0.0)
        assert np.mean(gains) == pytest.approx(row["ndcg@10"], abs=1e-6)


def test_on_movielens_the_thresholds_hold():
    results = REPOSITORY / "runs" / "quickstart" / "results.json"
    if not results.is_file():
        pytest.skip("the quickstart was not run here: make quickstart")
    rows = json.loads(results.read_text())["rows"]
    check_rows(rows)
    popularity, warm, supervised, full, _, expected, minirec = rows
    assert popularity["ndcg@10"] >= 0.025
    assert warm["ndcg@10"] >= 0.075
    # 6.2 and 7.1 % above the warm start on one processor, 4.7 and 6.9 % on another, whose sums are rounded differently.
    assert min(row["ndcg@10"] for row in (supervised, full, expected, minirec)) >= 1.03 * warm["ndcg@10"]
    assert minirec["samples_per_epoch"] <= 0.1 * full["samples_per_epoch"]
    assert minirec["rollouts"]["training"] <= full["rollouts"]["training"] / 5
