"""Every option that a sentence names can be typed as it stands there, with -- before it."""

import ast
import re
from pathlib import Path

import pytest
from helpers.paths import CONFIGS, DOCS, REPOSITORY
from helpers.slow import slow

from minirec_pl.cli.fit import parsed
from minirec_pl.utils.errors import InputError

TOP = ("model", "data", "trainer", "selection", "warm_start")
INSIDE = ("policy", "prompt", "lora", "language_model", "selector", "source", "curriculum", "optimizer")
NAME = re.compile(rf"(?<![\w./@-])(?:--)?((?:{'|'.join(TOP + INSIDE)})(?:\.[a-z_]+)+)(?![\w/.]*[/(]|\w)")
FILES = re.compile(r"\.(png|parquet|safetensors|json|md|py|csv|yaml|txt|html)$")
NO_OPTIONS = {
    "selector.mode",  # of `minirec select`, which has no model
    "selector.help",
    "selection.help",
    "trainer.allow_changed_data",  # an attribute
}
CLASSES = {"model.policy": "minirec_pl.policy.GenerativePolicy"}  # options that take nothing else
SETTINGS = {  # a config for each kind of option, and what it needs to be parsed
    "generative": [CONFIGS / "ml-100k" / "quickstart.yaml"],
    "language model": [CONFIGS / "ml-100k" / "smollm2-135m.yaml"],
    "random": [CONFIGS / "ml-100k" / "quickstart.yaml", "--selection.selector=minirec_pl.selection.RandomSelector"],
    "retrieval": [CONFIGS / "amazon-cds" / "gemma-2-2b.yaml"],
    "own data": [CONFIGS / "own-data" / "template.yaml"],
    "log": [
        CONFIGS / "ml-100k" / "quickstart.yaml",
        "--data.source=minirec_pl.data.sources.InteractionTable",
        "--data.source.interactions=log.csv",
    ],
}


def texts_of(path: Path) -> list[str]:
    """The strings of a file that are no docstrings; of an f-string its parts, with the constants of the file put in."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = {
        id(n.body[0].value)
        for n in ast.walk(tree)
        if isinstance(n, documented) and n.body and isinstance(n.body[0], ast.Expr)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            names = [
                part.value if isinstance(part, ast.Constant) else str(constants.get(getattr(part.value, "id", ""), " "))
                for part in node.values
            ]
            found.append("".join(map(str, names)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            found.append(node.value)
    return found


def names_in(text: str) -> set[str]:
    found = {match[1] for match in NAME.finditer(text) if not FILES.search(match[1])}
    return {name for name in found if name not in NO_OPTIONS and name.split(".")[1] != "init_args"}


def sentences() -> dict[str, str]:
    """Each option that is named anywhere, and where."""
    files = [*(REPOSITORY / "callbacks").rglob("*.py"), *(REPOSITORY / "minirec_pl").rglob("*.py")]
    found = {}
    for path in sorted(files):
        for text in texts_of(path):
            found |= dict.fromkeys(names_in(text), path.name)
    rows = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    return found | dict.fromkeys(names_in(rows), "troubleshooting.md")


def is_typed(name: str, value: str = "null") -> bool:
    """Whether some config takes --name, whatever it then says of the value."""
    for words in SETTINGS.values():
        config, *more = map(str, words)
        try:
            parsed(["fit", "--config", config, *more, f"--{name}={value}"])
        except InputError as error:
            if not str(error).startswith(f"{name}: "):
                continue
        return True
    return False


def test_the_collection_finds_what_is_there() -> None:
    found = sentences()
    for name in ("model.policy.pretrained", "model.policy.language_model.lora.target_modules", "data.history_window"):
        assert name in found
    assert names_in("set --policy.init_args.pretrained, or lora.r to 4 in config.yaml (see data.parquet)") == {"lora.r"}
    assert names_in("fix policy.pretrained") == {"policy.pretrained"}


def test_names_begin_at_the_top() -> None:
    wrong = {name: place for name, place in sentences().items() if name.split(".")[0] in INSIDE}
    assert not wrong, f"say --model.policy... or --data.source...: {wrong}"


def test_no_sentence_names_an_option_by_the_way_it_is_stored() -> None:
    """A config has init_args; nobody types them."""
    for path in [*(REPOSITORY / "callbacks").rglob("*.py"), *(REPOSITORY / "minirec_pl").rglob("*.py")]:
        for text in texts_of(path):
            assert "init_args." not in text or " " not in text, f"{path.name}: {text}"
    assert "init_args." not in (DOCS / "troubleshooting.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name", ["model.policy.pretrained", "model.policy.prompt.longest_title", slow("data.source.separator")]
)
def test_an_option_can_be_typed(name: str) -> None:
    assert is_typed(name)
    assert not is_typed(f"{name}_")
    assert not is_typed(name.removeprefix("model.").removeprefix("data."))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(name for name in sentences() if name.split(".")[0] in TOP))
def test_each_option_that_is_named_can_be_typed(name: str) -> None:
    assert is_typed(name, CLASSES.get(name, "null")), f"{sentences()[name]} names {name}"
