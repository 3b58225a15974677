"""The programs of the README run as they are printed, and its commands take the options that it names."""

import pytest
from helpers.cli_tools import REPOSITORY
from helpers.documents import blocks, check_options, commands, run_program

from minirec_pl.cli.main import OWN_HELP

PAGE = REPOSITORY / "README.md"
DROP_IN, RECOMMENDER = (block.text for block in blocks(PAGE) if block.language == "python")
COMMANDS = [words for block in blocks(PAGE) if block.language == "bash" for words in commands(block.text)]


def test_the_drop_in_program_trains_on_a_quarter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_program(DROP_IN, "README.md")
    from minirec_pl.selection import SelectionLedger

    (ledger,) = tmp_path.rglob("ledger.parquet")
    chosen = SelectionLedger.from_parquet(ledger).selected()
    assert len(chosen) == 500
    assert sorted(names["trainer"].train_dataloader.sampler.plan) == sorted(chosen)


def test_the_recommender_runs_on_the_data_and_policy_it_names(tmp_path, monkeypatch, toy_path, tiny_policy):
    """On a small stand-in of both, at the same places."""
    assert len(RECOMMENDER.splitlines()) < 15
    tiny_policy().save_pretrained(tmp_path / "runs/quickstart/warm_start/latest/policy")
    program = RECOMMENDER.replace('"ml-100k"', '"toy", warm_fraction=0.5').replace("(0.02, 0.95)", "(-1.0, 2.0)")
    assert program != RECOMMENDER
    monkeypatch.chdir(tmp_path)
    names = run_program(program, "README.md")
    assert 0.0 <= float(names["module"].trainer.callback_metrics["val/ndcg@10"]) <= 1.0


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_of_the_readme_takes_the_options_it_names(words):
    check_options(words)


def test_the_readme_names_every_command():
    text = PAGE.read_text(encoding="utf-8")
    assert [name for name in [*OWN_HELP, "fetch", "quickstart"] if f"minirec {name}" not in text] == []
