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


def launched(warm, folder, worker, *arguments) -> None:
    config = str(ROOT / "configs/accelerate/cpu_ddp.yaml")
    child = warm.start("tests.warm:launched", config, worker, *arguments, log=folder / "log")
    assert child.wait() == 0, (folder / "log").read_text()[-8000:]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rate"), [("dp_sft", 0.5), ("robust_dpo", 0.05)])
def test_noise_is_added_once_and_ranks_end_with_the_same_weights(name, rate, tiny_folder, tmp_path, warm):
    launched(warm, tmp_path, "tests.distributed.private:main", tiny_folder, str(tmp_path), name)
    facts = json.loads((tmp_path / "facts.json").read_text())
    spent, epsilon = facts.pop("spent"), facts.pop("epsilon")
    # the resumed run takes one step more, the first one's second is thrown away
    assert facts == dict(collectives=3, wrapper="PeftModel", thrown_away=1, micro_batches=2, steps=2)
    # of two steps, and of the third that the resumed run takes
    assert len(spent) == 2 and 0 < spent[0] < spent[1] == pytest.approx(epsilon)
    first, second = (load_file(tmp_path / f"change-{rank}.safetensors") for rank in range(2))
    assert identical(first, second)
    values = torch.cat([value.flatten() for value in first.values()])
    # two steps, and next to their noise what is learned; noise of both ranks would be 41% more
    assert values.std().item() == pytest.approx(rate * 2.0 * 0.5 / 8 * 2**0.5, rel=0.1)


@pytest.mark.slow
def test_a_rank_leaves_out_its_micro_batches_without_rows_whatever_the_other_has(tiny_folder, tmp_path, warm):
    launched(warm, tmp_path, "tests.distributed.private:without_rows", tiny_folder, str(tmp_path))
    # all but one a step
    assert [json.loads((tmp_path / f"forwards-{rank}.json").read_text()) for rank in range(2)] == [2 + 1, 1 + 1]
    first, second = (load_file(tmp_path / f"few-{rank}.safetensors") for rank in range(2))
    assert identical(first, second)
    with private.in_double(tiny_folder) as double:
        one, _ = runs.fit(private.few(double(), tmp_path / "one"))
    assert distance(first, one) < 1e-12


@pytest.mark.slow
def test_private_pairs_on_two_ranks_make_the_update_of_one_process(tiny_folder, tmp_path, warm):
    launched(warm, tmp_path, "tests.distributed.private:noiseless", tiny_folder, str(tmp_path))
    first, second = (load_file(tmp_path / f"changes-{rank}.safetensors") for rank in range(2))
    assert identical(first, second)
    method = METHODS["robust_dpo"]
    for case in private.PAIRS:
        given = method.ranks[case] | method.split(8) | dict(precompute_ref_log_probs=False)
        # log-probabilities of the reference that were computed beforehand are kept in fp32
        exact = 1e-6 if case == "private-cached" else 1e-12
        with private.in_double(tiny_folder) as double:
            # the two sides of a pair nearly cancel, and their rounding in fp32 does not: 3e-6 was seen
            for precision, start, bound in (("fp32", tiny_folder, 3e-5), ("float64", double(), exact)):
                one, _ = method.train(start, tmp_path / case / precision, **given)
                change = {name: first[f"{case}|{precision}|{name}"] for name in one}
                assert distance(change, one) < bound, (case, precision)


@pytest.mark.slow
def test_a_base_sharded_at_load_trains_as_one_process_does(tiny_folder, tmp_path, warm):
    launched(warm, tmp_path, "tests.distributed.sharded_base:main", tiny_folder, str(tmp_path))
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["spread"] > 0 == facts["adapters"] and facts["ranks"] == 2
    # where forwards wait for each other no rank leaves one out: the second has rows in one micro-batch of each step
    assert [json.loads((tmp_path / f"forwards-{rank}.json").read_text()) for rank in range(2)] == [4, 4]
    first, second = (load_file(tmp_path / f"change-{rank}.safetensors") for rank in range(2))
    assert identical(first, second)
    method = METHODS["dp_sft"]
    with private.in_double(tiny_folder) as double:
        one = method.build(double(), tmp_path / "one", **method.cases["clipped"])
    one._private.draws = lambda step: private.DRAWN[0]
    assert distance(first, runs.fit(one)[0]) < 1e-12
