"""Preference pairs that are made up. This and what `tests.families` stands on imports no pytest, for `scripts/gpu`."""

import random

WORDS = "amber birch cedar delta ember fjord grove heath inlet jetty knoll larch".split()


def make_pairs(n: int, seed: int = 0, **columns):
    """`n` conversational preference pairs of uneven lengths, the same on every machine."""
    from datasets import Dataset

    rng = random.Random(seed)

    def text(low, high):
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))

    rows = [
        {
            "prompt": [{"role": "user", "content": text(1, 4)}],
            "chosen": [{"role": "assistant", "content": text(1, 6)}],
            "rejected": [{"role": "assistant", "content": text(1, 6)}],
        }
        for _ in range(n)
    ]
    dataset = Dataset.from_list(rows)
    for name, values in columns.items():
        dataset = dataset.add_column(name, list(values))
    return dataset
