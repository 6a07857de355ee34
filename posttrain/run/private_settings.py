"""What every private run asks of its model, its adapter and its rows, and the plan of its steps."""

from peft import LoraConfig, PeftModel

from posttrain.data import objects
from posttrain.errors import ConfigError, DataError
from posttrain.privacy.config import PrivacyConfig
from posttrain.privacy.plan import Plan, plan
from posttrain.privacy.sampling import rows_by_unit

# of an adapter's config: what is trained beside A and B, or uses them in another way
_BESIDE = {
    "use_dora": "a vector of lengths is trained",
    "modules_to_save": "whole modules are trained",
    "lora_bias": "biases are trained",
    "trainable_token_indices": "embeddings are trained",
    "target_parameters": "parameters are adapted that belong to no linear layer",
    "alora_invocation_tokens": "the adapter is off for some tokens",
    "use_qalora": "inputs are pooled",
    "layer_replication": "layers share weights",
}


def check_model(args, model, config, peft_config) -> None:
    """Refuse models and adapters of which gradients of rows are not to be had, before the weights load.

    Args:
        args: the trainer's config. model: a name or a model. config: of the model. peft_config: of a new adapter.

    Raises:
        ConfigError: no LoRA, one that trains more than A and B on linear layers, experts with an auxiliary loss.
    """
    if not isinstance(peft_config, LoraConfig) and not isinstance(model, PeftModel):
        raise ConfigError(
            "there is no LoRA to train, and gradients of rows are taken of its matrices alone. Pass a LoraConfig as "
            "peft_config (`use_peft: true` in a recipe)."
        )
    for adapter in [peft_config] if peft_config is not None else list(model.peft_config.values()):
        _check_adapter(adapter)
    text = config.get_text_config()
    if hasattr(text, "output_router_logits"):
        coefficient = getattr(args, "router_aux_loss_coef", None)
        coefficient = getattr(text, "router_aux_loss_coef", 0.0) if coefficient is None else coefficient
        if coefficient:
            raise ConfigError(
                f"the model is a mixture of experts, whose auxiliary loss (router_aux_loss_coef {coefficient:g}) is of "
                "the tokens of all rows together. Set `router_aux_loss_coef: 0.0`."
            )


def units_of(privacy: PrivacyConfig, dataset):
    """Return the rows of each unit of privacy in a data set.

    Raises:
        DataError: the column of the units is missing, or a row has no value in it.
    """
    column = privacy.privacy_unit_column
    if column is not None and column not in objects.names_of(dataset):
        raise DataError(
            f"train_dataset has no column {column}, which privacy_unit_column names. Found: "
            f"{', '.join(objects.names_of(dataset))}."
        )
    values = None if column is None else dataset[column]
    return rows_by_unit(values, len(dataset), column or "privacy_unit_column")


def planned(args, privacy: PrivacyConfig, dataset) -> Plan:
    """Plan the steps on a data set; the config's `gradient_accumulation_steps` follows where it was left out.

    Raises:
        ConfigError: a stream; what `posttrain.privacy.plan.plan` refuses. DataError: as `units_of`.
    """
    if not hasattr(dataset, "__len__"):
        raise ConfigError(
            "train_dataset is a stream, of which nobody knows how many units it has, and so how likely one is in a "
            "step. Give a datasets.Dataset."
        )
    written = "gradient_accumulation_steps" in args._written
    made = plan(
        privacy,
        len(units_of(privacy, dataset)),
        rows=args.per_device_train_batch_size,
        ranks=args.world_size,
        accumulation=args.gradient_accumulation_steps if written else None,
        max_steps=args.max_steps,
        epochs=args.num_train_epochs,
    )
    args.gradient_accumulation_steps = made.micro_batches
    return made


def _check_adapter(adapter) -> None:
    """Refuse an adapter whose training is more than that of A and B on linear layers, before the weights load."""
    if not isinstance(adapter, LoraConfig) or hasattr(adapter, "scheme"):
        kind = getattr(adapter, "scheme", None) or getattr(adapter.peft_type, "value", adapter.peft_type)
        raise ConfigError(f"the adapter is {kind}, of which gradients of rows are not known. Use plain LoRA.")
    for name, why in _BESIDE.items():
        value = getattr(adapter, name, None)
        if value:
            raise ConfigError(
                f"{name} of the adapter is {value}, with which {why}; gradients of rows are taken of LoRA's A and B "
                f"alone. Leave {name} out."
            )
    if adapter.bias != "none":
        raise ConfigError(
            f"the adapter's bias is {adapter.bias!r}, with which biases of the base are trained; gradients of rows are "
            "taken of LoRA's A and B alone. Set bias to 'none'."
        )
