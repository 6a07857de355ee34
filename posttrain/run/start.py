"""Where a run's policy starts: adapters that can be trained and saved, the reference's copy of them, resuming."""

from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from peft import PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from transformers import set_seed
from transformers.pytorch_utils import Conv1D

from posttrain.errors import ConfigError
from posttrain.log import get_logger
from posttrain.mechanisms import initial_adapter

_HOW = {
    "eva": "make it with get_peft_model and initialize_lora_eva_weights, and pass that PeftModel without peft_config",
    "corda": "run preprocess_corda on the loaded model, and pass that model with peft_config",
    "lora_ga": "run preprocess_loraga on the loaded model, and pass that model with peft_config",
}
_OWN_FORWARD = (PeftType.ADAPTION_PROMPT, PeftType.CPT)
# What those leave on the layers of a model.
_LEFT = {"corda": "eigens", "lora_ga": "_peft_loraga_grad"}


def check_adapter(model, peft_config, args, live_reference: bool) -> None:
    """Refuse adapters whose run could not be saved, or whose reference would not be the policy's start.

    Args:
        model: its name, or the model itself.
        peft_config: of a new adapter; None where there is none, or the model has one.
        live_reference: whether the reference is the model itself with its adapter off or replaced.

    Raises:
        ConfigError: in each of these cases.
    """
    if isinstance(model, PeftModel):
        _check_name(model)
    for config in [peft_config, *(model.peft_config.values() if isinstance(model, PeftModel) else ())]:
        kind = getattr(config, "peft_type", None)
        if kind in _OWN_FORWARD:
            raise ConfigError(
                f"the adapter is of the type {kind.value}, which makes logits by a forward of its own, and the "
                "trainers here read log-probabilities of the scored tokens. Use LoRA, prompt tuning or prefix tuning."
            )
        if kind == PeftType.MULTITASK_PROMPT_TUNING:
            raise ConfigError(
                "the adapter is of multitask prompt tuning, which must be told each row's task (task_ids), and this "
                "library's trainers have none to tell. Use PromptTuningConfig, or LoRA."
            )
    if getattr(peft_config, "inference_mode", False):
        raise ConfigError("the adapter's config has inference_mode true, so nothing would train. Set it to false.")
    if peft_config is None:
        if isinstance(model, torch.nn.Module):
            check_trains(model)
        given = model.peft_config if isinstance(model, PeftModel) else {}
        for config in given.values():
            if initial_adapter.changes_base(config):
                raise ConfigError(
                    f"the model comes with an adapter of init_lora_weights {config.init_lora_weights!r}, which changed "
                    "the base when it was made; neither the first base nor the first adapter is at hand to save one "
                    "that fits the base. Pass the base and `peft_config` apart, or convert the adapter first: PEFT's "
                    "save_pretrained with path_initial_model_for_weight_conversion."
                )
        return
    how = initial_adapter.initialisation(peft_config)
    if how == "loftq":
        raise ConfigError(
            "init_lora_weights is 'loftq', which replaces the base's weights by rounded ones: the saved adapter would "
            "fit no base on disk. Load the base with `load_in_4bit: true`, apply peft.replace_lora_weights_loftq to "
            "its PeftModel and pass that; or leave init_lora_weights out."
        )
    left = _LEFT.get(how)
    prepared = left and isinstance(model, torch.nn.Module) and any(hasattr(part, left) for part in model.modules())
    if how in _HOW and not prepared:
        raise ConfigError(
            f"init_lora_weights is {how!r}, which needs a pass over data before training, and there was none: PEFT "
            f"would start without it. To use it, {_HOW[how]}; or leave init_lora_weights out."
        )
    if isinstance(how, str) and how != "gaussian" and getattr(peft_config, "target_parameters", None):
        raise ConfigError(
            f"init_lora_weights is {how!r} with target_parameters; PEFT makes that start for whole modules only, from "
            "their weight. Leave init_lora_weights or target_parameters out."
        )
    if initial_adapter.changes_base(peft_config):
        if peft_config.use_rslora and (peft_config.rank_pattern or peft_config.alpha_pattern):
            raise ConfigError(
                f"init_lora_weights is {how!r} with use_rslora and rank_pattern or alpha_pattern; the adapter cannot "
                "be saved for the base as it is on disk. Leave one of them out."
            )
        plugin = getattr(args, "deepspeed_plugin", None)
        if plugin is not None and plugin.zero_stage == 3:
            raise ConfigError(
                f"init_lora_weights is {how!r} under ZeRO-3, which spreads the weights that it takes apart. Use ZeRO-2 "
                "(configs/accelerate), or leave init_lora_weights out."
            )
    bias = getattr(peft_config, "bias", "none")
    if live_reference and bias != "none":
        raise ConfigError(
            f"the adapter's bias is {bias!r}: the base's own biases would train, and the reference, which is the base "
            "with its adapter off, would move with them. Set bias to 'none'."
        )


def check_trains(model) -> None:
    """Refuse a model of which no parameter requires a gradient."""
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    remedy = (
        "Load the adapter with PeftModel.from_pretrained(..., is_trainable=True)."
        if is_peft_model(model)
        else "Pass a peft_config for an adapter, or call model.requires_grad_(True)."
    )
    raise ConfigError(f"no parameter of the model requires a gradient, so nothing would train. {remedy}")


def _check_name(model) -> None:
    """Refuse a PeftModel whose own adapter is not `default`: the one that is trained, saved and copied by that name."""
    active = list(model.active_adapters)
    if active == ["default"]:
        return
    names = ", ".join(map(repr, active)) or "none"
    if "default" in model.peft_config:
        remedy = 'Call model.set_adapter("default") first, if that is the one to train.'
    else:
        remedy = (
            "Leave adapter_name out where the adapter is made (get_peft_model) or loaded (PeftModel.from_pretrained): "
            "it is then called 'default'."
        )
    raise ConfigError(
        f"the model's active adapter is {names}; it must be 'default' alone, the one that TRL's reference and the "
        f"saved folder's files are made from. {remedy}"
    )


def _check_layers(model, peft_config) -> None:
    """Refuse OLoRA on layers whose weight is transposed, which PEFT takes apart as if it were not."""
    if initial_adapter.initialisation(peft_config) != "olora":
        return
    own = model.active_adapters[0]
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and own in layer.lora_A and isinstance(layer.get_base_layer(), Conv1D):
            raise ConfigError(
                f"init_lora_weights is 'olora', and {name.rpartition('.')[2]} is a Conv1D, whose weight is transposed: "
                "PEFT would make matrices that do not fit it. Set init_lora_weights to 'pissa', or leave it out."
            )


def begin(peft_config, args) -> None:
    """Seed from the run's seed before the model is made, where an adapter's start is random, so that it can resume."""
    if _is_apart(peft_config):
        set_seed(args.seed)


def _is_apart(config) -> bool:
    """Return whether a LoRA's start differs from the base with the adapter off."""
    return initial_adapter.initialisation(config) is not None and not initial_adapter.begins_as_base(config)


class Start:
    """Holds the policy's adapter as the run begins.

    Attributes:
        converts: whether the saved adapter is made one for the base as it was.
    """

    def __init__(self, trainer, peft_config, live_reference: bool) -> None:
        """Note the start, before the model's first forward or step. `live_reference`: as in `check_adapter`."""
        self._model, self.converts = trainer.model, False
        if not is_peft_model(self._model):
            return
        if peft_config is not None and _is_apart(peft_config) and live_reference:
            initial_adapter.add_reference(self._model)
        elif initial_adapter.REFERENCE in self._model.peft_config:
            # TRL's copy leaves out what has no name behind the adapter's: embeddings, tokens
            initial_adapter.add_reference(self._model)
        initial_adapter.drop_nothing_in_reference(self._model)
        if peft_config is None or not initial_adapter.changes_base(peft_config):
            return
        _check_layers(self._model, peft_config)
        base = self._model.get_base_model()
        if getattr(base, "is_quantized", False) or getattr(base, "quantization_method", None) is not None:
            raise ConfigError(
                f"init_lora_weights is {peft_config.init_lora_weights!r} on a quantised base, which was rounded anew "
                "without the part that the adapter took: the saved adapter would not fit the base on disk. Leave "
                "init_lora_weights out, or load the base unquantised."
            )
        self.converts, self._matrices = True, initial_adapter.matrices(self._model)

    def saved(self, folder: str | Path) -> None:
        """Convert the adapter just saved into `folder` for the untouched base, on the main process."""
        if self.converts and (Path(folder) / initial_adapter.WEIGHTS).is_file():
            initial_adapter.convert(folder, self._matrices)
            initial_adapter.remove_reference(folder)

    def load(self, folder: str | Path) -> None:
        """Load into the model the adapter of a checkpoint that `saved` wrote."""
        state, _ = initial_adapter.halves(folder)
        initial_adapter.load(self._model, state)

    def resume(self, checkpoint: str | Path, started: bool) -> None:
        """Move the base, before a run resumes, to the one that the checkpoint's adapter was trained on.

        `started`: whether the model is already past its start.
        """
        if not self.converts:
            return
        _, initial = initial_adapter.halves(checkpoint)
        if all(torch.equal(initial[name], value) for name, value in self._matrices.items()):
            return
        if started:
            raise ConfigError(
                f"the checkpoint {checkpoint} comes from an adapter that began with other matrices, and this trainer "
                "has already trained. Build it anew and resume at once."
            )
        get_logger().warning(
            "init_lora_weights %r made other matrices here than where %s was written; the base is moved to fit that "
            "checkpoint, exact to rounding",
            initial_adapter.initialisation(self._model.active_peft_config),
            checkpoint,
        )
        own = self._model.active_adapters[0]
        layers = [module for module in self._model.modules() if isinstance(module, LoraLayer) and own in module.lora_A]
        with torch.no_grad():
            for layer in layers:
                layer.get_base_layer().weight.data += layer.get_delta_weight(own)
            initial_adapter.load(self._model, initial)
            for layer in layers:
                layer.get_base_layer().weight.data -= layer.get_delta_weight(own)
        if initial_adapter.REFERENCE in self._model.peft_config:
            initial_adapter.add_reference(self._model)
        self._matrices = initial


def use_adapter_dropout(model) -> None:
    """Restore a LoRA adapter's dropout from its config, which TRL's disable_dropout turns off with the base's."""
    if not is_peft_model(model):
        return
    for name in model.active_adapters:
        dropout = getattr(model.peft_config[name], "lora_dropout", 0.0)
        for module in model.modules():
            found = getattr(module, "lora_dropout", None)
            if dropout and isinstance(found, torch.nn.ModuleDict) and name in found:
                found[name].p = dropout
