"""Every YAML file under configs/ is parsed, its classes are made, and each of its keys is explained."""

import inspect
import re
from fractions import Fraction
from importlib import import_module

import pytest
import yaml
from helpers.cli_tools import REPOSITORY
from helpers.text_policy import write_model
from lightning.pytorch import Trainer

from minirec_pl.cli.fit import MiniRecCLI, run
from minirec_pl.cli.main import main
from minirec_pl.cli.stages import WarmStart
from minirec_pl.policy import LanguageModel, Lora, PromptTemplate

FILES = sorted((REPOSITORY / "configs").rglob("*.yaml"))
STRUCTURE = {"class_path", "init_args", "model", "data", "trainer"}
WITHOUT_CLASS_PATH = (Trainer, WarmStart, LanguageModel, Lora, PromptTemplate)
KEY = re.compile(r"^(?P<indent> *(?:- )?)(?P<key>[\w]+):(?P<rest>.*)$")


def name_of(path):
    return str(path.relative_to(REPOSITORY))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_it_parses_and_its_classes_can_be_made(path, command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(MiniRecCLI, "_run_subcommand", lambda self, subcommand: None)
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
    assert ("MiniRec" in made) == (config["selection"] is not None)
    assert (cli.config_init["fit"].warm_start is not None) == ("warm_start" in config)
    assert "RunFolder" in made
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(path), "--print_config"])
    shown = yaml.safe_load(capsys.readouterr().out)
    for section in ("model", "data", "selection"):
        assert contains(shown[section], config[section])


def contains(whole, part):
    if isinstance(part, dict):
        return all(key in whole and contains(whole[key], value) for key, value in part.items())
    return whole == part or (isinstance(whole, (list, tuple)) and list(whole) == part)


def commented_keys(path):
    """(line number, key, comment) of each key; the comment stands on its line or on the lines right above."""
    above = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip().startswith("#"):
            above.append(line.strip("# "))
            continue
        if match := KEY.match(line):
            comment = match["rest"].partition(" # ")[2] or " ".join(above)
            yield number, match["key"], comment
        above = []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_each_key_is_explained(path):
    found = list(commented_keys(path))
    assert len(found) > 20
    bare = [(number, key) for number, key, comment in found if key not in STRUCTURE and len(comment) < 8]
    assert not bare


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_stated_defaults_are_those_of_the_code(path):
    stated = {}
    for _, key, comment in commented_keys(path):
        if match := re.search(r"Default ([^.]*(?:\.\d[^.]*)*)\.", comment):
            stated.setdefault(key, []).append(match[1])
    defaults, resolved = {}, set()
    for target in (*WITHOUT_CLASS_PATH, *classes_in(yaml.safe_load(path.read_text()))):
        for name, parameter in inspect.signature(target).parameters.items():
            if parameter.default is None and target.__module__.startswith("lightning."):
                resolved.add(name)
            elif parameter.default is not parameter.empty:
                defaults.setdefault(name, set()).add(spell(parameter.default))
    checked = {(key, text) for key, texts in stated.items() for text in texts if key in defaults.keys() - resolved}
    wrong = [(key, text, defaults[key]) for key, text in checked if plain(text.split(" with ")[0]) not in defaults[key]]
    assert not wrong
    assert len(checked) > 15


def classes_in(node):
    """Every class that a config names."""
    if isinstance(node, dict):
        if "class_path" in node:
            module, _, name = node["class_path"].rpartition(".")
            yield getattr(import_module(module), name)
        node = list(node.values())
    for child in node if isinstance(node, list) else []:
        yield from classes_in(child)


def plain(text):
    """`0` and `1/3` as Python spells the floats where the code has floats."""
    try:
        return spell(float(Fraction(text)))
    except ValueError:
        return text


def spell(value):
    """A default as the comments spell it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (tuple, list)):
        return ", ".join(getattr(one, "__name__", str(one)) for one in value)
    if isinstance(value, (int, float)):
        return str(float(value))
    return getattr(value, "__name__", str(value))
