"""Runs cases of a backend in one group of processes, each of which calls `main`."""

import contextlib
import gc
import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from posttrain.models import resolve_model
from posttrain.run import report
from tests.conftest import make_pairs
from tests.distributed import sharding
from tests.families import METHODS
from tests.runs import entries
from tests.scored import make_scored

# a seed without a pair of equal sides: rounding would decide which of them is the likelier
HELD_OUT = dict(n=11, seed=10)
# runs that are saved and evaluated as well: one of an adapter, one of the whole model
SAVED = {"robust_dpo/dr_dpo": "lora", "robust_dpo/dr_dpo-full": "full"}
# a run that is evaluated: a rank has eight of eleven rows, the other three, and five that fill up
EVALUATED = "noisy_sft/noisefit"
ANSWERS = dict(per_device_eval_batch_size=8, eval_dataset=make_scored(11, seed=10).remove_columns("reward"))


def is_deepspeed() -> bool:
    return os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


@contextlib.contextmanager
def gathered(model):
    if not is_deepspeed():
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([p for p in model.parameters() if hasattr(p, "ds_id")]):
        yield


def whole(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def snapshot(model) -> dict[str, torch.Tensor]:
    with gathered(model):
        return {name: whole(p.detach()).clone() for name, p in model.named_parameters() if p.requires_grad}


def in_parts(holder: type) -> list:
    """Have DeepSpeed keep no parameter whole, however small; returns how many were so in each training step.

    `holder`: the class of what the adapter's scheme does in a run, which hears of each step.
    """
    import deepspeed

    seen, initialize, after_step = [], deepspeed.initialize, holder.after_step

    def of_parts(*args, **kwargs):
        for value in kwargs.values():
            if isinstance(value, dict) and value.get("zero_optimization", {}).get("stage") == 3:
                value["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return initialize(*args, **kwargs)

    def seeing(self):
        after_step(self)
        parameters = list(self._trainer.model.parameters())
        seen.append([sum(p.numel() == 0 for p in parameters), len(parameters)])

    deepspeed.initialize, holder.after_step = of_parts, seeing
    return seen


def engine_facts(trainer) -> dict:
    facts = {
        "world_size": trainer.accelerator.num_processes,
        "distributed_type": str(trainer.accelerator.distributed_type),
        "wrapper": type(trainer.model_wrapped).__name__,
    }
    if is_deepspeed():
        frozen = [p for p in trainer.model.parameters() if hasattr(p, "ds_tensor")]
        facts["zero_stage"] = trainer.model_wrapped.zero_optimization_stage()
        facts["partitioned"] = len(frozen)
        facts["parameters"] = len(list(trainer.model.parameters()))
        facts["largest_share"] = max((p.ds_tensor.numel() / p.ds_numel for p in frozen), default=1.0)
    if sharding.is_fsdp():
        parameters = list(trainer.model.parameters())
        spread = [p for p in parameters if isinstance(p, DTensor)]
        facts["version"] = trainer.accelerator.state.fsdp_plugin.fsdp_version
        facts["partitioned"], facts["parameters"] = len(spread), len(parameters)
        facts["largest_share"] = max((p.to_local().numel() / p.numel() for p in spread), default=1.0)
    return facts


def logits(trainer) -> torch.Tensor:
    model = trainer.model_wrapped
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(10, 42).view(2, 16)).logits.float().cpu()


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def saved(trainer, target: Path) -> dict:
    """What is found out of a run that has ended: its evaluation, what metrics are computed from, its sizes on disk."""
    seen, results = [], {}
    trainer.compute_metrics = lambda prediction: seen.append(prediction.label_ids) or {}
    results["eval"] = trainer.evaluate()
    held_out, blank = trainer.eval_dataset, (-100, trainer.processing_class.pad_token_id)
    results["rows"] = [[int(id) for id in row if id not in blank] for row in seen[0]]
    results["answers"] = [
        [id for id in row["prompt_ids"] + row[side] if id not in blank]
        for side in ("chosen_ids", "rejected_ids")
        for row in held_out
    ]
    trainer.save_model(str(target / "saved"))
    results["checkpoint_bytes"] = folder_bytes(target / "checkpoint-2")
    return results


def main(folder: str, out: str, chosen: str, embedded: str) -> None:
    out, results, changes = Path(out), {"history": {}, "outcome": {}}, {}
    # one rank would draw for longer than both of them train
    report.plot_curves = lambda *args: None
    report.git_commit = lambda: None
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    launch = sharding.on_cpus() if sharding.is_fsdp() else {}
    # what is imported by now need not be gone over at the end of each run
    gc.freeze()
    for key, case in json.loads(chosen).items():
        # methods may have cases of one name
        method, target = METHODS[key.split("/")[0]], out / key
        # a second engine in the process would otherwise find the first one's plugin
        AcceleratorState._reset_state(reset_partial_state=False)
        GradientState._reset_state()
        more = dict(save_strategy="steps", save_steps=2, per_device_eval_batch_size=3) if key in SAVED else {}
        if more:
            more["held_out"] = make_pairs(**HELD_OUT)
        if key == EVALUATED:
            more = ANSWERS
        change, trainer = method.train(folder, target, snapshot=snapshot, **method.launch | launch | case | more)
        changes |= {f"{key}|{part}": value.contiguous().cpu() for part, value in change.items()}
        results["history"][key] = entries(trainer)
        results["outcome"][key] = method.outcome(trainer)
        if "engine" not in results:
            results["engine"] = engine_facts(trainer)
            # while ZeRO-3 is configured: all ranks ask for a model that is not built yet
            results["embedded"] = embedded and sorted(os.listdir(resolve_model(embedded)))
        if key == EVALUATED:
            results["answers"] = trainer.evaluate()
        if key in SAVED:
            results[SAVED[key]] = saved(trainer, target)
            changes[f"logits|{SAVED[key]}"] = logits(trainer)
        del trainer
        gc.collect()
    if int(os.environ["RANK"]) == 0:
        save_file(changes, out / "changes.safetensors")
        (out / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
