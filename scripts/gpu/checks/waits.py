"""Case 8: how often the host waits for the device between the parts of a step, by the line that waits."""

import collections
import contextlib
import sys
import tempfile
import warnings
from pathlib import Path

from gpu.families import methods, precision, quiet, tiny_folder
from gpu.record import OF_RUNS, Case

_A_MICRO_BATCH = 3
# whose lines are looked for, from the innermost frame outwards
_PACKAGES = ("posttrain", "trl", "peft", "accelerate", "transformers")
# the third step, which no first look at gradients or start has a part in; rollouts of two iterations have them by then
_STEP, _MICRO_BATCHES = 4, 2


def run(record) -> None:
    quiet()
    if record.toy:
        record.leave_out("torch's own count of waits", "no CUDA device; calls that read a tensor are counted instead")
        record.leave_out("the pass mark", "a read of a tensor that the host has made is no wait")
    with tempfile.TemporaryDirectory() as place:
        folder = tiny_folder(place)
        for name, method in [*methods().items()][: record.pick(None, 3) : record.pick(1, 2)]:
            first, *_ = method.cases
            settings = dict(method.cases[first]) | method.split(method.step // _MICRO_BATCHES) | precision(record)
            if "num_iterations" in {field for field in method.config.__dataclass_fields__}:
                # the step that is looked at generates nothing
                settings["num_iterations"] = 2
            settings |= dict(max_steps=_STEP, logging_steps=_STEP + 1)
            try:
                trainer = method.build(folder, Path(place) / name, **settings)
                found = _waits(record, trainer)
            except Exception as error:
                if "CUDA error" in str(error):
                    raise
                record.failed(name, f"{type(error).__name__}: {str(error)[:300]}", "a run that ends well")
                continue
            record.figure(f"{name}, {first}: waits of a step", dict(found.most_common()))
            own = sum(count for place_, count in found.items() if not place_.startswith("trl/"))
            if not record.toy:
                what = f"{name}, {first}: waits a micro-batch, TRL's left out"
                record.at_most(what, own / _MICRO_BATCHES, _A_MICRO_BATCH)


def place_of_call(frame) -> str:
    """Return the innermost line of the packages that stand on torch, as `package/path:line`."""
    while frame is not None:
        path = frame.f_code.co_filename
        for name in _PACKAGES:
            _, found, rest = path.rpartition(f"/{name}/")
            if found and not rest.startswith(("tests/", "scripts/")):
                return f"{name}/{rest}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def _waits(record, trainer) -> collections.Counter:
    """Train; count the waits in the micro-batches of the last step."""
    found, watch = collections.Counter(), _by_name if record.toy else _by_torch
    run_micro_batch = trainer.training_step

    def training_step(*args, **kwargs):
        if trainer.state.global_step < _STEP - 1:
            return run_micro_batch(*args, **kwargs)
        with watch(found):
            return run_micro_batch(*args, **kwargs)

    trainer.training_step = training_step
    trainer.train()
    return found


@contextlib.contextmanager
def _by_torch(found):
    """Count what torch itself says of each wait."""
    import torch

    def shown(message, category, filename, lineno, file=None, line=None):
        if "synchroniz" in str(message):
            found[place_of_call(sys._getframe(1))] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = shown
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def _by_name(found):
    """Count the calls that would wait for a device if the tensors were on one."""
    import torch
    from torch import Tensor
    from torch.overrides import TorchFunctionMode

    reads = {
        Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.__bool__, Tensor.__int__, Tensor.__float__,
        Tensor.__index__, Tensor.nonzero, torch.nonzero, Tensor.masked_select, torch.masked_select, torch.unique,
        torch.equal, torch.bincount,
    }  # fmt: skip

    class Reads(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function in reads:
                found[place_of_call(sys._getframe(1))] += 1
            return function(*args, **kwargs or {})

    with Reads():
        yield


CASE = Case(
    number=8,
    name="waits",
    proves="the host waits for the device three times a micro-batch at most, where it is not TRL that waits",
    seconds=40,
    toy_seconds=120,
    run=run,
    imports=OF_RUNS,
)
