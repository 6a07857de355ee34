"""Checks that run before the model loads, or in the first step: what is wrong, where it is set, how to mend it."""

import contextlib
import copy
import math
import re
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, Trainer, get_scheduler
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_kernels_available,
    is_liger_kernel_available,
)

from posttrain import model_sizes, patterns
from posttrain.bounded import Overtime, in_time
from posttrain.checks import check_choice, check_holdable, check_links, plain, shorten
from posttrain.errors import ConfigError, EnvironmentIssue, PosttrainError
from posttrain.models import check_holds_safetensors, check_runs_no_code
from posttrain.remote import check_model_name, model_failure
from posttrain.run import optimizers, upstream_optimizers

# of a model of any size some seconds
BUILD_SECONDS = 60.0
_FLASH_ATTENTION = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
# What architectures call their input embedding
_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "embeddings")
# Of an adapter's config what names modules: by texts or a pattern, and by texts alone.
_NAMES = ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern")
_LISTS_OF_NAMES = ("modules_to_save", "target_parameters")
# Optimisers that ask for more of a model than its parameters.
_NEED_THE_MODEL = ("galore", "apollo", "lomo", "adalomo")


def check_output_dir(output_dir: str, name: str = "output_dir") -> None:
    """Refuse a folder that cannot be made or written to; leaves nothing behind. `name`: of the setting."""
    check_links(output_dir, name)
    folder = Path(output_dir).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ConfigError(
            f"{name} is {output_dir}, which cannot be written to ({error.strerror}: {there}). Choose another."
        ) from error


def check_lora(peft_config) -> None:
    """Refuse adapter settings that upstream would only trip over once the model is loaded.

    Patterns that may take for ever to match are refused as well. Numpy's numbers become Python's own in the settings,
    as PEFT saves no others.
    """
    vars(peft_config).update(plain(vars(peft_config)))
    for name, value in vars(peft_config).items():
        check_holdable(f"{name} of the adapter", value)
    for name in (*_NAMES, *_LISTS_OF_NAMES):
        _check_module_names(name, getattr(peft_config, name, None), name in _NAMES)
    patterns.check_adapter(peft_config)
    # of other kinds `r` may be something else: OFT takes 0 beside its block size
    if isinstance(peft_config, LoraConfig):
        rank, dropout, alpha = peft_config.r, peft_config.lora_dropout, peft_config.lora_alpha
        if not (isinstance(rank, int) and rank >= 1):
            raise ConfigError(f"the LoRA rank (lora_r) is {rank}; it must be a whole number of 1 or more.")
        if dropout is not None and not 0 <= dropout < 1:
            raise ConfigError(f"lora_dropout is {dropout}; it must lie in [0, 1).")
        if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
            raise ConfigError(
                f"lora_alpha is {alpha}; it must be a number above 0 (at 0 the adapter would never train)."
            )
    targets = getattr(peft_config, "target_modules", None) or ()
    if "lm_head" in ([targets] if isinstance(targets, str) else targets):
        raise ConfigError(
            "lora_target_modules names lm_head, whose weight is read directly, so an adapter on it would never train. "
            "Leave it out."
        )


def _check_module_names(name: str, value, takes_text: bool) -> None:
    """Refuse what names no modules in an adapter's config. `takes_text`: whether one text or pattern is taken too."""
    several = isinstance(value, list | tuple | set | frozenset) and all(isinstance(one, str) for one in value)
    if value is None or several or (takes_text and isinstance(value, str)):
        return
    wanted = "a name, a pattern or a list of names" if takes_text else "a list of names, written [a, b]"
    raise ConfigError(f"{name} of the adapter is {shorten(value)}; it must be {wanted}.")


def check_tying(peft_config, config) -> None:
    """Refuse an adapter that PEFT would carry from a tied embedding over to the head.

    `config`: the model's.
    """
    targets = getattr(peft_config, "target_modules", None) or ()
    if not getattr(peft_config, "ensure_weight_tying", False) or not config.get_text_config().tie_word_embeddings:
        return
    for name in _EMBEDDINGS:
        if isinstance(targets, str):
            named = any(re.fullmatch(targets, path) for path in (name, f"model.{name}", f"transformer.{name}"))
        else:
            named = any(target.rpartition(".")[2] == name for target in targets)
        if named:
            raise ConfigError(
                f"ensure_weight_tying is set with {name} in target_modules: PEFT would adapt the head that is tied to "
                "it as well, whose weight is read directly, so that adapter would never train. Leave "
                f"ensure_weight_tying out, or name {name} in modules_to_save instead."
            )


def check_here(args) -> None:
    """Refuse settings that this machine cannot carry out.

    Raises EnvironmentIssue where a package is missing, ConfigError where there is no accelerator.
    """
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise EnvironmentIssue(
            "use_liger_kernel is true, which needs the package liger-kernel, 0.3.0 or newer: pip install liger-kernel."
        )
    if getattr(args, "activation_offloading", False) and args.device.type == "cpu":
        raise ConfigError(
            "activation_offloading is true, and there is no accelerator to take activations off. Leave it out on the "
            "CPU."
        )


def check_synced_reference(args, has_adapter: bool) -> None:
    """Refuse `sync_ref_model` where there is no reference model of its own, or its log-probabilities are kept."""
    if not getattr(args, "sync_ref_model", False):
        return
    if has_adapter:
        raise ConfigError(
            "sync_ref_model is true and an adapter is trained, whose reference is the same model with the adapter off: "
            "there is no other to sync. Leave sync_ref_model out, or train without an adapter (use_peft: false)."
        )
    if getattr(args, "precompute_ref_log_probs", False):
        raise ConfigError(
            "sync_ref_model is true with precompute_ref_log_probs, whose log-probabilities are those of the first "
            "reference and would be stale after a sync. Leave one of them out."
        )


def check_router(args, config) -> None:
    """Refuse `router_aux_loss_coef` for a model without experts. `config`: the model's."""
    coefficient = getattr(args, "router_aux_loss_coef", None)
    if coefficient and not hasattr(config.get_text_config(), "output_router_logits"):
        raise ConfigError(
            f"router_aux_loss_coef is {coefficient}, and the model ({config.model_type}) is no mixture of experts that "
            "returns its router's logits. Leave it out."
        )


def check_optimiser(args) -> None:
    """Refuse an optimiser or a schedule that upstream would only trip over once the model is loaded.

    Raises ConfigError for arguments that it does not take, EnvironmentIssue where its package is missing.
    """
    if isinstance(args.optim_target_modules, str):
        patterns.check(args.optim_target_modules, "optim_target_modules")
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    name = getattr(args.optim, "value", args.optim)
    if optimizers.is_upstream(name):
        upstream_optimizers.check(args, name)
    with upstream_refusals(f"optim {name} cannot be built with optim_args {args.optim_args!r}"):
        if not optimizers.is_upstream(name):
            # built by the trainers here, which `optimizers.check` asks
            pass
        elif name.startswith(_NEED_THE_MODEL):
            with contextlib.suppress(ValueError):
                Trainer.get_optimizer_cls_and_kwargs(args)
        else:
            kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
            kind(parameters, **settings)
    name, settings = args.lr_scheduler_type.value, args.lr_scheduler_kwargs
    with upstream_refusals(f"lr_scheduler_type {name} cannot be built with lr_scheduler_kwargs {settings}"):
        optimiser = torch.optim.SGD(parameters, lr=args.learning_rate)
        get_scheduler(
            name, optimiser, args.get_warmup_steps(100), num_training_steps=100, scheduler_specific_kwargs=settings
        )


@contextlib.contextmanager
def upstream_refusals(what: str = "the trainer cannot be built with these settings"):
    """Raise as ConfigError what TRL, PEFT or transformers refuse inside: a user's setting caused it."""
    try:
        yield
    except PosttrainError:
        raise
    except ImportError as error:
        raise EnvironmentIssue(f"these settings need a package that is missing: {error}") from error
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigError(f"{what}: {error}") from error


def load_config(model_id: str, args):
    """Load the model's config, before its weights.

    Raises ConfigError where there is no such model, EnvironmentIssue where the hub cannot be reached.
    """
    if not isinstance(model_id, str):
        raise ConfigError(f"model is {model_id!r}; give a hub id, a folder's path as text, or a loaded model.")
    check_model_name(model_id)
    kwargs = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    check_loading(kwargs)
    kwargs = {key: kwargs[key] for key in ("revision", "attention_dropout") if kwargs.get(key) is not None}
    try:
        model_sizes.check_folder(model_id, kwargs.get("revision"))
        config = AutoConfig.from_pretrained(model_id, trust_remote_code=args.trust_remote_code, **kwargs)
    except PosttrainError:
        raise
    except (OSError, ValueError) as error:
        raise model_failure(model_id, error) from error
    check_holds_safetensors(model_id, config)
    if not (args.model_init_kwargs or {}).get("attn_implementation"):
        check_runs_no_code(config, model_id)
    return config


@contextlib.contextmanager
def building(what: str):
    """Raise ConfigError where a model cannot be built within `BUILD_SECONDS`, without its weights."""
    try:
        with in_time(BUILD_SECONDS):
            yield
    except Overtime:
        raise ConfigError(
            f"{what} cannot be built within {BUILD_SECONDS:g} s, without its weights. Mend its config.json, or name "
            "fewer modules."
        ) from None


def check_names(peft_config, model, trust_remote_code: bool = False) -> None:
    """Refuse an adapter's patterns that take long to match with the names of a model's modules.

    `model`: with or without weights, or a model's config, of which one without weights is built.
    """
    found = [] if peft_config is None else patterns.check_adapter(peft_config)
    if not found:
        return
    if not isinstance(model, torch.nn.Module):
        # within the launch, it would spread the weights
        if is_deepspeed_zero3_enabled():
            return
        with torch.random.fork_rng(devices=[]), torch.device("meta"), building("the model"):
            try:
                model = _without_weights(model, trust_remote_code)
            # a model of another kind, or what the trainer's own checks name
            except Exception:
                return
    patterns.check_on(found, [name for name, _ in model.named_modules()], "the adapter's config")


def _without_weights(config, trust_remote_code: bool):
    # the config's own attention may be a kernel of the hub
    return AutoModelForCausalLM.from_config(
        copy.deepcopy(config), attn_implementation="eager", trust_remote_code=trust_remote_code
    )


def check_layers(peft_config, model, trust_remote_code: bool = False) -> None:
    """Refuse an adapter of a scheme of ours that does not fit a model's layers, which the scheme itself says.

    `model`: the model, which its adapter is then put on anyway, or its config, of which one without weights is built.
    """
    if not hasattr(peft_config, "scheme") or isinstance(model, torch.nn.Module) or is_deepspeed_zero3_enabled():
        return
    with torch.random.fork_rng(devices=[]), torch.device("meta"), building("the model"):
        try:
            built = _without_weights(model, trust_remote_code)
        # a model of another kind, or what the trainer's own checks name
        except Exception:
            return
        with upstream_refusals("the adapter cannot be built with these settings"):
            adapter = copy.deepcopy(peft_config)
            adapter.check_placed(get_peft_model(built, adapter))


def check_loading(kwargs: dict) -> None:
    """Refuse `model_init_kwargs` that upstream would only trip over once it loads the weights."""
    model_sizes.check_sizes(kwargs, "model_init_kwargs")
    mapped = kwargs.get("key_mapping")
    for pattern in mapped if isinstance(mapped, dict) else ():
        patterns.check(pattern, "model_init_kwargs: key_mapping")
    attention, dtype = kwargs.get("attn_implementation"), kwargs.get("dtype") or kwargs.get("torch_dtype")
    # a name with a slash is a kernel of the hub
    if isinstance(attention, str) and "/" not in attention:
        known = [name for name in AttentionInterface().valid_keys() if "|" not in name]
        check_choice("attn_implementation", attention, ["eager", *sorted(known)])
        available = _FLASH_ATTENTION.get(attention, lambda: True)
        # transformers takes the hub's kernel where it can
        if not available() and not is_kernels_available():
            raise EnvironmentIssue(
                f"attn_implementation is {attention}, whose package is not installed here. Install flash-attn or "
                "kernels, or set `attn_implementation: sdpa`."
            )
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        check_choice("dtype", dtype, ("auto", "bfloat16", "float16", "float32"))


def check_reporters(report_to) -> None:
    """Refuse names in `report_to` that transformers does not know, or whose package is missing.

    Raises ConfigError for the first, EnvironmentIssue for the second.
    """
    names = [report_to] if isinstance(report_to, str) else report_to or []
    for name in names:
        check_choice("report_to", name, (*INTEGRATION_TO_CALLBACK, "all", "none"))
    for name in names:
        # flyte is not among those that transformers looks for
        if name not in ("all", "none", "flyte", *get_available_reporting_integrations()):
            raise EnvironmentIssue(f"report_to names {name}, which is not installed here. Install it, or leave it out.")


def check_model_config(args, config, weighs_pairs: bool = False) -> None:
    """Refuse a model whose two passes would differ, or whose loss has a part that pairs cannot weigh.

    `weighs_pairs`: whether the pairs of a step count unequally.
    """
    config = config.get_text_config()
    dropout = getattr(config, "attention_dropout", 0.0) or 0.0
    if dropout > 0:
        # TRL's disable_dropout turns off modules only, not the attention kernel's own dropout
        raise ConfigError(
            f"the model's attention_dropout is {dropout}; policy and reference would differ by chance. Set it to 0: "
            "`model_init_kwargs: {attention_dropout: 0.0}`, or in the model's config before it is built."
        )
    coefficient = args.router_aux_loss_coef
    if coefficient is None:
        coefficient = getattr(config, "router_aux_loss_coef", 0.0) if hasattr(config, "output_router_logits") else 0.0
    if coefficient and weighs_pairs:
        raise ConfigError(
            f"router_aux_loss_coef is {coefficient} and Dr. DPO weighs the pairs of a step; the auxiliary loss of a "
            "mixture of experts is one number of all tokens of a micro-batch, which has no part for each pair. Set "
            "`router_aux_loss_coef: 0.0`, or `reduction: mean`."
        )


def check_parallelism(accelerator) -> None:
    """Refuse layouts in which a rank does not hold its own rows."""
    layout = getattr(accelerator, "parallelism_config", None)
    sizes = {name: getattr(layout, f"{name}_size", 1) or 1 for name in ("tp", "cp", "sp")} if layout else {}
    for name, size in sizes.items():
        if size > 1:
            raise ConfigError(f"{name}_size is {size}; only data parallel training (DDP, ZeRO, FSDP) is supported.")


@contextlib.contextmanager
def evaluating(model):
    """Put `model` into eval mode inside, and each of its modules back into its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
