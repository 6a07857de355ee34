"""Dropout of a model: whether it has any, and whether it is left where its `nn.Dropout` modules are switched off."""

import contextlib

import torch
from accelerate.utils import is_peft_model
from torch import nn

from posttrain.errors import ConfigError

# Fields of model configs that make a forward in training depend on chance.
_CHANCE = ("drop", "jitter")


def drops_out(model) -> bool:
    """Return whether a forward in training mode leaves out activations by chance."""
    modules = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    return modules or bool(rates_in_modules(model))


def rates_in_modules(model) -> set[float]:
    """Return the dropout rates above 0 that modules of the base hold as numbers, for a function to drop out by."""
    return {
        value
        for module in _base(model).modules()
        if type(module).__module__.split(".")[0] != "peft"
        for name, value in vars(module).items()
        if "drop" in name and isinstance(value, float) and value > 0
    }


def fields_above_zero(model) -> dict[str, float]:
    """Return the fields of a model's config that are rates of dropout above 0, by name."""
    settings = model.config.get_text_config().to_dict().items()
    return {name: value for name, value in settings if _is_rate(name, value)}


def check_functional_dropout(model, can_run: bool = True) -> None:
    """Refuse a model that still drops out by a function where `disable_dropout` has switched off its modules.

    Args:
        model: with its `nn.Dropout` modules at a rate of 0.
        can_run: run it on made-up tokens where its config or its modules have a rate above 0, so that a rate that it
            does not use is let pass and one that it reads from its config is found; False where the weights are not
            placed yet: the rates in the modules then decide.

    Raises:
        ConfigError: names the fields of the model's config, and the setting that clears them.
    """
    rates = rates_in_modules(model)
    fields = fields_above_zero(model)
    if not rates and not (fields and can_run):
        return
    if can_run and not _is_random(model):
        return
    fields = {name: value for name, value in fields.items() if not rates or value in rates} or fields
    shown = ", ".join(f"{name} {value}" for name, value in fields.items()) or f"dropout {sorted(rates)}"
    remedy = ", ".join(f"{name}: 0.0" for name in fields or ("dropout",))
    raise ConfigError(
        f"the model's config has {shown}, and the model drops out by a function that disable_dropout does not reach: "
        f"policy and reference would differ by chance. Set `model_init_kwargs: {{{remedy}}}`, or the config's fields "
        "before the model is built; or keep it with `disable_dropout: false`."
    )


def _is_rate(name: str, value) -> bool:
    return any(part in name for part in _CHANCE) and isinstance(value, float) and value > 0


def _base(model):
    return model.get_base_model() if is_peft_model(model) else model


@torch.no_grad()
def _is_random(model) -> bool:
    """Return whether two forwards of made-up tokens in training mode differ, with every `nn.Dropout` switched off."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.get_text_config().vocab_size, (2, 32), generator=generator).to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    modes = [(module, module.training) for module in model.modules()]
    devices = [device.index or 0] if device.type == "cuda" else []
    try:
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.eval()
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            first, second = (model(**inputs).logits for _ in range(2))
        # a kernel may sum in any order; what is left out moves logits by far more
        return bool((first - second).abs().max() > 1e-3 * first.abs().max())
    # in code that is not ours: the rates in its modules decide
    except Exception:
        return bool(rates_in_modules(model))
    finally:
        with contextlib.suppress(Exception):
            for module, mode in modes:
                module.training = mode
