"""Agreement of micro-gradients, SAM and optimizers by name on two DDP processes, against one with the same rows."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed.update_rules import CASES, WHOLE
from tests.families import METHODS
from tests.runs import distance, entries

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tiny_folder, tmp_path_factory, warm):
    out = tmp_path_factory.mktemp("update-rules")
    config, log = str(ROOT / "configs/accelerate/cpu_ddp.yaml"), out / "log"
    worker = "tests.distributed.update_rules:main"
    child = warm.start("tests.warm:launched", config, worker, tiny_folder, str(out), log=log)
    assert child.wait() == 0, log.read_text()[-8000:]
    return json.loads((out / "history.json").read_text()), load_file(out / "changes.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_make_the_update_of_one_process(name, ranks, tiny_folder, tmp_path):
    history, tensors = ranks
    method, case = CASES[name]
    reference, trainer = METHODS[method].train(tiny_folder, tmp_path, **WHOLE | case)
    change = {key.removeprefix(f"{name}|"): value for key, value in tensors.items() if key.startswith(f"{name}|")}
    if name == "none-agree":
        assert change and not any(value.any() for value in [*change.values(), *reference.values()])
    else:
        assert distance(change, reference) < 1e-3
    for ours, theirs in zip(history[name], entries(trainer), strict=True):
        for key in (key for key in theirs if key.startswith(("gradient_agreement/", "sam/", "loss"))):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key
