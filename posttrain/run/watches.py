"""Watches over a run: a loss that is no number, adapters that get no gradient."""

from pathlib import Path

import torch

from posttrain.errors import DivergedError
from posttrain.log import get_logger
from posttrain.mechanisms.spread_weights import own_part


class FiniteLoss:
    """Stops all ranks together, before the optimiser step that would use a loss that is NaN or infinite."""

    def __init__(self) -> None:
        self._bad: torch.Tensor | None = None

    def watch(self, trainer, loss: torch.Tensor) -> None:
        """Note a micro-batch's loss before its backward.

        Under DeepSpeed the optimiser steps inside the window's last backward, and what rules over a step's gradients
        reads them within it: before those is the last moment to `ask`.
        """
        bad = ~torch.isfinite(loss.detach())
        self._bad = bad if self._bad is None else self._bad | bad
        if trainer.is_deepspeed_enabled or trainer.reads_gradients_in_steps:
            self.ask(trainer)

    def ask(self, trainer) -> None:
        """Ask all ranks behind a window's last micro-batch; waits for the device, which has its backward by then.

        Raises:
            DivergedError: on every rank, if any rank saw such a loss. The weights, still finite, are saved first.
        """
        if self._bad is None or not trainer.accelerator.sync_gradients:
            return
        flag, self._bad = self._bad.float(), None
        if trainer.accelerator.reduce(flag, reduction="sum").item() > 0:
            stop(trainer, "the loss")


def stop(trainer, what: str) -> None:
    """Save the weights if they are finite and raise DivergedError; called by all ranks."""
    trainer.put_weights_back()
    step = trainer.state.global_step + 1
    folder = Path(trainer.args.output_dir) / f"last-finite-{step - 1}"
    trained = [own_part(p.detach()) for p in trainer.model.parameters() if p.requires_grad]
    weights = torch.stack([torch.isfinite(values).all() for values in trained])
    finite = bool(trainer.accelerator.reduce((~weights.all()).float(), reduction="sum").item() == 0)
    if finite:
        trainer.save_model(str(folder), _internal_call=True)
    saved = (
        f"the weights after step {step - 1} are in {folder}" if finite else "the weights are no longer finite either"
    )
    raise DivergedError(
        f"{what} became NaN or infinite at step {step}; {saved}. A lower learning_rate, a lower max_grad_norm or "
        "bf16 instead of fp16 usually helps; `posttrain data inspect` shows the rows."
    )


class LiveGradients:
    """Stops a run in which some adapter tensor gets no gradient in its first two steps.

    Gradient checkpointing over frozen embeddings, or target modules that the forward never reaches, leave adapters
    untrained without a word. Watches the gradients themselves, as weight decay alone also moves weights.
    """

    def __init__(self, model) -> None:
        # single tokens get a gradient where the data holds them, which the first steps may not
        watched = {
            name: p for name, p in model.named_parameters() if p.requires_grad and "trainable_tokens_delta" not in name
        }
        self._seen, self._watched = dict.fromkeys(watched), watched
        self._hooks = [
            p.register_hook(lambda gradient, name=name: self._note(name, gradient)) for name, p in watched.items()
        ]
        self._steps = 0
        self._learning_rate = 0.0
        self._begun = 0

    def _note(self, name: str, gradient: torch.Tensor) -> None:
        # of weights that FSDP spreads a hook may be called too
        has_gradient = own_part(gradient.detach()).ne(0).any()
        known = self._seen[name]
        self._seen[name] = has_gradient if known is None else known | has_gradient

    def after_backward(self, trainer) -> None:
        """Note the gradients of weights that FSDP spreads, whose hooks are never called; after each backward."""
        if not trainer.is_fsdp_enabled or not trainer.accelerator.sync_gradients:
            return
        for name, parameter in self._watched.items():
            if parameter.grad is not None:
                self._note(name, parameter.grad)

    def before_step(self, trainer) -> None:
        """Note the learning rate of the step to come."""
        self._learning_rate = trainer.optimizer.param_groups[0]["lr"]
        self._begun = trainer.state.global_step

    def after_step(self, trainer) -> bool:
        """Count a step; after two that could move weights, stop or pass. Returns whether the watch is over.

        Raises:
            DivergedError: some tensor's gradient was zero throughout, on all ranks.
        """
        # LoRA's A has no gradient before B has moved, and in a warm-up the first rate is often 0; where the data is
        # over, no step was taken
        self._steps += self._learning_rate > 0 and trainer.state.global_step > self._begun
        if self._steps < 2:
            return False
        for hook in self._hooks:
            hook.remove()
        device = trainer.accelerator.device
        none = torch.zeros((), device=device)
        local = [none if seen is None else seen.to(none) for seen in self._seen.values()]
        seen = trainer.accelerator.reduce(
            torch.stack(local) if local else torch.zeros(0, device=device), reduction="sum"
        )
        untrained = [name for name, value in zip(self._seen, seen.tolist(), strict=True) if value == 0]
        if untrained:
            shown = ", ".join(untrained[:3]) + (f" and {len(untrained) - 3} more" if len(untrained) > 3 else "")
            raise DivergedError(
                f"{len(untrained)} of {len(self._seen)} adapter tensors got no gradient in the first two steps: {shown}"
                ". They would never train. With gradient checkpointing, the inputs must require gradients "
                "(`model.enable_input_require_grads()`); otherwise leave these modules out of lora_target_modules. "
                "If this is intended, set `check_gradients: false`."
            )
        get_logger().debug("all %d adapter tensors get gradients", len(self._seen))
        return True
