import importlib
import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def rlvr(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "scripts"))
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    return importlib.import_module("bench.rlvr")


def test_the_update_benchmark_measures_every_arm(rlvr, tmp_path, capsys):
    rlvr.main(["--quick", "--rounds", "1", "--json", str(tmp_path / "speed.json")])
    content = json.loads((tmp_path / "speed.json").read_text())
    assert [r["arm"] for r in content["rows"] if r["section"] == "scored"] == ["trl", "padded", "posttrain"]
    rows = {row["arm"]: row for row in content["rows"] if row["section"] == "update"}
    assert list(rows) == ["trl", "padded", "dropped", "posttrain"]
    assert all(len(row["seconds"]) == 3 and min(row["seconds"]) > 0 for row in rows.values())
    assert rows["trl"]["ratio"] == [1.0, 1.0, 1.0]
    # one group in five has rewards that differ
    assert rows["dropped"]["kept_share"] == rows["padded"]["kept_share"] == pytest.approx(0.2)
    assert content["largest_gap"] <= 1e-4 and "of 3.0" in capsys.readouterr().out


def test_another_loss_ends_the_benchmark(rlvr):
    good, bad = {"loss": 0.5, "grad_norm": 1.0}, {"loss": 0.501, "grad_norm": 1.0}
    assert rlvr.check_equal({"trl": [good], "posttrain": [good]}) == 0
    with pytest.raises(SystemExit, match="step 1: posttrain differs from TRL by 0.001"):
        rlvr.check_equal({"trl": [good], "posttrain": [bad]})
