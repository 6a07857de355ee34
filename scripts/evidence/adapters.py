"""What LoRA's relatives and other optimizers give in short fine-tunes: ALLoRA, rsLoRA, DoRA, AdEMAMix, Ano, GAF.

    python scripts/evidence/adapters.py --seeds 10                              # small model, made-up lists and facts
    python scripts/evidence/adapters.py --data ../shared/data --stage gsm8k hh  # SmolLM2, 3 seeds

Every cell is one training run. The small model, which knows facts, is taught to reverse lists; SmolLM2 learns GSM8K
solutions or chosen HH answers. `few` is 100 rows for 3 epochs, `many` 400 rows for one; SmolLM2 has 100 rows once, in
steps of 4, so that its grid ends. Arms: `lora`, with alpha at
half, once and four times the rank and with dropout (the paper's argument is that ALLoRA needs neither); `allora`;
`rslora`, which divides alpha by the root of the rank; `dora`; `orthogonal`, LoRA whose A has orthonormal rows at the
start; each with AdamW, and `lora` and `allora` with SGD too, where ALLoRA's factors are not divided out. LoRA with the
optimizers `ademamix` and `ano`, and with `gaf`, AdamW on the micro-batches whose gradients agree, on rows as they are
and with 30% of the targets swapped among each other (`adamw` there is LoRA with AdamW).

Learning rates of the small model are the best of a few on another seed's rows (`--pilot`), of SmolLM2 the usual one of
LoRA, with SGD the best of a few on another seed. Measured: loss of the held-out answers, how many lists are right, and
what is left of the earlier task (AdEMAMix's claim): the loss of the facts and how many are still right, of SmolLM2 the
loss of answers of the other data set.
"""

import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness
from evidence import adapters_report, noise, noise_measures, reversing

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"few": (100, 3), "many": (400, 1)}
SMOLLM2_SIZES = {"once": (100, 1)}
# of each arm: what its adapter has beside rank and targets, settings of the trainer, and the optimizer its rate is for
ARMS = {
    "base": (None, {}, None),
    "lora": ({"alpha": 1}, {}, "adamw"),
    "lora_half": ({"alpha": 0.5}, {}, "adamw"),
    "lora_four": ({"alpha": 4}, {}, "adamw"),
    "lora_dropout": ({"alpha": 1, "lora_dropout": 0.1}, {}, "adamw"),
    "allora": ({"scheme": "allora"}, {}, "allora"),
    "rslora": ({"alpha": 1, "use_rslora": True}, {}, "adamw"),
    "dora": ({"alpha": 1, "use_dora": True}, {}, "adamw"),
    "orthogonal": ({"alpha": 1, "orthogonal": True}, {}, "adamw"),
    "lora_sgd": ({"alpha": 1}, {"optim": "sgd"}, "sgd"),
    "allora_sgd": ({"scheme": "allora"}, {"optim": "sgd"}, "allora_sgd"),
}
OPTIMIZERS = {
    "adamw": ({"alpha": 1}, {}, "adamw"),
    # published is a slow mean over ten thousand steps, which in fifty is none
    "ademamix": (
        {"alpha": 1},
        {"optim": "pytorch_optimizer:ademamix", "optim_args": "betas=(0.9,0.999,0.98),alpha=5"},
        "adamw",
    ),
    "ano": ({"alpha": 1}, {"optim": "pytorch_optimizer:ano"}, "ano"),
    "gaf": ({"alpha": 1}, {"gradient_agreement": 0.97}, "adamw"),
}


def cells(stage: str, seeds: int) -> list[dict]:
    """The grid; the model before training has no rows. `lora` on clean rows stands for AdamW there."""
    grid, sizes = [], SIZES if stage == "small" else SMOLLM2_SIZES
    most = list(sizes)[-1]
    for seed in range(seeds):
        shared = {"stage": stage, "seed": seed}
        grid.append(shared | {"rows": "none", "data": "none", "arm": "base"})
        for size in sizes:
            grid += [shared | {"rows": size, "data": "clean", "arm": arm} for arm in list(ARMS)[1:]]
        grid += [shared | {"rows": most, "data": "clean", "arm": arm} for arm in list(OPTIMIZERS)[1:]]
        grid += [shared | {"rows": most, "data": "swapped", "arm": arm} for arm in OPTIMIZERS]
    return grid


class Small(noise.Small):
    """The small llama of noise.py, which has learned facts: pairs of words that have a word. Rows reverse lists."""

    rates = {"adamw": 8e-3, "allora": 8e-3, "sgd": 2.0, "allora_sgd": 0.5, "ano": 4e-3}
    tried = {"adamw": (2e-3, 4e-3, 8e-3, 1.6e-2), "sgd": (0.25, 0.5, 1.0, 2.0)}
    step, rank, longest, taught_epochs = 8, 8, 8, 40

    def load(self, seed: int, size: str):
        """(model, rows to train on, clean held-out rows, rows of the earlier task)."""
        from posttrain.data.generated import WORDS, reverse_list_pairs

        lists = reverse_list_pairs(SIZES.get(size, (0, 0))[0] or 1, seed=6000 + seed, words=self.words)
        new = reverse_list_pairs(self.held_out, seed=7000 + seed, words=self.words, exclude=lists)
        rng = random.Random(f"facts {seed}")
        pairs = rng.sample([(a, b) for a in WORDS for b in WORDS if a != b], self.facts)
        facts = [self._row("fact", *pair, rng.choice(WORDS)) for pair in pairs]

        def listed(rows):
            return [
                {"kind": "list", "prompt": row["prompt"], "completion": row["chosen"]}
                for row in map(reversing.as_text, rows)
            ]

        return self._taught(seed, facts), listed(lists), listed(new), facts

    def _taught(self, seed: int, facts: list[dict]) -> str:
        """The base after it has learned the facts, all of its weights."""
        folder = self.folder / f"facts-{self.words}-{seed}"
        if not (folder / "tokenizer.json").exists():
            base = reversing.pretrain(self.folder / f"base-{self.words}-{seed}", seed, self.words)
            with tempfile.TemporaryDirectory() as run:
                trainer = _trainer(
                    base, facts, run, None, seed, num_train_epochs=self.taught_epochs, learning_rate=1e-3
                )
                trainer.train()
            trainer.model.save_pretrained(folder)
            trainer.processing_class.save_pretrained(folder)
        return str(folder)

    def score(self, model, tokenizer, held_out, earlier) -> dict:
        texts = noise.generate(model, tokenizer, [row["prompt"] for row in held_out + earlier], self.longest)
        right = [
            float(text.split() == row["completion"].split())
            for text, row in zip(texts, held_out + earlier, strict=True)
        ]
        found = noise_measures.answers_of(model, noise.tokenised(earlier, tokenizer))
        return {
            "lists_right": right[: len(held_out)],
            "facts_right": right[len(held_out) :],
            "earlier_loss": found["loss"],
            "earlier_tokens": found["tokens"],
        }


class SmolLM2(noise.SmolLM2):
    """SmolLM2 of noise.py; the earlier task is the other data set, of which it is known before."""

    rates = {"adamw": 2e-4, "allora": 2e-4, "sgd": 0.1, "allora_sgd": 0.1, "ano": 2e-4}
    tried = {"adamw": (2e-4,), "sgd": (0.5, 1.0, 2.0)}
    rank, step, earlier = 16, 4, 30

    def load(self, seed: int, size: str):
        self.rows = SMOLLM2_SIZES.get(size, (0, 0))[0] or 1
        base, rows, held_out, _ = super().load(seed)
        other = noise.SmolLM2(self.data, "hh" if self.what == "gsm8k" else "gsm8k")
        from transformers import AutoTokenizer

        return base, rows, held_out, other._read("test", AutoTokenizer.from_pretrained(base))[: self.earlier]

    def score(self, model, tokenizer, held_out, earlier) -> dict:
        found = noise_measures.answers_of(model, noise.tokenised(earlier, tokenizer))
        return {"earlier_loss": found["loss"], "earlier_tokens": found["tokens"]}


def adapter_of(source, own: dict):
    """The adapter of an arm."""
    from peft import LoraConfig

    own = dict(own)
    scheme, orthogonal = own.pop("scheme", None), own.pop("orthogonal", False)
    shared = dict(r=source.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    if scheme:
        from posttrain.adapters.allora import ALLoRAConfig

        return ALLoRAConfig(**shared), False
    alpha = own.pop("alpha") * source.rank
    return LoraConfig(**shared, lora_alpha=alpha, **own), orthogonal


def orthogonalise(model) -> None:
    """Give each LoRA matrix A orthonormal rows, as many as it has."""
    import torch

    for name, weight in model.named_parameters():
        if "lora_A" in name:
            with torch.no_grad():
                weight.copy_(torch.linalg.qr(weight.T.double())[0].T)


def _trainer(base: str, rows, run: str, adapter, seed: int, **settings):
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback

    from posttrain import NoisySFTConfig, NoisySFTTrainer

    settings = (
        dict(
            output_dir=run,
            per_device_train_batch_size=8,
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
            seed=seed,
        )
        | settings
    )
    columns = Dataset.from_list([{name: row[name] for name in ("prompt", "completion")} for row in rows])
    trainer = NoisySFTTrainer(
        base,
        args=NoisySFTConfig(**settings),
        train_dataset=columns,
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=adapter,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train_cell(source, cell: dict, rate: float | None = None) -> dict:
    """Train one cell, and measure the model."""
    import time

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, rows, held_out, earlier = source.load(cell["seed"], cell["rows"])
    if cell["data"] == "swapped":
        rows = noise.swapped(rows, cell["seed"])
    tokenizer, facts = AutoTokenizer.from_pretrained(base), {"train_seconds": 0.0}
    if cell["arm"] == "base":
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    else:
        own, settings, kind = (ARMS | OPTIMIZERS)[cell["arm"]]
        adapter, orthogonal = adapter_of(source, own)
        split = {"per_device_train_batch_size": source.step}
        if "gradient_agreement" in settings:
            # the rule is about micro-batches: four of a step's rows
            split = {"per_device_train_batch_size": source.step // 4, "gradient_accumulation_steps": 4}
        with tempfile.TemporaryDirectory() as run:
            trainer = _trainer(
                base,
                rows,
                run,
                adapter,
                cell["seed"],
                num_train_epochs=(SIZES | SMOLLM2_SIZES)[cell["rows"]][1],
                learning_rate=rate or source.rates[kind],
                **split,
                **settings,
            )
            if orthogonal:
                orthogonalise(trainer.model)
            begun = time.monotonic()
            trainer.train()
            facts = {"train_seconds": round(time.monotonic() - begun, 1)}
        model = trainer.accelerator.unwrap_model(trainer.model)
    model.eval()
    found = noise_measures.answers_of(model, noise.tokenised(held_out, tokenizer))
    return facts | found | source.score(model, tokenizer, held_out, earlier)


def pilot(source, stage: str) -> None:
    """LoRA with each optimizer over learning rates, seed 900."""
    most = list(SIZES if stage == "small" else SMOLLM2_SIZES)[-1]
    for arm in ("lora", "allora", "lora_sgd", "allora_sgd", "ano"):
        tried = source.tried["sgd" if arm.endswith("sgd") else "adamw"]
        # a rate that was chosen beforehand needs no run
        for rate in tried if len(tried) > 1 else ():
            cell = {"stage": stage, "seed": 900, "rows": most, "data": "clean", "arm": arm}
            found = adapters_report.measured(train_cell(source, cell, rate))
            said = ", ".join(f"{name} {value.mean():.3f}" for name, value in found.items())
            print(f"{arm}, learning rate {rate:g}: {said}", flush=True)


def main() -> None:
    parser = harness.options(__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT / "runs/evidence/adapters", help="folder of the bases")
    parser.add_argument(
        "--cells", type=Path, default=ROOT / "docs/evidence/cells/adapters", help="folder of the results"
    )
    parser.add_argument("--stage", choices=["small", "gsm8k", "hh"], nargs="+", help="default: small; all with --data")
    parser.add_argument("--minutes", type=float, help="start no further cell after this long")
    parser.add_argument("--pilot", action="store_true", help="learning rates, on another seed")
    args = parser.parse_args()
    stages = args.stage or (["small", "gsm8k", "hh"] if args.data else ["small"])
    if set(stages) - {"small"} and args.data is None:
        parser.error(f"--stage {' '.join(stages)} needs --data")
    report, missing = [], []
    for stage in stages:
        source = Small(args.work) if stage == "small" else SmolLM2(args.data, stage)
        if args.pilot:
            pilot(source, stage)
            continue
        grid = cells(stage, args.seeds or (2 if args.quick else 10 if stage == "small" else 3))
        path = args.cells / f"{stage}.jsonl"
        harness.run_grid(path, grid, lambda cell, source=source: train_cell(source, cell), args.minutes)
        done, left = harness.read_grid(path, grid)
        report += adapters_report.summarise(stage, done)
        missing += left
    adapters_report.show(report)
    if args.json:
        content = {"command": harness.command(), "machine": harness.machine(), "rows": report}
        harness.write_json(args.json, content | {"missing_cells": missing})


if __name__ == "__main__":
    main()
