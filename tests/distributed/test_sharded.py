"""Two ranks per backend, one launch for all its cases, against one process that takes the batch whole.

In the core suite the ranks are forks of a process that has the libraries, started by accelerate's own launcher. Fresh
interpreters that go through every case of every backend are slow tests.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import make_pairs
from tests.distributed import sharding
from tests.distributed.worker import ANSWERS, EVALUATED, HELD_OUT, SAVED
from tests.families import METHODS
from tests.runs import distance, entries, same_metrics

ROOT = Path(__file__).parents[2]
# cases of generated rollouts, and cases whose update depends on where rows lie
GENERATED = {f"{name}/{key}": case for name, m in METHODS.items() for key, case in m.generated.items()}
WRONG = {f"{name}/wrong-{name}": m.wrong for name, m in METHODS.items() if isinstance(m.wrong, Mapping)}
EQUAL = {f"{name}/{key}": case for name, m in METHODS.items() for key, case in (m.cases | m.ranks).items()}
UNSHARDED = {f"{name}/{key}" for name, m in METHODS.items() for key in m.unsharded}
UNSPREAD = {f"{name}/{key}" for name, m in METHODS.items() for key in m.unspread}
REFUSED = {"cpu_ddp": set(), "cpu_zero2": UNSHARDED, "cpu_zero3": UNSHARDED, "fsdp2": UNSPREAD}
# what the forked ranks of the core suite run: the hardest cases
DDP = [f"{name}/{key}" for name, m in METHODS.items() for key in m.ddp]
SHARDED = [f"{name}/{key}" for name, m in METHODS.items() for key in m.sharded]
# of the others what is saved and evaluated
BRIEF = ("cpu_zero2", "fsdp2")
CORE = {"cpu_ddp": DDP, "cpu_zero3": SHARDED} | dict.fromkeys(BRIEF, [*SAVED, EVALUATED])


def method_of(key: str):
    return METHODS[key.split("/")[0]]


def on_ranks(key: str, case: Mapping) -> dict:
    """Two ranks, two micro-batches each; of rollouts, of which a step has more, four."""
    step, micro = method_of(key).step, 2 if method_of(key).step <= 8 else 4
    return dict(per_device_train_batch_size=micro, gradient_accumulation_steps=step // micro // 2) | case


class Launch:
    def __init__(self, backend: str, model: str, out: Path, warm, is_whole: bool):
        self.backend, self.out = backend, out
        names = EQUAL if is_whole else CORE[backend]
        cases = {key: EQUAL[key] for key in names if key not in REFUSED[backend]}
        cases |= (GENERATED if is_whole or backend not in BRIEF else {}) | (WRONG if backend == "cpu_ddp" else {})
        cases = {key: on_ranks(key, case) for key, case in cases.items()}
        self.cases = set(cases)
        config, log = str(ROOT / f"configs/accelerate/{backend}.yaml"), out / "log"
        if backend == "fsdp2":
            # the shipped one is for accelerators
            config = str(sharding.launch_file(out))
        # a fresh interpreter of each rank builds the model
        arguments = [model, str(out), json.dumps(cases), "embedded:tiny" if is_whole else ""]
        cache = {"POSTTRAIN_CACHE": str(out / "cache")}
        if is_whole:
            command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
            command += [str(ROOT / "tests/distributed/worker.py"), *arguments]
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)} | cache
            with log.open("w") as file:
                done = subprocess.run(command, env=environment, cwd=out, stdout=file, stderr=file, timeout=900)
            assert done.returncode == 0, log.read_text()[-8000:]
        else:
            worker = "tests.distributed.worker:main"
            child = warm.start("tests.warm:launched", config, worker, *arguments, log=log, **cache)
            assert child.wait() == 0, log.read_text()[-8000:]
        self.results = json.loads((out / "results.json").read_text())
        self.tensors = load_file(out / "changes.safetensors")

    def change(self, case: str) -> dict[str, torch.Tensor]:
        # DDP and the engines prefix nothing: the names are those of the inner model
        start = f"{case}|"
        return {key.removeprefix(start): value for key, value in self.tensors.items() if key.startswith(start)}

    def __getitem__(self, name: str):
        return lambda case: self.results[name][case]


FORKED = [f"{backend}-forked" for backend in REFUSED]
FRESH = [f"{backend}-fresh" for backend in REFUSED]


@pytest.fixture(scope="module", params=[*FORKED, *(pytest.param(name, marks=pytest.mark.slow) for name in FRESH)])
def launch(request, tiny_folder, tmp_path_factory, warm):
    backend, how = request.param.split("-")
    return Launch(backend, tiny_folder, tmp_path_factory.mktemp(request.param), warm, how == "fresh")


@pytest.fixture(scope="module")
def single(tiny_folder, tmp_path_factory):
    """The change, history and outcome of a case on one process, computed once for all backends."""
    known = {}

    def trained(key: str, case: Mapping):
        method, name = method_of(key), json.dumps([key, case], sort_keys=True, default=str)
        if name not in known:
            whole = case | method.split(method.step) | method.plain | (ANSWERS if key == EVALUATED else {})
            change, trainer = method.train(tiny_folder, tmp_path_factory.mktemp("single"), **whole)
            held_out = trainer.evaluate(make_pairs(**HELD_OUT)) if key in SAVED else None
            held_out = trainer.evaluate() if key == EVALUATED else held_out
            known[name] = change, entries(trainer), method.outcome(trainer), held_out
        return known[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        yield trained


def test_the_engine_is_what_the_config_says(launch):
    facts = launch.results["engine"]
    assert facts["world_size"] == 2
    if launch.backend == "cpu_ddp":
        assert facts["wrapper"] == "DistributedDataParallel"
        return
    if launch.backend == "fsdp2":
        assert (facts["distributed_type"], facts["version"]) == ("DistributedType.FSDP", 2)
        assert facts["partitioned"] == facts["parameters"] > 0
        assert facts["largest_share"] <= 0.51, "each rank holds half of every parameter"
        return
    stage = int(launch.backend[-1])
    assert (facts["wrapper"], facts["zero_stage"]) == ("DeepSpeedEngine", stage)
    assert facts["distributed_type"] == "DistributedType.DEEPSPEED"
    if stage == 3:
        assert facts["partitioned"] == facts["parameters"]
        assert facts["largest_share"] <= 0.51, "each rank holds half of every parameter"
    else:
        assert facts["partitioned"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("launch", FRESH, indirect=True)
def test_ranks_that_ask_for_an_embedded_model_at_once_get_it_whole(launch):
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(launch.results["embedded"])
    folder = next((launch.out / "cache" / "models").glob("tiny-llama-*"))
    assert AutoModelForCausalLM.from_pretrained(folder).lm_head.weight.shape[1] == 128


def test_two_ranks_make_the_update_of_one(launch, single):
    equal = launch.cases & set(EQUAL)
    assert equal >= set(CORE[launch.backend])
    for key in sorted(equal):
        method = method_of(key)
        change, history, outcome, _ = single(key, EQUAL[key])
        ours = launch.change(key)
        assert ours.keys() == change.keys(), key
        assert distance(ours, change) <= 1e-4, key
        assert launch["outcome"](key) == pytest.approx(outcome, abs=1e-5) and (not outcome or any(outcome)), key
        same_metrics(launch["history"](key), history, method.compared, **method.metrics)


def test_a_variant_that_is_known_to_be_wrong_is_told_apart(launch, single):
    wrong = launch.cases & set(WRONG)
    assert bool(wrong) == (launch.backend == "cpu_ddp")
    for key in wrong:
        assert distance(launch.change(key), single(key, WRONG[key])[0]) > 1e-3, key


def test_rollouts_are_generated_by_sharded_models(launch):
    (key,) = GENERATED
    if key not in launch.cases:
        assert launch.backend in BRIEF, "its core launch leaves generation to ZeRO-3"
        return
    history, change = launch["history"](key), launch.change(key)
    assert len(history) == 1 and all(row["hpt/frac_sft_prompts"] > 0 for row in history)
    assert all(value.isfinite().all() for value in change.values()) and any(value.any() for value in change.values())


def test_saved_models_reload_on_one_process_with_equal_logits(launch, tiny_folder):
    ids = torch.arange(10, 42).view(2, 16)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        untrained = base(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, launch.out / "robust_dpo/dr_dpo/saved").eval()(input_ids=ids).logits
        full = AutoModelForCausalLM.from_pretrained(launch.out / "robust_dpo/dr_dpo-full/saved").eval()
        full = full(input_ids=ids).logits
    for kind, logits in (("lora", adapted), ("full", full)):
        torch.testing.assert_close(logits, launch.tensors[f"logits|{kind}"], atol=1e-5, rtol=1e-5)
        assert (logits - untrained).abs().max() > 1e-3, "training changed nothing"


def test_an_adapter_checkpoint_leaves_the_frozen_base_out(launch, tiny_folder):
    base = (Path(tiny_folder) / "model.safetensors").stat().st_size
    adapter = (launch.out / "robust_dpo/dr_dpo" / "saved" / "adapter_model.safetensors").stat().st_size
    assert adapter < base / 5
    checkpoint = launch.out / "robust_dpo/dr_dpo" / "checkpoint-2"
    weights = [path for path in checkpoint.rglob("*") if re.search(r"\.(safetensors|pt|bin)$", path.name)]
    states = sum(path.stat().st_size for path in weights if "rng" not in path.name)
    assert adapter < states < base, "the adapter and its optimiser, not the base"
    assert launch.results["full"]["checkpoint_bytes"] > base


def test_evaluation_counts_every_row_once(launch, single):
    # 11 rows over 2 ranks x 3: the last round is filled up
    for key, kind in SAVED.items():
        expected, ours = single(key, EQUAL[key])[3], launch.results[kind]["eval"]
        for name in expected:
            if "/" in name or name == "eval_loss":
                assert ours[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name


def test_an_evaluation_by_tokens_has_no_row_twice(launch, single):
    expected = single(EVALUATED, EQUAL[EVALUATED])[3]["eval_loss"]
    assert launch.results["answers"]["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_compute_metrics_sees_both_answers_of_every_pair_once(launch):
    for kind in SAVED.values():
        found = launch.results[kind]
        assert len(found["rows"]) == 22 and sorted(found["rows"]) == sorted(found["answers"])
