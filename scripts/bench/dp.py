"""Speed and memory of a step of private training beside a plain LoRA's and other engines' on the same rows.

    OMP_NUM_THREADS=2 python scripts/bench/dp.py --data ../shared/data --json docs/evidence/dp_speed.json

All sides of a section run in one process and take turns step by step; a step is timed from one step's end to the next.
The first does not count. Noise and AdamW are in each step; where no GPU is, all is in fp32.

Section `step`: a llama of 4 layers with a LoRA on all linear layers, of which B or both matrices are trained, on
random rows. `plain`, without privacy; `ours`; `opacus_hooks` and `opacus_ghost`, Opacus' two ways to clip rows;
`opake`, by `torch.func`. An engine that is not installed is left out, and it is said how to get it. Before it is timed
each engine's gradient without noise must be that of rows forwarded alone and clipped, or the run ends with an error.

Section `trainer`: whole steps of SmolLM2-135M on GSM8K solutions, TRL's `SFTTrainer` and our `DPSFTTrainer` on the
same rows, with the micro-batches that a draw may leave empty, the ledger and the accounting. Their first losses must be
the model's, or the run ends with an error.

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
from bench.dp_engines import ENGINES, Missing, Shape, distance, make_model, make_rows
from bench.noise import load_rows
from bench.sides import no_curves

SHAPE, QUICK_SHAPE = Shape(), Shape(hidden=64, inner=96, layers=2, heads=4, vocabulary=259, tokens=24, rank=4)
# which matrices are trained
TRAINED = ("B", "A and B")
TRAINERS = ("sft", "dp_sft")
BASELINES = {"step": "plain", "trainer": "sft"}
# a step of these over one of the baseline, at most
OURS = ("ours", "dp_sft")
WANTED = {"B": 1.05, "A and B": 1.10}
NOISE, CLIP_NORM, RANK = 1.0, 1.0, 16
TOLERANCE = 1e-4
# rows of a micro-batch, and of a step of trainers
BATCH, ROWS, QUICK_ROWS = 4, 32, 8


def side_name(arm: str, trained: str) -> str:
    return f"{arm}, {trained}"


SIDES = {side_name(arm, trained): (arm, trained) for trained in TRAINED for arm in (*ENGINES, *TRAINERS)}


def found_engines(shape: Shape) -> tuple[list[str], dict[str, str]]:
    """(engines that run here and whose gradients are right, why others do not run).

    SystemExit where one gives other gradients than rows that are forwarded alone.
    """
    here, missing = [], {}
    for engine in ENGINES:
        try:
            for trained in TRAINED:
                gap = distance(engine, shape, trained != "B")
                if not gap <= TOLERANCE:
                    raise SystemExit(f"the gradient of {engine} ({trained}) is off by {gap:.3g} of its norm")
            here.append(engine)
        except Missing as error:
            missing[engine] = str(error)
    return here, missing


def measure_steps(engines: list[str], shape: Shape, rounds: int) -> dict[str, list[float]]:
    """Seconds of the steps of each engine and each choice of trained matrices."""
    ids = make_rows(shape)
    steps = {
        side_name(engine, trained): ENGINES[engine](make_model(shape, trained != "B"), ids, CLIP_NORM, NOISE).step
        for trained in TRAINED
        for engine in engines
    }
    return harness.alternate({name: _side(step, rounds) for name, step in steps.items()}, rounds)


def _side(step, rounds: int):
    import torch

    def side(turn):
        for _ in range(rounds + 1):
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            turn()

    return side


def make_trainer(arm: str, trained: str, folder: str, rows, steps: int, model: str):
    """A trainer whose steps have all rows in their order, len(rows) / steps each."""
    from transformers import PrinterCallback

    size = len(rows) // steps
    fields = settings(folder, f"{arm}-{trained}", BATCH, steps)
    if arm == "sft":
        from trl import SFTConfig, SFTTrainer

        from posttrain.mechanisms.frozen_a import freeze_a

        args = SFTConfig(**fields, gradient_accumulation_steps=size // BATCH)
        trainer = SFTTrainer(model, args, train_dataset=rows, peft_config=lora(r=RANK))
        if trained == "B":
            freeze_a(trainer.model, args.seed)
    else:
        from posttrain import DPSFTConfig, DPSFTTrainer

        # the rows of a step are drawn, and here given
        del fields["train_sampling_strategy"]
        args = DPSFTConfig(
            **fields,
            noise_multiplier=NOISE,
            clip_norm=CLIP_NORM,
            target_delta=1e-5,
            expected_batch_size=size,
            train_lora_a=trained != "B",
        )
        trainer = DPSFTTrainer(model, args, train_dataset=rows, peft_config=lora(r=RANK))
        trainer._private.draws = lambda step: range(step * size, (step + 1) * size)
    trainer.remove_callback(PrinterCallback)
    return trainer


def measure_trainers(args, rounds: int) -> tuple[dict[str, list[float]], dict[str, float], dict[str, float]]:
    """(seconds of each side's steps, first losses, what they should be by arm)."""
    trainers, model, size = {}, model_of(args), QUICK_ROWS if args.quick else ROWS
    with tempfile.TemporaryDirectory() as folder, no_curves():
        rows = load_rows(args.data, size * (rounds + 1))
        for trained in TRAINED:
            for arm in TRAINERS:
                made = make_trainer(arm, trained, folder, rows, rounds + 1, model)
                trainers[side_name(arm, trained)] = made
        wanted = first_losses(made, size)
        seconds = harness.alternate({name: side_of(trainer) for name, trainer in trainers.items()}, rounds)
    logged = {name: [entry["loss"] for entry in t.state.log_history if "loss" in entry] for name, t in trainers.items()}
    return seconds, {name: losses[0] for name, losses in logged.items()}, wanted


def first_losses(trainer, size: int) -> dict[str, float]:
    """The loss of the first step's rows before training: over all tokens, TRL's; and of rows' own means, ours."""
    import torch

    sums, counts = [], []
    with torch.no_grad():
        for row in trainer.train_dataset.select(range(size)):
            ids = torch.tensor([row["input_ids"]], device=trainer.model.device)
            labels = torch.tensor(row["labels"], device=ids.device)
            losses = torch.nn.functional.cross_entropy(
                trainer.model(input_ids=ids).logits[0, :-1].float(), labels[1:], reduction="none"
            )
            sums.append(losses.sum().item())
            counts.append((labels[1:] != -100).sum().item())
    rows = [total / count for total, count in zip(sums, counts, strict=True)]
    return {"sft": sum(sums) / sum(counts), "dp_sft": sum(rows) / size}


def check_losses(found: dict[str, float], wanted: dict[str, float], tolerance: float) -> None:
    """SystemExit where a trainer's first loss is not that of the model on its rows."""
    for name, loss in found.items():
        expected = wanted[SIDES[name][0]]
        if not abs(loss - expected) <= tolerance * abs(expected):
            raise SystemExit(f"{name} begins with a loss of {loss}, and the model's on these rows is {expected}")


def _print_memory(name: str, args) -> None:
    arm, trained = SIDES[name]
    if arm in ENGINES:
        shape = QUICK_SHAPE if args.quick else SHAPE
        made = ENGINES[arm](make_model(shape, trained != "B"), make_rows(shape), CLIP_NORM, NOISE)
        for _ in range(3):
            made.step()
    else:
        with tempfile.TemporaryDirectory() as folder, no_curves():
            rows = load_rows(args.data, 2 * (QUICK_ROWS if args.quick else ROWS))
            make_trainer(arm, trained, folder, rows, 2, model_of(args)).train()
    print(json.dumps(harness.peak_memory()))


def report(section: str, seconds: dict[str, list[float]], memory: dict[str, float]) -> tuple[list[dict], list[dict]]:
    """Print the table and the targets of a section, and return both."""
    from posttrain.tables import format_table

    rows, targets = [], []
    for name, values in seconds.items():
        arm, trained = SIDES[name]
        base = seconds[side_name(BASELINES[section], trained)]
        ratios = [own / theirs for own, theirs in zip(values, base, strict=True)]
        row = {
            "section": section,
            "arm": arm,
            "trained": trained,
            "seconds": three(values),
            "over_plain": three(ratios),
        }
        rows.append(row | {"peak_mib": round(memory[name])})
        if arm in OURS:
            reached = round(harness.spread(ratios)[0], 4)
            said = f"a step of {arm} ({trained}) over one of {BASELINES[section]}, at most"
            wanted = WANTED[trained]
            targets.append({"target": said, "wanted": wanted, "reached": reached, "met": reached <= wanted})
    lines = [
        [
            one["arm"],
            one["trained"],
            *("{:.4f} [{:.4f}, {:.4f}]".format(*one[name]) for name in ("seconds", "over_plain")),
            one["peak_mib"],
        ]
        for one in rows
    ]
    print(format_table((section, "trained", "s/step", "over plain", "MiB"), lines))
    for one in targets:
        print(f"{'met' if one['met'] else 'NOT MET':8}{one['target']}: {one['reached']:.3f} ({one['wanted']})")
    return rows, targets


def main(arguments: list[str] | None = None) -> None:
    options = harness.options(__doc__.split("\n")[0])
    options.add_argument("--rounds", type=int, metavar="N", help="steps of every side")
    options.add_argument("--section", choices=BASELINES, help="measure this one alone")
    options.add_argument("--memory", choices=SIDES, help="print the peak memory of one side, MiB")
    args = options.parse_args(arguments)
    os.environ.setdefault("POSTTRAIN_LOG", "warning")
    if args.memory:
        return _print_memory(args.memory, args)
    rows, targets, missing = [], [], {}
    for section in BASELINES:
        if args.section not in (None, section):
            continue
        arms = TRAINERS
        if section == "step":
            shape = QUICK_SHAPE if args.quick else SHAPE
            arms, missing = found_engines(shape)
        # first: of the trainers nothing is in memory yet
        memory = {name: memory_of(__file__, name, args) for name in (side_name(a, t) for t in TRAINED for a in arms)}
        if section == "step":
            seconds = measure_steps(arms, shape, args.rounds or (3 if args.quick else 21))
        else:
            seconds, first, wanted = measure_trainers(args, args.rounds or (2 if args.quick else 8))
            import torch

            check_losses(first, wanted, 2e-2 if torch.cuda.is_available() else TOLERANCE)
        found = report(section, seconds, memory)
        rows += found[0]
        targets += found[1]
        for engine, why in missing.items() if section == "step" else ():
            print(f"not measured: {engine}: {why}")
    if args.json:
        content = {"command": harness.command(), "machine": harness.machine(), "rows": rows}
        harness.write_json(args.json, content | {"targets": targets, "missing": missing})


if __name__ == "__main__":
    main()
