"""Every option that a sentence of the code names exists under that name."""

import ast
import inspect
import re

from helpers.paths import REPOSITORY
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

FILES = [path for folder in ("minirec_pl", "callbacks") for path in sorted((REPOSITORY / folder).rglob("*.py"))]
TREES = {
    path: ast.parse(path.read_text()) for path in FILES if "callbacks" not in path.relative_to(REPOSITORY).parts[1:]
}
SPEAKS = re.compile(r"InputError|SourceError|warn|warn_once|error")
FOREIGN = (Trainer, DataLoader, ModelCheckpoint)
OTHERS = {  # of samplers, of peft, of `hf download`, and of files that Amazon's reviews come in
    "num_samples",
    "base_model_name_or_path",
    "local-dir",
    "rating_only",
}


def sentences():
    """The constant pieces of what is raised or warned, with their file and line."""
    for path, tree in TREES.items():
        for call in ast.walk(tree):
            if isinstance(call, ast.Call) and SPEAKS.fullmatch(ast.unparse(call.func).rpartition(".")[2]):
                for argument in call.args:
                    for node in ast.walk(argument):
                        if isinstance(node, ast.Constant) and isinstance(node.value, str):
                            yield f"{path.relative_to(REPOSITORY)}:{node.lineno}", node.value


def named(text):
    """Words of a sentence that can only be names: with an underscore, before an equals sign, or after two dashes."""
    plain = re.sub(
        r"https?://\S+|[\w./-]+\.(?:png|csv|json|jsonl|parquet|safetensors|txt|yaml|py|md)\b",
        "",
        text.replace("\\t", " "),
    )
    found = re.findall(r"(?<![\w.])[a-z]+(?:_[a-z0-9]+)+\b", plain) + re.findall(r"\b([a-z]\w*)=(?!=)", plain)
    return {*found, *(part for flag in re.findall(r"--([a-z][\w.-]*)", plain) for part in flag.split("."))}


def names():
    """Parameters, fields, functions, and texts that are one word, such as columns and flags."""
    known = {name for thing in FOREIGN for name in inspect.signature(thing.__init__).parameters}
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.arg):
                known.add(node.arg)
            elif isinstance(node, ast.FunctionDef | ast.ClassDef):
                known.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                known.add(node.target.id)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                known.add(node.value.lstrip("-"))
    return known


def test_every_option_that_a_sentence_names_exists():
    known, asked = names() | OTHERS, {}
    for place, text in sentences():
        for name in named(text):
            asked.setdefault(name, place)
    assert len(asked) > 100
    assert {name: place for name, place in asked.items() if name not in known} == {}


def test_a_name_that_is_none_would_be_found():
    assert named("set trainer.max_epoch to 3, or gate=(0, 1), with --selector.mu=2 in plan.parquet") == {
        "gate",
        "mu",
        "selector",
    }
    assert named("raise max_epoch") - names() == {"max_epoch"}
