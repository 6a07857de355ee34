"""Short SGD runs on tiny models whose changes of the parameters can be compared."""

import torch
from peft import LoraConfig

from posttrain import RobustDPOConfig, RobustDPOTrainer
from tests.conftest import make_pairs


def settings(output_dir, **overrides) -> dict:
    # learning rate and beta are high on purpose: after one step the pairs' losses must really differ
    base = dict(
        output_dir=str(output_dir),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        max_steps=2,
        beta=1.0,
        seed=3,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        max_length=256,
    )
    return base | overrides


def lora():
    # biases are not adapted, so every change is a LoRA matrix's; A starts random, B at zero
    return LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)


def train(
    folder,
    output_dir,
    trainer_class=RobustDPOTrainer,
    config_class=RobustDPOConfig,
    pairs=None,
    peft=True,
    collator=None,
    **overrides,
):
    trainer = trainer_class(
        model=folder,
        args=config_class(**settings(output_dir, **overrides)),
        train_dataset=pairs if pairs is not None else make_pairs(16),
        peft_config=lora() if peft else None,
        data_collator=collator,
    )
    before = trainable(trainer.model)
    trainer.train()
    after = trainable(trainer.model)
    return {name: after[name] - before[name] for name in before}, trainer


def trainable(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def distance(change, reference) -> float:
    """||d - d_ref|| / ||d_ref||; infinite where nothing changed."""
    norm = sum(value.double().square().sum() for value in reference.values()).sqrt()
    gap = sum((change[name].double() - value.double()).square().sum() for name, value in reference.items()).sqrt()
    return (gap / norm).item() if norm > 0 else float("inf")


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
