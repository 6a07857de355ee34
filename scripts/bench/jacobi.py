"""Speed of Jacobi generation, by a line of guesses and by a tree of them, beside `generate` of transformers.

    OMP_NUM_THREADS=2 python scripts/bench/jacobi.py --data ../shared/data --json docs/evidence/jacobi_speed.json

SmolLM2-135M is trained on 120 GSM8K solutions, an epoch with LoRA that is then merged, once as it is (`sft`) and once
with noise on tokens (`msn`). Each of both, and the model before, answers the same held-out questions in three ways,
one text at a time, which take turns question by question: `greedy`, `line` (5 guesses a forward), `tree` (5, 62 beside
them, and one line found in the text). The table tells how many texts have other tokens than `greedy` makes, as where
two logits are equal up to rounding. The first question does not count.
"""

import gzip
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness
from bench.arms import lora, model_of, settings, three
from bench.noise import load_rows
from bench.sides import no_curves

MODELS = {"base": None, "sft": {}, "msn": {"token_noise": "msn"}}
WAYS = {"greedy": None, "line": {}, "tree": {"tree_nodes": 62, "retrieval": 3}}
ROWS, BATCH, NEW_TOKENS = 120, 8, 64


def trained(model: str, own: dict | None, args):
    """The model after training with settings `own`, the adapter merged; as it is for None. With its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

    from posttrain import NoisySFTConfig, NoisySFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    if own is None:
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), tokenizer
    with tempfile.TemporaryDirectory() as folder, no_curves():
        count = 16 if args.quick else ROWS
        config = NoisySFTConfig(**settings(folder, "made", BATCH, count // BATCH) | {"learning_rate": 2e-4}, **own)
        trainer = NoisySFTTrainer(model, config, train_dataset=load_rows(args.data, count), peft_config=lora())
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().eval(), tokenizer


def questions(args, tokenizer, count: int) -> list:
    """Tokens (1, T) of prompts that nothing was trained on."""
    import torch

    if args.data is None:
        from posttrain.data.instructions.loading import load_instructions

        # behind those that are trained on
        rows = load_instructions(f"generated:arithmetic?n={ROWS + count}").select(range(ROWS, ROWS + count))
        prompts = [row["prompt"] for row in rows]
    else:
        with gzip.open(args.data / "gsm8k_test.jsonl.gz", "rt") as file:
            tasks = [json.loads(line) for line, _ in zip(file, range(count), strict=False)]
        prompts = [[{"role": "user", "content": task["question"]}] for task in tasks]
    ids = [
        tokenizer(prompt)["input_ids"]
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        for prompt in prompts
    ]
    return [torch.tensor([one]) for one in ids]


def side_of(model, way: str, prompts: list, made: list):
    """A side of `harness.alternate`: it answers a prompt a turn, and notes (new tokens, forwards) in `made`."""
    import torch

    from posttrain.generation import jacobi

    def side(turn):
        for ids in prompts:
            if WAYS[way] is None:
                mask = torch.ones_like(ids)
                with torch.no_grad():
                    found = model.generate(ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False)
                new = found[0, ids.size(1) :].tolist()
                made.append((new, len(new)))
            else:
                found = jacobi.generate(model, ids, max_new_tokens=NEW_TOKENS, **WAYS[way])
                made.append((found.sequences[0, ids.size(1) :].tolist(), found.forwards.item()))
            turn()

    return side


def measure(args, rounds: int) -> list[dict]:
    """One row a model and way."""
    rows, name = [], model_of(args)
    for which, own in MODELS.items():
        model, tokenizer = trained(name, own, args)
        prompts, made = questions(args, tokenizer, rounds + 1), {way: [] for way in WAYS}
        seconds = harness.alternate({way: side_of(model, way, prompts, made[way]) for way in WAYS}, rounds)
        for way in WAYS:
            counted = made[way][1:]
            tokens, forwards = sum(len(new) for new, _ in counted), sum(count for _, count in counted)
            other = sum(new != plain for (new, _), (plain, _) in zip(counted, made["greedy"][1:], strict=True))
            ratios = [plain / own for own, plain in zip(seconds[way], seconds["greedy"], strict=True)]
            rows.append(
                {
                    "model": which,
                    "way": way,
                    "seconds": three(seconds[way]),
                    "speed_over_greedy": three(ratios),
                    "tokens_a_forward": round(tokens / forwards, 4),
                    "texts_with_other_tokens": other,
                }
            )
    return rows


def main(arguments: list[str] | None = None) -> None:
    options = harness.options(__doc__.split("\n")[0])
    options.add_argument("--rounds", type=int, metavar="N", help="questions that are answered in each way")
    args = options.parse_args(arguments)
    os.environ.setdefault("POSTTRAIN_LOG", "warning")
    from posttrain.tables import format_table

    rows = measure(args, args.rounds or (3 if args.quick else 20))
    lines = [
        [
            *(row["model"], row["way"]),
            *("{:.3f} [{:.3f}, {:.3f}]".format(*row[name]) for name in ("seconds", "speed_over_greedy")),
            *(row["tokens_a_forward"], row["texts_with_other_tokens"]),
        ]
        for row in rows
    ]
    print(format_table(("model", "way", "s/text", "speed over greedy", "tokens a forward", "other tokens"), lines))
    if args.json:
        content = {"command": harness.command(), "machine": harness.machine(), "rows": rows}
        harness.write_json(args.json, content)


if __name__ == "__main__":
    main()
