"""What short runs of every method have in common: their settings, and how two of them are compared.

The rows, and the runs on them: `tests.training` has preference pairs, `tests.scored` scored answers, `tests.rollouts`
made-up rollouts; `tests.families` has one record a method.
"""

import torch
from peft import LoraConfig

# how a batch is laid out in rows, and how fast it runs
LAYOUT = ("tokens/", "prefix_sharing/")
SETTINGS = dict(
    lr_scheduler_type="constant",
    optim="sgd",
    max_grad_norm=0.0,
    max_steps=2,
    seed=3,
    logging_steps=1,
    save_strategy="no",
    disable_tqdm=True,
)
# what our trainers choose by themselves where there is no accelerator
PARENT = dict(use_cpu=True, bf16=False, gradient_checkpointing=False)


def lora(**settings) -> LoraConfig:
    # biases are not adapted, so every change is a LoRA matrix's; A starts random, B at zero
    return LoraConfig(**dict(r=4, target_modules="all-linear", lora_dropout=0.0) | settings)


def trainable(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def fit(trainer, snapshot=trainable, resume=None):
    """(change of the trainable parameters, the trainer)."""
    before = snapshot(trainer.model)
    trainer.train(resume_from_checkpoint=resume)
    after = snapshot(trainer.model)
    return {name: after[name] - before[name] for name in before}, trainer


def distance(change, reference) -> float:
    """||d - d_ref|| / ||d_ref||; infinite where nothing changed."""
    norm = sum(value.double().square().sum() for value in reference.values()).sqrt()
    gap = sum((change[name].double() - value.double()).square().sum() for name, value in reference.items()).sqrt()
    return (gap / norm).item() if norm > 0 else float("inf")


def identical(change, other) -> bool:
    return all(torch.equal(change[name], other[name]) for name in other) and any(v.any() for v in other.values())


def entries(trainer) -> list[dict]:
    """What was logged of each step."""
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in entries(trainer)]


def without_times(log: list[dict]) -> list[dict]:
    """A run's log without how fast it was and how rows were laid out."""
    return [
        {
            name: value
            for name, value in entry.items()
            if not name.startswith(LAYOUT) and not name.endswith(("_per_second", "_runtime", "_time"))
        }
        for entry in log
    ]


def same_metrics(ours: list[dict], theirs: list[dict], names=None, **tolerance) -> None:
    """The means of each step are the same, however its rows were laid out.

    `names`: how those to compare begin, of which both sides have the same; by default all of the other side's that are
    no matter of layout.
    """
    import pytest

    for own, other in zip(ours, theirs, strict=True):
        chosen = [name for name in other if name.startswith(tuple(names or ("",)))]
        assert chosen and (names is None or set(chosen) == {name for name in own if name.startswith(tuple(names))})
        for name in chosen:
            is_mean = "/" in name or name in ("loss", "num_tokens", "entropy", "mean_token_accuracy")
            if is_mean and not name.startswith(LAYOUT):
                assert own[name] == pytest.approx(other[name], **tolerance), name
