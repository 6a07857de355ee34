"""The script of the adapters' evidence at its smallest."""

import importlib

import pytest

from posttrain.paths import recipes_dir


@pytest.fixture
def evidence(monkeypatch):
    monkeypatch.syspath_prepend(str(recipes_dir().parent / "scripts"))
    return importlib.import_module("evidence.adapters")


def test_the_grid_has_each_cell_once(evidence):
    grid = evidence.cells("small", 2)
    assert len({str(cell) for cell in grid}) == len(grid) == 2 * 28
    assert all(cell["arm"] in evidence.ARMS | evidence.OPTIMIZERS for cell in grid)
    # what an arm is held against has been run on the same rows
    known = {(cell["rows"], cell["data"], cell["arm"]) for cell in grid}
    assert {("many", "clean", "lora"), ("many", "swapped", "adamw"), ("few", "clean", "lora_sgd")} <= known


@pytest.mark.slow
def test_the_evidence_script_trains_every_arm(evidence, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.import_module("evidence.reversing"), "STEPS", 3)
    monkeypatch.setattr(evidence, "SIZES", {"few": (24, 1), "many": (32, 1)})
    for name, value in dict(facts=6, held_out=5, taught_epochs=1, longest=3, rank=4).items():
        monkeypatch.setattr(evidence.Small, name, value)
    source = evidence.Small(tmp_path / "work")
    done = []
    for cell in evidence.cells("small", 1):
        result = evidence.train_cell(source, cell)
        assert len(result["loss"]) == len(result["lists_right"]) == 5 and len(result["facts_right"]) == 6
        done.append({"cell": cell, "result": result})
    # in so few steps the other arms are where LoRA is, to the digits that are kept
    apart = ("base", "lora", "lora_half", "lora_four", "lora_dropout", "rslora", "ano")
    losses = [tuple(e["result"]["loss"]) for e in done if e["cell"]["arm"] in apart]
    assert len(set(losses)) == len(losses), "two arms are one"
    table = evidence.adapters_report.summarise("small", done)
    rows = {(row["rows"], row["data"], row["arm"]): row for row in table}
    assert rows["many", "clean", "ano"]["loss_minus_lora"][0] != 0
    assert "loss_minus_adamw" in rows["many", "swapped", "gaf"]
    evidence.adapters_report.show(table)
