"""Settings of the trainer with noise."""

import math
from dataclasses import dataclass, fields
from typing import ClassVar

from trl import SFTConfig

from posttrain.config.setting import setting
from posttrain.errors import ConfigError
from posttrain.privacy.config import PrivacyConfig
from posttrain.trainers.sft import setting_checks
from posttrain.trainers.sft.config import InstructionConfig
from posttrain.trainers.sft.dp_sft_config import DPSFTConfig


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

    def as_private(self, privacy: PrivacyConfig) -> DPSFTConfig:
        """Return the same settings of `DPSFTTrainer`, which has no noise but that of the promise.

        Raises ConfigError for settings with which rows are not apart, or that it does not have.
        """
        if not isinstance(privacy, PrivacyConfig) or isinstance(privacy, InstructionConfig):
            raise ConfigError(f"privacy is a {type(privacy).__name__}; it must be a PrivacyConfig.")
        known = DPSFTConfig.__dataclass_fields__
        for name in sorted(self._written - known.keys()):
            raise ConfigError(
                f"{name} is {getattr(self, name)!r}, which a private run does not have. Leave {name} out."
            )
        given = {name: getattr(self, name) for name in self._written}
        made = DPSFTConfig(**given, **{entry.name: getattr(privacy, entry.name) for entry in fields(PrivacyConfig)})
        made.model_init_kwargs = self.model_init_kwargs
        made.model_settings = getattr(self, "model_settings", None)
        return made

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
            layers = getattr(config.get_text_config(), "num_hidden_layers", None) or math.inf
            setting_checks.check_layers(self, layers)

    def _read(self):
        setting_checks.check_noise(self)
