"""What is wrong with a class or function that a config names and the parser refuses."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path

from minirec_pl.utils.protocols import what_it_lacks

_WANTED = {
    "Selector": "minirec_pl.selection",
    "Curriculum": "minirec_pl.callbacks",
    "Source": "minirec_pl.data.sources",
    "Policy": "minirec_pl.policy",
}
_REFUSED = re.compile(
    r"Import path .*does not (?:implement protocol|correspond to a subclass of) (\w+)|"
    r"instantiatable class, but.* is abstract"
)
_NO_FUNCTION = re.compile(r"Expected '([\w.]+)' to be a class that instantiates into callable")
_NAMED = re.compile(
    r"(?:Import path |class, but |Given value: |Got value: |class_path=|val=)\[?'?([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)'?"
)
_NOT_THERE = re.compile(r"No module named '(\w+)'")
_NOT_IN_IT = re.compile(r"module '(\w+)' has no attribute")


def what_is_wrong(message: str) -> str | None:
    """Says what a user's own class lacks to be used where a config names it.

    Args:
        message: of jsonargparse.

    Returns:
        "what is wrong: what to do"; None where the message is about something else.
    """
    if no_function := _NO_FUNCTION.search(message):
        path = no_function[1]
        return f"the objects of {path} cannot be called: give a function, or a class with `__call__`"
    if (hidden := _NOT_IN_IT.search(message)) and (other := _hides_own_file(hidden[1])):
        return f"{hidden[1]}.py in this folder is hidden by {other}: rename it"
    missing = _NOT_THERE.search(message)
    if missing and (path := re.search(rf"\b{missing[1]}(?:\.\w+)+", message)):
        return (
            f"there is no module {missing[1]}, which '{path[0]}' is to be taken from: put {missing[1]}.py into the "
            "folder that the command runs in, or install it"
        )
    refused, named = _REFUSED.search(message), _NAMED.search(message)
    if refused is None or named is None:
        return None
    place, _, name = named[1].rpartition(".")
    try:
        found = getattr(import_module(place), name)
    except (ImportError, AttributeError):  # a class within a class
        return None
    base = refused[1] or next((kind.__name__ for kind in getattr(found, "__mro__", ()) if kind.__name__ in _WANTED), "")
    wanted = getattr(import_module(_WANTED[base]), base) if base in _WANTED else None
    return None if wanted is None else what_it_lacks(found, named[1], wanted)


def _hides_own_file(module: str) -> str | None:
    """The file of an installed module that is found before a file of the same name in the working folder."""
    own, found = Path.cwd() / f"{module}.py", getattr(sys.modules.get(module), "__file__", None)
    return found if own.is_file() and found is not None and Path(found).resolve() != own.resolve() else None
