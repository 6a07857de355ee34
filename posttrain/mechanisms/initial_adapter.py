"""Adapters as they begin: which change the base, a frozen copy of one, and their saved form for the untouched base.

PiSSA, OLoRA, CorDA and LoRA-GA move a part of the base's weights into the new adapter: W = W' + s B0 A0. The model is
as it was, but with the adapter off it is W', and the trained adapter fits W' alone, which is nowhere on disk. Saved is
the adapter of twice the rank [A; A0], [B, -B0]: on W it makes W + s (B A - B0 A0) = W' + s B A, the trained model.
"""

import copy
import json
import os
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
REFERENCE = "ref"
# on disk, of linear layers and of embeddings: PEFT begins an adapter of an embedding with A = 0 and leaves its base
_A = (".lora_A.weight", ".lora_embedding_A")
_B = (".lora_B.weight", ".lora_embedding_B")


def initialisation(config) -> str | bool | None:
    """Return a LoRA config's init_lora_weights, names in lower case; None for a config that is no LoRA's."""
    value = getattr(config, "init_lora_weights", None)
    return value.lower() if isinstance(value, str) else value


def changes_base(config) -> bool:
    """Return whether making an adapter of this config takes its first weights out of the base's."""
    value = initialisation(config)
    return isinstance(value, str) and value.startswith(("pissa", "olora", "corda", "lora_ga", "loftq"))


def begins_as_base(config) -> bool:
    """Return whether a LoRA of this config changes nothing before its first step, and leaves the base as it is."""
    value = initialisation(config)
    return value is not None and value is not False and not changes_base(config)


def settle(config) -> None:
    """Set an adapter config to PEFT's default initialisation, so that loading it leaves the base weights alone."""
    config.init_lora_weights = True
    for name in ("corda_config", "lora_ga_config", "eva_config"):
        if getattr(config, name, None) is not None:
            setattr(config, name, None)


def add_reference(model) -> None:
    """Add the adapter `ref` to a PeftModel, a frozen copy of its own as it is; refresh the copy if it is there.

    Random state and own adapter stay as they are.
    """
    own = model.active_adapters[0]
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    if REFERENCE not in model.peft_config:
        config = copy.deepcopy(model.peft_config[own])
        settle(config)
        # the reference never drops out
        if hasattr(config, "lora_dropout"):
            config.lora_dropout = 0.0
        with torch.random.fork_rng(devices=[]):
            model.add_adapter(REFERENCE, config)
        model.set_adapter(own)
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        parts = name.split(".")
        if own in parts:
            parameters[".".join(REFERENCE if part == own else part for part in parts)].data = parameter.data.clone()
    for name, parameter in parameters.items():
        parameter.requires_grad_(trained.get(name, False))


def drop_nothing_in_reference(model) -> None:
    """Turn off the dropout of the adapter `ref`."""
    for module in model.modules():
        dropout = getattr(module, "lora_dropout", None)
        if isinstance(dropout, torch.nn.ModuleDict) and REFERENCE in dropout:
            dropout[REFERENCE] = torch.nn.Identity()


def matrices(model) -> dict[str, Tensor]:
    """Return the LoRA matrices A and B of a PeftModel's adapter, by their names on disk, on the CPU."""
    state = get_peft_model_state_dict(model, adapter_name=model.active_adapters[0], save_embedding_layers=False)
    return {name: value.detach().cpu().clone() for name, value in state.items() if name.endswith(_A + _B)}


def convert(folder: str | Path, initial: dict[str, Tensor]) -> None:
    """Rewrite a saved adapter, trained from the matrices `initial`, into one for the base as it was."""
    folder = Path(folder)
    state = load_file(folder / WEIGHTS)
    for name, first in initial.items():
        first = first.to(state[name].dtype)
        state[name] = torch.cat([state[name], first if name.endswith(_A) else -first], dim=int(name.endswith(_B)))
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    rank = config["r"]
    config |= {"init_lora_weights": True, "corda_config": None, "lora_ga_config": None, "r": 2 * rank}
    # the scale stays: alpha / r, or alpha / sqrt(r)
    config["lora_alpha"] *= 2**0.5 if config.get("use_rslora") else 2
    for name in ("rank_pattern", "alpha_pattern"):
        config[name] = {key: 2 * value for key, value in (config.get(name) or {}).items()}
    _replace(folder / WEIGHTS, lambda path: save_file(state, path, metadata={"format": "pt"}))
    text = json.dumps(config, indent=2, sort_keys=True)
    _replace(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))


def remove_reference(folder: str | Path) -> None:
    """Delete the reference's adapter that PEFT saved beside the trained one; other files there stay."""
    reference = Path(folder) / REFERENCE
    for name in (CONFIG, WEIGHTS, "README.md"):
        (reference / name).unlink(missing_ok=True)
    if reference.is_dir() and not any(reference.iterdir()):
        reference.rmdir()


def _replace(path: Path, write) -> None:
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    os.replace(partial, path)


def halves(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split an adapter that `convert` wrote into its trained state and the matrices it was trained from."""
    own, initial = load_file(Path(folder) / WEIGHTS), {}
    for name, value in own.items():
        if name.endswith(_A + _B):
            own[name], first = (part.contiguous() for part in value.chunk(2, dim=int(name.endswith(_B))))
            initial[name] = first if name.endswith(_A) else -first
    return own, initial


def load(model, state: dict[str, Tensor]) -> None:
    """Load an adapter's state, by its names on disk, into a PeftModel."""
    set_peft_model_state_dict(model, dict(state), adapter_name=model.active_adapters[0])
