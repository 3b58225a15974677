import filecmp

from helpers.cli_tools import sentence
from helpers.paths import CONFIGS

from minirec_pl.cli.main import main


def test_it_writes_the_shipped_configs_and_overwrites_none(tmp_path, capsys):
    assert main(["init", str(tmp_path / "mine")]) == 0
    written = tmp_path / "mine" / "configs"
    names = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))
    assert capsys.readouterr().out.splitlines()[: len(names)] == [str(written / name) for name in names]
    assert filecmp.cmpfiles(CONFIGS, written, names, shallow=False) == (names, [], [])
    (written / names[0]).write_text("mine")
    assert main(["init", str(tmp_path / "mine")]) == 2
    assert "exists" in sentence(capsys)
    assert (written / names[0]).read_text() == "mine"


def test_without_a_folder_it_writes_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    assert (tmp_path / "configs" / "ml-100k" / "quickstart.yaml").is_file()
