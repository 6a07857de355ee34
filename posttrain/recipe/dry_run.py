"""What a run would do, told without doing it: no weight is loaded and nothing is written."""

import copy
import os
import warnings

from posttrain.console import say
from posttrain.private import hide

SAMPLE_ROWS = 64
# of the first row, which `show` prints as blocks
TEXTS = ("prompt", "chosen", "rejected", "completion", "reward", "demonstration", "gold")


def check(model_id: str, args, peft_config, live_reference: bool = False):
    """Check what every trainer checks before anything loads; returns the model's config.

    `live_reference`: as in `posttrain.run.settings.check`.
    """
    from posttrain.run import settings

    return settings.check(model_id, args, peft_config, live_reference=live_reference)[1]


def sizes(config, args, peft_config) -> dict[str, int | str]:
    """Count parameters and checkpoint bytes of a model without weights in memory; name its adapter's scheme."""
    import torch
    from transformers import AutoModelForCausalLM

    from posttrain.adapters import refactoring
    from posttrain.planning import plan
    from posttrain.run import adapter_checks, checks

    # on that device weights that are shared stay so
    with torch.device("meta"), warnings.catch_warnings(), checks.upstream_refusals(), checks.building("the model"):
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=args.trust_remote_code)
        if peft_config is not None:
            from peft import get_peft_model

            adapter_checks.check_names(peft_config, model)
            model = get_peft_model(model, copy.deepcopy(peft_config))
            if args.refactor_every:
                refactoring.factors_of(model)
            saved = _saved_by_peft(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    saved = trainable if peft_config is None else saved
    return {
        **({"adapter": peft_config.scheme} if hasattr(peft_config, "scheme") else {}),
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable parameters": trainable,
        # fp32; AdamW keeps two numbers a parameter beside the weights
        "checkpoint bytes (estimate)": 4 * (saved + (0 if args.save_only_model else 2 * trainable)),
        "memory a process (estimate)": plan.here(args, config, peft_config),
    }


def _saved_by_peft(model) -> int:
    """Count the numbers in an adapter's file, in which PEFT puts whole embeddings beside adapters of them."""
    from peft import get_peft_model_state_dict

    from posttrain.mechanisms import initial_adapter

    adapter = model.peft_config["default"]
    # by a name PEFT would ask the hub whether embeddings were resized
    adapter.base_model_name_or_path = None
    # saved for the untouched base, it has the first adapter beside the last
    ranks = 2 if initial_adapter.changes_base(adapter) else 1
    return sum(
        value.numel() * (ranks if ".lora_" in name else 1) for name, value in get_peft_model_state_dict(model).items()
    )


def show(facts: dict) -> None:
    """Print what `describe` found, from the first process alone."""
    if os.environ.get("RANK", "0") != "0":
        return
    say("A dry run: nothing was trained and nothing was written.\n")
    for name, value in facts.items():
        if name in TEXTS:
            say(f"\nFirst {name}:\n{value}")
        else:
            say(f"{name:42} {hide(value) if isinstance(value, str) else format(value, ',')}")
