"""The benchmark of a GRPO step, on a model small enough for a test."""

import json
import sys

import grpo_models
import grpo_sides
import grpo_step
import item_sides
import pytest
import torch
from grpo_models import PeakMemory, prompts, rewards_of
from grpo_report import write_report
from grpo_sides import Work
from item_sides import ITEM_SIDES, ItemWork
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
WORK = {"model": "test", "prompts": 2, "generations": 4, "prompt_length": 25, "completion_length": 5, "threads": 1}


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    def make():
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        tokens = {"vocab_size": grpo_models.VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
        return LlamaForCausalLM(LlamaConfig(**sizes, **tokens, tie_word_embeddings=True))

    monkeypatch.setitem(grpo_models.MODELS, "test", make)


def test_ours_does_all_of_the_work_and_says_where_the_time_goes():
    steps = list(grpo_sides.ours(Work("ours", steps=1, **WORK)))
    assert len(steps) == 2
    for seconds, _, phases, tokens in steps:
        assert tokens == 2 * 4 * 5
        assert list(phases) == ["prefill", "decode", "rewards", "log-probabilities", "backward", "optimizer"]
        assert min(phases.values()) > 0
        assert sum(phases.values()) == pytest.approx(seconds, rel=0.05)


@pytest.mark.slow
def test_trl_does_the_same_work():
    pytest.importorskip("trl")
    steps = list(grpo_sides.trl(Work("trl", steps=1, **WORK)))
    assert [tokens for *_, tokens in steps] == [2 * 4 * 5] * 2
    assert all(seconds > 0 and peak > 0 for seconds, peak, _, _ in steps)


def test_both_sides_get_the_same_prompts_and_groups_differ_in_reward():
    work = Work("ours", **WORK)
    first, again = prompts(work, 3), prompts(work, 3)
    assert first == again
    assert first[0] != first[1]
    assert all(24 <= len(row) <= 26 for batch in first for row in batch)
    rewards = rewards_of([[1, 2], [96, 2], [97, 0]])
    assert rewards == [3 / 97, 1 / 97, 0.0]


def test_peak_memory_is_what_was_held_in_between():
    memory = PeakMemory()
    memory.start()
    held = torch.ones(64 * 2**18)
    del held
    assert 60 < memory.stop() < 120


def figures(ours, trl, **shape):
    return {
        "completions_per_second": {"ours": ours, "trl": trl},
        "peak_mb": {"ours": 200.0, "trl": 1000.0},
        "ours_seconds_by_phase": {"prefill": 0.1, "decode": 0.5},
        "shape": {"prompts": 4, "generations": 8, "prompt_length": 125, "completion_length": 32, **shape},
    }


def test_the_report_has_the_ratios_and_the_curves(tmp_path):
    machine = {"processor": "P", "cores": 2, "load_before": 0.1, "torch": "1", "transformers": "2", "trl": "3"}
    curves = {
        f"{name} {value}": figures(4.0, 1.0, **{name: value})
        for name in ("generations", "prompt_length", "completion_length")
        for value in (2, 4)
    }
    for case, shapes in (("small", {"4 x 8 x 32": figures(12.0, 2.0)}), ("curves", curves)):
        (tmp_path / f"grpo_step_{case}.json").write_text(json.dumps({"machine": machine, "shapes": shapes}))
    write_report(tmp_path)
    text = (tmp_path / "grpo_step.md").read_text()
    assert "| 4 x 8 x 32 | 12.00 | 2.00 | 6.0 | 200 | 1000 | 0.20 |" in text
    assert "| 4 x 8 x 32 | 0.100 | 0.500 | 0.000 |" in text
    assert (tmp_path / "grpo_step.png").stat().st_size > 10_000


def test_the_command_writes_the_figures(tmp_path, monkeypatch):
    measured = [{"seconds": s, "peak_mb": p, "phases": {"prefill": s / 2}} for s, p in ((4.0, 10.0), (2.0, 30.0))]
    started = []

    def run_side(work):
        started.append(work.side)
        return [{**step, "seconds": step["seconds"] * (5 if work.side == "trl" else 1)} for step in measured]

    monkeypatch.setattr(grpo_step, "run_side", run_side)
    monkeypatch.setattr(grpo_step, "version", lambda package: "0")
    grpo_step.main(["--case", "small", "--json", str(tmp_path / "small.json"), "--rounds", "2"])
    found = json.loads((tmp_path / "small.json").read_text())
    assert started == ["ours", "trl", "trl", "ours"]
    assert found["completions_per_second"] == {"ours": round(32 / 3, 3), "trl": round(32 / 15, 3)}
    assert found["peak_mb"] == {"ours": 30.0, "trl": 30.0}
    assert found["ours_seconds_by_phase"] == {"prefill": 1.5}


@pytest.fixture
def few_items(monkeypatch):
    monkeypatch.setattr(item_sides, "N_ITEMS", 40)
    monkeypatch.setattr(item_sides, "CODES", 3)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setattr(item_sides, "SIZES", sizes)


@pytest.mark.parametrize("side", ["expected", "supervised", "sample", pytest.param("trl", marks=pytest.mark.slow)])
@pytest.mark.parametrize("id_tokens", [1, 4])
def test_generators_of_items_are_trained_by_every_side(few_items, side, id_tokens):
    work = ItemWork(side, id_tokens, prompts=4, generations=4, steps=1)
    assert side in ITEM_SIDES
    if side == "trl":
        pytest.importorskip("trl")
    steps = list(item_sides.trl(work) if side == "trl" else item_sides.ours(work))
    assert len(steps) == 2
    assert all(seconds > 0 for seconds, *_ in steps)
    assert [mixed is None for *_, mixed in steps] == [side != "sample"] * 2


def test_both_kinds_of_ids_are_a_catalogue(few_items):
    for id_tokens in (1, 4):
        ids = item_sides.item_tokens(ItemWork("expected", id_tokens))
        assert ids.shape == (40, id_tokens)
        assert len(ids.unique(dim=0)) == 40


def test_the_report_of_items_has_a_row_for_each_side(tmp_path):
    machine = {"processor": "P", "cores": 2, "load_before": 0.1, "torch": "1", "transformers": "2", "trl": "3"}
    found = {
        "prompts_per_second": {"expected": 30.0, "supervised": 33.0, "sample": 10.0, "trl": 1.0},
        "peak_mb": dict.fromkeys(ITEM_SIDES, 10.0),
        "step_seconds": {"expected": [1.0, 2.0], "supervised": [0.9, 1.9], "sample": [3.0, 6.0], "trl": [30.0, 60.0]},
        "mixed_groups": 0.4,
        "shape": {"prompts": 32, "generations": 16},
    }
    (tmp_path / "grpo_step_items.json").write_text(json.dumps({"machine": machine, "shapes": {"4 tokens": found}}))
    write_report(tmp_path)
    text = (tmp_path / "grpo_step.md").read_text()
    assert "| 4 tokens | `sample` | 10.0 | 3.00 | 10 |" in text
    assert "| 4 tokens | TRL | 1.0 | 30.00 | 10 |" in text
