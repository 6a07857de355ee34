"""The script of A-LoL's evidence at its smallest."""

import importlib

import pytest

from posttrain.paths import recipes_dir


@pytest.mark.slow
def test_the_evidence_script_trains_every_arm_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    scripts = recipes_dir().parent / "scripts"
    monkeypatch.syspath_prepend(str(scripts))
    evidence = importlib.import_module("evidence.a_lol")
    report = importlib.import_module("evidence.a_lol_report")
    monkeypatch.setattr(importlib.import_module("evidence.reversing"), "STEPS", 3)
    for name, value in {"pairs": 16, "held_out": 6, "epochs": 1, "step": 8, "micro": 4}.items():
        monkeypatch.setattr(evidence.Small, name, value)
    source = evidence.Small(tmp_path / "work")
    _, pairs, low, held_out, _ = source.load(0)
    assert not {row["prompt"] for row in pairs} & {row["prompt"] for row in held_out}
    assert all(row["rejected_reward"] < row["chosen_reward"] <= 1 for row in [*pairs, *held_out])
    assert max(row["chosen_reward"] for row in low) <= 1 / source.words

    grid, ran = evidence.cells("small", 1), []
    assert len(grid) == 15 and [cell["arm"] for cell in grid[:3]] == ["base", "sft", "sft"]
    arms = ("base", "sft", "a_lol", "dpo", "sft_kept")
    grid = [c for c in grid if c["arm"] in (arms if c["data"] != "half_low" else ("a_lol",))]

    def run(cell):
        ran.append((cell["data"], cell["arm"]))
        return evidence.train_cell(source, cell, tmp_path / "work")

    evidence.harness.run_grid(tmp_path / "cells.jsonl", grid[:2], run)
    evidence.harness.run_grid(tmp_path / "cells.jsonl", grid, run)
    assert ran == [(cell["data"], cell["arm"]) for cell in grid]
    done, missing = evidence.harness.read_grid(tmp_path / "cells.jsonl", grid)
    assert not missing
    found = {(entry["cell"]["data"], entry["cell"]["arm"]): entry["result"] for entry in done}
    mean = sum(row[f"{side}_reward"] for row in pairs for side in ("chosen", "rejected")) / 32
    kept = sum(row[f"{side}_reward"] > mean for row in pairs for side in ("chosen", "rejected"))
    assert found["as_is", "sft"]["answers"] == 32 and found["as_is", "sft"]["steps"] == 4
    assert found["as_is", "a_lol"]["answers"] == found["as_is", "sft_kept"]["answers"] == kept < 32
    assert found["half_low", "a_lol"]["chosen"] != found["as_is", "a_lol"]["chosen"]

    rows = report.summarise("small", done)
    a_lol = next(row for row in rows if row["arm"] == "a_lol" and row["data"] == "as_is")
    # two answers a row, each token weighed by its answer's reward
    result = found["as_is", "a_lol"]
    weighted, weights = 0.0, 0.0
    for side in ("chosen", "rejected"):
        for logp, reward, tokens in zip(result[side], result[f"{side}_rewards"], result[f"{side}_tokens"], strict=True):
            weighted, weights = weighted + reward * logp, weights + reward * tokens
    assert a_lol["weighted"][0] == pytest.approx(weighted / weights, abs=1e-4)
    assert a_lol["weighted_minus_sft"][0] == pytest.approx(
        a_lol["weighted"][0] - next(row for row in rows if row["arm"] == "sft")["weighted"][0], abs=2e-4
    )
    assert {"gained", "preferred", "score", "length", "distinct_2"} <= set(a_lol) and "gained" not in rows[0]
    report.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_probe_of_the_evidence_learns_what_states_hold_and_keeps_them(tmp_path, monkeypatch):
    import numpy as np

    monkeypatch.syspath_prepend(str(recipes_dir().parent / "scripts"))
    probe = importlib.import_module("evidence.probe")
    rng = np.random.default_rng(0)
    hidden, taste, worth = rng.normal(size=(2, 400, 6)), rng.normal(size=6), rng.normal(size=6)
    better = ((hidden[0] - hidden[1]) @ taste > 0)[None, :, None]
    hidden = np.where(better, hidden, hidden[::-1])
    rewards = hidden @ worth
    pairs = [
        {"prompt": [], "chosen": [i], "rejected": [i], "chosen_reward": rewards[0, i], "rejected_reward": rewards[1, i]}
        for i in range(400)
    ]
    computed = []

    def states(self, prompts, answers):
        computed.append(len(prompts))
        return hidden[len(computed) - 1]

    monkeypatch.setattr(probe.Probe, "states", states)
    first = probe.Probe("", None, pairs, tmp_path / "states.npy", 8)
    assert first.human_accuracy > 0.9 and first.reward_correlation > 0.99 and computed == [400, 400]
    human, reward = first.scores(hidden[0])
    assert np.corrcoef(human, hidden[0] @ taste)[0, 1] > 0.9 and np.abs(reward - rewards[0]).max() < 0.5
    assert np.array_equal(probe.Probe("", None, pairs, tmp_path / "states.npy", 8).human, first.human)
    assert computed == [400, 400]
