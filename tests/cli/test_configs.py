"""Every YAML file under configs/ is parsed, its classes are made, and it holds what differs from the defaults alone."""

import inspect
import re
from contextlib import redirect_stdout
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from importlib import import_module
from io import StringIO
from itertools import pairwise

import pytest
import yaml
from helpers.cli_tools import REPOSITORY
from helpers.slow import slow
from helpers.text_policy import write_model
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer

from minirec_pl.cli.fit import MiniRecCLI, run
from minirec_pl.cli.main import main
from minirec_pl.cli.stages import WarmStart
from minirec_pl.policy import LanguageModel, Lora, PromptTemplate

FILES = sorted((REPOSITORY / "configs").rglob("*.yaml"))
LIKE_OTHERS = ("qwen2.5-3b", "smollm2-135m")
SECTIONS = {
    "trainer": Trainer,
    "warm_start": WarmStart,
    "language_model": LanguageModel,
    "lora": Lora,
    "prompt": PromptTemplate,
}
TOP = {
    "seed_everything": 42,
    "selection": None,
    "warm_start": None,
    "test_stages": False,
    "ckpt_path": None,
    "working_dir": None,
}
PUBLIC = ("", ".callbacks", ".selection", ".policy", ".rewards", ".data.sources")
KEY = re.compile(r"^ *(?:- )?(\w+):(?: |$)")


def name_of(path):
    return str(path.relative_to(REPOSITORY))


@pytest.mark.parametrize("path", [slow(path) if path.stem in LIKE_OTHERS else path for path in FILES], ids=name_of)
def test_it_parses_and_its_classes_can_be_made(path, command, printed, tmp_path, monkeypatch):
    monkeypatch.setattr(MiniRecCLI, "_run_subcommand", lambda self, subcommand: None)
    monkeypatch.setattr(MiniRecCLI, "_check_inputs", lambda self: None)
    policy = [f"--model.policy.pretrained={command.policy}"] if "pretrained: runs/" in path.read_text() else []
    if "language_model:" in path.read_text():
        policy = [f"--model.policy.init_args.language_model.name={write_model(tmp_path / 'model')}"]
    cli = run(["fit", "--config", str(path), f"--trainer.default_root_dir={tmp_path}", *policy])
    config = yaml.safe_load(path.read_text())
    assert type(cli.model).__name__ == config["model"]["class_path"].rsplit(".", 1)[-1]
    assert type(cli.datamodule).__name__ == config["data"]["class_path"].rsplit(".", 1)[-1]
    made = {type(callback).__name__ for callback in cli.trainer.callbacks}
    wanted = {entry["class_path"].rsplit(".", 1)[-1] for entry in config["trainer"]["callbacks"]}
    assert wanted <= made
    assert ("MiniRec" in made) == ("selection" in config)
    assert (cli.config_init["fit"].warm_start is not None) == ("warm_start" in config)
    assert "RunFolder" in made
    shown = yaml.safe_load(printed(path))
    for section in {"model", "data", "selection"} & set(config):
        assert contains(shown[section], config[section])


def contains(whole, part):
    if isinstance(part, dict):
        return all(key in whole and contains(whole[key], value) for key, value in part.items())
    if isinstance(part, list):
        return len(whole) == len(part) and all(contains(*pair) for pair in zip(whole, part, strict=True))
    return whole == part


@pytest.fixture(scope="module")
def printed():
    """What `--print_config=comments` prints for a file."""

    @cache
    def text(path):
        with redirect_stdout(StringIO()) as out, pytest.raises(SystemExit):
            main(["fit", "--config", str(path), "--print_config=comments"])
        return out.getvalue()

    return text


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_the_command_that_runs_it_stands_on_top(path):
    lines = path.read_text().splitlines()
    head = lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]
    commands = [line.strip("# ").split(" --config ") for line in head if " --config " in line]
    assert {command for command, _ in commands} >= {"minirec fit"}
    assert {rest.split()[0] for _, rest in commands} == {name_of(path)}


@pytest.mark.parametrize("path", [*FILES, REPOSITORY / "benchmarks" / "studies" / "base.yaml"], ids=name_of)
def test_no_key_repeats_a_default(path):
    config = yaml.safe_load(path.read_text())
    assert list(repeated(config, TOP)) == []


def test_a_repeated_default_is_found_wherever_it_stands():
    config = yaml.safe_load((REPOSITORY / "configs" / "amazon-cds" / "gemma-2-2b.yaml").read_text())
    policy = config["model"]["init_args"]["policy"]["init_args"]
    config["seed_everything"] = 42
    policy["language_model"]["lora"]["target_modules"] = Lora().target_modules
    policy["prompt"]["date"] = "2026-01-01"
    config["data"]["init_args"] |= {"split": [0.8, 0.1, 0.1], "source": None}
    config["selection"]["init_args"]["selector"]["init_args"]["gate"] = [0.05, 0.95]
    config["model"]["init_args"]["optimizer"] = {"class_path": "torch.optim.AdamW"}
    config["trainer"]["logger"][0]["init_args"]["flush_logs_every_n_steps"] = 100
    assert sorted(repeated(config, TOP)) == [
        "data.init_args.source",
        "data.init_args.split",
        "model.init_args.optimizer",
        "model.init_args.policy.init_args.language_model.lora.target_modules",
        "model.init_args.policy.init_args.prompt.date",
        "seed_everything",
        "selection.init_args.selector.init_args.gate",
        "trainer.logger.0.init_args.flush_logs_every_n_steps",
    ]


def repeated(node, defaults, place=""):
    """Where a config says what holds without it; a learning rate, which makes a recipe, may be said in any case."""
    if isinstance(node, list):
        node, defaults = dict(enumerate(node)), {}
    for key, value in node.items():
        where = f"{place}{key}"
        if key in defaults and key != "lr" and plain(value) == plain(defaults[key]):
            yield where
        elif isinstance(value, dict) and "class_path" in value:
            yield from repeated(
                value.get("init_args", {}), defaults_of(class_at(value["class_path"])), f"{where}.init_args."
            )
        elif isinstance(value, (dict, list)):
            yield from repeated(value, defaults_of(SECTIONS[key]) if key in SECTIONS else {}, f"{where}.")


def class_at(dotted):
    module, _, name = dotted.rpartition(".")
    return getattr(import_module(module), name)


def defaults_of(target):
    made = {
        field.name: field.default_factory()
        for field in (fields(target) if is_dataclass(target) else ())
        if field.default_factory is not MISSING
    }
    return made | {
        name: parameter.default
        for name, parameter in inspect.signature(target).parameters.items()
        if parameter.default is not parameter.empty and name not in made
    }


def plain(value):
    """A value as YAML has it; a class stands for its `class_path` without options."""
    if inspect.isclass(value):
        return {"class_path": f"{value.__module__}.{value.__qualname__}"}
    if isinstance(value, dict) and "class_path" in value:
        return {
            **plain(class_at(value["class_path"])),
            **{key: part for key, part in value.items() if key == "init_args"},
        }
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_the_printed_config_has_a_line_of_comment_above_each_option(path, printed):
    shown = printed(path)
    model_options = yaml.safe_load(shown)["model"]["init_args"]["policy"]["init_args"].get("config") or {}
    lines = [line for line in shown.splitlines() if line.strip()]
    bare = [
        match[1] for above, line in pairwise(lines) if (match := KEY.match(line)) and not above.strip().startswith("# ")
    ]
    assert set(bare) <= {"class_path", *model_options}
    comments = [line for line in lines[2:] if line.strip().startswith("#")]
    assert len(comments) > 100
    assert not [line for line in comments if line.strip().startswith("# (")]


@pytest.mark.parametrize("package", PUBLIC, ids=lambda package: f"minirec_pl{package}")
def test_each_option_of_a_public_class_is_documented(package):
    module = import_module(f"minirec_pl{package}")
    classes = [getattr(module, name) for name in module.__all__ if inspect.isclass(getattr(module, name))]
    bare = []
    for one in classes:
        parser = ArgumentParser()
        if not (inspect.isabstract(one) or issubclass(one, Exception)):
            parser.add_class_arguments(one, one.__name__, fail_untyped=False)
        bare += [action.dest for action in parser._actions if not str(action.help or "").strip()]
    assert classes
    assert not bare
