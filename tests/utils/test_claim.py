"""Which folder a run gets, whoever starts its processes."""

import os
import socket
import subprocess
import sys

import pytest
from helpers.cli_tools import REPOSITORY, results

from minirec_pl.utils.run_folder import claim_folder, is_first

STEP = {"SLURM_JOB_ID": "71", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}


@pytest.fixture
def clean(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("SLURM_", "MINIREC_", "LOCAL_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MINIREC_RUN_DIR", "")  # put back after the test, which sets it
    monkeypatch.delenv("MINIREC_RUN_DIR")
    return monkeypatch


def test_each_run_gets_the_next_folder(clean, tmp_path):
    assert [claim_folder(tmp_path).name for _ in range(3)] == ["version_0", "version_1", "version_2"]
    assert is_first()


def test_processes_that_lightning_starts_take_the_folder_of_the_first(clean, tmp_path):
    claimed = claim_folder(tmp_path)
    clean.setenv("LOCAL_RANK", "1")
    assert claim_folder(tmp_path) == claimed
    assert not is_first()


def test_tasks_of_a_slurm_step_share_a_folder(clean, tmp_path):
    for name, value in STEP.items():
        clean.setenv(name, value)
    found = []
    for rank in ("0", "1"):
        clean.setenv("SLURM_PROCID", rank)
        found.append((claim_folder(tmp_path).name, is_first()))
    assert found == [("slurm_71_0", True), ("slurm_71_0", False)]
    clean.setenv("SLURM_JOB_NAME", "interactive")
    assert claim_folder(tmp_path).name == "version_0"


@pytest.mark.slow
def test_a_fit_of_two_slurm_tasks_leaves_one_run(clean, command, tmp_path):
    """Two processes with the variables that `srun` sets, on gloo, with the callbacks of the config."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = ["--trainer.devices=2", "--trainer.num_nodes=1", "--trainer.strategy=ddp"]
    words = [sys.executable, "-m", "minirec_pl", *command.grpo(tmp_path / "runs", *ranks)]
    tasks, log = [], tmp_path / "log"
    with log.open("w") as lines:
        for rank in ("0", "1"):
            own = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost"}
            own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
            env = {**os.environ, **STEP, **own}
            tasks.append(subprocess.Popen(words, cwd=REPOSITORY, env=env, stdout=lines, stderr=lines))
        try:
            codes = [task.wait(timeout=400) for task in tasks]
        finally:
            for task in tasks:
                task.kill()
    assert codes == [0, 0], log.read_text()
    assert sorted(os.listdir(tmp_path / "runs")) == ["latest", "slurm_71_0"]
    run = tmp_path / "runs" / "latest"
    assert {"config.yaml", "ledger.parquet", "policy", "results.json"} <= set(os.listdir(run))
    assert 0 <= results(run)["best"]["val/ndcg@10"] <= 1
