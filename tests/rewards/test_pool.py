import os
import signal
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


@pytest.mark.slow
def test_a_worker_deaf_to_its_alarm_is_killed_and_replaced(pool):
    before = pool.pids
    assert score(pool, "1", "deaf", "0") == [Outcome(1.0), Outcome(timed_out=True), Outcome(0.0)]
    gone = set(before) - set(pool.pids)
    assert len(gone) == 1 and not is_alive(gone.pop())
    assert [outcome.value for outcome in score(pool, "1", "0", "1", "0")] == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.slow
def test_an_alarm_that_was_swallowed_rings_again_until_the_worker_is_killed(pool):
    assert score(pool, "swallow") == [Outcome(timed_out=True)]


def test_a_worker_that_dies_costs_its_own_sample_only(pool):
    died, *others = score(pool, "die", "1", "1", "0")
    assert died == Outcome(error="the worker died (exit code 7)")
    assert [outcome.value for outcome in others] == [1.0, 1.0, 0.0]


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def left_in(file):
    """Return the processes in a file that run, once they have had time to end."""
    left = [int(pid) for pid in file.read_text().split()]
    assert len(left) == 2
    deadline = time.monotonic() + 10
    while any(map(is_running, left)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return list(filter(is_running, left))


@pytest.mark.core("deaf")
@pytest.mark.parametrize("ending", ["sleep", "deaf", "die", "killed", "memory", "raise"])
def test_what_a_worker_has_started_ends_with_a_call_that_fails(pool, tmp_path, ending):
    (failed, after) = score(pool, f"{ending} leaving {tmp_path / 'left'}", "1")
    assert failed.timed_out or failed.error
    assert after == Outcome(1.0)
    assert left_in(tmp_path / "left") == []


def test_what_a_worker_has_started_lives_on_with_it_and_ends_with_the_pool(pool, tmp_path):
    before = pool.pids
    assert score(pool, f"1 leaving {tmp_path / 'left'}", "1") == [Outcome(1.0)] * 2
    assert pool.pids == before
    assert all(is_running(int(pid)) for pid in (tmp_path / "left").read_text().split())
    pool.close()
    assert left_in(tmp_path / "left") == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_worker_has_started_ends_when_the_pools_process_is_killed(tmp_path, number):
    code = (
        "import os; from posttrain.rewards.pool import WorkerPool;"
        f"pool = WorkerPool({MODULE!r}, 1, 60);"
        f"pool.map('score', [dict(answer='1 leaving {tmp_path / 'left'}', gold='1')]); os.kill(os.getpid(), {number:d})"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == -number
    assert left_in(tmp_path / "left") == []


@pytest.mark.slow
def test_what_a_worker_has_started_ends_after_its_keeper_was_killed(pool, tmp_path):
    score(pool, f"1 leaving {tmp_path / 'left'}")
    group, own_session = map(int, (tmp_path / "left").read_text().split())
    try:
        for worker in pool._workers:
            worker.process.kill()
            worker.process.wait()
        assert score(pool, "1", "0") == [Outcome(1.0), Outcome(0.0)]
        deadline = time.monotonic() + 10
        while is_running(group) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not is_running(group)
    finally:
        # nobody knows of this one then
        os.kill(own_session, signal.SIGKILL)


@pytest.mark.parametrize("killed", [2, 3])
def test_a_worker_that_is_killed_while_it_starts_is_replaced_but_not_for_ever(monkeypatch, killed):
    begin, begun = pools._Worker.__init__, []

    def begin_and_kill(worker, module):
        begin(worker, module)
        begun.append(worker)
        if len(begun) <= killed:
            worker.process.kill()

    monkeypatch.setattr(pools._Worker, "__init__", begin_and_kill)
    pool = WorkerPool(MODULE, workers=1, timeout=5)
    try:
        if killed < pools.STARTS:
            assert score(pool, "1") == [Outcome(1.0)] and pool._killed == 0
        else:
            with pytest.raises(EnvironmentIssue, match=r"ended while it started \(SIGKILL, 3 times in a row, as where"):
                score(pool, "1")
        assert len(begun) == 3
    finally:
        pool.close()


def test_replies_to_other_calls_are_dropped(pool, monkeypatch):
    read = pools._Worker.read

    def late_and_doubled(worker):
        replies = read(worker) or []
        late = [{"call": -1, "leaves": False, "value": 7.0}]
        return [reply for own in replies for reply in (*late, dict(own), *([own] if "call" in own else []))]

    monkeypatch.setattr(pools._Worker, "read", late_and_doubled)
    for _ in range(2):
        assert [outcome.value for outcome in score(pool, *"0112210")] == [0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0]


def test_a_fork_that_comes_back_from_the_verifier_replies_to_nobody(pool):
    answers = ["fork", "1", "fork", "0", "1", "1"]
    for _ in range(3):
        assert [outcome.value for outcome in score(pool, *answers)] == [0.0, 1.0, 0.0, 0.0, 1.0, 1.0]


@pytest.mark.slow
def test_after_a_map_that_was_cut_short_the_next_gets_its_own_replies(pool):
    with pytest.raises(TypeError, match="not JSON serializable"):
        score(pool, "1", object())
    assert [outcome.value for outcome in score(pool, "0", "0", "1")] == [0.0, 0.0, 1.0]


def test_numbers_of_calls_are_never_used_twice(pool, monkeypatch):
    numbers, send = [], pools._Worker.send
    monkeypatch.setattr(pools._Worker, "send", lambda self, *args: numbers.append(args[1]) or send(self, *args))
    score(pool, "1", "die", "0")
    pool.close()
    score(pool, "1", "0")
    assert len(numbers) == len(set(numbers)) >= 5


def test_signals_of_a_scheduler_leave_a_worker_at_its_call(pool):
    before = pool.pids
    for worker in pool._workers:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            os.kill(worker.pid, number)
            worker.process.send_signal(number)
    assert score(pool, "1", "0", "1") == [Outcome(1.0), Outcome(0.0), Outcome(1.0)]
    assert pool.pids == before


def is_running(pid):
    """Alive, and not just waiting for a parent to read its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.core("_math_verify")
@pytest.mark.parametrize("verifier", ["_math_verify", "_gym"])
def test_workers_load_nothing_heavy(verifier):
    code = f"import posttrain.rewards.worker, posttrain.rewards.{verifier}, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert f"posttrain.rewards.{verifier}" in loaded and not HEAVY & loaded
