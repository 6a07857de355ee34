"""Runs that resume across epochs, and checkpoints inside a generation."""

import pytest

from posttrain.errors import ConfigError
from posttrain.log import get_logger
from tests.rollouts import PARENT, prompts, train


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


RUN = dict(made_up=False, shuffle_dataset=True, optim="adamw_torch", learning_rate=1e-2, gradient_accumulation_steps=2)


def rewards_that_note(seen):
    def odd(prompts, completion_ids, **columns):
        seen.append(list(prompts))
        return [float(sum(ids) % 2) for ids in completion_ids]

    return odd


@pytest.mark.slow
@pytest.mark.parametrize("num_iterations", [1, 2])
@pytest.mark.parametrize("steps_per_generation", [1, 4])
def test_a_run_resumed_in_a_later_epoch_has_its_order(tiny_folder, tmp_path, steps_per_generation, num_iterations):
    # 8 prompts in generations of as many as micro-batches give; 4 x num_iterations optimiser steps an epoch
    epoch = 4 * num_iterations
    run = RUN | dict(steps_per_generation=steps_per_generation, num_iterations=num_iterations, max_steps=3 * epoch)
    saved = dict(save_strategy="steps", save_steps=1)
    seen, parents = [], []
    _, whole = train(tiny_folder, tmp_path / "run", reward=rewards_that_note(seen), **run, **saved)
    train(tiny_folder, tmp_path / "trl", reward=rewards_that_note(parents), **PARENT, **run)
    assert seen == parents, "TRL's very order"
    a_third = len(seen) // 3
    assert seen[:a_third] != seen[a_third : 2 * a_third], "another order in each epoch"
    # at an epoch's end and inside one
    generation = max(1, steps_per_generation * num_iterations // 2)
    for step in (epoch, 2 * epoch + generation):
        again = []
        checkpoint, reward = str(tmp_path / "run" / f"checkpoint-{step}"), rewards_that_note(again)
        _, resumed = train(tiny_folder, tmp_path / f"at-{step}", reward=reward, resume=checkpoint, **run)
        assert again == seen[len(seen) - len(again) :] and len(again) == len(seen) * (3 * epoch - step) // (3 * epoch)
        for name, value in whole.model.state_dict().items():
            assert value.equal(resumed.model.state_dict()[name]), name


@pytest.mark.slow
def test_a_checkpoint_inside_a_generation_is_said_and_not_resumed_from(tiny_folder, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(get_logger(), "propagate", True)
    caplog.set_level("INFO", logger=get_logger().name)
    run = RUN | dict(steps_per_generation=4, data=prompts([1] * 8))
    train(tiny_folder, tmp_path, max_steps=3, save_strategy="steps", save_steps=1, **run)
    assert "the checkpoint of step 3 lies inside a generation" in caplog.text
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    longer = run | dict(max_steps=6, resume=str(tmp_path / "checkpoint-3"))
    with pytest.raises(ConfigError, match=r"step 3 lies inside a generation \(2 of its 4 micro-batches are used\)"):
        train(tiny_folder, tmp_path, **longer)
    _, trainer = train(tiny_folder, tmp_path, **longer, check_resume=False)
    assert trainer.state.global_step == 6 and "out of step with the earlier run" in caplog.text
