"""The programs of the README run as they are printed."""

import re
import sys

import pytest
from helpers.cli_tools import REPOSITORY
from helpers.documents import blocks, run_program

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
PROGRAMS = [block.text for block in blocks(REPOSITORY / "README.md") if block.language == "python"]


def test_the_table_is_filled_in():
    assert "minirec_pl." not in README
    assert "| `grpo_minirec` |" in README


def test_there_are_two_programs_and_the_first_is_short():
    assert len(PROGRAMS) == 2
    assert len(PROGRAMS[0].splitlines()) < 15


def test_the_drop_in_program_trains_on_a_quarter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_program(PROGRAMS[1], "README.md")
    from minirec_pl.selection import SelectionLedger

    (ledger,) = tmp_path.rglob("ledger.parquet")
    chosen = SelectionLedger.from_parquet(ledger).selected()
    assert len(chosen) == 500
    assert sorted(names["trainer"].train_dataloader.sampler.plan) == sorted(chosen)


def test_the_first_program_runs_on_the_data_and_policy_it_names(tmp_path, monkeypatch, toy_path, tiny_policy):
    """On a small stand-in of both, at the same places."""
    tiny_policy().save_pretrained(tmp_path / "runs/quickstart/warm_start/latest/policy")
    program = PROGRAMS[0].replace('"ml-100k"', '"toy", warm_fraction=0.5').replace("(0.02, 0.95)", "(-1.0, 2.0)")
    assert program != PROGRAMS[0]
    monkeypatch.chdir(tmp_path)
    names = run_program(program, "README.md")
    assert 0.0 <= float(names["module"].trainer.callback_metrics["val/ndcg@10"]) <= 1.0


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^    minirec (\w+)", README, flags=re.MULTILINE))))
def test_every_command_of_the_readme_exists(command):
    from minirec_pl.cli.main import main

    with pytest.raises(SystemExit) as stop:
        sys.exit(main([command, "--help"]))
    assert stop.value.code == 0
