"""Settings of the trainer with noise."""

import math
from dataclasses import dataclass
from typing import ClassVar

from trl import SFTConfig

from posttrain.checks import check_choice
from posttrain.config.setting import setting
from posttrain.errors import ConfigError, ExcludedSetting
from posttrain.mechanisms.noise.draws import KINDS
from posttrain.objectives.consistency import MODES
from posttrain.trainers.sft.config import InstructionConfig

_OF_HIDDEN = (
    "noise_layers", "noise_layer_count", "noise_calibration_rows", "hidden_noise_scale", "hidden_noise_base",
    "consistency_mode", "ce_weight", "consistency_weight", "consistency_temperature",
)  # fmt: skip
_OF_TOKENS = ("token_noise_length", "token_noise_prob", "token_noise_copies_special")
# what a loss has no term for
_IDLE_BY_MODE = {
    "full": (),
    "ce_kl": ("consistency_weight",),
    "ce_noisy": ("ce_weight", "consistency_weight", "consistency_temperature"),
    "kl_only": ("ce_weight", "consistency_weight"),
    "consistency_only": ("ce_weight", "consistency_weight"),
}


@dataclass(repr=False)
class NoisySFTConfig(InstructionConfig, SFTConfig):
    """Settings of `NoisySFTTrainer`: those of `trl.SFTConfig` and the ones below.

    Raises:
        ConfigError: (a ValueError) a value out of range, settings that exclude each other, or a TRL setting that this
            trainer does not use.
    """

    embedding_noise: str = setting(
        "none",
        "Noise on the input embeddings of the forward that is trained: none; neftune, uniform within noise_alpha / "
        "sqrt(L d) for a sequence of L tokens and d coordinates; uniform and gaussian, whose noise of a sequence has "
        "the norm noise_alpha; symnoise, signs times noise_alpha / sqrt(L d), added to one copy of each row and taken "
        "from another, which doubles the cost of a step.",
        identity="noise",
        card=lambda args: args.adds_noise,
    )
    noise_alpha: float = setting(
        5.0,
        "Strength of the noise; 0 for none. Published: 5 to 15.",
        identity="noise",
        card=lambda args: args.adds_noise,
    )

    length_mode: str = setting(
        "sequence",
        "What L is: sequence, the tokens of each sequence itself; tensor, the width of the batch, as transformers' "
        "neftune_noise_alpha has it, bit for bit, drawn from the global generator: for embedding_noise: neftune.",
        identity="noise",
        card=lambda args: args.adds_noise and args.length_mode != "sequence",
    )

    hidden_noise: str = setting(
        "none",
        "Noise on hidden states in passes beside the clean one, whose predictions are to agree with it: none, or "
        "noisefit, which costs up to three times a step.",
        identity="hidden",
        card=lambda args: args.hidden_noise != "none",
    )
    noise_layers: str | list[str] | list[int] = setting(
        "snr_high",
        "Decoder layers that hidden noise is added behind: snr_high or snr_low, the noise_layer_count layers of the "
        "greatest or least ratio of signal to noise on noise_calibration_rows rows, found when training begins; auto, "
        "those whose noise moves the predictions most and cross-entropy little, each with a scale of its own; or "
        "numbers of layers from 0.",
        identity="hidden",
        card=lambda args: args.hidden_noise != "none",
    )
    noise_layer_count: int = setting(3, "How many layers noise_layers picks.", identity="hidden", card=True)
    noise_calibration_rows: int = setting(
        32, "Rows, from the first on, that noise_layers looks at.", identity="hidden", card=True
    )
    hidden_noise_scale: float = setting(
        0.1,
        "Scale of the hidden noise, in units of the median distance of a token's channels from their median.",
        identity="hidden",
        card=lambda args: args.hidden_noise != "none" and args.noise_layers != "auto",
    )
    hidden_noise_base: str = setting(
        "mad",
        "mad; or legacy, where hidden_noise_scale is multiplied by the standard deviation of the states, as version 1 "
        "of the published code does: in upper layers of many models that is noise of several times the states' norm.",
        identity="hidden",
        card=lambda args: args.hidden_noise_base != "mad",
    )
    consistency_mode: str = setting(
        "full",
        "The loss of hidden noise: full, ce_kl, ce_noisy, kl_only or consistency_only.",
        identity="hidden",
        card=lambda args: args.hidden_noise != "none",
    )
    ce_weight: float = setting(
        0.5,
        "Share of cross-entropy in the loss of hidden noise, from 0 to 1; the divergences from the clean pass have the "
        "rest.",
        identity="hidden",
        card=lambda args: args.hidden_noise != "none",
    )
    consistency_weight: float = setting(
        0.1,
        "Weight of the divergence between the two noisy passes.",
        identity="hidden",
        card=lambda args: args.hidden_noise != "none",
    )
    consistency_temperature: float = setting(
        1.0,
        "Temperature of the divergences, which are multiplied by its square.",
        identity="hidden",
        card=lambda args: args.hidden_noise != "none",
    )

    token_noise: str = setting(
        "none",
        "Noise on input tokens: none; or msn, which replaces a piece of each answer by tokens from in front of it and "
        "learns the answer as it is, so that the model can check several guessed tokens in one forward.",
        identity="tokens",
        card=lambda args: args.adds_token_noise,
    )
    token_noise_length: int = setting(
        5, "Tokens of a piece that token_noise replaces; 0 for none.", identity="tokens", card=True
    )
    token_noise_prob: float = setting(
        1.0, "Share of the sequences that token_noise falls on, from 0 to 1.", identity="tokens", card=True
    )
    token_noise_copies_special: bool = setting(
        True, "Whether special tokens of the prefix are copied into the piece as well.", identity="tokens", card=True
    )
    accepted_tokens_rows: int = setting(
        0,
        "Rows, from the first on, whose answers an evaluation generates greedily with posttrain.generation.jacobi; "
        "eval_accepted_tokens is the number of new tokens a forward. 0 for none.",
        identity=False,
        card=False,
    )
    accepted_tokens_length: int = setting(
        64, "New tokens of each row of accepted_tokens_rows, at most.", identity=False, card=False
    )

    weights_have_noise: ClassVar = True
    says: ClassVar = ("embedding_noise", "hidden_noise", "token_noise")

    @property
    def adds_noise(self) -> bool:
        """Whether any forward gets noise."""
        return self.embedding_noise != "none" and self.noise_alpha > 0

    @property
    def noise(self) -> str | None:
        """The noise in words, which a resumed run must share; None where there is none."""
        if not self.adds_noise:
            return None
        alpha, by = f"{self.noise_alpha:g}", "" if self.length_mode == "sequence" else f" by {self.length_mode}"
        return f"{self.embedding_noise} {alpha if float(alpha) == self.noise_alpha else repr(self.noise_alpha)}{by}"

    @property
    def adds_hidden_noise(self) -> bool:
        """Whether the loss is any other than that of one clean pass."""
        if self.hidden_noise == "none":
            return False
        silent = self.hidden_noise_scale == 0
        if self.consistency_mode == "ce_noisy":
            return not silent
        no_consistency = self.consistency_mode == "ce_kl" or silent or self.consistency_weight == 0
        return not (self.consistency_mode in ("full", "ce_kl") and self.ce_weight == 1 and no_consistency)

    @property
    def adds_any_noise(self) -> bool:
        """Whether embeddings or hidden states get noise."""
        return self.adds_noise or self.adds_hidden_noise

    @property
    def hidden(self) -> str | None:
        """The hidden noise in words, which a resumed run must share; None where there is none."""
        if not self.adds_hidden_noise:
            return None
        loss = (
            f"{self.consistency_mode} {self.ce_weight!r} {self.consistency_weight!r} {self.consistency_temperature!r}"
        )
        layers = self.noise_layers
        if isinstance(layers, str):
            count = "" if layers == "auto" else f" {self.noise_layer_count}"
            layers = f"{layers}{count} of {self.noise_calibration_rows} rows"
        return f"{self.hidden_noise} {self.hidden_noise_scale!r} {self.hidden_noise_base} behind {layers}, {loss}"

    @property
    def adds_token_noise(self) -> bool:
        """Whether any token may be replaced."""
        return self.token_noise != "none" and self.token_noise_length > 0 and self.token_noise_prob > 0

    @property
    def tokens(self) -> str | None:
        """The noise on tokens in words, which a resumed run must share; None where there is none."""
        if not self.adds_token_noise:
            return None
        copied = "" if self.token_noise_copies_special else ", no special token copied"
        return f"{self.token_noise}, {self.token_noise_length} tokens of a share of {self.token_noise_prob!r}{copied}"

    def _have_no_effect(self, names: tuple[str, ...], because: str, other: str | None = None) -> None:
        """Refuse those of some settings that another one leaves without effect; `other`: its value that would not."""
        value = getattr(self, because)
        for name in names:
            # a copy, by dataclasses.replace for one, gives every field
            own, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if own != default:
                remedy = f"Set `{because}: {other}`, or leave {name} out" if other else f"Leave {name} out"
                text = f"{own:g}" if isinstance(own, float) else f"{own}"
                message = f"{name} is {text}, which has no effect on {because}: {value}. {remedy}."
                self._has_no_effect(name, default, (because,), message)

    def _read_tokens(self):
        check_choice("token_noise", self.token_noise, ("none", "msn"))
        for name, least in (("token_noise_length", 0), ("accepted_tokens_rows", 0), ("accepted_tokens_length", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of {least} or more.")
        value = self.token_noise_prob
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ConfigError(f"token_noise_prob is {value!r}; it must be a number from 0 to 1.")
        if self.token_noise == "none":
            self._have_no_effect(_OF_TOKENS, "token_noise", "msn")
        if not self.accepted_tokens_rows:
            self._have_no_effect(("accepted_tokens_length",), "accepted_tokens_rows")
        if not self.adds_token_noise:
            return
        others = (("embedding_noise", self.adds_noise), ("hidden_noise", self.hidden_noise != "none"))
        for name, is_set in others:
            if is_set:
                raise ExcludedSetting(
                    f"token_noise is {self.token_noise} with {name}: {getattr(self, name)}; a run has noise of one "
                    "kind. Set one of them to none.",
                    {"token_noise": (name,), name: ("token_noise",)},
                )
        if self.packing and self.packing_strategy in ("wrapped", "bfd_split"):
            raise ExcludedSetting(
                f"packing_strategy is {self.packing_strategy} with token_noise: {self.token_noise}: it cuts rows in "
                "two, and the second part's prompt is not known. Set `packing_strategy: bfd`.",
                {"packing_strategy": ("token_noise",)},
            )
        if self.torch_compile:
            raise ExcludedSetting(
                f"torch_compile is true with token_noise: {self.token_noise}, whose pieces have other lengths in each "
                "step. Leave torch_compile out.",
                {"torch_compile": ("token_noise",)},
            )

    def _read_hidden(self):
        check_choice("hidden_noise", self.hidden_noise, ("none", "noisefit"))
        check_choice("hidden_noise_base", self.hidden_noise_base, ("mad", "legacy"))
        check_choice("consistency_mode", self.consistency_mode, MODES)
        layers = self.noise_layers
        if isinstance(layers, list) and len(layers) == 1 and isinstance(layers[0], str):
            # as a command line gives one word
            layers = self.noise_layers = layers[0]
        if isinstance(layers, str) and layers not in ("snr_high", "snr_low", "auto"):
            layers = layers.strip("[]").replace(",", " ").split()
        if not isinstance(layers, str):
            try:
                layers = self.noise_layers = sorted({int(str(layer)) for layer in layers})
            except (TypeError, ValueError):
                layers = []
            if not layers or layers[0] < 0:
                raise ConfigError(
                    f"noise_layers is {self.noise_layers!r}; it must be snr_high, snr_low, auto, or numbers of layers "
                    "from 0."
                )
        for name, least in (("noise_layer_count", 1), ("noise_calibration_rows", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} is {value!r}; it must be a whole number of {least} or more.")
        numbers = (
            ("hidden_noise_scale", 0, math.inf), ("ce_weight", 0, 1), ("consistency_weight", 0, math.inf),
            # beyond, logits over it are all alike, or no numbers
            ("consistency_temperature", 0.001, 1000),
        )  # fmt: skip
        for name, low, high in numbers:
            value = getattr(self, name)
            good = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
            if not good or not low <= value <= high:
                wanted = f"from {low} to {high}" if high < math.inf else f"from {low} on"
                raise ConfigError(f"{name} is {value!r}; it must be a number {wanted}.")
        if self.hidden_noise == "none":
            self._have_no_effect(_OF_HIDDEN, "hidden_noise", "noisefit")
            return
        self._have_no_effect(_IDLE_BY_MODE[self.consistency_mode], "consistency_mode")
        if self.noise_layers == "auto":
            # it finds number and scales of the layers by itself
            self._have_no_effect(("hidden_noise_scale", "noise_layer_count"), "noise_layers")
        elif not isinstance(self.noise_layers, str):
            self._have_no_effect(("noise_layer_count", "noise_calibration_rows"), "noise_layers")
        if self.noise_layers == "auto" and self.hidden_noise_base != "mad":
            raise ConfigError(
                f"hidden_noise_base is {self.hidden_noise_base} with noise_layers: auto, which finds the scales by "
                "itself. Leave hidden_noise_base out."
            )
        if self.adds_noise:
            raise ExcludedSetting(
                f"hidden_noise is {self.hidden_noise} with embedding_noise: {self.embedding_noise}; the clean pass "
                "would have noise. Set one of them to none.",
                {"hidden_noise": ("embedding_noise",), "embedding_noise": ("hidden_noise",)},
            )
        refused = (
            ("loss_type", self.loss_type == "dft", "whose loss is made of whole log-probabilities of one pass"),
            ("label_smoothing_factor", bool(self.label_smoothing_factor), "which needs the logits of one pass"),
            ("torch_compile", bool(self.torch_compile), "which is added by hooks that are there in some forwards only"),
        )
        for name, is_set, why in refused:
            if is_set:
                raise ExcludedSetting(
                    f"{name} is {getattr(self, name)} with hidden_noise: {self.hidden_noise}, {why}. Leave {name} out.",
                    {name: ("hidden_noise",)},
                )
        if self.packing and self.packing_strategy == "wrapped":
            raise ExcludedSetting(
                f"packing_strategy is wrapped with hidden_noise: {self.hidden_noise}: such rows do not tell where a "
                "sequence begins, by whose states the noise is scaled. Set `packing_strategy: bfd`.",
                {"packing_strategy": ("hidden_noise",)},
            )

    def _check_resolved(self):
        if (self.gradient_checkpointing_kwargs or {}).get("preserve_rng_state") is False and self.adds_any_noise:
            raise ConfigError(
                "gradient_checkpointing_kwargs has preserve_rng_state false beside noise: of the recomputed forward "
                "the noise would be the same, and whatever else is drawn in it another. Leave preserve_rng_state out."
            )

    def check_model(self, model, config, peft_config=None, eval_dataset=None) -> None:
        from posttrain.trainers.sft import token_noise

        token_noise.check_accepted(model, self, config, peft_config, eval_dataset)
        if self.hidden_noise != "none":
            self.check_layers(getattr(config.get_text_config(), "num_hidden_layers", None) or math.inf)

    def check_layers(self, layers: float) -> None:
        """Refuse `noise_layers` that a model of so many decoder layers has not."""
        wanted = self.noise_layers
        if isinstance(wanted, list) and wanted[-1] >= layers:
            raise ConfigError(
                f"noise_layers names layer {wanted[-1]}, and the model has {layers} decoder layers, from 0 on."
            )
        if wanted in ("snr_high", "snr_low") and self.noise_layer_count > layers:
            raise ConfigError(
                f"noise_layer_count is {self.noise_layer_count}, and the model has {layers} decoder layers."
            )

    def _read(self):
        if self.neftune_noise_alpha is not None:
            raise ConfigError(
                f"neftune_noise_alpha is {self.neftune_noise_alpha}, whose noise falls on every forward in training "
                "mode and shrinks with padding and packing. Use embedding_noise instead: `embedding_noise: neftune` "
                f"and `noise_alpha: {self.neftune_noise_alpha}`."
            )
        check_choice("embedding_noise", self.embedding_noise, ("none", *KINDS))
        check_choice("length_mode", self.length_mode, ("sequence", "tensor"))
        if self.length_mode == "tensor" and self.embedding_noise != "neftune":
            raise ExcludedSetting(
                f"length_mode is tensor with embedding_noise: {self.embedding_noise}; by the width of the batch there "
                "is transformers' NEFTune alone. Set `embedding_noise: neftune`, or leave length_mode out.",
                {"length_mode": ("embedding_noise",)},
            )
        alpha = self.noise_alpha
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha < math.inf:
            raise ConfigError(f"noise_alpha is {alpha!r}; it must be a number of 0 or more.")
        if self.embedding_noise == "none" and alpha > 0:
            self._have_no_effect(("noise_alpha",), "embedding_noise", "neftune")
        self._read_hidden()
        self._read_tokens()
        if not self.adds_noise:
            return
        if self.packing and self.packing_strategy == "wrapped":
            raise ExcludedSetting(
                f"packing_strategy is wrapped with embedding_noise: {self.embedding_noise}: such rows do not tell "
                "where a sequence begins, and the noise goes by its length. Set `packing_strategy: bfd`.",
                {"packing_strategy": ("embedding_noise",)},
            )
        if self.torch_compile:
            raise ExcludedSetting(
                f"torch_compile is true with embedding_noise: {self.embedding_noise}, which is added by a hook that is "
                "there in some forwards only. Leave torch_compile out.",
                {"torch_compile": ("embedding_noise",)},
            )
