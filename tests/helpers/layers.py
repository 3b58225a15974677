"""The layers of the package: no import goes upward, no two files import each other, only `cli` imports the callbacks.

`python tests/helpers/layers.py` prints the rooms from top to bottom and what each imports, and exits 1 where a rule is
broken. Imports inside functions and for type checking count; what an `__init__` re-exports for users does not.
"""

import ast
import sys
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLOORS = (  # from the top; rooms of one floor do not import each other
    {"cli.compare"},
    {"cli"},
    {"callbacks"},
    {"reporting", "trainers"},
    {"grpo", "metrics"},
    {"policy", "selection.session"},
    {"policy.language_models", "rewards", "selection.probes", "selection.selectors"},
    {"data", "selection"},
    {"utils"},
)
PARTS = {"selection.maxmin": "selection", "data.sources": "data"}  # folders that belong to the room around them
ABOVE = {"callbacks": {"cli", "cli.compare"}}  # the only rooms that may import a room


def modules(root: Path) -> dict[str, Path]:
    """Files of the package by dotted name."""
    found = {}
    for folder, package in ((root / "minirec_pl", "minirec_pl"), (root / "callbacks", "minirec_pl.callbacks")):
        for path in folder.rglob("*.py"):
            inside = path.relative_to(folder).with_suffix("").parts
            if package == "minirec_pl" and inside[0] == "callbacks":
                continue
            name = ".".join((package, *inside))
            found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a file imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            names |= {dotted if dotted in known else node.module for dotted in inside.values()}
    return names & known.keys()


def is_facade(path: Path) -> bool:
    return path.name == "__init__.py"


def room_of(name: str, path: Path) -> str:
    """The folder of a module; of a package itself, that package."""
    inside = name.removeprefix("minirec_pl").strip(".")
    room = inside if is_facade(path) else inside.rpartition(".")[0]
    return PARTS.get(room, room)


def faults(root: Path = ROOT) -> tuple[dict[str, set[str]], list[str]]:
    """What each room imports, and the rules that are broken, in words."""
    known = modules(root)
    files = {name: imports(path, known) for name, path in known.items() if not is_facade(path)}
    floor = {room: number for number, rooms in enumerate(reversed(FLOORS)) for room in rooms}
    arrows, broken = defaultdict(set), []
    for name, found in sorted(files.items()):
        room = room_of(name, known[name])
        if not room:
            continue  # files at the top re-export public paths
        if room not in floor:
            broken.append(f"{name} lies in a folder without a floor: give {room} one in {Path(__file__).name}")
            continue
        for other in sorted(found):
            there = room_of(other, known[other])
            if is_facade(known[other]) and there in ("", room):
                broken.append(f"{name} imports {other}, which is for users: name the file that has it")
            if there in ("", room):
                continue
            arrows[room].add(there)
            if floor.get(there, -1) >= floor[room]:
                broken.append(f"{name} imports {other}, which is not below it")
            if room not in ABOVE.get(there, {room}):
                broken.append(f"{name} imports {other}, which only {', '.join(sorted(ABOVE[there]))} may")
    try:
        TopologicalSorter({name: {o for o in found if o in files} for name, found in files.items()}).prepare()
    except CycleError as error:
        broken.append("files import each other: " + " <- ".join(error.args[1]))
    return arrows, broken


def main(root: Path = ROOT) -> int:
    arrows, broken = faults(root)
    rooms = [room for rooms in FLOORS for room in sorted(rooms)]
    for room in rooms:
        print(f"{room:24} -> {', '.join(r for r in rooms if r in arrows[room]) or '-'}")
    n_arrows = sum(map(len, arrows.values()))
    print(f"{len(rooms)} rooms on {len(FLOORS)} floors, {n_arrows} arrows, {len(broken)} rules broken")
    for line in broken:
        print(line)
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
