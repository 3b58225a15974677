"""`minirec export`: a policy on a language model as an ordinary Hugging Face folder, its adapters merged in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from minirec_pl.cli.terminal import CommandParser
from minirec_pl.utils.errors import InputError
from minirec_pl.utils.files import replace_folder
from minirec_pl.utils.run_folder import CONFIG, SIDE_FILE


def export(policy: str | Path, to: str | Path) -> Path:
    """Writes the model of a policy folder with its adapters merged in, and its tokenizer.

    The merge is done in float32, and the result stored in the dtype of the policy's model.

    Args:
        policy: a folder that `save_pretrained` of a policy wrote.
        to: the folder to write; an older export there is replaced.

    Returns:
        `to`.

    Raises:
        InputError: if there is no policy on a language model in the folder, it cannot be read, or `to` cannot be
            written.

    Example:
        >>> export("runs/latest/policy", "models/mine")  # doctest: +SKIP
    """
    folder, target = Path(policy), Path(to)
    if not (folder / SIDE_FILE).is_file():
        if (own := _own_class(folder)) is not None:
            raise InputError(
                f"the policy in '{folder}' is a {own}, which has no language model to export: load it with that class"
            )
        raise InputError(
            f"there is no policy in '{folder}' ({SIDE_FILE} is missing): give the folder `policy` of a run"
        )
    if target.resolve() == folder.resolve():
        raise InputError(f"'{target}' is the policy itself: export it to another folder")
    try:
        dtype = json.loads((folder / SIDE_FILE).read_text(encoding="utf-8")).get("language_model", {}).get("dtype")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"'{folder / SIDE_FILE}' cannot be read ({error}): train or copy the policy again") from error
    import torch

    from minirec_pl.policy.language_models.pretrained import LanguageModel, save_language_model

    model, tokenizer = LanguageModel(str(folder), dtype="float32").load()
    stored = getattr(torch, dtype or "float32")
    replace_folder(
        target,
        lambda new: save_language_model(model, tokenizer, new, merge=True, dtype=stored),
        holds="config.json",
        what="model",
    )
    return target


def _own_class(folder: Path) -> str | None:
    """The class of a policy that is not this library's, by the config of its run."""
    try:
        config = yaml.safe_load((folder.parent / CONFIG).read_text(encoding="utf-8"))
        path = str(config["model"]["init_args"]["policy"]["class_path"])
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return None
    return path if folder.is_dir() and not path.startswith("minirec_pl.") else None


def parser() -> CommandParser:
    """Makes the parser of `minirec export`."""
    made = CommandParser(
        prog="minirec export",
        description="Writes a policy's language model as an ordinary Hugging Face folder, adapters merged in.",
    )
    made.add_argument("policy", help="folder of the policy, for example runs/.../policy")
    made.add_argument("--to", required=True, metavar="DIR", help="folder to write")
    return made


def run(arguments: Sequence[str]) -> None:
    """Runs `minirec export` on the words that follow it."""
    options = parser().parse_args(arguments)
    print(f"model: {export(options.policy, options.to)}")
