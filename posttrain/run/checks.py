"""Checks that run before the model loads, or in the first step: what is wrong, where it is set, how to mend it."""

import contextlib
import tempfile
from pathlib import Path

import torch
from transformers import AttentionInterface, AutoConfig
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_kernels_available,
    is_liger_kernel_available,
)

from posttrain import model_sizes, patterns
from posttrain.bounded import Overtime, in_time
from posttrain.checks import check_choice, check_links
from posttrain.errors import ConfigError, EnvironmentIssue, PosttrainError
from posttrain.models import check_holds_safetensors, check_runs_no_code
from posttrain.remote import check_model_name, model_failure

# of a model of any size some seconds
BUILD_SECONDS = 60.0
_FLASH_ATTENTION = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}


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
