import importlib
import json
from pathlib import Path

import pytest


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "scripts"))
    found = importlib.import_module("bench.federated")
    monkeypatch.setattr(found, "QUICK_DIVISOR", 64)
    monkeypatch.setattr(found, "QUICK_BLOCKS", 1)
    return found


@pytest.mark.slow
def test_the_benchmark_measures_every_side(bench, tmp_path, capsys):
    bench.main(["--quick", "--rounds", "2", "--json", str(tmp_path / "speed.json")])
    content = json.loads((tmp_path / "speed.json").read_text())
    assert content.keys() == {"command", "machine", "rows", "targets"} and content["targets"] == []
    rows = {(row["section"], row["side"]): row for row in content["rows"]}
    assert [side for section, side in rows if section == "server"] == ["check", "average", "first", "fedsvd", "both"]
    assert all(min(row["seconds"]) > 0 for row in rows.values() if "seconds" in row)
    assert rows["server", "first"]["relative_error"] < 1e-5 and rows["server", "fedsvd"]["relative_error"] < 1e-5
    layers = [row["layers"] for row in rows.values() if row["section"] == "naive"]
    assert layers == [2, 2, 4]
    a, b = 4 * 16 * (6 * 64 + 224), 4 * 16 * (3 * 64 + 2 * 16 + 2 * 224)
    assert (rows["bytes", "fedsvd"]["up"], rows["bytes", "fedsvd"]["down"]) == (b, a + b)
    assert (rows["bytes", "fedavg_lora"]["up"], rows["bytes", "flora"]["down"]) == (a + b, 9 * (a + b))
    assert "| fedsvd " in capsys.readouterr().out


def test_the_target_is_of_a_round_that_is_looked_at_and_refactored(bench):
    rows = [{"section": "server", "side": side, "seconds": [seconds] * 3} for side, seconds in
            {"check": 0.3, "average": 5.0, "first": 5.0, "fedsvd": 0.6, "both": 5.0}.items()]  # fmt: skip
    (one,) = bench.targets_of(rows)
    assert one["reached"] == pytest.approx(0.9) and one["met"]
    rows[3]["seconds"][0] = 0.8
    assert not bench.targets_of(rows)[0]["met"]
