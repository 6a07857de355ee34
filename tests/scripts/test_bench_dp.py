import importlib
import json
from pathlib import Path

import pytest
import torch

from posttrain.privacy import clipping


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "scripts"))
    return importlib.import_module("bench.dp")


@pytest.fixture
def engines(bench):
    return importlib.import_module("bench.dp_engines")


def small(bench):
    return bench.Shape(hidden=16, inner=24, layers=1, heads=2, vocabulary=19, tokens=6, rank=2)


@pytest.mark.parametrize("trained", ["B", "A and B"])
def test_our_step_has_the_gradient_of_rows_that_are_forwarded_alone(bench, trained):
    assert bench.distance("ours", small(bench), trained != "B") < 1e-5
    assert bench.distance("plain", small(bench), trained != "B") < 1e-5


def test_a_step_that_clips_otherwise_ends_the_benchmark(bench, monkeypatch):
    right = clipping.coefficients
    monkeypatch.setattr(bench, "ENGINES", {"ours": bench.ENGINES["ours"]})
    monkeypatch.setattr(clipping, "coefficients", lambda norms, *rest: 1.01 * right(norms, *rest))
    with pytest.raises(SystemExit, match=r"the gradient of ours \(B\) is off by 0.01 of its norm"):
        bench.found_engines(small(bench))


def test_an_engine_that_is_not_there_is_named_with_the_way_to_get_it(bench, engines, monkeypatch):
    for name in ("opacus", "opake"):
        # as if it was not installed
        monkeypatch.setitem(__import__("sys").modules, name, None)
    here, missing = bench.found_engines(small(bench))
    assert here == ["plain", "ours"]
    assert missing["opacus_hooks"].endswith("pip install 'opacus>=1.6,<1.7'")
    assert "pip install 'opake[transformers]'" in missing["opake"]


def test_noise_is_part_of_the_timed_step(bench, engines):
    shape = small(bench)
    made = [engines.ours(engines.make_model(shape, True), engines.make_rows(shape), 1.0, noise) for noise in (0.0, 9.0)]
    for one in made:
        one.gradient()
    still, noisy = (torch.cat([parameter.grad.flatten() for parameter in one.parameters]) for one in made)
    assert (noisy - still).std().item() == pytest.approx(9.0 / shape.rows, rel=0.3)
    made[0].update()
    assert all(parameter.grad is None for parameter in made[0].parameters)


def test_targets_name_what_was_not_reached(bench, capsys):
    seconds = {bench.side_name("plain", trained): [1.0, 2.0] for trained in bench.TRAINED}
    seconds |= {bench.side_name("ours", "B"): [1.0, 2.0], bench.side_name("ours", "A and B"): [1.2, 2.4]}
    rows, targets = bench.report("step", seconds, dict.fromkeys(seconds, 7.0))
    assert [(one["wanted"], one["reached"], one["met"]) for one in targets] == [(1.05, 1.0, True), (1.1, 1.2, False)]
    assert [row["over_plain"][0] for row in rows] == [1.0, 1.0, 1.0, 1.2] and rows[0]["peak_mib"] == 7
    assert "NOT MET a step of ours (A and B) over one of plain, at most: 1.200 (1.1)" in capsys.readouterr().out


def test_a_trainer_with_another_loss_ends_the_benchmark(bench):
    wanted = {"sft": 0.5, "dp_sft": 0.6}
    good = {name: wanted[bench.SIDES[name][0]] for name in ("sft, B", "dp_sft, B")}
    bench.check_losses(good, wanted, 1e-4)
    with pytest.raises(SystemExit, match="dp_sft, B begins with a loss of 0.5, and the model's on these rows is 0.6"):
        bench.check_losses(good | {"dp_sft, B": 0.5}, wanted, 1e-4)


@pytest.mark.slow
# what Opacus' hooks on modules without gradients of inputs say
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("engine", ["opacus_hooks", "opacus_ghost"])
def test_opacus_has_our_gradient_and_our_noise(bench, engines, engine):
    shape = bench.QUICK_SHAPE
    assert bench.distance(engine, shape, False) < 1e-5 and bench.distance(engine, shape, True) < 1e-5
    deviations = []
    for name in (engine, "ours"):
        still, noisy = (
            engines.ENGINES[name](engines.make_model(shape, True), engines.make_rows(shape), 1.0, noise)
            for noise in (0.0, 9.0)
        )
        still.gradient(), noisy.gradient()
        gaps = [one.grad - other.grad for one, other in zip(noisy.parameters, still.parameters, strict=True)]
        deviations.append(torch.cat([gap.flatten() for gap in gaps]).std().item())
    assert deviations == pytest.approx([9.0 / shape.rows] * 2, rel=0.05)


@pytest.mark.slow
def test_the_benchmark_measures_every_side(bench, tmp_path, capsys, monkeypatch):
    # of processes of their own, whose imports take most of a minute
    monkeypatch.setattr(bench, "memory_of", lambda script, arm, args: 1.0)
    monkeypatch.setattr(bench, "ENGINES", {name: bench.ENGINES[name] for name in ("plain", "ours")})
    bench.main(["--quick", "--rounds", "2", "--json", str(tmp_path / "speed.json")])
    content = json.loads((tmp_path / "speed.json").read_text())
    found = [(row["section"], row["arm"], row["trained"]) for row in content["rows"]]
    wanted = [("step", arm, trained) for trained in bench.TRAINED for arm in ("plain", "ours")]
    assert found == wanted + [("trainer", arm, trained) for trained in bench.TRAINED for arm in bench.TRAINERS]
    assert all(min(row["seconds"]) > 0 for row in content["rows"])
    assert [one["wanted"] for one in content["targets"]] == [1.05, 1.1, 1.05, 1.1] and content["missing"] == {}
    assert "a step of dp_sft (A and B) over one of sft, at most" in capsys.readouterr().out
