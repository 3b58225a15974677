"""What is answered before torch is imported: help, options, configs and files."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from helpers.cli_tools import CONFIGS, sentence
from helpers.paths import REPOSITORY

from minirec_pl import __version__
from minirec_pl.cli import early, known
from minirec_pl.cli.early import check_command_line
from minirec_pl.cli.main import OWN_HELP, main, parsers
from minirec_pl.utils.errors import InputError

HEAVY = ["torch", "numpy", "pandas", "lightning", "transformers", "matplotlib", "wandb", "sklearn"]
QUICKSTART = ["--config", str(CONFIGS / "quickstart.yaml")]
ANSWERS = {  # words: exit code, what is said
    "--help": (0, "completion"),
    "--version": (0, f"minirec-pl {__version__}"),
    "--verion": (2, "unknown option verion (did you mean version?)"),
    "selct": (2, "unknown command 'selct' (did you mean select?)"),
    "data": (2, "minirec data has one command"),
    "data descrbe": (2, "(did you mean data describe?)"),
    **{f"{name} --help": (0, f"usage: minirec {name}") for name in [*OWN_HELP, "fetch", "init", "quickstart"]},
    "fetch ml-20m": (2, "'ml-100k', 'smollm2-135m'"),
    "quickstart --sed=3": (2, "unknown option sed (did you mean seed?)"),
    "quickstart --seed=-1": (2, "--seed is -1: give a whole number from 0 to 4294967295"),
    "quickstart --seed=4294967296": (2, "--seed is 4294967296"),
    "quickstart --seed=x": (2, "invalid int value: 'x'"),
    "quickstart": (2, "minirec fetch ml-100k --to data"),
    "quickstart --configs=none": (2, "none/warm-start.yaml"),
    "completion bash": (0, "complete -F _minirec minirec"),
    "fit": (2, "--model is missing"),
    "fit config.yaml": (2, "'config.yaml' follows no option: give a config as --config FILE"),
    "fit --config none.yaml": (2, "'none.yaml' cannot be read"),
    "fit --config broken.yaml": (2, "broken.yaml, line 2, column 1 is not valid YAML"),
    "fit --config key.yaml": (
        2,
        "key.yaml, line 2: unknown option trainer.max_epoch (did you mean trainer.max_epochs?)",
    ),
    "fit --max_epochs=3": (2, "unknown option max_epochs (did you mean trainer.max_epochs?)"),
    "fit --config warm-start.yaml": (2, "data/ml-100k/ml-100k.inter is missing: run 'minirec fetch ml-100k --to data'"),
    "fit --config quickstart.yaml": (2, "no policy in 'runs/ml-100k/warm-start/latest/policy'"),
    "test --ckpt_path none.ckpt": (2, "there is no checkpoint 'none.ckpt'"),
    "predict --config quickstart.yaml --history none.csv": (2, "none.csv does not exist: check the path"),
    "fit --config configs/ml-100k/warm-start.yaml": (2, "run `minirec init`, which writes the shipped configs here"),
    "check --config none.yaml": (2, "'none.yaml' cannot be read"),
    "data describe": (2, "--config is missing"),
    "data describe --config none.yaml": (2, "'none.yaml' cannot be read"),
    "select": (2, "signals is missing"),
    "select none.safetensors": (2, "there are no signals at none.safetensors"),
    "select key.yaml --bugdet 3": (2, "unknown option bugdet (did you mean budget?)"),
    "select key.yaml --selector.diffculty=mean": (2, "(did you mean selector.difficulty?)"),
    "report none": (2, "there is no run folder 'none'"),
    "export none --to there": (2, "there is no policy in 'none'"),
    "export here --to there": (2, "there is no policy in 'here'"),
    "compare --config none.yaml --to there": (2, "'none.yaml' cannot be read"),
    "compare --config key.yaml --to there": (2, "unknown key 'trainer'"),
    "compare --config key.yaml --to there --jobs 0": (2, "--jobs is 0"),
    "compare --config key.yaml --to there --time-limit=-1": (2, "--time-limit is -1"),
    "dashboard --project=mine": (2, "--entity"),
}
PROGRAM = f"""
import contextlib, io, json, sys
from minirec_pl.cli.main import main
answers = {{}}
for words in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = main(words.split())
        except SystemExit as stop:
            code = stop.code or 0
    answers[words] = [code, said.getvalue(), sorted(set({HEAVY}) & set(sys.modules))]
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What one process that never needs torch answers to all of them."""
    folder = tmp_path_factory.mktemp("early")
    for name in ("warm-start.yaml", "quickstart.yaml"):
        (folder / name).write_text((CONFIGS / name).read_text())
    (folder / "broken.yaml").write_text("model: [1,\n")
    (folder / "key.yaml").write_text("trainer:\n  max_epoch: 3\n")
    (folder / "here").mkdir()
    words = json.dumps(list(ANSWERS))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=words, cwd=folder, capture_output=True, text=True, check=True
    )
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["warm-start.yaml", "quickstart.yaml", "broken.yaml", "key.yaml", "here"]
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("words", ANSWERS)
def test_it_is_answered_without_torch(words, answers):
    code, said, heavy = answers[words]
    assert heavy == []
    assert (code, ANSWERS[words][1] in said) == (ANSWERS[words][0], True), said
    assert "Traceback" not in said
    assert code == 0 or len(said.splitlines()) == 1


REFUSED = {
    "option of a class": (["--model.num_generation=4"], "model.num_generation (did you mean model.num_generations?)"),
    "option of a class within": (["--selection.selector.mo=paper"], "selection.selector.mo"),
    "init_args are named": (["--model.init_args.polcy=x"], "model.polcy (did you mean model.policy?)"),
    "class of the command line": (
        ["--selection=minirec_pl.callbacks.SelectSamples", "--selection.rescore_fraction=1"],
        "unknown option selection.rescore_fraction",
    ),
    "class of a list": (
        ["--trainer.callbacks+=minirec_pl.callbacks.EasyToHardCurriculum", "--trainer.callbacks.folds=1"],
        "trainer.callbacks.folds (did you mean trainer.callbacks.n_folds?)",
    ),
    "mapping on the command line": (["--data={class_path: minirec_pl.RecDataModule, init_args: {pth: x}}"], "data.pth"),
    "fields": (["--warm_start.epoch=3"], "warm_start.epoch (did you mean warm_start.epochs?)"),
    "option with another's value": (["--trainer.max_epochs", "3", "--trainer.devics", "1"], "trainer.devics"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unknown_options_are_refused(name):
    words, fragment = REFUSED[name]
    with pytest.raises(InputError) as refused:
        check_command_line("fit", [*QUICKSTART, *words])
    assert fragment in str(refused.value)


ACCEPTED = {
    "option of a class of torch": ["--model.optimizer.lr=0.1", "--model.optimizer.nonsense=1"],
    "option of Lightning's callback": ["--trainer.callbacks.monitor=val/ndcg@10"],
    "class of the user": ["--model=mine.Module", "--model.anything=1", "--model.deeper.still=2"],
    "option after no selection": ["--selection=null", "--selection.anything=1"],
    "help of a class": ["--model.help=minirec_pl.GRPORecModule"],
    "option and value apart": ["--trainer.max_epochs", "3", "--test_stages", "true"],
    "negative value": ["--trainer.max_epochs", "-1"],
    "printed config": ["--print_config", "--trainer.max_epochs=3"],
    "printed config with a flag": ["--print_config=comments"],
    "kwargs of any name": ["--model.dict_kwargs={anything: 1}"],
    "another class of the same option": [
        "--model.policy={class_path: mine.Policy, init_args: {anything: 1}}",
        "--model.policy.other=1",
    ],
    "list on the command line": ["--trainer.callbacks=[{class_path: mine.Callback, init_args: {a: 1}}]"],
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_may_be_right_is_left_to_the_parser(name, monkeypatch):
    monkeypatch.setattr(early._Given, "check_files", lambda self: None)
    check_command_line("fit", [*QUICKSTART, *ACCEPTED[name]])


@pytest.mark.parametrize("path", sorted(REPOSITORY.glob("configs/*/*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_configs_are_accepted_and_each_wrong_key_of_them_is_found(path, tmp_path, monkeypatch):
    monkeypatch.setattr(early._Given, "check_files", lambda self: None)
    check_command_line("fit", ["--config", str(path)])
    lines = path.read_text().splitlines()
    model = next(number for number, line in enumerate(lines) if line.startswith("model:"))
    place = next(number for number, line in enumerate(lines) if number > model and line.startswith("  init_args:"))
    lines.insert(place + 1, "    scale_reward: group")
    (tmp_path / "mine.yaml").write_text("\n".join(lines))
    with pytest.raises(InputError, match=rf"mine.yaml, line {place + 2}: unknown option model.scale_reward "):
        check_command_line("fit", ["--config", str(tmp_path / "mine.yaml")])


def test_yaml_that_merges_and_dots(tmp_path, monkeypatch):
    monkeypatch.setattr(early._Given, "check_files", lambda self: None)
    text = "trainer: &all {max_epochs: 1}\ndata: {class_path: minirec_pl.RecDataModule}\nmodel: mine.Module\n"
    (tmp_path / "fine.yaml").write_text(text + "<<: {test_stages: true}\ntrainer.callbacks+: mine.Callback\n")
    check_command_line("fit", ["--config", str(tmp_path / "fine.yaml")])
    (tmp_path / "dots.yaml").write_text(text + "trainer.max_epoch: 1\n")
    with pytest.raises(InputError, match=r"line 4: unknown option trainer.max_epoch \(did you mean trainer.max_epochs"):
        check_command_line("fit", ["--config", str(tmp_path / "dots.yaml")])


def test_nothing_is_refused_early_with_a_lightning_of_other_options(monkeypatch, capsys):
    made = {**known.option_list(), "made_with": {"lightning": "1.0.0"}}
    monkeypatch.setattr(known, "option_list", lambda: made)
    known.is_known.cache_clear()
    try:
        assert not known.is_known("fit")
        assert main(["fit", *QUICKSTART, "--trainer.max_epoch=1"]) == 2
        assert "unknown option trainer.max_epoch" in sentence(capsys)
    finally:
        known.is_known.cache_clear()


CLASSES = {
    "class": ("--selection=minirec_pl.callbacks.MiniRecc", "(did you mean MiniRec?)"),
    "lazy class": ("--model=minirec_pl.GRPOModule", "(did you mean GRPORecModule?)"),
    "class without a module": (
        "--selection.selector=RandomSelecter",
        "'RandomSelecter' (did you mean RandomSelector?)",
    ),
    "class of torch": ("--model.optimizer=torch.optim.AdmW", "(did you mean AdamW?)"),
    "function": ("--model.rewards=[minirec_pl.rewards.hits]", "(did you mean hit?)"),
    "module": ("--selection=minirec_pl.callback.MiniRec", "no attribute 'callback' (did you mean callbacks?)"),
    "option of torch": ("--model.optimizer.lrr=1", "model.optimizer.lrr (did you mean model.optimizer.lr?)"),
    "option of Lightning": ("--trainer.callbacks.monitr=a", "(did you mean trainer.callbacks.monitor?)"),
}


@pytest.mark.parametrize("name", CLASSES)
def test_the_nearest_class_or_option_of_one_is_named(name, command, tmp_path, capsys):
    override, fragment = CLASSES[name]
    capsys.readouterr()
    assert main(command.grpo(tmp_path / "runs", override)) == 2
    assert fragment in sentence(capsys)


@pytest.fixture(scope="module")
def listed():
    from helpers.option_list import option_list

    return option_list()


def without_subclasses(value):
    """Options without the classes that happen to be imported."""
    import re

    return json.loads(re.sub(r",? ?known subclasses: [^)]*", "", json.dumps(value)))


def test_the_list_of_options_is_that_of_the_parsers(listed):
    stored = known.option_list()
    if stored["made_with"] != listed["made_with"]:
        pytest.skip(f"the list was made with {stored['made_with']}")
    for part in ("commands", "groups", "classes"):
        assert without_subclasses(stored[part]) == without_subclasses(listed[part]), "run: make options"


def test_no_parser_takes_an_abbreviation(capsys):
    from importlib import import_module

    from helpers.option_list import trainer_parsers

    from minirec_pl.cli.main import OWN_COMMANDS

    own = {name: import_module(place).parser() for name, place in OWN_COMMANDS.items() if name != "check"}
    everyone = {**parsers(), **trainer_parsers(), **own}
    assert {"minirec", "fit", "validate", "test", "predict", "score", "select", "quickstart"} <= set(everyone)
    for name, parser in everyone.items():
        assert parser.allow_abbrev is False
        longest = max((word for word in parser._option_string_actions if word.startswith("--")), key=len)
        with pytest.raises((InputError, ValueError)) as refused:
            parser.parse_args([f"{longest[:-1]}=1"])
        assert longest[:-1].strip("-") in str(refused.value) or "required" in str(refused.value), name


def test_every_option_is_in_the_help(listed):
    for command in listed["commands"]:
        shown = known.help_of(command)
        assert [
            name for row in known.options_of(command).values() for name in row["names"][:2] if name not in shown
        ] == []
        assert max(map(len, shown.splitlines())) < 200


def test_a_nested_unknown_key_is_found_in_a_run_config(tmp_path):
    config = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())
    config["selection"]["init_args"]["curriculum"]["init_args"]["n_fold"] = 2
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match=r"mine.yaml, line \d+: unknown option selection.curriculum.n_fold "):
        check_command_line("fit", ["--config", str(tmp_path / "mine.yaml")])


def test_files_are_looked_for_in_the_folder_that_a_run_was_started_in(tmp_path, monkeypatch):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    interactions = home / "data" / "ml-100k" / "ml-100k.inter"
    for folder in (interactions.parent, home / "run", elsewhere):
        folder.mkdir(parents=True)
    interactions.write_text("user_id:token\n")
    config = {**yaml.safe_load((CONFIGS / "warm-start.yaml").read_text()), "working_dir": str(home)}
    (home / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(elsewhere)
    words = ["--config", str(home / "run" / "config.yaml")]
    check_command_line("fit", words)
    interactions.unlink()
    with pytest.raises(InputError, match=r"ml-100k.inter is missing"):
        check_command_line("fit", words)
    assert os.getcwd() == str(elsewhere)
