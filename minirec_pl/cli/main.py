"""The `minirec` command: light until a subcommand needs more."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from minirec_pl.utils.errors import InputError
from minirec_pl.utils.seeds import check_seed

TRAINER_COMMANDS = {
    "fit": "train: warm start or GRPO, from a YAML file",
    "validate": "full-ranking metrics on the validation part",
    "test": "full-ranking metrics on the test part",
    "predict": "top-K recommendations as parquet",
    "score": "the signals of the pool, for `minirec select`",
}
OWN_COMMANDS = {
    "check": "minirec_pl.cli.check",
    "compare": "minirec_pl.cli.compare.command",
    "dashboard": "minirec_pl.cli.dashboard",
    "data describe": "minirec_pl.cli.describe",
    "export": "minirec_pl.cli.export",
    "report": "minirec_pl.cli.report",
    "select": "minirec_pl.cli.select",
}
OWN_HELP = {
    **TRAINER_COMMANDS,
    "select": "pick a subset from signals: ledger, plan, diagnostics, picture",
    "data describe": "what the data of a config hold",
    "report": "runs as one HTML page: quality, cost, what was picked and why",
    "export": "a policy's language model as an ordinary Hugging Face folder, adapters merged in",
    "compare": "selection methods at equal cost: every cell of a study, resumable",
    "dashboard": "a W&B workspace and a report template for the runs of a project",
    "check": "what a fit would do, need and trip over, before it starts",
}


def main(args: Sequence[str] | None = None) -> int:
    """Runs `minirec` and returns its exit code.

    Returns:
        0; 1 if `check` finds what would fail or a cell of `compare` failed; 2, with one sentence on stderr, for bad
        input and for Ctrl-C.
    """
    argv = list(sys.argv[1:] if args is None else args)
    path = sys.path
    try:
        sys.path = [*path, os.getcwd()]  # a config may name classes of files there
        return _dispatch(argv)
    except InputError as error:
        print(f"minirec: error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("minirec: interrupted; nothing half-written was kept", file=sys.stderr)
    finally:
        sys.path = path
    return 2


def _dispatch(argv: list[str]) -> int:
    small = parsers()
    if not argv:
        small["minirec"].print_help(sys.stderr)
        return 2
    if argv[0].startswith("-"):
        small["minirec"].parse_args([*argv[:1], "init"])  # help, version, or no such option
    length = 2 if argv[0] == "data" else 1
    command, words = " ".join(argv[:length]), argv[length:]
    if command == "data":
        raise InputError("minirec data has one command: minirec data describe --config FILE")
    if command in ("data --help", "data -h"):
        command, words = "data describe", ["--help"]
    if command in small:
        return _run_small(command, small[command].parse_args(words))
    from minirec_pl.cli.known import did_you_mean, help_of, is_known

    if command not in OWN_HELP:
        near = did_you_mean(command, [*OWN_HELP, *small])
        raise InputError(f"unknown command '{command}'{near}: see `minirec --help`")
    if is_known(command):
        if {"-h", "--help"} & set(words):
            print(help_of(command), end="")
            return 0
        from minirec_pl.cli.early import check_command_line
        from minirec_pl.cli.runs import in_working_dir

        trains = command in TRAINER_COMMANDS
        with in_working_dir([command, *words]) if trains else nullcontext([command, *words]) as resolved:
            check_command_line(command, resolved[1:])
    if command in TRAINER_COMMANDS:
        from minirec_pl.cli.fit import run

        run([command, *words])
        return 0
    return import_module(OWN_COMMANDS[command]).run(words) or 0


def _run_small(command: str, options: argparse.Namespace) -> int:
    if command == "fetch" and options.dataset == "smollm2-135m":
        from minirec_pl.policy.language_models.smollm2 import fetch_smollm2

        fetch_smollm2(Path(options.to or "models"))
    elif command == "fetch":
        from minirec_pl.data.fetch import fetch_ml_100k

        fetch_ml_100k(Path(options.to or "data"))
    elif command == "init":
        from minirec_pl.cli.configs import write_configs

        write_configs(Path(options.to))
    elif command == "completion":
        from minirec_pl.cli.completion import script

        print(script(options.shell, parsers()), end="")
    else:
        _quickstart(options)
    return 0


def _quickstart(options: argparse.Namespace) -> None:
    from minirec_pl.cli.configs import shipped_configs

    check_seed(options.seed, "--seed")
    data, configs = Path(options.data), Path(options.configs or shipped_configs() / "ml-100k")
    for path in (configs / "warm-start.yaml", configs / "quickstart.yaml"):
        if not path.is_file():
            raise InputError(f"there is no '{path}': give a folder that has it with --configs DIR")
    if not (data / "ml-100k" / "ml-100k.inter").is_file():
        raise InputError(f"there is no MovieLens-100K in '{data}': run `minirec fetch ml-100k --to {data}` first")
    from minirec_pl.cli.quickstart import quickstart

    quickstart(data, Path(options.to), configs, options.seed)


class _Parser(argparse.ArgumentParser):
    """Raises one sentence where argparse prints its usage and exits."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        """Raises the sentence."""
        if unknown := re.match(r"unrecognized arguments: --([^\s=]+)", message):
            from minirec_pl.cli.known import did_you_mean

            names = [name.lstrip("-") for name in self._option_string_actions]
            message = f"unknown option {unknown[1]}{did_you_mean(unknown[1], names)}"
        raise InputError(f"{message.removeprefix('argument ')}: see `{self.prog} --help`")


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Makes the parsers of the commands that are listed here only, and of `minirec` alone."""
    parser = _Parser(
        prog="minirec",
        usage="minirec COMMAND [options]",
        description="GRPO for recommenders on the small part of the data that teaches.",
        epilog="`minirec COMMAND --help` lists the options of a command.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=16),
    )
    version = import_module("minirec_pl").__version__
    parser.add_argument("--version", action="version", version=f"minirec-pl {version}", help="print the version")
    commands = parser.add_subparsers(
        dest="command", required=True, prog="minirec", title="commands", metavar="COMMAND [options]"
    )
    fetch = commands.add_parser(
        "fetch",
        help="download a public data set or language model",
        description="Downloads a public data set or language model.",
    )
    fetch.add_argument("dataset", choices=["ml-100k", "smollm2-135m"], help="which data set or model")
    fetch.add_argument(
        "--to", metavar="DIR", help="folder that gets a folder of its name (default: data, or models for a model)"
    )
    quick = commands.add_parser(
        "quickstart",
        help="compare GRPO on all, random and picked samples of MovieLens-100K",
        description="Trains a warm start, then GRPO from it on the full pool, on a random tenth and on the tenth that "
        "MiniRec picks; prints a line per stage and a table of quality and cost. Needs `minirec fetch ml-100k` first.",
    )
    quick.add_argument("--data", default="data", metavar="DIR", help="folder with ml-100k/ (default: data)")
    quick.add_argument("--to", default="runs/quickstart", metavar="DIR", help="run folder (default: runs/quickstart)")
    quick.add_argument(
        "--configs", metavar="DIR", help="folder with warm-start.yaml and quickstart.yaml (default: the shipped ones)"
    )
    quick.add_argument("--seed", type=int, default=42, help="seed of all runs (default: 42)")
    init = commands.add_parser(
        "init",
        help="write the shipped configs into a folder, to change them",
        description="Writes the shipped configs, a YAML file per recipe, into DIR/configs.",
    )
    init.add_argument("to", nargs="?", default=".", metavar="DIR", help="folder that gets configs/ (default: this one)")
    completion = commands.add_parser(
        "completion",
        help="a script that completes commands and options in bash or zsh",
        description="Prints a script that completes commands, options and their values. Keep it in a file that your "
        "shell reads at start, and make it anew after an upgrade.",
    )
    completion.add_argument("shell", choices=["bash", "zsh"], help="which shell")
    made: dict[str, argparse.ArgumentParser] = {"minirec": parser, **commands.choices}
    for name, text in OWN_HELP.items():
        commands.add_parser(name, help=text)
    return made
