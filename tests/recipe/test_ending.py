import multiprocessing
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posttrain import signals
from posttrain.errors import ConfigError, DataError, DivergedError, EnvironmentIssue
from posttrain.recipe import ending, run_main

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("error", "code"), [(ConfigError, 2), (DataError, 3), (EnvironmentIssue, 4), (DivergedError, 5)]
)
def test_errors_end_a_recipe_with_their_code_and_one_message(error, code, capsys, monkeypatch):
    def fail():
        raise error("what happened")

    assert run_main(fail) == code
    assert capsys.readouterr().err == "error: what happened\n"
    # another rank leaves it to the first one, which ends it
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("RANK", "9")

    def ended_meanwhile(seconds):
        raise signals.Terminated(signal.SIGTERM)

    monkeypatch.setattr("time.sleep", ended_meanwhile)
    assert run_main(fail) == code
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert run_main(fail) == code
    assert capsys.readouterr().err == "rank 9: error: what happened\n"


def test_a_run_leaves_its_own_code_and_no_earlier_one(tmp_path, monkeypatch, capsys):
    def fail():
        raise DataError("what happened")

    path = tmp_path / "code"
    path.write_text("5")
    monkeypatch.setenv("POSTTRAIN_EXIT_CODE_FILE", str(path))
    assert run_main(fail) == 3 and path.read_text() == "3"
    assert run_main(lambda: None) == 0 and not path.exists()


def test_an_interrupted_recipe_ends_without_a_traceback(capsys):
    def interrupted():
        raise KeyboardInterrupt

    assert run_main(interrupted) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_fault_of_the_program_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_main(lambda: 1 / 0)


@pytest.mark.parametrize("processes, expected", [("2", ["main", "handlers", "exit 0"]), ("1", ["main"])])
def test_only_a_distributed_run_ends_in_run_main(monkeypatch, processes, expected):
    done = []
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setattr("atexit._run_exitfuncs", lambda: done.append("handlers"))
    monkeypatch.setattr("os._exit", lambda code: done.append(f"exit {code}"))
    assert run_main(lambda: done.append("main")) == 0 and done == expected


def test_a_run_that_is_told_to_end_waits_for_no_process_of_a_library(monkeypatch):
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    child.start()
    done = []
    monkeypatch.setattr("atexit._run_exitfuncs", lambda: done.append(child.join(60) or child.exitcode))
    monkeypatch.setattr("os._exit", done.append)
    ending._leave(143)
    assert done == [-signal.SIGTERM, 143]


@pytest.mark.slow
def test_a_distributed_run_ends_at_once_with_its_exit_handlers_run():
    # one interpreter imports the libraries, and a child of it is each kind of run
    code = (
        "import atexit, os, sys; from posttrain.recipe import run_main\n"
        "for processes in '21':\n"
        "    if child := os.fork(): os.waitpid(child, 0); continue\n"
        "    os.environ['WORLD_SIZE'] = processes; break\n"
        "else: os._exit(0)\n"
        "class Late:\n    def __del__(self): print('torn down')\n"
        "late = Late(); atexit.register(print, 'handler')\n"
        "run_main(lambda: print('main')); print('after')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["main", "handler", "main", "after", "handler", "torn", "down"]


def test_a_rank_that_lost_another_leaves_it_to_that_one_to_say_why(tmp_path, monkeypatch, capsys):
    def lost():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:5130")

    def ended_meanwhile(seconds):
        raise signals.Terminated(signal.SIGTERM)

    path = tmp_path / "code"
    monkeypatch.setenv("POSTTRAIN_EXIT_CODE_FILE", str(path))
    with pytest.raises(RuntimeError):
        run_main(lost)
    path.unlink()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("atexit._run_exitfuncs", lambda: None)
    monkeypatch.setattr("os._exit", lambda code: None)
    monkeypatch.setattr("time.sleep", ended_meanwhile)
    assert run_main(lost) == 143 and capsys.readouterr().err == "" and not path.exists()
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert run_main(lost) == 1
    assert capsys.readouterr().err.startswith("error: the connection to another rank was lost ([gloo")


def test_recipes_of_before_find_it_where_it_was():
    from posttrain import config

    assert config.run_main is run_main
