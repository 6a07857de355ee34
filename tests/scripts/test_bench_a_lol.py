import importlib
import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "scripts"))
    return importlib.import_module("bench.a_lol")


def test_the_benchmark_measures_every_arm(bench, tmp_path, capsys, monkeypatch):
    # of processes of their own, whose imports take most of a minute
    monkeypatch.setattr(bench, "memory_of", lambda script, arm, args: 1.0)
    bench.main(["--quick", "--rounds", "2", "--json", str(tmp_path / "speed.json")])
    content = json.loads((tmp_path / "speed.json").read_text())
    rows = {row["arm"]: row for row in content["rows"]}
    assert list(rows) == list(bench.ARMS) and all(min(row["seconds"]) > 0 for row in rows.values())
    assert rows["posttrain"]["over_ours"] == [1.0, 1.0, 1.0] and content["largest_gap"] <= 1e-4
    assert [target["wanted"] for target in content["targets"]] == [1.05, 1.8]
    assert "over SFT's, at most" in capsys.readouterr().out


def test_another_loss_ends_the_benchmark(bench):
    good, bad = [{"loss": 0.5}], [{"loss": 0.6}]
    with pytest.raises(SystemExit, match="step 1: the loss of posttrain differs from that of two models by 0.2"):
        bench.check_equal({"two_models": good, "padded": good, "posttrain": bad})
