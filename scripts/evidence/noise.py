"""What noise in fine-tuning gives: NEFTune, SymNoise, NoiseFiT, MSN, GIFT-SW beside plain SFT.

    python scripts/evidence/noise.py --seeds 10                              # small model, made-up lists and facts
    python scripts/evidence/noise.py --data ../shared/data --stage gsm8k hh  # SmolLM2, 3 seeds of 120 rows

Every cell is one training run, on the rows as they are or with 30% of the targets swapped among each other.
`neftune_2x` is NEFTune with twice the epochs, which costs what SymNoise does; `gift_sw` has as many columns as train
about as many values as the LoRA of its stage. The held-out rows are clean and the same for all cells of a seed, and no
setting was chosen on them: strengths are published ones, learning rates the usual ones of LoRA and full fine-tuning,
the small model's from runs with another seed (`--pilot`), where GIFT-SW wants four times LoRA's, which it has with
SmolLM2 as well. Of the small model's embeddings the published `noise_alpha` of 5 is 1.4 times the norm; it has 1, whose
share, 0.3, is that of published runs on large models.

Measured: loss of the held-out answers, expected calibration error, curvature of the loss along random directions in
the embeddings (SymNoise's claim), loss after rounding the base to 4 bits, adapters and salient columns kept (GIFT-SW's
claim), new tokens a forward of Jacobi generation (MSN's claim), the share of questions about facts that stand nowhere
in the data to which something was invented; of the small model also how many lists and known facts are right.
"""

import gzip
import json
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness
from evidence import noise_measures, noise_report, reversing

ROOT = Path(__file__).resolve().parents[2]
# settings of NoisySFTConfig, and how many times the epochs of SFT
ARMS = {
    "base": ({}, 0),
    "sft": ({}, 1),
    "neftune": ({"embedding_noise": "neftune"}, 1),
    "symnoise": ({"embedding_noise": "symnoise"}, 1),
    "neftune_2x": ({"embedding_noise": "neftune"}, 2),
    "noisefit": ({"hidden_noise": "noisefit"}, 1),
    "msn": ({"token_noise": "msn"}, 1),
    "gift_sw": ({}, 1),
    "other_tuning": ({}, 1),
}
DATA = ("clean", "swapped")
SWAPPED = 0.3


def cells(stage: str, seeds: int) -> list[dict]:
    """The grid; the model before training has no data."""
    grid = []
    for seed in range(seeds):
        grid.append({"stage": stage, "seed": seed, "data": "none", "arm": "base"})
        grid += [{"stage": stage, "seed": seed, "data": data, "arm": arm} for arm in list(ARMS)[1:] for data in DATA]
    return grid


def swapped(rows: list[dict], seed: int) -> list[dict]:
    """Of a share of the rows the completions are moved round among them, within rows of a kind."""
    rng, made = random.Random(f"swapped {seed}"), [dict(row) for row in rows]
    for kind in sorted({row.get("kind", "") for row in rows}):
        places = [i for i, row in enumerate(rows) if row.get("kind", "") == kind]
        places = rng.sample(places, int(len(places) * SWAPPED))
        for place, other in zip(places, places[1:] + places[:1], strict=True):
            made[place]["completion"] = rows[other]["completion"]
    return made


class Small:
    """A llama of 0.7M parameters from random weights that has learned to answer with the words of a list in any order.

    It is taught to reverse lists of four words, to know facts (a pair of words has a word), and to say `none` of pairs
    that stand for nothing. All weights train; `other_tuning` is LoRA. Invented is a word other than `none` for a new
    pair.
    """

    lists, facts, nothing, held_out = 512, 128, 128, 200
    words, epochs, step, rate, lora_rate, gift_rate, longest = 4, 16, 32, 5e-4, 2e-3, 8e-3, 8
    lora_is_other, alpha = True, 1.0
    # held-out rows and directions of the curvature, new tokens of Jacobi generation
    curved, directions, drafted = 16, 4, 16

    def __init__(self, folder: Path):
        self.folder = folder

    def load(self, seed: int):
        """(model, rows to train on, clean held-out rows, questions whose right answer is `none`)."""
        from posttrain.data.generated import WORDS, reverse_list_pairs

        base = reversing.pretrain(self.folder / f"base-{self.words}-{seed}", seed, self.words)
        lists = reverse_list_pairs(self.lists, seed=6000 + seed, words=self.words)
        new = reverse_list_pairs(self.held_out, seed=7000 + seed, words=self.words, exclude=lists)
        rng, none = random.Random(f"facts {seed}"), WORDS[0]
        keys = rng.sample([(a, b) for a in WORDS[1:] for b in WORDS[1:] if a != b], self.facts + 2 * self.nothing)
        known = [self._row("fact", *key, rng.choice(WORDS[1:])) for key in keys[: self.facts]]
        empty = [self._row("nothing", *key, none) for key in keys[self.facts :]]

        def listed(rows):
            return [
                {"kind": "list", "prompt": row["prompt"], "completion": row["chosen"]}
                for row in map(reversing.as_text, rows)
            ]

        rows = listed(lists) + known + empty[: self.nothing]
        held_out = listed(new) + known[: self.facts // 2]
        return base, rows, held_out, empty[self.nothing :]

    @staticmethod
    def _row(kind, first, second, value):
        return {"kind": kind, "prompt": f"{first} {second} >", "completion": f" {value}"}

    def lora(self):
        return dict(r=8, lora_alpha=16, target_modules="all-linear")

    def score(self, model, tokenizer, held_out, unknown) -> dict:
        texts = generate(model, tokenizer, [row["prompt"] for row in held_out + unknown], self.longest)
        right = [
            float(text.split() == row["completion"].split())
            for text, row in zip(texts, held_out + unknown, strict=True)
        ]
        kinds = [row["kind"] for row in held_out + unknown]
        found = {
            name: [value for value, kind in zip(right, kinds, strict=True) if kind == of]
            for name, of in (("lists_right", "list"), ("facts_right", "fact"))
        }
        invented = [1 - value for value, kind in zip(right, kinds, strict=True) if kind == "nothing"]
        return found | {"invented": invented}


class SmolLM2:
    """SmolLM2-135M-Instruct (Q4_1 dequantised) with LoRA on GSM8K solutions or chosen HH answers, 144 tokens at most.

    `other_tuning` is full fine-tuning. Invented is an answer about a person who does not exist that tells a number or a
    name, and does not say that it is not known.
    """

    rows, held_out, asked, tokens = 120, 60, 40, 144
    epochs, step, rate, full_rate, gift_rate, longest = 1, 8, 2e-4, 2e-5, 8e-4, 24
    lora_is_other, alpha = False, 5.0
    curved, directions, drafted = 8, 2, 24

    def __init__(self, data: Path, what: str):
        self.data, self.what = data, what

    def load(self, seed: int):
        from transformers import AutoTokenizer

        from posttrain.models import resolve_model

        base = resolve_model("embedded:smollm2-135m")
        tokenizer = AutoTokenizer.from_pretrained(base)
        train, test = (self._read(name, tokenizer) for name in ("train", "test"))
        random.Random(seed).shuffle(train)
        asked = [
            {"prompt": [{"role": "user", "content": question}], "name": name}
            for question, name in noise_measures.questions(self.asked)
        ]
        return base, train[: self.rows], test[: self.held_out], asked

    def _read(self, name: str, tokenizer) -> list[dict]:
        path = self.data / (f"gsm8k_{name}.jsonl.gz" if self.what == "gsm8k" else f"hh_pairs_{name}.jsonl.gz")
        with gzip.open(path, "rt") as lines:
            rows = [json.loads(line) for line in lines]
        if self.what == "gsm8k":
            rows = [
                {
                    "prompt": [{"role": "user", "content": row["question"]}],
                    "completion": [{"role": "assistant", "content": row["answer"]}],
                }
                for row in rows
            ]
        else:
            rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]

        def fits(row):
            return len(tokenizer.apply_chat_template(row["prompt"] + row["completion"])["input_ids"]) <= self.tokens

        return list(filter(fits, rows))

    def lora(self):
        return dict(r=16, lora_alpha=32, target_modules="all-linear")

    def score(self, model, tokenizer, held_out, asked) -> dict:
        texts = generate(model, tokenizer, [row["prompt"] for row in asked], self.longest)
        pairs = zip(texts, asked, strict=True)
        return {"invented": [float(noise_measures.is_invented(text, row["name"])) for text, row in pairs]}


def train_cell(source, cell: dict, **overrides) -> dict:
    """Train one cell, and measure the model."""
    import time

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, rows, held_out, asked = source.load(cell["seed"])
    if cell["data"] == "swapped":
        rows = swapped(rows, cell["seed"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    facts = {"steps": 0, "train_seconds": 0.0}
    if cell["arm"] == "base":
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    else:
        with tempfile.TemporaryDirectory() as run:
            trainer = make_trainer(source, cell, rows, base, tokenizer, run, overrides)
            begun = time.monotonic()
            trainer.train()
            facts = {"steps": trainer.state.global_step, "train_seconds": round(time.monotonic() - begun, 1)}
            log = [entry for entry in trainer.state.log_history if "noise/ratio" in entry]
            facts |= {"noise_ratio": round(log[-1]["noise/ratio"], 4)} if log else {}
        model = trainer.accelerator.unwrap_model(trainer.model)
    model.eval()
    tokens = tokenised(held_out, tokenizer)
    facts |= noise_measures.answers_of(model, tokens)
    facts["curvature"] = round(noise_measures.curvature(model, tokens[: source.curved], source.directions), 5)
    prompts = [row["input_ids"][: first_label(row)] for row in tokens[:8]]
    facts["accepted_tokens"] = round(noise_measures.accepted(model, prompts, source.drafted), 4)
    facts |= source.score(model, tokenizer, held_out, asked)
    noise_measures.rounded(model)
    facts["loss_4bit"] = noise_measures.answers_of(model, tokens)["loss"]
    return facts


def make_trainer(source, cell: dict, rows, base: str, tokenizer, run: str, overrides: dict):
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback

    from posttrain import NoisySFTConfig, NoisySFTTrainer

    own, times = ARMS[cell["arm"]]
    if "embedding_noise" in own:
        own = own | {"noise_alpha": source.alpha}
    with_lora = (cell["arm"] == "other_tuning") == source.lora_is_other
    adapter = LoraConfig(**source.lora(), lora_dropout=0.0, task_type="CAUSAL_LM") if with_lora else None
    if cell["arm"] == "gift_sw":
        from posttrain.adapters.gift_sw import GiftSWConfig

        # a LoRA has r numbers for each input as well
        adapter = GiftSWConfig(r=2 * source.lora()["r"], target_modules="all-linear", task_type="CAUSAL_LM")
    rate = source.rate if with_lora == (not source.lora_is_other) else _other_rate(source)
    rate = source.gift_rate if cell["arm"] == "gift_sw" else rate
    settings = dict(
        output_dir=run,
        num_train_epochs=source.epochs * times,
        per_device_train_batch_size=source.step,
        learning_rate=rate,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        weight_decay=0.0,
        max_length=512,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=10,
        report_to="none",
        disable_tqdm=True,
        seed=cell["seed"],
    )
    args = NoisySFTConfig(**settings | own | overrides)
    columns = Dataset.from_list([{name: row[name] for name in ("prompt", "completion")} for row in rows])
    trainer = NoisySFTTrainer(base, args=args, train_dataset=columns, processing_class=tokenizer, peft_config=adapter)
    trainer.remove_callback(PrinterCallback)
    return trainer


def _other_rate(source) -> float:
    return source.lora_rate if source.lora_is_other else source.full_rate


def tokenised(rows: list[dict], tokenizer) -> list[dict]:
    """Prompt and completion as the trainer tokenises them, the prompt not learned."""
    from datasets import Dataset
    from trl import SFTConfig

    from posttrain.data.instructions.tokens import as_trained

    columns = Dataset.from_list([{name: row[name] for name in ("prompt", "completion")} for row in rows])
    args = SFTConfig(max_length=None, use_cpu=True, bf16=False, report_to="none")
    made = as_trained(columns, tokenizer, args, "held-out rows", completion_only=True)
    return [{name: list(row[name]) for name in ("input_ids", "labels")} for row in made]


def first_label(row: dict) -> int:
    return next(place for place, label in enumerate(row["labels"]) if label != -100)


def generate(model, tokenizer, prompts: list, longest: int, batch: int = 40) -> list[str]:
    """A greedy answer to each prompt."""
    import torch

    texts = []
    for start in range(0, len(prompts), batch):
        ids = [
            tokenizer(prompt)["input_ids"]
            if isinstance(prompt, str)
            else tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
            for prompt in prompts[start : start + batch]
        ]
        width, pad = max(map(len, ids)), tokenizer.pad_token_id
        padded = torch.tensor([[pad] * (width - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
        with torch.no_grad():
            made = model.generate(
                input_ids=padded, attention_mask=mask, max_new_tokens=longest, do_sample=False, pad_token_id=pad
            )
        texts += tokenizer.batch_decode(made[:, width:], skip_special_tokens=True)
    return texts


def pilot(source) -> None:
    """Plain SFT of both tunings, and GIFT-SW, on clean rows, seed 900, over learning rates."""
    for arm in ("sft", "other_tuning", "gift_sw"):
        for rate in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3):
            cell = {"stage": "small", "seed": 900, "data": "clean", "arm": arm}
            found = noise_report.measured(train_cell(source, cell, learning_rate=rate))
            said = ", ".join(f"{name} {found[name].mean():.3f}" for name in ("loss", "lists_right", "facts_right"))
            print(f"{arm}, learning rate {rate:g}: {said}", flush=True)


def main() -> None:
    parser = harness.options(__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT / "runs/evidence/noise", help="folder of the bases")
    parser.add_argument("--cells", type=Path, default=ROOT / "docs/evidence/cells/noise", help="folder of the results")
    parser.add_argument("--stage", choices=["small", "gsm8k", "hh"], nargs="+", help="default: small; all with --data")
    parser.add_argument("--arms", choices=ARMS, nargs="+", help="run cells of these alone; all are reported")
    parser.add_argument("--minutes", type=float, help="start no further cell after this long")
    parser.add_argument("--pilot", action="store_true", help="the small model over learning rates, another seed")
    args = parser.parse_args()
    stages = args.stage or (["small", "gsm8k", "hh"] if args.data else ["small"])
    if set(stages) - {"small"} and args.data is None:
        parser.error(f"--stage {' '.join(stages)} needs --data")
    if args.pilot:
        return pilot(Small(args.work))
    report, missing = [], []
    for stage in stages:
        source = Small(args.work) if stage == "small" else SmolLM2(args.data, stage)
        grid = cells(stage, args.seeds or (2 if args.quick else 10 if stage == "small" else 3))
        path, wanted = args.cells / f"{stage}.jsonl", [cell for cell in grid if cell["arm"] in (args.arms or ARMS)]
        harness.run_grid(path, wanted, lambda cell, source=source: train_cell(source, cell), args.minutes)
        done, left = harness.read_grid(path, grid)
        report += noise_report.summarise(stage, done)
        missing += left
    noise_report.show(report)
    if args.json:
        content = {"command": harness.command(), "machine": harness.machine(), "rows": report}
        harness.write_json(args.json, content | {"missing_cells": missing})


if __name__ == "__main__":
    main()
