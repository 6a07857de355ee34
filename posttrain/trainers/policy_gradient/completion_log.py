"""The table of completions that `log_completions` writes: demonstrations stand in it, evaluation has a file of its own.

TRL keeps the last generation's rows in one place, for training and evaluation alike, and names the file by the step.
"""

import contextlib
import math
from collections import defaultdict, deque
from pathlib import Path

from accelerate.utils import gather_object
from trl.trainer import grpo_trainer

from posttrain.visible import visible


def show_demonstrations(trainer, batch: dict) -> None:
    """Show demonstrations in the table of completions, over the rollouts they replace; all ranks call it.

    A demonstration has no reward. The column `kind` tells the rows apart.
    """
    flags, masks = batch["demonstrations"].tolist(), batch["completion_mask"].bool()
    texts = gather_object(
        [
            trainer._kept_tokens.text(ids[mask].tolist()) if flag else None
            for ids, mask, flag in zip(batch["completion_ids"], masks, flags, strict=True)
        ]
    )
    logs = trainer._logs
    logs["extra"]["kind"].extend("rollout" if text is None else "demonstration" for text in texts)
    # from the end: the log holds a generation at most
    for back, text in enumerate(reversed(texts[-len(logs["completion"]) :]), 1):
        if text is None:
            continue
        in_turns = not isinstance(logs["completion"][-back], str)
        logs["completion"][-back] = [{"role": "assistant", "content": text}] if in_turns else text
        for rewards in logs["rewards"].values():
            rewards[-back] = math.nan


@contextlib.contextmanager
def of_evaluation(trainer, prefix: str):
    """Keep an evaluation's rows apart from training's, and write them to `completions_<step>_<prefix>.parquet`."""
    logs, trainer._logs = trainer._logs, empty_logs(trainer)
    step = trainer.state.global_step
    folder = Path(trainer.args.output_dir) / "completions"
    file, aside = folder / f"completions_{step:05d}.parquet", folder / f"completions_{step:05d}.training"
    writes = trainer.log_completions and trainer.accelerator.is_main_process
    moved = writes and file.is_file()
    if moved:
        file.replace(aside)
    try:
        yield
    finally:
        trainer._logs = logs
        if writes and file.is_file():
            file.replace(folder / f"completions_{step:05d}_{prefix}.parquet")
        if moved:
            aside.replace(file)


@contextlib.contextmanager
def printed_as_text():
    """Have TRL's table on the console show control characters of prompts and completions as text; its file has them."""
    inner = grpo_trainer.print_prompt_completions_sample

    def shown(prompts, completions, *args, **kwargs):
        if kwargs.get("extra"):
            kwargs["extra"] = _visible(kwargs["extra"])
        return inner(_visible(prompts), _visible(completions), *args, **kwargs)

    grpo_trainer.print_prompt_completions_sample = shown
    try:
        yield
    finally:
        grpo_trainer.print_prompt_completions_sample = inner


def _visible(value):
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, dict):
        return {name: _visible(item) for name, item in value.items()}
    return [_visible(item) for item in value] if isinstance(value, list | tuple | deque) else value


def empty_logs(trainer) -> dict:
    """Return the table of completions as it is before its first row."""
    return {name: _emptied(rows) for name, rows in trainer._logs.items()}


def _emptied(rows):
    return deque(maxlen=rows.maxlen) if isinstance(rows, deque) else defaultdict(rows.default_factory)
