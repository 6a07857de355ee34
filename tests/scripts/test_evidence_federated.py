"""The script of the evidence of federated training at its smallest, and what it counts."""

import importlib

import pytest

from posttrain.paths import recipes_dir


@pytest.fixture
def evidence(monkeypatch):
    monkeypatch.syspath_prepend(str(recipes_dir().parent / "scripts"))
    return importlib.import_module("evidence.federated")


def test_the_grid_has_each_cell_once_and_what_it_is_held_against(evidence):
    grid = evidence.cells("small", 2)
    assert len({str(cell) for cell in grid}) == len(grid) == 2 * (1 + 7 * 2 * 3)
    known = {(cell["arm"], cell["optimizer"], cell["epsilon"]) for cell in grid}
    assert {("base", "none", None), ("fedsvd", "sgd", 3), ("flora", "adamw", None)} <= known
    large = [cell for cell in evidence.cells("gsm8k", 1) if cell["arm"] != "base"]
    assert len(large) == 14 and {(cell["optimizer"], cell["epsilon"]) for cell in large} == {
        ("adamw", None),
        ("adamw", 6),
    }


def test_clients_have_labels_of_their_own_and_the_held_out_rows_all_alike(evidence, tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "pretrain", lambda folder, seed, steps: "base")
    source = evidence.Small(tmp_path)
    _, clients, held_out = source.load(0)
    shares = [max(sum(row["label"] == rule for row in rows) for rule in evidence.RULES) for rows in clients.values()]
    assert [len(rows) for rows in clients.values()] == [512] * 6 and max(shares) > 2 * 512 / 6
    assert {sum(row["label"] == rule for row in held_out) for rule in evidence.RULES} == {40}
    row = next(row for row in held_out if row["label"] == "left")
    words = row["prompt"].split()[:4]
    assert row["completion"].split() == [*words[1:], words[0]]
    assert clients == source.load(0)[1] and clients != source.load(1)[1]


def test_rises_of_a_run_and_the_epsilon_of_the_client_that_spent_most(evidence):
    def report(**clients):
        told = {name: {"epsilon": value} for name, value in clients.items()}
        return {"clients": told, "bytes_up": 2e6, "bytes_down": 4e6, "orthonormality": 1e-7, "left_out": {}}

    found = evidence.federated_report.facts_of([report(a=1.0, b=None), report(a=2.0, b=3.0)], [3.0, 2.0, 2.5, 2.6, 1.0])
    assert (found["largest_rise"], found["summed_rises"], found["epsilon"]) == (0.5, 0.6, 3.0)
    assert (found["megabytes_up"], found["megabytes_down"]) == (2.0, 4.0)


@pytest.mark.slow
def test_the_evidence_script_runs_every_arm(evidence, tmp_path, monkeypatch, capsys):
    small = dict(each=12, held_out=6, rounds=2, steps=1, batch=4, micro=4, rank=2, longest=3, looks=2, pretrained=3)
    for name, value in small.items():
        monkeypatch.setattr(evidence.Small, name, value)
    source = evidence.Small(tmp_path / "work")
    # of the privacies one, and of the optimizers one for it
    grid = [
        cell for cell in evidence.cells("small", 1) if cell["epsilon"] is None or (cell["optimizer"], 6) == ("sgd", 6)
    ]
    grid = [cell for cell in grid if cell["epsilon"] in (None, 6)]
    evidence.harness.run_grid(tmp_path / "cells.jsonl", grid, lambda cell: evidence.run_cell(source, cell))
    done, missing = evidence.harness.read_grid(tmp_path / "cells.jsonl", grid)
    assert not missing and len(done) == 1 + 14 + 7
    rows = {
        (row["arm"], row["optimizer"], row["private"]): row
        for row in evidence.federated_report.summarise("small", done)
    }
    for (arm, optimizer, epsilon), row in rows.items():
        assert {"loss", "right"} <= set(row) and (arm == "base" or row["diverged"][0] == 0), (arm, optimizer, epsilon)
        assert ("epsilon" in row) is (epsilon is not None)
        if epsilon:
            assert 0 < row["epsilon"][0] <= epsilon * (1 + 1e-9)
    assert rows["fedsvd", "adamw", None]["loss_minus_ffa_lora"][0] != 0
    # of a refactorisation after the first round
    assert rows["fedsvd", "sgd", None]["loss_minus_ffa_lora"][0] != 0
    assert rows["ffa_refactored_once", "sgd", None]["loss_minus_fedsvd"][0] == pytest.approx(0, abs=2e-3)
    evidence.federated_report.show(list(rows.values()))
    assert "loss_minus_fedsvd" in capsys.readouterr().out
