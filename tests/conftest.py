import os
import signal

import pytest
from helpers.tiny_config import TINY

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def ctrl_c():
    """A shell that starts the tests in the background has them ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def toy_path(tmp_path):
    """A folder with the dataset `toy` of 1,500 interactions."""
    from helpers.toy_data import random_rows, write_dataset

    write_dataset(tmp_path / "data", random_rows(n=1500, n_users=25, n_moments=600, n_items=80))
    return tmp_path / "data"


@pytest.fixture
def toy_data(toy_path):
    """Makes a RecDataModule on the toy data."""
    from minirec_pl import RecDataModule

    def make(**options):
        return RecDataModule(str(toy_path), "toy", **{"warm_fraction": 0.8, "batch_size": 8, "seed": 1, **options})

    return make


@pytest.fixture
def tiny_policy(toy_data):
    """Makes an untrained policy bound to the toy catalogue, the same each time."""
    import torch

    from minirec_pl.policy import GenerativePolicy

    def make(**config):
        data = toy_data()
        data.setup("fit")
        torch.manual_seed(0)
        policy = GenerativePolicy(config={**TINY, **config})
        policy.bind(data.catalogue)
        return policy

    return make


@pytest.fixture
def make_trainer(tmp_path):
    """Makes a quiet CPU Trainer that writes below the test's folder."""
    from lightning.pytorch import Trainer

    def make(**options):
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        return Trainer(
            **{
                "accelerator": "cpu",
                "devices": 1,
                "default_root_dir": tmp_path / "run",
                "max_epochs": 2,
                "num_sanity_val_steps": 0,
                "limit_val_batches": 0,
                "enable_checkpointing": False,
                **quiet,
                **options,
            }
        )

    return make


@pytest.fixture(scope="session")
def command(tmp_path_factory):
    """The `minirec` command on a toy dataset, with a warm start in place."""
    from helpers.cli_tools import Command, write_toy

    from minirec_pl.cli.main import main

    folder = tmp_path_factory.mktemp("command")
    write_toy(folder / "data")
    made = Command(folder)
    assert main(made.warm(folder / "warm")) == 0
    return made


@pytest.fixture(scope="session")
def dashboard_run(tmp_path_factory):
    """A small fit with `SelectionDashboard` on an offline W&B run and CSV: (folder, its rows in W&B, what was seen)."""
    from helpers.dashboard_run import logged_run
    from helpers.wandb_file import history, read_run

    folder = tmp_path_factory.mktemp("dashboard")
    seen = logged_run(folder)
    return folder, history(read_run(folder)), seen


@pytest.fixture(params=["one token", "many tokens"])
def policy(request, tiny_policy, toy_data, tmp_path):
    """An untrained policy bound to the toy catalogue, with ids of one token or of many."""
    from helpers.plain_policy import many_token_policy

    if request.param == "one token":
        return tiny_policy()
    data = toy_data()
    data.setup("fit")
    return many_token_policy(tmp_path / "policy", data.catalogue)
