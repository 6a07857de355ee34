"""Gradients of micro-batches under ZeRO in bf16: what they are added up in; each rank calls `main`."""

import json
import os
from pathlib import Path

from transformers import training_args

from posttrain.run import report
from tests import training


def main(model: str, out: str) -> None:
    # transformers takes a CPU that it is not told of for a GPU without bf16
    training_args.is_torch_bf16_gpu_available = lambda: True
    report.plot_curves = lambda *args: None
    report.git_commit = lambda: None
    split = dict(per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=1)
    trainer = training.build(model, f"{out}/run", bf16=True, peft=False, **split)
    trainer.train()
    engine = trainer.model_wrapped
    facts = [str(kind) for kind in (*engine.get_data_types(), engine.optimizer.gradient_accumulation_dtype)]
    if int(os.environ["RANK"]) == 0:
        (Path(out) / "facts.json").write_text(json.dumps([engine.zero_optimization_stage(), *facts]))
