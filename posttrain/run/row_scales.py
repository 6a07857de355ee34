"""ALLoRA adapters in a run, whatever its family: what is refused, factors in the log, updates that are scaled."""

import torch
from peft.utils.integrations import gather_params_ctx

from posttrain.adapters.allora import layers_of
from posttrain.adapters.scaled_updates import ScaledUpdates
from posttrain.errors import ConfigError
from posttrain.log import get_logger
from posttrain.mechanisms.spread_weights import gathered
from posttrain.objectives.row_scales import row_norms
from posttrain.run.adapter_schemes import InRun, attach
from posttrain.run.engines import under_deepspeed, under_fsdp

# Optimizers whose update is linear in the gradients, by package and class, and transformers' own names of such ones.
# pytorch_optimizer's ASGD, another than torch's, has a rate by the gradients' sizes, and its SGDSaI by their spread.
_KEEP_THE_SIZE = frozenset({
    "sgd", "schedule_free_sgd", "lomo",
    "torch:sgd", "torch:asgd", "bitsandbytes:sgd", "schedulefree:sgdschedulefree", "lomo_optim:lomo",
    *(f"pytorch_optimizer:{name}" for name in "accsgd aggmo lomo pid qhm schedulefreesgd sgd sgdw".split()),
})  # fmt: skip


class RowScales(InRun):
    """Holds a run's ALLoRA adapter: logs its factors, scales updates where that is its form, and watches over it."""

    def __init__(self, trainer) -> None:
        self._trainer, self._scaled, self._measured_at, self._is_told = trainer, None, None, False
        # one that the trainer was given, in the place of `optim`
        self._given = getattr(trainer, "optimizer", None)
        self._config = trainer.model.peft_config["default"]
        get_logger().info(
            "adapter allora: %d layers, eta %g, of the %s",
            len(layers_of(trainer.model, "default")), self._config.eta,
            "gradients of A and B" if self._config.form == "gradient" else "optimizer's update of B",
        )  # fmt: skip

    @staticmethod
    def check(config, args) -> None:
        if config.form != "update":
            return
        if under_deepspeed(args):
            raise ConfigError(
                "allora's form is update under DeepSpeed, whose optimizer steps on parts of the weights. Set "
                "`allora_form: gradient`, or use DDP (configs/accelerate)."
            )
        if under_fsdp(args):
            raise ConfigError(
                "allora's form is update under FSDP, whose optimizer steps on parts of the weights. Set `allora_form: "
                "gradient`, or use DDP (configs/accelerate)."
            )
        if args.weight_decay:
            raise ConfigError(
                f"weight_decay is {args.weight_decay} with allora's form update, which would scale the decay of B as "
                "well. Set `weight_decay: 0`, or `allora_form: gradient`."
            )
        name = _name_of(args.optim)
        if "lomo" in name or name.endswith("layerwise"):
            raise ConfigError(
                f"optim is {name} with allora's form update; it updates weights within backward, where nothing scales "
                "them. Choose another, or set `allora_form: gradient`."
            )

    def know_copies(self) -> None:
        attach(self._trainer.model)

    @property
    def _model(self):
        return self._trainer.accelerator.unwrap_model(self._trainer.model)

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        self._layers, self._steps_before = layers_of(self._model, "default"), 0
        self._check_apart()
        # of a training that an error ended
        self.on_train_end(args, state, control)
        if self._config.form == "gradient":
            self._warn_of_adam(args)
        else:
            self._scaled = ScaledUpdates(self._model, optimizer)

    def on_train_end(self, args, state, control, **kwargs):
        if self._scaled is not None:
            self._scaled.remove()
            self._scaled = None

    def on_step_begin(self, args, state, control, **kwargs):
        self._check_apart()
        self._steps_before = self._scaled.steps if self._scaled is not None else 0

    def on_step_end(self, args, state, control, **kwargs):
        if self._scaled is not None and not self._trainer.accelerator.optimizer_step_was_skipped:
            if self._scaled.steps == self._steps_before:
                raise ConfigError(
                    f"allora's form is update, and the optimizer ({type(self._trainer.optimizer).__name__}) steps "
                    "without the hooks of torch's. Choose another `optim`, or set `allora_form: gradient`."
                )
        self._log_where_due(state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._log_where_due(state, control)

    def _check_apart(self) -> None:
        merged = [path for path, layer, _, name in self._layers if name in layer.merged_adapters]
        if merged:
            raise ConfigError(
                f"adapter allora is merged into the base ({merged[0]}), so that it would not be trained. Call "
                "unmerge_adapter() first."
            )

    def _warn_of_adam(self, args) -> None:
        name, kind = _name_of(args.optim), self._trainer.optimizer_cls_and_kwargs
        package, _, known = name.rpartition(":")
        if self._given is not None or kind is not None:
            made = type(self._given) if kind is None else kind[0]
            package, name = made.__module__, made.__name__
            known = name
        if not keeps_the_size(package, known):
            get_logger().warning(
                "adapter allora with optim %s: an optimizer that divides a gradient by its own size, as Adam does, "
                "nearly undoes the factors of its rows. Use `optim: sgd`, or scale the updates: `allora_form: update`",
                name,
            )

    def _log_where_due(self, state, control) -> None:
        """Put the factors of the weights, as they are after the step, into the step's log, on all ranks."""
        if not control.should_log or self._measured_at == state.global_step:
            return
        self._measured_at = state.global_step
        norms, etas = [], []
        for _, layer, variant, name in self._layers:
            weights = [layer.lora_A[name].weight, layer.lora_B[name].weight]
            with gather_params_ctx(weights, modifier_rank=None):
                whole = [gathered(weight.detach()) for weight in weights]
                if not all(weight.dim() == 2 and type(weight) is torch.Tensor for weight in whole):
                    return self._tell_of_parts()
                norms.append(row_norms(*whole))
                etas.append(torch.full_like(norms[-1], variant.eta))
        found = torch.cat([part.to(norms[0].device) for part in norms])
        scales = (found + torch.cat([part.to(norms[0].device) for part in etas]) ** -2).rsqrt()
        means = torch.stack([scales.min(), scales.mean(), scales.max(), found.mean()]).tolist()
        names = ("allora/scale_min", "allora/scale_mean", "allora/scale_max", "allora/row_norm_mean")
        for name, value in zip(names, means, strict=True):
            self._trainer._metrics["train"][name].append(value)

    def _tell_of_parts(self) -> None:
        if not self._is_told:
            self._is_told = True
            get_logger().info("adapter allora: no factors in the log, as the weights lie in parts between steps")


def keeps_the_size(package: str, name: str) -> bool:
    """Return whether an optimizer's update is linear in the gradients, as far as it is known.

    `package`: of its class, or the module in it; empty for a name of transformers.
    """
    package = package.split(".")[0]
    return (f"{package}:{name}" if package else name).lower() in _KEEP_THE_SIZE


def _name_of(optim) -> str:
    return str(getattr(optim, "value", optim))
