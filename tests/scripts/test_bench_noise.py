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
    assert list(content) == list(bench.GROUPS)
    rows = {row["arm"]: row for group in content.values() for row in group["rows"]}
    assert rows.keys() == bench.ARMS.keys() and all(min(row["seconds"]) > 0 for row in rows.values())
    assert all(group["rows"][0]["over_sft"] == [1.0, 1.0, 1.0] for group in content.values())
    wanted = {name: [target["wanted"] for target in group["targets"]] for name, group in content.items()}
    assert wanted == {"embedding": [1.02, 1.0], "hidden": [0.8, 0.62, 0.47], "weights": [1.0, 1.2]}
    assert "a step of symnoise over 2 of sft, at most" in capsys.readouterr().out


def test_a_group_leaves_the_results_of_others(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "memory_of", lambda script, arm, args: 1.0)
    (tmp_path / "speed.json").write_text('{"hidden": "as it was", "embedding": "old"}')
    bench.main(["--quick", "--rounds", "1", "--group", "embedding", "--json", str(tmp_path / "speed.json")])
    content = json.loads((tmp_path / "speed.json").read_text())
    assert content.keys() == {"hidden", "embedding"} and content["hidden"] == "as it was"
    assert [row["arm"] for row in content["embedding"]["rows"]] == list(bench.GROUPS["embedding"])


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
