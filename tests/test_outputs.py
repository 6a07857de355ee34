"""Output that nobody takes: its reader, its terminal or its disk is gone, and the process goes on."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain import outputs

ROOT = Path(__file__).parents[1]
CHILD = """
import os, sys
from posttrain import outputs
outputs.keep_going()
outputs.keep_going()
for _ in range(3):
    print("x" * 20_000, flush=True)
    print("an error", file=sys.stderr)
os.write(int(sys.argv[2]), b"by C code")
open(sys.argv[1], "w").write("went on")
"""


def end_of(code, tmp_path, *arguments, **given):
    """Run code in a process without the libraries, and return its exit code."""
    note = tmp_path / "note"
    command = [sys.executable, *given.pop("flags", []), "-c", code, str(note), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, **given)
    return done.returncode, note.read_text() if note.exists() else None


@pytest.mark.parametrize("flags", [[], ["-u"]])
@pytest.mark.parametrize("which", ["stdout", "stderr", "both"])
def test_a_pipe_whose_reader_has_gone_is_written_to_by_nobody(tmp_path, which, flags):
    reader, writer = os.pipe()
    os.close(reader)
    named = {"stdout": [1], "stderr": [2], "both": [1, 2]}[which]
    with open(os.devnull, "wb") as nothing, open(writer, "wb") as gone:
        streams = {"stdout": gone if 1 in named else nothing, "stderr": gone if 2 in named else nothing}
        assert end_of(CHILD, tmp_path, named[0], flags=flags, **streams) == (0, "went on")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
def test_a_disk_that_is_full_is_no_end(tmp_path):
    with open("/dev/full", "wb") as full, open(os.devnull, "wb") as nothing:
        code = CHILD.replace('os.write(int(sys.argv[2]), b"by C code")', "sys.stdout.flush()")
        assert end_of(code, tmp_path, stdout=full, stderr=full) == (0, "went on")
        # without it, the same ends the process
        assert end_of(code.replace("outputs.keep_going()", ""), tmp_path, stdout=full, stderr=nothing)[0] == 1


def test_a_terminal_that_was_closed_is_no_end(tmp_path):
    pty = pytest.importorskip("pty")
    controller, terminal = pty.openpty()
    os.close(controller)
    with open(terminal, "wb") as closed:
        assert end_of(CHILD, tmp_path, 1, stdout=closed, stderr=closed) == (0, "went on")


def test_streams_that_were_closed_at_the_start_are_none_to_fail_by(tmp_path):
    code = CHILD.replace("outputs.keep_going()", "sys.stdout = sys.stderr = None; outputs.keep_going()", 1)
    with open(os.devnull, "wb") as nothing:
        assert end_of(code, tmp_path, 1, stdout=nothing, stderr=nothing) == (0, "went on")


def test_what_is_taken_comes_as_it_was_written(tmp_path):
    code = (
        "import sys; from posttrain import outputs; print('before'); outputs.keep_going(); print('é', end='\\n\\n')\n"
        "print(sys.stdout.fileno(), sys.stdout.isatty(), sys.stdout.name, file=sys.stderr)\n"
        "sys.stdout.buffer.write(b'raw')"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True)
    assert done.stdout == b"before\n\xe9\n\nraw" and done.stderr == b"1 False <stdout>\n"


def test_streams_of_a_caller_stay(monkeypatch, tmp_path):
    with open(tmp_path / "own", "w") as own:
        monkeypatch.setattr("sys.stdout", own)
        outputs.keep_going()
        assert sys.stdout is own
