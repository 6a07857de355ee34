"""What settings, model and adapter must be before any weight loads, asked by a trainer and by a dry run alike."""

import torch
from peft import PeftModel

from posttrain.hub import check_push
from posttrain.models import resolve_model
from posttrain.run import (
    adapter_checks,
    adapter_schemes,
    checks,
    devices,
    init_kwargs,
    lock,
    private_settings,
    refactoring,
    run_folder,
    start,
    update_config,
)
from posttrain.run.sharing import check_setting


def check(
    model, args, peft_config, method: str | None = None, live_reference: bool = False, has_folder: bool = True
) -> tuple:
    """Check settings, model and adapter as far as that needs neither weights nor data; writes and loads nothing else.

    Args:
        model: a hub id, a folder or `embedded:` name, or the model itself.
        args: the trainer's config. peft_config: of a new adapter, or None.
        method: the trainer's class, where it is known.
        live_reference: whether an adapter's reference is the policy itself, with its adapter off or replaced.
        has_folder: whether the run writes notes and checkpoints into its `output_dir`.

    Returns:
        the model, a name resolved to what can be loaded, and its config.

    Raises:
        ConfigError, EnvironmentIssue: what the run would be refused for.
    """
    if has_folder:
        run_folder.check_args(args, method)
        checks.check_output_dir(args.output_dir)
        # the first rank takes it, maybe before a slower one of the same run has come here
        if args.process_index == 0:
            lock.check_free(args.output_dir)
    if peft_config is not None:
        adapter_checks.check_lora(peft_config)
    own = model.peft_config.get("default") if isinstance(model, PeftModel) else None
    adapter_schemes.check(peft_config or own, args)
    refactoring.check(model, peft_config, args)
    checks.check_here(args)
    devices.check_one_device(args, model)
    adapted = peft_config is not None or isinstance(model, PeftModel)
    checks.check_synced_reference(args, adapted)
    devices.check_placed_in_time(args, adapted and live_reference)
    start.check_adapter(model, peft_config, args, live_reference)
    if isinstance(model, str):
        model = resolve_model(model)
    if isinstance(model, torch.nn.Module):
        config = model.config
    else:
        config = checks.load_config(model, args)
        init_kwargs.check(args, config)
        update_config.check_precision_to_come(args, peft_config, config)
        refactoring.check_precision_to_come(args, config)
    named_by = model if isinstance(model, torch.nn.Module) else config
    adapter_checks.check_names(peft_config, named_by, args.trust_remote_code)
    adapter_checks.check_layers(peft_config, named_by, args.trust_remote_code)
    adapter_checks.check_tying(peft_config, config)
    checks.check_router(args, config)
    if has_folder:
        run_folder.check_start_stays(args, model)
        check_push(args, model)
    check_setting(args, config, peft_config)
    if args.privacy is not None:
        private_settings.check_model(args, model, config, peft_config)
    return model, config
