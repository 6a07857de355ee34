"""What learning from scored answers gives: SFT on all, weighted behaviour cloning, R-LoL, A-LoL, A-LoL seq, and rDPO.

    python scripts/evidence/a_lol.py --seeds 10                      # small model, generated task
    python scripts/evidence/a_lol.py --data ../shared/data --seeds 1 # and SmolLM2 on HH-RLHF answers

Every cell is one training run on two answers a prompt, on the data as it is or with half of the prompts replaced by
ones both of whose answers have a low reward. `sft_kept` is SFT on the answers above the mean reward, those that A-LoL
keeps: beside it, A-LoL is its weights alone. All arms make as many passes over the answers they train on, so those that
leave answers out make fewer steps. The held-out rows are the same for all cells of a seed, and no setting was chosen on
them: learning rates are those of plain SFT and of rDPO on the data as it is, the small model's from runs with
another seed (`--pilot`), SmolLM2's the usual one of LoRA.
"""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness
from evidence import a_lol_report, reversing

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = {"sft": "nll", "wbc": "wbc", "r_lol": "r_lol", "a_lol": "a_lol", "a_lol_seq": "a_lol_seq", "sft_kept": "nll"}
ARMS = ("base", "sft", "a_lol", "dpo", "wbc", "r_lol", "a_lol_seq", "sft_kept")
DATA = ("as_is", "half_low")
SIDES = ("chosen", "rejected")


def cells(stage: str, seeds: int) -> list[dict]:
    """The grid; the model before training has no data. Each arm on both data sets, so that a part compares them."""
    grid = []
    for seed in range(seeds):
        grid.append({"stage": stage, "seed": seed, "data": "none", "arm": "base"})
        grid += [{"stage": stage, "seed": seed, "data": data, "arm": arm} for arm in ARMS[1:] for data in DATA]
    return grid


class Small:
    """A llama of 0.7M parameters from random weights, taught to answer with the words of the prompt in any order. The
    reward is the share of words in their place of the reversed list; the logged answers are that list with some of its
    words shuffled. Generations are scored by whether the whole list is right, drawn at temperature 1."""

    pairs, held_out, epochs, longest, sampled = 1024, 400, 4, 8, True
    # answers an optimiser step and a micro-batch; rDPO takes half as many pairs
    step, micro = 32, 32
    words = 4
    rate, dpo_rate, beta = 2e-4, 5e-4, 0.1
    rates = (1e-4, 2e-4, 5e-4, 1e-3)
    template = False

    def __init__(self, folder: Path):
        self.folder = folder
        self.bases: dict[int, str] = {}

    def load(self, seed: int):
        """(model, training pairs, pairs with low rewards, held-out pairs, LoRA)."""
        from posttrain.data.generated import reverse_list_pairs

        lists = reverse_list_pairs(self.pairs, seed=3000 + seed, words=self.words)
        held_out = reverse_list_pairs(self.held_out, seed=4000 + seed, words=self.words, exclude=lists)
        if seed not in self.bases:
            self.bases[seed] = reversing.pretrain(self.folder / f"base-{self.words}-{seed}", seed, self.words)
        made = self._answers(lists, f"logged {seed}"), self._answers(lists, f"low {seed}", low=True)
        return self.bases[seed], *made, self._answers(held_out, f"held out {seed}"), None

    def _answers(self, lists, seed: str, low: bool = False) -> list[dict]:
        import random

        rng, rows = random.Random(seed), []
        for row in map(reversing.as_text, lists):
            right, sides = row["chosen"].split(), {}
            while len(sides) < 2:
                answer = right[:]
                count = self.words if low else rng.choice((0, *range(2, self.words + 1)))
                places = rng.sample(range(self.words), count)
                for place, other in zip(places, rng.sample(places, count), strict=True):
                    answer[place] = right[other]
                reward = sum(one == other for one, other in zip(answer, right, strict=True)) / self.words
                if not low or reward <= 1 / self.words:
                    # two different rewards, so that a pair has a better side
                    sides.setdefault(reward, " " + " ".join(answer))
            best, worst = max(sides), min(sides)
            rows.append({"prompt": row["prompt"], "chosen": sides[best], "rejected": sides[worst]})
            rows[-1] |= {"chosen_reward": best, "rejected_reward": worst}
        return rows

    def score(self, seed: int, rows: list[dict], texts: list[str]) -> dict:
        right = [row["prompt"].split()[:-1][::-1] for row in rows]
        return {"score": [float(text.split() == words) for text, words in zip(texts, right, strict=True)]}


class SmolLM2:
    """SmolLM2-135M-Instruct (Q4_1 dequantised) with LoRA on HH-RLHF pairs of at most 220 tokens with both answers; the
    reward is the sigmoid of the published reward model's score. Low pairs are those both of whose answers are in the
    lowest 40% of the training file's rewards. Generations are greedy, and scored by a probe of the untrained model's
    states that was fitted to the human labels of training pairs that no policy trains on, never to a reward."""

    pairs, held_out, epochs, longest, sampled = 160, 120, 1, 40, False
    step, micro = 8, 8
    rate, dpo_rate, beta = 2e-4, 2e-4, 0.1
    rates = ()
    template = True
    tokens, low_share = 220, 0.4

    def __init__(self, data: Path, folder: Path):
        self.data, self.folder = data, folder
        self._loaded = None

    def load(self, seed: int):
        import random

        from peft import LoraConfig

        base, ours, low, held_out, _ = self._read()
        random.Random(seed).shuffle(ours := list(ours))
        random.Random(seed).shuffle(low := list(low))
        chosen = ours[: self.pairs]
        low = [row for row in low if row not in chosen][: self.pairs // 2]
        if len(low) < self.pairs // 2:
            raise SystemExit(f"{len(low)} pairs with low rewards, {self.pairs // 2} are needed")
        lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        return base, chosen, low, held_out, lora

    def score(self, seed: int, rows: list[dict], texts: list[str]) -> dict:
        probe = self._read()[4]
        answers = [[{"role": "assistant", "content": text}] for text in texts]
        human, reward = probe.scores(probe.states([row["prompt"] for row in rows], answers))
        return {
            "score": [round(float(value), 4) for value in human],
            "reward": [round(float(value), 4) for value in reward],
            "probe": {
                "accuracy": round(probe.human_accuracy, 4),
                "held_out_accuracy": round(self._held_out_accuracy(probe), 4),
                "reward_correlation": round(probe.reward_correlation, 4),
            },
        }

    def _held_out_accuracy(self, probe) -> float:
        if self._accuracy is None:
            held_out = self._read()[3]
            prompts = [row["prompt"] for row in held_out]
            sides = [probe.scores(probe.states(prompts, [row[side] for row in held_out]))[0] for side in SIDES]
            self._accuracy = float((sides[0] > sides[1]).mean())
        return self._accuracy

    _accuracy = None

    def _read(self):
        if self._loaded is None:
            import gzip
            import json
            import math

            import numpy as np
            from evidence.probe import Probe
            from transformers import AutoTokenizer

            from posttrain.models import resolve_model

            base = resolve_model("embedded:smollm2-135m")
            tokenizer = AutoTokenizer.from_pretrained(base)
            files = {}
            for name in ("train", "test"):
                with gzip.open(self.data / f"hh_pairs_{name}.jsonl.gz", "rt") as lines:
                    files[name] = [json.loads(line) for line in lines]
                for row in files[name]:
                    for side in SIDES:
                        row[f"{side}_reward"] = 1 / (1 + math.exp(-row[f"{side}_reward"]))

            def fits(row):
                turns = [turn for side in ("prompt", *SIDES) for turn in row[side]]
                return len(tokenizer.apply_chat_template(turns)["input_ids"]) <= self.tokens

            # every other pair is the probe's
            ours, theirs = (list(filter(fits, files["train"][first::2])) for first in (0, 1))
            probe = Probe(base, tokenizer, theirs, self.folder / "states.npy", self.tokens)
            rewards = [row[f"{side}_reward"] for row in files["train"] for side in SIDES]
            bound = float(np.quantile(rewards, self.low_share))
            low = [row for row in ours if max(row["chosen_reward"], row["rejected_reward"]) <= bound]
            held_out = list(filter(fits, files["test"]))[: self.held_out]
            self._loaded = base, ours, low, held_out, probe
        return self._loaded


def train_cell(source, cell: dict, out: Path, **overrides) -> dict:
    """Train one cell; score the held-out answers and the model's own."""
    import time

    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, pairs, low, held_out, lora = source.load(cell["seed"])
    if cell["data"] == "half_low":
        half = len(pairs) // 2
        pairs = pairs[:half] + low[-half:]
    tokenizer = AutoTokenizer.from_pretrained(base)
    facts = {"steps": 0, "answers": 0, "train_seconds": 0.0}
    if cell["arm"] == "base":
        model = AutoModelForCausalLM.from_pretrained(base)
    else:
        with tempfile.TemporaryDirectory() as run:
            make = _dpo if cell["arm"] == "dpo" else _answers_trainer
            trainer = make(source, cell, pairs, base, tokenizer, lora, run, out, overrides)
            begun = time.monotonic()
            trainer.train()
            facts = {"steps": trainer.state.global_step, "train_seconds": round(time.monotonic() - begun, 1)}
            facts["answers"] = len(trainer.train_dataset) * (2 if cell["arm"] == "dpo" else 1)
        model = trainer.model
    likelihoods = _likelihoods(model, tokenizer, Dataset.from_list(held_out))
    texts, lengths = _generate(model, tokenizer, source, held_out, cell["seed"])
    found = source.score(cell["seed"], held_out, texts)
    return facts | likelihoods | found | {"lengths": lengths} | {f"distinct_{n}": _distinct(texts, n) for n in (1, 2)}


def _settings(source, cell: dict, run: str, out: Path) -> dict:
    return dict(
        output_dir=run,
        num_train_epochs=source.epochs,
        lr_scheduler_type="linear",
        warmup_steps=0.1,
        weight_decay=0.0,
        save_strategy="no",
        logging_steps=1000,
        disable_tqdm=True,
        ref_cache_dir=str(out / "reference"),
        seed=cell["seed"],
    )


def _answers_trainer(source, cell, pairs, base, tokenizer, lora, run, out, overrides):
    from datasets import Dataset

    from posttrain import ALoLConfig, ALoLTrainer

    rows = []
    for pair in pairs:
        for side in SIDES:
            rows.append({"prompt": pair["prompt"], "completion": pair[side], "reward": pair[f"{side}_reward"]})
    if cell["arm"] == "sft_kept":
        mean = sum(row["reward"] for row in rows) / len(rows)
        rows = [row for row in rows if row["reward"] > mean]
    settings = _settings(source, cell, run, out) | {"learning_rate": source.rate} | overrides
    args = ALoLConfig(
        variant=VARIANTS[cell["arm"]],
        per_device_train_batch_size=source.micro,
        gradient_accumulation_steps=source.step // source.micro,
        **settings,
    )
    return ALoLTrainer(
        base, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, peft_config=lora
    )


def _dpo(source, cell, pairs, base, tokenizer, lora, run, out, overrides):
    from datasets import Dataset

    from posttrain import RobustDPOConfig, RobustDPOTrainer

    settings = _settings(source, cell, run, out) | {"learning_rate": source.dpo_rate, "beta": source.beta} | overrides
    args = RobustDPOConfig(
        per_device_train_batch_size=source.micro // 2,
        gradient_accumulation_steps=source.step // source.micro,
        precompute_ref_log_probs=True,
        # the cells that are named dpo
        pair_loss="rdpo",
        flip_rate=0.1,
        **settings,
    )
    rows = Dataset.from_list(pairs).select_columns(["prompt", "chosen", "rejected"])
    return RobustDPOTrainer(base, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=lora)


def _likelihoods(model, tokenizer, held_out) -> dict:
    """Log-probabilities of the held-out answers in nats, summed over tokens, with rewards and numbers of tokens."""
    from posttrain.data.tokens import tokenized_pairs
    from posttrain.evaluation import score_pairs

    pairs = held_out.select_columns(["prompt", *SIDES])
    rows = list(tokenized_pairs(pairs, tokenizer))
    scores = score_pairs(model, tokenizer, pairs)
    found = {}
    for side in SIDES:
        found[side] = [round(value, 3) for value in getattr(scores, side).tolist()]
        found[f"{side}_tokens"] = [len(row[f"{side}_ids"]) for row in rows]
        found[f"{side}_rewards"] = [round(value, 4) for value in held_out[f"{side}_reward"][:]]
    return found


def _generate(model, tokenizer, source, rows: list[dict], seed: int) -> tuple[list[str], list[int]]:
    """(an answer to each prompt, its tokens); in batches of 40 prompts of like length, padded on the left."""
    import torch

    model.eval()
    pad = tokenizer.pad_token_id
    prompts = []
    for row in rows:
        if source.template:
            ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        else:
            ids = tokenizer(row["prompt"])["input_ids"]
        prompts.append(ids)
    torch.manual_seed(seed)
    texts, lengths = [""] * len(rows), [0] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), 40):
        own = order[start : start + 40]
        width = max(len(prompts[i]) for i in own)
        ids = torch.tensor([[pad] * (width - len(prompts[i])) + prompts[i] for i in own])
        mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in own])
        with torch.no_grad():
            made = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=source.longest,
                do_sample=source.sampled,
                # the whole distribution, whatever the model's own generation settings are
                **({"temperature": 1.0, "top_k": 0, "top_p": 1.0} if source.sampled else {}),
                pad_token_id=pad,
            )
        for i, row in zip(own, made[:, width:].tolist(), strict=True):
            ends = [n for n, token in enumerate(row) if token == tokenizer.eos_token_id]
            row = row[: ends[0]] if ends else row
            texts[i], lengths[i] = tokenizer.decode(row, skip_special_tokens=True), len(row)
    return texts, lengths


def _distinct(texts: list[str], n: int) -> float:
    """The share of different runs of n words among all of them."""
    runs = [run for text in texts for run in zip(*(text.split()[i:] for i in range(n)), strict=False)]
    return round(len(set(runs)) / len(runs), 4) if runs else 0.0


def pilot(stage: str, source, work: Path) -> None:
    """Plain SFT and rDPO on the data as it is, seed 900, over learning rates."""
    for rate in source.rates:
        for arm in ("sft", "dpo"):
            result = train_cell(
                source, {"stage": stage, "seed": 900, "data": "as_is", "arm": arm}, work, learning_rate=rate
            )
            score, chosen = (sum(result[name]) / len(result[name]) for name in ("score", "chosen"))
            print(stage, arm, f"learning rate {rate:g}: score {score:.3f}, better answer {chosen:.2f} nats", flush=True)


def main() -> None:
    parser = harness.options(__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT / "runs/evidence/a_lol", help="folder of bases and caches")
    parser.add_argument(
        "--cells", type=Path, default=ROOT / "docs/evidence/cells/a_lol", help="folder of the grids' results"
    )
    parser.add_argument("--stage", choices=["small", "smollm2"], nargs="+", help="default: small; both with --data")
    parser.add_argument("--arms", choices=ARMS, nargs="+", help="run cells of these alone; all are reported")
    parser.add_argument("--minutes", type=float, help="start no further cell after this long")
    parser.add_argument("--pilot", action="store_true", help="SFT and rDPO over learning rates, with another seed")
    args = parser.parse_args()
    stages = args.stage or (["small", "smollm2"] if args.data else ["small"])
    if "smollm2" in stages and args.data is None:
        parser.error("--stage smollm2 needs --data")
    sources = {"small": lambda: Small(args.work), "smollm2": lambda: SmolLM2(args.data, args.work)}
    report, missing = [], []
    for stage in stages:
        source = sources[stage]()
        if args.pilot:
            pilot(stage, source, args.work)
            continue
        seeds = args.seeds or {"small": 2 if args.quick else 10, "smollm2": 1}[stage]
        grid = cells(stage, seeds)
        wanted = [cell for cell in grid if cell["arm"] in (args.arms or ARMS)]
        harness.run_grid(
            args.cells / f"{stage}.jsonl", wanted, lambda cell, s=source: train_cell(s, cell, args.work), args.minutes
        )
        done, left = harness.read_grid(args.cells / f"{stage}.jsonl", grid)
        report += a_lol_report.summarise(stage, done)
        missing += left
    if args.pilot:
        return
    a_lol_report.show(report)
    if args.json:
        content = {"command": harness.command(), "machine": harness.machine(), "rows": report}
        harness.write_json(args.json, content | {"missing_cells": missing})
        a_lol_report.plot(report, args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
