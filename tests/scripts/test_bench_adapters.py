import importlib
import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "scripts"))
    return importlib.import_module("bench.adapters")


def test_the_benchmark_measures_every_arm(bench, tmp_path, capsys, monkeypatch):
    # of processes of their own, whose imports take most of a minute
    monkeypatch.setattr(bench, "memory_of", lambda script, arm, args: 1.0)
    bench.main(["--quick", "--rounds", "2", "--json", str(tmp_path / "speed.json")])
    content = json.loads((tmp_path / "speed.json").read_text())
    rows = {row["arm"]: row for row in content["rows"]}
    assert list(rows) == list(bench.ARMS) and all(min(row["seconds"]) > 0 for row in rows.values())
    assert rows["lora"]["over_lora"] == [1.0, 1.0, 1.0]
    assert [target["wanted"] for target in content["targets"]] == [1.05]
    assert "a step of allora over one of lora, at most" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("losses", "trained", "said"),
    [
        ({"allora": [0.61, 0.5]}, {}, "allora begins with a loss of 0.61, and lora with 0.6"),
        ({}, {"dora": 1.0}, "dora has trained the adapter of lora"),
    ],
)
def test_arms_that_are_not_what_they_say_end_the_benchmark(bench, losses, trained, said):
    good, sizes = {arm: [0.6, 0.5] for arm in bench.ARMS}, {"lora": 1.0, "allora": 1.1, "dora": 0.9}
    bench.check(good, sizes)
    with pytest.raises(SystemExit, match=said):
        bench.check(good | losses, sizes | trained)
