"""Case 10: steps of preference training beside TRL's, once their shapes are known."""

import contextlib
import cProfile
import dataclasses
import importlib.util
import pstats
import statistics
import tempfile
import time
from pathlib import Path

from gpu.families import gap, losses, quiet
from gpu.models import free, random_model, synchronize
from gpu.record import OF_RUNS, Case

_WANTED, _LOSS = 1.5, 3e-2
_VISITS = 3
# the arm that is watched beside its time, and for how many steps
_WATCHED, _MORE = "shared", 4
# a block is not begun with less left
_LEAST = 12.0


@dataclasses.dataclass(frozen=True)
class Block:
    """Arms on the same pairs. `batches`: how many are gone through, three times each."""

    model: str
    pairs: int
    lora: bool = True
    attention: str = "sdpa"
    cudnn: bool = True
    batches: int = 8
    arms: tuple[str, ...] = ("trl", "trl_grouped", "shared", "shared_precomputed")

    @property
    def name(self) -> str:
        how = f"{'LoRA' if self.lora else 'full'}, {self.attention}{'' if self.cudnn else ' without cuDNN'}"
        return f"{self.model}, {how}, {self.pairs} pairs"


_TWO = ("trl", "shared")
# what tells most first, as the time may not do for all
_BLOCKS = (
    Block("random-0.5b", 32),
    Block("random-0.5b", 4, batches=12),
    Block("random-1.5b", 16, arms=_TWO, batches=6),
    Block("random-0.5b", 32, lora=False, arms=_TWO, batches=6),
    Block("random-0.5b", 32, cudnn=False, arms=_TWO, batches=6),
    Block("random-0.5b", 32, attention="flash_attention_2", arms=("trl",), batches=6),
    Block("random-0.5b", 32, attention="flex_attention", arms=("shared",), batches=6),
    Block("random-0.5b", 16, arms=_TWO),
    Block("random-0.5b", 4, lora=False, arms=_TWO, batches=12),
    Block("random-1.5b", 32, arms=_TWO, batches=4),
    Block("random-1.5b", 4, arms=_TWO, batches=12),
)
_TOY = (Block("random-0.5b", 2, batches=2), Block("random-0.5b", 2, lora=False, arms=_TWO, batches=1))


def run(record) -> None:
    quiet()
    for block in record.pick(_BLOCKS, _TOY):
        if record.left < _LEAST:
            record.leave_out(block.name, "no time left")
        elif block.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
            record.leave_out(block.name, "flash_attn is not installed")
        else:
            _measure(record, block)


def _measure(record, block: Block) -> None:
    import torch

    rows, found = _rows(block), {}
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(block.cudnn)
    try:
        with tempfile.TemporaryDirectory() as folder:
            for arm in block.arms:
                found[arm] = _arm(record, block, arm, rows[arm == "trl_grouped"], Path(folder))
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    for arm, (figures, _) in found.items():
        if "trl" in found:
            figures["times TRL's rate"] = figures["pairs a second"] / found["trl"][0]["pairs a second"]
        record.figure(f"{block.name}: {arm}", figures)
    if "trl" not in found or "shared" not in found:
        return
    (ours, own), (theirs, others) = found["shared"], found["trl"]
    shared = ours["tokens a pair"] / theirs["tokens a pair"]
    record.at_most(f"{block.name}: tokens of shared rows over TRL's", shared, 0.9)
    record.at_most(f"{block.name}: losses beside TRL's", gap(own, others), _LOSS)
    if block == _BLOCKS[0] or record.toy:
        record.at_least(f"{block.name}: rate of shared rows over TRL's", ours["times TRL's rate"], _WANTED, clock=True)


def _rows(block: Block) -> tuple:
    """Return the pairs in random batches, gone through three times, and the same in batches of similar length."""
    from bench.pairs import load_pairs
    from datasets import concatenate_datasets

    from posttrain.models import byte_tokenizer

    rows = load_pairs(None, "hh", block.pairs * block.batches, 0, byte_tokenizer())
    by_length = sorted(range(len(rows)), key=lambda i: -rows[i]["length"])
    kept = [rows.remove_columns("length"), rows.select(by_length).remove_columns("length")]
    return tuple(concatenate_datasets([one] * _VISITS + [one.select(range(block.pairs))] * _MORE) for one in kept)


def _arm(record, block: Block, arm: str, rows, folder: Path) -> tuple[dict, list[float]]:
    """Return the figures of an arm's last visit, and the losses of all its steps."""
    import torch

    free(record.device)
    steps = block.batches * _VISITS
    trainer = _trainer(record, block, arm, rows, folder, steps + (_MORE if arm == _WATCHED else 0))
    ends, tokens, host = [], [], cProfile.Profile()
    inner = trainer.model.get_base_model() if block.lora else trainer.model
    inner.base_model.register_forward_pre_hook(_counting(tokens), with_kwargs=True)
    watched = {}
    trainer.add_callback(_at_step_end(record, ends, tokens, steps, host, watched))
    trainer.train()
    seconds = [end - begin for begin, end in zip(ends, ends[1:], strict=False)][steps - block.batches - 1 : steps - 1]
    pairs = block.pairs * len(seconds)
    figures = {
        "pairs a second": pairs / sum(seconds),
        "median ms a step": 1e3 * statistics.median(seconds),
        "tokens a pair": sum(tokens[: watched.get("forwards")]) / (steps * block.pairs),
    }
    if not record.toy:
        figures["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    if arm == _WATCHED:
        figures |= watched["device"]
        figures["host ms a step, by function"] = _of_host(host, _MORE // 2)
    found = losses(trainer)[:steps]
    del trainer
    return figures, found


def _trainer(record, block: Block, arm: str, rows, folder: Path, steps: int):
    import torch
    from bench.arms import lora
    from transformers import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    from posttrain import RobustDPOConfig, RobustDPOTrainer
    from posttrain.models import byte_tokenizer

    common = dict(
        output_dir=str(folder / arm), per_device_train_batch_size=block.pairs, max_steps=steps, max_length=512,
        learning_rate=1e-5, lr_scheduler_type="constant", train_sampling_strategy="sequential", use_cpu=record.toy,
        bf16=True, gradient_checkpointing=True, save_strategy="no", logging_steps=1, report_to="none",
        disable_tqdm=True, seed=0, precompute_ref_log_probs=arm.endswith("precomputed"),
    )  # fmt: skip
    ours = arm.startswith("shared")
    config = RobustDPOConfig(**common, pair_loss="dpo") if ours else DPOConfig(**common)
    dtype = torch.bfloat16 if block.lora else torch.float32
    model = random_model(record, block.model, dtype, block.attention)
    live = not block.lora and not arm.endswith("precomputed")
    trainer = (RobustDPOTrainer if ours else DPOTrainer)(
        model,
        ref_model=random_model(record, block.model, dtype, block.attention) if live else None,
        args=config,
        train_dataset=rows,
        processing_class=byte_tokenizer(),
        peft_config=lora() if block.lora else None,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _counting(tokens: list[int]):
    """Return a hook that notes the tokens of each forward that is backpropagated."""
    import torch

    def count(module, args, kwargs):
        if torch.is_grad_enabled():
            tokens.append((kwargs["input_ids"] if "input_ids" in kwargs else args[0]).numel())

    return count


def _at_step_end(record, ends: list, tokens: list, steps: int, host: cProfile.Profile, watched: dict):
    """Return a callback that notes each step's end; of further steps it watches two on the device, two on the host."""
    from torch.profiler import ProfilerActivity, profile
    from transformers import TrainerCallback

    activities = [ProfilerActivity.CPU] + ([] if record.toy else [ProfilerActivity.CUDA])
    half, kept = _MORE // 2, contextlib.ExitStack()

    class AtStepEnd(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            synchronize(record.device)
            ends.append(time.perf_counter())
            if state.global_step == steps:
                watched["forwards"] = len(tokens)
            if state.max_steps == steps:
                return
            if state.global_step == steps:
                watched["profile"] = kept.enter_context(profile(activities=activities))
            elif state.global_step == steps + half:
                kept.close()
                watched["device"] = _of_device(record, watched.pop("profile"), ends[-1] - ends[-1 - half], half)
                host.enable()
            elif state.global_step == steps + _MORE:
                host.disable()

    return AtStepEnd()


def _of_device(record, profile, seconds: float, steps: int) -> dict:
    from torch.autograd import DeviceType

    if record.toy:
        record.leave_out("the share of time in which the device is busy", "no CUDA device at toy sizes")
        return {}
    kernels = [event for event in profile.events() if event.device_type == DeviceType.CUDA]
    busy = sum(event.time_range.elapsed_us() for event in kernels) / 1e6
    return {"device busy, share": busy / seconds, "kernels a step": len(kernels) / steps}


def _of_host(host: cProfile.Profile, steps: int, most: int = 20) -> dict[str, float]:
    """Return the milliseconds a step of this library's functions that take longest, those they call included."""
    found = {}
    for (path, line, name), (_, _, _, cumulative, _) in pstats.Stats(host).stats.items():
        _, within, rest = path.rpartition("/posttrain/")
        if within and not rest.startswith(("tests/", "scripts/")):
            found[f"{rest}:{line} {name}"] = 1e3 * cumulative / steps
    return dict(sorted(found.items(), key=lambda entry: -entry[1])[:most])


CASE = Case(
    number=10,
    name="speed",
    proves="a step on shared rows is faster than TRL's at 32 pairs, with TRL's losses",
    seconds=130,
    toy_seconds=120,
    run=run,
    imports=OF_RUNS,
)
