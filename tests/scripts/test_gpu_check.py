"""The check for a card: all of its cases at toy sizes on the CPU; and cases that fail, hang or crash, on their own."""

import json
import os
import pkgutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "gpu_check.py"
_CASE = """
import os, signal, subprocess, sys, time
from pathlib import Path
from gpu.record import Case, Skipped

def run(record):
    record.figure("begun", True)
{body}

CASE = Case(number={number}, name="{name}", proves="{name}", seconds=2, toy_seconds=2, run=run, imports=())
"""
BODIES = {
    "good": 'record.at_most("small", 1.0, 2.0)',
    "bad": 'record.at_most("gap", 3.0, 2.0)\nrecord.at_least("no number", float("nan"), 0.0)',
    "hangs": (
        'record.figure("child", subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid)\n'
        'record.figure("half", 5)\ntime.sleep(600)'
    ),
    "crashes": 'print("last words", flush=True)\nos.kill(os.getpid(), signal.SIGSEGV)',
    "exits": 'print("no more", flush=True)\nos._exit(7)',
    "raises": 'raise ValueError("a reason")',
    "absent": 'raise Skipped("no such package")',
    "clocked": 'record.at_most("ms", 9.0, 1.0, clock=True)',
}


@pytest.fixture
def package(tmp_path):
    """Writes cases of these bodies, in this order, as a package."""

    def write(**bodies: str) -> None:
        folder = tmp_path / "made_up_cases"
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").write_text("")
        for number, (name, body) in enumerate(bodies.items()):
            text = _CASE.format(number=number, name=name, body=textwrap.indent(body, "    "))
            (folder / f"{name}.py").write_text(text)

    return write


def run(tmp_path, *arguments: str, of: str | None = "made_up_cases"):
    path = tmp_path / "found" / "gpu_check.json"
    words = [sys.executable, str(SCRIPT), "--toy", "--json", str(path), *(["--cases", of] if of else []), *arguments]
    places = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))}
    return subprocess.run(words, env=environment, capture_output=True, text=True)


def check(tmp_path, *arguments: str, **more):
    """Runs the script; returns what ended, and the result."""
    done, path = run(tmp_path, *arguments, **more), tmp_path / "found" / "gpu_check.json"
    return done, json.loads(path.read_text()) if path.exists() else None


def is_running(pid: int) -> bool:
    """Tell whether a process is there, and not one that has ended and that nobody has asked for."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_each_way_to_end_is_told_and_ends_no_other_case(tmp_path, package):
    package(**BODIES)
    done, result = check(tmp_path)
    assert done.returncode == 1, done.stderr
    states = {name: case["state"] for name, case in result["cases"].items()}
    assert states == {
        "good": "passed",
        "bad": "failed",
        "hangs": "deadline",
        "crashes": "crashed",
        "exits": "crashed",
        "raises": "error",
        "absent": "skipped",
        "clocked": "passed",
    }
    cases = result["cases"]
    assert cases["bad"]["checks"] == [
        {"what": "gap", "measured": 3.0, "wanted": "<= 2", "met": False},
        {"what": "no number", "measured": "nan", "wanted": ">= 0", "met": False},
    ]
    # what they had measured by then stays
    assert cases["hangs"]["figures"]["half"] == 5 and "ended after 2 s" in cases["hangs"]["error"]
    assert cases["crashes"]["figures"] == {"begun": True}
    assert "by SIGSEGV: last words" in cases["crashes"]["error"]
    assert "with exit code 7: no more" in cases["exits"]["error"]
    assert "ValueError: a reason" in cases["raises"]["error"]
    assert cases["absent"]["left_out"] == {"the case": "no such package"}
    assert cases["clocked"]["figures"]["ms"] == 9.0 and not cases["clocked"]["checks"]
    # what a case has started ends with it
    assert not is_running(cases["hangs"]["figures"]["child"])
    for line in ("| 1 bad ", "| 2 hangs ", "NOT MET bad: gap: 3.0 (wanted <= 2)", "DEADLINE hangs: ended after 2 s"):
        assert line in done.stdout
    assert "CRASHED crashes: the process ended by SIGSEGV" in done.stdout
    assert "left out absent: the case: no such package" in done.stdout


def test_a_parent_that_is_told_to_end_leaves_no_process_and_no_folder(tmp_path, package):
    package(hangs=BODIES["hangs"])
    case = tmp_path / "made_up_cases" / "hangs.py"
    told = f"Path({str(tmp_path / 'told')!r}).write_text(str(child.pid) + ' ' + os.environ['TMPDIR'])"
    begun = 'child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])'
    text = _CASE.format(number=0, name="hangs", body=f"    {begun}\n    {told}\n    time.sleep(600)")
    case.write_text(text.replace("toy_seconds=2", "toy_seconds=500"))
    words = [sys.executable, str(SCRIPT), "--toy", "--json", str(tmp_path / "found.json"), "--cases", "made_up_cases"]
    places = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    with subprocess.Popen(words, env=os.environ | {"PYTHONPATH": places}) as process:
        while process.poll() is None and not (tmp_path / "told").exists():
            time.sleep(0.02)
        process.terminate()
    child, folder = (tmp_path / "told").read_text().split(" ", 1)
    assert process.returncode == 143
    assert not is_running(int(child)) and not Path(folder).exists()


def test_a_second_run_goes_on_with_what_is_missing_or_failed(tmp_path, package):
    once = 'record.figure("runs", len(list(Path("{0}").glob("{1}*"))))\nPath("{0}/{1}" + str(time.time_ns())).touch()'
    marks = {name: once.format(tmp_path, f"{name}-ran-") for name in ("first", "second", "third")}
    package(first=marks["first"], second=marks["second"] + '\nrecord.at_most("gap", 3, 2)', third=marks["third"])
    assert check(tmp_path, "--case", "first", "second")[0].returncode == 1
    package(second=marks["second"], third=marks["third"])
    package(first=marks["first"], second=marks["second"], third=marks["third"])
    done, result = check(tmp_path)
    assert done.returncode == 0, done.stdout
    assert {name: case["figures"]["runs"] for name, case in result["cases"].items()} == {
        "first": 0,
        "second": 1,
        "third": 0,
    }
    assert "first ..." not in done.stdout and "| 0 first" in done.stdout
    # one that is named runs again
    _, result = check(tmp_path, "--case", "first")
    assert result["cases"]["first"]["figures"]["runs"] == 1


def test_no_case_begins_once_the_time_is_over(tmp_path, package):
    package(good=BODIES["good"])
    done, result = check(tmp_path, "--minutes", "1e-9")
    assert done.returncode == 1 and result is None
    assert "the 1e-09 minutes are over" in done.stdout and "not run" in done.stdout


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no result of gpu_check"),
        ('{"cases": {}}', "is no result of gpu_check"),
        (
            '{"toy": false, "commit": null, "machine": {}, "cases": {"good": {"state": "passed"}}}',
            "is of another run (toy: False, now True)",
        ),
    ],
)
def test_a_result_of_something_else_is_left_alone(tmp_path, package, content, said):
    package(good=BODIES["good"])
    path = tmp_path / "found" / "gpu_check.json"
    path.parent.mkdir()
    path.write_text(content)
    done = run(tmp_path)
    assert done.returncode == 1 and said in done.stderr
    assert path.read_text() == content


def test_an_unknown_case_is_answered_with_those_there_are(tmp_path, package):
    package(good=BODIES["good"], bad=BODIES["bad"])
    done, _ = check(tmp_path, "--case", "goood")
    assert done.returncode == 2 and "there is no case goood; there are good, bad" in done.stderr


def test_without_a_card_the_toy_sizes_are_named(tmp_path):
    words = [sys.executable, str(SCRIPT), "--json", str(tmp_path / "found.json")]
    done = subprocess.run(words, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 2 and "--toy runs all cases at toy sizes on the CPU" in done.stderr


def test_all_cases_pass_at_toy_sizes(tmp_path):
    done, result = check(tmp_path, "--minutes", "20", of=None)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [int(line.split()[0]) for line in listed()] == list(range(12))
    assert [*result["cases"]] == [line.split()[1] for line in listed()]
    assert {case["state"] for case in result["cases"].values()} == {"passed"}
    checked = {name for name, case in result["cases"].items() if case["checks"]}
    # what goes by a clock or by a card's own count has no pass mark here
    assert set(result["cases"]) - checked == {"plans", "waits"}


def listed() -> list[str]:
    done = subprocess.run([sys.executable, str(SCRIPT), "--list"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_the_table_of_methods_needs_no_pytest():
    code = "import sys; sys.modules['pytest'] = None; import tests.families; print(*tests.families.METHODS)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SCRIPT.parents[1])
    assert done.returncode == 0 and "robust_dpo" in done.stdout, done.stderr


def test_every_family_is_in_the_table_of_methods():
    from posttrain import trainers
    from tests.families import METHODS

    families = {found.name for found in pkgutil.iter_modules(trainers.__path__) if found.ispkg}
    assert {method.trainer.__module__.split(".")[2] for method in METHODS.values()} == families
