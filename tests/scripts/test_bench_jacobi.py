import importlib
import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def test_the_benchmark_measures_every_model_and_way(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "scripts"))
    bench = importlib.import_module("bench.jacobi")
    monkeypatch.setattr(bench, "NEW_TOKENS", 12)
    bench.main(["--quick", "--rounds", "2", "--json", str(tmp_path / "speed.json")])
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [(row["model"], row["way"]) for row in rows] == [(m, w) for m in bench.MODELS for w in bench.WAYS]
    for row in rows:
        assert min(row["seconds"]) > 0 and row["texts_with_other_tokens"] == 0
        assert row["tokens_a_forward"] == 1 if row["way"] == "greedy" else row["tokens_a_forward"] >= 1
    assert "speed over greedy" in capsys.readouterr().out
