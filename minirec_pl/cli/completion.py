"""`minirec completion`: a script that completes commands, options and their values, and starts no Python."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping
from typing import Any

from minirec_pl.cli.known import option_list, options_of

OFFERED = {  # options of classes that are offered, by the option that names the class
    "model": ("minirec_pl.GRPORecModule", "minirec_pl.WarmStartModule"),
    "model.policy": ("minirec_pl.policy.GenerativePolicy", "minirec_pl.policy.RetrievalPolicy"),
    "data": ("minirec_pl.RecDataModule",),
    "selection": ("minirec_pl.callbacks.MiniRec", "minirec_pl.callbacks.SelectSamples"),
    "selection.selector": ("minirec_pl.selection.MiniRecSelector", "minirec_pl.selection.RandomSelector"),
    "selection.curriculum": ("minirec_pl.callbacks.EasyToHardCurriculum",),
    "selector": ("minirec_pl.selection.MiniRecSelector", "minirec_pl.selection.RandomSelector"),
    "warm_start": ("minirec_pl.cli.stages.WarmStart",),
}
_ZSH = """
autoload -Uz compinit bashcompinit
(( $+functions[compdef] )) || compinit
bashcompinit"""
_SCRIPT = """\
# Completion of minirec for {shell}, made by `minirec completion {shell}`.{start}
_minirec() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" command="${{COMP_WORDS[1]}}"
  local option="" prefix="" words=""
  COMPREPLY=()
  if [[ "$COMP_CWORD" -gt 2 && "$command" == data ]]; then
    command="data ${{COMP_WORDS[2]}}"
  fi
  if [[ "$current" == "=" ]]; then
    option="$before" current=""
  elif [[ "$before" == "=" ]]; then
    option="${{COMP_WORDS[COMP_CWORD-2]}}"
  elif [[ "$current" == --*=* ]]; then
    option="${{current%%=*}}" prefix="${{current%%=*}}=" current="${{current#*=}}"
  elif [[ "$before" == -* ]]; then
    option="$before"
  fi
  case "$COMP_CWORD $command" in
    "1 "*) words="{commands}" ;;
    "2 data") words="describe" ;;
    *)
      case "$command $option" in
{values}
      esac
      if [[ -z "$words" && "$current" == -* ]]; then
        case "$command" in
{options}
        esac
      fi ;;
  esac
  if [[ -n "$words" ]]; then
    COMPREPLY=($(compgen -P "$prefix" -W "$words" -- "$current"))
  elif [[ "$current" != -* ]]; then
    compopt -o filenames 2>/dev/null
    local IFS=$'\\n'
    COMPREPLY=($(compgen -P "$prefix" -f -- "$current"))
  fi
}}
complete -F _minirec minirec
"""


def script(shell: str, parsers: Mapping[str, argparse.ArgumentParser]) -> str:
    """Writes the script.

    Args:
        shell: `bash` or `zsh`.
        parsers: of the commands that are not in the list of options.
    """
    options: dict[str, list[str]] = {}
    values: dict[str, list[str]] = {}
    for command in option_list()["commands"]:
        options[command] = []
        for name, row in options_of(command).items():
            options[command] += row["names"]
            _add(values, f'*" --{name}"', row.get("values", OFFERED.get(name, ())))
        for at, kinds in OFFERED.items():
            if f"--{at.partition('.')[0]}" not in options[command]:
                continue
            for kind in kinds:
                for name, value in option_list()["classes"][kind].items():
                    options[command].append(f"--{at}.{name}")
                    _add(values, f'*" --{at}.{name}"', value.get("values", OFFERED.get(f"{at}.{name}", ())))
    for command, parser in parsers.items():
        if command == parser.prog:
            continue
        options[command] = [name for action in parser._actions for name in action.option_strings]
        for action in parser._actions:
            _add(values, f'"{command} "', () if action.option_strings else list(action.choices or ()))
    return _SCRIPT.format(
        shell=shell,
        start=_ZSH if shell == "zsh" else "",
        commands=" ".join(dict.fromkeys(name.partition(" ")[0] for name in options)),
        values="\n".join(f'        {pattern}) words="{" ".join(words)}" ;;' for pattern, words in values.items()),
        options="\n".join(
            f'          "{command}") words="{" ".join(dict.fromkeys(names))}" ;;' for command, names in options.items()
        ),
    )


def _add(values: dict[str, list[str]], pattern: str, words: Collection[Any]) -> None:
    if words:
        values[pattern] = [*dict.fromkeys([*values.get(pattern, ()), *map(str, words)])]
