import base64
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from helpers.cli_tools import sentence

from minirec_pl.cli.main import main
from minirec_pl.reporting.runs import read_runs
from minirec_pl.selection import MiniRecSelector, SampleSignals, SignalStore

SECTIONS = ["headline", "quality", "rewards", "learnability", "terms", "map", "plan", "samples", "cost", "config"]
VOID = {"meta", "img"}


class Page(HTMLParser):
    """What a browser would see of a page: tags with attributes, texts by section, numbers, pictures."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.tags, self.stack, self.texts, self.rows = [], [], {}, []
        self.section = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self.stack, f"never closed: {self.stack}"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "section":
            self.section = attributes["id"]
        if tag == "tr":
            self.rows.append((self.section, []))
        if tag == "data":
            self.rows[-1][1].append(float(attributes["value"]))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag
        if tag == "section":
            self.section = ""

    def handle_data(self, data):
        self.texts.setdefault(self.section, []).append(data)

    def text(self, section):
        return " ".join(" ".join(self.texts[section]).split())

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def numbers(self, section):
        return [numbers for where, numbers in self.rows if where == section and numbers]

    def pictures(self):
        prefix = "data:image/svg+xml;base64,"
        return [base64.b64decode(picture["src"].removeprefix(prefix)).decode() for picture in self.of("img")]


def make(*arguments):
    assert main(["report", *map(str, arguments)]) == 0


@pytest.fixture(scope="module")
def runs(command):
    """A GRPO run with a selection and a test beside it, one without selection, and the warm start."""
    roots = {name: command.folder / f"report-{name}" for name in ("picked", "full")}
    assert main(command.grpo(roots["picked"])) == 0
    assert main(["test", "--ckpt_path", str(roots["picked"] / "version_0" / "checkpoints" / "best.ckpt")]) == 0
    assert main(command.fit("quickstart.yaml", roots["full"], "--selection=null", *_policy(command))) == 0
    return {name: root / "version_0" for name, root in roots.items()} | {"warm": command.folder / "warm" / "version_0"}


def _policy(command):
    return ["--model.num_generations=4", f"--model.policy.pretrained={command.policy}", "--test_stages=true"]


@pytest.fixture(scope="module")
def pages(runs, tmp_path_factory):
    to = tmp_path_factory.mktemp("pages") / "all.html"
    make(*runs.values(), "--to", to)
    return to


def test_all_sections_are_in_the_contents(pages):
    page = Page(pages)
    assert [section["id"] for section in page.of("section")] == SECTIONS
    assert [link["href"] for link in page.of("a")] == [f"#{name}" for name in SECTIONS]
    assert all(page.text(name) for name in SECTIONS)
    headings = [tag for tag, _ in page.tags if tag in ("h1", "h2")]
    assert headings == ["h1", "h2", *["h2"] * len(SECTIONS)]
    assert page.of("html") == [{"lang": "en"}]


def test_nothing_is_loaded_or_run(pages):
    page = Page(pages)
    forbidden = {"script", "link", "iframe", "object", "embed", "base", "form"}
    assert not forbidden & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("srcset", "style", "background")]
        assert all(value.startswith("data:") for name, value in attributes.items() if name == "src")
        assert all(value.startswith("#") for name, value in attributes.items() if name == "href")
    css = " ".join(page.texts[""])
    assert "url(" not in css
    assert "@import" not in css
    (policy,) = [meta["content"] for meta in page.of("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'")
    for svg in page.pictures():
        links = re.findall(r'href="([^"]*)"', svg) + re.findall(r"url\(([^)]*)\)", svg)
        assert all(link.startswith(("#", "data:")) for link in links)
        assert "<script" not in svg


def test_pictures_have_words(pages):
    page = Page(pages)
    pictures = page.of("img")
    assert len(pictures) == len(page.of("figure")) == len(page.of("figcaption")) >= 14
    assert all(len(picture["alt"]) > 30 for picture in pictures)
    assert len({picture["alt"] for picture in pictures}) == len(pictures)
    assert all(svg.count("<path") > 5 for svg in page.pictures())


def test_headline_numbers_are_those_of_the_results(runs, pages):
    rows = Page(pages).numbers("headline")
    results = {name: json.loads((run / "results.json").read_text()) for name, run in runs.items()}
    tested = json.loads((runs["picked"].parent / "version_1" / "results.json").read_text())
    assert tested["stage"] == "test"

    def spent(row):
        sums = [row["rollouts"]["scoring"], row["rollouts"]["training"], *row["tokens"].values()]
        return [*sums, sum(row["seconds"].values())]

    def with_errors(row):
        names = ("hit_rate@10", "hit_rate@10_se_users", "ndcg@10", "ndcg@10_se_users")
        return [row[name] for name in names]

    picked, full, warm = (results[name] for name in ("picked", "full", "warm"))
    stages = [[*with_errors(row), *spent(row)] for row in full["stages"][:-1]]
    last = [*with_errors(full["stages"][-1]), full["samples_per_epoch"], *spent(full["stages"][-1])]
    assert rows == [
        [*with_errors(tested), picked["samples_per_epoch"], *spent(picked)],
        *stages,
        last,
        [*with_errors(warm["validation"]), warm["samples_per_epoch"], *spent(warm)],
    ]


def test_costs_add_up(runs, pages):
    rows = Page(pages).numbers("cost")
    results = [json.loads((run / "results.json").read_text()) for run in runs.values()]
    rollouts, forward, backward, seconds = np.array(rows).sum(axis=0)
    assert rollouts == sum(sum(row["rollouts"].values()) for row in results)
    assert forward == sum(row["tokens"]["forward"] for row in results)
    assert backward == sum(row["tokens"]["backward"] for row in results)
    assert seconds == pytest.approx(sum(sum(row["seconds"].values()) for row in results))


def test_what_a_run_lacks_is_said(runs, pages):
    page = Page(pages)
    lacking = "report-full/version_0, warm/version_0: nothing was selected"
    for name in ("rewards", "learnability", "terms", "map", "samples"):
        assert lacking in page.text(name)
    assert "report-full/version_0, warm/version_0: no plan is stored" in page.text("plan")
    assert "warm/version_0: no rollouts were spent" in page.text("quality")


def test_samples_are_shown_in_words(runs, pages):
    ledger = pd.read_parquet(runs["picked"] / "ledger.parquet").set_index("sample_id")
    examples = pd.read_parquet(runs["picked"] / "examples.parquet").set_index("sample_id")
    text = Page(pages).text("samples")
    picks = ledger[ledger["rank"].notna()]
    for sample_id in (picks["difficulty"].idxmax(), picks["difficulty"].idxmin()):
        assert str(sample_id) in text
        assert f"{' → '.join(examples.loc[sample_id, 'history'])} {examples.loc[sample_id, 'target']}" in text
    redundant = ledger[ledger["reason"] == "redundant"]
    if len(redundant):
        assert str(redundant["novelty"].idxmin()) in text
    assert (runs["picked"] / "config.yaml").read_text().split()[-1] in Page(pages).text("config")


def test_the_same_run_gives_the_same_page(runs, tmp_path):
    for name in ("one", "two"):
        make(runs["full"], "--to", tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


def test_text_from_data_is_escaped(runs, tmp_path):
    evil = "<script>alert('x')</script>\"&"
    run = tmp_path / "<b>runs" / "<img src=x onerror=y>"
    shutil.copytree(runs["picked"], run)
    examples = pd.read_parquet(run / "examples.parquet")
    examples["target"] = evil
    examples["history"] = [[evil, "</td></table>"]] * len(examples)
    examples.to_parquet(run / "examples.parquet")
    (run / "config.yaml").write_text(f"# </code></pre>{evil}\n" + (run / "config.yaml").read_text())
    diagnostics = json.loads((run / "diagnostics.json").read_text())
    (run / "diagnostics.json").write_text(json.dumps({**diagnostics, "warnings": [evil]}))
    make(run, "--to", tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert not {"script", "b"} & {tag for tag, _ in page.tags}
    assert not [picture for picture in page.of("img") if not picture["src"].startswith("data:")]
    assert evil in page.text("samples")
    assert evil in page.text("rewards")
    assert evil in page.text("config")
    assert "<b>runs/<img src=x onerror=y>" in page.text("headline")
    assert not [svg for svg in page.pictures() if "onerror" in re.sub(r"<!--.*?-->", "", svg)]


def test_a_quickstart_is_all_its_runs(runs, tmp_path):
    (tmp_path / "grpo_full").mkdir()
    (tmp_path / "grpo_full" / "latest").symlink_to(runs["full"])
    costs = {
        "rollouts": {"scoring": 3, "training": 4},
        "tokens": {"forward": 5, "backward": 6},
        "seconds": {"training": 7.25},
    }
    row = {"hit_rate@10": 0.125, "ndcg@10": 1 / 3, "samples_per_epoch": 12, "distinct_samples": 13, **costs}
    rows = [{"method": "popularity", **row}, {"method": "grpo_full", **row, "ndcg@10_se_users": 0.01}]
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows}))
    make(tmp_path)
    page = Page(tmp_path / "report.html")
    spent = [12.0, 3.0, 4.0, 5.0, 6.0, 7.25]
    assert page.numbers("headline") == [[0.125, 1 / 3, *spent], [0.125, 1 / 3, 0.01, *spent]]
    assert "grpo_full" in page.text("config")


def test_the_folder_of_runs_stands_for_the_latest(runs):
    of_root, of_run = (read_runs([folder]) for folder in (runs["picked"].parent, runs["picked"]))
    assert of_root[0] == of_run[0]
    assert [run.name for run in of_root[1]] == ["report-picked/version_0"]


def test_runs_are_named_by_their_real_folder_and_method(runs, tmp_path):
    links = [tmp_path / name / "latest" for name in ("picked", "full", "warm")]
    for link in links:
        link.parent.mkdir()
        link.symlink_to(runs[link.parent.name])
    make(*links, "--to", tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    named = {
        "report-picked/version_0": "GRPO on picks of MiniRec",
        "report-full/version_0": "GRPO on the whole pool",
        "warm/version_0": "warm start",
    }
    assert ", ".join(f"{name} ({method})" for name, method in named.items()) in page.text("")
    assert "latest" not in page.text("") + page.text("headline")
    for name, method in named.items():
        assert f"{name} {method} {runs['picked'].parents[1]}" in page.text("headline")


def test_easy_and_hard_picks_are_named_by_what_was_measured(pages):
    text = Page(pages).text("samples")
    for words in ("The easiest picks: those of the highest ", "The hardest picks: those of the lowest "):
        assert re.search(rf"{words}(mean reward|solve probability of a group of \d+) ", text)
    assert "(higher is easier)" in text


def test_equal_names_become_paths(runs, tmp_path):
    for place in ("a", "b"):
        shutil.copytree(runs["warm"], tmp_path / place / "x" / "version_0")
    make(tmp_path / "a" / "x" / "version_0", tmp_path / "b" / "x" / "version_0", "--to", tmp_path / "page.html")
    text = Page(tmp_path / "page.html").text("cost")
    assert f"{tmp_path}/a/x/version_0" in text
    assert f"{tmp_path}/b/x/version_0" in text


def test_a_large_selection_without_a_run_stays_small(tmp_path):
    """As many samples as the quickstart scores, and the folder that a Trainer of one's own leaves."""
    n = 10_000
    generator = torch.Generator().manual_seed(0)
    store = SignalStore(range(n))
    chance = torch.rand(n, generator=generator) ** 8
    vectors = torch.randn(2, n, 64, generator=generator)
    signals = SampleSignals(torch.arange(n), gradient=vectors[0], embedding=vectors[1], solve_probability=chance)
    store.update(signals, epoch=0, step=0, source="score")
    store.save(tmp_path / "signals.safetensors")
    selector = MiniRecSelector(difficulty="pass_at_group", num_generations=16)
    selector.select(store.pool_view(0), 500).to_parquet(tmp_path / "ledger.parquet")
    make(tmp_path)
    assert (tmp_path / "report.html").stat().st_size < 3e6
    page = Page(tmp_path / "report.html")
    assert "There is no results.json" in page.text("headline")
    assert "500 of 10,000 samples were picked" in page.text("rewards")
    assert len(page.of("img")) == 1 + 1 + 4 + 2
    assert "no texts of samples are stored" in page.text("samples")
    assert "there is no config.yaml" in page.text("config")


def test_bad_input_is_one_sentence(runs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for name in ("unfinished", "damaged"):
        shutil.copytree(runs["warm"], tmp_path / name)
    (tmp_path / "unfinished" / "results.json").unlink()
    (tmp_path / "damaged" / "results.json").write_text("{")
    capsys.readouterr()
    for folder, said in (
        (tmp_path / "absent", "there is no run folder"),
        (tmp_path / "empty", "is not a run folder"),
        (tmp_path / "unfinished", "has not finished"),
        (tmp_path / "damaged", "is damaged"),
        (runs["picked"].parent / "version_1", "minirec test"),
    ):
        assert main(["report", str(folder), "--to", str(tmp_path / "page.html")]) == 2
        text = sentence(capsys)
        assert said in text
        assert str(folder) in text
    assert not (tmp_path / "page.html").exists()
    assert main(["report", str(runs["warm"]), "--to", str(tmp_path / "damaged")]) == 2
    assert "cannot write" in sentence(capsys)


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_without_the_extra(package, runs, monkeypatch, capsys):
    import sys

    for name in [name for name in sys.modules if name.startswith("minirec_pl.reporting.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    capsys.readouterr()
    assert main(["report", str(runs["warm"])]) == 2
    assert f"needs {package}: pip install 'minirec-pl[report]'" in sentence(capsys)


def test_help_names_the_command(capsys):
    assert main(["report", "--help"]) == 0
    assert "RUN_DIR" in capsys.readouterr().out


def test_evaluations_end_with_the_results(runs):
    for run in runs.values():
        table = pd.read_csv(run / "evaluations.csv")
        results = json.loads((run / "results.json").read_text())
        assert len(table) == results["epochs"]
        last = table.iloc[-1]
        assert last["rollouts"] == sum(results["rollouts"].values())
        assert last["tokens"] == sum(results["tokens"].values())
        assert last["seconds"] <= sum(results["seconds"].values()) + 1e-2
        assert last["ndcg@10"] == pytest.approx(results["validation"]["ndcg@10"])
        assert (np.diff(table[["rollouts", "tokens", "seconds"]], axis=0) >= 0).all()
        assert table["epoch"].tolist() == list(range(1, len(table) + 1))
        assert last["ndcg@10_se_users"] == results["validation"]["ndcg@10_se_users"] > 0


def test_the_plan_orders_the_picks_from_easy_to_hard(runs):
    plan = pd.read_parquet(runs["picked"] / "plan.parquet")
    ledger = pd.read_parquet(runs["picked"] / "ledger.parquet")
    picks = ledger.loc[ledger["rank"].notna(), "sample_id"]
    config = yaml.safe_load((runs["picked"] / "config.yaml").read_text())
    assert sorted(plan["sample_id"]) == sorted(picks)
    assert plan["position"].tolist() == list(range(len(plan)))
    assert plan["fold"].max() + 1 == config["selection"]["init_args"]["curriculum"]["init_args"]["n_folds"]
    for _, fold in plan.groupby("fold"):
        assert fold["easiness"].is_monotonic_decreasing
    assert set(plan["epoch"]) == {2}
    assert set(plan["measure"]) == {"solve probability"}
