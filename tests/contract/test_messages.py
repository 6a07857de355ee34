"""The texts of refusals, all in one approved file.

`python -m tests.contract.test_messages --approve` writes the file anew.
"""

import argparse
import contextlib
import difflib
import os
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


def written(cases, folder: Path) -> str:
    """Give the approved file's text for these cases."""
    return "\n".join(f"{case.title}\n{refusal(case, folder / str(number))}\n" for number, case in enumerate(cases))


def difference(approved: str, said: str) -> str:
    """Give the unified diff from the approved text to what is said."""
    return "".join(difflib.unified_diff(approved.splitlines(True), said.splitlines(True), "messages.txt", "said"))


def test_refusals_have_their_approved_texts(tmp_path):
    change = difference(APPROVED.read_text(encoding="utf-8"), written(CASES, tmp_path))
    assert not change, f"`python -m tests.contract.test_messages --approve` takes this over:\n{change}"


def test_a_changed_text_is_shown_as_a_difference(tmp_path):
    def renamed(folder):
        raise type(error := refused(CASES[0].build, folder))(str(error).replace("flip_rate", "flips"))

    said = written([CASES[0]._replace(build=renamed)], tmp_path / "renamed")
    approved = written(CASES[:1], tmp_path / "as it is")
    assert "-ConfigError: flip_rate is" in difference(approved, said)
    assert "+ConfigError: flips is" in difference(approved, said)


def test_a_setting_that_is_taken_is_no_refusal(tmp_path):
    def taken(folder):
        METHODS["robust_dpo"].config(str(folder), use_cpu=True, bf16=False, flip_rate=0.1)

    with pytest.raises(AssertionError, match="is not refused"):
        refusal(Case("a flip rate", taken), tmp_path / "taken")


def test_cases_have_titles_of_their_own():
    assert len({case.title for case in CASES}) == len(CASES)


def test_each_method_has_refusals():
    assert all(method.refused for method in METHODS.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Compare the texts of refusals with the approved file.")
    parser.add_argument("--approve", action="store_true", help="write the file anew")
    approve = parser.parse_args().approve
    with tempfile.TemporaryDirectory() as folder:
        said = written(CASES, Path(folder))
    print(difference(APPROVED.read_text(encoding="utf-8") if APPROVED.exists() else "", said), end="")
    if approve:
        APPROVED.write_text(said, encoding="utf-8")
