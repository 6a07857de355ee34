"""The script of the evidence of private training at its smallest, and what it counts."""

import importlib
import math
import random

import pytest
import torch

from posttrain.models import tiny_model
from posttrain.paths import recipes_dir


@pytest.fixture
def evidence(monkeypatch):
    monkeypatch.syspath_prepend(str(recipes_dir().parent / "scripts"))
    return importlib.import_module("evidence.dp")


def test_the_grid_has_each_cell_once_and_what_it_is_held_against(evidence):
    grid = evidence.cells("small", 2)
    assert len({str(cell) for cell in grid}) == len(grid) == 2 * 16
    known = {(cell["unit"], cell["arm"], cell["audit"] > 0) for cell in grid}
    assert {("none", "plain", False), ("row", "inf", False), ("person", "inf", False), ("person", "1", True)} <= known
    assert all((unit, arm, False) in known for unit, arm, _ in known)
    large = evidence.cells("hh", 2)
    assert [cell["arm"] for cell in large if cell["seed"] == 0] == ["base", "plain", "inf", "8", "3"]


def test_a_secret_stands_in_one_row_or_in_all_rows_of_a_person_and_in_nobody_elses(evidence):
    rows = [{"person": row // 4, "prompt": f"p{row}", "completion": f"c{row}"} for row in range(48)]
    secrets = [{"prompt": f"q{i}", "completion": f"s{i}", "others": []} for i in range(6)]
    made = evidence.with_secrets(rows, secrets, 4, random.Random(1))
    assert [row["person"] for row in made] == [row["person"] for row in rows]
    holders = {}
    for secret in secrets:
        held = [row["person"] for row in made if row["completion"] == secret["completion"]]
        holders[secret["prompt"]] = held
        assert all(row["prompt"] == secret["prompt"] for row in made if row["completion"] == secret["completion"])
    assert [len(held) for held in holders.values()] == [1, 1, 1, 4, 4, 4]
    assert all(len(set(held)) == 1 for held in holders.values())
    assert len({held[0] for held in holders.values()}) == 6
    assert sum(one == other for one, other in zip(made, rows, strict=True)) == 48 - 15


def test_rows_of_nobody_hold_a_secret_as_often(evidence):
    rows = [{"person": row, "prompt": "p", "completion": "c"} for row in range(40)]
    secrets = [{"prompt": f"q{i}", "completion": f"s{i}", "others": []} for i in range(4)]
    made = evidence.with_secrets(rows, secrets, 8, random.Random(1))
    assert [sum(row["completion"] == f"s{i}" for row in made) for i in range(4)] == [1, 1, 8, 8]


def test_losses_of_answers_are_those_of_whole_rows(evidence):
    model = tiny_model().double().eval()
    start, answers = [5, 9, 2, 7], [[3, 4, 8], [11], [6, 6, 2, 1, 9]]
    found = evidence.dp_measures.answer_losses(model, [(start, answer) for answer in answers], batch=2)
    for answer, loss in zip(answers, found, strict=True):
        ids = torch.tensor([start + answer])
        labels = torch.tensor([[-100] * len(start) + answer])
        # in single precision, as the measure takes logits
        assert model(input_ids=ids, labels=labels).loss.item() * len(answer) == pytest.approx(loss.item(), rel=1e-5)


def test_exposure_is_the_logarithm_of_the_rank_among_all_candidates(evidence, monkeypatch):
    measures = evidence.dp_measures
    secrets = [{"prompt": "p", "completion": "s", "others": ["a", "b", "c"]} for _ in range(4)]
    monkeypatch.setattr(measures, "_tokenised", lambda tokenizer, secrets: [None] * 16)
    losses = iter([[1.0, 2, 3, 4], [3.0, 1, 2, 4], [9.0, 1, 2, 3], [1.0, 1, 1, 1]])
    monkeypatch.setattr(measures, "answer_losses", lambda model, rows, batch: torch.tensor(next(losses)))
    assert measures.exposures(None, None, secrets) == [
        2.0,
        round(2 - math.log2(3), 4),
        0.0,
        round(2 - math.log2(2.5), 4),
    ]


def test_a_cell_is_held_against_the_other_unit_and_the_run_without_canaries(evidence):
    def entry(unit, arm, audit, loss):
        cell = {"stage": "small", "seed": 0, "unit": unit, "arm": arm, "audit": audit}
        more = {"audit_bound": 0.5} if audit else {}
        result = {"loss": [loss, loss], "tokens": [1, 1], "exposure_once": [loss], "epsilon": 3.0} | more
        return {"cell": cell, "result": result}

    cells = [("none", "plain", 0, 1.0), ("row", "inf", 0, 1.5), ("row", "3", 0, 2.0), ("person", "3", 0, 2.25)]
    table = evidence.dp_report.summarise("small", [entry(*cell) for cell in (*cells, ("row", "3", 9, 2.5))])
    row, person, audited = table[2:]
    assert (row["loss_minus_plain"][0], row["loss_minus_inf"][0], "loss_minus_row" in row) == (1.0, 0.5, False)
    assert (person["loss_minus_row"][0], person["exposure_once_minus_row"][0]) == (0.25, 0.25)
    assert audited["loss_minus_unaudited"][0] == 0.5 and audited["audit_bound"][0] == 0.5
    assert "epsilon_minus_plain" not in row
    evidence.dp_report.show(table)


@pytest.mark.slow
def test_the_evidence_script_trains_every_arm(evidence, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.import_module("evidence.reversing"), "STEPS", 3)
    monkeypatch.setattr(evidence, "CANARIES", 100)
    monkeypatch.setattr(evidence, "EPSILONS", (8, 3))
    # so few rows that any draw fits a step: capped draws take longer to account for
    small = dict(people=10, each=4, held_out=5, secrets=2, candidates=7, step=16, epochs=1, micro=16, longest=3)
    for name, value in small.items():
        monkeypatch.setattr(evidence.Small, name, value)
    source = evidence.Small(tmp_path / "work")
    grid = evidence.cells("small", 1)
    evidence.harness.run_grid(tmp_path / "cells.jsonl", grid, lambda cell: evidence.train_cell(source, cell))
    done, missing = evidence.harness.read_grid(tmp_path / "cells.jsonl", grid)
    assert not missing
    rows = {(row["unit"], row["arm"], row["audit"]): row for row in evidence.dp_report.summarise("small", done)}
    assert len({row["loss"][0] for row in rows.values()}) == len(rows) == 12, "no two arms are the same"
    for (unit, arm, audit), row in rows.items():
        assert {"exposure_once", "exposure_often", "lists_right"} <= set(row)
        assert ("audit_bound" in row) is bool(audit)
        if arm in ("8", "3"):
            assert row["epsilon"][0] <= float(arm) and row["noise_multiplier"][0] > 0
            assert row["units"][0] <= (10 if unit == "person" else 40)
    evidence.dp_report.show(list(rows.values()))
    assert "exposure_often" in capsys.readouterr().out
