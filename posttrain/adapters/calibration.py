"""Calibration of GIFT-SW adapters: which columns are salient, and how large the noise of the others is."""

import contextlib
from collections.abc import Callable, Iterable

import torch
from peft.utils.integrations import gather_params_ctx
from torch import Tensor

from posttrain.adapters.gift_sw import GiftSWConfig, layers_of
from posttrain.errors import ConfigError, DataError
from posttrain.log import get_logger
from posttrain.mechanisms.noise.weights import RowNoise
from posttrain.objectives import salience


def calibrate(
    model,
    sequences: Iterable[list[int]],
    *,
    adapter: str = "default",
    forward: Callable | None = None,
    shared: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> bool:
    """Choose the salient columns of an adapter's layers, and the size of the noise of the others.

    Layers of which the columns are known, as of an adapter that was loaded, keep them.

    Args:
        model: a PeftModel with a `GiftSWConfig`.
        sequences: tokens, each sequence on its own; without gradient, noise and padding.
        forward: called with tokens (1, T), where that is not the model itself: under an engine that holds its weights.
        shared: gives all ranks the tensor of the first.

    Returns:
        Whether columns were chosen.

    Raises:
        ConfigError: a layer that no token reaches, whose weight or inputs are not finite, or of which no column has
            inputs and an error of rounding.
        DataError: no tokens.
    """
    config = model.peft_config[adapter]
    if isinstance(config, GiftSWConfig) and config.left_out:
        config.check_placed(model, adapter)
        get_logger().info(
            "adapter gift_sw: left out of all-linear, as no plain linear layers: %s", config.what_was_left_out()
        )
    unknown = [found for found in layers_of(model, adapter) if not _is_known(found)]
    if unknown:
        norms = _norms_of_inputs(model, unknown, sequences, config, forward or (lambda ids: model(input_ids=ids)))
        for (path, layer, variant, _), inputs in zip(unknown, norms, strict=True):
            weight = layer.get_base_layer().weight
            with gather_params_ctx([weight], modifier_rank=None), torch.no_grad():
                full = weight.detach().float()
                if not (full.isfinite().all() and inputs.isfinite().all()):
                    raise ConfigError(f"adapter gift_sw: weight or inputs of {path} are not finite numbers.")
                by_weight = config.weight_norm if config.metric == "sensitivity" else 0.0
                power = config.activation_power if config.metric == "sensitivity" else 1.0
                scores = salience.sensitivity(full, inputs, config.bits, by_weight, power)
                if not scores.max().isfinite():
                    raise ConfigError(
                        f"adapter gift_sw: no column of {path} is more salient than another: for each of them either "
                        "its inputs or what rounding leaves of it are zero. Leave it out with exclude_modules."
                    )
                columns = salience.largest(scores, config.r)
            variant.columns = shared(columns)
    _settle(model, adapter, shared)
    return bool(unknown)


def restore(model, table: dict[str, list[int]], adapter: str = "default") -> None:
    """Take over the salient columns of a saved adapter, by the paths of layers.

    Raises ConfigError where it is of other layers, or of another number of columns.
    """
    found = layers_of(model, adapter)
    for path, layer, variant, _ in found:
        known = table.get(path)
        if known is None or len(set(known)) != layer.r[adapter] or max(known) >= layer.in_features:
            raise ConfigError(f"the saved salient columns are of another adapter: there are none that fit {path}.")
        if variant.columns is None or variant.columns.tolist() != known:
            variant.columns, variant.rows = torch.tensor(known, device=layer.lora_A[adapter].weight.device), None
    _settle(model, adapter)


def check(model, adapter: str = "default") -> None:
    """Raise ConfigError where a layer's matrix A is not that of its salient columns."""
    for path, layer, variant, _ in layers_of(model, adapter):
        matrix = layer.lora_A[adapter].weight
        with gather_params_ctx([matrix], modifier_rank=None):
            fits = variant.columns is not None and torch.equal(_matrix_of(variant, matrix), matrix.detach())
        if not fits:
            raise ConfigError(
                f"adapter gift_sw: the matrix A of {path} is not that of the salient columns which are noted, so other "
                "columns would be trained than those without noise. Begin a new run, or resume one of this adapter."
            )


def find_columns(model) -> None:
    """Find the columns of a model's GIFT-SW adapters in their matrices A, of those that were loaded or copied."""
    for found in layers_of(model):
        _is_known(found)


def _is_known(found) -> bool:
    """Find an adapter's columns in its matrix A, of one that was loaded or copied; return whether there are any."""
    _, layer, variant, name = found
    if variant.columns is None:
        matrix = layer.lora_A[name].weight
        with gather_params_ctx([matrix], modifier_rank=None):
            if matrix.detach().any():
                variant.columns = matrix.detach().argmax(dim=1)
    return variant.columns is not None


def _settle(model, adapter: str, shared: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
    """Write each layer's A, and the size of its noise, from the columns; note them in the adapter's config."""
    config = model.peft_config[adapter]
    is_ours = isinstance(config, GiftSWConfig)
    for number, (path, layer, variant, _) in enumerate(layers_of(model, adapter)):
        weight, matrix = layer.get_base_layer().weight, layer.lora_A[adapter].weight
        if variant.rows is None and is_ours:
            with gather_params_ctx([weight], modifier_rank=None), torch.no_grad():
                full = weight.detach().float()
                columns = variant.columns.to(full.device)
                step = shared(salience.steps(full, columns, config.bits))
                variant.rows = RowNoise(step, columns, number, full)
        with gather_params_ctx([matrix], modifier_rank=0), torch.no_grad():
            # on ranks that hold a part, what is written by the first one counts
            matrix.copy_(_matrix_of(variant, matrix))
        if is_ours:
            config.salient[path] = variant.columns.tolist()


def one_hot(columns: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Return the matrix A (K, N) of columns (K,)."""
    made = torch.zeros(len(columns), width, dtype=dtype, device=columns.device)
    made[torch.arange(len(columns), device=columns.device), columns] = 1.0
    return made


def _matrix_of(variant, matrix: Tensor) -> Tensor:
    return one_hot(variant.columns.to(matrix.device), matrix.size(1), matrix.dtype)


def _norms_of_inputs(model, layers, sequences, config: GiftSWConfig, forward: Callable) -> list[Tensor]:
    """Return the norm (N,) of each input feature of the layers, over all tokens of the sequences."""
    norm = config.activation_norm if config.metric == "sensitivity" else float("inf")
    found = [salience.FeatureNorm(norm) for _ in layers]

    def measure(place):
        def hook(module, given):
            inputs = given[0].detach().flatten(0, -2)
            if len(inputs):
                found[place].add(inputs)

        return hook

    hooks = [
        layer.get_base_layer().register_forward_pre_hook(measure(place)) for place, (_, layer, *_) in enumerate(layers)
    ]
    device, count = layers[0][1].get_base_layer().weight.device, 0
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with (
            torch.no_grad(),
            model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext(),
        ):
            for ids in sequences:
                if len(ids):
                    forward(torch.tensor([ids], device=device))
                    count += 1
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    if not count:
        raise DataError("adapter gift_sw: there is no token to calibrate on; its columns are chosen by their inputs.")
    norms = [one.value() for one in found]
    for value, (path, *_) in zip(norms, layers, strict=True):
        if value is None:
            raise ConfigError(
                f"adapter gift_sw: no token of the {count} sequences of calibration reaches {path}. Give more "
                "calibration_rows, or leave it out of target_modules."
            )
    return [value.float() for value in norms]
