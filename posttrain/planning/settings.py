"""A recipe's settings, read as a plan needs them: as they would be on a machine with cards."""

import os

from posttrain.errors import ConfigError
from posttrain.planning.job import Job, Launch
from posttrain.planning.shapes import Shapes

# tokens of a prompt where the settings bound none, a guess
PROMPT = 256
_DTYPES = {"float32": 4.0, "fp32": 4.0, "bfloat16": 2.0, "bf16": 2.0, "float16": 2.0, "fp16": 2.0}


def family_of(args) -> str:
    """Return the family of a trainer's config: preference, policy_gradient, offline or instructions."""
    module = type(args).__module__
    for family in ("preference", "policy_gradient", "offline"):
        if f".{family}." in module:
            return family
    return "instructions"


def length_of(args) -> int:
    """Return the tokens of the longest row that the settings let in. Raises ConfigError where they bound none."""
    if hasattr(args, "max_completion_length"):
        return args.max_completion_length + PROMPT
    if args.max_length is None:
        raise ConfigError(
            "max_length is null, so rows may have any length and no memory can be planned. Set max_length."
        )
    return args.max_length


def weight_bytes(model_args, args) -> float:
    """Return the bytes of a weight of the base as it is loaded."""
    model_args = model_args or getattr(args, "model_settings", None)
    if getattr(model_args, "load_in_4bit", False):
        return 0.5 + (0.016 if getattr(model_args, "use_bnb_nested_quant", False) else 0.0625)
    if getattr(model_args, "load_in_8bit", False):
        return 1.0
    dtype = (args.model_init_kwargs or {}).get("dtype") or getattr(model_args, "dtype", None) or "float32"
    # checkpoints of today are in half precision, which `auto` keeps
    return _DTYPES.get(str(dtype).removeprefix("torch."), 2.0)


def job_of(args, model_args, shapes: Shapes, length: int | None = None) -> Job:
    """Return what a run with these settings does on each card.

    Args:
        args: the trainer's config. model_args: the settings of the model, or None.
        length: tokens of the longest row; default: what the settings bound it by.

    Raises:
        ConfigError: settings that bound no row's length.
    """
    family, longest = family_of(args), length or length_of(args)
    adapter = shapes.adapter is not None
    rows = args.per_device_train_batch_size * (2 if family == "preference" else 1)
    # without an accelerator here the config chose false by itself
    given = "gradient_checkpointing" in getattr(args, "_written", ())
    generates = family == "policy_gradient"
    reference, own = _reference(args, family, adapter)
    answers = 0
    if generates:
        steps = getattr(args, "steps_per_generation", None) or args.gradient_accumulation_steps
        answers = args.per_device_train_batch_size * steps
    vllm = None
    if generates and args.use_vllm:
        vllm = args.vllm_gpu_memory_utilization if args.vllm_mode == "colocate" else 0.0
    init = args.model_init_kwargs or {}
    return Job(
        shapes=shapes,
        family=family,
        rows=rows,
        length=longest,
        prompt=min(PROMPT, longest // 2) if generates else 0,
        accumulation=args.gradient_accumulation_steps,
        weight_bytes=weight_bytes(model_args, args),
        optimizer=str(getattr(args.optim, "value", args.optim)),
        checkpointing=args.gradient_checkpointing if given else True,
        dropout=adapter and bool(getattr(model_args, "lora_dropout", 0.0)),
        attention=init.get("attn_implementation") or getattr(model_args, "attn_implementation", None),
        reference=reference,
        own_reference=own,
        scoring_rows=_scoring_rows(args, family) if reference == "precomputed" else 0,
        answers=answers,
        vllm=vllm,
        sleeps=bool(getattr(args, "vllm_enable_sleep_mode", False)),
        more_forwards=_more_forwards(args, family),
        twice=bool(getattr(args, "sam_rho", None)),
        drawn=_drawn(args, family),
        value_prompts=32 if getattr(args, "value", None) == "head" else 0,
    )


def _drawn(args, family: str) -> int | None:
    """Return the sequences that a private run's step draws, on average at most; None where none are drawn."""
    privacy = getattr(args, "privacy", None)
    if privacy is None:
        return None
    return privacy.expected_batch_size * privacy.rows_per_unit * (2 if family == "preference" else 1)


def _more_forwards(args, family: str) -> float:
    """Return the forwards without gradient of each trained row, beside those of a reference."""
    if family == "policy_gradient":
        # TRL scores rollouts before an update that is not of the policy that wrote them, or that vLLM wrote
        iterations = args.num_iterations
        steps = getattr(args, "steps_per_generation", None) or args.gradient_accumulation_steps
        behind = args.gradient_accumulation_steps % (steps * iterations) != 0
        return (behind or (args.use_vllm and args.vllm_importance_sampling_correction)) / iterations
    weighs = getattr(args, "reduction", None) == "dr_dpo" and args.dr_dpo_scope == "global"
    return float(weighs and args.dr_dpo_window == "two_pass")


def _reference(args, family: str, adapter: bool) -> tuple[str, bool]:
    """Return whether the run has a reference, as `Job.reference`, and whether it is a model of its own."""
    if family == "preference":
        precomputed = args.precompute_ref_log_probs
        return "precomputed" if precomputed else "live", not adapter
    if family == "policy_gradient":
        return ("live", not adapter) if args.beta != 0 else ("none", False)
    if family == "offline":
        return "precomputed", False
    return "none", False


def _scoring_rows(args, family: str) -> int:
    """Return how many sequences the reference scores at a time before training."""
    if family == "preference":
        return 2 * (args.precompute_ref_batch_size or args.per_device_train_batch_size)
    return args.per_device_eval_batch_size


def launch_of(args) -> Launch:
    """Return the launch that a config was made in."""
    plugin = getattr(args, "deepspeed_plugin", None)
    kind = "single" if args.world_size == 1 else "ddp"
    if plugin is not None and plugin.zero_stage in (2, 3):
        kind = f"zero{plugin.zero_stage}"
    elif getattr(args, "fsdp", None) or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        kind = "fsdp2"
    return Launch(kind, args.world_size, mixed=bool(args.bf16 or args.fp16))
