import json
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from posttrain.run import checkpoints
from tests.interruption.child import STEPS

WEIGHTS = "adapter_model.safetensors"


def log_of(out: Path) -> Path:
    return out.with_suffix(".log")


def finish(process, out):
    assert process.wait() == 0, log_of(out).read_text()[-4000:]


def logged(out: Path) -> list[dict]:
    """The rows of metrics.jsonl, one a step, without what the clock decides."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    return [{k: v for k, v in row.items() if "runtime" not in k and "per_second" not in k} for row in rows]


def has_logged(out: Path, rows: int) -> bool:
    path = out / "metrics.jsonl"
    return path.exists() and path.read_bytes().count(b"\n") >= rows


def kill_when(process, condition) -> bool:
    """SIGKILL once `condition` holds; False if the process ended before."""
    looks = 0
    while looks % 64 or process.poll() is None:
        if condition():
            process.kill()
            return process.returncode == -signal.SIGKILL
        looks += 1
        time.sleep(0.001)
    return False


def steps_of(rows):
    return [row for row in rows if "loss" in row]


@pytest.mark.core("saving-dr_dpo")
@pytest.mark.parametrize("method", ["dpo", "dr_dpo"])
@pytest.mark.parametrize("when", ["saving", "any time"])
def test_a_run_killed_several_times_ends_as_the_one_left_alone(warm, tiny_folder, tmp_path, method, when):
    def start(folder, out, method):
        return warm.start("tests.interruption.child:main", folder, str(out), method, log=log_of(out))

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start(tiny_folder, whole, method), whole)
    expected = steps_of(logged(whole))
    assert [row["step"] for row in expected] == list(range(1, STEPS + 1))
    assert len({row["loss"] for row in expected}) > STEPS / 2, "the losses must differ to tell anything"

    rng = random.Random(method)
    early, late, kills = rng.randint(1, 3), rng.randint(7, 9), 0
    half_saved, named = broken / ".saving" / "checkpoint-6", broken / "checkpoint-6"
    moments = [
        # in the middle of a step, after a step picked at random
        lambda: has_logged(broken, early),
        # while a checkpoint is written
        lambda: (half_saved / WEIGHTS).exists() and not (half_saved / "trainer_state.json").exists(),
        lambda: has_logged(broken, late),
        lambda: (broken / "checkpoint-10").exists(),
    ]
    wanted = (1, 2) if when == "saving" else range(len(moments))
    for number in wanted:
        kills += kill_when(start(tiny_folder, broken, method), moments[number])
        if number == 1:
            assert half_saved.exists() and not named.exists()
    assert kills == len(wanted)
    finish(start(tiny_folder, broken, method), broken)

    assert steps_of(logged(broken)) == expected, "every logged number of every step, bit for bit"
    first, second = (load_file(out / WEIGHTS) for out in (whole, broken))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(checkpoints.complete(broken)) == 2, "save_total_limit counts complete checkpoints"
