"""`posttrain quickstart`: what flipped labels do to DPO, and what two robust methods do about it, on this machine."""

import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from posttrain.checks import check_links
from posttrain.console import say
from posttrain.errors import DivergedError, EnvironmentIssue

FLIP_RATE = 0.3
REQUIRED_ACCURACY = 0.85


@dataclass(frozen=True)
class Scale:
    """The size of the job. Chosen by the run on clean labels alone: no method's result had a part in it."""

    model: str
    steps: int
    batch_size: int
    held_out: int
    learning_rate: float
    note: str


FULL = Scale(
    model="embedded:smollm2-135m",
    steps=20,
    batch_size=8,
    held_out=150,
    learning_rate=3e-4,
    note="SmolLM2-135M-Instruct, dequantised from Q4_1: close to the hub's model, not equal to it",
)
FAST = Scale(
    model="embedded:tiny",
    steps=20,
    batch_size=8,
    held_out=50,
    learning_rate=1e-3,
    note="a tiny llama with random weights: this checks that everything runs, its figures mean nothing",
)


@dataclass(frozen=True)
class Method:
    title: str
    labels: str
    settings: dict = field(default_factory=dict)


METHODS = {
    "dpo_clean": Method("DPO", "clean", {"pair_loss": "dpo"}),
    "dpo": Method("DPO", "flipped", {"pair_loss": "dpo"}),
    "rdpo": Method("rDPO", "flipped", {"pair_loss": "rdpo", "flip_rate": FLIP_RATE}),
    # rescale gives the exact global weights without another forward, on one process as well as on many.
    "dr_dpo": Method("Dr. DPO", "flipped", {"reduction": "dr_dpo", "beta_prime": 1.0, "dr_dpo_window": "rescale"}),
}


def add_parser(subparsers) -> None:
    parser = subparsers.add_parser(
        "quickstart",
        help="train an adapter with flipped labels, four ways, and compare (minutes on a laptop)",
        description="Trains SmolLM2-135M with LoRA on generated preference pairs, 30% of them with flipped labels, "
        "and compares DPO, rDPO and Dr. DPO on clean held-out pairs. Under ten minutes on two cores.",
    )
    parser.add_argument("--fast", action="store_true", help="a tiny random model and few pairs, to see that it runs")
    parser.add_argument("--output", default="runs/quickstart", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of data, flips and adapters; default: 0")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all of them")
    parser.add_argument("--verbose", action="store_true", help="let the libraries' own messages through")


def run(args) -> int:
    """Train and score each method, print the table; exit code 5 if DPO on clean labels misses its mark."""
    # Before any of the libraries is imported: nothing here needs the hub, and one device is enough.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    # Threads that wait by spinning lose half their speed beside one busy program.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not args.verbose:
        os.environ.setdefault("POSTTRAIN_LOG", "warning")
    output = _output_folder(args.output)
    scale = FAST if args.fast else FULL
    started = time.perf_counter()
    say("Loading the libraries and the model (the first time, it is converted into the cache) ...", flush=True)

    from posttrain import quiet

    if not args.verbose:
        quiet.quiet_libraries()
    job = _Job(scale, args.seed, output)
    results = [job.base()]
    for name in dict.fromkeys(args.methods):
        results.append(job.train(name))
    seconds = time.perf_counter() - started

    table = _table(results)
    passed = _task_check(results)
    report = {
        "results": results,
        "task_check": {"required_accuracy": REQUIRED_ACCURACY, "passed": passed, "enforced": not args.fast},
        "settings": {**asdict(scale), "seed": args.seed, "flip_rate": FLIP_RATE, **job.shared_settings()},
        "versions": job.versions(),
        "hardware": job.hardware(),
        "seconds": round(seconds, 1),
    }
    (output / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    (output / "results.md").write_text(table + "\n")
    say(f"\n{table}\n")
    say(
        f"Accuracy: the share of {scale.held_out} clean held-out pairs whose right answer is the likelier one.\n"
        "One seed and one size: differences within the intervals say nothing.\n"
        f"In all {seconds / 60:.1f} minutes; details in {output / 'results.json'}"
    )
    if args.fast:
        say("A fast run: the model started from random weights, so these figures say nothing about the methods.")
    shown = "rdpo" if "rdpo" in args.methods else args.methods[-1]
    say(f"\nLoad the {METHODS[shown].title} adapter with plain PEFT:\n\n{job.loading_lines(shown)}")
    if passed is False and not args.fast:
        raise DivergedError(
            f"the task check failed: DPO on clean labels must rank at least {REQUIRED_ACCURACY:.0%} of the held-out "
            "pairs right. Something here trains worse than it should; the table above is not to be trusted."
        )
    return 0


class _Job:
    """The data and the base model that all methods share."""

    def __init__(self, scale: Scale, seed: int, output: Path):
        from transformers import AutoTokenizer

        from posttrain.data.corruption import flip_preferences
        from posttrain.data.generated import reverse_list_pairs
        from posttrain.models import resolve_model

        self.scale, self.seed, self.output = scale, seed, output
        self.model_path = resolve_model(scale.model)
        self.tokenizer = AutoTokenizer.from_pretrained(self.model_path)
        n = scale.steps * scale.batch_size
        clean = reverse_list_pairs(n, seed)
        self.train_sets = {"clean": clean, "flipped": flip_preferences(clean, FLIP_RATE, seed)}
        self.held_out = reverse_list_pairs(scale.held_out, seed + 1, exclude=clean)
        self.prompt = self.held_out[0]["prompt"]
        say(
            f"Model: {scale.note}\n"
            f"Task: given a list of three words, prefer its reverse to another order of the same words\n"
            f"Data: {n} training pairs, {FLIP_RATE:.0%} of their labels flipped for all but the clean run; "
            f"{scale.held_out} clean held-out pairs\n"
            f"Output: {output}\n",
            flush=True,
        )

    def base(self) -> dict:
        result = {"method": "base", "title": "base model", "labels": "-", "train_seconds": None}
        return result | self._score(self._load(), "base model")

    def train(self, name: str) -> dict:
        """Train one method into its run folder and score it."""
        from peft import LoraConfig
        from transformers import PrinterCallback, ProgressCallback, set_seed

        from posttrain import RobustDPOConfig, RobustDPOTrainer
        from posttrain.cli import _console
        from posttrain.run.report import RunReport

        method, scale = METHODS[name], self.scale
        label = f"{method.title}, {method.labels} labels"
        args = RobustDPOConfig(
            output_dir=str(self.output / name),
            per_device_train_batch_size=scale.batch_size,
            learning_rate=scale.learning_rate,
            logging_steps=1,
            save_strategy="no",
            # a later quickstart may write over an earlier one
            check_resume=False,
            report_to=[],
            disable_tqdm=not sys.stderr.isatty(),
            seed=self.seed,
            **self.shared_settings(),
            **method.settings,
        )
        data = {"generated": "reverse_list", "labels": method.labels, "flip_rate": FLIP_RATE, "seed": self.seed}
        # The adapter's first weights come from the global generator, so that all methods start from the same ones.
        set_seed(self.seed)
        trainer = RobustDPOTrainer(
            model=self._load(),
            args=args,
            train_dataset=self.train_sets[method.labels],
            processing_class=self.tokenizer,
            peft_config=LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[RunReport(sections={"data": data, "model": {"model_name_or_path": scale.model}})],
        )
        # Of the Trainer's own displays, one prints a line a log and the other draws a bar for each loop.
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        start = time.perf_counter()
        with _console.progress_bar(scale.steps, f"{label}: training", "step") as bar:
            trainer.add_callback(_console.training_bar(bar))
            trainer.train()
        seconds = time.perf_counter() - start
        result = {"method": name, "title": method.title, "labels": method.labels, "train_seconds": round(seconds, 1)}
        result |= self._score(trainer.model, label)
        trainer.log({"eval_accuracy": result["accuracy"], "eval_margin": result["margin"]})
        trainer.save_model()
        trainer.create_model_card()
        return result

    def loading_lines(self, name: str) -> str:
        from posttrain.hub import loading_lines

        lines = [
            loading_lines(self.model_path, str(self.output / name), is_adapter=True),
            "",
            f"messages = {json.dumps(self.prompt)}",
            'inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")',
            'answer = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]',
            "print(tokenizer.decode(answer, skip_special_tokens=True))",
        ]
        return "```python\n" + "\n".join(lines) + "\n```"

    def shared_settings(self) -> dict:
        return {"beta": 0.1, "num_train_epochs": 1, "precompute_ref_log_probs": True, "precompute_ref_batch_size": 16}

    def versions(self) -> dict:
        from posttrain.environment import library_versions

        return library_versions() | {"python": platform.python_version()}

    def hardware(self) -> dict:
        import torch

        from posttrain.environment import device_name

        device = torch.accelerator.current_accelerator() or torch.device("cpu")
        return {"device": device_name(device), "cores": os.cpu_count(), "platform": platform.platform()}

    def _load(self):
        import torch
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.model_path, dtype=torch.float32)
        return model.to(torch.accelerator.current_accelerator() or "cpu")

    def _score(self, model, label: str) -> dict:
        from posttrain.cli import _console
        from posttrain.evaluation import score_pairs
        from posttrain.tables import wilson_interval

        with _console.progress_bar(2 * len(self.held_out), f"{label}: scoring", "answer") as bar:
            scores = score_pairs(model, self.tokenizer, self.held_out, batch_size=16, progress=bar.update)
        right = int((scores.margins > 0).sum())
        accuracy = right / len(self.held_out)
        say(f"{label}: {accuracy:.1%} of the held-out pairs ranked right", flush=True)
        return {
            "accuracy": accuracy,
            "interval": wilson_interval(right, len(self.held_out)),
            "margin": scores.margins.mean().item(),
        }


def _output_folder(name: str) -> Path:
    check_links(Path(name).expanduser(), "--output")
    folder = Path(name).expanduser().resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise EnvironmentIssue(f"--output {name} cannot be written to ({error}); name another folder.") from None
    return folder


def _table(results: list[dict]) -> str:
    from posttrain.tables import format_table

    rows = []
    for result in results:
        low, high = result["interval"]
        seconds = result["train_seconds"]
        rows.append(
            (
                result["title"],
                result["labels"],
                f"{result['accuracy']:.1%}",
                f"{low:.1%} to {high:.1%}",
                f"{result['margin']:.1f}",
                "-" if seconds is None else f"{seconds:.0f}",
            )
        )
    headers = ("method", "training labels", "accuracy", "95% interval", "margin (nats)", "training (s)")
    return format_table(headers, rows)


def _task_check(results: list[dict]) -> bool | None:
    """Tell whether DPO on clean labels reached its mark; None if it was not among the methods."""
    reached = [result["accuracy"] >= REQUIRED_ACCURACY for result in results if result["method"] == "dpo_clean"]
    return reached[0] if reached else None
