"""Scored answers, and short SGD runs on them whose changes of the parameters can be compared."""

import random

from datasets import Dataset, concatenate_datasets

from posttrain import ALoLConfig, ALoLTrainer
from tests.made_up import WORDS
from tests.runs import SETTINGS, entries, fit, lora, trainable  # noqa: F401


def make_scored(n: int, seed: int = 0, prompts: int | None = None, length: int | None = None, **columns) -> Dataset:
    """`n` conversational answers of uneven lengths with rewards in [0, 1], the same on every machine.

    `prompts`: how many different ones; all by default. `length`: bytes of every answer, its end not counted.
    """
    rng = random.Random(seed)

    def text(low, high):
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))

    asked = [text(1, 4) + f" {i}" for i in range(prompts or n)]
    rows = [
        {
            "prompt": [{"role": "user", "content": asked[i % len(asked)]}],
            "completion": [{"role": "assistant", "content": text(4, 6)[:length] if length else text(1, 6)}],
            "reward": round(rng.random(), 3),
        }
        for i in range(n)
    ]
    dataset = Dataset.from_list(rows)
    for name, values in columns.items():
        dataset = dataset.add_column(name, list(values))
    return dataset


def beyond(n: int, reward: float, rows: Dataset) -> Dataset:
    """Put `n` rows whose prompt has 319 tokens before others."""
    row = {"prompt": [{"role": "user", "content": "cat " * 75}], "completion": [{"role": "assistant", "content": "a"}]}
    return concatenate_datasets([Dataset.from_list([row | {"reward": reward}] * n), rows])


def settings(output_dir, **overrides) -> dict:
    base = dict(
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        learning_rate=0.01,
        max_length=256,
        prefix_sharing="never",
    )
    return SETTINGS | dict(output_dir=str(output_dir)) | base | overrides


def build(folder, output_dir, rows=None, peft=True, trainer_class=ALoLTrainer, config_class=ALoLConfig, **overrides):
    names = ("eval_dataset", "reward_func", "processing_class", "quantization_config")
    given = {name: overrides.pop(name) for name in names if name in overrides}
    fields = settings(output_dir, **overrides)
    if config_class is not ALoLConfig:
        del fields["prefix_sharing"]
    return trainer_class(
        model=folder,
        args=config_class(**fields),
        train_dataset=rows if rows is not None else make_scored(16),
        peft_config=lora() if peft else None,
        **given,
    )


def train(folder, output_dir, rows=None, resume=None, snapshot=trainable, **overrides):
    return fit(build(folder, output_dir, rows, **overrides), snapshot, resume)
