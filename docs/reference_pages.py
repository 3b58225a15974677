"""What mkdocs adds when it builds the site: reference pages out of signatures and docstrings, and measured results."""

from __future__ import annotations

import html
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_origin

from docstring_parser import Docstring, DocstringStyle, parse
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {  # page: title, introduction, what is on it
    "modules": (
        "Modules and data",
        "`model` and `data` of a config, and its section `warm_start`.",
        ["minirec_pl", "minirec_pl.cli.stages:WarmStart", "minirec_pl.trainers.recommender:RecModule"],
    ),
    "callbacks": (
        "Callbacks",
        "`selection` of a config is one of them; any may stand in `trainer.callbacks`.",
        ["minirec_pl.callbacks", "minirec_pl.probes:HeadProbe"],
    ),
    "selection": ("Selection", "Selectors, and the functions behind them.", ["minirec_pl.selection"]),
    "policy": (
        "Policies",
        "`model.init_args.policy` of a config.",
        ["minirec_pl.policy", "minirec_pl.policy.semantic_ids:SemanticIds"],
    ),
    "rewards": ("Rewards", "`model.init_args.rewards` of a config, by dotted path.", ["minirec_pl.rewards"]),
    "data": (
        "Data",
        "Sources (`data.init_args.source` of a config), and what is made of them.",
        ["minirec_pl.data.sources", "minirec_pl.data"],
    ),
    "functions": (
        "Objectives, gradients, metrics",
        "Pure tensor functions, and torchmetrics of full rankings.",
        ["minirec_pl.grpo", "minirec_pl.selection.probes.gradients", "minirec_pl.metrics"],
    ),
}
COMMANDS = "commands"
Described = tuple[str, Any]  # dotted name, class or function


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs: adds the pages."""
    for name, text in reference_pages().items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    files.append(File.generated(config, "contributing.md", abs_src_path=str(ROOT / "CONTRIBUTING.md")))
    for path in sorted(RESULTS.iterdir()):
        files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def reference_pages() -> dict[str, str]:
    """Markdown of each page, by name."""
    made: dict[str, str] = {}
    shown: set[Any] = set()
    for page, (title, intro, places) in PAGES.items():
        parts = [f"# {title}", intro]
        for dotted, thing in _described(places):
            if thing not in shown:
                parts += [f"## {dotted.rpartition('.')[2]}", *_entry(dotted, thing)]
            shown.add(thing)
        made[page] = "\n\n".join(parts) + "\n"
    return {**made, COMMANDS: _commands()}


def public_names(module: Any) -> Iterator[Described]:
    """Classes and functions of a module: those of `__all__`, else its own public ones and those of its submodules."""
    if hasattr(module, "__all__"):
        listed = [(name, getattr(module, name)) for name in module.__all__]
    else:
        listed = [(n, o) for n, o in vars(module).items() if getattr(o, "__module__", None) == module.__name__]
    for name, thing in listed:
        if not name.startswith("_") and (inspect.isclass(thing) or inspect.isfunction(thing)):
            yield f"{module.__name__}.{name}", thing
    if not hasattr(module, "__all__"):
        for found in pkgutil.iter_modules(getattr(module, "__path__", [])):
            for dotted, thing in public_names(import_module(f"{module.__name__}.{found.name}")):
                if thing.__module__ == dotted.rpartition(".")[0]:
                    yield dotted, thing


def _described(places: list[str]) -> Iterator[Described]:
    for place in places:
        module, _, name = place.partition(":")
        if name:
            yield f"{module}.{name}", getattr(import_module(module), name)
        else:
            yield from sorted(public_names(import_module(module)), key=lambda one: one[0].lower())


def _entry(dotted: str, thing: Any) -> Iterator[str]:
    text = _parsed(thing)
    own = vars(thing).get("__init__") if inspect.isclass(thing) else None
    more = _parsed(own) if own is not None and own.__doc__ else Docstring()
    kind = "class" if inspect.isclass(thing) else "function"
    yield f"*{kind}* `{dotted}`"
    yield from filter(None, [_prose(text.short_description), _prose(text.long_description)])
    params = {one.arg_name: one.description for one in (*text.params, *more.params) if one.args[0] == "param"}
    if rows := list(_options(own if inspect.isclass(thing) else thing, params)):
        yield _table(("option", "type", "default", "meaning"), rows)
    if rows := [(_code(one.arg_name), _cell(one.description)) for one in text.params if one.args[0] == "attribute"]:
        yield _table(("attribute", "meaning"), rows)
    if text.returns is not None and text.returns.description:
        yield f"Returns: {_flat(text.returns.description)}"
    for raised in (*text.raises, *more.raises):
        yield f"Raises `{raised.type_name}`: {_flat(raised.description)}"
    if inspect.isclass(thing) and (rows := list(_methods(thing))):
        yield _table(("method", "what it does"), rows)
    for example in text.examples:
        lines = inspect.cleandoc("\n" + (example.snippet or example.description or ""))
        yield "```pycon\n" + re.sub(r" +# doctest:.*", "", lines) + "\n```"


def _parsed(thing: Any) -> Docstring:
    return parse(re.sub(r":\w+:`", "`", inspect.getdoc(thing) or ""), style=DocstringStyle.GOOGLE)


def _options(function: Callable[..., Any] | None, described: dict[str, str | None]) -> Iterator[tuple[str, ...]]:
    """Rows of the parameters; of a tuple or a dataclass without a documented constructor there are none."""
    if function is None or not described:
        return
    for name, parameter in inspect.signature(function).parameters.items():
        if name == "self" or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        required = parameter.default is parameter.empty
        default = "required" if required else _code(getattr(parameter.default, "__name__", repr(parameter.default)))
        if repr(parameter.default) == "<factory>":
            default = "see the text"
        yield _code(name), _code(_kind(parameter.annotation, function)), default, _cell(described.get(name))


def _kind(given: Any, function: Any) -> str:
    """A type as it is written, the choices in place of their alias."""
    alias = function.__globals__.get(given) if isinstance(given, str) else None
    given = alias if get_origin(alias) is Literal else given
    if given is inspect.Parameter.empty:
        return ""
    return given if isinstance(given, str) else inspect.formatannotation(given).replace("typing.", "")


def _methods(thing: type) -> Iterator[tuple[str, str]]:
    for name, member in vars(thing).items():
        if name.startswith("_") or any(hasattr(base, name) for base in thing.__mro__[1:]):
            continue
        function = getattr(member, "__func__", member)
        if inspect.isfunction(function) and function.__doc__:
            names = ", ".join(n for n in inspect.signature(function).parameters if n not in ("self", "cls"))
            yield _code(f"{name}({names})"), _cell(function.__doc__.split("\n\n")[0])


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _flat(text: str | None) -> str:
    return " ".join((text or "").split())


def _cell(text: str | None) -> str:
    """Text for a table: a pipe would end its cell."""
    return re.sub(r"`([^`]*\|[^`]*)`", lambda found: _code(found[1]), _flat(text)).replace("|", "&#124;")


def _code(text: str) -> str:
    return f"<code>{html.escape(text, quote=False).replace('|', '&#124;')}</code>"


def _prose(text: str | None) -> str:
    """A docstring's text as Markdown: lists need a blank line before them, and formulas keep their lines."""
    return re.sub(r"(?<=[^\n])\n(?=(?:\* |\d\. |\|))(?<!\|\n)", r"\n\n", text or "", count=1)


def _commands() -> str:
    """The help of every command, as the terminal shows it."""
    from minirec_pl.cli.describe import parser as describe
    from minirec_pl.cli.main import TRAINER_COMMANDS, parsers
    from minirec_pl.cli.score import ScoringTrainer
    from minirec_pl.cli.select import parser as select

    parts = [
        "# Commands",
        "`fit`, `validate`, `test`, `predict` and `score` are those of LightningCLI: `--config FILE`, any key of the "
        "config as `--section.key=value`, `--print_config`, and `--ckpt_path` where a checkpoint is read. What follows "
        "is what they have beyond that, and the other commands.",
    ]
    for name in TRAINER_COMMANDS:
        method = vars(ScoringTrainer).get(name)
        if method is not None:
            parts += [f"## minirec {name}", *_entry(f"minirec_pl.cli.score.ScoringTrainer.{name}", method)]
    own = {"minirec select": select(), "minirec data describe": describe(), "minirec": parsers()["minirec"]}
    for title, parser in own.items():
        parts += [f"## {title}", f"```text\n{parser.format_help().strip()}\n```"]
    return "\n\n".join(parts) + "\n"
