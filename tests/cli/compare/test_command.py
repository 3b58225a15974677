"""`minirec compare` on a study whose cells take a moment: repeatable, resumable, honest about what it spent."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from helpers.cli_tools import sentence, write_toy
from helpers.compare_tools import BASE, write_study

from minirec_pl.cli.compare.results import read_cell
from minirec_pl.cli.compare.study import Study
from minirec_pl.cli.compare.tasks import Parts, cell_path, warm_folder
from minirec_pl.cli.main import main
from minirec_pl.policy import GenerativePolicy


def cells_of(to):
    return sorted((to / "cells").rglob("*.safetensors"))


def outcome(path):
    """What must not depend on the machine's pace: ranks and selections, tokens and rollouts at each point."""
    content, settings = read_cell(path)
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    costs = [{name: value for name, value in point.items() if name != "seconds"} for point in settings["points"]]
    return tensors, costs, settings["fingerprint"]


def same(one, other):
    tensors, costs, fingerprint = outcome(one)
    others = outcome(other)
    assert tensors.keys() == others[0].keys()
    assert all(torch.equal(value, others[0][name]) for name, value in tensors.items())
    assert (costs, fingerprint) == others[1:]


def test_model_and_data_of_a_cell_are_made_without_a_run(tmp_path):
    write_study(tmp_path)
    words = [f"--config={tmp_path / 'base.yaml'}", f"--data.path={tmp_path / 'data'}"]
    module, data = Parts([*words, "--model.num_generations=3"]).read()
    assert module.num_generations == 3
    assert module.policy.item_logps(next(iter(data.val_dataloader()))).shape[1] == len(data.catalogue)
    assert {path.name for path in tmp_path.iterdir()} == {"base.yaml", "study.yaml", "data"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole study, run by two workers."""
    folder = tmp_path_factory.mktemp("study")
    path = write_study(folder)
    assert main(["compare", "--config", str(path), "--to", str(folder / "to"), "--jobs", "2"]) == 0
    return path, folder / "to"


@pytest.mark.slow
def test_the_table_has_a_row_per_cell_point_and_split(finished):
    path, to = finished
    table = pd.read_parquet(to / "study.parquet")
    assert len(table) == 2 * 2 * (2 + 3 + 3)  # seeds, splits, points of full, random and minirec
    assert set(table["split"]) == {"validation", "test"}
    assert table.notna().all().all()
    assert not list(to.rglob("*.tmp"))
    study = Study.read(path)
    for cell in study.cells():
        content, _ = read_cell(cell_path(to, cell))
        ranks = content["test_ranks"][-1].double()
        own = table[(table["method"] == cell.method.name) & (table["seed"] == cell.seed) & (table["split"] == "test")]
        last = own[own["epoch"] == own["epoch"].max()].iloc[0]
        plain = [1 / np.log2(1 + rank) if rank <= 10 else 0.0 for rank in ranks.tolist()]
        assert last["ndcg@10"] == pytest.approx(np.mean(plain), rel=1e-12)
        assert last["hit_rate@10"] == pytest.approx(np.mean([rank <= 10 for rank in ranks.tolist()]), rel=1e-12)


@pytest.mark.slow
def test_methods_start_alike_and_costs_add_up(finished):
    table = pd.read_parquet(finished[1] / "study.parquet")
    start = table[table["epoch"] == 0].groupby(["seed", "split"], observed=True)
    assert (start["ndcg@10"].nunique() == 1).all()
    assert (table["tokens"] == table["tokens_warm_start"] + table["tokens_scoring"] + table["tokens_training"]).all()
    assert (table["tokens_warm_start"] > 0).all()
    random, minirec = (table[table["method"] == name] for name in ("random", "minirec"))
    assert (random["tokens_scoring"] == 0).all()
    trained = minirec[minirec["epoch"] > 0].sort_values("epoch")
    assert (trained["tokens_scoring"] > 0).all()
    by_epoch = trained.groupby("epoch")["tokens_scoring"].max()
    assert by_epoch[2] == 2 * by_epoch[1]  # scored before each epoch, and not after the last
    assert (trained["seconds_scoring"] > 0).all()


@pytest.mark.slow
def test_a_cell_alone_gives_the_same_bit_for_bit(finished, tmp_path):
    path, to = finished
    study = Study.read(path)
    cell = study.cells()[-1]
    assert main(["compare", "--config", str(path), "--to", str(tmp_path), "--cell", cell.id]) == 0
    assert cells_of(tmp_path) == [cell_path(tmp_path, cell)]
    same(cell_path(tmp_path, cell), cell_path(to, cell))


@pytest.mark.slow
def test_one_worker_and_a_new_warm_start_give_the_same(finished, tmp_path):
    path, to = finished
    assert main(["compare", "--config", str(path), "--to", str(tmp_path), "--only", "*/1"]) == 0
    assert len(cells_of(tmp_path)) == 3
    for file in cells_of(tmp_path):
        same(file, to / file.relative_to(tmp_path))


@pytest.mark.slow
def test_the_same_command_again_runs_nothing(finished, capsys):
    path, to = finished
    before = {file: file.stat().st_mtime_ns for file in cells_of(to)}
    assert main(["compare", "--config", str(path), "--to", str(to)]) == 0
    assert "6 cells, 6 of them finished" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in cells_of(to)} == before


@pytest.mark.slow
def test_each_seed_may_bring_data_and_an_untrained_policy_of_its_own(tmp_path):
    for seed in (1, 2):
        write_toy(tmp_path / str(seed))
        (tmp_path / f"{seed}.yaml").write_text(yaml.safe_dump(BASE))
        words = [f"--config={tmp_path / f'{seed}.yaml'}", f"--data.path={tmp_path / str(seed)}", "--data.dataset=toy"]
        torch.manual_seed(seed)
        module, _ = Parts([*words, f"--model.policy.config.hidden_size={16 * seed}"]).read()
        module.policy.save_pretrained(tmp_path / f"{seed}/policy")
    own = {
        "class_path": "minirec_pl.policy.GenerativePolicy",
        "init_args": {"pretrained": "{path}/{seed}/policy", "config": None},
    }
    data = {"name": "toy", "path": str(tmp_path), "overrides": {"data.path": "{path}/{seed}", "model.policy": own}}
    path = write_study(tmp_path, datasets=[data])
    assert main(["compare", "--config", str(path), "--to", str(tmp_path / "to"), "--only", "*/random/*"]) == 0
    warm = sorted((tmp_path / "to/warm/toy").glob("*/policy"))
    assert [GenerativePolicy(pretrained=str(one)).model.config.hidden_size for one in warm] == [16, 32]
    assert len(cells_of(tmp_path / "to")) == 2


@pytest.mark.slow
def test_a_changed_study_is_refused(finished, tmp_path, capsys):
    path, to = finished
    changed = tmp_path / "study.yaml"
    changed.write_text(path.read_text().replace("epochs: 2", "epochs: 3"))
    assert main(["compare", "--config", str(changed), "--to", str(to)]) == 2
    said = sentence(capsys)
    assert "was run with another study" in said
    assert "random/0.5/1.safetensors" in said


@pytest.mark.slow
def test_a_cell_that_fails_is_named_and_the_others_go_on(tmp_path, capsys):
    methods = {
        "broken": {"overrides": {"model.rewards": ["helpers.cli_tools.nan_reward"]}},
        "random": {"overrides": {"selection.selector": "minirec_pl.selection.RandomSelector"}},
    }
    path = write_study(tmp_path, methods=methods, references=[], seeds=[1], epochs=1)
    assert main(["compare", "--config", str(path), "--to", str(tmp_path / "to")]) == 1
    out = capsys.readouterr().out
    assert "failed: toy/late/broken/0.5/1: " in out
    assert [file.parent.parent.name for file in cells_of(tmp_path / "to")] == ["random"]


@pytest.mark.slow
def test_ctrl_c_keeps_whole_cells_and_the_next_run_goes_on(finished, tmp_path):
    path, to = finished
    command = [sys.executable, "-m", "minirec_pl", "compare", "--config", str(path), "--to", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "tests"})
    deadline = time.monotonic() + 180
    while not cells_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 2
    assert "interrupted" in process.stderr.read()
    kept = cells_of(tmp_path)
    assert 0 < len(kept) < 6
    assert not list(tmp_path.rglob("*.tmp"))
    assert main(command[3:]) == 0
    for file in cells_of(tmp_path):
        same(file, to / file.relative_to(tmp_path))
    assert len(cells_of(tmp_path)) == 6


@pytest.mark.slow
def test_a_grid_leaves_the_test_part_alone(tmp_path):
    path = write_study(tmp_path, grid={"fast": {"model.optimizer.lr": 0.1}}, seeds=[1], epochs=1)
    assert main(["compare", "--config", str(path), "--to", str(tmp_path / "to"), "--only", "*/random@fast/*"]) == 0
    table = pd.read_parquet(tmp_path / "to" / "study.parquet")
    assert set(table["split"]) == {"validation"}
    assert set(table["setting"]) == {"fast"}
    assert "test_ranks" not in read_cell(cells_of(tmp_path / "to")[0])[0]


def compare(path, *more):
    return main(["compare", "--config", str(path), "--to", str(path.parent / "to"), *more])


def test_an_unknown_cell_and_a_pattern_without_cells_are_refused(tmp_path, capsys):
    path = write_study(tmp_path)
    assert compare(path, "--cell", "toy/late/best/0.5/1") == 2
    assert "there is no cell 'toy/late/best/0.5/1'" in sentence(capsys)
    assert compare(path, "--only", "other/*") == 2
    assert "matches no cell" in sentence(capsys)
    assert not (tmp_path / "to").exists()


def test_a_missing_study_and_an_unwritable_folder_are_refused(tmp_path, capsys):
    assert compare(tmp_path / "none.yaml") == 2
    assert "cannot be read" in sentence(capsys)
    path = write_study(tmp_path)
    (tmp_path / "to").write_text("a file")
    assert compare(path) == 2
    assert "choose another --to" in sentence(capsys)


@pytest.mark.slow
def test_an_override_that_the_fit_does_not_take_is_refused_before_anything_is_trained(tmp_path, capsys):
    path = write_study(tmp_path, methods={"odd": {"overrides": {"model.temprature": 1.0}}}, references=[])
    assert compare(path) == 2
    said = sentence(capsys)
    assert "odd/0.5/1" in said
    assert "temprature" in said
    assert not (tmp_path / "to" / "warm").exists()


@pytest.mark.slow
def test_missing_data_are_named(tmp_path, capsys):
    path = write_study(tmp_path)
    assert compare(path, "--path", f"toy={tmp_path / 'nowhere'}", "--cell", "toy/late/random/0.5/1") == 1
    out = capsys.readouterr().out
    assert "failed: toy/late/random/0.5/1: its warm start failed" in out
    assert "toy.inter is missing" in out
    study = Study.read(path)
    assert not warm_folder(tmp_path / "to", study, study.data[0], 1).exists()
