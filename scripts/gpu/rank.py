"""A rank of case 9: trains the cases of an engine one after another, and writes a line for each.

python -m gpu.rank OUT ENGINE '{"toy": true, "cases": ["robust_dpo/dr_dpo"]}'
"""

import gc
import json
import os
import sys
import traceback
from pathlib import Path

import harness  # noqa: F401  puts the checkout on the path

STEPS, _MICRO_BATCHES = 3, 2


def main(out: str, engine: str, given: str) -> None:
    import torch
    from accelerate.state import AcceleratorState, GradientState

    from gpu.families import losses, methods, quiet, tiny_folder

    given, out = json.loads(given), Path(out)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    settings = dict(use_cpu=given["toy"], bf16=True, gradient_checkpointing=True, report_to="none")
    if engine == "fsdp2" and given["toy"]:
        from tests.distributed import sharding

        settings |= sharding.on_cpus() | dict(bf16=True)
    quiet()
    own = out / f"{engine}-{world}-{rank}"
    own.mkdir()
    folder = tiny_folder(str(own))
    for key in given["cases"]:
        name, case = key.split("/")
        method = methods()[name]
        AcceleratorState._reset_state(reset_partial_state=False)
        GradientState._reset_state()
        split = dict(per_device_train_batch_size=method.step // (_MICRO_BATCHES * world))
        split |= dict(gradient_accumulation_steps=_MICRO_BATCHES, max_steps=STEPS, learning_rate=1e-3)
        chosen = dict((method.cases | method.ranks)[case]) | split | settings
        trainer = method.build(folder, out / f"{engine}-{world}" / key, **chosen)
        dtypes = _watch(trainer)
        trainer.train()
        found = {"case": key, "dtypes": sorted(dtypes), "wrapper": type(trainer.model_wrapped).__name__}
        found["losses"] = losses(trainer)
        found |= _collectives(trainer)
        if torch.distributed.is_initialized():
            found["backend"] = torch.distributed.get_backend()
        with (own / "found.jsonl").open("a") as file:
            file.write(json.dumps(found) + "\n")
        del trainer
        gc.collect()


def _watch(trainer) -> set[str]:
    """Collect the dtypes of the log-probabilities that the model, wrapped by its engine, returns."""
    from transformers import TrainerCallback

    seen = set()

    def look(module, args, output):
        values = getattr(output, "log_probs", None)
        if values is not None:
            seen.add(str(values.dtype).removeprefix("torch."))

    class Hooked(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                # after the engine's own hooks, one of which changes the output
                trainer.model_wrapped.register_forward_hook(look)

    trainer.add_callback(Hooked())
    return seen


def _collectives(trainer) -> dict:
    import torch
    from accelerate.utils import gather_object

    from posttrain.mechanisms.sequence_cache import weights_digest
    from posttrain.mechanisms.window import gather_rows

    accelerator = trainer.accelerator
    rank = accelerator.process_index
    values = torch.full((rank + 1,), float(rank), device=accelerator.device)
    rows, own = gather_rows(accelerator, values, torch.ones_like(values, dtype=torch.bool))
    return {
        "digest": len(weights_digest(trainer.model)) > 0,
        "ranks": gather_object([rank]),
        "rows": rows.tolist(),
        "own rows": rows[own].tolist(),
    }


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
        status = 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    # a group of processes, one of which has failed, would wait for it at the end
    os._exit(status)
