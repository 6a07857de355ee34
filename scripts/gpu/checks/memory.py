"""Case 11: the peak of a step against what `posttrain plan` says of it."""

import dataclasses
import tempfile
from pathlib import Path

from gpu.families import quiet
from gpu.models import free, random_model
from gpu.record import OF_RUNS, Case

_MOST = 1.3
# on a CPU, what libraries take for themselves at their first use
_LIBRARIES_ON_CPU = 600 * 2**20


@dataclasses.dataclass(frozen=True)
class Shape:
    """A step: pairs of a prompt and two answers, by tokens."""

    model: str
    lora: bool
    pairs: int
    prompt: int
    answer: int


# configs/robust_dpo/single_gpu.yaml at 32 pairs of its greatest length; full fine-tuning of 1.5B
_SHAPES = (Shape("random-0.5b", True, 32, 512, 512), Shape("random-1.5b", False, 8, 256, 256))
_TOY = (Shape("random-0.5b", True, 2, 16, 16), Shape("random-0.5b", False, 2, 16, 16))


def expected(config, shape: Shape, rows: int, width: int, toy: bool) -> dict[str, dict[str, float]]:
    """Return the bytes of each part of a step in bf16 with checkpointing by phase, as `posttrain plan` has them.

    rows, width: of the packed batch.
    """
    from bench.arms import lora

    from posttrain.planning import memory
    from posttrain.planning.job import Job, Launch
    from posttrain.planning.shapes import shapes_of

    job = Job(
        shapes_of(config, lora() if shape.lora else None),
        "preference",
        rows=rows,
        length=width,
        # a frozen base is loaded in bf16, weights that train in fp32
        weight_bytes=2.0 if shape.lora else 4.0,
        optimizer="adamw_torch",
        reference="precomputed",
        own_reference=not shape.lora,
        scoring_rows=rows,
        on_cpu=toy,
    )
    return memory.phases(job, Launch(mixed=True))


def run(record) -> None:
    quiet()
    for shape in record.pick(_SHAPES, _TOY):
        with tempfile.TemporaryDirectory() as folder:
            _measure(record, shape, Path(folder))


def _measure(record, shape: Shape, folder: Path) -> None:
    import harness
    import torch

    free(record.device)
    before = harness.peak_memory() if record.toy else 0.0
    trainer = _trainer(record, shape, folder)
    forms, pack_rows = [], trainer._sharing.pack_rows

    def noting(*args, **kwargs):
        form = pack_rows(*args, **kwargs)
        forms.append(form.input_ids.shape)
        return form

    trainer._sharing.pack_rows = noting
    if not record.toy:
        # the pass before training, whose shapes are others, is over by then
        _reset_at_first_step(trainer)
    trainer.train()
    rows, width = max(forms, key=lambda form: form[0] * form[1])
    phases = expected(trainer.model.config, shape, rows, width, record.toy)
    # the peak is measured from the first step on, and is of tensors alone
    parts = {part: size for part, size in phases["training"].items() if part != "context and allocator"}
    measured = 2**20 * (harness.peak_memory() - before) if record.toy else torch.cuda.max_memory_allocated()
    of_libraries = _LIBRARIES_ON_CPU if record.toy else 0
    name = f"{shape.model}, {'LoRA' if shape.lora else 'full'}, {shape.pairs} pairs in {rows} rows of {width}"
    record.figure(f"{name}: planned, GiB", {part: size / 2**30 for part, size in parts.items()})
    record.figure(f"{name}: measured, GiB", measured / 2**30)
    allowed = (_MOST * sum(parts.values()) + of_libraries) / 2**30
    record.at_most(f"{name}: peak, GiB, beside {_MOST} times the plan", measured / 2**30, allowed)
    del trainer


def _trainer(record, shape: Shape, folder: Path):
    import torch
    from bench.arms import lora
    from datasets import Dataset

    from posttrain import RobustDPOConfig, RobustDPOTrainer
    from posttrain.models import byte_tokenizer

    text = {name: " " + letter * (size - 1) for name, letter, size in _sides(shape)}
    rows = Dataset.from_list([text | {"prompt": f"{i:4d}" + text["prompt"][4:]} for i in range(2 * shape.pairs)])
    config = RobustDPOConfig(
        str(folder), pair_loss="dpo", per_device_train_batch_size=shape.pairs, max_steps=2, optim="adamw_torch",
        max_length=shape.prompt + shape.answer, learning_rate=1e-5, use_cpu=record.toy, bf16=True,
        gradient_checkpointing=True, precompute_ref_log_probs=True, precompute_ref_batch_size=shape.pairs,
        save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    return RobustDPOTrainer(
        random_model(record, shape.model, torch.bfloat16 if shape.lora else torch.float32),
        args=config,
        train_dataset=rows,
        processing_class=byte_tokenizer(),
        peft_config=lora() if shape.lora else None,
    )


def _sides(shape: Shape):
    # the end of the answer is a token
    return ("prompt", "p", shape.prompt), ("chosen", "c", shape.answer - 1), ("rejected", "r", shape.answer - 1)


def _reset_at_first_step(trainer) -> None:
    import torch
    from transformers import TrainerCallback

    class Reset(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 0:
                torch.cuda.reset_peak_memory_stats()

    trainer.add_callback(Reset())


CASE = Case(
    number=11,
    name="memory",
    proves="the peak of a step is at most 1.3 times what posttrain plan says",
    seconds=40,
    toy_seconds=90,
    run=run,
    imports=OF_RUNS,
)
