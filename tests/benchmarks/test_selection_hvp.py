import importlib.util

import pytest
from helpers.paths import BENCHMARKS

FILE = BENCHMARKS / "selection_hvp.py"


@pytest.fixture
def benchmark():
    spec = importlib.util.spec_from_file_location("selection_hvp", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SMALL = {"threads": 1, "n": 50, "dim": 24, "negatives": 5, "baseline": 20, "n_items": 30}


def test_small_run_has_figures_and_a_table(benchmark):
    result = benchmark.run(**SMALL)
    assert result["ratio"] == pytest.approx(result["seconds"]["double_backward"] / result["seconds"]["closed_form"])
    assert result["largest_difference"] < 1e-4
    shown = benchmark.markdown(result)
    assert f"| {result['ratio']:.1f} |" in shown
    assert "on 20 of them and is extrapolated" in shown


def test_values_that_differ_stop_it(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "_closed_form", lambda hidden, vectors: hidden)
    with pytest.raises(AssertionError, match="the two differ by"):
        benchmark.run(**SMALL)
