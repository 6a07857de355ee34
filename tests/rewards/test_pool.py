import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from posttrain.errors import EnvironmentIssue
from posttrain.rewards import pool as pools
from posttrain.rewards.pool import Outcome, WorkerPool

ROOT = Path(__file__).resolve().parents[2]
MODULE = "tests.rewards.misbehaving"
HEAVY = {"torch", "transformers", "trl", "datasets"}


@pytest.fixture
def pool(monkeypatch):
    monkeypatch.setattr(pools, "GRACE", 0.3)
    pool = WorkerPool(MODULE, workers=2, timeout=0.4)
    pool.start()
    yield pool
    pool.close()


def score(pool, *answers, gold="1"):
    return pool.map("score", [{"answer": answer, "gold": gold} for answer in answers])


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_outcomes_come_in_the_order_of_the_calls(pool):
    answers = [str(i % 3) for i in range(50)]
    assert [outcome.value for outcome in score(pool, *answers)] == [float(answer == "1") for answer in answers]
    assert pool.map("score", []) == []


def test_a_sample_that_sleeps_is_stopped_and_its_worker_lives_on(pool):
    before = pool.pids
    start = time.monotonic()
    assert score(pool, "sleep", "1", "2", "1") == [Outcome(timed_out=True), *map(Outcome, (1.0, 0.0, 1.0))]
    assert time.monotonic() - start < 2
    assert pool.pids == before


def test_a_worker_deaf_to_its_alarm_is_killed_and_replaced(pool):
    before = pool.pids
    assert score(pool, "1", "deaf", "0") == [Outcome(1.0), Outcome(timed_out=True), Outcome(0.0)]
    gone = set(before) - set(pool.pids)
    assert len(gone) == 1 and not is_alive(gone.pop())
    assert [outcome.value for outcome in score(pool, "1", "0", "1", "0")] == [1.0, 0.0, 1.0, 0.0]


def test_an_alarm_that_was_swallowed_rings_again_until_the_worker_is_killed(pool):
    assert score(pool, "swallow") == [Outcome(timed_out=True)]


def test_a_worker_that_dies_costs_its_own_sample_only(pool):
    died, *others = score(pool, "die", "1", "1", "0")
    assert died == Outcome(error="the worker died (exit code 7)")
    assert [outcome.value for outcome in others] == [1.0, 1.0, 0.0]


def test_workers_killed_while_idle_are_replaced_without_losing_a_sample(pool):
    for worker in list(pool._workers):
        worker.process.kill()
        worker.process.wait()
    assert [outcome.value for outcome in score(pool, "1", "0", "1")] == [1.0, 0.0, 1.0]


def test_exceptions_are_told_apart_by_whose_fault_they_are(pool):
    (of_answer,) = score(pool, "raise")
    assert of_answer == Outcome(error="RuntimeError: cannot read raise", answer_at_fault=True)
    (of_gold,) = score(pool, "1", gold="bad")
    assert of_gold == Outcome(error="RuntimeError: cannot read 1", answer_at_fault=False)


def test_memory_is_limited(pool):
    (greedy,) = score(pool, "memory")
    assert greedy.error == "MemoryError" and greedy.answer_at_fault


def test_what_a_verifier_prints_goes_to_stderr_and_not_among_the_replies():
    code = (
        "from posttrain.rewards.pool import WorkerPool;"
        f"pool = WorkerPool({MODULE!r}, 1, 5); print(pool.map('score', [dict(answer='print', gold='1')])[0].value)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("0.0\n", "not a reply\n")


def test_closing_ends_the_workers_and_the_next_call_starts_others(pool):
    pids = pool.pids
    start = time.monotonic()
    pool.close()
    assert time.monotonic() - start < pools.CLOSE_TIMEOUT + 0.5
    assert not any(map(is_alive, pids))
    assert score(pool, "1") == [Outcome(1.0)] and not set(pids) & set(pool.pids)


def test_a_verifier_that_cannot_be_imported_is_named():
    pool = WorkerPool("tests.rewards.missing", workers=2, timeout=1)
    with pytest.raises(EnvironmentIssue, match="tests.rewards.missing cannot be loaded.*ModuleNotFoundError"):
        pool.start()
    assert pool.pids == []


UNGUARDED = """
    import os
    print("script runs")
    from posttrain.rewards.pool import WorkerPool
    pool = WorkerPool("tests.rewards.misbehaving", workers=2, timeout=5)
    pids = [int(one.value) for one in pool.map("score", [{"answer": "pid", "gold": ""}] * 4)]
    assert os.getpid() not in pids
    print(*sorted(set(pids)))
"""


def check_unguarded(command, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(UNGUARDED))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = time.monotonic()
    done = subprocess.run(
        [*command, script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    # Nothing holds up the exit: neither workers nor their pipes.
    assert time.monotonic() - start < 60
    runs, pids = done.stdout.splitlines()
    assert runs == "script runs"
    assert not any(is_alive(int(pid)) for pid in pids.split())


def test_a_script_without_a_main_guard_is_not_run_again_and_exits(tmp_path):
    check_unguarded([sys.executable], tmp_path)


@pytest.mark.slow
def test_workers_start_under_accelerate_launch(tmp_path):
    check_unguarded(["accelerate", "launch", "--cpu", "--num_processes", "1"], tmp_path)


def test_workers_leave_when_their_parent_is_killed():
    code = (
        "import os, signal; from posttrain.rewards.pool import WorkerPool;"
        f"pool = WorkerPool({MODULE!r}, 1, 5); pool.start(); print(*pool.pids, flush=True);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=60)
    (pid,) = map(int, done.stdout.split())
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(pid)


def is_running(pid):
    """Alive, and not just waiting for a parent to read its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("verifier", ["_math_verify", "_gym"])
def test_workers_load_nothing_heavy(verifier):
    code = f"import posttrain.rewards.worker, posttrain.rewards.{verifier}, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert f"posttrain.rewards.{verifier}" in loaded and not HEAVY & loaded
