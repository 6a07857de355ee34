"""What every private run asks of its settings, its model, its adapter and its rows, and the plan of its steps."""

from peft import LoraConfig, PeftModel

from posttrain.data import objects
from posttrain.errors import ConfigError, DataError
from posttrain.privacy.config import PrivacyConfig
from posttrain.privacy.plan import Plan, plan
from posttrain.privacy.sampling import rows_by_unit
from posttrain.privacy.turns import most
from posttrain.run.engines import sharding
from posttrain.run.optimizer_names import steps_within_backward

# of every trainer's settings: values that a private run may have, and what others would do; a config's `not_apart` has
# those of its method
_REFUSED = (
    ("max_grad_norm", (0, 0.0), "would cut the noisy gradient, its noise and all; clip_norm cuts each unit's"),
    ("label_smoothing_factor", (0, 0.0, None), "takes a mean over the tokens of all rows"),
    ("fp16", (False, None), "scales gradients by what the rows before them were; use bf16"),
    ("torch_compile", (False, None), "would compile past the layers that gradients of rows are taken in"),
    ("auto_find_batch_size", (False,), "takes steps again"),
    ("load_best_model_at_end", (False,), "chooses weights by an evaluation, which the promise does not cover"),
    ("gradient_agreement", (None,), "leaves out micro-batches by what their rows are"),
    ("sam_rho", (0, 0.0, None), "moves the weights by a gradient without noise"),
    ("refactor_every", (0, None), "writes A and B anew between steps, with which no private run was tried"),
    ("deepspeed", (None,), "reduces gradients before they are clipped"),
    ("dataloader_drop_last", (False,), "has no meaning for rows that are drawn"),
    ("train_sampling_strategy", ("random",), "has no meaning for rows that are drawn"),
)
# schedules that go by losses
_FOLLOWERS = ("reduce_lr_on_plateau", "greedy")
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


def check(args) -> None:
    """Refuse settings with which rows are not apart, or what the promise does not cover decides about the weights.

    `args`: the trainer's config of a private run.

    Raises:
        ConfigError: one of the table above, or of the config's `not_apart`; a schedule, or a choice of checkpoints,
            that follows an evaluation; an optimizer that moves weights within the backward; DeepSpeed or FSDP.
    """
    for name, neutral, why in (*_REFUSED, *args.not_apart):
        value = getattr(args, name)
        if value not in neutral:
            raise ConfigError(f"{name} is {value}, which {why}. Leave {name} out in a private run.")
    engine = sharding(args)
    if engine:
        raise ConfigError(
            f"the run is launched under {engine}, which reduces gradients before they are clipped. Launch one process, "
            "or several without it (configs/accelerate/ddp.yaml)."
        )
    schedule = _name(args.lr_scheduler_type)
    if schedule in _FOLLOWERS:
        raise ConfigError(
            f"lr_scheduler_type is {schedule}, which follows losses that the promise does not cover. Use another, such "
            "as constant or cosine."
        )
    if _name(args.save_strategy) == "best":
        raise ConfigError(
            "save_strategy is best, which keeps weights by an evaluation that the promise does not cover. Use steps or "
            "epoch."
        )
    optim = _name(args.optim)
    if steps_within_backward(optim):
        raise ConfigError(
            f"optim is {optim}, which updates weights inside the backward, before a step is clipped and has its noise. "
            "Use another, such as adamw_torch."
        )


def _name(value) -> str:
    return str(getattr(value, "value", value))


def check_model(args, model, config, peft_config) -> None:
    """Refuse models and adapters of which gradients of rows are not to be had, before the weights load.

    Args:
        args: the trainer's config. model: a name or a model. config: of the model. peft_config: of a new adapter.

    Raises:
        ConfigError: as `check_adapter`; experts with an auxiliary loss.
    """
    check_adapter(peft_config, model)
    text = config.get_text_config()
    if hasattr(text, "output_router_logits"):
        coefficient = getattr(args, "router_aux_loss_coef", None)
        coefficient = getattr(text, "router_aux_loss_coef", 0.0) if coefficient is None else coefficient
        if coefficient:
            raise ConfigError(
                f"the model is a mixture of experts, whose auxiliary loss (router_aux_loss_coef {coefficient:g}) is of "
                "the tokens of all rows together. Set `router_aux_loss_coef: 0.0`."
            )


def check_adapter(peft_config, model=None) -> None:
    """Refuse an adapter, new or of a model at hand, of which gradients of rows are not to be had.

    Raises ConfigError: there is no LoRA, or one that trains more than A and B on linear layers.
    """
    own = model.peft_config.values() if isinstance(model, PeftModel) else []
    adapters = list(own) if peft_config is None else [peft_config]
    if not adapters:
        raise ConfigError(
            "there is no LoRA to train, and gradients of rows are taken of its matrices alone. Pass a LoraConfig as "
            "peft_config (`use_peft: true` in a recipe)."
        )
    for adapter in adapters:
        _check_plain(adapter)


def columns_beside(privacy: PrivacyConfig | None) -> tuple[str, ...]:
    """Return the columns of training rows that a private run reads beside those of its method."""
    return () if privacy is None or privacy.privacy_unit_column is None else (privacy.privacy_unit_column,)


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


def planned(args, dataset) -> Plan:
    """Plan the steps of a private run on a data set, by its config; `follow` has the config follow.

    Raises:
        ConfigError: a stream; what `posttrain.privacy.plan.plan` refuses. DataError: as `units_of`.
    """
    if not hasattr(dataset, "__len__"):
        raise ConfigError(
            "train_dataset is a stream, of which nobody knows how many units it has, and so how likely one is in a "
            "step. Give a datasets.Dataset."
        )
    follows = "gradient_accumulation_steps" in args.known_later
    return plan(
        args.privacy,
        len(units_of(args.privacy, dataset)),
        rows=args.per_device_train_batch_size,
        ranks=args.world_size,
        accumulation=None if follows else args.gradient_accumulation_steps,
        max_steps=args.max_steps,
        epochs=args.num_train_epochs,
        turns=most(),
    )


def follow(args, made: Plan | None) -> None:
    """Set what follows from the plan in a private run's own copy of its config; nothing without a plan."""
    if made is not None:
        args.gradient_accumulation_steps = made.micro_batches


def planned_anew(args, dataset, made: Plan | None) -> Plan:
    """Return the plan for the rows that are trained on, once all are tokenised and those that are dropped are gone.

    `made`: the plan of the rows as they were given, or None where their tokens were not known; the config follows.
    """
    if made is None or made.units != len(units_of(args.privacy, dataset)):
        made = planned(args, dataset)
        follow(args, made)
    return made


def _check_plain(adapter) -> None:
    """Refuse an adapter whose training is more than that of A and B on linear layers."""
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
