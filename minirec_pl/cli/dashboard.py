"""`minirec dashboard`: a W&B workspace and a W&B report for the runs of a project."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from minirec_pl.cli.terminal import CommandParser
from minirec_pl.reporting.workspace import views
from minirec_pl.utils.errors import InputError


def parser() -> CommandParser:
    """Makes the parser of `minirec dashboard`."""
    made = CommandParser(
        prog="minirec dashboard",
        description="Builds a W&B workspace and a W&B report that show the runs of a project, which log by "
        "minirec_pl.callbacks.SelectionDashboard. Each call makes new ones.",
    )
    made.add_argument("--entity", help="W&B user or team")
    made.add_argument("--project", help="W&B project of the runs")
    made.add_argument("--dry-run", action="store_true", help="print both as JSON; needs no network and no login")
    return made


def run(arguments: Sequence[str]) -> None:
    """Runs `minirec dashboard` on the words that follow it."""
    options = parser().parse_args(arguments)
    for name, what in (("entity", "user or team"), ("project", "project")):
        if not re.fullmatch(r"[^/\s]+", options[name] or ""):
            raise InputError(
                f"--{name} is {options[name]!r}: give the name of a W&B {what}, as in "
                "`minirec dashboard --entity me --project minirec`"
            )
    if options.dry_run:
        made = views(options.entity, options.project)
        sent = {name: view._to_model().model_dump_json(by_alias=True, exclude_none=True) for name, view in made.items()}
        print(json.dumps({name: json.loads(text) for name, text in sent.items()}, indent=2))
        return
    _save(options.entity, options.project)


def _save(entity: str, project: str) -> None:
    import wandb

    made: list[str] = []
    try:
        wandb.Api()
        for name, view in views(entity, project).items():  # the report makes the project where it is new
            made.append(f"{name}: {view.save().url}")
    except wandb.errors.UsageError as error:
        raise InputError("you are not logged in to W&B: run `wandb login`, or use --dry-run") from error
    except (wandb.Error, OSError, ValueError) as error:
        kept = f" after {made[0]} was made" if made else ""
        raise InputError(
            f"W&B did not answer as it should{kept} ({' '.join(str(error).split())}): check the network, "
            f"`wandb login`, and that you may write to {entity}/{project}"
        ) from error
    finally:
        for line in made:
            print(line)
