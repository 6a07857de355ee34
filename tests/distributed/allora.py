"""Two processes under ZeRO that train an ALLoRA adapter, go on from a checkpoint, and run every recipe with it."""

import gc
import json
import os
import runpy
import sys
from pathlib import Path

import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import save_file

from posttrain.paths import configs_dir, recipes_dir
from posttrain.run import report
from posttrain.run.row_scales import RowScales
from tests.distributed.worker import in_parts, snapshot
from tests.families import ADAPTED, METHODS
from tests.recipe.in_process import words

RUN = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4)
SETTINGS = {recipe: given for method in METHODS.values() for recipe, given in method.recipes.items()}


def runs(folder: str, out: Path) -> dict[str, torch.Tensor]:
    """The change of each run, by its name and the tensor's."""
    changes = {}
    kinds = {
        "plain": {},
        "recomputed": dict(gradient_checkpointing=True),
        "saved": dict(save_strategy="steps", save_steps=2),
        "resumed": dict(resume=str(out / "saved" / "checkpoint-2")),
    }
    for name, more in kinds.items():
        AcceleratorState._reset_state(reset_partial_state=False)
        GradientState._reset_state()
        target = out / ("saved" if name == "resumed" else name)
        change, trainer = METHODS["allora"].train(folder, target, snapshot=snapshot, **RUN, **more)
        after = snapshot(trainer.model)
        changes |= {f"{name}|{key}": value.contiguous() for key, value in change.items()}
        changes |= {f"{name}-after|{key}": value.contiguous() for key, value in after.items()}
        del trainer
        gc.collect()
    return changes


def recipe(name: str, out: Path) -> None:
    """The recipe's line in the README with `--adapter allora`, with the model and the rows replaced by tiny ones."""
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    given = SETTINGS[name] | dict(
        adapter="allora", model_name_or_path="embedded:tiny", output_dir=str(out / name), max_steps=2, save_steps=2,
        logging_steps=1, disable_tqdm="true", optim="sgd", learning_rate=0.1, warmup_steps=0,
    )  # fmt: skip
    sys.argv = [f"{name}.py", "--config", str(configs_dir() / name / "cpu.yaml"), *words(given)]
    runpy.run_path(str(recipes_dir() / f"{name}.py"))["main"]()
    gc.collect()


def main(folder: str, out: str) -> None:
    report.plot_curves, report.git_commit = (lambda *args: None), (lambda: None)
    # a script's last word, after which there are no other processes
    transformers.Trainer.end = lambda self: None
    out, seen = Path(out), in_parts(RowScales)
    changes, parts = runs(folder, out), {}
    parts["runs"], seen[:] = list(seen), []
    for name in ADAPTED:
        recipe(name, out)
        parts[name], seen[:] = list(seen), []
    if int(os.environ["RANK"]) == 0:
        save_file(changes, out / "changes.safetensors")
        (out / "results.json").write_text(json.dumps(parts))
