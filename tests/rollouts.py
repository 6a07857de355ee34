"""Short runs of the policy gradient trainers on rollouts that are made up, the same on any number of ranks."""

import random

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from posttrain import HPTConfig, HPTTrainer, PolicyGradientConfig, PolicyGradientTrainer, QAEConfig, QAETrainer
from tests.runs import SETTINGS, entries, fit, lora, trainable  # noqa: F401

SUCCESS, FAILURE = ord("A"), ord("b")


def prompts(successes, demonstrations=True) -> Dataset:
    """One prompt a number; it says how many of its rollouts succeed."""
    rows = [{"prompt": f"{number} of row {i}: " + "x" * (i % 5)} for i, number in enumerate(successes)]
    if demonstrations:
        for i, row in enumerate(rows):
            row["demonstration"] = "A" + "yz" * (1 + i % 3)
    return Dataset.from_list(rows)


def rollouts(texts, trainer) -> dict:
    """Completions of uneven lengths; the first rollouts of a group succeed."""
    size, tokenizer = trainer.num_generations, trainer.processing_class
    start = trainer.accelerator.process_index * len(texts)
    completions = []
    for i, text in enumerate(texts, start):
        rng = random.Random(f"{text}{i % size}")
        first = SUCCESS if i % size < int(text.split()[0]) else FAILURE
        completions.append([first, *(rng.randrange(97, 122) for _ in range(rng.randint(0, 7))), tokenizer.eos_token_id])
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}


def success(completion_ids, **columns) -> list[float]:
    return [float(ids[0] == SUCCESS) for ids in completion_ids]


def odd(completion_ids, **columns) -> list[float]:
    """A reward that about half of what a random model writes has."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def settings(output_dir, **overrides) -> dict:
    base = dict(
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        num_generations=4,
        max_completion_length=12,
        learning_rate=0.5,
        shuffle_dataset=False,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    return SETTINGS | dict(output_dir=str(output_dir)) | base | overrides


def build(
    folder,
    output_dir,
    trainer_class=PolicyGradientTrainer,
    config_class=PolicyGradientConfig,
    data=None,
    reward=success,
    peft=True,
    made_up=True,
    preset=None,
    **overrides,
):
    trainer_class, config_class = PRESETS.get(preset, (trainer_class, config_class))
    return trainer_class(
        folder,
        reward,
        config_class(**settings(output_dir, **overrides)),
        data if data is not None else prompts([1, 0, 4, 2, 0, 3, 0, 1]),
        peft_config=lora() if peft else None,
        rollout_func=rollouts if made_up else None,
    )


def train(folder, output_dir, *given, before=lambda trainer: None, snapshot=trainable, resume=None, **overrides):
    """(change of the trainable parameters, the trainer)."""
    trainer = build(folder, output_dir, *given, **overrides)
    before(trainer)
    return fit(trainer, snapshot, resume)


PRESETS = {"qae": (QAETrainer, QAEConfig), "hpt": (HPTTrainer, HPTConfig)}
PARENT = dict(trainer_class=GRPOTrainer, config_class=GRPOConfig)
