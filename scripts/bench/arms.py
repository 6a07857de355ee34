"""What the benchmarks of whole training steps share: settings of a trainer, its turns, its memory, its row."""

import json
import subprocess
import sys

import harness
from bench.sides import at_step_end


def settings(folder: str, arm: str, batch: int, steps: int) -> dict:
    """Settings of an arm, as TRL's configs name them: all rows in their order, nothing saved."""
    import torch

    cuda = torch.cuda.is_available()
    return dict(
        output_dir=f"{folder}/{arm}",
        per_device_train_batch_size=batch,
        max_steps=steps,
        max_length=512,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        use_cpu=not cuda,
        bf16=cuda,
        gradient_checkpointing=cuda,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )


def lora(**changes):
    from peft import LoraConfig

    fields = dict(r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    return LoraConfig(**fields | changes)


def side_of(trainer):
    """A side of `harness.alternate`: it trains, and takes its turn at the end of each step."""

    def side(turn):
        trainer.add_callback(at_step_end(turn))
        trainer.train()

    return side


def model_of(args) -> str:
    from posttrain.models import resolve_model

    return resolve_model("embedded:tiny" if args.quick else "embedded:smollm2-135m")


def memory_of(script: str, arm: str, args) -> float:
    """Peak resident MiB that `script --memory arm` prints, in a process of its own."""
    line = [sys.executable, script, "--memory", arm]
    line += ["--quick"] if args.quick else []
    line += ["--data", str(args.data)] if args.data else []
    done = subprocess.run(line, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the memory of {arm} could not be measured:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def three(values) -> list[float]:
    """Median and quartiles, rounded."""
    return [round(value, 4) for value in harness.spread(values)]
