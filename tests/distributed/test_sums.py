"""ZeRO adds up in fp32 what it computes in bf16."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_engines_add_up_in_fp32(stage, tiny_folder, tmp_path, warm):
    config = str(ROOT / f"configs/accelerate/cpu_zero{stage}.yaml")
    main = "tests.distributed.sums:main"
    child = warm.start("tests.warm:launched", config, main, tiny_folder, str(tmp_path), log=tmp_path / "log")
    assert child.wait() == 0, (tmp_path / "log").read_text()[-8000:]
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts == [stage, "torch.bfloat16", "torch.float32", "torch.float32"]
