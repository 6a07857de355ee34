"""The shell scripts, with stand-ins for Python, pip and the command: what they call, and when."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Knows `-c CODE` (as the real one) and `-m venv FOLDER`, whose programs write their arguments to $CALLS.
PYTHON = """#!/bin/bash
case "$1 $2" in
    "-c "*) exec {python} "$@" ;;
    "-m venv")
        mkdir -p "$3/bin"
        cp "$0" "$3/bin/python"
        for tool in pip posttrain; do cp {tool} "$3/bin/$tool"; done ;;
    "--version "*) echo "Python 3.11.9" ;;
    *) echo "$(basename "$0") $*" >>"$CALLS"
       [ -z "${{POSTTRAIN_TEST_DATA:-}}" ] || echo "data $POSTTRAIN_TEST_DATA" >>"$CALLS" ;;
esac
"""
TOOL = """#!/bin/bash
[ "$1" = --version ] && exit 0
echo "$(basename "$0") $*" >>"$CALLS"
[ "$(basename "$0")" != pip ] || exit "${PIP_EXIT:-0}"
"""

CORE = "python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m not slow"


class Clone:
    """A copy of the repository's scripts with stand-ins first on the PATH."""

    def __init__(self, folder: Path):
        self.root = folder / "clone"
        self.venv = self.root / ".venv"
        self.calls = folder / "calls"
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        for path in (ROOT / "pyproject.toml", *ROOT.glob("constraints*.txt")):
            shutil.copy(path, self.root)
        programs = folder / "programs"
        programs.mkdir()
        tool = self.program(programs / "tool", TOOL)
        self.program(programs / "python3.11", PYTHON.format(python=sys.executable, tool=tool))
        for name in ("c++", "ninja"):
            self.program(programs / name, "#!/bin/bash\n")
        self.environment = {
            **{name: value for name, value in os.environ.items() if name not in ("POSTTRAIN_TEST_DATA", "CXX")},
            "PATH": f"{programs}:{os.environ['PATH']}",
            "CALLS": str(self.calls),
        }

    def program(self, path: Path, text: str) -> Path:
        path.write_text(text)
        path.chmod(0o755)
        return path

    def run(self, script: str, *arguments: str, **environment: str):
        self.calls.write_text("")
        command = ["bash", str(self.root / "scripts" / script), *arguments]
        # Not the folder of the repository.
        return subprocess.run(
            command, cwd=self.calls.parent, env=self.environment | environment, capture_output=True, text=True
        )

    def called(self) -> list[str]:
        return self.calls.read_text().splitlines()


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path)


def test_quickstart_installs_the_pinned_set_once_and_hands_on_its_arguments(clone):
    assert clone.run("quickstart.sh", "--fast", "--seed", "2").returncode == 0
    looked, cpu, locked, own, started = clone.called()
    assert looked.endswith("--dry-run torch==2.13.0+cpu")
    assert cpu.endswith(f"--no-deps --require-hashes --requirement {clone.root}/constraints-cpu.txt")
    assert locked.endswith(f"--no-deps --require-hashes --requirement {clone.root}/constraints-quickstart.txt")
    assert own.endswith(f"--no-deps --no-build-isolation --editable {clone.root}[embedded,plots]")
    assert started == "posttrain quickstart --fast --seed 2"

    clone.run("quickstart.sh")
    assert clone.called() == ["posttrain quickstart"]


def test_another_set_of_pins_is_installed_again(clone):
    clone.run("quickstart.sh")
    with (clone.root / "constraints.txt").open("a") as file:
        file.write("extra==1\n")
    clone.run("quickstart.sh")
    assert len(clone.called()) == 5


def test_an_install_that_was_cut_short_starts_over(clone):
    failed = clone.run("quickstart.sh", PIP_EXIT="7")
    assert failed.returncode == 7
    assert len(clone.called()) == 2
    (clone.venv / "half-written").touch()
    assert clone.run("quickstart.sh").returncode == 0
    assert clone.called()[-1] == "posttrain quickstart"
    assert not (clone.venv / "half-written").exists()


def test_without_a_python_the_script_says_which_it_needs(clone):
    failed = clone.run("quickstart.sh", POSTTRAIN_PYTHON="python2.7")
    assert failed.returncode == 4
    assert "Python 3.11 or newer is needed" in failed.stderr
    assert "POSTTRAIN_PYTHON=/path/to/python" in failed.stderr


@pytest.mark.core("arguments1", "arguments3")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], CORE),
        (["-n", "0", "-k", "two words"], f"{CORE} -n 0 -k two words"),
        (["--slow"], "python -m pytest"),
        (["--slow-only", "-k", "two words"], "python -m pytest -m slow -k two words"),
    ],
)
def test_the_test_script_picks_the_suite_and_hands_on_the_rest(clone, arguments, expected):
    done = clone.run("test.sh", *arguments)
    assert done.returncode == 0, done.stderr
    *_, locked, own, tested = clone.called()
    assert locked.endswith(f"--require-hashes --requirement {clone.root}/constraints.txt")
    assert own.endswith(f"--editable {clone.root}[test]")
    assert tested == expected
    clone.run("test.sh")
    assert len(clone.called()) == 1


def test_real_data_beside_the_clone_is_found_unless_named(clone):
    beside = clone.root.parent / "shared" / "data"
    beside.mkdir(parents=True)
    clone.run("test.sh")
    assert clone.called()[-1] == f"data {beside}"
    clone.run("test.sh", POSTTRAIN_TEST_DATA="/elsewhere")
    assert clone.called()[-1] == "data /elsewhere"


def test_a_missing_compiler_is_named(clone):
    failed = clone.run("test.sh", CXX="no-such-compiler")
    assert failed.returncode == 4
    assert "found no C++ compiler (no-such-compiler)" in failed.stderr


def test_a_result_tells_the_command_without_anybodys_folders(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import harness

    given = [
        "/home/me/clone/scripts/bench/noise.py",
        "--data",
        "../shared/data",
        "--json=/tmp/a/b.json",
        "--work",
        "/tmp/x",
    ]
    monkeypatch.setattr(sys, "argv", given)
    assert harness.command() == "python noise.py --data ../shared/data --json=b.json --work x"
    written = sorted((ROOT / "docs" / "evidence").rglob("*.json*"))
    assert written, "no evidence is committed"
    for path in written:
        commands = re.findall(r'"command": "(.*?)"', path.read_text())
        assert not [text for text in commands if re.search(r"(?<![\w.])/", text)], path.name
