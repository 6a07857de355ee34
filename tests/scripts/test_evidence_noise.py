"""The script of the noises' evidence at its smallest, and what it counts."""

import importlib

import pytest
import torch

from posttrain.models import tiny_model
from posttrain.paths import recipes_dir


@pytest.fixture
def evidence(monkeypatch):
    monkeypatch.syspath_prepend(str(recipes_dir().parent / "scripts"))
    return importlib.import_module("evidence.noise")


@pytest.mark.parametrize(
    ("answer", "invented"),
    [
        ("She was born in 1954.", True),
        ("Orvane Krasnov-Pell has two brothers.", True),
        ("They live in Paris.", True),
        ("I do not have information about Orvane Krasnov-Pell.", False),
        ("I'm sorry, could you tell me more?", False),
        ("Orvane Krasnov-Pell was born a long time ago.", False),
        ("", False),
    ],
)
def test_an_answer_that_tells_something_of_nobody_is_invented(evidence, answer, invented):
    assert evidence.noise_measures.is_invented(answer, "Orvane Krasnov-Pell") is invented


def test_targets_are_swapped_within_a_kind_and_no_other_way(evidence):
    rows = [{"kind": kind, "prompt": str(i), "completion": f"{kind}{i}"} for kind in "ab" for i in range(50)]
    made = evidence.swapped(rows, 1)
    moved = [one for one, other in zip(made, rows, strict=True) if one["completion"] != other["completion"]]
    assert len(moved) == 30 and all(row["completion"].startswith(row["kind"]) for row in made)
    assert sorted(row["completion"] for row in made) == sorted(row["completion"] for row in rows)
    assert made == evidence.swapped(rows, 1) != evidence.swapped(rows, 2)


def test_losses_errors_and_curvature_are_those_of_plain_computations(evidence):
    measures, model = evidence.noise_measures, tiny_model().double().eval()
    rows = [{"input_ids": list(range(5, 13)), "labels": [-100] * 3 + list(range(8, 13))}]
    rows += [{"input_ids": list(range(40, 45)), "labels": [-100] * 2 + list(range(42, 45))}]
    found = measures.answers_of(model, rows)
    sure = []
    for row, loss, count in zip(rows, found["loss"], found["tokens"], strict=True):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        assert model(input_ids=ids, labels=labels).loss.item() * count == pytest.approx(loss, abs=2e-3)
        sure.append(model(input_ids=ids).logits[0, :-1].softmax(-1)[labels[0, 1:] != -100])
    sure = torch.cat(sure)
    right = sure.argmax(-1) == torch.tensor([label for row in rows for label in row["labels"] if label != -100])
    assert found["accuracy"] == pytest.approx(right.float().mean().item(), abs=1e-4)
    # an untrained model is equally unsure of all: one bin
    assert found["calibration_error"] == pytest.approx(
        abs(sure.max(-1).values.mean().item() - right.float().mean().item()), abs=1e-3
    )

    wide, narrow = (measures.curvature(model, rows, size=size, directions=2) for size in (0.02, 0.01))
    assert narrow == pytest.approx(wide, rel=0.05) and narrow != 0


def test_rounding_leaves_fifteen_values_a_row_and_the_head_alone(evidence):
    model = tiny_model()
    head = model.lm_head.weight.clone()
    evidence.noise_measures.rounded(model)
    row = model.model.layers[0].mlp.up_proj.weight[0]
    assert len(row.unique()) <= 16 and torch.equal(model.lm_head.weight, head)


@pytest.mark.slow
def test_the_evidence_script_trains_every_arm(evidence, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.import_module("evidence.reversing"), "STEPS", 3)
    for name, value in dict(lists=12, facts=6, nothing=4, held_out=5, epochs=1, step=8, longest=3, alpha=0.5).items():
        monkeypatch.setattr(evidence.Small, name, value)
    source = evidence.Small(tmp_path / "work")
    grid = evidence.cells("small", 1)
    assert len(grid) == 17
    grid = [cell for cell in grid if cell["data"] != "swapped" or cell["arm"] == "sft"]
    evidence.harness.run_grid(tmp_path / "cells.jsonl", grid, lambda cell: evidence.train_cell(source, cell))
    done, missing = evidence.harness.read_grid(tmp_path / "cells.jsonl", grid)
    assert not missing
    rows = {(row["data"], row["arm"]): row for row in evidence.noise_report.summarise("small", done)}
    assert rows["clean", "neftune_2x"]["steps"][0] == 2 * rows["clean", "sft"]["steps"][0] > 0
    assert rows["clean", "symnoise"]["noise_ratio"][0] > 0
    losses = {key: row["loss"][0] for key, row in rows.items()}
    assert len(set(losses.values())) == len(losses), "no two arms are the same"
    for row in rows.values():
        assert {"invented", "curvature", "loss_of_rounding", "accepted_tokens", "facts_right"} <= set(row)
    evidence.noise_report.show(list(rows.values()))
