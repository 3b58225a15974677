"""What is said about the package outside its code."""

import tomllib

import yaml
from helpers.paths import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


def test_every_package_of_the_tree_is_installed():
    mapped = PROJECT["tool"]["setuptools"]["package-dir"]
    files = (REPOSITORY / "minirec_pl").rglob("__init__.py")
    found = {".".join(path.parent.relative_to(REPOSITORY).parts) for path in files}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found | set(mapped)
    assert all((REPOSITORY / folder).is_dir() for folder in mapped.values())


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["project"]["version"]
    assert citation["license"] == PROJECT["project"]["license"]
