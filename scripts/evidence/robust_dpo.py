"""What flipped preference labels do to DPO, and what cDPO, rDPO and Dr. DPO do about it.

    python scripts/evidence/robust_dpo.py --seeds 12                      # small model, generated task
    python scripts/evidence/robust_dpo.py --data ../shared/data --seeds 1 # and SmolLM2 on HH-RLHF pairs

Every cell is one training run. Labels are flipped in the training rows alone; the held-out rows are clean, the same for
all cells of a seed, and no setting was chosen on them: learning rate and number of steps come from runs of plain DPO on
clean labels with other seeds (`--pilot`).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness
from evidence import reversing

ROOT = Path(__file__).resolve().parents[2]
RATES = (0.0, 0.1, 0.2, 0.3)
BETA_PRIME = 1.0
# 32 pairs an optimiser step for every method. Dr. DPO over 8 weighs within micro-batches, as the published code does.
STEP, MICRO = 32, 8


def methods(rate: float) -> dict[str, dict]:
    """Trainer settings by name; with no flips cDPO and rDPO are DPO and are left out."""
    named = {"dpo": {"pair_loss": "dpo"}}
    if rate:
        named["cdpo"] = {"pair_loss": "cdpo", "flip_rate": rate}
        named["rdpo"] = {"pair_loss": "rdpo", "flip_rate": rate}
    dr_dpo = {"reduction": "dr_dpo", "beta_prime": BETA_PRIME}
    named["dr_dpo_8"] = dr_dpo | {"dr_dpo_scope": "micro_batch"}
    named["dr_dpo_32"] = dr_dpo | {"dr_dpo_scope": "global"}
    return named


def cells(stage: str, seeds: int) -> list[dict]:
    rates = RATES if stage == "small" else (0.2, 0.0, 0.1, 0.3)
    return [
        {"stage": stage, "seed": seed, "rate": rate, "method": method}
        for seed in range(seeds)
        for rate in rates
        for method in methods(rate)
    ]


class Small:
    """A llama of 0.7M parameters from random weights, taught to answer with the words of the prompt in any order; the
    preference is for their reverse. Word tokens, so that the task is learned in seconds."""

    train_pairs, held_out, epochs = 512, 400, 2
    settings = {"learning_rate": 5e-4, "beta": 0.1}
    words = 5

    def __init__(self, folder: Path):
        self.folder = folder
        self.bases: dict[int, str] = {}

    def load(self, seed: int):
        from posttrain.data.generated import reverse_list_pairs

        train = reverse_list_pairs(self.train_pairs, seed=1000 + seed, words=self.words)
        held_out = reverse_list_pairs(self.held_out, seed=2000 + seed, words=self.words, exclude=train)
        return self._base(seed), train.map(reversing.as_text), held_out.map(reversing.as_text), None

    def _base(self, seed: int) -> str:
        if seed not in self.bases:
            self.bases[seed] = reversing.pretrain(self.folder / f"base-{seed}", seed, self.words)
        return self.bases[seed]


class SmolLM2:
    """SmolLM2-135M-Instruct (Q4_1 dequantised) with LoRA on HH-RLHF pairs whose reward margin exceeds 0.5 in the human
    label's direction and that fit into 260 tokens; held-out pairs chosen alike from the test file."""

    train_pairs, held_out, epochs = 480, 236, 1
    settings = {"learning_rate": 2e-4, "beta": 0.1}

    def __init__(self, data: Path):
        self.data = data

    def load(self, seed: int):
        from peft import LoraConfig
        from transformers import AutoTokenizer

        from posttrain.models import resolve_model

        folder = resolve_model("embedded:smollm2-135m")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        train = self._pairs("hh_pairs_train.jsonl.gz", tokenizer).shuffle(seed=seed).select(range(self.train_pairs))
        held_out = self._pairs("hh_pairs_test.jsonl.gz", tokenizer)
        held_out = held_out.select(range(min(self.held_out, len(held_out))))
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        return folder, train, held_out, lora

    def _pairs(self, name: str, tokenizer):
        from datasets import load_dataset

        def fits(row):
            if row["chosen_reward"] - row["rejected_reward"] <= 0.5:
                return False
            sides = row["prompt"], row["chosen"], row["rejected"]
            return len(tokenizer.apply_chat_template([turn for side in sides for turn in side])["input_ids"]) <= 260

        rows = load_dataset("json", data_files=str(self.data / name), split="train")
        return rows.filter(fits).select_columns(["prompt", "chosen", "rejected"])


def train_cell(source, cell: dict, out: Path, **overrides) -> dict:
    """Train one cell and score the held-out pairs: margins of the log-ratios to the reference, in nats."""
    import tempfile

    import torch
    from transformers import AutoTokenizer

    from posttrain import RobustDPOConfig, RobustDPOTrainer
    from posttrain.data.corruption import flip_preferences

    base, train, held_out, lora = source.load(cell["seed"])
    train = flip_preferences(train, cell["rate"], seed=cell["seed"]).remove_columns("flipped")
    with tempfile.TemporaryDirectory() as run:
        settings = source.settings | methods(cell["rate"])[cell["method"]] | overrides
        args = RobustDPOConfig(
            output_dir=run,
            per_device_train_batch_size=MICRO,
            per_device_eval_batch_size=16,
            gradient_accumulation_steps=STEP // MICRO,
            num_train_epochs=source.epochs,
            lr_scheduler_type="linear",
            warmup_steps=0.1,
            weight_decay=0.0,
            save_strategy="no",
            logging_steps=1000,
            disable_tqdm=True,
            precompute_ref_log_probs=True,
            ref_cache_dir=str(out / "reference"),
            seed=cell["seed"],
            **settings,
        )
        trainer = RobustDPOTrainer(
            base,
            args=args,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=AutoTokenizer.from_pretrained(base),
            peft_config=lora,
        )
        margins = []
        inner = trainer.pair_losses

        def watched(chosen_logratios, rejected_logratios, inputs):
            if not trainer.model.training:
                margins.append((chosen_logratios - rejected_logratios).detach())
            return inner(chosen_logratios, rejected_logratios, inputs)

        trainer.train()
        trainer.pair_losses = watched
        trainer.evaluate()
    values = torch.cat(margins)
    return {"accuracy": (values > 0).float().mean().item(), "margins": [round(v, 3) for v in values.tolist()]}


def summarise(stage: str, done: list[dict]) -> list[dict]:
    """Accuracy by rate and method, and the paired difference from DPO at the same rate, over seeds and rows."""
    import numpy as np

    right = {}
    for entry in done:
        cell = entry["cell"]
        row = (np.array(entry["result"]["margins"]) > 0).astype(float)
        right.setdefault((cell["rate"], cell["method"]), {})[cell["seed"]] = row
    table = []
    for (rate, method), by_seed in sorted(right.items()):
        mean, low, high = harness.bootstrap(np.stack([by_seed[seed] for seed in sorted(by_seed)]))
        row = {"stage": stage, "rate": rate, "method": method, "seeds": len(by_seed)}
        row |= {"accuracy": round(mean, 4), "interval": [round(low, 4), round(high, 4)]}
        both = sorted(set(by_seed) & set(right.get((rate, "dpo"), {})))
        if method != "dpo" and both:
            gap = np.stack([by_seed[seed] - right[(rate, "dpo")][seed] for seed in both])
            row["minus_dpo"] = [round(value, 4) for value in harness.bootstrap(gap)]
        table.append(row)
    return table


def show(rows: list[dict]) -> None:
    from posttrain.tables import format_table

    def line(row):
        gap = row.get("minus_dpo")
        interval = "[{:.1%}, {:.1%}]".format(*row["interval"])
        difference = "{:+.1%} [{:+.1%}, {:+.1%}]".format(*gap) if gap else ""
        return [row["stage"], row["rate"], row["method"], row["seeds"], f"{row['accuracy']:.1%}", interval, difference]

    print(format_table(("stage", "flips", "method", "seeds", "accuracy", "95%", "minus DPO"), [line(r) for r in rows]))


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stages = sorted({row["stage"] for row in rows}, reverse=True)
    figure, axes = plt.subplots(1, len(stages), figsize=(5.2 * len(stages), 4), squeeze=False)
    names = ["dpo", "cdpo", "rdpo", "dr_dpo_8", "dr_dpo_32"]
    for axis, stage in zip(axes[0], stages, strict=True):
        for number, name in enumerate(names):
            points = [row for row in rows if row["stage"] == stage and row["method"] == name]
            if not points:
                continue
            x = [row["rate"] + 0.004 * (number - 2) for row in points]
            y = [row["accuracy"] for row in points]
            errors = [[row["accuracy"] - row["interval"][0] for row in points]]
            errors.append([row["interval"][1] - row["accuracy"] for row in points])
            axis.errorbar(x, y, yerr=errors, marker="o", capsize=2, label=name)
        axis.set(title=stage, xlabel="share of flipped training labels", ylabel="accuracy on clean held-out pairs")
        axis.set_xticks(RATES)
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = harness.options(__doc__.split("\n")[0])
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs/evidence/robust_dpo", help="folder of bases and caches"
    )
    parser.add_argument(
        "--cells", type=Path, default=ROOT / "docs/evidence/cells/robust_dpo", help="folder of the grids' results"
    )
    parser.add_argument(
        "--stage", choices=["small", "smollm2"], nargs="+", help="default: small, and smollm2 with --data"
    )
    parser.add_argument("--minutes", type=float, help="start no further cell after this long")
    parser.add_argument("--pilot", action="store_true", help="plain DPO on clean labels, seed 900, over learning rates")
    args = parser.parse_args()
    stages = args.stage or (["small", "smollm2"] if args.data else ["small"])
    sources = {"small": lambda: Small(args.work), "smollm2": lambda: SmolLM2(args.data)}
    if args.pilot:
        for stage in stages:
            for rate in (1e-4, 2e-4, 5e-4, 1e-3):
                cell = {"stage": stage, "seed": 900, "rate": 0.0, "method": "dpo"}
                result = train_cell(sources[stage](), cell, args.work, learning_rate=rate)
                print(stage, f"learning rate {rate:g}: accuracy {result['accuracy']:.3f}", flush=True)
        return
    rows, missing = [], []
    for stage in stages:
        seeds = args.seeds or {"small": 2 if args.quick else 12, "smollm2": 1}[stage]
        grid, source = cells(stage, seeds), sources[stage]()
        results = args.cells / f"{stage}.jsonl"
        harness.run_grid(results, grid, lambda cell, s=source: train_cell(s, cell, args.work), args.minutes)
        done, left = harness.read_grid(results, grid)
        rows += summarise(stage, done)
        missing += left
    show(rows)
    if args.json:
        content = {"command": harness.command(), "machine": harness.machine(), "rows": rows}
        harness.write_json(args.json, content | {"missing_cells": missing})
        plot(rows, args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
