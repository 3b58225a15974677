"""The benchmark runs, at a small size; its plain greedy is checked by a float64 loop that shares no code with it."""

import json

import numpy as np
import pytest
import torch
from helpers.paths import BENCHMARKS
from helpers.slow import slow

SMALL = {
    "selection_maxmin": {"n": 400, "d": 8, "k": 40, "repeats": 1},
    "selection_million": {"n": 3_000, "d": 8, "k": 40, "repeats": 1},
    "selection_predicted": {"sizes": [(2_000, 40)], "repeats": 1},
    "selection_curves": {
        "base": {"n": 200, "d": 8, "k": 20},
        "curves": {"n": (100, 200), "d": (4, 8), "k": (5, 20)},
        "repeats": 1,
    },
}


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    threads = torch.get_num_threads()
    yield lambda name: __import__(name)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", ["maxmin", "curves", slow("million"), slow("predicted")])
def test_a_case_leaves_its_figures(case, load, monkeypatch, tmp_path):
    module, name = load(f"selection_{case}"), f"selection_{case}"
    run = module.run
    monkeypatch.setattr(module, "run", lambda threads: run(threads, **SMALL[name]))
    older = {"maxmin": {"machine": "m", "threads": 1, "date": "d", "command": "c", "result": None}}
    (tmp_path / "s.json").write_text(json.dumps(older if case == "maxmin" else {}))
    load("selection").main(["--case", case, "--json", str(tmp_path / "s.json"), "--threads", "1"])
    figures = json.loads((tmp_path / "s.json").read_text())[case]
    assert figures["threads"] == 1
    text = (tmp_path / "s.md").read_text()
    assert f"--case {case} --threads 1" in text
    assert "torch" in figures["machine"]
    assert (tmp_path / "selection_curves.png").is_file() == (case == "curves")
    if case == "maxmin":
        assert [(p["embeddings"], p["scores"]) for p in figures["result"]["problems"]] == [
            (kind, scores) for kind in ("clustered", "isotropic") for scores in ("uniform", "equal")
        ]
        for problem in figures["result"]["problems"]:
            assert problem["lazy"]["shortfall"] < 1e-4
            assert problem["pool 50%"]["loss"] > -1e-3
    if case == "predicted":
        (problem,) = figures["result"]["problems"]
        assert problem["whole"]["min"] >= problem["refit"]["min"] > 0
    if case == "million":
        assert all(p["lazy, equal"]["peak"] > 2**20 for p in figures["result"]["problems"])


def test_plain_greedy_and_shortfall(load):
    maxmin = load("selection_maxmin")
    embeddings = torch.cat(list(maxmin.embedding_blocks("isotropic", 60, 3)))
    score = maxmin.scores_of("uniform", 60)
    unit = maxmin.unit_rows(embeddings.double())
    picks, values = [int(score.argmax())], [float(score.max())]
    while len(picks) < 12:
        value = {x: min(1 - float(unit[x] @ unit[s]) for s in picks) * score[x] for x in range(60) if x not in picks}
        picks.append(max(value, key=value.get))
        values.append(max(value.values()))
    assert maxmin.plain_greedy(unit.float(), torch.from_numpy(score).float(), 12) == picks
    total, shortfall = maxmin.values_and_shortfall(unit, score, picks)
    assert total == pytest.approx(sum(values))
    assert shortfall == pytest.approx(0, abs=1e-12)
    worse = next(x for x in np.argsort(score) if x not in picks)
    _, shortfall = maxmin.values_and_shortfall(unit, score, [*picks[:5], int(worse)])
    gap = min(1 - float(unit[worse] @ unit[s]) for s in picks[:5]) * score[worse]
    assert shortfall == pytest.approx(values[5] - gap)
