"""The ledger counts every step that was taken, and lets no run spend more than it promised."""

import json
import os
import threading

import pytest

from posttrain.errors import ConfigError, EnvironmentIssue
from posttrain.privacy import ledger as module
from posttrain.privacy.accounting import Steps, epsilon, solve_noise
from posttrain.privacy.ledger import FILE, Ledger

KIND = Steps(noise_multiplier=1.5, rate=0.2, cap=None, units=100, steps=0)
GIVEN = dict(data="rows")


def taken(ledger: Ledger, steps: int) -> Ledger:
    for _ in range(steps):
        ledger.take()
    return ledger


def started(folder, planned=10, state=None, checkpoint=None, strict=True, **given) -> Ledger:
    made = Ledger(**dict(kind=KIND) | GIVEN | given)
    if state is not None:
        made.load(json.loads(json.dumps(state)))
    made.begin(folder, planned, checkpoint, strict)
    return made


def spent(steps: int, **changed) -> float:
    return epsilon([KIND._replace(steps=steps, **changed)], 1e-5)


def test_a_run_spends_its_steps(tmp_path):
    ledger = started(tmp_path)
    assert ledger.spent() == ledger.of_weights() == 0.0
    for steps in (1, 2, 3):
        ledger.take()
        assert ledger.spent() == ledger.of_weights() == spent(steps)
    assert ledger.lineage == [KIND._replace(steps=3)]


def test_a_step_is_on_the_disk_before_it_is_taken(tmp_path, monkeypatch):
    ledger, synced = started(tmp_path), []
    monkeypatch.setattr(module.os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    ledger.take()
    lines = (tmp_path / FILE).read_text().splitlines()
    assert json.loads(lines[-1]) == {"step": 1} and synced == [(tmp_path / FILE).stat().st_size]


def test_steps_that_were_thrown_away_are_spent_twice(tmp_path, capsys):
    first = taken(started(tmp_path), 4)
    state = first.state()
    # killed after 3 more; it goes on from its checkpoint of 4
    taken(first, 3)
    second = started(tmp_path, state=state, checkpoint=tmp_path / "checkpoint-4")
    assert "3 private steps on these rows were taken before and thrown away" in capsys.readouterr().err
    assert second.thrown_away() == 3
    taken(second, 6)
    assert second.of_weights() == spent(10) and second.spent() == spent(13)
    # and once more, from the same checkpoint
    third = taken(started(tmp_path, state=state, checkpoint=tmp_path / "checkpoint-4"), 6)
    assert third.of_weights() == spent(10) and third.spent() == spent(19)


def test_what_was_computed_ahead_is_what_is_spent_whatever_was_guessed(tmp_path):
    first = taken(started(tmp_path), 4)
    state = first.state()
    taken(first, 3)
    # with a session that was thrown away, and a lineage
    ledger = started(tmp_path, state=state, checkpoint=tmp_path / "checkpoint-4")
    for guessed, steps in ((2, 2), (3, 1), (1, 2)):
        ledger.foresee(guessed)
        taken(ledger, steps)
        assert ledger.spent() == epsilon(ledger._history(), 1e-5)
    assert ledger.spent() == spent(12)
    ledger.settle()
    assert not [thread for thread in threading.enumerate() if thread.name == "posttrain-ahead"]


def test_a_run_that_was_not_killed_goes_on_with_what_it_spent(tmp_path):
    first = taken(started(tmp_path), 4)
    second = taken(started(tmp_path, state=first.state(), checkpoint=tmp_path / "checkpoint-4"), 6)
    assert second.spent() == second.of_weights() == spent(10)
    assert second.thrown_away() == 0


def test_a_run_killed_before_its_first_checkpoint_counts_if_the_rows_are_the_same(tmp_path):
    taken(started(tmp_path), 3)
    again = taken(started(tmp_path), 5)
    assert again.of_weights() == spent(5) and again.spent() == spent(8)
    other = taken(started(tmp_path, data="other rows"), 5)
    assert other.spent() == spent(5) and other.thrown_away() == 0


@pytest.mark.parametrize("torn", ['{"step": 5', '{"st', "{"])
def test_a_line_that_was_being_written_counts_as_taken(tmp_path, torn):
    first = taken(started(tmp_path), 4)
    state = first.state()
    with open(tmp_path / FILE, "a") as file:
        file.write(torn)
    second = taken(started(tmp_path, state=state, checkpoint=tmp_path / "checkpoint-4"), 6)
    assert second.spent() == spent(11)
    # the file is whole again
    third = started(tmp_path, state=second.state(), checkpoint=tmp_path / "checkpoint-10", planned=11)
    assert third.spent() == spent(11)


@pytest.mark.parametrize("line", ["{}", "x", "[1]", '{"step": "a"}', '{"session": "a"}', '{"step": 1', "\udcff", "3"])
def test_a_damaged_ledger_is_refused(tmp_path, line):
    state = taken(started(tmp_path), 2).state()
    content = (tmp_path / FILE).read_bytes().splitlines(keepends=True)
    content.insert(1, line.encode("utf-8", "surrogateescape") + b"\n")
    (tmp_path / FILE).write_bytes(b"".join(content))
    with pytest.raises(ConfigError, match=f"{FILE}:2: the ledger is damaged there"):
        started(tmp_path, state=state, checkpoint=tmp_path / "checkpoint-2")


def test_a_checkpoint_without_its_runs_ledger_is_refused_or_counted_from_itself(tmp_path, capsys):
    state = taken(started(tmp_path), 4).state()
    (tmp_path / FILE).unlink()
    with pytest.raises(ConfigError, match=f"{FILE} is missing: .* set `check_resume: false`"):
        started(tmp_path, state=state, checkpoint=tmp_path / "checkpoint-4")
    ledger = taken(started(tmp_path, state=state, checkpoint=tmp_path / "checkpoint-4", strict=False), 1)
    assert "epsilon is counted from the checkpoint alone" in capsys.readouterr().err
    assert ledger.spent() == spent(5)


def test_a_run_in_another_folder_takes_the_ledger_with_it(tmp_path):
    first = taken(started(tmp_path / "a"), 4)
    state = first.state()
    taken(first, 3)
    second = started(tmp_path / "b", state=state, checkpoint=tmp_path / "a" / "checkpoint-4")
    taken(second, 2)
    assert second.spent() == spent(9)
    third = started(tmp_path / "b", state=second.state(), checkpoint=tmp_path / "b" / "checkpoint-6")
    assert third.spent() == spent(9) and third.of_weights() == spent(6)


def test_more_steps_than_the_noise_was_solved_for_are_refused(tmp_path):
    noise = solve_noise(2.0, 1e-5, rate=0.2, cap=None, units=100, steps=10)
    solved = dict(kind=KIND._replace(noise_multiplier=noise), target_epsilon=2.0)
    with pytest.raises(ConfigError, match="the run would take 11 steps, which spend epsilon 2.* more than target_epsi"):
        started(tmp_path, 11, **solved)
    state = taken(started(tmp_path, 10, **solved), 6).state()
    checkpoint = tmp_path / "checkpoint-6"
    with pytest.raises(ConfigError, match="go on to 11 steps from a checkpoint of 6, whose noise was solved for 10"):
        started(tmp_path, 11, state, checkpoint, **solved)
    # noise solved for more steps does not mend those that had less
    more = solve_noise(2.0, 1e-5, rate=0.2, cap=None, units=100, steps=20)
    with pytest.raises(ConfigError, match="go on to 20 steps"):
        started(tmp_path, 20, state, checkpoint, **solved | dict(kind=KIND._replace(noise_multiplier=more)))
    assert taken(started(tmp_path, 10, state, checkpoint, **solved), 4).of_weights() <= 2.0
    assert started(tmp_path, 8, state, checkpoint, **solved).planned == 10
    # where the noise was given, epsilon is told and not bounded
    started(tmp_path, 1000, state, checkpoint, kind=solved["kind"])


def test_steps_with_other_noise_are_counted_as_what_they_were(tmp_path):
    state = taken(started(tmp_path), 4).state()
    other = KIND._replace(noise_multiplier=3.0)
    second = taken(started(tmp_path, state=state, checkpoint=tmp_path / "checkpoint-4", kind=other), 2)
    assert second.lineage == [KIND._replace(steps=4), other._replace(steps=2)]
    assert spent(4) < second.spent() == epsilon(second.lineage, 1e-5) < spent(6)


def test_a_step_that_cannot_be_written_down_is_not_taken(tmp_path):
    ledger = started(tmp_path)
    (tmp_path / FILE).unlink()
    (tmp_path / FILE).mkdir()
    with pytest.raises(EnvironmentIssue, match="No private step is taken that is not written down"):
        ledger.take()


def test_other_ranks_count_without_a_file(tmp_path):
    ledger = taken(started(tmp_path, writes=False), 2)
    assert not (tmp_path / FILE).exists() and ledger.of_weights() == spent(2)
    assert taken(started(None), 2).spent() == spent(2)


@pytest.mark.parametrize(
    "state",
    [
        {}, {"lineage": 3}, {"lineage": [[1]], "planned": 1, "sessions": {}},
        {"lineage": [[1.0, 2.0, None, 10, 1]], "planned": 1, "sessions": {}},
        {"lineage": [[float("nan"), 0.2, None, 10, 1]], "planned": 1, "sessions": {}},
        {"lineage": [], "planned": True, "sessions": {}}, {"lineage": [], "planned": 1, "sessions": {"a": {}}},
    ],
)  # fmt: skip
def test_a_checkpoint_that_does_not_say_what_was_spent_is_refused(state):
    with pytest.raises(ConfigError, match="does not say which private steps its weights come from"):
        Ledger(KIND, **GIVEN).load(state)
