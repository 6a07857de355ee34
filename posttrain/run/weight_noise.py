"""GIFT-SW adapters in a run, whatever its family: what is refused, calibration, noise in a step, resumption."""

import itertools
import sys
from pathlib import Path

from accelerate.utils import broadcast
from transformers.integrations import is_deepspeed_zero3_enabled
from trl.models import prepare_deepspeed

from posttrain.adapters import SIDE_FILE, calibration
from posttrain.adapters.gift_sw import GiftSWConfig, file_share, layers_of
from posttrain.errors import ConfigError, ExcludedSetting
from posttrain.log import get_logger
from posttrain.mechanisms.noise.weights import WeightNoise
from posttrain.run.adapter_schemes import InRun
from posttrain.run.engines import under_fsdp


def kind_of(config: GiftSWConfig, args) -> str:
    """Return the noise of an adapter in a run: gaussian, uniform or none."""
    return ("gaussian" if args.weights_have_noise else "none") if config.noise == "auto" else config.noise


class SalientColumns(InRun):
    """Holds a run's GIFT-SW adapter: calibrates it, gives training steps its noise, and watches over both.

    Attributes:
        noise_kind: gaussian, uniform or none.
    """

    def __init__(self, trainer) -> None:
        """Calibrate the adapter of a trainer whose rows are tokenised, on its first rows; all ranks call it."""
        self._trainer, self._noise, self._watched = trainer, None, False
        model, config = trainer.model, trainer.model.peft_config["default"]
        self.noise_kind = kind_of(config, trainer.args)
        self._calibrate(model, config)
        if self.noise_kind != "none":
            self._noise = WeightNoise(trainer.args.seed, self.noise_kind)
            for _, layer, _, _ in layers_of(model, "default"):
                layer.weight_noise = self._noise
        get_logger().info(
            "adapter gift_sw: %d salient columns in each of %d layers, %s noise on the others; %.0f%% of the numbers "
            "in the adapter's file say which columns they are",
            config.r, len(config.salient), self.noise_kind, 100 * file_share(model),
        )  # fmt: skip

    @staticmethod
    def check(config, args) -> None:
        """Refuse settings beside weight noise under which it would not be what it says.

        Raises:
            ConfigError: FSDP, torch_compile, hidden noise, a recomputation of another random state.
        """
        if under_fsdp(args):
            raise ConfigError(
                "adapter gift_sw under FSDP, which leaves a layer a part of its weight: columns are chosen, and noise "
                "is drawn, by whole weights. Use DDP or ZeRO (configs/accelerate), or adapter: lora."
            )
        kind = kind_of(config, args)
        if kind == "none":
            return
        because = f"with adapter gift_sw, whose noise is {kind}"
        if args.torch_compile:
            raise ExcludedSetting(
                f"torch_compile is true {because}: it is there in some forwards only. Leave torch_compile out, or set "
                "`gift_noise: none`.",
                {"torch_compile": ()},
            )
        if (args.gradient_checkpointing_kwargs or {}).get("preserve_rng_state") is False:
            raise ConfigError(
                f"gradient_checkpointing_kwargs has preserve_rng_state false {because}: of the recomputed forward the "
                "noise would be the same, and whatever else is drawn in it another. Leave preserve_rng_state out."
            )
        if getattr(args, "adds_hidden_noise", False):
            raise ConfigError(
                f"hidden_noise is {args.hidden_noise} {because}: the clean pass would have it too. Set `gift_noise: "
                "none`, or `hidden_noise: none`."
            )

    def _calibrate(self, model, config) -> None:
        trainer, engine = self._trainer, None
        rows = itertools.islice(trainer.train_dataset, min(config.calibration_rows, sys.maxsize))
        device = trainer.accelerator.device

        def forward(ids):
            nonlocal engine
            if engine is None and is_deepspeed_zero3_enabled():
                # the weights lie in parts until the training engine is there
                engine = prepare_deepspeed(model, trainer.accelerator)
            return (engine or model)(input_ids=ids.to(device), use_cache=False)

        def shared(tensor):
            if trainer.accelerator.num_processes == 1:
                return tensor
            return broadcast(tensor.to(device), from_process=0)

        try:
            calibration.calibrate(model, trainer.calibration_ids(rows), forward=forward, shared=shared)
        finally:
            if engine is not None:
                engine.destroy()

    def know_copies(self) -> None:
        calibration.find_columns(self._trainer.model)

    def restore(self, checkpoint: Path) -> None:
        found = GiftSWConfig.read_saved(checkpoint)
        if found is None:
            raise ConfigError(
                f"the checkpoint {checkpoint} does not say which columns its adapter trains (no {SIDE_FILE} of "
                "gift_sw): it is of another kind of adapter."
            )
        calibration.restore(self._trainer.model, found["columns"])

    def whole(self, state_dict: dict) -> dict:
        model, found = self._trainer.accelerator.unwrap_model(self._trainer.model), dict(state_dict)
        names = {id(value): name for name, value in model.named_parameters()}
        for _, layer, variant, adapter in layers_of(model):
            matrix = layer.lora_A[adapter].weight
            name = names[id(matrix)]
            if name not in found or not found[name].numel():
                found[name] = calibration.one_hot(variant.columns.cpu(), layer.in_features, matrix.dtype)
        return found

    def on_train_begin(self, args, state, control, **kwargs):
        self._watched = False
        calibration.check(self._trainer.accelerator.unwrap_model(self._trainer.model))

    def during_step(self):
        if self._noise is None:
            return super().during_step()
        trainer = self._trainer
        if not self._watched:
            self._noise.measured = {}
        return self._noise.during_step(trainer.model, trainer.state.global_step)

    def after_step(self) -> None:
        if self._noise is None:
            return
        if not self._watched:
            self._check_measured()
        self._trainer._metrics["train"]["noise/weight_ratio"].append(self._noise.take_ratio())

    def _check_measured(self) -> None:
        measured, self._noise.measured, self._watched = self._noise.measured, None, True
        model, bits = self._trainer.accelerator.unwrap_model(self._trainer.model), None
        for path, _, variant, name in layers_of(model, "default"):
            bits = model.peft_config[name].bits
            found = measured.get(variant.rows.number)
            if found is None:
                # a layer that no token of this batch reaches, as an expert's
                continue
            noise, weight = found.tolist()
            ratio = (noise / max(weight, 1e-30)) ** 0.5
            if not 0 < ratio <= 1:
                size = "there is none" if not ratio > 0 else f"it has {ratio:.3g} times the norm of the weights"
                raise ConfigError(
                    f"adapter gift_sw: of the noise of {path} {size} ({bits} bits). Give more bits, or set "
                    "`gift_noise: none`."
                )
        if not measured:
            raise ConfigError(
                "adapter gift_sw: no layer has had noise in the first step, so the model's layers are not called as "
                "modules, or not within its own forward. Set `gift_noise: none`."
            )
