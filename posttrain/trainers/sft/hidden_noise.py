"""Hidden noise in a run of SFTTrainer: what it refuses, the layers it takes, and how much of it there is."""

import contextlib
import functools
import itertools
import math

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from posttrain.errors import ConfigError
from posttrain.log import get_logger
from posttrain.mechanisms.dropout import drops_out, fields_above_zero
from posttrain.mechanisms.noise import calibration, draws, hidden
from posttrain.mechanisms.noise.controller import innermost
from posttrain.mechanisms.noise.passes import NoisyPasses, settle
from posttrain.mechanisms.own_head import is_adapted
from posttrain.objectives.consistency import mode
from posttrain.trainers.sft import setting_checks

_WHERE = "Set `hidden_noise: none`"


class HiddenNoise(TrainerCallback):
    """Holds the passes of a trainer with hidden noise; chooses their layers when training begins.

    Attributes:
        passes: what is forwarded.
        chosen: numbers of the noisy layers; None until they are known.
        snr: ratio of signal to noise behind each layer, or its score, where the layers were chosen by it.
        bases: scale of the noise behind each of them, where they differ.
    """

    def __init__(self, trainer) -> None:
        args, model = trainer.args, trainer.model
        self._trainer, self.chosen, self.snr, self.bases = trainer, None, None, None
        layers = len(hidden.decoder_layers(model))
        self._check(trainer, layers)
        if not isinstance(args.noise_layers, str):
            self.chosen = list(args.noise_layers)
        weights = mode(args.consistency_mode, args.ce_weight, args.consistency_weight)
        by_std = args.hidden_noise_base == "legacy"
        self.passes = NoisyPasses(
            self.chosen or [], args.hidden_noise_scale, weights, args.consistency_temperature, args.seed, by_std
        )
        self.passes.give(model)

    @staticmethod
    def _check(trainer, layers: int) -> None:
        args, model = trainer.args, trainer.model
        for adapter in getattr(model, "peft_config", {}).values():
            if adapter.is_prompt_learning:
                raise ConfigError(
                    f"the adapter is {adapter.peft_type.value}, whose virtual tokens move all others. Use LoRA. "
                    f"{_WHERE} otherwise."
                )
            if getattr(adapter, "lora_dropout", 0.0):
                raise ConfigError(
                    f"lora_dropout is {adapter.lora_dropout} with hidden_noise: {args.hidden_noise}; the passes would "
                    "differ by chance and not by their noise alone. Set `lora_dropout: 0`."
                )
        if drops_out(model):
            fields = fields_above_zero(model)
            rates = ", ".join(f"{name} {rate}" for name, rate in fields.items()) or "in its modules"
            remedy = ", ".join(f"{name}: 0.0" for name in fields or ("dropout",))
            raise ConfigError(
                f"the model has dropout of its own ({rates}) with hidden_noise: {args.hidden_noise}; the passes would "
                f"differ by chance and not by their noise alone. Set `model_init_kwargs: {{{remedy}}}`, or the "
                "config's fields before the model is built."
            )
        if is_adapted(innermost(model)):
            raise ConfigError(
                f"an adapter sits on the output embedding, past which the loss of hidden noise reads. {_WHERE}, or "
                "leave the output embedding out of the adapter's modules."
            )
        if trainer.aux_loss_enabled:
            raise ConfigError(
                "router_aux_loss_coef has a mixture of experts' auxiliary loss added, which several passes of a row "
                f"would have several times. {_WHERE}, or router_aux_loss_coef to 0."
            )
        if trainer.compute_loss_func is not None:
            raise ConfigError(f"compute_loss_func is given, in the place of the loss of hidden noise. {_WHERE}.")
        setting_checks.check_layers(args, layers)

    def on_train_begin(self, args, state, control, **kwargs):
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        if self.chosen is None and args.noise_layers == "auto":
            with self._rows(model) as batches:
                measured = calibration.measure(model, batches, args.seed)
            found = [calibration.choose(*measured)]
            broadcast_object_list(found)
            size = innermost(model).config.get_text_config().hidden_size
            self.chosen, self.snr = found[0].layers, found[0].scores
            self.bases = [factor / math.sqrt(size) for factor in found[0].factors]
            get_logger().info(
                "noise behind the decoder layers %s, of scales %s; score of each layer: %s",
                ", ".join(map(str, self.chosen)), ", ".join(f"{base:.3g}" for base in self.bases),
                ", ".join(f"{value:.3g}" for value in self.snr),
            )  # fmt: skip
        if self.chosen is None:
            self.snr = self._measured(model)
            high = args.noise_layers == "snr_high"
            sign = -1 if high else 1
            order = sorted(range(len(self.snr)), key=lambda layer: (sign * self.snr[layer], layer))
            self.chosen = sorted(order[: args.noise_layer_count])
            get_logger().info(
                "noise behind the decoder layers %s; signal to noise behind each: %s",
                ", ".join(map(str, self.chosen)),
                ", ".join(f"{value:.3g}" for value in self.snr),
            )
        self.passes.layers, self.passes.bases = list(self.chosen), self.bases
        settle(self.passes, model)

    @contextlib.contextmanager
    def _rows(self, model):
        """Give batches of the first rows, for a model that is in eval mode inside."""
        trainer, args = self._trainer, self._trainer.args
        rows = iter(itertools.islice(iter(trainer.train_dataset), args.noise_calibration_rows))

        def batches():
            while some := list(itertools.islice(rows, args.per_device_train_batch_size)):
                batch = trainer._prepare_inputs(trainer.data_collator(some))
                yield {name: value for name, value in batch.items() if name != "row_lengths"}

        was_training = model.training
        model.eval()
        try:
            yield batches()
        finally:
            model.train(was_training)

    @torch.no_grad()
    def _measured(self, model) -> list[float]:
        """Return the ratio of signal to noise behind each layer, on the first rows; the same on all ranks."""
        layers, passes = hidden.decoder_layers(model), self.passes
        sums = [torch.zeros(3, dtype=torch.float64) for _ in layers]
        found = None

        def measure(number, module, given, output):
            states = output[0] if isinstance(output, tuple) else output
            made = hidden.signal_and_noise(states.flatten(0, 1), found, passes.base, passes.by_std)
            sums[number] += made.cpu()

        hooks = [layer.register_forward_hook(functools.partial(measure, number)) for number, layer in enumerate(layers)]
        try:
            with self._rows(model) as batches:
                for batch in batches:
                    del batch["labels"]
                    found = draws.sequences(batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids"))
                    # the whole model is called, as FSDP gathers weights in its forward
                    model(**batch, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        told = [[hidden.ratio(one) for one in sums]]
        broadcast_object_list(told)
        return told[0]

    def check_ratio(self) -> None:
        """Raise ConfigError where the noise of the last forward is none, or greater than the states."""
        if self.passes.bases is None and self.passes.base == 0:
            return
        noise, states = self.passes.squares.unbind(dim=1)
        ratios = (noise / states.clamp(min=1e-30)).sqrt().tolist()
        for number, (layer, ratio) in enumerate(zip(self.passes.layers, ratios, strict=True)):
            if not 0 < ratio <= 1:
                size = (
                    "there is no noise" if not ratio > 0 else f"the noise has {ratio:.3g} times the norm of the states"
                )
                raise ConfigError(
                    f"behind decoder layer {layer} {size} (hidden_noise_scale {self.passes.base_of(number):.3g}"
                    f"{', hidden_noise_base legacy' if self.passes.by_std else ''}). Change hidden_noise_scale or "
                    "noise_layers."
                )

    def state(self) -> dict:
        """Return the layers and the table that they were chosen by, for a checkpoint."""
        return {"noise_layers": self.chosen, "noise_snr": self.snr, "noise_scales": self.bases}

    def found(self) -> dict[str, list]:
        """Return the layers and the table that they were chosen by, by name, for card and report."""
        by = "score of each layer" if self.bases else "signal to noise behind each layer"
        found = {"noisy layers": self.chosen, by: self.snr, "scales of their noise": self.bases}
        return {name: value for name, value in found.items() if value is not None}

    def restore(self, state: dict) -> None:
        """Take over what `state` returned."""
        if state.get("noise_layers") is not None:
            self.chosen, self.snr = list(state["noise_layers"]), state.get("noise_snr")
            self.bases = state.get("noise_scales")

    def add_metrics(self, means) -> None:
        """Add the terms of the last forward, and its noise, to the means of training."""
        scored = self.passes.scored
        count = len(scored.log_probs)
        for name, term in zip(("clean", "noisy", "divergence", "consistency"), scored.terms, strict=True):
            weight = getattr(self.passes.weights, name)
            if weight or name == "clean":
                means.add_sum(f"noise/{name}", term.sum(), count)
        means.add_sum("noise/ratio", *self.passes.take_squares().sum(dim=0))
