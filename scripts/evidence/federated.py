"""What federated LoRA methods come to: FedSVD, FFA-LoRA, FedAvg-LoRA, FLoRA and FedEx-LoRA, private and not.

    python scripts/evidence/federated.py --seeds 10                               # small model, made-up rules for lists
    python scripts/evidence/federated.py --data ../shared/data --stage gsm8k      # SmolLM2, 8 short rounds

Every cell is one federated run of six clients, three of which train in a round, in one process. Rows have labels, and
each client's rows are of them by shares drawn from Dirichlet(0.5), as many rows a client. The small model is one of
1.2M parameters that was trained here to answer with the words of a list in any order; a row's label is a rule (copy,
reverse, rotate, swap), which its prompt names and its answer follows. SmolLM2 learns GSM8K solutions of at most 144
tokens, whose label is their number of steps.

Arms: `base`, the model before training; the six methods of `posttrain.federated`; and `ffa_orthonormal`, FFA-LoRA with
an orthonormal A from the start. Each with SGD and AdamW, and without privacy, or with epsilon 6 or 3 at delta 1e-5 of
each client over all rounds, by its private steps. Measured: loss of the held-out rows, which have all labels alike, how
many answers are right, how far the loss rose from one look to the next (the claim is that FedSVD is more stable), the
epsilon that the client with the most turns has spent, bytes a round, and, of FedSVD, how far A is from orthonormal.

Learning rates are the best of a few on another seed's rows (`--pilot`), for each optimizer, with and without privacy,
and for methods that train B and those that train A and B. Noise and draws of rows have no seed, so a private cell that
is run again has other numbers.
"""

import dataclasses
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness
from evidence import federated_report, noise, noise_measures, reversing

ROOT = Path(__file__).resolve().parents[2]
# by arm: the method, and what else its FederatedConfig has
ARMS = {
    "fedsvd": ("fedsvd", {}),
    "ffa_lora": ("ffa_lora", {}),
    "ffa_refactored_once": ("ffa_refactored_once", {}),
    "ffa_orthonormal": ("ffa_lora", {"initial_a": "orthonormal"}),
    "fedavg_lora": ("fedavg_lora", {}),
    "flora": ("flora", {}),
    "fedex_lora": ("fedex_lora", {}),
}
OPTIMIZERS, EPSILONS = ("sgd", "adamw"), (None, 6, 3)
DELTA, CLIENTS, A_ROUND, ALPHA, PILOT_SEED = 1e-5, 6, 3, 0.5, 900
# of four words: the place that each word of the answer has in the prompt
RULES = {
    "copy": (0, 1, 2, 3),
    "reverse": (3, 2, 1, 0),
    "left": (1, 2, 3, 0),
    "right": (3, 0, 1, 2),
    "ends": (3, 1, 2, 0),
    "pairs": (1, 0, 3, 2),
}


def cells(stage: str, seeds: int) -> list[dict]:
    """The grid. SmolLM2 has AdamW alone, and of the privacies the weaker one."""
    optimizers, epsilons = (OPTIMIZERS, EPSILONS) if stage == "small" else (OPTIMIZERS[1:], EPSILONS[:2])
    grid = []
    for seed in range(seeds):
        shared = {"stage": stage, "seed": seed}
        grid.append(shared | {"arm": "base", "optimizer": "none", "epsilon": None})
        grid += [
            shared | {"arm": arm, "optimizer": optimizer, "epsilon": epsilon}
            for epsilon in epsilons
            for optimizer in optimizers
            for arm in ARMS
        ]
    return grid


def mixtures(labels: list, clients: int, seed: int) -> list[list[float]]:
    """Each client's shares of the labels, from Dirichlet(ALPHA)."""
    rng = random.Random(f"mixtures {seed}")
    drawn = [[rng.gammavariate(ALPHA, 1.0) for _ in labels] for _ in range(clients)]
    return [[value / sum(one) for value in one] for one in drawn]


class Small:
    """A llama of 1.2M parameters and rules for lists of four words; a LoRA of rank 8 on all linears."""

    each, held_out, tuning, rounds, steps, batch, micro, rank, longest = 512, 240, 120, 30, 10, 16, 16, 8, 6
    # rows are short: nothing is cut, which would be looked at in each turn
    targets, clip_norm, looks, pretrained, max_length = "all-linear", 1.0, 10, 1500, None
    # by optimizer, whether it is private, and whether A is trained
    rates = {
        ("sgd", False, False): 1.0, ("sgd", False, True): 1.0, ("sgd", True, False): 0.5, ("sgd", True, True): 0.5,
        ("adamw", False, False): 4e-3, ("adamw", False, True): 4e-3, ("adamw", True, False): 2e-3,
        ("adamw", True, True): 2e-3,
    }  # fmt: skip
    tried = {"sgd": (0.5, 1.0, 2.0, 4.0, 8.0), "adamw": (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)}

    def __init__(self, folder: Path):
        self.folder = folder

    def load(self, seed: int):
        """(model, rows of each client, held-out rows with all labels alike)."""
        base = pretrain(self.folder / f"base-{seed}", seed, self.pretrained)
        rng, clients = random.Random(f"rules {seed}"), {}
        for number, shares in enumerate(mixtures(list(RULES), CLIENTS, seed)):
            labels = rng.choices(list(RULES), shares, k=self.each)
            clients[f"client-{number}"] = [self._row(rng, label) for label in labels]
        seen = {row["prompt"] for rows in clients.values() for row in rows}
        count, held = self.tuning if seed == PILOT_SEED else self.held_out, []
        while len(held) < count:
            row = self._row(rng, list(RULES)[len(held) % len(RULES)])
            held += [row] if row["prompt"] not in seen else []
        return base, clients, held

    @staticmethod
    def _row(rng: random.Random, label: str) -> dict:
        from posttrain.data.generated import WORDS

        words = rng.sample(WORDS, 4)
        answer = " ".join(words[place] for place in RULES[label])
        return {"label": label, "prompt": f"{' '.join(words)} {label} >", "completion": f" {answer}"}

    def score(self, model, tokenizer, held_out) -> dict:
        texts = noise.generate(model, tokenizer, [row["prompt"] for row in held_out], self.longest)
        pairs = zip(texts, held_out, strict=True)
        return {"right": [float(text.split() == row["completion"].split()) for text, row in pairs]}


class SmolLM2(noise.SmolLM2):
    """SmolLM2-135M-Instruct (Q4_1 dequantised) on GSM8K solutions, a LoRA of rank 4 on queries and values."""

    each, held_out, rounds, steps, batch, micro, rank, looks = 120, 60, 8, 5, 16, 8, 4, 2
    targets, clip_norm, max_length = ["q_proj", "v_proj"], 1.0, 512
    rates = {key: 4e-3 if not key[1] else 2e-3 for key in Small.rates}
    tried = {"sgd": (), "adamw": (2e-3, 4e-3, 8e-3)}

    def __init__(self, data: Path):
        super().__init__(data, "gsm8k")

    def load(self, seed: int):
        """(model, rows of each client, held-out rows); for the pilot's seed the latter are others."""
        from transformers import AutoTokenizer

        from posttrain.models import resolve_model

        base = resolve_model("embedded:smollm2-135m")
        tokenizer = AutoTokenizer.from_pretrained(base)
        train = self._read("train", tokenizer)
        # the last rows are the pilot's
        tuning, train = train[-self.held_out :], train[: -self.held_out]
        rng = random.Random(f"clients {seed}")
        rng.shuffle(train)
        by_label: dict[int, list] = {}
        for row in train:
            by_label.setdefault(self._label(row), []).append(row)
        clients, labels = {}, sorted(by_label)
        for number, shares in enumerate(mixtures(labels, CLIENTS, seed)):
            rows = []
            while len(rows) < self.each:
                there = [place for place, label in enumerate(labels) if by_label[label]]
                # of labels that nobody has rows of any more, others stand in the place
                weights = [shares[place] + 1e-9 for place in there]
                rows.append(by_label[labels[rng.choices(there, weights)[0]]].pop())
            clients[f"client-{number}"] = rows
        held_out = tuning if seed == PILOT_SEED else self._read("test", tokenizer)[: self.held_out]
        return base, clients, held_out

    @staticmethod
    def _label(row: dict) -> int:
        return min(row["completion"][-1]["content"].count("<<"), 5)

    def score(self, model, tokenizer, held_out) -> dict:
        return {}


def pretrain(folder: Path, seed: int, steps: int) -> str:
    """A llama of 1.2M parameters and a word tokenizer, trained to answer with a prompt's words in any order."""

    def draw(rng: random.Random, known: list[str]) -> list[str]:
        words = rng.sample(known, 4)
        return [*words, rng.choice(list(RULES)), ">", *rng.sample(words, 4), "<eos>"]

    return reversing.train_from_nothing(folder, seed, list(RULES), draw, 6, steps, width=160, inner=384)


def builder(source, cell: dict, tokenizer, folder: str, rate: float | None):
    """What makes the trainer of a client's turn."""
    from transformers import PrinterCallback

    from posttrain import DPSFTConfig, DPSFTTrainer, NoisySFTConfig, NoisySFTTrainer
    from posttrain.federated.methods import METHODS

    method, private = METHODS[ARMS[cell["arm"]][0]], cell["epsilon"] is not None
    settings = dict(
        output_dir=folder,
        max_steps=source.steps,
        per_device_train_batch_size=source.micro,
        learning_rate=rate or source.rates[cell["optimizer"], private, method.trains_a],
        optim={"sgd": "sgd", "adamw": "adamw_torch"}[cell["optimizer"]],
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_length=source.max_length,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    if private:
        own = dict(
            target_epsilon=cell["epsilon"], target_delta=DELTA, clip_norm=source.clip_norm,
            expected_batch_size=source.batch,
        )  # fmt: skip
        args, kind = DPSFTConfig(**settings, **own), DPSFTTrainer
    else:
        own = dict(gradient_accumulation_steps=source.batch // source.micro, max_grad_norm=1.0)
        args, kind = NoisySFTConfig(**settings, **own), NoisySFTTrainer

    def build(model, rows, seed):
        trainer = kind(
            model=model, args=dataclasses.replace(args, seed=seed), train_dataset=rows, processing_class=tokenizer
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    return build


def run_cell(source, cell: dict, rate: float | None = None) -> dict:
    """Run one cell, and measure the model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, clients, held_out = source.load(cell["seed"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    model, facts = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), {"train_seconds": 0.0}
    tokens = noise.tokenised(held_out, tokenizer)
    if cell["arm"] != "base":
        model, facts = federated(source, cell, model, clients, tokenizer, tokens, rate)
    model.eval()
    return facts | noise_measures.answers_of(model, tokens) | source.score(model, tokenizer, held_out)


def federated(source, cell: dict, model, clients: dict, tokenizer, tokens: list[dict], rate: float | None):
    """Run the rounds of a cell; (the model as they leave it, what is told of them)."""
    import tempfile
    import time

    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    from posttrain.errors import DataError
    from posttrain.federated.clients import TrainerClients
    from posttrain.federated.config import FederatedConfig
    from posttrain.federated.loop import FederatedLoop

    method, own = ARMS[cell["arm"]]
    config = FederatedConfig(
        method=method, rounds=source.rounds, clients_per_round=A_ROUND, partition="given", federated_seed=cell["seed"],
        **own,
    )  # fmt: skip
    set_seed(cell["seed"])
    lora = dict(r=source.rank, lora_alpha=source.rank, lora_dropout=0.0, target_modules=source.targets)
    model = get_peft_model(model, LoraConfig(**lora, task_type="CAUSAL_LM"))
    columns = ("prompt", "completion")
    rows = {
        name: Dataset.from_list([{key: row[key] for key in columns} for row in held]) for name, held in clients.items()
    }
    every, losses = max(source.rounds // source.looks, 1), []
    with tempfile.TemporaryDirectory() as folder:
        made = TrainerClients(model, rows, builder(source, cell, tokenizer, folder, rate), config)

        def evaluate(shared) -> dict:
            # the report of this round is made after it
            if (len(loop.reports) + 1) % every == 0:
                losses.append(_loss(made, shared, tokens))
            return {}

        loop = FederatedLoop(made.start, made.rows, made, config, evaluate=evaluate)
        begun = time.monotonic()
        try:
            shared, diverged = loop.run(), 0
        except DataError as error:
            # of a rate with which all clients diverge; it counts as the model before training
            print(f"{cell}: {error}", flush=True)
            shared, diverged = made.start, 1
        seconds = round(time.monotonic() - begun, 1)
        made.adapter.load(shared)
    facts = {} if diverged else federated_report.facts_of(loop.reports, losses)
    return model, facts | {"train_seconds": seconds, "diverged": diverged}


def _loss(clients, shared, tokens) -> float:
    """The loss of the held-out rows with shared factors, in nats a token."""
    model = clients.adapter.model
    clients.adapter.load(shared)
    was_training = model.training
    model.eval()
    found = noise_measures.answers_of(model, tokens, batch=64)
    model.train(was_training)
    return round(sum(found["loss"]) / sum(found["tokens"]), 5)


def pilot(source, stage: str) -> None:
    """FedSVD and FedAvg-LoRA over learning rates, with each optimizer, private at epsilon 6 and not; seed 900."""
    for epsilon in EPSILONS[:2]:
        for optimizer in OPTIMIZERS:
            for arm in ("fedsvd", "fedavg_lora"):
                for rate in source.tried[optimizer]:
                    cell = {"stage": stage, "seed": PILOT_SEED, "arm": arm, "optimizer": optimizer, "epsilon": epsilon}
                    found = federated_report.measured(run_cell(source, cell, rate))
                    said = ", ".join(f"{name} {value.mean():.3f}" for name, value in found.items())
                    print(f"{arm} {optimizer} epsilon {epsilon}, learning rate {rate:g}: {said}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = harness.options(__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT / "runs/evidence/federated", help="folder of the bases")
    parser.add_argument(
        "--cells", type=Path, default=ROOT / "docs/evidence/cells/federated", help="folder of the results"
    )
    parser.add_argument("--stage", choices=["small", "gsm8k"], nargs="+", help="default: small; both with --data")
    parser.add_argument("--minutes", type=float, help="start no further cell after this long")
    parser.add_argument("--pilot", action="store_true", help="learning rates, on another seed")
    args = parser.parse_args(arguments)
    import datasets

    # a line for each turn of a client
    datasets.disable_progress_bars()
    stages = args.stage or (["small", "gsm8k"] if args.data else ["small"])
    if "gsm8k" in stages and args.data is None:
        parser.error("--stage gsm8k needs --data")
    report, missing = [], []
    for stage in stages:
        source = Small(args.work) if stage == "small" else SmolLM2(args.data)
        if args.pilot:
            pilot(source, stage)
            continue
        grid = cells(stage, args.seeds or (2 if args.quick or stage == "gsm8k" else 10))
        path = args.cells / f"{stage}.jsonl"
        harness.run_grid(path, grid, lambda cell, source=source: run_cell(source, cell), args.minutes)
        done, left = harness.read_grid(path, grid)
        report += federated_report.summarise(stage, done)
        missing += left
    federated_report.show(report)
    if args.json:
        content = {"command": harness.command(), "machine": harness.machine(), "rows": report}
        harness.write_json(args.json, content | {"missing_cells": missing})


if __name__ == "__main__":
    main()
