"""The benchmark of killed runs, a few rounds of it."""

import json
import subprocess
import sys

import pytest
from helpers.paths import BENCHMARKS

PROGRAM = BENCHMARKS / "resume_kills.py"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["selection", "plain"])
def test_killed_runs_end_bit_equal(tmp_path, case):
    report = tmp_path / "kills.json"
    command = [sys.executable, str(PROGRAM), "--case", case, "--rounds", "8", "--seed", "5", "--json", str(report)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(report.read_text()) == {"rounds": 8, "equal": 8}
