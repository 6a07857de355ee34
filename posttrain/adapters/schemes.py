"""The adapter that a recipe's settings ask for."""

from posttrain.config import ModelArguments, get_peft_config
from posttrain.config.schemes import SCHEMES, named


def adapter_config(model_args: ModelArguments):
    """Return the config of the adapter that a recipe's settings ask for; None for none.

    Raises ConfigError where PEFT or the scheme refuses them.
    """
    plain, scheme = get_peft_config(model_args), SCHEMES[model_args.adapter]
    if plain is None or scheme.config is None:
        return plain
    return named(scheme.config).of_plain(plain, **{own: getattr(model_args, n) for n, own in scheme.fields.items()})
