"""`minirec check`: what it prints of a good config, and each fault it must see before a fit does."""

import pytest
import torch
from helpers.chat_models import CHATML, chat_folder, chat_tokenizer
from helpers.cli_tools import sentence
from helpers.family_models import family_folder
from helpers.plain_policy import CONFIG
from helpers.slow import slow
from helpers.text_policy import write_model
from helpers.tiny_llm import longrope
from helpers.toy_data import random_rows, write_dataset
from transformers import AutoTokenizer

from minirec_pl import InputError
from minirec_pl.cli.check import Preflight
from minirec_pl.cli.estimates import Load, memory_of, peak
from minirec_pl.cli.fit import parsed
from minirec_pl.cli.main import main
from minirec_pl.data.samples import Catalogue
from minirec_pl.policy import GenerativePolicy, LanguageModel, Lora
from minirec_pl.policy.language_models.tiny import build_tiny
from minirec_pl.selection import MiniRecSelector, SampleSignals, SignalStore


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
    new = ["--model.policy.pretrained=null", "--model.policy.config={hidden_size: 1024, num_hidden_layers: 4}"]
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
    "positions": (["--data.history_window=200"], ("positions: ", "lower --data.history_window")),
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
    assert "1987-10-09 (--model.policy.prompt.date)" in said.text
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


MODEL = "--model.policy.init_args.language_model"


def check_text(command, root, folder, *more, config="smollm2-135m.yaml"):
    return main(["check", *command.fit(config, root, f"{MODEL}.name={folder}", *more)[1:]])


def line(out, what):
    """The finding on one matter, its level first."""
    (found,) = [text for text in out.splitlines() if text.split(maxsplit=1)[-1].startswith(f"{what}: ")]
    return found


FAMILIES = {
    "llama": ("ok", {"q_proj (2)", "down_proj (2)"}, set()),
    "phi3": ("warning", {"o_proj (2)", "down_proj (2)"}, {"qkv_proj (2)", "gate_up_proj (2)"}),
    "mixtral": ("warning", {"q_proj (2)"}, {"experts.gate_up_proj (2)", "experts.down_proj (2)"}),
    "opt": ("warning", {"q_proj (2)"}, {"out_proj (2)", "fc1 (2)", "fc2 (2)"}),
    "gemma3": ("ok", {"q_proj (2)", "down_proj (2)"}, set()),
}


@pytest.mark.parametrize("kind", ["llama", slow("phi3"), "mixtral", slow("opt"), slow("gemma3")])
def test_it_tells_of_a_language_model(kind, command, tmp_path, capsys):
    folder = family_folder(tmp_path / "model", kind)
    capsys.readouterr()
    config = "smollm2-135m.yaml" if kind in ("llama", "phi3") else "smollm2-135m-reasoning.yaml"
    assert check_text(command, tmp_path / "runs", folder, config=config) == 0
    out = capsys.readouterr().out
    level, carried, missing = FAMILIES[kind]
    text = line(out, "lora")
    assert text.startswith(level)
    has, _, lacks = text.partition("none on")
    assert all(name in has for name in carried)
    assert all(name in lacks for name in missing)
    assert "330 tokens in the tokenizer, 330 rows in the model" in line(out, "vocabulary")
    assert "<|im_end|> (2); padding is <|endoftext|> (0)" in line(out, "end tokens")
    assert "in bfloat16" in line(out, "model")
    assert "chat template: " not in out
    assert "nothing stands in the way" in out


HEADS = {
    "granite": ({}, 0, "ok       head: the logits are its product times 0.125"),
    "gemma2": ({}, 0, "ok       head: the logits are its product capped at 30"),
    "gemma3": ({}, 0, "ok       cache: a prompt is run once and shared by its completions"),
    "lfm2": ({}, 1, "fails    cache: it has recurrent layers"),
    "rwkv": ({}, 1, "fails    model: RwkvForCausalLM cannot be a policy (a batch padded on the left gives"),
    "phi3": (longrope(190), 1, "the model changes its positions after 190"),
}


@pytest.mark.parametrize("kind", ["granite", slow("gemma2"), slow("gemma3"), "lfm2", slow("rwkv"), "phi3"])
def test_it_tells_of_head_cache_and_positions(kind, command, tmp_path, capsys):
    options, code, text = HEADS[kind]
    folder = family_folder(tmp_path / "model", kind, **options)
    capsys.readouterr()
    config = "smollm2-135m-reasoning.yaml"
    layers = f"{MODEL}.init_args.lora.target_modules=all-linear"
    assert check_text(command, tmp_path / "runs", folder, layers, config=config) == code
    assert text in capsys.readouterr().out


def test_a_recurrent_model_may_write_items_of_one_token(command, tmp_path, capsys):
    folder = family_folder(tmp_path / "model", "lfm2")
    capsys.readouterr()
    layers = f"{MODEL}.init_args.lora.target_modules=all-linear"
    assert check_text(command, tmp_path / "runs", folder, layers) == 0
    assert "ok       cache: it has recurrent layers" in capsys.readouterr().out


@pytest.mark.slow
def test_all_linear_can_be_asked_for_on_the_command_line(command, tmp_path, capsys):
    folder = family_folder(tmp_path / "model", "phi3")
    option = f"{MODEL}.init_args.lora.target_modules"
    for given, code, what, text in (
        (
            "all-linear",
            0,
            "lora",
            "ok       lora: adapters on down_proj (2), gate_up_proj (2), o_proj (2), qkv",
        ),
        ("[qkv_proj]", 0, "lora", "adapters on qkv_proj (2), none on"),
        (r".*\.0\..*_proj", 0, "lora", "adapters on down_proj (1), gate_up_proj (1)"),
        ("[c_attn]", 1, "model", "names no linear layer of Phi3ForCausalLM"),
    ):
        capsys.readouterr()
        assert check_text(command, tmp_path / "runs", folder, f"{option}={given}") == code
        assert text in line(capsys.readouterr().out, what)


def test_it_tells_of_ends_and_of_tokens_without_a_row(command, tmp_path, capsys):
    folder = family_folder(tmp_path / "model", "llama", eos_token_id=5)
    tokenizer = chat_tokenizer()
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    assert check_text(command, tmp_path / "runs", folder) == 0
    out = capsys.readouterr().out
    assert "no prompt may hold <image>" in line(out, "vocabulary")
    name = chat_tokenizer().convert_ids_to_tokens(5)
    assert f"free text ends with {name} (5), <|im_end|> (2)" in line(out, "end tokens")


def test_a_tokenizer_of_another_model_is_seen_before_the_fit(command, tmp_path, capsys):
    assert check_text(command, tmp_path / "runs", chat_folder(tmp_path / "model", vocabulary=300)) == 1
    assert "has token 329 and the model a vocabulary of 300" in line(capsys.readouterr().out, "model")


@pytest.mark.parametrize("closing", ["<|endoftext|>", ""])
def test_a_turn_that_closes_with_no_end_is_a_warning(closing, command, tmp_path, capsys):
    folder = family_folder(tmp_path / "model", "llama")
    plain = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}assistant:"
    chat_tokenizer(CHATML.replace("<|im_end|>", closing) if closing else plain).save_pretrained(folder)
    assert check_text(command, tmp_path / "runs", folder) == 0
    out = capsys.readouterr().out
    if not closing:
        assert "chat template: " not in out
        return
    assert line(out, "chat template").startswith("warning")
    assert "<|endoftext|> (0)" in line(out, "chat template")
    assert "add 0 to eos_token_id in the model's generation_config.json" in line(out, "chat template")


def test_it_knows_a_stored_policy_with_adapters(command, tmp_path, capsys):
    folder = family_folder(tmp_path / "model", "phi3")
    lora = Lora(dropout=0.0, target_modules="all-linear")
    policy = GenerativePolicy(language_model=LanguageModel(str(folder), "bfloat16", lora), item_ids="token")
    policy.bind(Catalogue(["a", "b"], ["Alien", "Babe"]))
    policy.save_pretrained(tmp_path / "policy")
    capsys.readouterr()
    options = [f"--model.policy.pretrained={tmp_path / 'policy'}", "--data.history_window=3"]
    code = check(command, tmp_path / "runs", *options)
    out = capsys.readouterr().out
    assert code == 0, out
    assert "adapters on down_proj (2), gate_up_proj (2), o_proj (2), qkv_proj (2)" in line(out, "lora")
    assert "332 tokens in the tokenizer, 332 rows in the model" in line(out, "vocabulary")
    assert "parameters in bfloat16" in line(out, "model")


def saving(command, root, *more, **options):
    preflight = Preflight(parsed(command.grpo(root, *more)), **options)
    preflight.run()
    found = [finding for finding in preflight.findings if finding.what == "selection"]
    return preflight, found[-1] if found else None


def test_what_a_selection_could_save(command, tmp_path):
    preflight, found = saving(command, tmp_path / "runs")
    setting, schedules = preflight.saving
    load = preflight.load
    assert (setting.prompt, setting.completion) == (load.prompt, 0)  # the one token of an id is not fed
    assert setting.scoring == load.prompt
    assert setting.budget == pytest.approx(load.selected / load.pool)
    assert found.level == "ok"
    assert "measure it with --probe, or give it as --flat_share" in found.text
    assert len(schedules) == 3
    more = ["--selection.rescore_fraction=0.5", "--selection.score_fraction=0.4"]
    preflight, _ = saving(command, tmp_path / "runs", *more, flat_share=0.5)
    load = preflight.load
    scored = [0.4 * load.pool] + [0.5 * load.pool] * (load.epochs - 1)
    assert preflight.saving[1]["as in the config"] == pytest.approx(sum(scored) / load.pool / load.epochs, abs=0.02)


PREDICTED = "--selection.selector=minirec_pl.selection.PredictedSelector"


def test_a_selection_without_a_scoring_pass_has_none_to_pay(command, tmp_path, capsys):
    """MiniRec and SelectSamples do not score for a selector that needs no signals, so no cost of scoring is shown."""
    generations = "--model.scoring_generations=4"
    preflight, found = saving(command, tmp_path / "runs", PREDICTED, generations, flat_share=0.5)
    assert (preflight.load.scored, preflight.load.rescored, preflight.load.rollouts()["scoring"]) == (0, 0, 0)
    assert found.level == "ok"
    assert found.text.startswith("Selection that scores nothing can save ")
    assert saving(command, tmp_path / "runs", PREDICTED)[1].level == "ok"
    scored, _ = saving(command, tmp_path / "runs", generations, flat_share=0.5)
    assert scored.load.rollouts()["scoring"] > 0


def test_a_ledger_is_trained_on_as_it_is_and_scores_nothing(command, tmp_path):
    ids = torch.arange(60)
    store = SignalStore(ids)
    store.update(SampleSignals(ids, torch.rand(60, 4), embedding=torch.randn(60, 3)), epoch=0, step=0, source="score")
    ledger = MiniRecSelector(on_short="fill").select(store.pool_view(0), 9)
    ledger.to_parquet(tmp_path / "ledger.parquet")
    select = ["--selection=minirec_pl.callbacks.SelectSamples", "--selection.budget=null"]
    fixed = [*select, f"--selection.ledger={tmp_path / 'ledger.parquet'}"]
    preflight, found = saving(command, tmp_path / "runs", *fixed, flat_share=0.5)
    assert (preflight.load.selected, preflight.load.scored) == (9, 0)
    assert found.text.startswith("Selection that scores nothing can save ")
    usual, _ = saving(command, tmp_path / "runs", *select, PREDICTED)
    assert usual.load.selected == int(0.1 * usual.load.pool)


@pytest.mark.parametrize(
    ("flat_share", "level", "beginning"),
    [(0.0, "warning", "Selection cannot pay here: 0%"), (0.9, "ok", "Selection can save 75% of the tokens at most")],
)
def test_a_setting_that_cannot_gain_is_told_so(flat_share, level, beginning, command, tmp_path):
    _, found = saving(command, tmp_path / "runs", flat_share=flat_share)
    assert found.level == level
    assert found.text.startswith(beginning)


def test_a_probe_counts_the_flat_groups_of_the_policy_itself(command, tmp_path):
    preflight, found = saving(command, tmp_path / "runs", probe=True)
    assert f"{preflight.flat_share:.0%} of the groups are flat" in found.text
    assert preflight.flat_share * 64 == round(preflight.flat_share * 64)
    policy, data = GenerativePolicy(pretrained=str(command.policy)), preflight._data()
    policy.bind(data.catalogue)
    expected = []
    for batch in data.sample_loader(data.pool_ids):
        p = policy.item_logps(batch).gather(1, batch["target"][:, None]).double().exp()
        expected += (p**4 + (1 - p) ** 4).flatten().tolist()
    error = 4 * (0.25 / 64) ** 0.5
    assert preflight.flat_share == pytest.approx(sum(expected) / len(expected), abs=error)


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ({"flat_share": 1.0}, [], "--flat_share is 1.0: give a share of the groups, at least 0 and below 1"),
        ({"flat_share": 0.5, "probe": True}, [], "--flat_share gives what --probe measures"),
        ({"probe": True}, ["--warm_start={epochs: 1}"], "--probe draws with the policy of the config, which is warmed"),
    ],
)
def test_shares_that_cannot_be(options, more, message, command, tmp_path):
    with pytest.raises(InputError, match=message):
        Preflight(parsed(command.grpo(tmp_path / "runs", *more)), **options)


def test_training_without_rollouts_has_no_flat_groups(command, tmp_path):
    preflight, found = saving(command, tmp_path / "runs", "--model.rollouts=expected", flat_share=0.5)
    assert preflight.saving is None
    assert "draws no groups" in found.text


def test_ids_of_several_tokens_without_rollouts(command, tmp_path):
    new = ["--model.policy.pretrained=null", "--model.policy.item_ids=semantic", "--model.rollouts=expected"]
    new += ["--model.policy.config={hidden_size: 8, num_attention_heads: 2}", "--model.policy.semantic_ids.levels=2"]
    for more, level in ([], "warning"), (["--model.loss_type=dr_grpo"], None):
        preflight, _ = saving(command, tmp_path / "runs", *new, *more)
        found = {finding.what: finding.level for finding in preflight.findings}
        assert found.get("item ids") == level
        assert not preflight.fails
    preflight, found = saving(command, tmp_path / "runs", *new, "--model.loss_type=dr_grpo", "--model.beta=0.1")
    assert preflight.fails
    assert "beta is 0.1 and rollouts='expected' knows the KL divergence of ids of one token only" in found.text


def test_tokens_of_ids_of_several_codes(command, tmp_path):
    new = ["--model.policy.pretrained=null", "--model.policy.item_ids=semantic"]
    new += ["--model.policy.config={hidden_size: 8, num_attention_heads: 2}", "--model.policy.semantic_ids.levels=2"]
    preflight, _ = saving(command, tmp_path / "runs", *new)
    assert preflight.prompts.completion == 3
    assert preflight.saving[0].completion == 2
    assert all(length % 3 == 1 for length in preflight.prompts.lengths)


def test_groups_as_large_as_allowed_count_for_the_memory(command, tmp_path):
    usual, _ = saving(command, tmp_path / "runs", "--model.num_generations=16")
    larger, _ = saving(command, tmp_path / "runs", "--model.adaptive_generations={q: 0.8, max: 16}")
    assert larger.load.num_generations == 4
    assert larger.memory == usual.memory


def test_a_policy_of_your_own_is_told_that_the_saving_is_not_worked_out(command, tmp_path, monkeypatch):
    (tmp_path / "own_policy.py").write_text(
        "from minirec_pl.policy import Policy\n"
        "methods = {name: lambda self, *given: None for name in Policy.__abstractmethods__}\n"
        "Own = type('Own', (Policy,), {'__module__': __name__, **methods})\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = ["--model.policy=null", "--model.policy=own_policy.Own"]
    assert saving(command, tmp_path / "runs", *own)[1] is None
    for options in ({"probe": True}, {"flat_share": 0.5}):
        _, found = saving(command, tmp_path / "runs", *own, **options)
        assert "work out with minirec_pl.utils.break_even.BreakEven what it can save" in found.text


def test_a_pool_in_which_all_groups_are_flat(command, tmp_path, monkeypatch):
    (tmp_path / "no_reward.py").write_text("def nothing(completions):\n    return [0.0] * len(completions)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    preflight, found = saving(command, tmp_path / "runs", "--model.rewards=[no_reward.nothing]", probe=True)
    assert not preflight.fails  # a fit runs, and 64 samples say little of the rarest
    assert found.level == "warning"
    assert "all 64 groups of the probe are flat, so hardly any sample of the pool teaches anything" in found.text


def test_the_options_of_the_command_itself(command, tmp_path, capsys):
    capsys.readouterr()
    assert check(command, tmp_path / "runs", "--flat_share", "0.5") == 0
    assert "50% of the groups are flat" in " ".join(capsys.readouterr().out.split())
    assert check(command, tmp_path / "runs", "--flat_share=half") == 2
    assert "--flat_share: invalid float value: 'half'" in sentence(capsys)
