"""The script of the evidence on verifiable rewards at its smallest."""

import importlib

import pytest

from posttrain.paths import recipes_dir


@pytest.mark.slow
def test_the_evidence_script_trains_every_kind_of_arm_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(recipes_dir().parent / "scripts"))
    monkeypatch.syspath_prepend(str(recipes_dir().parent / "scripts" / "evidence"))
    rlvr, report = importlib.import_module("rlvr"), importlib.import_module("rlvr_report")
    size = rlvr.Size(warm_steps=2, steps=2, tasks=32, held_out=4, watched=2, watch_every=1)
    tasks = rlvr.Tasks(tmp_path / "work", size)
    folder, train, held_out = tasks.load(0)
    prompts = [set(rows["prompt"]) for rows in (train, held_out["easy"], held_out["hard"])]
    assert not prompts[0] & (prompts[1] | prompts[2]) and len(prompts[0]) == 32

    grid, ran = rlvr.cells(1, ("grpo", "sft_grpo", "luffy", "hpt")), []

    def run(cell):
        ran.append(cell["arm"])
        return rlvr.train_cell(tasks, cell)

    rlvr.harness.run_grid(tmp_path / "cells.jsonl", grid[:3], run)
    rlvr.harness.run_grid(tmp_path / "cells.jsonl", grid, run)
    assert ran == ["grpo", "sft_grpo", "luffy", "hpt"]
    done, missing = rlvr.harness.read_grid(tmp_path / "cells.jsonl", grid)
    assert not missing
    found = {entry["cell"]["arm"]: entry["result"] for entry in done}
    for result in found.values():
        assert result["update_tokens"] > 0 and result["generated_tokens"] > 0
        assert [entry["step"] for entry in result["curve"]] == [0, 1, 2]
        assert len(result["hard"]["sampled"]) == len(result["easy"]["greedy"]) == 4
    # the demonstrations are what a model of two steps can learn from, and the only rows with a gradient
    assert found["hpt"]["log"]["hpt/frac_sft_prompts"] == [1.0, 1.0]
    assert found["hpt"]["log"]["rows/kept_share"] == [pytest.approx(1 / rlvr.G)] * 2
    assert found["grpo"]["log"]["rows/kept_share"] == [0.0, 0.0]
    content = report.summarise(done, rlvr.SAMPLES)
    rows = {(row["arm"], row["split"]): row for row in content["rows"]}
    assert len(rows) == 8 and rows["hpt", "hard"]["pass1_minus_grpo"] == [0.0, 0.0, 0.0]
    report.plot(done, content, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
