"""Which settings of noise are refused: out of range, without effect, or beside each other."""

import math

from posttrain.checks import check_choice
from posttrain.errors import ConfigError, ExcludedSetting
from posttrain.mechanisms.noise.draws import KINDS
from posttrain.objectives.consistency import MODES

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


def check_noise(args) -> None:
    """Refuse noise of a config that is out of range, without effect, or beside what it does not go with."""
    if args.neftune_noise_alpha is not None:
        raise ConfigError(
            f"neftune_noise_alpha is {args.neftune_noise_alpha}, whose noise falls on every forward in training "
            "mode and shrinks with padding and packing. Use embedding_noise instead: `embedding_noise: neftune` "
            f"and `noise_alpha: {args.neftune_noise_alpha}`."
        )
    check_choice("embedding_noise", args.embedding_noise, ("none", *KINDS))
    check_choice("length_mode", args.length_mode, ("sequence", "tensor"))
    if args.length_mode == "tensor" and args.embedding_noise != "neftune":
        raise ExcludedSetting(
            f"length_mode is tensor with embedding_noise: {args.embedding_noise}; by the width of the batch there "
            "is transformers' NEFTune alone. Set `embedding_noise: neftune`, or leave length_mode out.",
            {"length_mode": ("embedding_noise",)},
        )
    alpha = args.noise_alpha
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha < math.inf:
        raise ConfigError(f"noise_alpha is {alpha!r}; it must be a number of 0 or more.")
    if args.embedding_noise == "none" and alpha > 0:
        _refuse_idle(args, ("noise_alpha",), "embedding_noise", "neftune")
    check_hidden_noise(args)
    check_token_noise(args)
    if not args.adds_noise:
        return
    if args.packing and args.packing_strategy == "wrapped":
        raise ExcludedSetting(
            f"packing_strategy is wrapped with embedding_noise: {args.embedding_noise}: such rows do not tell "
            "where a sequence begins, and the noise goes by its length. Set `packing_strategy: bfd`.",
            {"packing_strategy": ("embedding_noise",)},
        )
    if args.torch_compile:
        raise ExcludedSetting(
            f"torch_compile is true with embedding_noise: {args.embedding_noise}, which is added by a hook that is "
            "there in some forwards only. Leave torch_compile out.",
            {"torch_compile": ("embedding_noise",)},
        )


def check_hidden_noise(args) -> None:
    """Refuse hidden noise as `check_noise` does."""
    check_choice("hidden_noise", args.hidden_noise, ("none", "noisefit"))
    check_choice("hidden_noise_base", args.hidden_noise_base, ("mad", "legacy"))
    check_choice("consistency_mode", args.consistency_mode, MODES)
    layers = args.noise_layers
    if isinstance(layers, list) and len(layers) == 1 and isinstance(layers[0], str):
        # as a command line gives one word
        layers = args.noise_layers = layers[0]
    if isinstance(layers, str) and layers not in ("snr_high", "snr_low", "auto"):
        layers = layers.strip("[]").replace(",", " ").split()
    if not isinstance(layers, str):
        try:
            layers = args.noise_layers = sorted({int(str(layer)) for layer in layers})
        except (TypeError, ValueError):
            layers = []
        if not layers or layers[0] < 0:
            raise ConfigError(
                f"noise_layers is {args.noise_layers!r}; it must be snr_high, snr_low, auto, or numbers of layers "
                "from 0."
            )
    for name, least in (("noise_layer_count", 1), ("noise_calibration_rows", 1)):
        value = getattr(args, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} is {value!r}; it must be a whole number of {least} or more.")
    numbers = (
        ("hidden_noise_scale", 0, math.inf), ("ce_weight", 0, 1), ("consistency_weight", 0, math.inf),
        # beyond, logits over it are all alike, or no numbers
        ("consistency_temperature", 0.001, 1000),
    )  # fmt: skip
    for name, low, high in numbers:
        value = getattr(args, name)
        good = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
        if not good or not low <= value <= high:
            wanted = f"from {low} to {high}" if high < math.inf else f"from {low} on"
            raise ConfigError(f"{name} is {value!r}; it must be a number {wanted}.")
    if args.hidden_noise == "none":
        _refuse_idle(args, _OF_HIDDEN, "hidden_noise", "noisefit")
        return
    _refuse_idle(args, _IDLE_BY_MODE[args.consistency_mode], "consistency_mode")
    if args.noise_layers == "auto":
        # it finds number and scales of the layers by itself
        _refuse_idle(args, ("hidden_noise_scale", "noise_layer_count"), "noise_layers")
    elif not isinstance(args.noise_layers, str):
        _refuse_idle(args, ("noise_layer_count", "noise_calibration_rows"), "noise_layers")
    if args.noise_layers == "auto" and args.hidden_noise_base != "mad":
        raise ConfigError(
            f"hidden_noise_base is {args.hidden_noise_base} with noise_layers: auto, which finds the scales by "
            "itself. Leave hidden_noise_base out."
        )
    if args.adds_noise:
        raise ExcludedSetting(
            f"hidden_noise is {args.hidden_noise} with embedding_noise: {args.embedding_noise}; the clean pass "
            "would have noise. Set one of them to none.",
            {"hidden_noise": ("embedding_noise",), "embedding_noise": ("hidden_noise",)},
        )
    refused = (
        ("loss_type", args.loss_type == "dft", "whose loss is made of whole log-probabilities of one pass"),
        ("label_smoothing_factor", bool(args.label_smoothing_factor), "which needs the logits of one pass"),
        ("torch_compile", bool(args.torch_compile), "which is added by hooks that are there in some forwards only"),
    )
    for name, is_set, why in refused:
        if is_set:
            raise ExcludedSetting(
                f"{name} is {getattr(args, name)} with hidden_noise: {args.hidden_noise}, {why}. Leave {name} out.",
                {name: ("hidden_noise",)},
            )
    if args.packing and args.packing_strategy == "wrapped":
        raise ExcludedSetting(
            f"packing_strategy is wrapped with hidden_noise: {args.hidden_noise}: such rows do not tell where a "
            "sequence begins, by whose states the noise is scaled. Set `packing_strategy: bfd`.",
            {"packing_strategy": ("hidden_noise",)},
        )


def check_token_noise(args) -> None:
    """Refuse token noise as `check_noise` does."""
    check_choice("token_noise", args.token_noise, ("none", "msn"))
    for name, least in (("token_noise_length", 0), ("accepted_tokens_rows", 0), ("accepted_tokens_length", 1)):
        value = getattr(args, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} is {value!r}; it must be a whole number of {least} or more.")
    value = args.token_noise_prob
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError(f"token_noise_prob is {value!r}; it must be a number from 0 to 1.")
    if args.token_noise == "none":
        _refuse_idle(args, _OF_TOKENS, "token_noise", "msn")
    if not args.accepted_tokens_rows:
        _refuse_idle(args, ("accepted_tokens_length",), "accepted_tokens_rows")
    if not args.adds_token_noise:
        return
    others = (("embedding_noise", args.adds_noise), ("hidden_noise", args.hidden_noise != "none"))
    for name, is_set in others:
        if is_set:
            raise ExcludedSetting(
                f"token_noise is {args.token_noise} with {name}: {getattr(args, name)}; a run has noise of one "
                "kind. Set one of them to none.",
                {"token_noise": (name,), name: ("token_noise",)},
            )
    if args.packing and args.packing_strategy in ("wrapped", "bfd_split"):
        raise ExcludedSetting(
            f"packing_strategy is {args.packing_strategy} with token_noise: {args.token_noise}: it cuts rows in "
            "two, and the second part's prompt is not known. Set `packing_strategy: bfd`.",
            {"packing_strategy": ("token_noise",)},
        )
    if args.torch_compile:
        raise ExcludedSetting(
            f"torch_compile is true with token_noise: {args.token_noise}, whose pieces have other lengths in each "
            "step. Leave torch_compile out.",
            {"torch_compile": ("token_noise",)},
        )


def check_layers(args, layers: float) -> None:
    """Refuse `noise_layers` that a model of so many decoder layers has not."""
    wanted = args.noise_layers
    if isinstance(wanted, list) and wanted[-1] >= layers:
        raise ConfigError(
            f"noise_layers names layer {wanted[-1]}, and the model has {layers} decoder layers, from 0 on."
        )
    if wanted in ("snr_high", "snr_low") and args.noise_layer_count > layers:
        raise ConfigError(f"noise_layer_count is {args.noise_layer_count}, and the model has {layers} decoder layers.")


def _refuse_idle(args, names: tuple[str, ...], because: str, other: str | None = None) -> None:
    """Refuse those of some settings that another one leaves without effect; `other`: its value that would not."""
    value = getattr(args, because)
    for name in names:
        # a copy, by dataclasses.replace for one, gives every field
        own, default = getattr(args, name), type(args).__dataclass_fields__[name].default
        if own != default:
            remedy = f"Set `{because}: {other}`, or leave {name} out" if other else f"Leave {name} out"
            text = f"{own:g}" if isinstance(own, float) else f"{own}"
            message = f"{name} is {text}, which has no effect on {because}: {value}. {remedy}."
            args._has_no_effect(name, default, (because,), message)
