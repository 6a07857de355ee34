"""`posttrain merge`: an adapter folded into its base, and a check that the merged model still says the same."""

import json
from pathlib import Path

from posttrain.errors import ConfigError

_PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "To sort a list in Python,",
    "Once upon a time, in a small village",
)


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "merge",
        help="fold an adapter into its base model and check the result",
        description="Loads the base in bf16 (or --dtype), merges the adapter, saves, loads the merged model again and "
        "compares its logits with those of base and adapter.",
    )
    parser.add_argument("adapter", type=Path, help="folder of the adapter")
    parser.add_argument("output", type=Path, help="folder of the merged model; must be empty or new")
    parser.add_argument("--base", help="base model; default: the one that the adapter names")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--json", action="store_true", help="for scripts")


def run(args) -> int:
    """Merge; exit code 0 once the merged model was saved and re-checked."""
    if not (args.adapter / "adapter_config.json").is_file():
        raise ConfigError(f"adapter is {args.adapter}, which has no adapter_config.json; give an adapter's folder.")
    if args.output.exists() and any(args.output.iterdir()):
        raise ConfigError(f"output is {args.output}, which is not empty; give a new folder.")

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from posttrain.models import resolve_model

    named = json.loads((args.adapter / "adapter_config.json").read_text()).get("base_model_name_or_path")
    base = args.base or named
    if not base:
        raise ConfigError("base is not set, and the adapter names none; give --base MODEL.")
    base, dtype = resolve_model(base), getattr(torch, args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), args.adapter).eval()
    before = [_logits(model, tokenizer, prompt) for prompt in _PROMPTS]
    merged = model.merge_and_unload(safe_merge=True)
    merged.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    del merged, model
    reloaded = AutoModelForCausalLM.from_pretrained(args.output, dtype=dtype).eval()
    after = [_logits(reloaded, tokenizer, prompt) for prompt in _PROMPTS]
    tokens = sum(len(logits) for logits in before)
    largest = max((a - b).abs().max().item() for a, b in zip(after, before, strict=True))
    same = sum((a.argmax(-1) == b.argmax(-1)).sum().item() for a, b in zip(after, before, strict=True))
    facts = {"output": str(args.output), "dtype": args.dtype, "tokens": tokens}
    facts |= {"largest_logit_difference": largest, "top1_agreement": same / tokens}
    if args.json:
        print(json.dumps(facts))
    else:
        print(f"Merged into {args.output} in {args.dtype}.")
        print(f"Against base and adapter, on {tokens} tokens: largest logit difference {largest:.3g},", end=" ")
        print(f"top-1 agreement {same / tokens:.1%}.")
    return 0


def _logits(model, tokenizer, prompt: str):
    import torch

    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        return model(input_ids=ids).logits[0].float()
