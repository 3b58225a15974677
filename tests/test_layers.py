"""The import graph of the package, and that a broken rule is found."""

import shutil

import pytest
from helpers import layers


def test_no_import_goes_upward_and_no_two_files_import_each_other(capsys):
    assert layers.main() == 0, capsys.readouterr().out


@pytest.fixture
def copied(tmp_path):
    for folder in ("minirec_pl", "callbacks"):
        ignored = shutil.ignore_patterns("__pycache__", "callbacks") if folder == "minirec_pl" else None
        shutil.copytree(layers.ROOT / folder, tmp_path / folder, ignore=ignored)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("minirec_pl/policy/trie.py", "from minirec_pl.grpo.loss import policy_loss", "which is not below it"),
        ("minirec_pl/grpo/loss.py", "import minirec_pl.trainers.grpo", "which is not below it"),
        ("minirec_pl/utils/cost.py", "from minirec_pl.data import samples", "which is not below it"),
        (
            "minirec_pl/reporting/plots.py",
            "from minirec_pl.callbacks import MiniRec",
            "which only cli, cli.compare may",
        ),
        ("minirec_pl/data/samples.py", "from minirec_pl.data.splits import Parts", "files import each other"),
        ("minirec_pl/grpo/loss.py", "from minirec_pl.grpo import kl_k3", "which is for users"),
        ("minirec_pl/grpo/loss.py", "from minirec_pl import InputError", "which is for users"),
        ("minirec_pl/corner/file.py", "x = 1", "in a folder without a floor"),
    ],
)
def test_a_broken_rule_is_found(copied, file, line, said):
    path = copied / file
    path.parent.mkdir(exist_ok=True)
    before = path.read_text() if path.exists() else ""
    path.write_text(f"{before}\n\ndef late():\n    {line}\n")
    broken = layers.faults(copied)[1]
    assert any(said in fault for fault in broken), broken
