"""Every key of workspace and report is logged by a real fit; both are built without a network."""

import json
import os
import socket
import subprocess
import sys

import pytest

from minirec_pl.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore")
GO = ["dashboard", "--entity", "me", "--project", "minirec"]
EXAMPLE = "as in `minirec dashboard --entity me --project minirec`"


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(AssertionError):
        socket.create_connection(("127.0.0.1", 9))


@pytest.fixture
def printed(no_network, capsys):
    """What `--dry-run` prints, with a panel of each kind."""
    assert main([*GO, "--dry-run"]) == 0
    return json.loads(capsys.readouterr().out)


def parts(value):
    """The dictionaries in a JSON value, at any depth."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from parts(inner)


def panels_of(spec):
    return [part for part in parts(spec) if "viewType" in part and "config" in part]


def table_keys(panel):
    """What a chart or a panel of a table reads."""
    for part in parts(panel["config"]):
        if part.get("name") == "tableKey":
            yield part["value"]
        if part.get("fromOp", {}).get("name") == "pick" and "key" in part["fromOp"]["inputs"]:
            yield part["fromOp"]["inputs"]["key"]["val"]


@pytest.mark.parametrize("name", ["workspace", "report"])
def test_the_key_of_every_panel_is_logged(dashboard_run, printed, name):
    _, rows, _ = dashboard_run
    panels = panels_of(printed[name])
    kinds = {kind: [panel for panel in panels if panel["viewType"] == kind] for kind in {p["viewType"] for p in panels}}
    assert kinds.keys() == {"Run History Line Plot", "Media Browser", "Vega2", "Weave"}
    for panel in kinds["Run History Line Plot"]:
        x, names = panel["config"]["xAxis"], panel["config"]["metrics"]
        assert names
        for y in names:
            assert any(isinstance(row.get(y), int | float) and isinstance(row.get(x), int | float) for row in rows), y
    for panel in kinds["Media Browser"]:
        for key in panel["config"]["mediaKeys"]:
            assert any(key in row and row[key]["_type"] == "histogram" for row in rows), key
    tables = [key for panel in kinds["Vega2"] + kinds["Weave"] for key in table_keys(panel)]
    assert sorted(tables) == ["curriculum/plan"] * 2 + ["selection/ledger"] * 2
    for key in tables:
        assert any(key in row and row[key]["_type"] == "table-file" for row in rows), key


def test_charts_name_columns_of_their_table(dashboard_run, printed):
    folder, rows, _ = dashboard_run
    (files,) = folder.glob("wandb/offline-run-*/files")
    charts = [panel for panel in panels_of(printed["workspace"]) if panel["viewType"] == "Vega2"]
    assert len(charts) == 2
    for chart in charts:
        (key,) = table_keys(chart)
        path = next(row[key]["path"] for row in rows if key in row)
        assert set(chart["config"]["fieldSettings"].values()) <= set(json.loads((files / path).read_text())["columns"])


def test_both_name_entity_and_project_and_have_the_same_panels(printed):
    assert (printed["workspace"]["entity"], printed["workspace"]["project"]) == ("me", "minirec")
    assert printed["report"]["project"] == {"name": "minirec", "entityName": "me"}
    contents = [
        sorted(json.dumps(panel["config"], sort_keys=True) for panel in panels_of(printed[name]))
        for name in ("workspace", "report")
    ]
    assert contents[0] == contents[1]
    for name in ("workspace", "report"):
        titles = [
            panel["config"]["chartTitle"] for panel in panels_of(printed[name]) if "chartTitle" in panel["config"]
        ]
        assert len(set(titles)) == len(titles) > 20


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--project", "minirec"], f"--entity is None: give the name of a W&B user or team, {EXAMPLE}"),
        (["--entity", "me"], f"--project is None: give the name of a W&B project, {EXAMPLE}"),
        (["--entity", "me", "--project", "me/x"], f"--project is 'me/x': give the name of a W&B project, {EXAMPLE}"),
        (["--entity", "me", "--to", "x"], "unknown option to: see `minirec dashboard --help`"),
    ],
)
def test_bad_arguments_in_one_sentence(capsys, words, message):
    assert main(["dashboard", *words]) == 2
    assert capsys.readouterr().err == f"minirec: error: {message}\n"


def test_without_the_extra(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb_workspaces"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert main([*GO, "--dry-run"]) == 2
    expected = "minirec dashboard needs wandb-workspaces: pip install 'minirec-pl[dashboard]'"
    assert capsys.readouterr().err == f"minirec: error: {expected}\n"


@pytest.fixture
def stranger(monkeypatch, tmp_path):
    """Nobody is logged in to W&B, whose server does not answer."""
    import wandb

    wandb.teardown()
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    yield
    wandb.teardown()


def test_without_a_login(stranger, capsys):
    assert main(GO) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == "minirec: error: you are not logged in to W&B: run `wandb login`, or use --dry-run"


@pytest.mark.slow
def test_without_a_network(tmp_path):
    nobody = {
        "WANDB_API_KEY": "0123456789" * 4,
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "NETRC": str(tmp_path / "netrc"),
    }
    command = [sys.executable, "-m", "minirec_pl", *GO]
    done = subprocess.run(command, env=os.environ | nobody, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    error = done.stderr.splitlines()[-1]
    assert error.startswith("minirec: error: W&B did not answer as it should (")
    assert error.endswith("check the network, `wandb login`, and that you may write to me/minirec")
