"""`posttrain generate`: what the base and the adapter answer to the same prompts, side by side."""

import math
from pathlib import Path

from posttrain.console import say, say_json
from posttrain.errors import ConfigError, DataError
from posttrain.visible import one_line

# of a file of prompts
_MOST_BYTES = 64 << 20


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="answers of base and adapter to the same prompts",
        description="Greedy answers unless --temperature is given, of the base and of the base with the adapter.",
    )
    parser.add_argument("--adapter", type=Path, required=True, help="folder of the adapter")
    parser.add_argument("--base", help="base model; default: the one that the adapter names")
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be given several times")
    parser.add_argument("--prompts", type=Path, help="a text file, a prompt a line")
    parser.add_argument("--max-new-tokens", "--max_new_tokens", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="let the libraries' own messages through")
    parser.add_argument("--json", action="store_true", help="for scripts: a list of prompt, base, adapter")


def run(args) -> int:
    """Print the answers."""
    prompts = list(args.prompt)
    if args.prompts is not None:
        if not args.prompts.is_file():
            raise DataError(f"prompts is {args.prompts}, which is no file.")
        try:
            with open(args.prompts, "rb") as file:
                text = file.read(_MOST_BYTES + 1)
            if len(text) > _MOST_BYTES:
                raise DataError(f"prompts is {args.prompts}, which has more than {_MOST_BYTES >> 20} MiB.")
            lines = text.decode("utf-8-sig").splitlines()
        except OSError as error:
            raise DataError(f"prompts is {args.prompts}, which cannot be read: {error.strerror}.") from None
        except UnicodeDecodeError as error:
            raise DataError(f"prompts is {args.prompts}, which is not UTF-8 text: {error}.") from None
        prompts += [line for line in lines if line.strip()]
    if not prompts:
        raise ConfigError("no prompt was given; use --prompt TEXT or --prompts FILE.")
    if args.max_new_tokens < 1 or not 0 <= args.temperature < math.inf:
        raise ConfigError(
            f"max_new_tokens is {args.max_new_tokens} and temperature {args.temperature:g}; max_new_tokens must be "
            "1 or more, and temperature 0 or more: a finite number."
        )
    if not 0 <= args.seed < 2**32:
        raise ConfigError(f"seed is {args.seed}; it must lie in 0 to {2**32 - 1}.")

    from posttrain import quiet
    from posttrain.adapters.loading import base_of, load_adapter, placed, tokenizer_beside

    base_of(args.adapter, args.base)
    if not args.verbose:
        quiet.quiet_libraries()
    from transformers import set_seed

    tokenizer = tokenizer_beside(args.adapter, args.base)
    model = placed(load_adapter(args.adapter, args.base))
    rows = []
    for prompt in prompts:
        answers = {}
        for side in ("base", "adapter"):
            set_seed(args.seed)
            if side == "base":
                with model.disable_adapter():
                    answers[side] = _answer(model, tokenizer, prompt, args)
            else:
                answers[side] = _answer(model, tokenizer, prompt, args)
        rows.append({"prompt": prompt, **answers})
        if not args.json:
            say(f"prompt:  {prompt}\nbase:    {answers['base']}\nadapter: {answers['adapter']}\n", flush=True)
    if args.json:
        say_json(rows, indent=1, ensure_ascii=False)
    return 0


def _rendered(tokenizer, turns: list):
    try:
        return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    except DataError:
        raise
    # a chat template is a program that came with the model: anything can come out of it
    except Exception as error:
        raise DataError(
            f"the prompt cannot be turned into tokens by the chat template of the adapter: {type(error).__name__}: "
            f"{one_line(error)}. Mend chat_template.jinja beside it, or take the base's."
        ) from error


def _answer(model, tokenizer, prompt: str, args) -> str:
    import torch

    if tokenizer.chat_template:
        inputs = _rendered(tokenizer, [{"role": "user", "content": prompt}])
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if not inputs["input_ids"].numel():
        by = "the chat template of the adapter" if tokenizer.chat_template else "the tokenizer"
        raise DataError(f"the prompt {prompt!r} comes out of {by} as no token at all, so there is nothing to answer.")
    inputs = inputs.to(model.device)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=args.max_new_tokens, pad_token_id=tokenizer.pad_token_id, **sampling
        )
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
