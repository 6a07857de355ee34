"""Trains one small model in a process of its own and prints what memory that took beside what a plan says of it.

The measure is the resident memory at its peak, less what the process had once everything was imported, a first
multiplication was done and the rows were there. The allocator hands back what is freed, so that the peak is that of
tensors and not of its caches.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain import NoisySFTConfig, NoisySFTTrainer, RobustDPOConfig, RobustDPOTrainer
from posttrain.models import byte_tokenizer
from posttrain.planning import memory
from posttrain.planning.job import Job, Launch
from posttrain.planning.shapes import shapes_of
from tests import runs

LENGTH, PROMPT = 384, 12
CONFIG = dict(
    vocab_size=16384, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=4, head_dim=64, max_position_embeddings=1024, tie_word_embeddings=False,
    bos_token_id=256, eos_token_id=257, pad_token_id=258,
)  # fmt: skip
# by name: the trainer, its rows of a micro-batch, its settings, the model's architecture
CASES = {
    "full": ("sft", 4, dict(gradient_accumulation_steps=1), "llama"),
    "full, accumulated, checkpointed": (
        "sft", 4, dict(gradient_accumulation_steps=2, gradient_checkpointing=True), "qwen3"),
    "lora": ("dpo", 2, dict(gradient_accumulation_steps=1), "llama"),
    "lora, dropout, checkpointed, eager": (
        "dpo", 2, dict(gradient_accumulation_steps=1, gradient_checkpointing=True, eager=True, dropout=0.1), "qwen3"),
    "full beside a reference": ("dpo", 2, dict(gradient_accumulation_steps=1), "llama"),
}  # fmt: skip


def resident(what: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def main(name: str) -> dict:
    kind, rows, settings, architecture = CASES[name]
    settings = dict(settings)
    eager, dropout = settings.pop("eager", False), settings.pop("dropout", 0.0)
    config = AutoConfig.for_model(architecture, **CONFIG)
    config._attn_implementation = "eager" if eager else "sdpa"
    lora = runs.lora(r=16, lora_dropout=dropout) if name.startswith("lora") else None
    tokenizer = byte_tokenizer(pad_token="<|pad|>")
    (torch.randn(64, 64, requires_grad=True) @ torch.randn(64, 64)).sum().backward()
    text = ["".join(chr(97 + (i * 7 + j * j) % 26) for j in range(2 * LENGTH)) for i in range(4 * rows)]
    common = runs.SETTINGS | runs.PARENT | dict(
        optim="adamw_torch_fused", max_grad_norm=1.0, max_length=LENGTH, report_to="none",
        per_device_train_batch_size=rows, max_steps=2,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        shapes = shapes_of(config, lora)
        args = common | settings | {"output_dir": folder}
        floor = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if kind == "sft":
            args = NoisySFTConfig(**args, noise_alpha=0)
            data = Dataset.from_dict({"prompt": ["What?"] * len(text), "completion": text})
            trainer = NoisySFTTrainer(
                model=model, args=args, train_dataset=data, processing_class=tokenizer, peft_config=lora
            )
        else:
            args = RobustDPOConfig(**args)
            pairs = {"prompt": ["What?"] * len(text), "chosen": text, "rejected": text[::-1]}
            reference = None
            if lora is None:
                reference = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            trainer = RobustDPOTrainer(
                model=model, ref_model=reference, args=args, train_dataset=Dataset.from_dict(pairs),
                processing_class=tokenizer, peft_config=lora,
            )  # fmt: skip
        del model
        trainer.train()
        measured = resident("VmHWM") - floor
    job = Job(
        shapes=shapes, family="instructions" if kind == "sft" else "preference",
        rows=rows * (2 if kind == "dpo" else 1), length=LENGTH, prompt=PROMPT,
        accumulation=args.gradient_accumulation_steps, optimizer=args.optim, checkpointing=args.gradient_checkpointing,
        attention="eager" if eager else None, dropout=bool(dropout),
        reference="live" if kind == "dpo" else "none", own_reference=kind == "dpo" and lora is None, on_cpu=True,
    )  # fmt: skip
    found = memory.phases(job, Launch(mixed=False))
    return {"measured": measured, "planned": memory.need(found), "parts": found}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
