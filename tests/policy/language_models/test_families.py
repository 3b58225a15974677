"""Every family of causal language models: right to 1e-5 in float64, or refused in one sentence."""

import json
import re

import pytest
from helpers import family_matrix
from helpers.families import FAMILIES, REFUSED, is_available, make_model
from helpers.family_matrix import (
    OUTCOMES,
    RAW,
    Matrix,
    Row,
    Truth,
    check_raw,
    details,
    family_rows,
    listed_families,
    main,
    markdown,
    summary,
)
from helpers.paths import DOCS

FAST = ("llama", "gemma2", "gpt2", "phi3_longrope", "mamba", "jamba")
MODELS_PAGE = DOCS / "models.md"


@pytest.mark.parametrize("name", FAST)
def test_a_family_of_each_kind_is_right_or_refused(name):
    check(name, family_rows(name, quick=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_right_or_refused(name):
    if not is_available(name):
        pytest.skip(f"this release of transformers has no {FAMILIES[name].kind}")
    check(name, family_rows(name))


def check(name, rows):
    faults = [row for row in rows if row.outcome in ("wrong", "crashed")]
    assert not faults, details(faults)
    refused = {row.check for row in rows if row.outcome == "refused"}
    parts = (REFUSED[name].checks or ("",)) if name in REFUSED else ()
    expected = {
        row.check for row in rows if row.outcome in OUTCOMES and any(re.search(part, row.check) for part in parts)
    }
    assert refused == expected, details([row for row in rows if row.outcome == "refused"])
    assert all("Traceback" not in row.sentence for row in rows)


def test_there_are_fifty_families_of_every_kind():
    assert len({family.kind for name, family in FAMILIES.items() if name not in REFUSED}) >= 50
    assert set(REFUSED) < set(FAMILIES)
    assert set(FAST) < set(FAMILIES)


def test_a_fault_of_each_kind_is_seen(monkeypatch):
    logps = family_matrix.raw_completion_logps

    def shifted(*arguments):
        got = logps(*arguments)
        return got._replace(logps=got.logps + 1e-4)

    def broken(*arguments, **options):
        raise IndexError("no cache")

    monkeypatch.setattr(family_matrix, "raw_completion_logps", shifted)
    monkeypatch.setattr(family_matrix, "raw_generate", broken)
    model, matrix = make_model("llama"), Matrix("llama")
    check_raw(matrix, "whole model", model, Truth(model), RAW)
    outcomes = {row.check.removeprefix("whole model: "): row for row in matrix.rows}
    assert list(outcomes) == list(RAW)
    assert outcomes["completion_logps, unequal lengths"].outcome == "wrong"
    assert outcomes["completion_logps, unequal lengths"].gap == pytest.approx(1e-4, rel=1e-2)
    assert outcomes["generate"].outcome == "crashed"
    assert "IndexError: no cache" in outcomes["generate"].sentence


ROWS = [
    Row("llama", "whole model: generate", "right", 1e-7, ""),
    Row("llama", "Lora() by default", "adapted", 0.0, "q_proj, v_proj"),
    Row("gemma", "whole model: generate", "refused", 0.0, "GemmaForCausalLM cannot do it: take a llama"),
    Row("gemma", "whole model: completion_logps", "right", 0.0, ""),
]


def test_the_table_counts_outcomes():
    assert "2 families: 1 right in every cell, 1 right or refused, 0 with a wrong cell, 0 with a crash" in summary(ROWS)
    assert details(ROWS).startswith("gemma: refused in 1 cells: GemmaForCausalLM cannot do it")


def test_the_page_says_what_runs_and_what_is_refused():
    page = markdown(ROWS)
    assert listed_families(page) == ["llama", "gemma"]
    assert "| runs | q_proj, v_proj |" in page
    assert "GemmaForCausalLM cannot do it: take a llama" in page


def test_the_script_writes_cells_as_json(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(family_matrix, "family_rows", lambda name: [Row(name, "a", "right", 0.0, "")])
    assert main(["--families", "llama", "--json", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text())[0]["outcome"] in OUTCOMES
    assert "1 families: 1 right in every cell" in capsys.readouterr().out
    page = tmp_path / "models.md"
    assert main(["--rows", str(tmp_path / "out.json"), "--markdown", str(page)]) == 0
    assert listed_families(page.read_text()) == ["llama"]


@pytest.mark.skipif(not MODELS_PAGE.is_file(), reason="docs/models.md is made by tests/helpers/family_matrix.py")
def test_the_models_page_lists_the_families_of_this_matrix():
    assert listed_families(MODELS_PAGE.read_text(encoding="utf-8")) == list(FAMILIES)
