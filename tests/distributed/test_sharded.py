"""Two real processes per backend, one launch for all its cases, against one process that takes the batch whole."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import rollouts, scored
from tests.distributed.cases import EQUAL, LOCAL, RESCALE, ROLLOUTS, SCORED, whole
from tests.training import distance, train

ROOT = Path(__file__).parents[2]
BACKENDS = ("cpu_ddp", "cpu_zero2", "cpu_zero3")


class Launch:
    def __init__(self, backend: str, model: str, out: Path):
        self.backend, self.out = backend, out
        # ninja, which DeepSpeed compiles with, lies beside the interpreter
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", str(ROOT / f"configs/accelerate/{backend}.yaml")]
        command += [str(ROOT / "tests/distributed/worker.py"), model, str(out)]
        environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "POSTTRAIN_CACHE": str(out / "cache")}
        done = subprocess.run(command, env=environment, cwd=out, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        self.results = json.loads((out / "results.json").read_text())
        self.tensors = load_file(out / "changes.safetensors")

    def change(self, case: str) -> dict[str, torch.Tensor]:
        # DDP and the engines prefix nothing: the names are those of the inner model
        return {key.split("|", 1)[1]: value for key, value in self.tensors.items() if key.startswith(f"{case}|")}


@pytest.fixture(scope="module", params=BACKENDS)
def launch(request, tiny_folder, tmp_path_factory):
    return Launch(request.param, tiny_folder, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def once():
    """`once(compute, **case)` is what `compute(case)` gave for the first of the backends."""
    known = {}

    def remember(compute, **case):
        key = json.dumps([compute.__name__, case], sort_keys=True)
        if key not in known:
            known[key] = compute(case)
        return known[key]

    return remember


@pytest.fixture(scope="module")
def single(tiny_folder, tmp_path_factory, once):
    """The change and the logged history of a case on one process, computed once."""
    from tests.conftest import make_pairs

    def pairs_whole(arguments: dict):
        pairs = make_pairs(arguments.pop("rows"))
        change, trainer = train(tiny_folder, tmp_path_factory.mktemp("single"), pairs=pairs, **arguments)
        return change, [entry for entry in trainer.state.log_history if "loss" in entry]

    return lambda case: once(pairs_whole, **whole(case))


def test_the_engine_is_what_the_config_says(launch):
    facts = launch.results["engine"]
    assert facts["world_size"] == 2
    if launch.backend == "cpu_ddp":
        assert facts["wrapper"] == "DistributedDataParallel"
        return
    stage = int(launch.backend[-1])
    assert (facts["wrapper"], facts["zero_stage"]) == ("DeepSpeedEngine", stage)
    assert facts["distributed_type"] == "DistributedType.DEEPSPEED"
    if stage == 3:
        assert facts["partitioned"] == facts["parameters"]
        assert facts["largest_share"] <= 0.51, "each rank holds half of every parameter"
    else:
        assert facts["partitioned"] == 0


def test_ranks_that_ask_for_an_embedded_model_at_once_get_it_whole(launch):
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(launch.results["embedded"])
    folder = next((launch.out / "cache" / "models").glob("tiny-llama-*"))
    assert AutoModelForCausalLM.from_pretrained(folder).lm_head.weight.shape[1] == 128


@pytest.mark.parametrize("case", EQUAL)
def test_two_ranks_make_the_update_of_one(launch, single, case):
    change, history = single(EQUAL[case])
    ours = launch.change(case)
    assert ours.keys() == change.keys()
    assert distance(ours, change) <= 1e-4
    for logged, reference in zip(launch.results["history"][case], history, strict=True):
        for name in reference:
            # how a batch is laid out in rows, and how fast it runs
            if name.startswith(("tokens/", "prefix_sharing/")):
                continue
            if "/" in name or name in ("loss", "num_tokens", "entropy", "mean_token_accuracy"):
                assert logged[name] == pytest.approx(reference[name], rel=1e-3, abs=1e-5), name


def test_micro_batch_scope_is_told_apart(launch, single):
    for case, settings in LOCAL.items():
        change, _ = single(settings | {"dr_dpo_scope": "global"})
        assert distance(launch.change(case), change) > 1e-3


@pytest.mark.parametrize("case", ROLLOUTS)
def test_two_ranks_learn_from_rollouts_as_one(launch, once, tiny_folder, tmp_path, monkeypatch, case):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def rollouts_whole(arguments: dict):
        one = dict(per_device_train_batch_size=32, gradient_accumulation_steps=1)
        change, trainer = rollouts.train(tiny_folder, tmp_path, **one, **arguments)
        return change, list(trainer._logs["advantages"])[-32:], rollouts.entries(trainer)

    change, advantages, history = once(rollouts_whole, **ROLLOUTS[case])
    assert distance(launch.change(case), change) <= 1e-4
    assert launch.results[f"{case}_advantages"] == pytest.approx(advantages, abs=1e-6) and any(advantages)
    for logged, reference in zip(launch.results["history"][case], history, strict=True):
        for name in ("rows/kept_share", "entropy", "clip_ratio/region_mean", "clip_ratio/low_min"):
            assert logged[name] == pytest.approx(reference[name], rel=1e-4, abs=1e-6), name


def test_rollouts_are_generated_by_sharded_models(launch):
    history = launch.results["history"]["generated"]
    assert len(history) == 2 and all(row["hpt/frac_sft_prompts"] > 0 for row in history)
    assert all(value.isfinite().all() for value in launch.change("generated").values())
    assert any(value.any() for value in launch.change("generated").values())


@pytest.mark.parametrize("case", SCORED)
def test_two_ranks_learn_from_scored_answers_as_one(launch, once, tiny_folder, tmp_path, case):
    def scored_whole(arguments: dict):
        rows = scored.make_scored(arguments.pop("rows"), prompts=10)
        change, trainer = scored.train(tiny_folder, tmp_path, rows, **arguments)
        return change, trainer.train_dataset["advantage"][:], scored.entries(trainer)

    one = dict(per_device_train_batch_size=8, gradient_accumulation_steps=1)
    change, kept, history = once(scored_whole, **SCORED[case] | one)
    assert launch.results[f"{case}_advantages"] == pytest.approx(kept, abs=1e-6)
    # a last step of fewer than 8: ranks fill up by repeats
    assert 8 < len(kept) < 16
    assert distance(launch.change(case), change) <= 1e-4
    for logged, reference in zip(launch.results["history"][case], history, strict=True):
        for name in reference:
            if "/" in name and not name.startswith("tokens/"):
                assert logged[name] == pytest.approx(reference[name], rel=1e-3, abs=1e-5), name


def test_rescale_makes_the_same_update(launch, single):
    if launch.backend != "cpu_ddp":
        # refused under DeepSpeed, as tests/trainers asserts
        assert not launch.change(next(iter(RESCALE)))
        return
    for case, settings in RESCALE.items():
        change, _ = single(settings)
        assert distance(launch.change(case), change) <= 1e-4


def test_saved_models_reload_on_one_process_with_equal_logits(launch, tiny_folder):
    ids = torch.arange(10, 42).view(2, 16)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        untrained = base(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, launch.out / "lora" / "saved").eval()(input_ids=ids).logits
        full = AutoModelForCausalLM.from_pretrained(launch.out / "full" / "saved").eval()(input_ids=ids).logits
    for kind, logits in (("lora", adapted), ("full", full)):
        torch.testing.assert_close(logits, launch.tensors[f"logits|{kind}"], atol=1e-5, rtol=1e-5)
        assert (logits - untrained).abs().max() > 1e-3, "training changed nothing"


def test_an_adapter_checkpoint_leaves_the_frozen_base_out(launch, tiny_folder):
    base = (Path(tiny_folder) / "model.safetensors").stat().st_size
    adapter = (launch.out / "lora" / "saved" / "adapter_model.safetensors").stat().st_size
    assert adapter < base / 5
    checkpoint = launch.out / "lora" / "run" / "checkpoint-2"
    weights = [path for path in checkpoint.rglob("*") if re.search(r"\.(safetensors|pt|bin)$", path.name)]
    states = sum(path.stat().st_size for path in weights if "rng" not in path.name)
    assert adapter < states < base, "the adapter and its optimiser, not the base"
    assert launch.results["full_checkpoint_bytes"] > base


def test_evaluation_counts_every_row_once(launch, once, tiny_folder, tmp_path):
    from tests.conftest import make_pairs

    def evaluated_whole(arguments: dict):
        _, trainer = train(
            tiny_folder, tmp_path, per_device_train_batch_size=8, reduction="dr_dpo", beta_prime=0.3, **arguments
        )
        return trainer.evaluate(make_pairs(11, seed=10))

    # 11 rows over 2 ranks x 3: the last round is filled up
    for kind, peft in (("lora", True), ("full", False)):
        expected, ours = once(evaluated_whole, peft=peft), launch.results[f"{kind}_eval"]
        for name in expected:
            if "/" in name or name == "eval_loss":
                assert ours[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name


def test_compute_metrics_sees_both_answers_of_every_pair_once(launch):
    for kind in ("lora", "full"):
        assert len(launch.results[f"{kind}_rows"]) == 22
        assert sorted(launch.results[f"{kind}_rows"]) == sorted(launch.results[f"{kind}_answers"])
