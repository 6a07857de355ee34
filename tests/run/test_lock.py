import contextlib
import errno
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import TrainerCallback, TrainingArguments

from posttrain.errors import ConfigError, EnvironmentIssue
from posttrain.run import lock
from tests.training import build, train

ROOT = Path(__file__).parents[2]
HOLD = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from posttrain.run import lock
with lock.held(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder `run`."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_by_name_and_a_dead_one_is_no_hindrance(holder, tmp_path, tiny_folder):
    folder = tmp_path / "run"
    named = rf"output_dir is .*/run, which another run is writing to: process {holder.pid} on .*, started 2"
    for refused in (lambda: lock.check_free(folder), lambda: train(tiny_folder, folder, max_steps=1)):
        with pytest.raises(ConfigError, match=named):
            refused()
    with pytest.raises(ConfigError, match=named), lock.held(folder):
        raise AssertionError("two hold it")
    assert [path.name for path in folder.iterdir()] == [lock.NAME]
    holder.kill()
    holder.wait()
    with lock.held(folder):
        assert json.loads((folder / lock.NAME).read_text())["process"] == os.getpid()
    assert not list(folder.iterdir())


@pytest.mark.slow
def test_a_rank_that_is_slower_than_the_first_is_not_refused_by_its_own_run(holder, tmp_path, tiny_folder, monkeypatch):
    folder = tmp_path / "run"
    with pytest.raises(ConfigError, match="which another run is writing to"):
        build(tiny_folder, folder)
    # the first rank of its run holds it
    monkeypatch.setattr(TrainingArguments, "process_index", 1)
    assert build(tiny_folder, folder).args.output_dir == str(folder)


def test_a_start_is_the_same_in_any_time_zone():
    assert lock._is_same("2026-01-02T03:04:05+00:00", "2026-01-02T05:04:06+02:00")
    assert not lock._is_same("2026-01-02T03:04:05+00:00", "2026-01-02T03:04:05+02:00")
    assert not lock._is_same("then", "2026-01-02T03:04:05+02:00") and not lock._is_same(None, None)


def _ask(barrier, folder, refused):
    for _ in range(100):
        barrier.wait()
        try:
            lock.check_free(folder)
        except ConfigError:
            refused.set()


def test_ranks_that_ask_at_once_do_not_refuse_each_other_over_a_dead_runs_lock(tmp_path):
    (tmp_path / lock.NAME).write_text(json.dumps({"host": "gone", "process": 1, "start": "then"}))
    context = multiprocessing.get_context("fork")
    barrier, refused = context.Barrier(3), context.Event()
    ranks = [context.Process(target=_ask, args=(barrier, tmp_path, refused)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0, 0] and not refused.is_set()


def test_one_process_may_hold_it_again_and_leaves_nothing(tmp_path):
    with lock.held(tmp_path):
        with lock.held(tmp_path / "." / "x" / ".."):
            lock.check_free(tmp_path)
        assert (tmp_path / lock.NAME).is_file()
    assert not (tmp_path / lock.NAME).exists()


def test_a_run_leaves_no_lock_and_two_trainers_of_a_process_follow_each_other(tiny_folder, tmp_path):
    for _ in range(2):
        train(tiny_folder, tmp_path / "run", max_steps=1)
    assert not (tmp_path / "run" / lock.NAME).exists()


def test_a_second_trainer_of_a_process_is_refused_while_the_first_one_trains(tmp_path):
    first, second = object(), object()
    with lock.held(tmp_path), lock.held(tmp_path, trainer=first):
        with lock.held(tmp_path, trainer=first), lock.held(tmp_path):
            pass
        with pytest.raises(ConfigError, match="another trainer of this process trains"):
            with lock.held(tmp_path, trainer=second):
                raise AssertionError("two train")
        with ThreadPoolExecutor(1) as pool, pytest.raises(ConfigError, match="another trainer of this process trains"):
            pool.submit(lock.held(tmp_path, trainer=second).__enter__).result()
    with lock.held(tmp_path), lock.held(tmp_path, trainer=second):
        pass
    assert not list(tmp_path.iterdir())


def test_a_trainer_that_is_built_while_another_trains_does_not_train(tiny_folder, tmp_path):
    with lock.held(tmp_path, trainer=object()):
        with pytest.raises(ConfigError, match="another trainer of this process trains"):
            train(tiny_folder, tmp_path, max_steps=1)


def test_what_is_forked_from_a_run_does_not_hold_its_folder(tmp_path):
    """Nor does it end the lock of the process that it was forked from."""
    answers, write = os.pipe()
    with lock.held(tmp_path):
        child = os.fork()
        if not child:
            said = []
            for ask in (lambda: lock.check_free(tmp_path), lambda: lock.held(tmp_path).__enter__()):
                try:
                    ask()
                    said.append("free")
                except ConfigError as error:
                    said.append(f"process {os.getppid()} on" in str(error))
            lock._release(lock._path_in(tmp_path), None)
            os.write(write, json.dumps(said).encode())
            os._exit(0)
        os.waitpid(child, 0)
        assert json.loads(os.read(answers, 100)) == [True, True]
        assert (tmp_path / lock.NAME).is_file()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_to_is_an_answer(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentIssue, match="cannot be written to"), lock.held(tmp_path / "file" / "run"):
        raise AssertionError("held")


@pytest.mark.parametrize(
    ("content", "age", "is_refused"),
    [
        (dict(host="elsewhere", process=1), 60, True),
        (dict(host="elsewhere", process=1), 3600, False),
        (dict(host=None, process=2**22 + 1), 0, False),
        (dict(host=None, process=os.getppid(), start=lock._start_of(os.getppid())), 3600, True),
        (dict(host=None, process=os.getppid()), 0, False),
        ([], 0, False),
    ],
)
def test_without_locks_of_the_file_system_the_holder_must_be_there(tmp_path, monkeypatch, content, age, is_refused):
    def no_locks(*args):
        raise OSError(lock.errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    path = tmp_path / lock.NAME
    if content:
        content = {"start": "then"} | content | {"host": content["host"] or lock.socket.gethostname()}
    path.write_text(json.dumps(content))
    os.utime(path, (time.time() - age,) * 2)
    if not is_refused:
        with lock.held(tmp_path):
            assert path.is_file()
        return
    with pytest.raises(ConfigError, match=f"process {content['process']} on .* delete .*{lock.NAME}"):
        with lock.held(tmp_path):
            raise AssertionError("two hold it")


def test_a_lock_that_no_file_system_guards_is_renewed_while_the_run_evaluates(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    monkeypatch.setattr(lock, "_RENEWAL", 0.01)
    path = tmp_path / lock.NAME
    with lock.held(tmp_path):
        os.utime(path, (0, 0))
        for _ in range(1000):
            if path.stat().st_mtime:
                break
            time.sleep(0.01)
        assert path.stat().st_mtime
    for thread in [thread for thread in threading.enumerate() if thread.name == "posttrain-lock"]:
        thread.join(60)
        assert not thread.is_alive()
    assert not path.exists()


@pytest.mark.parametrize("what", ["link", "dangling", "folder", "pipe"])
def test_what_is_no_file_is_no_lock_and_what_it_leads_to_stays(tmp_path, what):
    folder, path = tmp_path / "run", tmp_path / "run" / lock.NAME
    folder.mkdir()
    (tmp_path / "precious").write_text("x")
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / ("precious" if what == "link" else "nowhere"))
    for held in (lambda: lock.check_free(folder), lambda: lock.held(folder).__enter__()):
        with pytest.raises(ConfigError, match=f"run, where {lock.NAME} is (a link|a folder|no regular file)"):
            held()
    assert (tmp_path / "precious").read_text() == "x" and not (tmp_path / "nowhere").exists() and os.path.lexists(path)


def test_a_link_that_takes_the_locks_place_is_not_deleted(tmp_path):
    (tmp_path / "latest").symlink_to(tmp_path)
    with lock.held(tmp_path / "latest"):
        (tmp_path / lock.NAME).unlink()
        (tmp_path / lock.NAME).symlink_to(tmp_path / "precious")
        (tmp_path / "precious").write_text("x")
    assert (tmp_path / lock.NAME).is_symlink() and (tmp_path / "precious").read_text() == "x"


@pytest.mark.parametrize("how", ["renamed", "deleted", "replaced", "link"])
def test_a_run_does_not_write_where_its_folder_was(tmp_path, how):
    folder, real = tmp_path / "run", tmp_path / "real"
    if how == "link":
        real.mkdir()
        folder.symlink_to(real)
    with lock.held(folder):
        lock.check_held(folder)
        if how == "link":
            folder.unlink()
        else:
            folder.rename(tmp_path / "moved")
        if how == "deleted":
            (tmp_path / "moved" / lock.NAME).unlink()
        if how in ("replaced", "link"):
            folder.mkdir()
        with pytest.raises(EnvironmentIssue, match="/run is not the folder any more that this run began in"):
            lock.check_held(folder)
        # as if a relative path led there
        with pytest.raises(EnvironmentIssue), contextlib.chdir(tmp_path):
            lock.check_held("run")
    assert not folder.exists() or not list(folder.iterdir())
    lock.check_held(folder)


@pytest.mark.slow
def test_a_lock_that_was_deleted_by_hand_is_taken_again(tmp_path):
    with lock.held(tmp_path):
        (tmp_path / lock.NAME).unlink()
        lock.check_held(tmp_path)
        # to read it here would end it
        other = subprocess.run([sys.executable, "-c", HOLD, str(tmp_path)], capture_output=True, text=True)
        assert other.returncode == 1 and f"writing to: process {os.getpid()} on" in other.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_folder_that_another_run_took_after_its_lock_was_deleted_is_that_ones(tmp_path):
    with lock.held(tmp_path):
        (tmp_path / lock.NAME).unlink()
        with subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(EnvironmentIssue, match=f"is another run's .* The other: process {other.pid} on"):
                lock.check_held(tmp_path)
            other.kill()


def test_a_run_whose_folder_was_renamed_ends_and_writes_nothing_there(tiny_folder, tmp_path):
    class Rename(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            (tmp_path / "run").rename(tmp_path / "moved")

    trainer = build(tiny_folder, tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=1)
    trainer.add_callback(Rename())
    with pytest.raises(EnvironmentIssue, match="not the folder any more"):
        trainer.train()
    assert not (tmp_path / "run").exists() and not list((tmp_path / "moved").glob("checkpoint-*"))
    with pytest.raises(EnvironmentIssue, match="not the folder any more"), lock.held(tmp_path / "moved"):
        (tmp_path / "moved").rename(tmp_path / "again")
        trainer.args.output_dir = str(tmp_path / "moved")
        trainer.save_model()
    assert not (tmp_path / "moved").exists()
