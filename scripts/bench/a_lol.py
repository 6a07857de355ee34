"""Speed and memory of a step of ALoLTrainer beside TRL's SFT step on the same rows, and a step with two models.

    OMP_NUM_THREADS=2 python scripts/bench/a_lol.py --data ../shared/data --json docs/evidence/a_lol_speed.json

All sides train in one process on the same answers (those with an advantage, of at most 512 tokens with their prompt)
in the same batches, with the same LoRA, optimiser and seed, and take turns step by step; a step is timed from one
step's end to the next, as in robust_dpo.py. The first does not count.

Arms: `sft`, TRL's SFTTrainer; `two_models`, A-LoL as its published code does it, a frozen copy of the model forwarded
beside the policy at every step, log-probabilities from whole logits; `padded`, ours without prefix sharing;
`posttrain`, as it comes. The losses of the last three must be equal at every step, or the run ends with an error.
Reference log-probabilities of ours are computed once before training, which is no part of a step; what that pass took
is reported beside it.

Peak memory is measured in a process for each side.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness
from bench.arms import lora, memory_of, model_of, settings, side_of, three
from bench.sides import no_curves

ARMS = ("sft", "two_models", "padded", "posttrain")
BASELINE, OURS = "sft", "posttrain"
# a step of ours over one of SFT at most; two models' over one of ours at least
WANTED = {"sft": 1.05, "two_models": 1.8}
TOLERANCE = 1e-4
# rows a step
BATCH = 4


def load_answers(data: Path | None, count: int, quick: bool, tokenizer):
    """(prompts, completions, rewards) of `count` kept rows; generated ones where there is no data."""
    from datasets import Dataset

    from posttrain.data.scored.loading import load_scored

    if data is None:
        rows = load_scored(f"generated:reverse_list?n={2 * count}")
    else:
        rows = load_scored(str(data / "hh_pairs_train.jsonl.gz"), limit=20 * count)
    mean = sum(rows["reward"]) / len(rows)
    limit = 128 if quick else 512
    kept = []
    for row in rows:
        text = row["prompt"] + row["completion"]
        if row["reward"] > mean and len(tokenizer.apply_chat_template(text, return_dict=True)["input_ids"]) <= limit:
            kept.append({name: row[name] for name in ("prompt", "completion", "reward")} | {"baseline": mean})
        if len(kept) == count:
            return Dataset.from_list(kept)
    raise SystemExit(f"{len(kept)} answers of {count} fit; ask for fewer rounds")


def make_trainer(arm: str, folder: str, rows, steps: int, batch: int, model: str):
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    from posttrain import ALoLConfig, ALoLTrainer

    fields = settings(folder, arm, batch, steps) | dict(use_cpu=True, bf16=False, gradient_checkpointing=False)
    if arm == "sft":
        trainer = SFTTrainer(
            model,
            SFTConfig(**fields),
            train_dataset=rows.select_columns(["prompt", "completion"]),
            peft_config=lora(),
        )
    else:
        kind = _two_models() if arm == "two_models" else ALoLTrainer
        args = ALoLConfig(
            **fields,
            value="column",
            ref_cache_dir=f"{folder}/{arm}-cache",
            prefix_sharing="auto" if arm == "posttrain" else "never",
        )
        trainer = kind(model, args, train_dataset=rows, peft_config=lora())
    trainer.remove_callback(PrinterCallback)
    return trainer


def _two_models():
    import torch
    from transformers import AutoModelForCausalLM

    from posttrain import ALoLTrainer
    from posttrain.objectives import offline

    class TwoModels(ALoLTrainer):
        def _with_reference(self, dataset, name):
            # loaded, not copied: a copy's patched forward would be the policy's
            self.frozen = AutoModelForCausalLM.from_pretrained(self.model.config._name_or_path, dtype=torch.float32)
            self.frozen.requires_grad_(False).eval()
            return dataset

        def compute_loss(self, model, inputs, *args, **kwargs):
            batch = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
            labels = inputs["labels"][:, 1:]
            mask = labels != -100
            index = labels.clamp(min=0).unsqueeze(-1)

            def logps(which):
                logits = which(**batch, use_cache=False).logits[:, :-1]
                return logits.log_softmax(-1).gather(-1, index).squeeze(-1)

            with torch.no_grad():
                reference = logps(self.frozen)
            return offline.a_lol(logps(model), reference, mask, inputs["advantages"], clip=self.args.clip).mean()

    return TwoModels


def measure(args, rounds: int) -> tuple[dict, dict, dict]:
    """(seconds of each arm's steps, what each logged, seconds of each arm's construction)."""
    trainers, sides, built = {}, {}, {}
    model, batch = model_of(args), BATCH
    with tempfile.TemporaryDirectory() as folder, no_curves():
        rows = load_answers(args.data, batch * (rounds + 1), args.quick, _tokenizer(model))
        for arm in ARMS:
            start = time.perf_counter()
            trainers[arm] = make_trainer(arm, folder, rows, rounds + 1, batch, model)
            built[arm] = time.perf_counter() - start
            sides[arm] = side_of(trainers[arm])
        seconds = harness.alternate(sides, rounds)
    return seconds, {arm: [r for r in t.state.log_history if "loss" in r] for arm, t in trainers.items()}, built


def _tokenizer(model: str):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def check_equal(logs: dict) -> float:
    """The largest difference of a loss, relative to two_models'; SystemExit above 1e-4."""
    largest = 0.0
    for arm in ("padded", "posttrain"):
        for step, (ours, theirs) in enumerate(zip(logs[arm], logs["two_models"], strict=True), 1):
            gap = abs(ours["loss"] - theirs["loss"]) / max(abs(theirs["loss"]), 1e-12)
            if not gap <= TOLERANCE:
                raise SystemExit(f"step {step}: the loss of {arm} differs from that of two models by {gap:.3g}")
            largest = max(largest, gap)
    return largest


def _print_memory(arm: str, args) -> None:
    model, batch = model_of(args), BATCH
    with tempfile.TemporaryDirectory() as folder, no_curves():
        rows = load_answers(args.data, batch * 2, args.quick, _tokenizer(model))
        make_trainer(arm, folder, rows, 2, batch, model).train()
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
    seconds, logs, built = measure(args, args.rounds or (3 if args.quick else 8))
    gap = check_equal(logs)
    rows = []
    for arm, values in seconds.items():
        ratios = [other / ours for other, ours in zip(values, seconds[OURS], strict=True)]
        rows.append(
            {"arm": arm, "seconds": three(values), "over_ours": three(ratios), "peak_mib": round(memory[arm])}
            | {"construction_seconds": round(built[arm], 2)}
        )
    lines = [
        [r["arm"], *("{:.2f} [{:.2f}, {:.2f}]".format(*r[name]) for name in ("seconds", "over_ours")), r["peak_mib"]]
        for r in rows
    ]
    print(format_table(("arm", "s/step", "over ours", "MiB"), lines))
    found = {row["arm"]: row["over_ours"][0] for row in rows}
    targets = [
        {"target": "a step over SFT's, at most", "wanted": WANTED["sft"], "reached": round(1 / found["sft"], 4)},
        {"target": "two models' step over ours", "wanted": WANTED["two_models"], "reached": found["two_models"]},
    ]
    targets[0]["met"] = targets[0]["reached"] <= WANTED["sft"]
    targets[1]["met"] = targets[1]["reached"] >= WANTED["two_models"]
    for one in targets:
        print(f"{'met' if one['met'] else 'NOT MET':8}{one['target']}: {one['reached']:.2f} ({one['wanted']})")
    print(f"largest gap {gap:.2g}")
    if args.json:
        content = {"command": harness.command(), "machine": harness.machine(), "rows": rows}
        harness.write_json(args.json, content | {"targets": targets, "largest_gap": gap})


if __name__ == "__main__":
    main()
