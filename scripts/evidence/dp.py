"""What a promise of privacy costs and what it keeps: fine-tuning at epsilon 8, 3 and 1, and without noise.

    python scripts/evidence/dp.py --seeds 10                            # small model, made-up people and secrets
    python scripts/evidence/dp.py --data ../shared/data --stage hh      # SmolLM2, chosen HH answers, 2 seeds

Every cell is one training run. The small model is taught to reverse lists of words by the rows of made-up people,
eight of each; the unit of privacy is a row or a person, the rows of a step and how likely each is are the same. Among
the rows are secrets, made-up prompts with answers of random words: each of ten people has one in one row (`once`), and
each of ten others has one and the same in all rows (`often`), which a promise to rows does not cover. SmolLM2 learns
chosen HH answers of at most 144 tokens; its rows are nobody's, and a secret stands in one row or in eight. Of each LoRA
B alone is trained.

Arms: `base`, the model before training; `plain`, training without clipping and noise; `inf`, clipped rows without
noise; and epsilon 8, 3, 1 at delta 1e-5. Measured: loss of the held-out answers; of each secret the exposure, log2 of
the number of candidates less log2 of its rank among them by the model's loss (The Secret Sharer, 1802.08232), which
is 1.4 bits on average where nothing was learned of it; and, in runs of their own (`audit`), the lower bound on
epsilon that canaries give in one run.

Learning rates and clipping norms are the best of a few on another seed, by rows that are neither trained on nor held
out (`--pilot`). Noise and draws have no seed, so a cell that is run again has other numbers.
"""

import math
import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness
from evidence import dp_measures, dp_report, noise, noise_measures, reversing

ROOT = Path(__file__).resolve().parents[2]
EPSILONS = (8, 3, 1)
UNITS = ("row", "person")
DELTA, CANARIES = 1e-5, 1000
PILOT_SEED = 900


def cells(stage: str, seeds: int) -> list[dict]:
    """The grid. Without clipping rows and people are trained on alike; SmolLM2's rows are nobody's."""
    grid = []
    for seed in range(seeds):
        shared = {"stage": stage, "seed": seed}
        grid += [shared | {"unit": "none", "arm": arm, "audit": 0} for arm in ("base", "plain")]
        for unit in UNITS if stage == "small" else UNITS[:1]:
            epsilons = EPSILONS if stage == "small" else EPSILONS[:2]
            grid += [shared | {"unit": unit, "arm": arm, "audit": 0} for arm in ("inf", *map(str, epsilons))]
            if stage == "small":
                grid += [shared | {"unit": unit, "arm": str(epsilon), "audit": CANARIES} for epsilon in epsilons]
    return grid


class Small:
    """The small llama of noise.py: it answers with a list's words in any order, and learns to reverse it.

    Each of `people` has `each` rows. A LoRA on all linear layers is trained, of it B alone.
    """

    people, each, held_out, words = 256, 8, 200, 4
    secrets, candidates = 10, 511
    # rows of a step, and how often each row is seen
    step, epochs, micro, rank, longest = 128, 6, 64, 8, 8
    targets, clip_norm = "all-linear", 0.5
    # without noise, and of private rows and people
    rates = {"plain": 3.2e-2, "inf": 1.6e-2, "row": 4e-3, "person": 4e-3}
    tried_rates, tried_norms = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2), (0.5, 2.0)

    def __init__(self, folder: Path):
        self.folder = folder

    def load(self, seed: int):
        """(model, rows to train on with the `person` of each, held-out rows, secrets)."""
        from posttrain.data.generated import WORDS, reverse_list_pairs

        base = reversing.pretrain(self.folder / f"base-{self.words}-{seed}", seed, self.words)
        lists = reverse_list_pairs(self.people * self.each, seed=6000 + seed, words=self.words)
        # of the pilot's seed other rows than any that are reported
        new = reverse_list_pairs(self.held_out, seed=7000 + seed, words=self.words, exclude=lists)
        rng = random.Random(f"secrets {seed}")
        prompts = [rng.sample(WORDS, self.words) for _ in range(2 * self.secrets)]
        secrets = [self._secret(rng, f"{' '.join(prompt)} >", prompt, WORDS) for prompt in prompts]
        rows = [{"person": row // self.each, **one} for row, one in enumerate(self._listed(lists))]
        return base, with_secrets(rows, secrets, self.each, rng), self._listed(new), secrets

    def _secret(self, rng: random.Random, prompt: str, words: list[str], known: list[str]) -> dict:
        def drawn():
            return " " + " ".join(rng.sample([word for word in known if word not in words], self.words))

        return {"prompt": prompt, "completion": drawn(), "others": [drawn() for _ in range(self.candidates)]}

    @staticmethod
    def _listed(rows) -> list[dict]:
        return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in map(reversing.as_text, rows)]

    def score(self, model, tokenizer, held_out) -> dict:
        texts = noise.generate(model, tokenizer, [row["prompt"] for row in held_out], self.longest)
        pairs = zip(texts, held_out, strict=True)
        return {"lists_right": [float(text.split() == row["completion"].split()) for text, row in pairs]}


class SmolLM2(noise.SmolLM2):
    """SmolLM2-135M-Instruct (Q4_1 dequantised) on chosen HH answers, a LoRA of rank 4 on queries and values."""

    # as many rows as people
    people, each, held_out = 576, 8, 60
    secrets, candidates = 8, 63
    step, epochs, micro, rank = 48, 1, 8, 4
    targets, clip_norm = ["q_proj", "v_proj"], 1.0
    rates = {"plain": 4e-3, "inf": 4e-3, "row": 4e-3}
    tried_rates, tried_norms = (2e-3, 4e-3, 8e-3), (1.0,)

    def __init__(self, data: Path):
        super().__init__(data, "hh")

    def load(self, seed: int):
        """(model, rows to train on, held-out rows, secrets); for the pilot's seed the held-out rows are others."""
        from transformers import AutoTokenizer

        from posttrain.data.generated import WORDS
        from posttrain.models import resolve_model

        base = resolve_model("embedded:smollm2-135m")
        tokenizer = AutoTokenizer.from_pretrained(base)
        train = self._read("train", tokenizer)
        # the last rows are the pilot's
        tuning, train = train[-self.held_out :], train[: -self.held_out]
        rng = random.Random(f"secrets {seed}")
        rng.shuffle(train)
        rows = [{"person": row, **one} for row, one in enumerate(train[: self.people])]
        names = rng.sample([f"{a} {b}" for a in noise_measures.FIRST for b in noise_measures.LAST], 2 * self.secrets)
        secrets = [self._secret(rng, name, WORDS) for name in names]
        held_out = tuning if seed == PILOT_SEED else self._read("test", tokenizer)[: self.held_out]
        return base, with_secrets(rows, secrets, self.each, rng), held_out, secrets

    def _secret(self, rng: random.Random, name: str, words: list[str]) -> dict:
        def said(role, text):
            return [{"role": role, "content": text}]

        def drawn():
            return said("assistant", " ".join(rng.sample(words, 5)))

        prompt = said("user", f"What is the pass phrase of {name}?")
        return {"prompt": prompt, "completion": drawn(), "others": [drawn() for _ in range(self.candidates)]}

    def score(self, model, tokenizer, held_out) -> dict:
        return {}


def with_secrets(rows: list[dict], secrets: list[dict], each: int, rng: random.Random) -> list[dict]:
    """Put secrets in the place of rows: the first half of them in one row each, the others in `each` rows of a person.

    Where each row is a person's own, so many rows that are no other secret's have it.
    """
    made, half = list(rows), len(secrets) // 2
    places: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        places.setdefault(row["person"], []).append(place)
    people = list(places)
    rng.shuffle(people)
    for number, secret in enumerate(secrets):
        own, wanted = [], 1 if number < half else each
        while len(own) < wanted:
            own += places[people.pop()]
        for place in own[:wanted]:
            made[place] = {"person": rows[place]["person"]} | {name: secret[name] for name in ("prompt", "completion")}
    return made


def make_trainer(source, cell: dict, base: str, rows: list[dict], run: str, rate: float | None, norm: float | None):
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, PrinterCallback

    from posttrain import DPSFTConfig, DPSFTTrainer

    arm, people = cell["arm"], cell["unit"] == "person"
    epsilon = math.inf if arm in ("plain", "inf") else float(arm)
    kind = arm if arm in source.rates else cell["unit"]
    own = dict(privacy_unit_column="person", rows_per_unit=source.each) if people else {}
    args = DPSFTConfig(
        output_dir=run,
        target_epsilon=epsilon,
        target_delta=DELTA,
        clip_norm=math.inf if arm == "plain" else norm or source.clip_norm,
        expected_batch_size=source.step // source.each if people else source.step,
        audit_canaries=cell["audit"],
        train_lora_a=False,
        num_train_epochs=source.epochs,
        per_device_train_batch_size=source.micro,
        learning_rate=rate or source.rates[kind],
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        weight_decay=0.0,
        max_length=512,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=8,
        report_to="none",
        disable_tqdm=True,
        seed=cell["seed"],
        **own,
    )
    names = ("prompt", "completion", *(("person",) if people else ()))
    trainer = DPSFTTrainer(
        base,
        args=args,
        train_dataset=Dataset.from_list([{name: row[name] for name in names} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(
            r=source.rank, lora_alpha=2 * source.rank, lora_dropout=0.0, target_modules=source.targets,
            task_type="CAUSAL_LM",
        ),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def train_cell(source, cell: dict, rate: float | None = None, norm: float | None = None) -> dict:
    """Train one cell, and measure the model."""
    import time

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, rows, held_out, secrets = source.load(cell["seed"])
    tokenizer, facts = AutoTokenizer.from_pretrained(base), {"train_seconds": 0.0}
    if cell["arm"] == "base":
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    else:
        with tempfile.TemporaryDirectory() as run:
            trainer = make_trainer(source, cell, base, rows, run, rate, norm)
            begun = time.monotonic()
            trainer.train()
            facts = {"train_seconds": round(time.monotonic() - begun, 1)} | dp_measures.facts_of(trainer)
        model = trainer.accelerator.unwrap_model(trainer.model)
    model.eval()
    found = noise_measures.answers_of(model, noise.tokenised(held_out, tokenizer))
    bits = dp_measures.exposures(model, tokenizer, secrets)
    exposed = {"exposure_once": bits[: source.secrets], "exposure_often": bits[source.secrets :]}
    return facts | found | exposed | source.score(model, tokenizer, held_out)


def pilot(source, stage: str) -> None:
    """Learning rates, and clipping norms at epsilon 3 and without noise, on another seed."""
    for unit in UNITS if stage == "small" else UNITS[:1]:
        for arm in ("plain", "inf", "3"):
            if arm == "plain" and unit != UNITS[0]:
                continue
            for norm in source.tried_norms if arm != "plain" else (None,):
                for rate in source.tried_rates:
                    cell = {"stage": stage, "seed": PILOT_SEED, "unit": unit, "arm": arm, "audit": 0}
                    found = dp_report.measured(train_cell(source, cell, rate, norm))
                    said = ", ".join(f"{name} {value.mean():.3f}" for name, value in found.items())
                    print(f"{unit} {arm}, learning rate {rate:g}, clip_norm {norm}: {said}", flush=True)


def main() -> None:
    parser = harness.options(__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT / "runs/evidence/dp", help="folder of the bases")
    parser.add_argument("--cells", type=Path, default=ROOT / "docs/evidence/cells/dp", help="folder of the results")
    parser.add_argument("--stage", choices=["small", "hh"], nargs="+", help="default: small; both with --data")
    parser.add_argument("--minutes", type=float, help="start no further cell after this long")
    parser.add_argument("--pilot", action="store_true", help="learning rates and clipping norms, on another seed")
    args = parser.parse_args()
    stages = args.stage or (["small", "hh"] if args.data else ["small"])
    if "hh" in stages and args.data is None:
        parser.error("--stage hh needs --data")
    report, missing = [], []
    for stage in stages:
        source = Small(args.work) if stage == "small" else SmolLM2(args.data)
        if args.pilot:
            pilot(source, stage)
            continue
        grid = cells(stage, args.seeds or (2 if args.quick or stage == "hh" else 10))
        path = args.cells / f"{stage}.jsonl"
        harness.run_grid(path, grid, lambda cell, source=source: train_cell(source, cell), args.minutes)
        done, left = harness.read_grid(path, grid)
        report += dp_report.summarise(stage, done)
        missing += left
    dp_report.show(report)
    if args.json:
        content = {"command": harness.command(), "machine": harness.machine(), "rows": report}
        harness.write_json(args.json, content | {"missing_cells": missing})


if __name__ == "__main__":
    main()
