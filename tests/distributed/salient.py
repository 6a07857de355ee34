"""Two ZeRO-3 processes that train a GIFT-SW adapter, with every parameter in parts, and go on from a checkpoint."""

import gc
import json
import os
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import save_file

from posttrain.adapters.gift_sw import layers_of
from posttrain.objectives import salience
from posttrain.run import report
from posttrain.run.weight_noise import SalientColumns
from tests.distributed.worker import gathered, in_parts, snapshot
from tests.families import METHODS

RUN = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=4)


def main(folder: str, out: str) -> None:
    report.plot_curves, report.git_commit = (lambda *args: None), (lambda: None)
    out, seen = Path(out), in_parts(SalientColumns)
    changes, columns = {}, {}
    runs = {
        "plain": {},
        "recomputed": dict(gradient_checkpointing=True),
        "saved": dict(save_strategy="steps", save_steps=2),
        "resumed": dict(resume=str(out / "saved" / "checkpoint-2")),
    }
    for name, more in runs.items():
        AcceleratorState._reset_state(reset_partial_state=False)
        GradientState._reset_state()
        if name == "resumed":
            # this calibration would choose others
            salience.largest = lambda scores, count: torch.arange(count)
        target = out / ("saved" if name == "resumed" else name)
        change, trainer = METHODS["gift_sw"].train(folder, target, snapshot=snapshot, **RUN, **more)
        with gathered(trainer.model):
            after = {key: value.detach().clone() for key, value in trainer.model.named_parameters() if "lora_" in key}
        changes |= {f"{name}|{key}": value.contiguous() for key, value in (change | after).items()}
        columns[name] = [variant.columns.tolist() for _, _, variant, _ in layers_of(trainer.model)]
        del trainer
        gc.collect()
    if int(os.environ["RANK"]) == 0:
        save_file(changes, out / "changes.safetensors")
        (out / "results.json").write_text(json.dumps({"columns": columns, "in_parts": seen}))
