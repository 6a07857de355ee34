"""The pairs that the speed benchmark trains on, and the models it knows by name."""

import random
import re
from pathlib import Path

from datasets import Dataset, load_dataset

# Tokens of HH-RLHF's prompts and answers with SmolLM2's tokenizer and chat template, at these quantiles
_LEVELS = (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
_ANSWERS = (3, 9, 12, 18, 24, 31, 41, 53, 68, 93, 128, 168, 250, 515)
_PROMPTS = {
    "hh": (31, 38, 40, 45, 69, 98, 128, 161, 195, 243, 329, 416, 670, 1591),
    "short": (31, 36, 37, 38, 39, 40, 40, 41, 43, 44, 47, 50, 59, 75),
}
# Longer pairs, 6% of HH-RLHF, are left out: nothing is truncated, and on CPU the padded side fits into 16 GB
MAX_LENGTH = 512
_WORDS = "the house is old and a dog may sleep in front of it all day while people walk by on their way to work".split()

SHAPES = {
    "random-tiny": dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, head_dim=32, vocab_size=8192),
    "random-0.5b": dict(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, head_dim=64, num_attention_heads=14
    ),
    "random-1.5b": dict(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, head_dim=128, num_attention_heads=12
    ),
}


def load_model(name: str, attention: str, dtype):
    """A fresh model; the same weights at every call."""
    from transformers import AutoModelForCausalLM

    from posttrain.models import resolve_model, tiny_model

    if name in SHAPES:
        # a vocabulary of real size: the tokenizer uses 259 of it, the LM head computes all
        shape = dict(vocab_size=151936, tie_word_embeddings=True, max_position_embeddings=4096) | SHAPES[name]
        model = tiny_model(**shape).to(dtype)
        model.set_attn_implementation(attention)
        return model
    return AutoModelForCausalLM.from_pretrained(resolve_model(name), dtype=dtype, attn_implementation=attention)


def load_tokenizer(name: str):
    from transformers import AutoTokenizer

    from posttrain.models import byte_tokenizer, resolve_model

    return byte_tokenizer() if name in SHAPES else AutoTokenizer.from_pretrained(resolve_model(name))


def load_pairs(data: Path | None, lengths: str, count: int, seed: int, tokenizer) -> Dataset:
    """`count` pairs of HH-RLHF, or generated ones of the same lengths, in random order.

    `lengths: short` takes the pairs whose prompt is one message of one sentence. The column `length` is that of the
    longer side with the prompt, in tokens, `MAX_LENGTH` at most.
    """
    if data is None:
        return _generated(lengths, count, seed, tokenizer)
    rows = load_dataset("json", data_files=str(data / "hh_pairs_train.jsonl.gz"), split="train")
    rows = rows.select_columns(["prompt", "chosen", "rejected"])
    if lengths == "short":
        rows = rows.filter(_one_sentence)
    kept, order = [], list(range(len(rows)))
    random.Random(seed).shuffle(order)
    for i in order:
        sides = [rows[i]["prompt"] + rows[i][side] for side in ("chosen", "rejected")]
        longest = max(len(tokenizer.apply_chat_template(side)["input_ids"]) for side in sides)
        if longest <= MAX_LENGTH:
            kept.append(rows[i] | {"length": longest})
        if len(kept) == count:
            return Dataset.from_list(kept)
    raise SystemExit(f"{count} pairs are asked for, and there are {len(kept)} of lengths {lengths}; lower --rounds")


def _one_sentence(row: dict) -> bool:
    return len(row["prompt"]) == 1 and not re.search(r"[.!?]\s+\S", row["prompt"][0]["content"].strip())


def draw_sizes(rng: random.Random, lengths: str = "hh") -> tuple[int, int, int]:
    """Draw the tokens of a pair's prompt, chosen and rejected answer."""
    prompt, chosen = rng.random(), rng.random()
    # the answers' lengths correlate at 0.48
    rejected = chosen if rng.random() < 0.48 else rng.random()
    return _tokens(_PROMPTS[lengths], prompt), _tokens(_ANSWERS, chosen), _tokens(_ANSWERS, rejected)


def _tokens(quantiles: tuple[int, ...], u: float) -> int:
    place = max(i for i, level in enumerate(_LEVELS[:-1]) if level <= u)
    share = (u - _LEVELS[place]) / (_LEVELS[place + 1] - _LEVELS[place])
    return round(quantiles[place] + share * (quantiles[place + 1] - quantiles[place]))


def _generated(lengths: str, count: int, seed: int, tokenizer) -> Dataset:
    rng, rows = random.Random(f"{lengths} {seed}"), []

    def text(n):
        ids = tokenizer(" ".join(rng.choices(_WORDS, k=n)), add_special_tokens=False)["input_ids"]
        return tokenizer.decode(ids[:n])

    while len(rows) < count:
        sizes = draw_sizes(rng, lengths)
        if sizes[0] + max(sizes[1:]) > MAX_LENGTH:
            continue
        # a space in front of each part, so that no token runs across the seam
        row = {name: " " + text(n - 1) for name, n in zip(("prompt", "chosen", "rejected"), sizes, strict=True)}
        rows.append(row | {"length": sizes[0] + max(sizes[1:])})
    return Dataset.from_list(rows)


def grouped_by_length(pairs: Dataset, batch: int, batches: int, seed: int) -> Dataset:
    """`batches` batches out of an epoch that transformers' length-grouping sampler orders, evenly spaced in its first
    mega-batch, which runs from the longest rows to the shortest."""
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    order = get_length_grouped_indices(pairs["length"], batch, generator=torch.Generator().manual_seed(seed))
    mega = min(len(pairs) // (batch * 4), 50)
    picked = [int((k + 0.5) * mega / batches) for k in range(batches)]
    return pairs.select([i for k in picked for i in order[k * batch : (k + 1) * batch]])
