"""Short SGD runs on preference pairs."""

from posttrain import RobustDPOConfig, RobustDPOTrainer
from tests.made_up import make_pairs
from tests.runs import SETTINGS, distance, fit, lora, losses, trainable  # noqa: F401


def settings(output_dir, private: bool = False, **overrides) -> dict:
    """Settings of a short run; `private`: without gradient_accumulation_steps, which follows from the draws."""
    # learning rate and beta are high on purpose: after one step the pairs' losses must really differ
    more = dict(per_device_train_batch_size=8, learning_rate=0.05, beta=1.0)
    more |= {} if private else dict(gradient_accumulation_steps=1)
    return SETTINGS | dict(output_dir=str(output_dir), max_length=256) | more | overrides


def build(
    folder,
    output_dir,
    trainer_class=RobustDPOTrainer,
    config_class=RobustDPOConfig,
    pairs=None,
    peft=True,
    collator=None,
    held_out=None,
    privacy=None,
    **overrides,
):
    return trainer_class(
        model=folder,
        args=config_class(**settings(output_dir, privacy is not None, **overrides)),
        train_dataset=pairs if pairs is not None else make_pairs(16),
        eval_dataset=held_out,
        peft_config=lora() if peft else None,
        data_collator=collator,
        **({} if privacy is None else dict(privacy=privacy)),
    )


def train(folder, output_dir, *given, snapshot=trainable, resume=None, **overrides):
    return fit(build(folder, output_dir, *given, **overrides), snapshot, resume)
