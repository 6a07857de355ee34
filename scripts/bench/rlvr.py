"""Speed of an update on groups of rollouts of which most have no gradient, beside TRL's GRPOTrainer.

    OMP_NUM_THREADS=2 python scripts/bench/rlvr.py --json docs/evidence/rlvr_speed.json

Groups of 8 made-up rollouts; in four of five all rewards are equal, so their advantages are zero. All sides train in
one process on the same rollouts with the same random model and take turns step by step. A step holds rewards,
advantages, forward, backward and the optimiser; sampling is left out, being the same on every side. Losses and gradient
norms must be equal at every step.

Section `update`: arms `trl`; `padded`, ours with everything off; `dropped`, without rows of zero advantage;
`posttrain`, as it comes: prompts shared as well. Section `scored`: a KL term and two updates a generation, so that
reference and old log-probabilities are scored and every row has a gradient; what is left to gain is the sharing of
prompts.
"""

import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness
from bench.sides import at_step_end, no_curves

NEVER = {"prefix_sharing": "never"}
SECTIONS = {
    "update": {
        "trl": None,
        "padded": NEVER | {"drop_zero_advantage_rows": False},
        "dropped": NEVER,
        "posttrain": {},
    },
    "scored": {"trl": None, "padded": NEVER, "posttrain": {}},
}
EXTRA = {"update": {}, "scored": {"beta": 0.04, "num_iterations": 2}}
GROUP, WANTED = 8, 3.0


def tasks(groups: int, steps: int):
    """One prompt in five has rollouts that differ in reward."""
    from datasets import Dataset

    rng = random.Random(0)
    rows = []
    for i in range(groups * steps):
        successes = rng.randint(1, GROUP - 1) if i % 5 == 0 else rng.choice([0, GROUP])
        words = " ".join(rng.choice(["sum", "of", "all", "odd", "terms"]) for _ in range(rng.randint(10, 40)))
        rows.append({"prompt": f"{successes} in {GROUP}: {words} ({i})"})
    return Dataset.from_list(rows)


def rollouts(prompts: list[str], trainer) -> dict:
    tokenizer = trainer.processing_class
    completions = []
    for i, prompt in enumerate(prompts):
        rng = random.Random(f"{prompt}{i % GROUP}")
        first = 65 if i % GROUP < int(prompt.split()[0]) else 98
        length = rng.randint(trainer.max_completion_length // 4, trainer.max_completion_length - 2)
        completions.append([first, *(rng.randrange(97, 122) for _ in range(length)), tokenizer.eos_token_id])
    ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}


def reward(completion_ids, **columns) -> list[float]:
    return [float(ids[0] == 65) for ids in completion_ids]


def make_trainer(section: str, arm: str, folder: str, rows, rounds: int, groups: int, quick: bool):
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    from posttrain import PolicyGradientConfig, PolicyGradientTrainer

    ours = SECTIONS[section][arm]
    settings = dict(
        output_dir=f"{folder}/{section}-{arm}",
        per_device_train_batch_size=GROUP,
        gradient_accumulation_steps=groups,
        num_generations=GROUP,
        max_completion_length=32 if quick else 192,
        max_steps=rounds + 1,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        shuffle_dataset=False,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        **EXTRA[section],
    )
    trainer = (GRPOTrainer if ours is None else PolicyGradientTrainer)(
        f"{folder}/model",
        reward,
        GRPOConfig(**settings) if ours is None else PolicyGradientConfig(**settings, **ours),
        rows,
        rollout_func=rollouts,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def measure(section: str, rounds: int, groups: int, quick: bool) -> tuple[dict, dict]:
    """(seconds of each arm's steps, what each logged)."""
    from posttrain.models import byte_tokenizer, tiny_model

    sizes = {} if quick else {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "head_dim": 96}
    trainers, sides = {}, {}
    with tempfile.TemporaryDirectory() as folder, no_curves():
        # a folder, as TRL loads the reference by the model's name
        tiny_model(**sizes).save_pretrained(f"{folder}/model")
        byte_tokenizer().save_pretrained(f"{folder}/model")
        for arm in SECTIONS[section]:
            trainers[arm] = make_trainer(section, arm, folder, tasks(groups, rounds + 1), rounds, groups, quick)
            sides[arm] = _side(trainers[arm])
        seconds = harness.alternate(sides, rounds)
    logs = {arm: [row for row in trainer.state.log_history if "loss" in row] for arm, trainer in trainers.items()}
    return seconds, logs


def _side(trainer):
    def side(turn):
        trainer.add_callback(at_step_end(turn))
        trainer.train()

    return side


def check_equal(logs: dict) -> float:
    """The largest difference of a loss or a relative one of a gradient norm; SystemExit above 1e-4."""
    largest = 0.0
    for arm, rows in logs.items():
        for step, (ours, theirs) in enumerate(zip(rows, logs["trl"], strict=True), 1):
            gap = max(
                abs(ours["loss"] - theirs["loss"]),
                abs(ours["grad_norm"] - theirs["grad_norm"]) / max(theirs["grad_norm"], 1e-12),
            )
            if not gap <= 1e-4:
                raise SystemExit(f"step {step}: {arm} differs from TRL by {gap:.3g}")
            largest = max(largest, gap)
    return largest


def main(arguments: list[str] | None = None) -> None:
    import os

    options = harness.options(__doc__.split("\n")[0])
    options.add_argument("--rounds", type=int, metavar="N", help="steps of every arm")
    args = options.parse_args(arguments)
    os.environ.setdefault("POSTTRAIN_LOG", "warning")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from posttrain.tables import format_table

    groups = 5 if args.quick else 10
    rounds = args.rounds or (4 if args.quick else 8)
    rows, largest = [], 0.0
    for section in SECTIONS:
        seconds, logs = measure(section, rounds, groups, args.quick)
        largest = max(largest, check_equal(logs))
        rows += [_row(section, arm, seconds, logs[arm], groups) for arm in SECTIONS[section]]
    lines = [
        [r["section"], r["arm"], *("{:.2f} [{:.2f}, {:.2f}]".format(*r[name]) for name in ("seconds", "ratio"))]
        for r in rows
    ]
    print(format_table(("section", "arm", "s/step", "x TRL"), lines))
    reached = next(r["ratio"][0] for r in rows if (r["section"], r["arm"]) == ("update", "posttrain"))
    print(f"largest gap {largest:.2g}; {'met' if reached >= WANTED else 'NOT MET'}: {reached:.2f} of {WANTED}")
    if args.json:
        content = {"command": harness.command(), "machine": harness.machine(), "rows": rows}
        harness.write_json(args.json, content | {"largest_gap": largest, "wanted": WANTED})


def _row(section: str, arm: str, seconds: dict, log: list[dict], groups: int) -> dict:
    ratios = [theirs / ours for theirs, ours in zip(seconds["trl"], seconds[arm], strict=True)]
    row = {"section": section, "arm": arm, "rows_a_step": groups * GROUP}
    row |= {"seconds": _three(seconds[arm]), "ratio": _three(ratios)}
    kept = [entry["rows/kept_share"] for entry in log if "rows/kept_share" in entry]
    return row | ({"kept_share": round(sum(kept) / len(kept), 3)} if kept else {})


def _three(values) -> list[float]:
    return [round(value, 4) for value in harness.spread(values)]


if __name__ == "__main__":
    main()
