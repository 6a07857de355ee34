"""Case 7: runs of every method, in bf16 with gradient checkpointing, against padded rows, TRL and themselves."""

import importlib.util
import json
import tempfile
from pathlib import Path

from gpu.families import gap, losses, methods, precision, quiet, tiny_folder
from gpu.models import departure, saved_model
from gpu.record import OF_RUNS, Case

# of a step's loss, and of the change of the parameters against TRL's
_LOSS, _CHANGE, _RELOADED = 2e-2, 2e-2, 1e-3
_STEPS = 4
# a further run is not begun with less left
_LEAST = 8.0


def run(record) -> None:
    quiet()
    with tempfile.TemporaryDirectory() as place:
        folder, place = tiny_folder(place), Path(place)
        for at, method in enumerate(methods().values()):
            first, *_ = method.cases
            whole = not (record.toy and at)
            _trained(record, method, folder, place, first, method.cases[first], whole)
            if not whole:
                record.leave_out(f"{method.name}: padded rows, TRL, resumption, what is saved", "toy sizes")
                continue
            if method.neutral:
                _neutral(record, method, folder, place)
            _resumed(record, method, folder, place)
            for case, settings in _whole_models(method).items():
                _trained(record, method, folder, place, case, settings)
        _four_bits(record, folder, place)
        if record.toy:
            record.leave_out("the other cases of each method", "toy sizes")
            return
        large = saved_model(record, "random-0.5b", place / "large")
        for name, method in methods().items():
            first, *others = method.cases
            _trained(record, method, large, place, f"{first} (random-0.5b)", method.cases[first])
            more = {case: method.cases[case] for case in others} | dict(method.ranks) | dict(method.generated)
            for case, settings in more.items():
                if record.left < _LEAST:
                    record.leave_out(f"{name}, {case}", "no time left")
                else:
                    _trained(record, method, folder, place, case, settings)


def _four_bits(record, folder, place: Path) -> None:
    """Train an adapter on a base in NF4; of one method, as the base is nothing of a method's."""
    import torch
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        record.leave_out("4-bit", "bitsandbytes is not installed")
        return
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    method = methods()["a_lol"]
    first, *_ = method.cases
    settings = dict(method.cases[first]) | dict(quantization_config=quantized)
    _trained(record, method, folder, place, f"{first}, 4-bit", settings, held=False)


def _whole_models(method) -> dict:
    """Return a case of full fine-tuning, where the method has one."""
    found = {name: case for name, case in method.ranks.items() if case.get("peft") is False}
    return dict(list(found.items())[:1])


def _settings(record, method, case) -> dict:
    # two micro-batches a step; at the tests' rates rounding to bf16 would grow from step to step
    split = method.split(method.step // 2)
    return dict(case) | split | dict(max_steps=_STEPS, learning_rate=1e-3) | precision(record)


def _attempt(record, what: str, do):
    """Return what a run returns; an error is a check that was not met, but for one after which the card is lost."""
    try:
        return do()
    except Exception as error:
        if "CUDA error" in str(error):
            raise
        record.failed(what, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", "a run that ends well")
        return None


def _trained(record, method, folder, place: Path, case: str, settings, held: bool = True) -> None:
    """Train; `held`: what is saved is loaded, and losses are held against padded rows."""
    arm = f"{method.name}, {case}"
    settings = _settings(record, method, settings)
    trainer = _attempt(record, arm, lambda: _train(record, method, folder, place / arm / "run", settings))
    if trainer is None:
        return
    found = losses(trainer)
    record.equal(f"{arm}: steps with a finite loss", sum(abs(loss) < float("inf") for loss in found), _STEPS)
    _, early, *_, last = trainer.hooks_of_steps
    record.equal(f"{arm}: hooks on modules after step {_STEPS}, as after step 2", last, early)
    if held:
        _attempt(record, f"{arm}: saved and loaded", lambda: _reloaded(record, arm, trainer, folder, place / arm))
    if held and method.padded and not method.padded.items() <= settings.items():
        padded = settings | dict(method.padded)
        other = _attempt(record, f"{arm}, padded", lambda: _train(record, method, folder, place / arm / "pad", padded))
        if other is not None:
            record.at_most(f"{arm}: losses beside padded rows", gap(found, losses(other)), _LOSS)


def _train(record, method, folder, output_dir, settings):
    trainer = method.build(folder, output_dir, **settings)
    _count_hooks(trainer)
    trainer.train()
    return trainer


def _count_hooks(trainer) -> None:
    from transformers import TrainerCallback

    trainer.hooks_of_steps = []
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

    class Counted(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            trainer.hooks_of_steps.append(sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds))

    trainer.add_callback(Counted())


def _neutral(record, method, folder, place: Path) -> None:
    """The change of the parameters is TRL's where the method's settings are neutral."""
    arm, (ours, theirs) = next(iter(method.neutral.items()))
    arm, of_both = f"{method.name}, neutral ({arm})", precision(record)
    changes = []
    for side, settings in (("ours", ours), ("TRL's", dict(method.parent) | dict(theirs))):
        output_dir = place / arm / side
        changes.append(
            _attempt(
                record, f"{arm}, {side}", lambda s=settings, o=output_dir: method.train(folder, o, **s | of_both)[0]
            )
        )
    if None not in changes:
        one, other = (_flat(change) for change in changes)
        record.at_most(f"{arm}: change of the parameters beside TRL's", departure(one, other), _CHANGE)


def _flat(change):
    import torch

    return torch.cat([change[name].flatten().float() for name in sorted(change)])


def _resumed(record, method, folder, place: Path) -> None:
    settings, step, _ = method.resumed
    arm, settings = f"{method.name}, resumed", dict(settings) | precision(record)
    straight = _attempt(record, f"{arm}: straight", lambda: method.train(folder, place / arm, **settings)[1])
    if straight is None:
        return
    checkpoint = str(place / arm / f"checkpoint-{step}")
    again = settings | dict(save_strategy="no")
    resumed = _attempt(record, arm, lambda: method.train(folder, place / arm, resume=checkpoint, **again)[1])
    if resumed is not None:
        ours, theirs = losses(resumed)[step:], losses(straight)[step:]
        record.equal(f"{arm}: steps after step {step}", len(ours), len(theirs))
        record.at_most(f"{arm}: losses after step {step}", gap(ours, theirs), _LOSS)


def _reloaded(record, arm: str, trainer, folder, place: Path) -> None:
    """What is saved, loaded by transformers and PEFT alone, has the logits of the model that was trained."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    target, dtype = place / "saved", trainer.model.dtype
    trainer.save_model(str(target))
    if (target / "adapter_config.json").exists():
        base = json.loads((target / "adapter_config.json").read_text())["base_model_name_or_path"]
        base = AutoModelForCausalLM.from_pretrained(base or folder, dtype=dtype)
        loaded = PeftModel.from_pretrained(base, target)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(target, dtype=dtype)
    ids = torch.arange(10, 42, device=record.device).view(2, 16)
    # the trained model's forward is in the run's precision by itself
    with torch.no_grad(), trainer.accelerator.autocast():
        one, other = (model.eval()(input_ids=ids).logits.float() for model in (loaded.to(record.device), trainer.model))
    record.at_most(f"{arm}: logits of the saved model", (one - other).abs().max().item(), _RELOADED)


CASE = Case(
    number=7,
    name="trainers",
    proves="every method trains in bf16 with checkpointing, is padded rows' and TRL's equal, resumes, reloads",
    seconds=120,
    toy_seconds=240,
    run=run,
    imports=OF_RUNS,
)
