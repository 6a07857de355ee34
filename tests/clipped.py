"""Private runs without noise, worked out by hand; and runs with noise that is the same each time."""

import random

import torch

from posttrain.run import private
from tests import runs
from tests.runs import trainable


def by_hand(trainer, steps, loss_of, clip_norm: float, expected: int, rate: float):
    """The change of plain SGD on clipped gradients of units, whose rows are forwarded alone.

    `steps`: of each its units, a row or a tuple of rows of `trainer.train_dataset`. `loss_of(model, row)`: a row's.
    """
    model, data = trainer.model, trainer.train_dataset
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = trainable(model)
    for units in steps:
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        for unit in units:
            loss = sum(loss_of(model, data[row]) for row in (unit if isinstance(unit, tuple) else (unit,)))
            found = torch.autograd.grad(loss, list(parameters.values()))
            norm = torch.stack([part.square().sum() for part in found]).sum().sqrt()
            for name, part in zip(parameters, found, strict=True):
                total[name] += part * min(1.0, clip_norm / norm.item())
        with torch.no_grad():
            for name, p in parameters.items():
                p -= rate * total[name] / expected
    after = trainable(model)
    return {name: after[name] - before[name] for name in before}


def forwards_without_empty_micro_batches(build, forward: str, monkeypatch):
    """Run without micro-batches that have no rows, and then with them: noise and all, the same bits and figures.

    `build(folder)` makes the trainer; `forward`: its method that runs the model. Returns of both runs the number of
    forwards with gradient and without, and the last trainer.
    """
    changes, logs, counts = [], [], []
    for all_run in (False, True):
        monkeypatch.setattr(private, "ranks_forward_together", lambda trainer, all_run=all_run: all_run)
        trainer = build(str(all_run))
        trainer._private.step._source = random.Random(5).randbytes
        run, seen = getattr(trainer, forward), []

        def counted(*args, run=run, seen=seen, **given):
            seen.append(torch.is_grad_enabled())
            return run(*args, **given)

        monkeypatch.setattr(trainer, forward, counted)
        changes.append(runs.fit(trainer)[0])
        logs.append(runs.without_times(trainer.state.log_history))
        counts.append((seen.count(True), seen.count(False)))
    assert runs.identical(*changes) and logs[0] == logs[1]
    return counts, trainer
