"""The example programs run, at small settings."""

import importlib.util
import json
from pathlib import Path

import pytest
from helpers.paths import REPOSITORY

EXAMPLES = REPOSITORY / "examples"
pytestmark = pytest.mark.filterwarnings("ignore")


def load(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_digits_writes_accuracies_and_samples_seen(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load("digits").main(["--epochs", "4", "--json", "out/digits.json"])
    result = json.loads(Path("out/digits.json").read_text())
    assert {"full", "minirec", "random", "samples_seen"} <= set(result)
    seen = result["samples_seen"]
    assert seen["full"] == 4 * 1257
    assert seen["minirec"] == seen["random"] == pytest.approx(seen["full"] / 2, abs=4)
    assert all(0.5 < result[kind] <= 1 for kind in ("full", "minirec", "random"))


@pytest.mark.slow
def test_digits_reaches_the_full_accuracy_within_a_point_with_half_of_the_samples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = load("digits").main(["--seeds", "5"])
    assert result["minirec"] > result["full"] - 0.01


def test_sasrec_trains_with_and_without_the_callback(tmp_path, monkeypatch, toy_path):
    monkeypatch.chdir(tmp_path)
    given = ["--data", str(toy_path / "toy" / "toy.inter"), "--epochs", "2", "--per-user", "10"]
    plain = load("sasrec").main([*given, "--budget", "0"])
    selected = load("sasrec").main([*given, "--budget", "0.5"])
    assert plain["samples_seen"] == 2 * 25 * 9
    assert selected["samples_seen"] == 25 * 9 + 25 * 9 // 2
    assert 0 <= selected["ndcg@10"] <= selected["hit_rate@10"] <= 1
