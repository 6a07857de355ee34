"""Private runs on two ranks, with noise and without; each rank calls `main` or `noiseless`."""

import json
import os
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from posttrain.mechanisms.own_head import Head
from posttrain.privacy.step import PrivateStep
from posttrain.run import private, report
from tests import runs
from tests.families import METHODS, NOISELESS
from tests.runs import entries, trainable

# a deviation of one, over 8 units, in two steps
NOISE = dict(
    target_epsilon=None, noise_multiplier=2.0, target_delta=1e-3, clip_norm=0.5, expected_batch_size=8, rows=8,
    save_strategy="steps",
)  # fmt: skip
# of private preference training: cases of its record, each of 8 pairs in every step
PAIRS = ("private", "private-people", "private-cached")
# units of two steps: the first rank has micro-batches with rows, the second fewer, and then none
DRAWN = [[0, 1, 2, 3, 4], [5]]


@contextmanager
def in_double(folder):
    """Gives what makes a model in float64: log-probabilities, gradients of rows and their sums are exact to 1e-15 then.

    TRL's fused head computes in fp32, so the model's own takes its place while the context lasts.
    """
    own = Head.choose
    Head.choose = lambda head, *given: setattr(head, "mode", "tiles")
    try:
        yield lambda: AutoModelForCausalLM.from_pretrained(folder).double()
    finally:
        Head.choose = own


def few(model, output_dir):
    """A run without noise of whose micro-batches some have no rows."""
    # so that an epoch has two steps
    fields = NOISELESS | dict(expected_batch_size=4, per_device_train_batch_size=2)
    trainer = METHODS["dp_sft"].build(model, output_dir, **fields)
    trainer._private.draws = lambda step: DRAWN[step]
    return trainer


def counted_forwards(trainer) -> list[int]:
    """The list that a number is added to for each forward of the model that is trained."""
    run, seen = trainer._forward, []
    trainer._forward = lambda *args: (seen.append(1), run(*args))[1]
    return seen


def _quiet() -> None:
    report.plot_curves = lambda *args: None
    report.git_commit = lambda: None


def main(model: str, out: str, name: str) -> None:
    """A run with noise of the method `name`, and its resumption from the first of two steps."""
    _quiet()
    rank, collectives, reduced = int(os.environ["RANK"]), [], torch.distributed.all_reduce
    finish = PrivateStep.finish

    def counted(self):
        # of a step: one sum over ranks, of all trained values
        torch.distributed.all_reduce = lambda *args, **kwargs: (collectives.append(1), reduced(*args, **kwargs))[1]
        try:
            return finish(self)
        finally:
            torch.distributed.all_reduce = reduced

    PrivateStep.finish = counted
    split = dict(per_device_train_batch_size=2, save_steps=1)
    trainer = METHODS[name].build(model, f"{out}/run", **NOISE, **split)
    before = trainable(trainer.model)
    trainer.train()
    change = {name: value - before[name] for name, value in trainable(trainer.model).items()}
    save_file(change, f"{out}/change-{rank}.safetensors")
    again = METHODS[name].build(model, f"{out}/run", **NOISE, **split)
    again.train(resume_from_checkpoint=f"{out}/run/checkpoint-1")
    told, sums = again.promise(), len(collectives)
    if rank == 0:
        spent = [entry["privacy/epsilon"] for entry in entries(again)]
        facts = dict(
            collectives=sums, wrapper=type(trainer.model_wrapped).__name__, thrown_away=told.thrown_away,
            micro_batches=trainer.args.gradient_accumulation_steps, steps=told.steps, spent=spent, epsilon=told.epsilon,
        )  # fmt: skip
        (Path(out) / "facts.json").write_text(json.dumps(facts))


def without_rows(model: str, out: str) -> None:
    """A run of whose micro-batches some have no rows, which are left out, and one where all are forwarded."""
    _quiet()
    rank, changes = int(os.environ["RANK"]), []
    for all_run in (False, True):
        if all_run:
            private.ranks_forward_together = lambda trainer: True
        with in_double(model) as double:
            made = few(double(), f"{out}/few-{all_run}")
        seen = counted_forwards(made)
        changes.append((runs.fit(made)[0], len(seen)))
    (left_out, forwards), (all_of_them, most) = changes
    assert runs.identical(left_out, all_of_them) and most == 4
    save_file(left_out, f"{out}/few-{rank}.safetensors")
    (Path(out) / f"forwards-{rank}.json").write_text(json.dumps(forwards))


def noiseless(model: str, out: str) -> None:
    """What private preference training changes without noise, each case in two micro-batches of 2 pairs a rank."""
    _quiet()
    method, changes = METHODS["robust_dpo"], {}
    for case in PAIRS:
        given = method.ranks[case] | dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)
        with in_double(model) as double:
            for precision, start in (("fp32", model), ("float64", double())):
                change, _ = method.train(start, f"{out}/{case}-{precision}", **given)
                changes |= {f"{case}|{precision}|{name}": value.contiguous() for name, value in change.items()}
    save_file(changes, f"{out}/changes-{os.environ['RANK']}.safetensors")
