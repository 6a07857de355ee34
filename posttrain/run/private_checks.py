"""Checks of a private run on made-up tokens: they tell nothing of anyone's rows, so they may stop it."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from posttrain.errors import ConfigError, DivergedError
from posttrain.mechanisms.row_gradients import RowGradients
from posttrain.privacy.step import RowUnits
from posttrain.run.checks import evaluating

# gradients of a row with and without a neighbour differ by rounding alone: in fp32, and where anything has 8 bits
_EXACT, _ROUNDED = 1e-3, 0.1


def check_rows_apart(trainer, gradients: RowGradients, collated: Callable[[list[int]], tuple[dict, RowUnits]]) -> None:
    """Compare each made-up row's gradients in a batch of two with those that it has alone.

    Args:
        collated: gives a batch of some of the made-up rows, by their numbers, and to which of them its rows belong.

    Raises:
        ConfigError: they differ, so that the loss or the model couples rows, and clipping would bound nothing; or a
            module that does not get its input by rows.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ConfigError(
                f"{name} of the model is a {type(module).__name__}, which mixes the rows of a batch, so that no row's "
                "part in a step is bounded. Use a model without it."
            )
    with _aside(trainer), evaluating(model), trainer.plain_forward():
        together = _of_units(trainer, gradients, *collated([0, 1]))
        alone = [_of_units(trainer, gradients, *collated([row]))[0] for row in (0, 1)]
    exact = not trainer.args.bf16 and all(value.dtype == torch.float32 for value in model.parameters())
    tolerance = _EXACT if exact else _ROUNDED
    for row, expected in enumerate(alone):
        gap = (together[row] - expected).norm()
        if not gap <= tolerance * expected.norm():
            raise ConfigError(
                f"the gradients of a row change by {gap / expected.norm():.2g} of their norm with another row beside "
                "it in the batch (tried on made-up tokens): the model or its loss couples rows, so that clipping would "
                "not bound what one of them does. Use another model, or none of what mixes rows."
            )


def check_rows_reach(trainer, gradients: RowGradients, collated: Callable[[list[int]], tuple[dict, RowUnits]]) -> None:
    """Try on made-up tokens, as the run trains, whether every trained matrix gets gradients of rows.

    Raises:
        DivergedError: some get none, as they are not used, or as inputs do not require gradients where activations are
            computed anew. Not with `check_gradients: false`.
    """
    if not trainer.args.check_gradients:
        return
    was_training = trainer.model.training
    trainer.model.train()
    try:
        with _aside(trainer):
            found = _collect(trainer, gradients, collated([0, 1])[0])
    finally:
        trainer.model.train(was_training)
    # A has a gradient of zero as long as B is zero
    missing = [name for name in gradients.parameters if name not in found]
    missing += [name for name, rows in found.items() if ".lora_B." in name and not rows.any()]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise DivergedError(
            f"{len(missing)} of {len(gradients.parameters)} adapter tensors get no gradient of made-up rows: {shown}. "
            "They would move by the noise alone. With gradient checkpointing, the inputs must require gradients "
            "(`model.enable_input_require_grads()`); otherwise leave these modules out of lora_target_modules. If this "
            "is intended, set `check_gradients: false`."
        )


@contextlib.contextmanager
def _aside(trainer):
    """Leave random states, gradients and metrics as they are."""
    devices = [] if trainer.accelerator.device.type == "cpu" else [trainer.accelerator.device]
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        yield


def _collect(trainer, gradients: RowGradients, batch: dict) -> dict[str, Tensor]:
    with gradients.collected(len(batch["input_ids"])), trainer.compute_loss_context_manager():
        losses = trainer.unit_losses(trainer.model, batch)
        losses.sum().backward()
    return gradients.take()


def _of_units(trainer, gradients: RowGradients, batch: dict, units: RowUnits) -> list[Tensor]:
    """Return each unit's gradient over all matrices as one vector, in their order in the batch."""
    found = _collect(trainer, gradients, batch)
    rows = len(batch["input_ids"])
    flat = torch.cat(
        [
            (found[name] if name in found else p.new_zeros(rows, p.numel())).flatten(1).double()
            for name, p in gradients.parameters.items()
        ],
        dim=1,
    )
    return list(flat.new_zeros(len(units.numbers), flat.size(1)).index_add_(0, units.index.to(flat.device), flat))
