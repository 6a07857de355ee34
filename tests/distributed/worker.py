"""Runs every case of a backend in one pair of processes: `accelerate launch --config_file X worker.py MODEL OUT`."""

import contextlib
import gc
import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import save_file

from posttrain import RobustDPOConfig, RobustDPOTrainer
from posttrain.models import resolve_model
from posttrain.run import report
from tests import rollouts, scored
from tests.conftest import make_pairs
from tests.distributed.cases import DR_DPO, EQUAL, LOCAL, RESCALE, ROLLOUT_SPLIT, ROLLOUTS, SCORED
from tests.training import lora, settings

DEEPSPEED = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


@contextlib.contextmanager
def gathered(model):
    if not DEEPSPEED:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([p for p in model.parameters() if hasattr(p, "ds_id")]):
        yield


def snapshot(model) -> dict[str, torch.Tensor]:
    with gathered(model):
        return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def run(folder, out, rows, peft=True, evaluate=0, **overrides):
    # a second engine in the process would otherwise find the first one's plugin
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    trainer = RobustDPOTrainer(
        folder,
        args=RobustDPOConfig(**settings(out / "run", **overrides)),
        train_dataset=make_pairs(rows),
        # a seed without a pair of equal sides: rounding would decide which of them is the likelier
        eval_dataset=make_pairs(evaluate, seed=10) if evaluate else None,
        peft_config=lora() if peft else None,
    )
    before = snapshot(trainer.model)
    trainer.train()
    after = snapshot(trainer.model)
    return {name: (after[name] - before[name]).contiguous() for name in before}, trainer


def engine_facts(trainer) -> dict:
    facts = {
        "world_size": trainer.accelerator.num_processes,
        "distributed_type": str(trainer.accelerator.distributed_type),
        "wrapper": type(trainer.model_wrapped).__name__,
    }
    if DEEPSPEED:
        frozen = [p for p in trainer.model.parameters() if hasattr(p, "ds_tensor")]
        facts["zero_stage"] = trainer.model_wrapped.zero_optimization_stage()
        facts["partitioned"] = len(frozen)
        facts["parameters"] = len(list(trainer.model.parameters()))
        facts["largest_share"] = max((p.ds_tensor.numel() / p.ds_numel for p in frozen), default=1.0)
    return facts


def logits(trainer) -> torch.Tensor:
    model = trainer.model_wrapped
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(10, 42).view(2, 16)).logits.float().cpu()


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main(folder: str, out: Path) -> None:
    # one rank would draw for longer than both of them train
    report.plot_curves = lambda *args: None
    # what is imported by now need not be gone over at the end of each run
    gc.freeze()
    results, changes = {"history": {}}, {}
    cases = EQUAL | LOCAL | ({} if DEEPSPEED else RESCALE)
    for name, case in cases.items():
        change, trainer = run(folder, out / name, **case)
        changes |= {f"{name}|{key}": value.cpu() for key, value in change.items()}
        results["history"][name] = [entry for entry in trainer.state.log_history if "loss" in entry]
        if "engine" not in results:
            results["engine"] = engine_facts(trainer)
            # while ZeRO-3 is configured: all ranks ask for a model that is not built yet
            results["embedded"] = sorted(os.listdir(resolve_model("embedded:tiny")))
        del trainer
        gc.collect()
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    for name, case in (ROLLOUTS | {"generated": dict(preset="hpt", num_generations=4, made_up=False)}).items():
        AcceleratorState._reset_state(reset_partial_state=False)
        GradientState._reset_state()
        # use_cpu would have accelerate look past DeepSpeed
        change, trainer = rollouts.train(folder, out / name, snapshot=snapshot, use_cpu=None, **ROLLOUT_SPLIT, **case)
        changes |= {f"{name}|{key}": value.contiguous().cpu() for key, value in change.items()}
        results["history"][name] = rollouts.entries(trainer)
        results[f"{name}_advantages"] = list(trainer._logs["advantages"])[-32:]
        del trainer
        gc.collect()
    for name, case in SCORED.items():
        AcceleratorState._reset_state(reset_partial_state=False)
        GradientState._reset_state()
        rows = scored.make_scored(case["rows"], prompts=10)
        arguments = {key: value for key, value in case.items() if key != "rows"}
        change, trainer = scored.train(folder, out / name, rows, snapshot=snapshot, **arguments)
        changes |= {f"{name}|{key}": value.contiguous().cpu() for key, value in change.items()}
        results["history"][name] = scored.entries(trainer)
        results[f"{name}_advantages"] = trainer.train_dataset["advantage"][:]
        del trainer
        gc.collect()
    for kind, peft in (("lora", True), ("full", False)):
        target = out / kind
        _, trainer = run(
            folder,
            target,
            rows=16,
            peft=peft,
            evaluate=11,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=3,
            save_strategy="steps",
            save_steps=2,
            **DR_DPO,
        )
        seen = []
        trainer.compute_metrics = lambda prediction, seen=seen: seen.append(prediction.label_ids) or {}
        results[f"{kind}_eval"] = trainer.evaluate()
        held_out, blank = trainer.eval_dataset, (-100, trainer.processing_class.pad_token_id)
        results[f"{kind}_rows"] = [[int(id) for id in row if id not in blank] for row in seen[0]]
        results[f"{kind}_answers"] = [
            [id for id in row["prompt_ids"] + row[side] if id not in blank]
            for side in ("chosen_ids", "rejected_ids")
            for row in held_out
        ]
        trainer.save_model(str(target / "saved"))
        changes[f"logits|{kind}"] = logits(trainer)
        results[f"{kind}_checkpoint_bytes"] = folder_bytes(target / "run" / "checkpoint-2")
        del trainer
        gc.collect()
    if int(os.environ["RANK"]) == 0:
        save_file(changes, out / "changes.safetensors")
        (out / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
