"""Planned memory against what training takes, each run in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

from tests.planning.measured import CASES


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_planned_memory_is_what_a_run_takes(name):
    quiet = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
    command = [sys.executable, "-m", "tests.planning.measured", name]
    done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["planned"] == pytest.approx(found["measured"], rel=0.15), found
