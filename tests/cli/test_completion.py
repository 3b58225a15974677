"""The completion script in a real bash, and in zsh where it is installed."""

import os
import pty
import select
import shutil
import subprocess
import time

import pytest

from minirec_pl.cli.known import option_list
from minirec_pl.cli.main import OWN_HELP, main

ASK = """
source {script}
COMP_WORDS=({words}) COMP_CWORD={place}
_minirec 2>/dev/null
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
COMPLETED = {  # words, the last of them unfinished: what is offered
    "minirec sel": ["select"],
    "minirec data ''": ["describe"],
    "minirec data describe --tok": ["--tokenizer"],
    "minirec fit --trainer.max": ["--trainer.max_epochs", "--trainer.max_steps", "--trainer.max_time"],
    "minirec fit --model.num_gen": ["--model.num_generations"],
    "minirec fit --model.policy.pre": ["--model.policy.pretrained"],
    "minirec fit --model.loss_type ''": ["grpo", "bnpo", "dr_grpo", "dapo"],
    "minirec fit --model.loss_type = da": ["dapo"],
    "minirec fit --model.loss_type =": ["grpo", "bnpo", "dr_grpo", "dapo"],
    "minirec fit --model.loss_type=da": ["--model.loss_type=dapo"],
    "minirec fit --selection.selector.di": ["--selection.selector.difficulty"],
    "minirec score --sh": ["--shard"],
    "minirec fit --sh": [""],
    "minirec select --mode ''": ["paper", "official"],
    "minirec fetch ''": ["ml-100k", "smollm2-135m"],
    "minirec completion ''": ["bash", "zsh"],
    "minirec quickstart --see": ["--seed"],
    "minirec fit --config conf": ["configs"],
    "minirec fit --config=conf": ["--config=configs"],
}


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """A folder with a script for each shell."""
    from contextlib import redirect_stdout

    folder = tmp_path_factory.mktemp("completion")
    (folder / "configs").mkdir()
    for shell in ("bash", "zsh"):
        with (folder / shell).open("w") as file, redirect_stdout(file):
            assert main(["completion", shell]) == 0
    return folder


@pytest.mark.parametrize("words", COMPLETED)
def test_bash_completes(words, scripts):
    place = len(words.replace("''", "x").split()) - 1
    asked = ASK.format(script=scripts / "bash", words=words, place=place)
    done = subprocess.run(["bash", "-c", asked], cwd=scripts, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == COMPLETED[words]
    assert done.stderr == ""


def test_every_command_and_option_is_offered(scripts):
    text = (scripts / "bash").read_text()
    for command in [*OWN_HELP, "fetch", "init", "quickstart", "completion"]:
        assert f'"{command}") words="' in text
    for command, value in option_list()["commands"].items():
        (offered,) = [line for line in text.splitlines() if line.strip().startswith(f'"{command}") words="-')]
        rows = [row for key in value["groups"].values() for row in option_list()["groups"][key]]
        assert {name for row in rows for name in row["names"]} <= set(offered.partition('="')[2].split('"')[0].split())


def test_the_tab_key_completes_in_a_terminal(scripts):
    """In a bash on a terminal; no Python is started, so that it takes no time."""
    mother, child = pty.openpty()
    bare = {"PATH": os.environ["PATH"], "PS1": "> ", "TERM": "dumb", "HOME": str(scripts)}
    shell = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"], stdin=child, stdout=child, stderr=child, env=bare, cwd=scripts
    )
    os.close(child)
    try:
        os.write(mother, f"source {scripts / 'bash'}\nminirec fit --trainer.barebo\ttr\t".encode())
        seen, stop = "", time.monotonic() + 20
        while "--trainer.barebones true" not in seen and time.monotonic() < stop:
            if select.select([mother], [], [], 0.5)[0]:
                seen += os.read(mother, 4096).decode(errors="replace")
        assert "minirec fit --trainer.barebones true" in seen.replace("  ", " "), seen
    finally:
        shell.kill()
        shell.wait()
        os.close(mother)


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_reads_its_script(scripts):
    asked = f"source {scripts / 'zsh'} && print $_comps[minirec]"
    done = subprocess.run(["zsh", "-f", "-c", asked], cwd=scripts, capture_output=True, text=True, check=True)
    assert "_bash_complete" in done.stdout
