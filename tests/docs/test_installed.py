"""Every block of the README and the documentation in a folder of its own, with nothing but the installed package."""

import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from helpers.documents import blocks, write_own_data
from helpers.paths import DOCS, REPOSITORY
from helpers.text_policy import write_model

PAGES = [REPOSITORY / "README.md", *sorted(DOCS.glob("*.md"))]
DATA = REPOSITORY / "data" / "ml-100k"
LEFT_OUT = {  # commands that do not run here, and why
    "pip install": "the package is installed",
    "make ": "needs a checkout",
    "minirec fetch": "downloads; the data are linked, and the language model has a stand-in",
    "minirec quickstart": "takes minutes, and CI runs it by itself",
}
SCRIPTS = {"compare": 1, "language-models": 1, "scaling": 2}  # with #!: for hours, a GPU or a cluster
WORDS = {  # what stands for something in the README
    "RUN": "runs/ml-100k/quickstart/latest",
    "STUDY.yaml": "study.yaml",
    "CONFIG.yaml": "configs/ml-100k/quickstart.yaml",
    "--entity ME": "--dry-run --entity ME",
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason="MovieLens-100K is not here: minirec fetch ml-100k --to data"),
]


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """A virtual environment with the wheel; what it depends on is that of these tests."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        source.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, source)
    for name in ("minirec_pl", "callbacks", "configs"):
        ignored = shutil.ignore_patterns("__pycache__", *(["callbacks"] if name == "minirec_pl" else []))
        shutil.copytree(REPOSITORY / name, source / name, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    alone = ["--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "wheel", *alone, "--wheel-dir", str(folder), str(source)], check=True)
    venv.create(folder / "venv")
    python = folder / "venv" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    shutil.rmtree(source)
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "MINIREC_RUN_DIR")}
    paths = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    return {**kept, "PATH": paths, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}


def run(words, folder, environment):
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="session")
def prepared(environment, tmp_path_factory):
    """A folder with what the pages presume: the configs, the data, the warm start, a user's own data."""
    folder = tmp_path_factory.mktemp("prepared")
    where = run(["python", "-c", "import minirec_pl; print(minirec_pl.__file__)"], folder, environment)
    assert not Path(where.strip()).is_relative_to(REPOSITORY)
    (folder / "data").mkdir()
    shutil.copytree(DATA, folder / "data" / "ml-100k")
    run(["minirec", "init"], folder, environment)
    run(["minirec", "fit", "--config", "configs/ml-100k/warm-start.yaml"], folder, environment)
    (folder / "runs" / "quickstart").mkdir()
    (folder / "runs" / "quickstart" / "warm_start").symlink_to("../ml-100k/warm-start")
    write_own_data(folder / "data" / "own")
    write_model(folder / "models" / "smollm2-135m")
    (study,) = [block.text for block in blocks(DOCS / "compare.md") if block.language == "python"]
    exec(compile(study.replace('"study.yaml"', f'"{folder / "study.yaml"}"'), "compare.md", "exec"), {})
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_runs(page, prepared, environment, tmp_path):
    folder = shutil.copytree(prepared, tmp_path / "here", symlinks=True)
    scripts = 0
    for number, block in enumerate(blocks(page)):
        text = block.text
        if block.language == "python":
            (folder / f"block_{number}.py").write_text(text)
            words = ["python", f"block_{number}.py"]
        elif block.language == "pycon":
            (folder / f"block_{number}.txt").write_text(text)
            words = ["python", "-m", "doctest", "-o", "ELLIPSIS", f"block_{number}.txt"]
        elif block.language == "yaml":
            (folder / "snippet.yaml").write_text(text)
            configs = ["--config", "configs/ml-100k/quickstart.yaml", "--config", "snippet.yaml"]
            words = ["minirec", "fit", *configs, "--print_config"]
        elif block.language == "bash" and not text.startswith("#!"):
            words = ["bash", "-euc", "\n".join(shell_lines(text, page.name == "README.md"))]
        else:
            scripts += text.startswith("#!")
            continue
        try:
            run(words, folder, environment)
        except AssertionError as error:
            error.add_note(block.place)
            raise
    assert scripts == SCRIPTS.get(page.stem, 0)


def shell_lines(text, words_stand_for_something):
    """The commands that run here, one after the other."""
    for number, line in enumerate(re.split(r"\n| && ", re.sub(r"\\\n\s*", " ", text))):
        if not line.startswith(tuple(LEFT_OUT)):
            for word, stands_for in {**WORDS, "--to DIR": f"--to runs/dir{number}"}.items():
                line = line.replace(word, stands_for) if words_stand_for_something else line
            yield line
