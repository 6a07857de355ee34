"""What a pass over the model leaves behind, and what it goes through: hooks, walks over all modules, waits."""

import collections
import contextlib
import sys

import pytest
import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import TrainerCallback

from posttrain.mechanisms.prefix_sharing import packing
from posttrain.mechanisms.switches import Switches
from tests import runs
from tests.contract.conftest import cases
from tests.families import METHODS, RDPO

_OF_MODULES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_OF_TENSORS = ("_backward_hooks", "_post_accumulate_grad_hooks")
RECOMPUTED = dict(gradient_checkpointing=True)
# rollouts that the model itself writes, beside the other passes without gradient
_GENERATED = dict(policy_gradient=dict(made_up=False))
LONG = dict(max_steps=50, logging_steps=50)


def hooks(model) -> int:
    """How many hooks are on modules and parameters."""
    parts = [(module, _OF_MODULES) for module in model.modules()]
    parts += [(parameter, _OF_TENSORS) for parameter in model.parameters()]
    return sum(len(getattr(part, name, None) or ()) for part, names in parts for name in names)


class Counted(TrainerCallback):
    """The hooks of the model behind each step."""

    def __init__(self):
        self.found = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.found[state.global_step] = hooks(model)


def _hooks_of_steps(trainer):
    counted = Counted()
    trainer.add_callback(counted)
    trainer.train()
    return counted.found


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_no_hook_is_left_behind_in_fifty_steps(method, tiny_folder, tmp_path):
    settings = RECOMPUTED | method.forwards | _GENERATED.get(method.name, {}) | LONG
    if "eval_steps" in settings:
        settings["eval_steps"] = 10
    found = _hooks_of_steps(method.build(tiny_folder, tmp_path, **settings))
    # those that watch the gradients of the first steps are taken off in the third
    assert len(found) == 50 and found[50] == found[4]


@pytest.mark.slow
def test_no_hook_is_left_behind_by_generation_in_an_evaluation(tiny_folder, tmp_path):
    settings = RECOMPUTED | dict(evaluated=True, eval_strategy="steps", eval_steps=1, max_steps=8)
    settings |= dict(accepted_tokens_length=2, accepted_tokens_rows=1, token_noise="msn", token_noise_length=3)
    found = _hooks_of_steps(METHODS["noisy_sft"].build(tiny_folder, tmp_path, **settings))
    assert found[8] == found[4] > 0


def test_no_hook_is_left_behind_by_a_reference_pass(tiny_folder, tmp_path):
    found = _hooks_of_steps(METHODS["robust_dpo"].build(tiny_folder, tmp_path, max_steps=5, **RECOMPUTED))
    assert found[5] == found[4] > 0


@pytest.mark.parametrize(
    "name", ["robust_dpo", *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name != "robust_dpo")]
)
def test_inputs_that_autocast_casts_train_to_the_same_bits(name, tiny_folder, tmp_path, monkeypatch):
    method, changes = METHODS[name], []
    for casts in (False, True):
        if casts:
            monkeypatch.setattr(Switches, "without_casts", lambda self: contextlib.nullcontext())
        settings = RECOMPUTED | dict(bf16=True, use_cpu=True, max_steps=2)
        changes.append(method.train(tiny_folder, tmp_path / str(casts), **settings)[0])
    assert runs.identical(*changes)


@pytest.mark.slow
def test_generation_which_is_not_under_autocast_still_casts(tiny_folder, tmp_path):
    settings = _GENERATED["policy_gradient"] | dict(bf16=True, use_cpu=True, max_steps=1)
    trainer = METHODS["policy_gradient"].build(tiny_folder, tmp_path, **settings)
    trainer.train()
    assert trainer.state.global_step == 1


# what reads a tensor's numbers, or has as many results as they say; and what makes a tensor of numbers of the host
_READS = {
    Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.numpy, Tensor.__bool__, Tensor.__int__, Tensor.__float__,
    Tensor.__index__, Tensor.__contains__, Tensor.nonzero, torch.nonzero, Tensor.masked_select, torch.masked_select,
    torch.unique, Tensor.unique, torch.equal, Tensor.equal, torch.allclose, torch.bincount, Tensor.bincount,
    torch.tensor, torch.from_numpy, Tensor.new_tensor,
}  # fmt: skip
# of numbers that the host has made itself
_ON_THE_HOST = ("posttrain/mechanisms/noise/weights.py", "posttrain/mechanisms/noise/tokens.py")
# the fused head of TRL, and what stands in its place, wait once a forward for the number of scored tokens
_ONCE = "posttrain/mechanisms/noise/head.py"


def _from_posttrain() -> str | None:
    """The place in this library that the call comes from; None where another library stands between."""
    frame = sys._getframe(2)
    while frame is not None and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    _, found, path = frame.f_code.co_filename.rpartition("/posttrain/") if frame is not None else ("", "", "")
    return f"posttrain/{path}:{frame.f_lineno}" if found and not path.startswith("tests/") else None


class Waits(TorchFunctionMode):
    """Counts, by place, the calls of this library at which the host would wait for a device."""

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in _READS or self._goes_by_a_mask(function, args) or (function is torch.where and len(args) == 1):
            place = _from_posttrain()
            if place is not None and not place.startswith(_ON_THE_HOST):
                self.found[place] += 1
        elif function is torch.as_tensor and not isinstance(args[0], Tensor) and (place := _from_posttrain()):
            self.found[place] += 1
        return function(*args, **kwargs or {})

    @staticmethod
    def _goes_by_a_mask(function, args) -> bool:
        if function not in (Tensor.__getitem__, Tensor.__setitem__):
            return False
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        read = function is Tensor.__getitem__ or isinstance(args[2], Tensor)
        return read and any(isinstance(part, Tensor) and part.dtype == torch.bool for part in index)


def _in_micro_batches(trainer, monkeypatch) -> tuple[collections.Counter, list[int], list[str]]:
    """Train; places of waits, walks over the model of each micro-batch, and what was packed in which part of a step."""
    waits, walks, packed, inside = Waits(), [], [], []
    of_all, run, pack_padded = torch.nn.Module.named_modules, trainer._micro_batch, packing.pack_rows

    base = trainer.model.get_base_model() if is_peft_model(trainer.model) else trainer.model

    def named_modules(self, *args, **kwargs):
        if inside:
            walks[-1] += any(self is whole for whole in (trainer.model, trainer.model_wrapped, base, base.base_model))
        return of_all(self, *args, **kwargs)

    def micro_batch(*args, **kwargs):
        # what is found once has been found in the first steps
        if trainer.state.global_step < 2:
            return run(*args, **kwargs)
        inside.append(True)
        walks.append(0)
        try:
            with waits:
                return run(*args, **kwargs)
        finally:
            inside.clear()

    def pack_rows(*args, **kwargs):
        if trainer.state.global_step >= 2:
            packed.append("micro-batch" if inside else "window")
        return pack_padded(*args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "named_modules", named_modules)
    monkeypatch.setattr(packing, "pack_rows", pack_rows)
    trainer._micro_batch = micro_batch
    trainer.train()
    return waits.found, walks, packed


def _check_micro_batches(method, folder, output_dir, monkeypatch, **settings):
    layout = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=4)
    rollouts = method.forwards if method.name == "policy_gradient" else {}
    trainer = method.build(folder, output_dir, **RECOMPUTED | rollouts | settings | layout)
    waits, walks, packed = _in_micro_batches(trainer, monkeypatch)
    # TRL generates, scores and packs in micro-batches of its own making
    if method.name == "policy_gradient":
        assert walks[1::2] == [0, 0]
        return packed
    assert not [place for place, count in waits.items() if not (place.startswith(_ONCE) and count == len(walks))]
    assert len(walks) >= 3 and not any(walks)
    return packed


@pytest.mark.parametrize(("method", "name"), cases("cases", core=0))
def test_a_micro_batch_neither_waits_nor_walks_over_the_model(method, name, tiny_folder, tmp_path, monkeypatch):
    _check_micro_batches(method, tiny_folder, tmp_path, monkeypatch, **method.cases[name])


def test_a_private_step_ends_without_a_wait(tiny_folder, tmp_path):
    noisy = dict(target_epsilon=None, noise_multiplier=1.0, target_delta=1e-3)
    trainer = METHODS["dp_sft"].build(tiny_folder, tmp_path, **noisy)
    finish, waits, ended = trainer._private.finish_step, Waits(), []

    def watched():
        with waits:
            ended.append(finish())

    trainer._private.finish_step = watched
    trainer.train()
    assert len(ended) == 2 and not waits.found


@pytest.mark.parametrize("name", ["robust_dpo", pytest.param("a_lol", marks=pytest.mark.slow)])
def test_a_step_is_packed_before_its_first_forward(name, tiny_folder, tmp_path, monkeypatch):
    settings = dict(prefix_sharing="always") | (dict(prompts=4) if name == "a_lol" else RDPO)
    packed = _check_micro_batches(METHODS[name], tiny_folder, tmp_path, monkeypatch, **settings)
    assert packed.count("window") >= 3 and "micro-batch" not in packed
