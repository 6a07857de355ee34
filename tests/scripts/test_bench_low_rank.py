import importlib
import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "scripts"))
    found = importlib.import_module("bench.low_rank")
    monkeypatch.setattr(found, "QUICK_WIDTH", 64)
    monkeypatch.setattr(found, "QUICK_MODEL", (64, 96, 1))
    return found


def test_the_benchmark_measures_every_side(bench, tmp_path, capsys):
    bench.main(["--quick", "--rounds", "2", "--json", str(tmp_path / "speed.json")])
    content = json.loads((tmp_path / "speed.json").read_text())
    assert content.keys() == {"command", "machine", "rows", "targets"}
    rows = {(row["section"], row["side"]): row for row in content["rows"]}
    assert list(rows) == [
        ("refactor", "full_svd"), ("refactor", "ours"), ("refactor", "ours_fp32"), ("adapter", "ours"),
        ("merge", "peft_cat"), ("merge", "peft_svd"), ("merge", "ours"), ("merge", "ours_to_r"),
    ]  # fmt: skip
    assert all(min(row["seconds"]) > 0 and len(row["seconds"]) == 3 for row in rows.values())
    assert rows["refactor", "full_svd"]["speedup"] == rows["merge", "peft_svd"]["speedup"] == [1.0, 1.0, 1.0]
    ranks = [rows["merge", side]["rank"] for side in ("peft_cat", "peft_svd", "ours", "ours_to_r")]
    assert ranks == [24, 16, 24, 16]
    errors = [rows["merge", side]["relative_error"] for side in ("peft_cat", "peft_svd", "ours", "ours_to_r")]
    assert max(errors[0], errors[2]) < 1e-5 and errors[1] == pytest.approx(errors[3], rel=1e-3) and errors[1] > 1e-3
    assert content["targets"] == []
    assert "| refactor ours" in capsys.readouterr().out


def test_a_side_of_another_product_ends_the_benchmark(bench, monkeypatch):
    monkeypatch.setattr(bench, "full_svd", lambda A, B: (A, 2 * B))
    with pytest.raises(SystemExit, match="the product of full_svd has a relative error of 1, and 1e-05 is the most"):
        bench.measure_refactor(64, rounds=1)


def test_targets_name_what_was_not_reached(bench):
    row = {"section": "refactor", "side": "ours_fp32", "seconds": [0.8e-3, 0.7e-3, 0.9e-3], "speedup": [9e3, 8e3, 1e4]}
    assert [(one["wanted"], one["met"]) for one in bench.targets_of([row])] == [(0.9e-3, True), (1e4, False)]
