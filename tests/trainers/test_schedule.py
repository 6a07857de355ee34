"""The learning rate of a run that goes on with another number of steps."""

import json

import pytest

from posttrain import RobustDPOConfig, RobustDPOTrainer
from posttrain.errors import ConfigError
from posttrain.run.schedule import Schedule, bend, bent, continued, curve, move_to
from tests.conftest import make_pairs
from tests.training import lora, settings

# every schedule whose curve depends on the number of steps
CURVES = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": dict(num_cycles=3),
    "polynomial": dict(power=1.5),
    "cosine_with_min_lr": dict(min_lr_rate=0.1),
    "cosine_warmup_with_min_lr": dict(min_lr_rate=0.1),
    "warmup_stable_decay": dict(num_decay_steps=30),
}


def arguments(tmp_path, kind, warmup=0, keywords=None, **overrides):
    given = dict(lr_scheduler_type=kind, warmup_steps=warmup, lr_scheduler_kwargs=keywords or None, learning_rate=0.01)
    return RobustDPOConfig(**settings(tmp_path, **given | overrides))


def rates(args, schedule, steps):
    factor = curve(args, schedule.total)
    return [bent(factor, schedule, step) for step in steps]


@pytest.mark.parametrize("kind", CURVES)
@pytest.mark.parametrize("warmup", [0, 5, 0.1])
@pytest.mark.parametrize(("done", "steps"), [(3, 100), (35, 100), (35, 44), (47, 200)])
def test_the_rate_goes_on_from_where_it_was_and_ends_where_the_curve_does(tmp_path, logged, kind, warmup, done, steps):
    args = arguments(tmp_path, kind, warmup, CURVES[kind])
    planned = Schedule(50)
    before = rates(args, planned, range(50))
    schedule = continued(args, planned, done, steps)
    after = rates(args, schedule, range(done - 1, steps))
    if schedule != Schedule(steps):
        assert after[0] == pytest.approx(before[done - 1], abs=1e-12)
        assert f"the run has {steps} steps, and the checkpoint of step {done} is of one that had 50" in logged.text
        assert schedule.place(steps) == 50
        # the rest of the curve and nothing else: no rate that it would not have had
        low, high = min(before[done - 1 :] + [curve(args, 50)(50)]), max(before[done - 1 :])
        assert all(low - 1e-12 <= rate <= high + 1e-12 for rate in after)
    else:
        assert rates(args, schedule, range(done)) == before[:done], "the same so far, so nothing to say"
    if kind != "cosine_with_restarts":
        largest = max(abs(a - b) for a, b in zip(before, before[1:], strict=False))
        steepest = max(abs(a - b) for a, b in zip(after, after[1:], strict=False))
        assert steepest <= largest * max(1.0, (50 - done + 1) / (steps - done + 1)) * 1.01 + 1e-9


@pytest.mark.parametrize(
    ("kind", "warmup", "keywords"),
    [
        ("constant", 0, None),
        ("constant_with_warmup", 5, None),
        ("constant_with_warmup", 0.1, None),
        ("inverse_sqrt", 5, None),
        ("reduce_lr_on_plateau", 0, None),
        ("greedy", 0, None),
        # still on its plateau
        ("warmup_stable_decay", 5, dict(num_decay_steps=5)),
    ],
)
def test_schedules_without_an_end_in_sight_are_made_longer_without_a_word(tmp_path, logged, kind, warmup, keywords):
    args = arguments(tmp_path, kind, warmup, keywords, eval_strategy="steps")
    schedule = continued(args, Schedule(50), 35, 120)
    assert logged.text == ""
    if curve(args, 50) is not None:
        ours, upstream = rates(args, schedule, range(35, 115)), [curve(args, 120)(step) for step in range(35, 115)]
        assert ours == upstream


@pytest.mark.parametrize(
    ("kind", "done", "planned"), [("cosine", 400, 400), ("linear", 399, 400), ("polynomial", 1000, 1000)]
)
def test_a_schedule_that_has_ended_is_not_made_longer(tmp_path, kind, done, planned, logged):
    args = arguments(tmp_path, kind)
    with pytest.raises(ConfigError, match=f"whose {kind} schedule has come to its end: .* Start a new run from its"):
        continued(args, Schedule(planned), done, 2 * planned)
    relaxed = arguments(tmp_path, kind, check_resume=False)
    schedule = continued(relaxed, Schedule(planned), done, 2 * planned)
    assert max(rates(relaxed, schedule, range(done, 2 * planned))) < 0.01
    assert "The learning rate goes on from" in logged.text


def test_fewer_steps_than_were_taken_are_refused(tmp_path):
    args = arguments(tmp_path, "constant")
    with pytest.raises(ConfigError, match="the run has 4 steps .* was written after 6: nothing is left to train"):
        continued(args, Schedule(10), 6, 4)
    assert continued(args, Schedule(10), 6, 6) == Schedule(10)


def test_a_schedule_that_is_changed_twice_goes_on_twice(tmp_path):
    args = arguments(tmp_path, "linear", 10)
    first = continued(args, Schedule(50), 20, 100)
    second = continued(args, Schedule.of(json.loads(json.dumps(first.as_content()))), 60, 70)
    assert rates(args, second, range(60)) == pytest.approx(rates(args, first, range(60)), abs=1e-12)
    assert second.place(70) == 50 and second.place(59) == pytest.approx(first.place(59), abs=1e-12)
    falling = rates(args, second, range(59, 71))
    assert falling == sorted(falling, reverse=True) and falling[-1] == 0
    assert continued(args, second, 65, 70) is second


def test_a_scheduler_moved_to_a_step_is_where_stepping_would_have_brought_it(tmp_path):
    import torch
    from transformers import get_scheduler

    def scheduler():
        optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
        made = get_scheduler("cosine", optimiser, 3, num_training_steps=20)
        bend(made, Schedule(20, ((4, 4.0), (30, 20.0))))
        return optimiser, made

    stepped, by_steps = scheduler()
    for _ in range(11):
        stepped.step()
        by_steps.step()
    moved, at_once = scheduler()
    move_to(at_once, 11)
    assert moved.param_groups[0]["lr"] == stepped.param_groups[0]["lr"]
    assert at_once.get_last_lr() == by_steps.get_last_lr() and at_once.last_epoch == by_steps.last_epoch
    for pair in ((stepped, by_steps), (moved, at_once)):
        for part in pair:
            part.step()
    assert moved.param_groups[0]["lr"] == stepped.param_groups[0]["lr"]


def run(folder, out, resume, **overrides):
    given = dict(
        pair_loss="dpo", lr_scheduler_type="cosine", optim="adamw_torch", learning_rate=1e-3, max_steps=-1,
        per_device_train_batch_size=4, save_strategy="steps", save_steps=2, warmup_steps=0.2,
    )  # fmt: skip
    trainer = RobustDPOTrainer(
        folder,
        args=RobustDPOConfig(**settings(out, **given | overrides)),
        train_dataset=make_pairs(16),
        peft_config=lora(),
    )
    trainer.train(resume_from_checkpoint=resume)
    return {row["step"]: row for row in trainer.state.log_history if "loss" in row}


@pytest.mark.slow
def test_more_epochs_go_on_without_a_jump_and_a_run_killed_then_resumes_bit_for_bit(tiny_folder, tmp_path, logged):
    first = run(tiny_folder, tmp_path, None, num_train_epochs=1)
    longer = run(tiny_folder, tmp_path, str(tmp_path / "checkpoint-2"), num_train_epochs=3)
    assert "the run has 12 steps, and the checkpoint of step 2 is of one that had 4" in logged.text
    shown = [longer[step]["learning_rate"] for step in range(1, 13)]
    assert shown[:2] == [first[1]["learning_rate"], first[2]["learning_rate"]]
    peak = shown.index(max(shown))
    assert shown[peak:] == sorted(shown[peak:], reverse=True) and 0 < shown[-1] < 1e-4
    again = run(tiny_folder, tmp_path, str(tmp_path / "checkpoint-6"), num_train_epochs=3)
    for step in range(7, 13):
        assert {k: v for k, v in again[step].items() if "per_second" not in k} == {
            k: v for k, v in longer[step].items() if "per_second" not in k
        }
