"""Seeds that a generator would not take are refused by everything that has one."""

import pytest
from helpers.cli_tools import sentence

from minirec_pl import RecDataModule
from minirec_pl.callbacks import EasyToHardCurriculum, GaussianCurriculum, HardToEasyCurriculum, MovingTargetCurriculum
from minirec_pl.cli.main import main
from minirec_pl.policy.semantic_ids import SemanticIds
from minirec_pl.selection import DEALRecSelector, KMeansSelector, RandomSelector
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.seeds import LARGEST_SEED, check_seed

CURRICULA = [EasyToHardCurriculum, GaussianCurriculum, HardToEasyCurriculum, MovingTargetCurriculum]
SEEDED = [RecDataModule, RandomSelector, KMeansSelector, DEALRecSelector, SemanticIds, *CURRICULA]


@pytest.mark.parametrize("kind", SEEDED)
@pytest.mark.parametrize("seed", [-1, LARGEST_SEED + 1])
def test_a_seed_out_of_range_is_refused(kind, seed):
    with pytest.raises(InputError, match=rf"seed is {seed}: give a whole number from 0 to {LARGEST_SEED}"):
        kind(seed=seed)


@pytest.mark.parametrize("kind", SEEDED)
@pytest.mark.parametrize("seed", [0, LARGEST_SEED])
def test_the_first_and_the_last_seed_are_taken(kind, seed):
    assert kind(seed=seed).seed == seed


@pytest.mark.parametrize("seed", [0, LARGEST_SEED])
def test_the_global_generators_take_them(seed):
    from lightning.pytorch import seed_everything

    from minirec_pl.utils.seeds import isolated_random_state

    with isolated_random_state():
        assert seed_everything(check_seed(seed)) == seed


@pytest.mark.parametrize("option", ["--seed_everything=-1", "--data.seed=-1"])
def test_a_fit_refuses_it_in_a_sentence(option, command, tmp_path, capsys):
    capsys.readouterr()
    assert main(command.warm(tmp_path / "runs", option)) == 2
    assert "is -1: give a whole number from 0 to" in sentence(capsys)
    assert not (tmp_path / "runs").exists()


def test_select_refuses_it_in_a_sentence(tmp_path, capsys):
    (tmp_path / "rewards.jsonl").write_text('{"sample_id": 0, "rewards": [0.5]}\n')
    assert main(["select", str(tmp_path / "rewards.jsonl"), "--seed=-1"]) == 2
    assert "--seed is -1" in sentence(capsys)
