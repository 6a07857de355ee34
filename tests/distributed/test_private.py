"""Two ranks of a private run: one sum a step, noise once, the same weights on both, one ledger."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import runs
from tests.distributed import private
from tests.families import METHODS
from tests.runs import distance, identical

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_noise_is_added_once_and_ranks_end_with_the_same_weights(tiny_folder, tmp_path, warm):
    config, worker = str(ROOT / "configs/accelerate/cpu_ddp.yaml"), "tests.distributed.private:main"
    child = warm.start("tests.warm:launched", config, worker, tiny_folder, str(tmp_path), log=tmp_path / "log")
    assert child.wait() == 0, (tmp_path / "log").read_text()[-8000:]
    facts = json.loads((tmp_path / "facts.json").read_text())
    # the resumed run takes one step more, the first one's second is thrown away
    assert facts == dict(collectives=3, wrapper="PeftModel", thrown_away=1, micro_batches=2, steps=2)
    first, second = (load_file(tmp_path / f"change-{rank}.safetensors") for rank in range(2))
    assert identical(first, second)
    values = torch.cat([value.flatten() for value in first.values()])
    # two steps: 0.5 * 2.0 * 0.5 / 8 * sqrt(2), and next to it what is learned; noise of both ranks would be 41% more
    assert values.std().item() == pytest.approx(0.5 * 2.0 * 0.5 / 8 * 2**0.5, rel=0.1)
    # a rank leaves out its micro-batches without rows, whatever the other has, but one a step
    assert [json.loads((tmp_path / f"forwards-{rank}.json").read_text()) for rank in range(2)] == [2 + 1, 1 + 1]
    first, second = (load_file(tmp_path / f"few-{rank}.safetensors") for rank in range(2))
    assert identical(first, second)
    assert distance(first, runs.fit(private.few(tiny_folder, tmp_path / "one"))[0]) < 1e-4


@pytest.mark.slow
def test_a_base_sharded_at_load_trains_as_one_process_does(tiny_folder, tmp_path, warm):
    config, worker = str(ROOT / "configs/accelerate/cpu_ddp.yaml"), "tests.distributed.sharded_base:main"
    child = warm.start("tests.warm:launched", config, worker, tiny_folder, str(tmp_path), log=tmp_path / "log")
    assert child.wait() == 0, (tmp_path / "log").read_text()[-8000:]
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["spread"] > 0 == facts["adapters"] and facts["ranks"] == 2
    # where forwards wait for each other no rank leaves one out: the second has rows in one micro-batch of each step
    assert [json.loads((tmp_path / f"forwards-{rank}.json").read_text()) for rank in range(2)] == [4, 4]
    first, second = (load_file(tmp_path / f"change-{rank}.safetensors") for rank in range(2))
    assert identical(first, second)
    method = METHODS["dp_sft"]
    one = method.build(tiny_folder, tmp_path / "one", **method.cases["clipped"])
    one._private.draws = lambda step: private.DRAWN[0]
    assert distance(first, runs.fit(one)[0]) < 1e-4
