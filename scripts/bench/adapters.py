"""Speed and memory of a training step with ALLoRA beside PEFT's LoRA and DoRA on the same rows.

    OMP_NUM_THREADS=2 python scripts/bench/adapters.py --data ../shared/data --json docs/evidence/adapters_speed.json

All sides train SmolLM2-135M in one process on the same GSM8K solutions in the same batches, with the same rank,
optimiser and seed, in TRL's own SFTTrainer, and take turns step by step; a step is timed from one step's end to the
next. The first does not count. The first loss of all must be the same, or the run ends with an error: at that step B is
zero.

Peak memory is measured in a process for each side.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness
from bench.arms import lora, memory_of, model_of, settings, side_of, three
from bench.noise import load_rows
from bench.sides import no_curves

RANK = 16
ARMS = ("lora", "allora", "dora")
BASELINE = "lora"
# an arm's step over the baseline's, at most
WANTED = {"allora": 1.05}
TOLERANCE = 1e-5
BATCH = 4


def adapter_of(arm: str):
    if arm != "allora":
        # the scale that ALLoRA has
        return lora(r=RANK, lora_alpha=RANK, use_dora=arm == "dora")
    from posttrain.adapters.allora import ALLoRAConfig

    return ALLoRAConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM")


def make_trainer(arm: str, folder: str, rows, steps: int, model: str):
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(**settings(folder, arm, BATCH, steps))
    trainer = SFTTrainer(model, args, train_dataset=rows, peft_config=adapter_of(arm))
    trainer.remove_callback(PrinterCallback)
    return trainer


def measure(args, rounds: int) -> tuple[dict, dict, dict]:
    """(seconds of each arm's steps, its losses, a number that its adapter has at the end)."""
    trainers, model = {}, model_of(args)
    with tempfile.TemporaryDirectory() as folder, no_curves():
        rows = load_rows(args.data, BATCH * (rounds + 1))
        for arm in ARMS:
            trainers[arm] = make_trainer(arm, folder, rows, rounds + 1, model)
        seconds = harness.alternate({arm: side_of(trainer) for arm, trainer in trainers.items()}, rounds)
    losses = {arm: [r["loss"] for r in t.state.log_history if "loss" in r] for arm, t in trainers.items()}
    return seconds, losses, {arm: _size_of_b(trainer.model) for arm, trainer in trainers.items()}


def _size_of_b(model) -> float:
    return sum(value.double().square().sum().item() for name, value in model.named_parameters() if "lora_B" in name)


def check(losses: dict, trained: dict) -> None:
    """SystemExit where the arms do not begin with the same loss, or one has trained what the baseline has."""
    begin = losses[BASELINE][0]
    for arm, values in losses.items():
        if not abs(values[0] - begin) <= TOLERANCE * abs(begin):
            raise SystemExit(f"{arm} begins with a loss of {values[0]}, and {BASELINE} with {begin}")
        if arm != BASELINE and trained[arm] == trained[BASELINE]:
            raise SystemExit(f"{arm} has trained the adapter of {BASELINE}")


def _print_memory(arm: str, args) -> None:
    with tempfile.TemporaryDirectory() as folder, no_curves():
        make_trainer(arm, folder, load_rows(args.data, BATCH * 2), 2, model_of(args)).train()
    print(json.dumps(harness.peak_memory()))


def main(arguments: list[str] | None = None) -> None:
    options = harness.options(__doc__.split("\n")[0])
    options.add_argument("--rounds", type=int, metavar="N", help="steps of every arm")
    options.add_argument("--memory", choices=ARMS, help="print the peak memory of one arm, MiB")
    args = options.parse_args(arguments)
    os.environ.setdefault("POSTTRAIN_LOG", "warning")
    if args.memory:
        return _print_memory(args.memory, args)
    from posttrain.tables import format_table

    # first: nothing else is in memory yet
    memory = {arm: memory_of(__file__, arm, args) for arm in ARMS}
    seconds, losses, trained = measure(args, args.rounds or (3 if args.quick else 20))
    check(losses, trained)
    rows, targets = [], []
    for arm, values in seconds.items():
        ratios = [own / theirs for own, theirs in zip(values, seconds[BASELINE], strict=True)]
        rows.append({"arm": arm, "seconds": three(values), "over_lora": three(ratios), "peak_mib": round(memory[arm])})
        if arm in WANTED:
            reached = round(harness.spread(ratios)[0], 4)
            said = f"a step of {arm} over one of {BASELINE}, at most"
            targets.append({"target": said, "wanted": WANTED[arm], "reached": reached, "met": reached <= WANTED[arm]})
    lines = [
        [r["arm"], *("{:.3f} [{:.3f}, {:.3f}]".format(*r[name]) for name in ("seconds", "over_lora")), r["peak_mib"]]
        for r in rows
    ]
    print(format_table(("arm", "s/step", "over LoRA", "MiB"), lines))
    for one in targets:
        print(f"{'met' if one['met'] else 'NOT MET':8}{one['target']}: {one['reached']:.3f} ({one['wanted']})")
    if args.json:
        content = {"command": harness.command(), "machine": harness.machine(), "rows": rows}
        harness.write_json(args.json, content | {"targets": targets})


if __name__ == "__main__":
    main()
