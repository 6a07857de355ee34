"""Speed of RobustDPOTrainer beside TRL's DPOTrainer: seconds a step, tokens computed, peak memory.

    OMP_NUM_THREADS=2 python scripts/bench/robust_dpo.py --data ../shared/data --json docs/evidence/prefix_sharing.json

All sides train in one process on the same pairs (of at most 512 tokens) in the same micro-batches, with the same LoRA,
optimiser and seed, and take turns step by step. Each makes one call of `trainer.train()`, held at the end of every
step; a step is timed from one such end to the next. It so contains logging, the next batch's loading, sorting and
packing, the reference, forward, backward, clipping and the optimiser, whatever part of it a trainer does where: timing
from `on_step_begin` would leave out loading and logging, and timing `train()` its set-up. The first step does not
count, on CUDA the first three.

Every arm's loss, log-probabilities and gradient norm must equal TRL's at every step, or the run ends with an error.
Precomputed reference values are computed once, by an arm of ours, and given to all: that pass is no part of a step.

Sections: `pairs`, one batch a step; `window`, four batches a step, where sorting by length has something to sort;
`grouped`, batches drawn as `train_sampling_strategy: group_by_length` of transformers draws them from a large data set,
evenly spaced over an epoch. There `trl` and `posttrain` train on grouped batches, `trl_random` and `posttrain_random`
on the same pairs in random batches, so that their ratios are of whole passes.

Arms of ours: `padded` (`prefix_sharing: never`), `sharing` (one row for each pair), `packing` (several pairs in a row),
`posttrain` (as it comes: also sorted over the accumulation window, which does nothing in a window of one). TRL runs
with SDPA: on CPU it has no better (flash attention needs CUDA, FlexAttention has no backward there); on CUDA
FlexAttention and, where installed, FlashAttention 2 are run as well.

Peak memory is measured in a process for each side: the highest resident set on CPU (`before`: when training starts),
the highest allocation on CUDA. Two steps, first the batch with the longest row, reference live.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness
from bench.sides import Counts, Setting, at_step_end, make_trainer, no_curves

MODELS = ("embedded:smollm2-135m", "random-0.5b", "random-1.5b", "random-tiny")
COMPARED = ("loss", "logps/chosen", "logps/rejected", "grad_norm")
ABLATION = ("trl", "padded", "sharing", "posttrain")
WINDOW = ("trl", "packing", "posttrain")
GROUPED = ("trl", "trl_random", "posttrain", "posttrain_random")
BASELINE = "trl"


def settings(args) -> list[Setting]:
    lengths = ("hh", "short") if args.lengths == "both" else (args.lengths,)
    references = ("live", "precomputed") if args.reference == "both" else (args.reference,)
    found = []
    for model, pairs, attention in _devices_cases(args):
        common = dict(model=model, pairs=pairs, attention=attention)
        for kind in lengths:
            for reference in references:
                ablated = kind == "hh" and reference == references[-1]
                arms = ABLATION if ablated else (BASELINE, "posttrain")
                found.append(Setting("pairs", kind, reference, arms + _flash(attention), **common))
        if "hh" in lengths:
            found.append(Setting("grouped", "hh", references[-1], GROUPED, **common))
            found.append(Setting("window", "hh", references[-1], WINDOW, accumulation=4, **common))
    return [setting for setting in found if args.sections is None or setting.section in args.sections]


def _devices_cases(args) -> list[tuple[str, int, str]]:
    import torch

    if not torch.cuda.is_available():
        model = args.model or ("random-tiny" if args.quick else MODELS[0])
        return [(model, args.pairs_per_batch or 4, "sdpa")]
    models = [args.model] if args.model else ["random-0.5b", "random-1.5b"][: 1 if args.quick else 2]
    sizes = [args.pairs_per_batch] if args.pairs_per_batch else [8, 32]
    return [(model, n, attention) for model in models for n in sizes for attention in ("sdpa", "flex_attention")]


def _flash(attention: str) -> tuple[str, ...]:
    from transformers.utils import is_flash_attn_2_available

    return ("trl_flash",) if attention == "sdpa" and is_flash_attn_2_available() else ()


def draw(setting: Setting, data: Path | None, rounds: int, seed: int) -> dict:
    """The rows of each arm: those to warm up, the same for all, then `rounds` steps."""
    from bench.pairs import grouped_by_length, load_pairs, load_tokenizer
    from datasets import concatenate_datasets

    step = setting.pairs * setting.accumulation
    warmup = step * warmup_steps()
    tokenizer = load_tokenizer(setting.model)
    if setting.section != "grouped":
        rows = load_pairs(data, setting.lengths, warmup + step * rounds, seed, tokenizer)
        return dict.fromkeys(setting.arms, rows)
    # 50 batches are the sampler's mega-batch
    many = load_pairs(data, setting.lengths, warmup + max(50 * 4, 4 * rounds) * step, seed, tokenizer)
    warm, rest = many.select(range(warmup)), many.select(range(warmup, len(many)))
    grouped = grouped_by_length(rest, step, rounds, seed)
    shuffled = grouped.shuffle(seed=seed)
    both = {False: concatenate_datasets([warm, grouped]), True: concatenate_datasets([warm, shuffled])}
    return {arm: both[arm.endswith("_random")] for arm in setting.arms}


def warmup_steps() -> int:
    import torch

    # FlexAttention compiles for the first shapes that it meets
    return 3 if torch.cuda.is_available() else 1


def measure(setting: Setting, data: Path | None, rounds: int, seed: int) -> dict[str, dict]:
    """Per arm the seconds, tokens and logged values of every step.

    Raises:
        SystemExit: an arm's logged values are not TRL's.
    """
    rows, counts = draw(setting, data, rounds, seed), Counts()
    # ours first, the fastest at the reference values that all are then given
    columns = {order: {} for order in (False, True)}
    warmup = warmup_steps()
    trainers, snapshots, sides = {}, {arm: [] for arm in setting.arms}, {}
    with tempfile.TemporaryDirectory() as folder, counts.watch_head(), no_curves():
        for arm in reversed(setting.arms):
            given = columns[arm.endswith("_random")]
            trainers[arm] = make_trainer(setting, arm, rows[arm], Path(folder), warmup + rounds, seed, given, counts)
        for arm in setting.arms:
            sides[arm] = _side(trainers[arm], snapshots[arm], counts, arm)
        seconds = harness.alternate(sides, rounds, warmup)
    measured = {}
    for arm in setting.arms:
        ends = snapshots[arm][warmup - 1 :]
        steps = [(end[0] - start[0], end[1] - start[1]) for start, end in zip(ends, ends[1:], strict=False)]
        logged = [entry for entry in trainers[arm].state.log_history if "loss" in entry]
        measured[arm] = {
            "seconds": seconds[arm],
            "tokens_forwarded": [step[0] for step in steps],
            "tokens_scored": [step[1] for step in steps],
            "logged": [{name: entry[name] for name in COMPARED} for entry in logged],
        }
    for arm in setting.arms:
        baseline = BASELINE + "_random" * arm.endswith("_random")
        measured[arm]["largest_gap"] = check_equal(arm, measured[arm]["logged"], measured[baseline]["logged"])
    return measured


def _side(trainer, snapshots: list, counts: Counts, arm: str):
    def side(turn):
        def end():
            snapshots.append(list(counts.of[arm]))
            turn()

        trainer.add_callback(at_step_end(end))
        trainer.train()

    return side


def check_equal(arm: str, ours: list[dict], theirs: list[dict]) -> float:
    """The largest relative difference of any logged value.

    Raises:
        SystemExit: it is above the tolerance: 1e-3 in fp32, 3e-2 in bf16.
    """
    import torch

    tolerance, largest = 3e-2 if torch.cuda.is_available() else 1e-3, 0.0
    if len(ours) != len(theirs):
        raise SystemExit(f"{arm} logged {len(ours)} steps, TRL {len(theirs)}")
    for step, (one, other) in enumerate(zip(ours, theirs, strict=True), 1):
        for name in COMPARED:
            gap = abs(one[name] - other[name]) / max(abs(other[name]), 1e-12)
            if not gap <= tolerance:
                raise SystemExit(f"step {step}: {name} of {arm} is {one[name]:.6g}, of TRL {other[name]:.6g}")
            largest = max(largest, gap)
    return largest


def summarise(setting: Setting, measured: list[dict[str, dict]], memory: dict[str, dict]) -> list[dict]:
    """A row per arm, from one measurement per seed. Ratios: TRL's seconds over the arm's, step by step."""
    from statistics import mean

    import torch

    def values(arm, name):
        return [value for seed in measured for value in seed[arm][name]]

    rows, fixed = [], {key: value for key, value in dataclasses.asdict(setting).items() if key != "arms"}
    fixed["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    theirs = values(BASELINE, "seconds")
    for arm in setting.arms:
        seconds = values(arm, "seconds")
        row = fixed | {"arm": arm, "steps": len(seconds), "seconds": _spread(seconds)}
        row["pairs_per_second"] = round(len(seconds) * setting.pairs * setting.accumulation / sum(seconds), 4)
        row["ratio_of_sums"] = round(sum(theirs) / sum(seconds), 3)
        if not arm.endswith("_random"):
            ratios = [a / b for a, b in zip(theirs, seconds, strict=True)]
            row |= {"ratio": _spread(ratios), "lowest_ratio": round(min(ratios), 3)}
        for name in ("tokens_forwarded", "tokens_scored"):
            row[name] = round(mean(values(arm, name)), 1)
        row["largest_gap"] = float(f"{max(seed[arm]['largest_gap'] for seed in measured):.2g}")
        rows.append(row | memory.get(arm, {}))
    return rows


def _spread(values) -> list[float]:
    """[median, lower quartile, upper quartile]"""
    return [round(value, 4) for value in harness.spread(values)]


def measure_memory(setting: Setting, arm: str, data: Path | None, rounds: int) -> dict:
    """Peak MiB of one side alone, in this process."""
    step = setting.pairs * setting.accumulation
    rows = draw(setting, data, rounds, 0)[arm]
    longest = max(range(len(rows)), key=lambda i: rows[i]["length"]) // step
    other = 0 if longest else 1
    rows = rows.select([batch * step + i for batch in (longest, other) for i in range(step)])
    with tempfile.TemporaryDirectory() as folder, no_curves():
        trainer = make_trainer(setting, arm, rows, Path(folder), 2, 0, {}, Counts())
        before = harness.peak_memory()
        trainer.train()
    return {"peak_mib": round(harness.peak_memory()), "peak_mib_before": round(before)}


def memory_of_each(setting: Setting, args, rounds: int) -> dict[str, dict]:
    """`measure_memory` of the arms, each in a process of its own."""
    found = {}
    for arm in setting.arms:
        job = {"setting": dataclasses.asdict(setting), "arm": arm, "rounds": rounds}
        command = [sys.executable, __file__, "--measure-memory", json.dumps(job)]
        command += ["--data", str(args.data)] if args.data else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode != 0:
            raise SystemExit(f"the process that measures the memory of {arm} failed; see the lines above")
        found[arm] = json.loads(done.stdout.splitlines()[-1])
    return found


def targets(rows: list[dict]) -> list[dict]:
    """What was to be reached on CPU, beside what was."""
    found = []
    for row in rows:
        if (row["device"], row["section"], row["arm"]) != ("cpu", "pairs", "posttrain"):
            continue
        where = f"{row['model']}, {row['lengths']}, reference {row['reference']}, {row['pairs']} pairs"
        if row["lengths"] == "hh":
            found.append({"target": f"{where}: 1.8x TRL's rate (median)", "wanted": 1.8, "reached": row["ratio"][0]})
        else:
            found.append({"target": f"{where}: at no step below 0.95x", "wanted": 0.95, "reached": row["lowest_ratio"]})
        if "peak_mib" in row:
            theirs = next(other for other in rows if other["arm"] == BASELINE and _same_setting(row, other))
            share = round(theirs["peak_mib"] / row["peak_mib"], 3)
            found.append({"target": f"{where}: TRL's peak memory over ours", "wanted": 1.0, "reached": share})
    return [entry | {"met": entry["reached"] >= entry["wanted"]} for entry in found]


def _same_setting(one: dict, other: dict) -> bool:
    names = [field.name for field in dataclasses.fields(Setting) if field.name != "arms"]
    return all(one[name] == other[name] for name in names)


def show(rows: list[dict]) -> None:
    from posttrain.tables import format_table

    def three(values, form):
        return "{0:{f}} [{1:{f}}, {2:{f}}]".format(*values, f=form) if values else ""

    head = ("section", "model", "pairs", "reference", "arm", "s/step", "x TRL", "of sums", "tokens", "scored", "MiB")
    lines = []
    for row in rows:
        batch = f"{row['pairs']}x{row['accumulation']} {row['lengths']}"
        line = [f"{row['section']} {row['attention']}", row["model"], batch, row["reference"], row["arm"]]
        line += [three(row["seconds"], ".2f"), three(row.get("ratio"), ".2f"), f"{row['ratio_of_sums']:.2f}"]
        lines.append([*line, row["tokens_forwarded"], row["tokens_scored"], row.get("peak_mib", "")])
    print(format_table(head, lines), flush=True)


def parser() -> argparse.ArgumentParser:
    options = harness.options(__doc__.split("\n")[0])
    options.add_argument("--model", choices=MODELS, help="default: SmolLM2 (a tiny one if quick); on CUDA the random")
    options.add_argument("--pairs-per-batch", type=int, metavar="N", help="default: 4; on CUDA 8 and 32")
    options.add_argument("--rounds", type=int, metavar="N", help="steps of every arm; a third in the section window")
    options.add_argument("--reference", choices=["live", "precomputed", "both"], default="both", help="which modes")
    options.add_argument("--lengths", choices=["hh", "short", "both"], default="both", help="which pairs")
    options.add_argument("--sections", choices=["pairs", "grouped", "window"], nargs="+", help="default: all")
    options.add_argument("--no-memory", action="store_true", help="leave out the processes that measure memory")
    options.add_argument("--measure-memory", help=argparse.SUPPRESS)
    return options


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    if args.measure_memory:
        job = json.loads(args.measure_memory)
        print(json.dumps(measure_memory(Setting(**job["setting"]), job["arm"], args.data, job["rounds"])))
        return
    # a table, not what every trainer says at its start
    os.environ.setdefault("POSTTRAIN_LOG", "warning")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    import torch
    from bench.floors import add_floors

    rows, rounds = [], args.rounds or (3 if args.quick else 6)
    if args.data and any(setting.model.startswith("random") for setting in settings(args)):
        raise SystemExit("--data goes with embedded:smollm2-135m; random models train on generated pairs")
    # first, while this process holds no model of its own
    memory = {
        setting: memory_of_each(setting, args, rounds)
        for setting in settings(args)
        if setting.section == "pairs" and setting.reference == "live" and not args.no_memory
    }
    for setting in settings(args):
        rounds = args.rounds or (3 if args.quick else 6)
        if setting.section == "window":
            rounds = -(-rounds // 3)
        measured = [measure(setting, args.data, rounds, seed) for seed in range(args.seeds or 1)]
        block = summarise(setting, measured, memory.get(setting, {}))
        if torch.cuda.is_available():
            add_floors(block, torch.cuda.get_device_name())
        show(block)
        rows += block
        # after every block, so that a run cut short leaves what it has
        if args.json:
            content = {"command": harness.command(), "machine": harness.machine(), "rows": rows}
            harness.write_json(args.json, content | {"targets": targets(rows)})
    for entry in targets(rows):
        print(
            f"{'met    ' if entry['met'] else 'NOT MET'} {entry['reached']:.3f} ({entry['wanted']}) {entry['target']}"
        )


if __name__ == "__main__":
    main()
