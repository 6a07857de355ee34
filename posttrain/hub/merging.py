"""An adapter folded into its base model, for `posttrain merge` and `posttrain push --merged`."""

import shutil
from pathlib import Path
from typing import NamedTuple

from posttrain.hub.files import TOKENIZER, found
from posttrain.models import load_adapter, tokenizer_beside

_PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "To sort a list in Python,",
    "Once upon a time, in a small village",
)


class Agreement(NamedTuple):
    """How a merged model, as saved, compares with base and adapter: on how many tokens, and how far."""

    tokens: int
    largest_logit_difference: float
    top1_agreement: float


def merge_adapter(
    run: str | Path, folder: str | Path, base: str | None = None, dtype: str = "auto", *, compare: bool = False
) -> Agreement | None:
    """Write into `folder` the base model with the run's adapter merged into it.

    The run's tokenizer goes with it, or else the base's. With `compare`, the merged model is loaded again and its
    logits are compared with those of base and adapter.

    Args:
        run: folder of the adapter.
        folder: of the merged model, made if it is missing.
        base, dtype: as in `posttrain.models.load_adapter`, whose errors come through.
    """
    model = load_adapter(run, base, dtype, to_merge=True)
    tokenizer = tokenizer_beside(run, base)
    before = [_logits(model, tokenizer, prompt) for prompt in _PROMPTS] if compare else []
    merged = model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(folder)
    files = found(Path(run), TOKENIZER)
    for name, path in files.items():
        target = Path(folder) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    if not files:
        tokenizer.save_pretrained(folder)
    if not compare:
        return None
    del merged, model
    return _compared(before, folder, tokenizer, dtype)


def _compared(before: list, folder: str | Path, tokenizer, dtype: str) -> Agreement:
    from transformers import AutoModelForCausalLM

    reloaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    after = [_logits(reloaded, tokenizer, prompt) for prompt in _PROMPTS]
    tokens = sum(len(logits) for logits in before)
    largest = max((a - b).abs().max().item() for a, b in zip(after, before, strict=True))
    same = sum((a.argmax(-1) == b.argmax(-1)).sum().item() for a, b in zip(after, before, strict=True))
    return Agreement(tokens, largest, same / tokens)


def _logits(model, tokenizer, prompt: str):
    import torch

    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        return model(input_ids=ids).logits[0].float()
