"""The GPU column of the README's matrix says what results of a card say, and nothing else."""

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = """## What was tested where
| | CPU | GPU |
|---|---|---|
| one process; LoRA, 4-bit | yes | tested |
| two processes: DDP, ZeRO-2 | yes | not run |

Text | with | bars
"""


@pytest.fixture
def gpu_matrix(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("gpu_matrix")


def result(commit="0123456789abcdef", toy=False, **cases) -> dict:
    return {"toy": toy, "commit": commit, "machine": {"hardware": {"accelerator": "CARD"}}, "cases": cases}


def read(card="CARD", **cases) -> dict:
    """What `results` returns of a file."""
    return {"card": card, "commit": "0123456789abcdef", "cases": cases}


def case(state="passed", **checks) -> dict:
    entries = [{"what": what.replace("_", " "), "met": met} for what, met in checks.items()]
    return {"state": state, "checks": entries}


def test_the_readme_says_what_the_results_say(gpu_matrix):
    assert gpu_matrix.differing((ROOT / "README.md").read_text(), gpu_matrix.results()) == {}


def test_without_a_result_nothing_was_run(gpu_matrix, tmp_path):
    assert gpu_matrix.results(tmp_path) == []
    wrong = gpu_matrix.differing(TABLE, [])
    assert [*wrong.values()] == [("one process; LoRA, 4-bit", "tested", "not run")]
    assert gpu_matrix.written(TABLE, []) == TABLE.replace("| tested |", "| not run |")


def test_a_cell_names_what_was_proved_failed_and_left(gpu_matrix):
    ranks = {"ddp, 2 ranks, a/b: losses": True, "ddp, 2 ranks: cases": True, "fsdp2, 2 ranks: cases": False}
    found = [read(trainers=case(), ranks=case("failed", **ranks))]
    assert gpu_matrix.cell("one process; LoRA, 4-bit", found) == "CARD at 0123456: yes: one process; not run: 4-bit"
    assert gpu_matrix.cell("DDP, FSDP2", found) == "CARD at 0123456: yes: DDP; CARD at 0123456: failed: FSDP2"
    assert gpu_matrix.cell("ZeRO-3, several nodes", found) == "not run"
    both = [*found, read(card="OTHER", trainers=case(**{"a_lol, a_lol-seq, 4-bit: steps": True}))]
    assert gpu_matrix.cell("one process; 4-bit", both) == (
        "CARD at 0123456: yes: one process; OTHER at 0123456: yes: one process, 4-bit"
    )
    assert gpu_matrix.differing(gpu_matrix.written(TABLE, both), both) == {}


@pytest.mark.parametrize("state", ["deadline", "crashed", "error"])
def test_a_case_that_was_cut_short_proves_nothing(gpu_matrix, state):
    found = [read(ranks=case(state, **{"ddp, 2 ranks: cases": True}), trainers=case(state))]
    assert gpu_matrix.cell("DDP", found) == "CARD at 0123456: failed: DDP"
    assert gpu_matrix.cell("one process", found) == "CARD at 0123456: failed: one process"


def test_a_result_of_a_card_is_read(gpu_matrix, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(result(trainers=case())))
    assert gpu_matrix.results(tmp_path) == [read(trainers=case())]


def test_one_rank_is_no_proof_of_two(gpu_matrix):
    assert gpu_matrix.cell("DDP", [read(ranks=case(**{"ddp, 1 rank: cases": True}))]) == "not run"


def test_a_row_of_unknown_words_is_refused(gpu_matrix):
    with pytest.raises(SystemExit, match="no word of the row 'int8' is known"):
        gpu_matrix.cell("int8", [])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (result(toy=True), "toy sizes, which proves nothing"),
        (result(commit="01234-dirty"), "the commit 01234-dirty, which proves nothing"),
        (result(commit=None), "the commit None, which proves nothing"),
        ({"toy": False}, "is no result of gpu_check on a card"),
        ([], "is no result of gpu_check on a card"),
    ],
)
def test_what_is_no_result_of_a_card_is_refused(gpu_matrix, tmp_path, content, said):
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=said):
        gpu_matrix.results(tmp_path)


@pytest.mark.parametrize("text", ["# Nothing\n", TABLE.replace("GPU", "TPU"), "## What was tested where\nText\n"])
def test_a_matrix_that_is_not_there_is_told(gpu_matrix, text):
    with pytest.raises(SystemExit, match="What was tested where"):
        gpu_matrix.differing(text, [])
