"""The documentation: every block runs, every name and sentence it quotes exists, and the site is complete."""

import ast
import doctest
import inspect
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib import import_module

import numpy as np
import pandas as pd
import pytest
from helpers.documents import blocks, check_session, make_classes, run_block, write_workplace
from helpers.paths import DOCS, GOLDEN, REPOSITORY

PAGES = sorted(DOCS.glob("*.md"))
INSTALLED = ("compare", "getting-started", "language-models", "offline-selection", "own-data", "scaling")
OWN_FILES = "extending"  # its classes are in files of the user: test_installed.py runs it
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="session")
def made_workplace(command, tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs") / "workplace"
    write_workplace(folder, command.policy)
    return folder


@pytest.fixture
def workplace(made_workplace, tmp_path, monkeypatch):
    folder = shutil.copytree(made_workplace, tmp_path / "workplace", symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem != OWN_FILES], ids=lambda page: page.stem)
def test_every_block_of_a_page_runs_from_top_to_bottom(page, workplace):
    shown = blocks(page)
    if page.stem in INSTALLED:  # test_installed.py runs all, but reads YAML alone and leaves out scripts
        shown = [block for block in shown if block.text.startswith("#!") or block.language == "yaml"]
    for block in shown:
        try:
            run_block(block)
        except BaseException as error:
            error.add_note(block.place)
            raise


def test_no_block_is_indented_code_or_of_an_unknown_language():
    found = {block.language for page in PAGES for block in blocks(page)}
    assert found <= {"python", "pycon", "bash", "yaml", "text"}
    for page in PAGES:
        assert page.read_text().count("```") == 2 * len(blocks(page))


@pytest.fixture(scope="module")
def reference():
    pytest.importorskip("mkdocs")
    from reference_pages import reference_pages

    return reference_pages()


NAMED = ["minirec_pl", "minirec_pl.callbacks", "minirec_pl.selection", "minirec_pl.policy", "minirec_pl.rewards"]


@pytest.mark.parametrize("package", [*NAMED, "minirec_pl.data"])
def test_every_public_name_is_in_the_reference(package, reference):
    module = import_module(package)
    listed = getattr(module, "__all__", [name for name in dir(module) if not name.startswith("_")])
    names = {
        name for name in listed if inspect.isroutine(getattr(module, name)) or inspect.isclass(getattr(module, name))
    }
    if package == "minirec_pl.data":
        for found in (one for one in pkgutil.iter_modules(module.__path__) if not one.ispkg):
            tree = ast.parse((REPOSITORY / "minirec_pl" / "data" / f"{found.name}.py").read_text())
            names |= {
                node.name
                for node in tree.body
                if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_")
            }
    assert names
    headings = {match for page in reference.values() for match in re.findall(r"^## (\w+)$", page, re.MULTILINE)}
    assert names <= headings


def test_every_option_of_a_config_is_explained_in_the_reference(reference):
    from minirec_pl import GRPORecModule, RecDataModule
    from minirec_pl.callbacks import MiniRec
    from minirec_pl.cli.stages import WarmStart
    from minirec_pl.selection import MiniRecSelector

    for thing in (GRPORecModule, RecDataModule, MiniRec, MiniRecSelector, WarmStart):
        (page,) = [text for text in reference.values() if f"\n## {thing.__name__}\n" in text]
        entry = page.partition(f"\n## {thing.__name__}\n")[2].partition("\n## ")[0]
        rows = [line.strip("| ").split(" | ") for line in entry.splitlines() if line.startswith("| <code>")]
        explained = {row[0]: row for row in rows if len(row) == 4}
        for name, parameter in inspect.signature(thing).parameters.items():
            _, _, default, meaning = explained[f"<code>{name}</code>"]
            assert len(meaning) > 8
            if isinstance(parameter.default, (bool, int, float, str)):
                assert default == f"<code>{parameter.default!r}</code>"
            elif parameter.default is parameter.empty:
                assert default == "required"


def test_the_examples_that_the_reference_shows_are_true(tmp_path, monkeypatch):
    pytest.importorskip("mkdocs")
    from reference_pages import PAGES as REFERENCE
    from reference_pages import _described

    monkeypatch.chdir(tmp_path)
    things = {thing for _, _, places in REFERENCE.values() for _, thing in _described(places)}
    run = 0
    for thing in sorted(things, key=lambda one: f"{one.__module__}.{one.__qualname__}"):
        names = vars(import_module(thing.__module__))
        for test in doctest.DocTestFinder(recurse=False).find(thing, globs=dict(names)):
            failed: list[str] = []
            run += doctest.DocTestRunner().run(test, out=failed.append).attempted
            assert not failed, "".join(failed)
    assert run > 40


def test_the_files_of_the_architecture_page_are_there():
    named = set(re.findall(r"`((?:minirec_pl|callbacks)/[\w/.]*)`", (DOCS / "architecture.md").read_text()))
    assert len(named) > 40
    assert [path for path in sorted(named) if not (REPOSITORY / path).exists()] == []


def constants():
    """Every constant piece of a text in the code, adjacent literals joined."""
    folders = ("minirec_pl", "callbacks")
    for path in (path for folder in folders for path in (REPOSITORY / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_the_sentences_of_troubleshooting_are_said_by_the_code():
    quoted = re.findall(r"^\| `([^`]+)`", (DOCS / "troubleshooting.md").read_text(), flags=re.MULTILINE)
    assert len(quoted) > 25
    said = list(constants())
    assert [text for text in quoted if not any(text in one for one in said)] == []


def test_every_logged_figure_is_in_the_glossary(workplace, tmp_path):
    from minirec_pl.cli.main import main

    options = ["--model.beta=0.1", "--trainer.log_every_n_steps=1", f"--trainer.default_root_dir={tmp_path}/runs"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.logger=null"]
    assert main(["fit", "--config", "configs/ml-100k/quickstart.yaml", *options, *quiet]) == 0
    logged = set(pd.read_csv(tmp_path / "runs" / "latest" / "metrics.csv").columns) - {"epoch", "step"}
    listed = glossary()
    assert {name.replace("rewards/hit/", "rewards/NAME/") for name in logged} <= listed
    assert {"kl", "selection/size", "selection/overlap", "cost/scoring_seconds"} <= logged


def glossary():
    return set(re.findall(r"^\| `([^`]+)` \|", (DOCS / "metrics.md").read_text(), flags=re.MULTILINE))


def test_every_figure_of_the_glossary_is_one_of_the_code():
    said = set(constants())
    pieces = {piece for text in said for piece in re.split(r"[/ ]", text)}
    known = {name for name in glossary() if name.rpartition("/")[2] in pieces or name in said}
    computed = {"rewards/NAME/mean", "val/hit_rate@10", "val/ndcg@10", "val/coverage@10"}
    computed |= {
        "cost/warm_start_seconds",
        "cost/training_seconds",
        "selection/ragged_repeat",
        "selection/ragged_drop",
        "selection/dropped_limit",
        "selection/dropped_incomplete_batch",
        "selection/dropped_early_stop",
        "selection/dropped_no_loss",
        "selection/predicted_reliability/mean_1",
        "selection/predicted_reliability/observed_1",
        "selection/coverage/user_id",
        "selection/coverage/item_id",
    }
    assert glossary() - known <= computed


def test_the_cost_table_holds_the_sums_that_the_session_prints():
    text = (DOCS / "scaling.md").read_text()
    sums = [float(value) for value in re.findall(r", ([\d.]+)\]", text)][:5]
    rows = re.findall(r"\| ([\d.]+) G \| (\d+) % \| ([\d,]+) \|", text)
    assert [float(row[0]) for row in rows] == sums
    assert [int(row[1]) for row in rows] == [round(100 * value / sums[0]) for value in sums]
    hours = [int(row[2].replace(",", "")) for row in rows]
    assert hours == pytest.approx([value * 1e9 / 1000 / 3600 for value in sums], rel=0.01)


def paper_rows():
    for line in (DOCS / "papers.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and len(cells) == 4:
            yield cells


def test_every_paper_that_the_code_names_is_in_the_index():
    named = set()
    for folder in ("minirec_pl", "callbacks", "configs"):
        for path in (REPOSITORY / folder).rglob("*.*"):
            if path.suffix in (".py", ".yaml"):
                named |= set(re.findall(r"(?:arXiv|abs/)\s*(\d{4}\.\d{5})", path.read_text().replace("\n", " ")))
    assert len(named) > 20
    assert named <= set(re.findall(r"\d{4}\.\d{5}", (DOCS / "papers.md").read_text()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [cells[3].strip("`") for cells in paper_rows() if cells[3].startswith("`--")], ids=str
)
def test_the_options_of_a_paper_are_taken(options, workplace):
    make_classes(["--config", "configs/ml-100k/quickstart.yaml", *options.split()])


@pytest.mark.skipif(not GOLDEN.is_file(), reason="the published figures are not on this machine")
def test_what_the_method_page_says_of_the_published_scores():
    text = (DOCS / "method.md").read_text()
    published = np.load(GOLDEN)
    reward = published["rewards"].mean(axis=1)
    picked = np.isin(published["sample_id"], published["selected_256"])
    shares = {
        "zero NDCG in every rollout": (published["ndcg"] == 0).all(axis=1).mean(),
        "learnability below 0.05": (published["learnability"] < 0.05).mean(),
        "first 256 picks have a mean reward below 0.05": (reward[picked] < 0.05).mean(),
        "within the gate": ((reward >= 0.05) & (reward <= 0.95)).mean(),
    }
    for words, share in shares.items():
        assert re.search(rf"{share * 100:.0f} % [^.;]*{words}", " ".join(text.split())), (words, share)


class Assets(HTMLParser):
    """What a page asks for when it is opened: scripts, styles, pictures, fonts."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source") and given.get("src"):
            self.found.append(given["src"])
        if tag == "link" and given.get("rel") not in ("canonical", "next", "prev"):
            self.found.append(given.get("href"))


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_asks_for_nothing_outside(tmp_path):
    pytest.importorskip("material")
    site = tmp_path / "site"
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    proxy = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        build, cwd=REPOSITORY, env={**os.environ, **proxy}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    pages = sorted(site.rglob("*.html"))
    assert len(pages) >= len(PAGES) + 8
    for page in pages:
        reader = Assets()
        reader.feed(page.read_text(encoding="utf-8"))
        assert reader.found
        for place in reader.found:
            assert not re.match(r"(?:\w+:)?//", place), (page, place)
            home = site if place.startswith("/") else page.parent  # 404.html is served anywhere
            assert (home / place.partition("?")[0].lstrip("/")).exists(), (page, place)
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import )[\"']?(?:https?:)?//", sheet.read_text(encoding="utf-8"))


def test_sessions_are_compared():
    from helpers.documents import Block

    check_session(Block("here", "pycon", ">>> 1 + 1\n2\n"))
    with pytest.raises(AssertionError, match="Expected"):
        check_session(Block("here", "pycon", ">>> 1 + 1\n3\n"))
