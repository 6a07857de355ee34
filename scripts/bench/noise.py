"""Speed and memory of a step with noisy embeddings beside TRL's SFT step on the same rows.

    OMP_NUM_THREADS=2 python scripts/bench/noise.py --data ../shared/data --json docs/evidence/noise_speed.json

All sides train in one process on the same GSM8K solutions in the same batches, with the same LoRA, optimiser and seed,
and take turns step by step; a step is timed from one step's end to the next. The first does not count. `--group`
measures a part of the arms; in the file the other groups keep their results.

Arms: `sft`, TRL's SFTTrainer; `transformers`, the same with `neftune_noise_alpha`; `off`, ours without noise;
`neftune`; `symnoise`, which forwards each row twice; `noisefit_low`, `_middle`, `_high`, hidden noise behind layers
there, and `three_low`, ..., the same loss from three separate forwards with whole logits; `columns`, GIFT-SW without
noise, `gift_sw` with it, and `as_many`, a LoRA with as many trained numbers. The losses of `off` must be
those of `sft` bit for bit, and those of three forwards those of one, or the run ends with an error.

Peak memory is measured in a process for each side.
"""

import gzip
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness
from bench.arms import lora, memory_of, model_of, settings, side_of, three
from bench.sides import no_curves

ARMS = {
    "sft": {},
    "transformers": {"neftune_noise_alpha": 1.0},
    "off": {"embedding_noise": "none"},
    "neftune": {"embedding_noise": "neftune", "noise_alpha": 1.0},
    "symnoise": {"embedding_noise": "symnoise", "noise_alpha": 1.0},
}
# noisy layers by their share of the depth
PLACES = {"low": (0.0, 0.04, 0.1), "middle": (0.47, 0.5, 0.54), "high": (0.74, 0.8, 0.87)}
ARMS |= {f"{how}_{place}": {"hidden_noise": "noisefit"} for place in PLACES for how in ("noisefit", "three")}
ARMS |= {"as_many": {}, "columns": {}, "gift_sw": {}}
BASELINE = "sft"
GROUPS = {
    "embedding": ("sft", "transformers", "off", "neftune", "symnoise"),
    "hidden": ("sft", *(f"{how}_{place}" for place in PLACES for how in ("noisefit", "three"))),
    "weights": ("sft", "as_many", "columns", "gift_sw"),
}
# an arm's step over so many of another arm's, at most
WANTED = {
    "neftune": ("sft", 1, 1.02),
    "symnoise": ("sft", 2, 1.0),
    "noisefit_low": ("three_low", 1, 0.80),
    "noisefit_middle": ("three_middle", 1, 0.62),
    "noisefit_high": ("three_high", 1, 0.47),
    "columns": ("as_many", 1, 1.0),
    "gift_sw": ("as_many", 1, 1.2),
}
TOLERANCE = 1e-4
# rows a step
BATCH = 4


def load_rows(data: Path | None, count: int):
    from datasets import Dataset

    from posttrain.data.instructions.loading import load_instructions

    if data is None:
        return load_instructions(f"generated:arithmetic?n={count}")
    with gzip.open(data / "gsm8k_train.jsonl.gz", "rt") as file:
        tasks = [json.loads(line) for line, _ in zip(file, range(count), strict=False)]

    def said(role, text):
        return [{"role": role, "content": text}]

    return Dataset.from_list(
        [{"prompt": said("user", task["question"]), "completion": said("assistant", task["answer"])} for task in tasks]
    )


def adapter_of(arm: str, model: str):
    """The adapter of an arm: an eighth of each layer's columns, a LoRA with as many numbers, or the others' LoRA."""
    if arm not in ("as_many", "columns", "gift_sw"):
        return lora()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from posttrain.adapters.gift_sw import GiftSWConfig

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        modules = AutoModelForCausalLM.from_config(config).base_model.modules()
    layers = [module for module in modules if isinstance(module, torch.nn.Linear)]
    count = config.hidden_size // 8
    if arm != "as_many":
        noise = "none" if arm == "columns" else "gaussian"
        return GiftSWConfig(
            r=count, target_modules="all-linear", noise=noise, calibration_rows=4, task_type="CAUSAL_LM"
        )
    numbers = count * sum(layer.out_features for layer in layers)
    rank = round(numbers / sum(layer.in_features + layer.out_features for layer in layers))
    return lora(r=rank, lora_alpha=rank)


def make_trainer(arm: str, folder: str, rows, steps: int, batch: int, model: str):
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    from posttrain import NoisySFTConfig, NoisySFTTrainer

    theirs = arm in ("sft", "transformers")
    kind, config = (SFTTrainer, SFTConfig) if theirs else (NoisySFTTrainer, NoisySFTConfig)
    own = dict(ARMS[arm])
    how, _, place = arm.partition("_")
    if place in PLACES:
        from transformers import AutoConfig

        depth = AutoConfig.from_pretrained(model).num_hidden_layers
        own["noise_layers"] = sorted({int(share * depth) for share in PLACES[place]})
        kind = _three_forwards() if how == "three" else kind
    args = config(**settings(folder, arm, batch, steps), **own)
    trainer = kind(model, args, train_dataset=rows, peft_config=adapter_of(arm, model))
    trainer.remove_callback(PrinterCallback)
    return trainer


def _three_forwards():
    from posttrain import NoisySFTTrainer
    from posttrain.mechanisms.noise.controller import innermost
    from posttrain.mechanisms.noise.passes import separate

    class ThreeForwards(NoisySFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            batch = {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
            inner = innermost(self.accelerator.unwrap_model(model))
            return separate(self._hidden.passes, inner, batch, self.state.global_step) / num_items_in_batch

    return ThreeForwards


def measure(args, arms, rounds: int) -> tuple[dict, dict]:
    """(seconds of each arm's steps, what each logged)."""
    trainers = {}
    model, batch = model_of(args), BATCH
    with tempfile.TemporaryDirectory() as folder, no_curves():
        rows = load_rows(args.data, batch * (rounds + 1))
        for arm in arms:
            trainers[arm] = make_trainer(arm, folder, rows, rounds + 1, batch, model)
        seconds = harness.alternate({arm: side_of(trainer) for arm, trainer in trainers.items()}, rounds)
    return seconds, {arm: [r["loss"] for r in t.state.log_history if "loss" in r] for arm, t in trainers.items()}


def check_losses(losses: dict) -> None:
    """SystemExit where ours without noise is not TRL's, or noise changes nothing."""
    if "off" in losses and losses["off"] != losses["sft"]:
        raise SystemExit(f"without noise the losses are {losses['off']}, and TRL's are {losses['sft']}")
    for arm in losses.keys() - {"sft", "off"}:
        if losses[arm] == losses["sft"]:
            raise SystemExit(f"the losses of {arm} are those without noise")
    for place in PLACES:
        if f"three_{place}" not in losses:
            continue
        for one, apart in zip(losses[f"noisefit_{place}"], losses[f"three_{place}"], strict=True):
            if not abs(one - apart) <= TOLERANCE * abs(apart):
                raise SystemExit(
                    f"with noise behind {place} layers one forward has a loss of {one}, three have {apart}"
                )


def _print_memory(arm: str, args) -> None:
    model, batch = model_of(args), BATCH
    with tempfile.TemporaryDirectory() as folder, no_curves():
        make_trainer(arm, folder, load_rows(args.data, batch * 2), 2, batch, model).train()
    print(json.dumps(harness.peak_memory()))


def main(arguments: list[str] | None = None) -> None:
    options = harness.options(__doc__.split("\n")[0])
    options.add_argument("--rounds", type=int, metavar="N", help="steps of every arm")
    options.add_argument("--group", choices=GROUPS, help="measure these arms alone")
    options.add_argument("--memory", choices=ARMS, help="print the peak memory of one arm, MiB")
    args = options.parse_args(arguments)
    os.environ.setdefault("POSTTRAIN_LOG", "warning")
    if args.memory:
        return _print_memory(args.memory, args)
    # first: nothing else is in memory yet
    arms = GROUPS[args.group] if args.group else tuple(ARMS)
    memory = {arm: memory_of(__file__, arm, args) for arm in arms}
    seconds, losses = measure(args, arms, args.rounds or (3 if args.quick else 12))
    check_losses(losses)
    rows, targets = report(seconds, memory)
    if args.json:
        known = json.loads(args.json.read_text()) if args.json.exists() else {}
        own = {"command": harness.command(), "machine": harness.machine()}
        for name, members in GROUPS.items():
            if args.group in (None, name):
                known[name] = own | {
                    "rows": [row for row in rows if row["arm"] in members],
                    "targets": [one for one in targets if one["arm"] in members],
                }
        harness.write_json(args.json, known)


def report(seconds: dict, memory: dict) -> tuple[list[dict], list[dict]]:
    """Print the table and the targets, and return both."""
    from posttrain.tables import format_table

    rows, targets = [], []
    for arm, values in seconds.items():
        ratios = [own / theirs for own, theirs in zip(values, seconds[BASELINE], strict=True)]
        rows.append({"arm": arm, "seconds": three(values), "over_sft": three(ratios), "peak_mib": round(memory[arm])})
        if arm in WANTED:
            other, steps, wanted = WANTED[arm]
            over = [own / theirs for own, theirs in zip(values, seconds[other], strict=True)]
            reached = round(harness.spread(over)[0] / steps, 4)
            said = f"a step of {arm} over {steps} of {other}, at most"
            targets.append({"arm": arm, "target": said, "wanted": wanted, "reached": reached, "met": reached <= wanted})
    lines = [
        [r["arm"], *("{:.3f} [{:.3f}, {:.3f}]".format(*r[name]) for name in ("seconds", "over_sft")), r["peak_mib"]]
        for r in rows
    ]
    print(format_table(("arm", "s/step", "over SFT", "MiB"), lines))
    for one in targets:
        print(f"{'met' if one['met'] else 'NOT MET':8}{one['target']}: {one['reached']:.3f} ({one['wanted']})")
    return rows, targets


if __name__ == "__main__":
    main()
