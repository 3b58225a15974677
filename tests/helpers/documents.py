"""Markdown whose code runs: its blocks, its commands, and a folder in which both find what they name."""

import contextlib
import doctest
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from minirec_pl.cli.fit import MiniRecCLI, parsed, run
from minirec_pl.cli.main import main

from .cli_tools import REPOSITORY, write_toy
from .own_tables import item_frame, log_frame, sequence_frame
from .text_policy import write_model

FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", flags=re.MULTILINE | re.DOTALL)
OVERLAID = "configs/ml-100k/quickstart.yaml"  # what a YAML snippet changes


@dataclass(frozen=True)
class Block:
    """A fenced block and where it stands."""

    place: str
    language: str
    text: str


def blocks(path):
    """The fenced blocks of a file, in order."""
    text = Path(path).read_text(encoding="utf-8")
    return [
        Block(f"{path.name}, line {text.count(chr(10), 0, match.start()) + 1}", match[2], match[3])
        for match in FENCE.finditer(text)
    ]


def run_program(text, name):
    """The names that a program leaves behind."""
    names = {"__name__": "program"}
    exec(compile(text, name, "exec"), names)
    return names


def commands(text):
    """The words after `minirec` of each such command of a shell text, its variables filled in."""
    lines = re.split(r"\n| && ", re.sub(r"\\\n\s*", " ", text))
    words = [shlex.split(os.path.expandvars(line), comments=True) for line in lines if not line.startswith("#!")]
    return [line[line.index("minirec") + 1 :] for line in words if "minirec" in line]


def write_workplace(folder, warm_policy):
    """Toy data, configs and policies under the names that the texts use."""
    write_toy(folder / "data", name="ml-100k")
    (folder / "configs").symlink_to(REPOSITORY / "configs")
    run_folder = folder / "runs" / "ml-100k" / "warm-start" / "version_0"
    shutil.copytree(warm_policy, run_folder / "policy")
    (run_folder.parent / "latest").symlink_to(run_folder.name)
    write_own_data(folder / "data" / "own")
    write_model(folder / "models" / "smollm2-135m")


def write_own_data(own):
    """The files of a user, as the pages name them."""
    own.mkdir()
    log = log_frame(n=1500, n_users=25, n_moments=600, n_items=60)
    names = {"user_id": "customer", "item_id": "sku", "timestamp": "bought_at"}
    log.rename(columns=names).to_csv(own / "log.csv", index=False)
    items = item_frame(log).assign(category="toys")
    items.rename(columns={"item_id": "sku", "title": "name"}).to_csv(own / "items.csv", index=False)
    items.to_parquet(own / "items.parquet")
    sequence_frame(log).to_parquet(own / "sequences.parquet")
    items["item_id"].head(20).to_csv(own / "candidates.txt", index=False, header=False)
    pd.DataFrame({"user_id": ["new"], "history_item_id": [items["item_id"].head(3).tolist()]}).to_parquet(
        own / "users.parquet"
    )


def run_block(block):
    """Runs what a block shows, in the working folder.

    Python runs as it is, a console session is compared with what it prints, commands run one after the other, a script
    (with `#!`) is read by bash and its commands are parsed, and the classes of a YAML snippet are made.
    """
    if block.language == "python":
        run_program(block.text, block.place)
    elif block.language == "pycon":
        check_session(block)
    elif block.language == "bash":
        subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
        for words in commands(block.text):
            if block.text.startswith("#!") or words[0] in ("fetch", "quickstart"):
                parse(words)
            else:
                command = words[: words.index(">")] if ">" in words else words
                assert main(command) == 0, shlex.join(words)
    elif block.language == "yaml":
        Path("snippet.yaml").write_text(block.text, encoding="utf-8")
        make_classes(["--config", OVERLAID, "--config", "snippet.yaml"])
    else:
        assert block.language == "text", f"no test runs `{block.language}` blocks"


def shell_of(folder):
    """A function that runs words or a shell text in a folder as a user does, with `minirec` on the path.

    Only what is installed is importable besides; `minirec` finds files of the folder by itself.
    """
    bin_folder = folder / ".bin"
    bin_folder.mkdir(exist_ok=True)
    command = bin_folder / "minirec"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m minirec_pl "$@"\n')
    command.chmod(0o755)
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}

    def run_there(words):
        words = ["bash", "-e", "-c", words] if isinstance(words, str) else words
        done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done

    return run_there


def parse(words):
    """Refuses a command that does not exist or has no such options."""
    from minirec_pl.cli.main import TRAINER_COMMANDS, parsers

    if words[0] in TRAINER_COMMANDS:
        parsed(words)
    elif words[0] in ("fetch", "quickstart"):
        parsers()[words[0]].parse_args(words[1:])
    else:
        check_options(words)


def check_options(words):
    """Refuses a command that does not exist, or whose help does not name an option that is given."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        try:
            code = main([*words[: 1 + (words[0] == "data")], "--help"])
        except SystemExit as stop:
            code = stop.code
    assert code == 0
    options = [word.partition(".")[0] for word in words if word.startswith("--")]  # those of a class are not listed
    assert [option for option in options if option not in shown.getvalue()] == []


def make_classes(words):
    """Makes everything that a `minirec fit` with these words would, without running it."""
    run_subcommand = MiniRecCLI._run_subcommand
    MiniRecCLI._run_subcommand = lambda self, subcommand: None
    try:
        return run(["fit", *words, "--trainer.default_root_dir=made"])
    finally:
        MiniRecCLI._run_subcommand = run_subcommand


def check_session(block):
    """Compares a console session with what it shows."""
    session = doctest.DocTestParser().get_doctest(block.text, {}, block.place, block.place, 0)
    assert session.examples
    found = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(session, out=found.append)
    assert not found, "".join(found)
