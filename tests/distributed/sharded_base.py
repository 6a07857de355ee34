"""A private run whose base was sharded over the ranks as it was loaded; each rank calls `main`."""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

from posttrain import DPSFTConfig, DPSFTTrainer
from posttrain.run import report
from tests import runs, scored
from tests.distributed.private import DRAWN, counted_forwards, in_double
from tests.families import NOISELESS


def main(folder: str, out: str) -> None:
    report.plot_curves = lambda *args: None
    report.git_commit = lambda: None
    torch.distributed.init_process_group("gloo")
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, distributed_config=DistributedConfig(fsdp_size=2)
    )
    fields = scored.settings(f"{out}/run", learning_rate=0.5, per_device_train_batch_size=2, **NOISELESS)
    for name in ("prefix_sharing", "gradient_accumulation_steps"):
        del fields[name]
    with in_double(folder):
        trainer = DPSFTTrainer(
            model,
            DPSFTConfig(**fields, ddp_backend="gloo"),
            train_dataset=scored.make_scored(8).remove_columns("reward"),
            processing_class=AutoTokenizer.from_pretrained(folder),
            peft_config=runs.lora(),
        )
    trainer._private.draws = lambda step: DRAWN[0]
    seen = counted_forwards(trainer)
    change, _ = runs.fit(trainer)
    rank = int(os.environ["RANK"])
    save_file(change, f"{out}/change-{rank}.safetensors")
    (Path(out) / f"forwards-{rank}.json").write_text(json.dumps(len(seen)))
    if rank == 0:
        parameters = dict(trainer.model.named_parameters())
        spread = [name for name, value in parameters.items() if isinstance(value, DTensor)]
        facts = dict(
            spread=len(spread), adapters=sum("lora_" in name for name in spread), ranks=trainer.args.world_size
        )
        (Path(out) / "facts.json").write_text(json.dumps(facts))
