"""The `minirec` command: light until a subcommand needs more."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from minirec_pl.utils.errors import InputError

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
    "export": "minirec_pl.cli.export",
    "report": "minirec_pl.cli.report",
    "select": "minirec_pl.cli.select",
}
OWN_HELP = {
    **TRAINER_COMMANDS,
    "select": "pick a subset from signals: ledger, plan, diagnostics, picture",
    "data": "describe: what the data of a config hold",
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
    if argv and argv[0] in TRAINER_COMMANDS:
        from minirec_pl.cli.fit import run

        run(argv)
        return 0
    if argv and argv[0] in OWN_COMMANDS:
        return import_module(OWN_COMMANDS[argv[0]]).run(argv[1:]) or 0
    if argv and argv[0] == "data":
        if argv[1:2] in (["--help"], ["-h"]):
            argv = ["data", "describe", "--help"]
        if argv[1:2] != ["describe"]:
            raise InputError("minirec data has one command: minirec data describe --config FILE")
        from minirec_pl.cli.describe import run as describe

        describe(argv[2:])
        return 0
    parser = _parser()
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    options = parser.parse_args(argv)
    if options.command == "fetch" and options.dataset == "smollm2-135m":
        from minirec_pl.policy.language_models.smollm2 import fetch_smollm2

        fetch_smollm2(Path(options.to or "models"))
    elif options.command == "fetch":
        from minirec_pl.data.fetch import fetch_ml_100k

        fetch_ml_100k(Path(options.to or "data"))
    elif options.command == "init":
        from minirec_pl.cli.configs import write_configs

        write_configs(Path(options.to))
    else:
        from minirec_pl.cli.configs import shipped_configs
        from minirec_pl.cli.quickstart import quickstart

        configs = Path(options.configs) if options.configs else shipped_configs() / "ml-100k"
        quickstart(Path(options.data), Path(options.to), configs, options.seed)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minirec",
        usage="minirec COMMAND [options]",
        description="GRPO for recommenders on the small part of the data that teaches.",
        epilog="`minirec COMMAND --help` lists the options of a command.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=16),
    )
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
    for name, text in OWN_HELP.items():
        commands.add_parser(name, help=text)
    return parser
