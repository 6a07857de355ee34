import importlib
import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "scripts"))
    return importlib.import_module("bench.noise")


def test_the_benchmark_measures_every_arm(bench, tmp_path, capsys, monkeypatch):
    # of processes of their own, whose imports take most of a minute
    monkeypatch.setattr(bench, "memory_of", lambda script, arm, args: 1.0)
    bench.main(["--quick", "--rounds", "2", "--json", str(tmp_path / "speed.json")])
    content = json.loads((tmp_path / "speed.json").read_text())
    rows = {row["arm"]: row for row in content["rows"]}
    assert list(rows) == list(bench.ARMS) and all(min(row["seconds"]) > 0 for row in rows.values())
    assert rows["sft"]["over_sft"] == [1.0, 1.0, 1.0]
    assert [target["wanted"] for target in content["targets"]] == [1.02, 1.0, 0.8, 0.62, 0.47, 1.0, 1.2]
    assert "a step of symnoise over 2 of sft, at most" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ({"off": [0.5]}, r"without noise the losses are \[0.5\], and TRL's are \[0.6\]"),
        ({"symnoise": [0.6]}, "the losses of symnoise are those without noise"),
        ({"noisefit_low": [0.8]}, "one forward has a loss of 0.8, three have 0.7"),
    ],
)
def test_sides_that_are_not_what_they_say_end_the_benchmark(bench, losses, said):
    good = {arm: [0.6] if arm in ("sft", "off") else [0.7] for arm in bench.ARMS}
    bench.check_losses(good)
    with pytest.raises(SystemExit, match=said):
        bench.check_losses(good | losses)
