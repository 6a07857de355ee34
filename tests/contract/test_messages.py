"""The texts of refusals, all in one approved file.

`python -m tests.contract.test_messages --approve` writes the file anew.
"""

import argparse
import contextlib
import difflib
import os
import re
import tempfile
from pathlib import Path
from unittest import mock

import pytest

from tests.contract.refusals import CASES, Case, Ended, refused
from tests.families import METHODS

APPROVED = Path(__file__).with_name("messages.txt")


def refusal(case: Case, folder: Path) -> str:
    """Give the kind and text of the refusal, with FOLDER for the temporary folder."""
    folder.mkdir(parents=True)
    quiet = dict(TRL_EXPERIMENTAL_SILENCE="1", POSTTRAIN_CACHE=str(folder / "cache"))
    try:
        with mock.patch.dict(os.environ, quiet), contextlib.chdir(folder):
            error = refused(case.build, folder)
    except Exception as error:
        error.add_note(f"The case is {case.title}.")
        raise
    kind = "" if isinstance(error, Ended) else f"{type(error).__name__}: "
    return f"{kind}{error}".replace(str(folder), "FOLDER")


def written(part: str, cases, folder: Path) -> str:
    """Give the approved file's text for the cases of a part."""
    blocks = [f"{case.title}\n{refusal(case, folder / str(number))}\n" for number, case in enumerate(cases)]
    return "\n".join([f"== {part} ==\n", *blocks])


def approved(part: str) -> str:
    """Give the part of the approved file that has this heading."""
    parts = re.split("\n(?=== )", APPROVED.read_text(encoding="utf-8"))
    return next((text for text in parts if text.startswith(f"== {part} ==\n")), "")


def difference(approved: str, said: str) -> str:
    """Give the unified diff from the approved text to what is said."""
    return "".join(difflib.unified_diff(approved.splitlines(True), said.splitlines(True), "messages.txt", "said"))


@pytest.mark.parametrize("part", CASES)
def test_refusals_have_their_approved_texts(tmp_path, part):
    change = difference(approved(part), written(part, CASES[part], tmp_path))
    assert not change, f"`python -m tests.contract.test_messages --approve` takes this over:\n{change}"


def test_the_approved_file_has_these_parts():
    assert re.findall("^== (.*) ==$", APPROVED.read_text(encoding="utf-8"), re.MULTILINE) == list(CASES)


def test_a_changed_text_is_shown_as_a_difference(tmp_path):
    first = CASES["settings"][0]

    def renamed(folder):
        raise type(error := refused(first.build, folder))(str(error).replace("flip_rate", "flips"))

    said = written("settings", [first._replace(build=renamed)], tmp_path)
    assert "-ConfigError: flip_rate is" in difference(approved("settings"), said)
    assert "+ConfigError: flips is" in difference(approved("settings"), said)


def test_a_setting_that_is_taken_is_no_refusal(tmp_path):
    def taken(folder):
        METHODS["robust_dpo"].config(str(folder), use_cpu=True, bf16=False, flip_rate=0.1)

    with pytest.raises(AssertionError, match="is not refused"):
        refusal(Case("a flip rate", taken), tmp_path / "taken")


def test_cases_have_titles_of_their_own():
    titles = [case.title for cases in CASES.values() for case in cases]
    assert len(set(titles)) == len(titles)


def test_each_method_has_refusals():
    assert all(method.refused for method in METHODS.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compare the texts of refusals with the approved file.")
    parser.add_argument("--approve", action="store_true", help="write the file anew")
    approve = parser.parse_args().approve
    with tempfile.TemporaryDirectory() as folder:
        said = "\n".join(written(part, cases, Path(folder) / part) for part, cases in CASES.items())
    print(difference(APPROVED.read_text(encoding="utf-8") if APPROVED.exists() else "", said), end="")
    if approve:
        APPROVED.write_text(said, encoding="utf-8")
