"""The adapter that a recipe's settings ask for."""

from dataclasses import fields

from posttrain.config import ModelArguments, get_peft_config


def adapter_config(model_args: ModelArguments):
    """Return the config of the adapter that a recipe's settings ask for; None for none.

    Raises ConfigError where PEFT or the scheme refuses them.
    """
    plain = get_peft_config(model_args)
    if plain is None or model_args.adapter != "gift_sw":
        return plain
    from posttrain.adapters.gift_sw import GiftSWConfig

    given = {entry.name: getattr(plain, entry.name) for entry in fields(plain) if entry.init}
    return GiftSWConfig(
        **given,
        bits=model_args.gift_bits,
        noise=model_args.gift_noise,
        metric=model_args.gift_metric,
        calibration_rows=model_args.gift_calibration_rows,
    )
