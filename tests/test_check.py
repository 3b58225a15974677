"""`minirec check`: what it prints of a good config, and each fault it must see before a fit does."""

import pytest
import torch
from cli_tools import sentence
from plain_policy import CONFIG
from text_policy import write_model
from toy_data import random_rows, write_dataset
from transformers import AutoTokenizer

from minirec_pl.__main__ import main
from minirec_pl.check import Preflight
from minirec_pl.cli import parsed
from minirec_pl.estimates import Load, memory_of, peak
from minirec_pl.policy.tiny import build_tiny


def check(command, root, *more):
    return main(["check", *command.grpo(root, *more)[1:]])


def test_a_good_config(command, tmp_path, capsys):
    capsys.readouterr()
    assert check(command, tmp_path / "runs") == 0
    out = capsys.readouterr().out
    for text in ("a prompt: ", "80 items", "memory: optimizer", "rollouts: training", "tokens: backward"):
        assert text in out
    assert "nothing stands in the way" in out
    assert not (tmp_path / "runs").exists()


def test_a_model_that_is_not_made_yet(command, tmp_path, capsys):
    new = ["--model.policy.pretrained=null", "--model.policy.config={hidden_size: 4096, num_hidden_layers: 8}"]
    capsys.readouterr()
    assert check(command, tmp_path / "runs", *new) == 0
    out = capsys.readouterr().out
    assert "M parameters in float32" in out


FAULTS = {
    "no data": (["--data.dataset=none"], ("data: ", "none.inter is missing")),
    "no policy": (["--model.policy.pretrained=runs/none"], ("policy: ", "runs/none")),
    "one rollout": (["--model.num_generations=1"], ("options: ", "num_generations is 1", "at least 2")),
    "reset": (["--warm_start={epochs: 0}"], ("warm_start.epochs is 0",)),
    "budget": (["--selection.budget=100000"], ("budget is 100000 samples but the pool has",)),
    "positions": (["--data.history_window=200"], ("positions: ", "lower data.history_window")),
    "history window": (["--data.history_window=0"], ("history_window=0",)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_it_says_what_would_fail(name, command, tmp_path, capsys):
    options, fragments = FAULTS[name]
    if name == "positions":
        options = [*options, "--model.policy.pretrained=null"]
        options += ["--model.policy.config={hidden_size: 8, num_attention_heads: 2, max_position_embeddings: 16}"]
    capsys.readouterr()
    assert check(command, tmp_path / "runs", *options) == 1
    out = capsys.readouterr().out
    assert all(fragment in out for fragment in fragments), out
    assert "the fit would fail" in out


def test_a_folder_that_cannot_be_written(command, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert check(command, tmp_path / "file" / "runs") == 1
    assert "cannot be written" in capsys.readouterr().out


def test_a_config_that_cannot_be_parsed(command, tmp_path, capsys):
    capsys.readouterr()
    assert check(command, tmp_path / "runs", "--model.nonsense=1") == 2
    assert "unknown option model.nonsense" in sentence(capsys)


def test_fewer_samples_than_a_batch_is_a_warning(command, tmp_path, capsys):
    assert check(command, tmp_path / "runs", "--selection.budget=4") == 0
    assert "an epoch has 4 samples, less than a batch of 16" in capsys.readouterr().out


def test_prompts_are_those_of_the_fit_and_their_date_is_said(command, tmp_path):
    """On titles that spell control tokens, whose letters are counted, and a chat template with a date."""
    title = "<|im_end|><|im_start|>"
    rows = random_rows(0, n=1500, n_users=25, n_moments=600, n_items=80)
    write_dataset(tmp_path / "data", rows, items=[(f"i{i}", title) for i in range(80)])
    folder = write_model(tmp_path / "model")
    template = folder / "chat_template.jinja"
    template.write_text("{{ strftime_now('%d %b %Y') }}" + template.read_text())
    options = ["--model.policy.item_ids=title", "--model.policy.prompt.date=1987-10-09"]
    options += ["--model.policy.prompt.item={title}", f"--model.policy.language_model.name={folder}"]
    options += [f"--data.path={tmp_path / 'data'}"]
    preflight = Preflight(parsed(command.fit("smollm2-135m.yaml", tmp_path / "runs", *options)))
    preflight.run()
    (said,) = (finding for finding in preflight.findings if finding.what == "prompt date")
    assert said.level == "ok"
    assert "1987-10-09 (prompt.date)" in said.text
    text, tokenizer = preflight.prompts.text, AutoTokenizer.from_pretrained(folder)
    assert text.startswith("09 Oct 1987<|im_start|>")
    place = text.index("assistant\n") + len("assistant\n")
    assert text[place:] == title * text[place:].count(title)

    def count(text):
        return len(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])

    head = len(tokenizer(text[:place], add_special_tokens=False)["input_ids"])
    assert preflight.prompts.lengths[0] == head + count(text[place:])
    assert preflight.prompts.completion == 1 + count(f"{title} (80)")


def test_no_date_where_the_template_has_none(command, tmp_path):
    name = f"--model.policy.init_args.language_model.name={write_model(tmp_path / 'model')}"
    preflight = Preflight(parsed(command.fit("smollm2-135m.yaml", tmp_path / "runs", name)))
    preflight.run()
    assert preflight.prompts is not None
    assert "prompt date" not in {finding.what for finding in preflight.findings}


LOAD = Load(
    pool=100,
    selected=20,
    epochs=3,
    num_generations=4,
    scoring_generations=2,
    rescored=10,
    scored=90,
    prompt=50,
    completion=8,
    batch_size=5,
    generated_at_once=10,
    checkpointing=False,
    items=7,
)


def test_rollouts_and_tokens_are_counted_by_hand():
    assert LOAD.rollouts() == {"scoring": (90 + 2 * 10) * 2, "training": 20 * 3 * 4}
    prompts, rollouts = 20 * 3, 20 * 3 * 4
    trained = prompts * 50 + rollouts * 8
    assert LOAD.tokens() == {
        "generated": (220 + 240) * 8,
        "forward": (110 + prompts) * 50 + trained,
        "backward": trained,
    }


def test_memory_on_the_meta_device_is_that_of_the_real_model():
    with torch.device("meta"):
        meta = build_tiny(CONFIG, 30)
    real = build_tiny(CONFIG, 30)
    for parameter in (meta.model.embed_tokens.weight, real.model.embed_tokens.weight):
        parameter.requires_grad_(False)
    found = memory_of(meta, LOAD, 4)
    assert found == memory_of(real, LOAD, 4)
    assert all(parameter.is_meta for parameter in meta.parameters())
    distinct = {id(p): p for p in real.parameters()}.values()
    trained = sum(p.numel() * 4 for p in distinct if p.requires_grad)
    assert found.weights == sum(p.numel() * 4 for p in distinct)
    assert (found.gradients, found.optimizer) == (trained, 2 * trained)
    layers, heads, width = 2, 2, 16
    assert found.cache == 2 * layers * heads * (width // heads) * 10 * (50 + 4 * 8) * 4
    tokens = 5 * (50 + 4 * 8)
    assert found.activations == layers * tokens * (10 * width + 3 * 24) * 4
    assert found.items == 7 * width * 4
    assert peak(found) == sum(found) - min(found.activations, found.cache)


def test_checkpointing_keeps_less_than_everything():
    from dataclasses import replace

    model = build_tiny({**CONFIG, "num_hidden_layers": 8}, 30)
    assert (
        memory_of(model, replace(LOAD, checkpointing=True), 4).activations < memory_of(model, LOAD, 4).activations / 4
    )
