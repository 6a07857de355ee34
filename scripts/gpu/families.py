"""The methods that the library has, by the one table that the contract tests read: `tests.families.METHODS`."""

import functools
import math
from collections.abc import Sequence
from pathlib import Path


def methods() -> dict:
    """Return the record of each method by its name; a new method's is there once its tests are."""
    from tests.families import METHODS

    return METHODS


def precision(record) -> dict:
    """Return the settings of a run here, over those that the tests' runs on CPUs have."""
    return dict(use_cpu=record.toy, bf16=True, gradient_checkpointing=True, report_to="none")


def quiet() -> None:
    """Leave out what a run does beside training: pictures and the look at the commit."""
    from posttrain.run import report

    report.plot_curves = lambda *args: None
    report.git_commit = lambda: None


@functools.cache
def tiny_folder(place: str) -> str:
    """Write a tiny llama and the byte tokenizer, once, and return the folder."""
    from posttrain.models import byte_tokenizer, tiny_model

    folder = Path(place) / "tiny"
    tiny_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def pair_trainer(record, folder: str, model: str | None = None, **settings):
    """Build a trainer on preference pairs, of a tiny model unless told."""
    quiet()
    model = model or tiny_folder(folder)
    return methods()["robust_dpo"].build(model, Path(folder) / "run", **precision(record) | settings)


def losses(trainer) -> list[float]:
    """Return what was logged as the loss of each step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def gap(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the largest difference of two runs' losses, in nats, or as a share of losses above one nat.

    It is no number where one run has more steps than the other, or none.
    """
    if len(ours) != len(theirs) or not ours:
        return math.nan
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in zip(ours, theirs, strict=True))
