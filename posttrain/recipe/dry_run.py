"""What a run would do, told without doing it: no weight is loaded and nothing is written."""

import os
import warnings

from posttrain.console import say
from posttrain.private import hide

SAMPLE_ROWS = 64
# of the first row, which `show` prints as blocks
TEXTS = ("prompt", "chosen", "rejected", "completion", "reward", "demonstration", "gold")


def check(model_id: str, args, peft_config):
    """Check what every trainer checks before anything loads; returns the model's config."""
    from posttrain.run import checks, run_folder

    run_folder.check_args(args, None)
    checks.check_output_dir(args.output_dir)
    if peft_config is not None:
        checks.check_lora(peft_config)
    return checks.load_config(model_id, args)


def sizes(config, args, peft_config) -> dict[str, int]:
    """Count parameters and checkpoint bytes of a model that is built without memory for its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from posttrain.run import checks

    # on that device weights that are shared stay so
    with torch.device("meta"), warnings.catch_warnings(), checks.upstream_refusals(), checks.building("the model"):
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=args.trust_remote_code)
        if peft_config is not None:
            from peft import get_peft_model

            checks.check_names(peft_config, model)
            model = get_peft_model(model, peft_config)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable parameters": trainable,
        # fp32; AdamW keeps two numbers a parameter beside the weights
        "checkpoint bytes (estimate)": 4 * trainable * (1 if args.save_only_model else 3),
    }


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
