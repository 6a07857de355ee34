"""The output of a verb whose reader has gone, or whose disk is full."""

import errno
import json
import os
import subprocess
import sys

import pytest

from posttrain import signals
from posttrain.cli import main, recipes

VERBS = {"recipes": ["list"], "data": ["stats", "pairs.jsonl", "--json"]}


@pytest.mark.parametrize("verb", VERBS)
def test_a_reader_that_has_gone_ends_a_verb_without_a_word(verb, tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(dict(prompt="a", chosen="b c", rejected="d")) + "\n")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "posttrain", verb, *VERBS[verb]]
    with open(writer, "wb") as gone:
        done = subprocess.run(command, cwd=tmp_path, stdout=gone, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 141 and done.stderr == ""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_nor_does_it_where_errors_go_there_too(unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "posttrain", "recipes", "copy", "nothing"]
    with open(writer, "wb") as gone:
        assert subprocess.run(command, stdout=gone, stderr=gone, env=environment).returncode == 141


class Full:
    """A stream to a full disk."""

    def __init__(self, number):
        self.number = number

    def write(self, text):
        return len(text)

    def flush(self):
        raise OSError(self.number, os.strerror(self.number))


def test_a_full_disk_is_told_in_one_line(monkeypatch, capsys):
    for number, said in ((errno.ENOSPC, "No space left on device"), (errno.EDQUOT, os.strerror(errno.EDQUOT))):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", Full(number))
            assert main(["recipes", "list"]) == 4
        assert capsys.readouterr().err == (
            f"posttrain: error: the disk that the output goes to has no room ({said}); make some, or write elsewhere.\n"
        )


def test_a_file_that_finds_no_room_is_named(monkeypatch, capsys):
    def fill(args):
        raise OSError(errno.ENOSPC, "No space left on device", "rows.jsonl")

    monkeypatch.setattr(recipes, "run", fill)
    assert main(["recipes", "list"]) == 4
    assert "error: rows.jsonl has no room (No space left on device)" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [BrokenPipeError, PermissionError])
def test_other_errors_stay_what_they_are(kind, monkeypatch):
    def fail(args):
        # of another pipe than the output's
        raise kind("other")

    monkeypatch.setattr(recipes, "run", fail)
    with pytest.raises(kind, match="other"):
        main(["recipes", "list"])


def test_a_signal_is_told_by_its_own_code(monkeypatch):
    def end(args):
        raise signals.Terminated(15)

    monkeypatch.setattr(recipes, "run", end)
    monkeypatch.setattr(sys, "stdout", Full(errno.ENOSPC))
    with pytest.raises(signals.Terminated) as ended:
        main(["recipes", "list"])
    assert ended.value.code == 143
