"""The speed benchmark on a model of two layers: what it writes, what it counts, and that it refuses unequal losses."""

import importlib
import json
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module, pairs = importlib.import_module("bench.robust_dpo"), importlib.import_module("bench.pairs")
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8, vocab_size=259)
    monkeypatch.setitem(pairs.SHAPES, "random-tiny", shape)
    monkeypatch.setitem(pairs._PROMPTS, "hh", pairs._PROMPTS["short"])
    return module


@pytest.fixture
def harness(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("harness")


def run(bench, *arguments):
    bench.main(["--model", "random-tiny", "--rounds", "2", "--no-memory", "--lengths", "hh", *arguments])


def test_figures_are_measured_and_written(bench, tmp_path, capsys):
    file = tmp_path / "figures.json"
    run(bench, "--sections", "pairs", "--pairs-per-batch", "2", "--reference", "precomputed", "--json", str(file))
    content = json.loads(file.read_text())
    assert content.keys() == {"command", "machine", "rows", "targets"}
    rows = {row["arm"]: row for row in content["rows"]}
    assert tuple(rows) == bench.ABLATION
    for row in rows.values():
        assert (row["section"], row["lengths"], row["reference"], row["steps"]) == ("pairs", "hh", "precomputed", 2)
        assert len(row["seconds"]) == len(row["ratio"]) == 3 and row["seconds"][1] > 0
        assert row["largest_gap"] <= 1e-3
    theirs, ours = rows["trl"], rows["posttrain"]
    assert theirs["ratio"] == [1.0, 1.0, 1.0] and theirs["largest_gap"] == 0.0
    assert rows["padded"]["tokens_forwarded"] == theirs["tokens_forwarded"]
    assert ours["tokens_forwarded"] < theirs["tokens_forwarded"]
    # on CPU TRL's head scores all positions but each row's last
    rows_a_step = 2 * 2
    assert theirs["tokens_scored"] == rows["padded"]["tokens_scored"] == theirs["tokens_forwarded"] - rows_a_step
    assert ours["tokens_scored"] == rows["sharing"]["tokens_scored"] < theirs["tokens_scored"]
    assert [target["reached"] for target in content["targets"]] == [ours["ratio"][0]]
    assert "| pairs sdpa" in capsys.readouterr().out


def test_a_loss_that_is_not_trls_ends_the_run(bench, monkeypatch):
    from posttrain import RobustDPOTrainer

    right = RobustDPOTrainer.pair_losses
    monkeypatch.setattr(RobustDPOTrainer, "pair_losses", lambda self, *args: right(self, *args) * 1.002)
    monkeypatch.setattr(bench, "ABLATION", ("trl", "posttrain"))
    with pytest.raises(SystemExit, match="step 1: loss of posttrain is .*, of TRL 0.693"):
        run(bench, "--sections", "pairs", "--reference", "live", "--pairs-per-batch", "2")


def test_arms_of_a_window_of_several_batches_agree(bench):
    setting = bench.Setting("window", "hh", "live", ("trl", "packing"), "random-tiny", pairs=2, accumulation=2)
    measured = bench.measure(setting, None, rounds=1, seed=0)
    assert 0 < measured["packing"]["largest_gap"] <= 1e-3
    assert measured["packing"]["tokens_forwarded"][0] < measured["trl"]["tokens_forwarded"][0]


def test_the_arms_of_ours_differ_in_rows_and_sorting(bench):
    sides = importlib.import_module("bench.sides")
    bins, width = sides._one_block_a_row([5, 9, 4], 0.001, 8)
    assert (bins, width) == ([[0], [1], [2]], 16)
    batches = [object(), object()]
    assert sides.trainer_class("packing", {}).sorted_window(None, batches) is batches
    ours = sides.trainer_class("posttrain", {})
    assert "sorted_window" not in vars(ours) and hasattr(ours, "sorted_window")


def test_grouped_batches_hold_like_lengths_and_random_ones_the_same_pairs(bench):
    setting = bench.Setting("grouped", "hh", "live", bench.GROUPED, "random-tiny", pairs=4)
    drawn = bench.draw(setting, None, rounds=5, seed=1)
    assert drawn["trl"] is drawn["posttrain"] and drawn["trl_random"] is drawn["posttrain_random"]

    def padding(rows):
        batches = [rows["length"][start : start + 4] for start in range(4, len(rows), 4)]
        return sum(4 * max(batch) - sum(batch) for batch in batches)

    grouped, shuffled = drawn["trl"], drawn["trl_random"]
    assert len(grouped) == len(shuffled) == 6 * 4
    assert grouped[:4] == shuffled[:4] and grouped["chosen"] != shuffled["chosen"]
    assert sorted(grouped["chosen"]) == sorted(shuffled["chosen"])
    assert padding(grouped) < 0.3 * padding(shuffled)


def test_ratios_of_other_batches_are_of_sums(bench):
    def steps(*seconds):
        return {"seconds": seconds, "tokens_forwarded": [1], "tokens_scored": [1], "largest_gap": 0.0}

    setting = bench.Setting("grouped", "hh", "live", ("trl", "posttrain", "posttrain_random"), "random-tiny")
    measured = {"trl": steps(4, 2), "posttrain": steps(1, 1), "posttrain_random": steps(1, 3)}
    rows = {row["arm"]: row for row in bench.summarise(setting, [measured], {"trl": {"peak_mib": 7}})}
    assert rows["posttrain"]["ratio"] == [3.0, 2.5, 3.5] and rows["posttrain"]["lowest_ratio"] == 2
    assert rows["posttrain_random"]["ratio_of_sums"] == 1.5 and "ratio" not in rows["posttrain_random"]
    assert rows["posttrain"]["pairs_per_second"] == 4 and rows["trl"]["peak_mib"] == 7


def test_targets_name_what_was_not_reached(bench):
    row = {"section": "pairs", "model": "m", "lengths": "short", "reference": "live", "pairs": 4, "accumulation": 1}
    row |= {"attention": "sdpa", "device": "cpu"}
    theirs = row | {"arm": "trl", "peak_mib": 90}
    ours = row | {"arm": "posttrain", "ratio": [1.4, 1.2, 1.6], "lowest_ratio": 0.9, "peak_mib": 100}
    found = bench.targets([theirs, ours])
    assert [(entry["reached"], entry["met"]) for entry in found] == [(0.9, False), (0.9, False)]
    (speed,) = bench.targets([{key: value for key, value in ours.items() if key != "peak_mib"} | {"lengths": "hh"}])
    assert (speed["reached"], speed["wanted"], speed["met"]) == (1.4, 1.8, False)


def test_memory_is_that_of_a_side_alone(bench):
    setting = bench.Setting("pairs", "hh", "live", ("trl", "posttrain"), "random-tiny", pairs=2)
    found = bench.measure_memory(setting, "posttrain", None, rounds=2)
    assert found["peak_mib"] >= found["peak_mib_before"] > 100


def test_data_that_would_not_be_used_is_refused(bench, tmp_path):
    with pytest.raises(SystemExit, match="--data goes with embedded:smollm2-135m"):
        run(bench, "--data", str(tmp_path))


def test_sides_take_turns_and_the_first_round_does_not_count(harness):
    seen = []

    def side(name):
        def run(turn):
            for step in range(4):
                seen.append((step, name))
                turn()
            seen.append(("end", name))

        return run

    times = harness.alternate({name: side(name) for name in "abc"}, rounds=3)
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3, "c": 3}
    expected = [(step, name) for step, order in enumerate(("abc", "bca", "cab", "abc")) for name in order]
    assert seen[:-3] == expected
    assert seen[-3:] == [("end", name) for name in "abc"]


def test_an_error_in_one_side_ends_all(harness):
    left = []

    def waits(turn):
        try:
            while True:
                turn()
        finally:
            left.append("waits")

    def fails(turn):
        turn()
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        harness.alternate({"waits": waits, "fails": fails}, rounds=3)
    assert left == ["waits"]
    with pytest.raises(RuntimeError, match="short ended before its last step"):
        harness.alternate({"short": lambda turn: turn()}, rounds=3)
    with pytest.raises(RuntimeError, match="waits has more steps than rounds"):
        harness.alternate({"waits": waits}, rounds=2)


def test_spread_is_median_and_quartiles(harness):
    assert harness.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == (3.0, 2.0, 4.0)


@pytest.mark.parametrize(("live", "forwards"), [(False, 1), (True, 2)])
def test_floors_count_the_operations_of_the_passes(monkeypatch, live, forwards):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    floors = importlib.import_module("bench.floors")
    layer, head = torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(16, 32, bias=False)
    forward = 2 * (layer.weight.numel() * 10 + head.weight.numel() * 5)
    backward = 2 * layer.weight.numel() * 10 + 4 * head.weight.numel() * 5
    counted = floors.operations(layer.weight.numel(), head.weight.numel(), 10 * forwards, 5 * forwards, live)
    assert counted == forward * forwards + backward
