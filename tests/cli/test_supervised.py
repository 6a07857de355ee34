import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from posttrain import exit_codes
from posttrain.cli import _supervised, launcher, train

ROOT = Path(__file__).parents[2]
CHILD = """
import os, signal, sys, time
for name in sys.argv[2:]:
    signal.signal(getattr(signal, name), lambda number, frame: sys.exit(7) if name == "SIGUSR1" else os._exit(0))
open(sys.argv[1], "w").write(f"{os.getpid()} {os.getpgid(0)}")
time.sleep(60)
"""


def supervised(tmp_path, number, *handled):
    """Run a child, send this process a signal once it is there; its exit code."""
    note = tmp_path / "pid"

    def send():
        while not note.exists() or not note.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    sender.start()
    code = _supervised.run([sys.executable, "-c", CHILD, str(note), *handled], os.environ)
    sender.join()
    pid, group = note.read_text().split()
    assert pid == group
    return code


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_a_signal_goes_on_to_the_command_and_its_number_is_the_code(tmp_path, name):
    before = signal.getsignal(getattr(signal, name))
    assert supervised(tmp_path, getattr(signal, name)) == 128 + getattr(signal, name)
    assert signal.getsignal(getattr(signal, name)) is before


def test_a_command_that_ends_well_ended_well(tmp_path):
    assert supervised(tmp_path, signal.SIGTERM, "SIGTERM") == 0


def test_after_a_second_signal_a_command_that_hears_none_is_killed(monkeypatch):
    monkeypatch.setattr(_supervised, "AT_ONCE", 0.01)
    monkeypatch.setattr(_supervised.signals, "SAME_REQUEST", 0.0)
    deaf = "import os, signal, time; signal.signal(15, signal.SIG_IGN); os.kill(os.getppid(), 15); "
    code = f"{deaf} time.sleep(0.05); os.kill(os.getppid(), 15); time.sleep(60)"
    assert _supervised.run([sys.executable, "-c", code], os.environ) == 137


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the kernel of Linux")
def test_what_a_killed_command_leaves_may_end_by_itself(tmp_path):
    ends = f"import time; time.sleep(0.3); open({str(tmp_path / 'saved')!r}, 'w')"
    code = f"import os, subprocess, sys; subprocess.Popen([sys.executable, '-c', {ends!r}], start_new_session=True); "
    assert _supervised.run([sys.executable, "-c", f"{code} os.kill(os.getpid(), 9)"], os.environ) == 137
    assert (tmp_path / "saved").exists()


def test_the_codes_of_a_command_are_kept():
    assert _supervised.run([sys.executable, "-c", "import sys; sys.exit(5)"], os.environ) == 5
    assert _supervised.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], os.environ) == 137


def test_what_a_command_leaves_in_its_group_is_killed(tmp_path):
    code = (
        "import subprocess, sys\n"
        "left = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(left.pid))"
    )
    assert _supervised.run([sys.executable, "-c", code], os.environ) == 0
    pid = int((tmp_path / "pid").read_text())
    for _ in range(1000):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]:
            return
        time.sleep(0.01)
    raise AssertionError("it goes on")


@pytest.mark.parametrize(
    "who, code, kept, was_signalled, ends, said",
    [
        ("rank 1", -9, None, False, 137, "rank 1 was ended by SIGKILL\n"),
        ("rank 1", -9, 143, False, 137, "rank 1 was ended by SIGKILL\n"),
        ("rank 1", 1, 143, False, 1, "rank 1 ended with exit code 1\n"),
        ("rank 0", 143, 143, True, 143, ""),
        ("rank 1", -15, 143, True, 143, ""),
        ("rank 1", 3, 3, False, 3, ""),
        ("rank 0", 75, 75, True, 75, ""),
        ("the run", 3, 3, False, 3, ""),
        ("rank 1", 3, None, False, 3, ""),
        ("the run", -9, None, False, 137, "the run was ended by SIGKILL\n"),
    ],
)
def test_the_first_failure_counts_and_not_how_the_others_were_ended(
    tmp_path, monkeypatch, capsys, who, code, kept, was_signalled, ends, said
):
    path = tmp_path / "code"
    if kept is not None:
        path.write_text(str(kept))
    monkeypatch.setenv("POSTTRAIN_EXIT_CODE_FILE", str(path))
    assert launcher._told(who, code, was_signalled) == ends and path.read_text() == str(ends)
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("code", [2, 3, 4, 5, 75])
def test_the_code_of_a_run_stays_after_a_signal_where_no_file_could_hold_it(code):
    child = f"import os, signal, sys, time; signal.signal(15, lambda *_: sys.exit({code})); "
    child += "os.kill(os.getppid(), 15); time.sleep(60)"
    assert _supervised.run([sys.executable, "-c", child], os.environ) == code


@pytest.mark.parametrize("content, kept", [("75", 75), ("", None), ("7 5", None), ("-9", None), ("9" * 5000, None)])
def test_a_file_of_a_code_that_is_no_code_says_nothing(tmp_path, monkeypatch, capsys, content, kept):
    path = tmp_path / "code"
    path.write_text(content)
    assert exit_codes.kept(path) == kept and exit_codes.kept(tmp_path / "none") is None
    monkeypatch.setenv(exit_codes.VARIABLE, str(path))
    assert launcher._told("rank 0", 75, was_signalled=True) == 75 and path.read_text() == "75"
    assert capsys.readouterr().err == ""


def test_a_code_that_cannot_be_written_is_no_end_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv(exit_codes.VARIABLE, "/dev/full")
    exit_codes.keep(75, anew=False)
    monkeypatch.setenv(exit_codes.VARIABLE, str(tmp_path / "gone" / "code"))
    exit_codes.forget()
    exit_codes.keep(75)
    assert exit_codes.kept() is None


@pytest.mark.parametrize("content, code", [(None, 143), ("", 143), ("75", 75)])
def test_posttrain_train_ends_with_what_the_file_or_else_the_process_says(monkeypatch, content, code):
    def run(command, environment):
        if content is not None:
            Path(environment[exit_codes.VARIABLE]).write_text(content)
        return 143

    monkeypatch.setattr(_supervised, "run", run)
    args = SimpleNamespace(config="cpu", launch="cpu", method="robust_dpo", settings=[])
    assert train.run(args) == code


def test_without_a_temporary_folder_the_process_says_it(monkeypatch):
    def full(**given):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryDirectory", full)
    monkeypatch.setattr(_supervised, "run", lambda command, environment: 75)
    assert train.run(SimpleNamespace(config="cpu", launch="cpu", method="robust_dpo", settings=[])) == 75


@pytest.mark.slow
@pytest.mark.parametrize("how, code, said", [
    ("raise DataError('only here')", 3, "rank 1: error: only here"),
    ("os.kill(os.getpid(), 9)", 137, "rank 1 was ended by SIGKILL"),
    ("1 / 0", 1, "rank 1 ended with exit code 1"),
])  # fmt: skip
def test_the_reason_and_the_code_of_any_rank_are_kept(tmp_path, how, code, said):
    (tmp_path / "recipe.py").write_text(
        "import os, sys, time\nfrom posttrain.recipe import run_main\nfrom posttrain.errors import DataError\n"
        "def main():\n    open(os.environ['RANK'], 'w').close()\n    while not os.path.exists('0'): time.sleep(0.01)\n"
        f"    if os.environ['RANK'] == '1':\n        {how}\n    time.sleep(60)\nsys.exit(run_main(main))"
    )
    launch = ["--quiet", "--config_file", str(ROOT / "configs/accelerate/cpu_ddp.yaml")]
    launch += ["--num_cpu_threads_per_process", "1", str(tmp_path / "recipe.py")]
    done = subprocess.run(
        [sys.executable, "-m", "posttrain.cli.launcher", *launch],
        env=os.environ | {"PYTHONPATH": str(ROOT), "POSTTRAIN_EXIT_CODE_FILE": str(tmp_path / "code")},
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == code and said in done.stderr.splitlines()
    assert (tmp_path / "code").read_text() == str(code)
