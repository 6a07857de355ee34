import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from posttrain.run import checkpoints
from tests.interruption.child import STEPS

ROOT = Path(__file__).parents[2]


def start(folder, out, method):
    command = [sys.executable, "-m", "tests.interruption.child", folder, str(out), method]
    with log_of(out).open("a") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def log_of(out: Path) -> Path:
    return out.with_suffix(".log")


def finish(process, out):
    process.wait(timeout=300)
    assert process.returncode == 0, log_of(out).read_text()[-4000:]


def logged(out: Path) -> list[dict]:
    """The rows of metrics.jsonl, one a step, without what the clock decides."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return [{k: v for k, v in row.items() if "runtime" not in k and "per_second" not in k} for row in rows]


def kill_when(process, condition) -> bool:
    """SIGKILL once `condition` holds; False if the process ended before."""
    while process.poll() is None:
        if condition():
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.0005)
    return False


def steps_of(rows):
    return [row for row in rows if "loss" in row]


@pytest.mark.parametrize("method", [pytest.param("dpo", marks=pytest.mark.slow), "dr_dpo"])
def test_a_run_killed_several_times_ends_as_the_one_left_alone(tiny_folder, tmp_path, method):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start(tiny_folder, whole, method), whole)
    expected = steps_of(logged(whole))
    assert [row["step"] for row in expected] == list(range(1, STEPS + 1))
    assert len({row["loss"] for row in expected}) > STEPS / 2, "the losses must differ to tell anything"

    rng = random.Random(method)
    early, late, kills = rng.randint(1, 3), rng.randint(7, 9), 0
    half_saved = broken / "checkpoint-6"
    moments = [
        # in the middle of a step, after a step picked at random
        lambda: (broken / "metrics.jsonl").exists() and len(logged(broken)) >= early,
        # while a checkpoint is written
        lambda: half_saved.exists() and not (half_saved / checkpoints.MARKER).exists(),
        lambda: len(logged(broken)) >= late,
        lambda: (broken / "checkpoint-10").exists(),
    ]
    for moment in moments:
        kills += kill_when(start(tiny_folder, broken, method), moment)
        if kills == 2:
            assert half_saved.exists() and half_saved not in checkpoints.complete(broken)
    assert kills == len(moments)
    finish(start(tiny_folder, broken, method), broken)

    assert steps_of(logged(broken)) == expected, "every logged number of every step, bit for bit"
    first, second = (load_file(out / "adapter_model.safetensors") for out in (whole, broken))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(checkpoints.complete(broken)) == 2, "save_total_limit counts complete checkpoints"
