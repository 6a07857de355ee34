"""A run that goes on from a checkpoint is the one that was never stopped, bit for bit; another run's is refused."""

import pytest

from posttrain.errors import ConfigError
from tests.families import METHODS
from tests.runs import entries, identical, trainable

CLOCK = ("runtime", "per_second", "step_time", "step_seconds")


def resumes(method, settings, step, folder, tmp_path):
    _, straight = method.train(folder, tmp_path, **settings)
    checkpoint = str(tmp_path / f"checkpoint-{step}")
    _, resumed = method.train(folder, tmp_path, resume=checkpoint, **settings | dict(save_strategy="no"))
    assert identical(trainable(resumed.model), trainable(straight.model))
    ours, theirs = (
        [{k: v for k, v in row.items() if not any(part in k for part in CLOCK)} for row in entries(trainer)]
        for trainer in (resumed, straight)
    )
    assert ours == theirs and len(ours) == settings["max_steps"]
    assert len({row["loss"] for row in ours[step:]}) > 1, "the losses must differ to tell anything"


# of GIFT-SW `trainers/test_weight_noise.py` tells the same, and of the columns that it chose
@pytest.mark.core(*(name for name in METHODS if name != "gift_sw"))
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_resumed_run_is_the_straight_one_bit_for_bit(method, tiny_folder, tmp_path):
    settings, step, (other, said) = method.resumed
    resumes(method, settings, step, tiny_folder, tmp_path)
    with pytest.raises(ConfigError, match=said):
        method.train(tiny_folder, tmp_path, **settings | other)


@pytest.mark.slow
@pytest.mark.parametrize("weighting", ["weight", "sample_and_weight"])
def test_answers_go_on_however_they_are_weighed(weighting, tiny_folder, tmp_path):
    settings, step, _ = METHODS["a_lol"].resumed
    settings = settings | dict(advantage_weighting=weighting)
    resumes(METHODS["a_lol"], settings, step, tiny_folder, tmp_path)
