"""Whether a user's object can stand in for one of ours, and in words what it lacks."""

from __future__ import annotations

import inspect
import sys
from typing import Any, TypeVar

T = TypeVar("T", bound=type)


def untyped(protocol: T) -> T:
    """Decorates a protocol so that a config can name any class with its methods, whatever their annotations.

    jsonargparse takes a class only where its annotations are the very same, and none otherwise.
    """
    for name in methods_of(protocol):
        getattr(protocol, name).__annotations__ = {}
    return protocol


def methods_of(kind: type) -> list[str]:
    """The methods that a protocol or an abstract class asks for."""
    if getattr(kind, "_is_protocol", False):
        return [name for name, value in vars(kind).items() if inspect.isfunction(value) and not name.startswith("_")]
    return sorted(getattr(kind, "__abstractmethods__", ()))


def what_it_lacks(found: object, name: str, wanted: type) -> str | None:
    """Says what keeps the objects of a class from being used as those of another.

    Args:
        found: what is named in place of a class, usually a class.
        name: its dotted name, for the sentence.
        wanted: a protocol or abstract class.

    Returns:
        "what is wrong: what to do", or None where nothing is wrong.
    """
    forms = {method: _form(method, getattr(wanted, method)) for method in methods_of(wanted)}
    shown = " and ".join(forms.values()) if len(forms) == 1 else f"the methods of {public_name(wanted)}"
    if not inspect.isclass(found):
        kind = "function" if inspect.isroutine(found) else type(found).__name__
        return f"{name} is a {kind} and no class: give a class with {shown}"
    is_protocol = getattr(wanted, "_is_protocol", False)
    if not is_protocol and not issubclass(found, wanted):
        return f"{name} is no {wanted.__name__}: derive it from {public_name(wanted)} and define {shown}"
    abstract = getattr(found, "__abstractmethods__", ())
    if missing := [method for method in forms if method in abstract or not callable(getattr(found, method, None))]:
        return f"{name} has no method {', '.join(missing)}: define {shown}"
    for method, form in forms.items():
        own = getattr(found, method)
        if not takes(own, getattr(wanted, method)):
            return f"{name}.{_form(method, own)[1:-1]} does not take what it is given: define {form}"
    return None


def takes(own: Any, wanted: Any) -> bool:
    """Whether a function can be called with the arguments of another, by position and by keyword."""
    given = inspect.signature(wanted).parameters.values()
    by_place = [p.name for p in given if p.kind is p.POSITIONAL_OR_KEYWORD]
    by_name = {p.name: p.default for p in given if p.kind is p.KEYWORD_ONLY}
    return accepts(own, *by_place, **by_name)


def accepts(function: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether a function takes these arguments; True where that cannot be known."""
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):
        return True
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def public_name(kind: type) -> str:
    """The dotted name under which a class is imported: of the package that exports it, if one does."""
    parts = kind.__module__.split(".")
    packages = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    exports = [package for package in packages if getattr(sys.modules.get(package), kind.__name__, None) is kind]
    return f"{exports[0]}.{kind.__name__}"


def _form(name: str, method: Any) -> str:
    signature = inspect.signature(method)
    plain = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return f"`{name}{signature.replace(parameters=plain, return_annotation=signature.empty)}`"
