"""Random models made on the device, and batches of pairs of the lengths of real ones."""

import random
from pathlib import Path

_TINY = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, head_dim=16, num_attention_heads=4)


def config_of(name: str, vocab_size: int = 151936, **changes):
    """Return a model's config: `tiny`, or a name of `bench.pairs.SHAPES`."""
    from bench.pairs import SHAPES
    from transformers import AutoConfig

    shape = dict(_TINY if name == "tiny" else SHAPES[name])
    fixed = dict(bos_token_id=256, eos_token_id=257, pad_token_id=257, num_key_value_heads=2)
    fixed |= dict(vocab_size=vocab_size, max_position_embeddings=16384, tie_word_embeddings=True)
    return AutoConfig.for_model("llama", **fixed | shape | changes)


def random_model(record, name: str, dtype, attention: str = "sdpa", **changes):
    """Make a model with random weights on the record's device; `tiny` with a small vocabulary at toy sizes."""
    import torch
    from transformers import AutoModelForCausalLM

    config = config_of("tiny", 259, **changes) if record.toy else config_of(name, **changes)
    torch.manual_seed(0)
    with torch.device(record.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return model


def fused(model):
    """Give a model TRL's fused head and the packed forward, as the trainers do; return it."""
    from trl.trainer.utils import add_fused_lm_head

    from posttrain.mechanisms.prefix_sharing import share_prefixes

    add_fused_lm_head(model)
    share_prefixes(model)
    return model


def saved_model(record, name: str, folder: Path) -> str:
    """Write a random model in bf16, and the byte tokenizer, as a user's model folder."""
    import torch

    from posttrain.models import byte_tokenizer

    random_model(record, name, torch.float32 if record.toy else torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def sizes(count: int, seed: int, most: int | None = None) -> list[tuple[int, int, int]]:
    """Draw tokens of prompt and answers of pairs as HH-RLHF has them; `most`: of each, cut to it."""
    from bench.pairs import MAX_LENGTH, draw_sizes

    rng, found = random.Random(seed), []
    while len(found) < count:
        drawn = draw_sizes(rng)
        if most is not None:
            drawn = tuple(min(size, most) for size in drawn)
        if drawn[0] + max(drawn[1:]) <= MAX_LENGTH:
            found.append(drawn)
    return found


def padded(drawn, vocab_size: int, device, seed: int = 0) -> tuple[dict, list[int]]:
    """Return random pairs of these sizes as a padded batch, and the group of each row: chosen rows, then rejected."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    rows = []
    for prompt, *answers in drawn:
        shared = torch.randint(vocab_size, (prompt,), generator=generator)
        rows.append([(shared, torch.randint(vocab_size, (size,), generator=generator)) for size in answers])
    ordered = [pair[side] for side in (0, 1) for pair in rows]
    width = max(len(prompt) + len(answer) for prompt, answer in ordered)
    ids, mask = torch.zeros(len(ordered), width, dtype=torch.long), torch.zeros(len(ordered), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(ordered):
        end = len(prompt) + len(answer)
        ids[row, :end], mask[row, :end] = torch.cat([prompt, answer]), 1
        labels[row, len(prompt) : end] = answer
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: value.to(device) for name, value in batch.items()}, [*range(len(rows))] * 2


def packed_mask(rows: int, width: int, device, seed: int = 0):
    """Return a `PackedBatch` of R rows of W tokens in blocks of a prompt and two answers, padding behind them.

    It has what a mask is made of, and no tokens.
    """
    import torch

    from posttrain.mechanisms.prefix_sharing import PackedBatch

    rng = random.Random(seed)
    blocks, branches = torch.full((rows, width), -1), torch.zeros(rows, width, dtype=torch.long)
    for row in range(rows):
        at, block, end = 0, 0, width - rng.randint(0, max(width // 16, 1))
        while end - at >= 6:
            longest = min(end - at, max(width // 2, 6))
            prompt = rng.randint(2, longest // 2)
            for branch, size in enumerate((prompt, (longest - prompt) // 2, (longest - prompt) // 2)):
                blocks[row, at : at + size], branches[row, at : at + size] = block, branch
                at += size
            block += 1
    none = torch.zeros(0, dtype=torch.long, device=device)
    parts = {name: none for name in ("position_ids", "sources", "labels", "targets")}
    where = dict(blocks=blocks.to(device), branches=branches.to(device), input_ids=torch.zeros_like(blocks).to(device))
    return PackedBatch(**parts, **where, shape=(1, 1), tokens=0, unshared=0, longest=width)


def synchronize(device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(device, call, repeats: int = 1) -> list[float]:
    """Return the milliseconds of each of some calls, until the device is through."""
    import time

    found = []
    for _ in range(repeats):
        synchronize(device)
        begun = time.perf_counter()
        call()
        synchronize(device)
        found.append(1e3 * (time.perf_counter() - begun))
    return found


def free(device) -> None:
    """Give back what the device's allocator keeps, and begin to measure its peak anew."""
    import gc

    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def cosine(one, other) -> float:
    """Return the cosine of two tensors, or of two lists of tensors."""
    one, other = (list(side) if isinstance(side, list | tuple) else [side] for side in (one, other))
    dot = sum((a.double() * b.double()).sum() for a, b in zip(one, other, strict=True))
    norms = [sum(a.double().square().sum() for a in side).sqrt() for side in (one, other)]
    return (dot / (norms[0] * norms[1])).item()


def departure(one, other) -> float:
    """Return ||one - other|| / ||other||."""
    return ((one.double() - other.double()).norm() / other.double().norm()).item()
