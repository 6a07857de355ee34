"""Two ranks that may not see one disk resume alike, or are told why not."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def told(tiny_folder, tmp_path_factory, warm):
    """What each rank made of a resumption, by whose disk held the checkpoint."""
    out = tmp_path_factory.mktemp("machines")
    config = str(ROOT / "configs/accelerate/cpu_ddp.yaml")
    main = "tests.distributed.machines:main"
    child = warm.start("tests.warm:launched", config, main, tiny_folder, str(out), log=out / "log")
    assert child.wait() == 0, (out / "log").read_text()[-8000:]
    return json.loads((out / "told.json").read_text())


def test_a_checkpoint_that_rank_0_alone_sees_is_refused_by_all(told):
    first, second = (rank["of rank 0 alone"] for rank in told)
    assert first == second
    assert re.search(r"the checkpoint run/checkpoint-2 is there for rank 0 and not for rank 1, of 2.*a disk", first)


def test_a_checkpoint_that_all_see_is_resumed_from_by_all(told):
    assert [rank["of both"] for rank in told] == [["run/checkpoint-2", 3]] * 2


def test_what_rank_0_does_not_see_is_nobodys_checkpoint(told):
    assert [rank["of rank 1 alone"] for rank in told] == [["None", 3]] * 2
