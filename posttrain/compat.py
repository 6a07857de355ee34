"""The private upstream names this library stands on, and the versions it was tested with.

Overrides spell these names where they stand; the canary test walks this list, so that a release that renames one is
named in the failure.
"""

import importlib
import inspect

_FUSED = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

# (module, dotted attribute, parameters we pass or receive by name or position)
PRIVATE_NAMES = (
    ("trl.trainer.dpo_trainer", "DPOTrainer._compute_loss", ("model", "inputs", "return_outputs")),
    (
        "trl.trainer.dpo_trainer",
        "DPOTrainer._prepare_dataset",
        ("dataset", "processing_class", "args", "dataset_name"),
    ),
    ("trl.trainer.dpo_trainer", "DPOTrainer._precompute_ref_logps", ("dataset", "name", "batch_size")),
    ("trl.trainer.dpo_trainer", "DPOTrainer._set_signature_columns_if_needed", ()),
    ("trl.trainer.dpo_trainer", "DPOTrainer._save_checkpoint", ("model", "trial")),
    (
        "trl.trainer.grpo_trainer",
        "GRPOTrainer._calculate_rewards",
        ("inputs", "prompts", "completions", "completion_ids_list"),
    ),
    ("trl.trainer.grpo_trainer", "GRPOTrainer._generate_and_score_completions", ("inputs",)),
    ("trl.trainer.grpo_trainer", "GRPOTrainer._generate", ("prompts",)),
    ("trl.trainer.grpo_trainer", "GRPOTrainer._get_train_sampler", ("dataset",)),
    ("transformers", "Trainer._save", ("output_dir", "state_dict")),
    ("peft", "LoraConfig._register_custom_module", ("mapping",)),
    ("peft", "LoraModel._create_new_module", ("lora_config", "adapter_name", "target")),
    ("peft.tuners.lora.layer", "LoraVariant.forward", ("module", "active_adapter", "x", "result")),
    ("peft.tuners.lora.layer", "Linear.resolve_lora_variant", ("config",)),
    ("peft.tuners.lora.variants", "_register_frozen_peft_weight", ("module", "adapter_name", "weight_name")),
    ("peft.utils.integrations", "gather_params_ctx", ("param", "modifier_rank")),
    # no private names, but of a module that is not documented
    ("trl.data_utils", "common_prefix_length", ("ids", "other_ids")),
    ("trl.data_utils", "prepare_multimodal_messages", ("messages",)),
    ("trl.trainer.grpo_trainer", "GRPOTrainer._tokenize_prompts", ("prompts",)),
    ("trl.trainer.grpo_trainer", "print_prompt_completions_sample", ("prompts", "completions", "extra")),
    ("trl.trainer.utils", "RepeatSampler", ("data_source", "shuffle", "seed")),
    ("trl.trainer.grpo_trainer", "GRPOTrainer._compute_loss", ("model", "inputs")),
    (
        "trl.trainer.grpo_trainer",
        "GRPOTrainer._get_per_token_logps_and_entropies",
        ("model", "input_ids", "attention_mask", "logits_to_keep"),
    ),
    (
        "trl.trainer.sft_trainer",
        "SFTTrainer._prepare_dataset",
        ("dataset", "processing_class", "args", "packing", "formatting_func", "dataset_name"),
    ),
    ("trl.trainer.sft_trainer", "SFTTrainer._set_signature_columns_if_needed", ()),
    ("trl.trainer.sft_trainer", "SFTTrainer._save_checkpoint", ("model", "trial")),
    # the speed benchmark counts what reaches the LM head there
    ("trl.trainer.utils", "_ChunkedLogProbFunction", ()),
    # what a model's own head answers in the place of the fused one
    ("trl.trainer.utils", "add_fused_lm_head", ("model", "temperature", "outputs")),
    ("trl.trainer.utils", "FusedCausalLMOutput", ("loss", "log_probs", "label_mask", "aux_loss", *_FUSED)),
    # how often flex attention may be compiled
    ("torch._dynamo.config", "recompile_limit", ()),
    # what regular expressions are made of
    ("re._parser", "parse", ("str", "flags")),
    # what upstream lets a random state hold beside tensors
    ("transformers.trainer_pt_utils", "safe_globals", ()),
    ("peft.utils.other", "TrainableTokensWrapper", ()),
    ("peft.tuners.lora", "LoraLayer.get_base_layer", ()),
    # what a layer does with the input of an adapter in another dtype
    ("peft.tuners.tuners_utils", "BaseTunerLayer._cast_input_dtype", ("x", "dtype")),
    ("peft.tuners.lora.layer", "Linear.get_delta_weight", ("adapter",)),
    # where PEFT looks for what a pass over data left
    ("peft.tuners.lora.layer", "LoraLayer.corda_init", ()),
    ("peft.tuners.lora.layer", "LoraLayer.lora_ga_init", ()),
    ("transformers", "Trainer._load_from_checkpoint", ("resume_from_checkpoint", "model")),
    ("transformers", "Trainer._load_best_model", ()),
    ("transformers", "Trainer._push_from_checkpoint", ("checkpoint_folder",)),
    ("transformers", "Trainer._finish_current_push", ()),
    ("transformers.utils", "PushInProgress", ("jobs",)),
    ("transformers", "Trainer._clip_grad_norm", ("model",)),
    ("transformers", "Trainer._get_grad_norm", ("model", "grad_norm")),
    ("transformers", "Trainer._sync_replicated_trainable_parameters", ("model",)),
    ("transformers", "Trainer._remove_unused_columns", ("dataset", "description")),
    ("accelerate", "Accelerator.prepare_model", ("model", "evaluation_mode")),
    ("transformers", "Trainer.create_accelerator_and_postprocess", ()),
    ("transformers", "Trainer._finalize_training", ("trial", "num_train_samples", "start_time")),
    ("transformers", "Trainer._get_output_dir", ("trial",)),
    ("transformers", "Trainer._load_optimizer_and_scheduler", ("checkpoint",)),
    ("transformers", "Trainer.create_scheduler", ("num_training_steps", "optimizer")),
    ("trl.trainer.utils", "get_config_model_id", ("config",)),
    ("trl.trainer.utils", "create_model_from_path", ("model_id",)),
    # what compiles every chat template
    ("transformers.utils.chat_template_utils", "_compile_jinja_template", ("chat_template",)),
    ("transformers.utils.chat_template_utils", "ImmutableSandboxedEnvironment", ()),
    ("transformers", "Trainer.get_batch_samples", ("epoch_iterator", "num_batches", "device")),
    ("transformers", "Trainer._get_train_sampler", ("train_dataset",)),
    ("transformers", "Trainer._prepare_inputs", ("inputs",)),
    ("transformers", "Trainer.compute_loss_context_manager", ()),
)

# of Flower, which an environment of its own has: what is not documented, or of its older workflow
OF_FLOWER = (
    ("flwr.supercore.task_identity", "TaskIdentity", ()),
    ("flwr.serverapp.strategy", "DifferentialPrivacyServerSideFixedClipping", ("strategy", "num_sampled_clients")),
    ("flwr.server.compat.legacy_context", "LegacyContext", ("context", "config", "strategy")),
    ("flwr.server.workflow", "DefaultWorkflow", ("fit_workflow",)),
    ("flwr.server.workflow", "SecAggPlusWorkflow", ("num_shares", "reconstruction_threshold", "max_weight")),
    ("flwr.client.mod", "secaggplus_mod", ()),
)

_GONE = object()

# Attributes that upstream sets on instances, watched by the same test
INSTANCE_ATTRIBUTES = {
    "trl.DPOTrainer": (
        "_metrics",
        "_total_train_tokens",
        "_precompute_engine",
        "_tp_size",
        "aux_loss_enabled",
    ),
    "trl.GRPOTrainer": (
        "_buffered_inputs",
        "_step",
        "_metrics",
        "_logs",
        "_pending_extra_logs",
        "_pending_metrics",
        "_tokenizer",
        "_total_train_tokens",
        "_entropy_bonus_enabled",
        "environment_factories",
        "aux_loss_enabled",
    ),
    "trl.SFTTrainer": ("_metrics", "_total_train_tokens"),
    "transformers.Trainer": (
        "model_wrapped",
        "_signature_columns",
        "gather_function",
        "loss_is_scaled_for_ga",
        "is_distributed_loading_by_transformers",
    ),
    "peft.PeftModel": ("_adapters_disabled", "active_adapter"),
    "peft.tuners.lora.LoraLayer": (
        "_disable_adapters",
        "_active_adapter",
        "merged_adapters",
        "lora_variant",
        "cast_input_dtype_enabled",
    ),
    # what each layer of transformers' models asks
    "transformers.modeling_layers.GradientCheckpointingLayer": ("gradient_checkpointing",),
    "bitsandbytes.nn.Linear4bit": ("support_avx512bf16_for_cpu",),
}


def keep_4bit_weights_trainable(model) -> None:
    """Stop bitsandbytes from repacking 4-bit weights for inference on CPUs with AVX512-BF16.

    The first forward in eval mode without gradient (a reference pass, an evaluation) would repack them for good, into
    a layout whose kernel has no backward: the layers below would then train on wrong gradients.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def missing_names(names: tuple | None = None) -> list[str]:
    """Tell what of `names`, by default `PRIVATE_NAMES`, the installed releases no longer have, a sentence each."""
    missing = []
    for module_name, path, parameters in PRIVATE_NAMES if names is None else names:
        target = importlib.import_module(module_name)
        for part in path.split("."):
            target = getattr(target, part, _GONE)
        if target is _GONE:
            missing.append(f"{module_name}.{path} is gone")
            continue
        known = inspect.signature(target).parameters if parameters else ()
        missing += [f"{module_name}.{path} no longer takes `{name}`" for name in parameters if name not in known]
    return missing
