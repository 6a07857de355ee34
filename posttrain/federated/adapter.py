"""The LoRA of one model in memory as named factors: read, written, frozen, saved, and its base moved."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from posttrain.adapters import lora_settings, saved_lora
from posttrain.errors import ConfigError
from posttrain.federated.config import FederatedConfig
from posttrain.federated.methods import METHODS, Shared
from posttrain.mechanisms.frozen_a import freeze_a
from posttrain.objectives import low_rank

_PREFIX = "base_model.model."
# of an adapter's config, what says which modules it adapts, for what, and with which scale
_SAVED = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "fan_in_fan_out", "task_type"),
    *("base_model_name_or_path", "revision", *saved_lora.WHERE),
)


class _Layer(NamedTuple):
    A: nn.Parameter
    B: nn.Parameter
    module: LoraLayer
    scale: float


class SharedAdapter:
    """The one adapter of a model that clients train in turn.

    Args:
        model: a `PeftModel` with one plain LoRA, which is the base and the adapter that the run begins with.
        config: whose method says what is trained and moved.

    Attributes:
        start: what clients begin the first round with. Numbers of 16 bits are held in fp32.

    Raises:
        ConfigError: another kind of model or adapter, or a module with fewer inputs than its rank.
    """

    def __init__(self, model: PeftModel, config: FederatedConfig) -> None:
        self.model, self._method = model, METHODS[config.method]
        self._layers = _layers(model)
        if self._method.refactors != "never":
            for path, layer in self._layers.items():
                if layer.A.shape[1] < layer.A.shape[0]:
                    raise ConfigError(
                        f"{path} has {layer.A.shape[1]} inputs and the rank {layer.A.shape[0]}: of so few no "
                        f"{layer.A.shape[0]} rows are orthonormal, and method is {config.method}. Lower the rank, "
                        "leave the module out, or use `method: ffa_lora`."
                    )
        if config.initial_a == "orthonormal":
            self._make_orthonormal(config.federated_seed)
        self._check_a()
        self.freeze()
        self._originals = self._bases() if self._method.moves_base else {}
        parts = [
            {
                path: getattr(layer, side).detach().to("cpu", _held(layer), copy=True)
                for path, layer in self._layers.items()
            }
            for side in ("A", "B")
        ]
        self.start = Shared(*parts, {})

    @property
    def trains_a(self) -> bool:
        """Whether clients train A beside B."""
        return self._method.trains_a

    def _make_orthonormal(self, seed: int) -> None:
        for path, layer in self._layers.items():
            if layer.B.any():
                raise ConfigError(
                    f"initial_a is orthonormal, and B of {path} is not zero: with another A the adapter would be "
                    "another one. Leave initial_a out."
                )
            layer.A.requires_grad_(True)
        freeze_a(self.model, seed)

    def _check_a(self) -> None:
        """Raise ConfigError for an A of zeros that would stay so, as PEFT makes that of an embedding."""
        for path, layer in self._layers.items():
            if not self._method.trains_a and not layer.A.any():
                raise ConfigError(
                    f"A of {path} is zero, and clients do not train it under this method, so that nothing would be "
                    "learned there. Leave embeddings out of target_modules, or use `method: fedavg_lora`."
                )

    def freeze(self) -> None:
        """Set what a client trains: B, and A where the method says so."""
        for layer in self._layers.values():
            layer.B.requires_grad_(True)
            layer.A.requires_grad_(self._method.trains_a)

    def check_frozen(self, client: str) -> None:
        """Raise ConfigError where a trainer would train what clients share as it is: A, or a weight of the base."""
        trained = {id(layer.B) for layer in self._layers.values()}
        if self._method.trains_a:
            trained |= {id(layer.A) for layer in self._layers.values()}
        thawed = [path for path, layer in self._layers.items() if layer.A.requires_grad]
        if thawed and not self._method.trains_a:
            raise ConfigError(
                f"the trainer of client {client} trains A of {thawed[0]}, which all clients share under this method. "
                "Give the trainer the model as it is, without peft_config and without a setting that trains A."
            )
        others = [
            name for name, value in self.model.named_parameters() if value.requires_grad and id(value) not in trained
        ]
        if others:
            raise ConfigError(
                f"the trainer of client {client} trains {others[0].removeprefix(_PREFIX)}, which is no factor of the "
                "shared adapter and would stay changed for the clients after it. Give the trainer the model as it is."
            )
        still = [path for path, layer in self._layers.items() if not layer.B.requires_grad]
        if still:
            raise ConfigError(
                f"the trainer of client {client} froze B of {still[0]}, which clients are to train. Give the trainer "
                "the model as it is."
            )

    def check_unchanged(self, client: str, shared: Shared, sides: str) -> None:
        """Raise ConfigError where factors of the named sides are no longer those that a client was given."""
        for path, layer in self._layers.items():
            for side in sides:
                value = getattr(layer, side).detach()
                given = getattr(shared, side)[path].to(value.device, value.dtype)
                if not torch.equal(value, given):
                    raise ConfigError(
                        f"client {client} has another {side} of {path} than it was given: its trainer, or what builds "
                        f"it, wrote into it, and the others have the shared one. Leave {side} to the run."
                    )

    @torch.no_grad()
    def load(self, shared: Shared) -> None:
        """Put factors, and the change of the base where there is one, into the model."""
        for path, layer in self._layers.items():
            layer.A.copy_(shared.A[path])
            layer.B.copy_(shared.B[path])
            layer.A.grad = layer.B.grad = None
            if path not in self._originals:
                continue
            weight, original = layer.module.get_base_layer().weight, self._originals[path]
            if path not in shared.base:
                weight.copy_(original)
                continue
            # from the first weights each time, so that a run that goes on has the same ones to the bit
            a, b = shared.base[path]
            change = layer.scale * (b.double() @ a.double())
            moved = original.double() + (change.T if layer.module.fan_in_fan_out else change)
            weight.copy_(moved)

    def read(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return A and B that were trained, A as nothing where the method leaves it; on the CPU."""
        sides = ("A", "B") if self._method.trains_a else ("B",)
        found = {
            side: {path: getattr(layer, side).detach().to("cpu", copy=True) for path, layer in self._layers.items()}
            for side in sides
        }
        return found.get("A", {}), found["B"]

    def save(self, folder: str | Path, shared: Shared) -> None:
        """Write a plain LoRA for the base that the run began with, whole or not at all, into a new folder.

        Where the method moved the base, that goes into the adapter as well, whose rank grows by it.

        Raises ConfigError for a folder that is not empty, EnvironmentIssue where the disk does not take it.
        """
        given = self.model.peft_config[self.model.active_adapter].to_dict()
        settings = {name: given[name] for name in _SAVED} | {"inference_mode": True}
        tensors = {}
        if not shared.base:
            for path in self._layers:
                tensors |= self._named(path, shared.A[path], shared.B[path])
        else:
            settings |= self._grown(shared, tensors)
        saved_lora.write(folder, settings, {name: value.contiguous() for name, value in tensors.items()}, {})

    def _grown(self, shared: Shared, tensors: dict[str, Tensor]) -> dict:
        """Add the tensors of the whole change, of one rank in all modules, and return their settings."""
        made = {}
        for path, layer in self._layers.items():
            parts = [(shared.A[path], shared.B[path], layer.scale)]
            parts += [(*shared.base[path], layer.scale)] if path in shared.base else []
            made[path] = low_rank.merge(parts, dtype=shared.B[path].dtype)
        rank = max(len(part.A) for part in made.values())
        for path, part in made.items():
            for name, value in self._named(path, part.A, part.B).items():
                tensors[name] = saved_lora.padded(name, value, rank)
        return {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False}

    def _named(self, path: str, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        adapter, module = self.model.active_adapter, self._layers[path].module
        kind = "embedding" if adapter in module.lora_embedding_A else "linear"
        return saved_lora.tensors_of(path, kind, A, B)

    def _bases(self) -> dict[str, Tensor]:
        """Copy the weights that the method moves."""
        found = {}
        for path, layer in self._layers.items():
            weight = getattr(layer.module.get_base_layer(), "weight", None)
            if type(weight) is not nn.Parameter or weight.dim() != 2 or not weight.is_floating_point() or (
                self.model.active_adapter in layer.module.lora_embedding_A
            ):  # fmt: skip
                raise ConfigError(
                    f"the method moves the base weights, and those of {path} are no plain matrix of a linear layer "
                    f"({type(weight).__name__}). Load the base without quantisation and leave embeddings out, or use a "
                    "method that leaves the base alone, such as fedsvd."
                )
            found[path] = weight.detach().to("cpu", copy=True)
        return found


def _held(layer: _Layer) -> torch.dtype:
    """Return the type that the run holds a layer's factors in."""
    return torch.promote_types(torch.promote_types(layer.A.dtype, layer.B.dtype), torch.float32)


def _layers(model) -> Mapping[str, _Layer]:
    """Return the layers of the model's one LoRA by their path in the base."""
    if not isinstance(model, PeftModel):
        raise ConfigError(
            f"the model is a {type(model).__name__}, without an adapter; clients train one LoRA. Give "
            "`peft.get_peft_model(model, LoraConfig(...))`."
        )
    if len(model.peft_config) != 1:
        raise ConfigError(f"the model has the adapters {', '.join(model.peft_config)}; clients train one. Leave one.")
    ((adapter, config),) = model.peft_config.items()
    if getattr(config.peft_type, "value", None) != "LORA":
        raise ConfigError(f"the adapter is of the type {config.peft_type}; clients train A and B of a plain LoRA.")
    refused = lora_settings.refusals(config.to_dict())
    called = getattr(config, "called", None)
    if called or refused:
        why = f"it is one of the scheme {called}" if called else refused[0]
        raise ConfigError(f"the adapter is no plain LoRA: {why}. Clients train A and B of a plain one.")
    found = {}
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer) or adapter not in {*module.lora_A, *module.lora_embedding_A}:
            continue
        if adapter in module.lora_embedding_A:
            A, B = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
        else:
            A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        name = path.removeprefix(_PREFIX)
        if A.dim() != 2 or B.dim() != 2 or type(A.data) is not Tensor or hasattr(A, "ds_id"):
            raise ConfigError(f"the adapter of {name} is no two whole matrices A and B. Leave that module out.")
        found[name] = _Layer(A, B, module, module.scaling[adapter])
    return found
