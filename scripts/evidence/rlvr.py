"""SFT, GRPO, LUFFY's mix, HPT and quantile advantages on tasks of which a small model can do the easy ones only.

    python scripts/evidence/rlvr.py --seeds 10 --json docs/evidence/rlvr.json

Every cell is one training run of a llama of 1.3M parameters. By SFT it was first taught sums of five numbers modulo 10
whose digits are low (easy), and a few whose digits are high (hard), the same weights for all cells of a seed. It then
trains on easy and hard tasks, half of each, for as many optimiser steps as every other cell and with as many prompts a
step. A success is the whole worked answer, running sum by running sum, so that a guess is worth nothing. The held-out
tasks are the same for all cells of a seed. Length of the warm-up, steps and learning rates come from runs of plain GRPO
and plain SFT with another seed (`--pilot`); no other arm was tuned.
"""

import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness

ROOT = Path(__file__).resolve().parents[2]
G, PROMPTS = 8, 8
TERMS = 5
# digits that are added: those of easy tasks make up the warm-up, but for a few rows of hard ones
DIGITS = {"easy": "01234", "hard": "56789"}
HARD_SHARE = 1 / 16
# the warm-up ends once so many of its own easy tasks are answered right
WARM_ACCURACY = 0.9
# a digit and a space for each term, and the end
LONGEST = 2 * TERMS + 4
SAMPLES = 8
SPLITS = ("easy", "hard")
ARMS = ("warm", "sft", "grpo", "sft_grpo", "luffy", "hpt", "hpt_sft_rate", "hpt_qae", "qae", "grpo_fast", "qae_fast")


@dataclass(frozen=True)
class Size:
    """What --quick makes smaller."""

    warm_steps: int = 600  # at most
    steps: int = 60
    tasks: int = 32
    held_out: int = 100
    watched: int = 50
    watch_every: int = 15


QUICK = Size(warm_steps=150, steps=6, held_out=20, watched=10, watch_every=3)
# at FAST_RATE the pilot of plain GRPO lost what it knew
RL_RATE, SFT_RATE, FAST_RATE = 3e-5, 3e-4, 3e-4


def trainer_settings(arm: str) -> tuple[str, dict]:
    """(preset, settings) of an arm with rollouts. `grpo` is TRL's default loss with DAPO's clip range, which `qae` has
    too: a step makes one update of its rollouts, so no ratio is ever clipped."""
    dapo = {"num_generations": G, "epsilon_high": 0.28}
    qae = {"advantage": "quantile", "quantile": 0.4}
    fast = {"learning_rate": FAST_RATE}
    return {
        "grpo": ("policy_gradient", dapo),
        "qae": ("policy_gradient", dapo | qae),
        "grpo_fast": ("policy_gradient", dapo | fast),
        "qae_fast": ("policy_gradient", dapo | qae | fast),
        # one demonstration in the place of a rollout in every group, off-policy and shaped
        "luffy": ("policy_gradient", dapo | {"soft_gate": [[1, 1, 0]] * (G + 1), "demonstration_loss": "luffy"}),
        # at GRPO's learning rate, as all arms with rollouts that name none
        "hpt": ("hpt", {"num_generations": G}),
        "hpt_sft_rate": ("hpt", {"num_generations": G, "learning_rate": SFT_RATE}),
        "hpt_qae": ("hpt", {"num_generations": G} | qae),
    }[arm]


def cells(seeds: int, arms=ARMS) -> list[dict]:
    return [{"seed": seed, "arm": arm} for seed in range(seeds) for arm in arms]


class Tasks:
    """Tasks and warm model of each seed, made once."""

    def __init__(self, folder: Path, size: Size):
        self.folder, self.size = folder, size

    def load(self, seed: int):
        """(folder of the warm model, training tasks, {split: held-out tasks})."""
        from datasets import concatenate_datasets

        from posttrain.data.generated import modular_sum_tasks

        size, half = self.size, self.size.tasks // 2
        drawn = modular_sum_tasks(20000, seed=1000 + seed, terms=(TERMS, TERMS))
        held_out, train, rest = {}, [], []
        for split, digits in DIGITS.items():
            # the first number is copied, not added
            rows = drawn.select([i for i, prompt in enumerate(drawn["prompt"]) if set(prompt[2::2]) <= set(digits)])
            held_out[split] = rows.select(range(size.held_out))
            train.append(rows.select(range(size.held_out, size.held_out + half)))
            rest.append(rows.select(range(size.held_out + half, len(rows))))
        warm = self.folder / f"warm-{size.warm_steps}-{seed}"
        if not (warm / "tokenizer.json").exists():
            _warm_up(warm, seed, size.warm_steps, *rest)
        return str(warm), concatenate_datasets(train).shuffle(seed=seed), held_out


def train_cell(tasks: Tasks, cell: dict, **overrides) -> dict:
    """Train one cell and answer the held-out tasks: greedily, and SAMPLES times at temperature 1."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    seed, arm, size = cell["seed"], cell["arm"], tasks.size
    folder, train, held_out = tasks.load(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    watch = _watcher(tokenizer, held_out, size)
    log, begun = {}, time.perf_counter()
    if arm == "warm":
        model = AutoModelForCausalLM.from_pretrained(folder)
        watch.measure(model, 0)
    elif arm == "sft":
        model = _sft(folder, tokenizer, train, seed, size.steps, watch, overrides)
    elif arm == "sft_grpo":
        with tempfile.TemporaryDirectory() as between:
            _sft(folder, tokenizer, train, seed, size.steps // 2, watch, overrides).save_pretrained(between)
            watch.offset = size.steps // 2
            model, log = _rollouts("grpo", between, tokenizer, train, seed, size.steps // 2, watch, overrides)
    else:
        model, log = _rollouts(arm, folder, tokenizer, train, seed, size.steps, watch, overrides)
    seconds = round(time.perf_counter() - begun - watch.seconds, 1)
    result = {"train_seconds": seconds, "update_tokens": watch.update_tokens, "curve": watch.curve, "log": log}
    lengths = log.get("completions/mean_length", [])
    result["generated_tokens"] = round(sum(lengths) * G * PROMPTS)
    torch.manual_seed(seed)
    for split, rows in held_out.items():
        greedy, _ = answer(model, tokenizer, rows, 1, greedy=True)
        sampled, entropy = answer(model, tokenizer, rows, SAMPLES)
        # a digit a task: right or wrong, and how often right of SAMPLES
        result[split] = {
            "greedy": "".join(str(int(right)) for right in greedy[:, 0]),
            "sampled": "".join(str(int(count)) for count in sampled.sum(dim=1)),
            "entropy": round(entropy, 4),
        }
    return result


def answer(model, tokenizer, rows, copies: int, greedy: bool = False):
    """((rows, copies) bool of answers that are right throughout, mean entropy of their tokens in nats)."""
    import torch

    prompts = [row["prompt"] for row in rows for _ in range(copies)]
    wanted = [row["demonstration"] for row in rows for _ in range(copies)]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    width = inputs["input_ids"].size(1)
    choice = {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=LONGEST, **choice)
        ended = (ids[:, width:] == tokenizer.eos_token_id).cumsum(dim=1)
        # tokens up to the end, itself included
        mask = ((ended == 0) | ((ended == 1) & (ids[:, width:] == tokenizer.eos_token_id))).float()
        whole = torch.cat([inputs["attention_mask"], mask.long()], dim=1)
        positions = (whole.cumsum(dim=1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=whole, position_ids=positions).logits[:, width - 1 : -1]
        logps = logits.float().log_softmax(-1)
        entropy = -(logps.exp() * logps).sum(-1)
    texts = tokenizer.batch_decode(ids[:, width:], skip_special_tokens=True)
    # an answer that never ends is none
    right = [text.split() == target.split() for text, target in zip(texts, wanted, strict=True)]
    right = torch.tensor(right) & (ended[:, -1] > 0)
    return right.view(len(rows), copies), (entropy * mask).sum().item() / mask.sum().item()


def _watcher(tokenizer, held_out: dict, size: Size):
    """A callback that measures some held-out tasks every few steps, and counts the tokens that updates forward."""
    import torch
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def __init__(self):
            self.curve, self.seconds, self.update_tokens, self.offset, self.hook = [], 0.0, 0, 0, None

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.hook = model.register_forward_pre_hook(self._count, with_kwargs=True)
            if not self.offset:
                self.measure(model, 0)

        def _count(self, module, positional, named):
            if torch.is_grad_enabled():
                mask = named.get("attention_mask")
                self.update_tokens += int(named["input_ids"].numel() if mask is None else mask.sum())

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step % size.watch_every == 0:
                self.measure(model, self.offset + state.global_step)

        def on_train_end(self, args, state, control, **kwargs):
            self.hook.remove()

        def measure(self, model, step: int):
            begun, training = time.perf_counter(), model.training
            model.eval()
            entry = {"step": step}
            # the training run draws the same rollouts with and without being watched
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(step)
                for split, rows in held_out.items():
                    right, entropy = answer(model, tokenizer, rows.select(range(size.watched)), 1)
                    entry |= {f"pass1_{split}": right.float().mean().item(), f"entropy_{split}": round(entropy, 4)}
            self.curve.append(entry)
            model.train(training)
            self.seconds += time.perf_counter() - begun

    return Watch()


def _common(run: str, seed: int, steps: int) -> dict:
    return dict(
        output_dir=run,
        max_steps=steps,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        report_to="none",
        seed=seed,
    )


def _sft(folder, tokenizer, train, seed, steps, watch, overrides):
    """TRL's SFTTrainer on the demonstrations, as many of them a step as the other arms have prompts."""
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    rows = train.rename_column("demonstration", "completion").select_columns(["prompt", "completion"])
    with tempfile.TemporaryDirectory() as run:
        settings = {"learning_rate": SFT_RATE} | overrides
        args = SFTConfig(**_common(run, seed, steps), per_device_train_batch_size=PROMPTS, **settings)
        trainer = SFTTrainer(folder, args, train_dataset=rows, processing_class=tokenizer, callbacks=[watch])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.model


def _rollouts(arm, folder, tokenizer, train, seed, steps, watch, overrides):
    """(model, what was logged of each step) of an arm with rollouts."""
    from transformers import PrinterCallback

    from posttrain import HPTConfig, HPTTrainer, PolicyGradientConfig, PolicyGradientTrainer
    from posttrain.rewards import ExactMatch

    preset, settings = trainer_settings(arm)
    trainer_class, config_class = {
        "policy_gradient": (PolicyGradientTrainer, PolicyGradientConfig),
        "hpt": (HPTTrainer, HPTConfig),
    }[preset]
    with tempfile.TemporaryDirectory() as run:
        settings = {"learning_rate": RL_RATE} | settings | overrides
        args = config_class(
            **_common(run, seed, steps),
            per_device_train_batch_size=G * PROMPTS,
            max_completion_length=LONGEST,
            # rows of 30 tokens: packing them costs more than it saves
            prefix_sharing="never",
            max_steps_without_gradient=0,
            **settings,
        )
        reward = ExactMatch(gold="demonstration")
        trainer = trainer_class(folder, reward, args, train, processing_class=tokenizer, callbacks=[watch])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    names = ("completions/mean_length", "reward", "rows/kept_share", "entropy", "hpt/frac_sft_prompts")
    log = {}
    for name in names:
        values = [round(row[name], 4) for row in trainer.state.log_history if name in row]
        if values:
            log[name] = values
    return trainer.model, log


def _warm_up(folder: Path, seed: int, steps: int, easy, hard) -> None:
    """A small llama from random weights and a tokenizer of characters, taught mostly easy tasks."""
    import random

    import torch
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    from posttrain.data.generated import MODULAR_SUM_CHARACTERS
    from posttrain.models import tiny_model

    vocabulary = {token: i for i, token in enumerate(["<eos>", "<pad>", *MODULAR_SUM_CHARACTERS])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens(["<eos>", "<pad>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>")
    # no token types, which a llama does not take
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    model = tiny_model(
        seed=seed,
        vocab_size=len(vocabulary),
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=40,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    pools = [
        [(tokenizer(row["prompt"])["input_ids"], [*tokenizer(row["demonstration"])["input_ids"], 0]) for row in rows]
        for rows in (easy, hard)
    ]
    rng = random.Random(5000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    checked = easy.select(range(100))
    for step in range(1, steps + 1):
        batch = [rng.choice(pools[rng.random() < HARD_SHARE]) for _ in range(64)]
        width = max(len(prompt) + len(answer) for prompt, answer in batch)
        ids = torch.ones(len(batch), width, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for i, (prompt, completion) in enumerate(batch):
            ids[i, : len(prompt) + len(completion)] = torch.tensor(prompt + completion)
            labels[i, len(prompt) : len(prompt) + len(completion)] = torch.tensor(completion)
        # padding is on the right, where nothing that is scored looks
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        # seeds learn suddenly, and after unlike numbers of steps
        if step >= 75 and step % 10 == 0:
            right, _ = answer(model, tokenizer, checked, 1, greedy=True)
            if right.float().mean() >= WARM_ACCURACY:
                break
    print(f"warm model {seed}: {step} steps, last loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    import rlvr_report

    parser = harness.options(__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT / "runs/evidence/rlvr", help="folder of the warm models")
    parser.add_argument("--cells", type=Path, help="file of the cells' results (docs/evidence/cells/rlvr.jsonl)")
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=list(ARMS), help="which methods")
    parser.add_argument("--minutes", type=float, help="start no further cell after this long")
    parser.add_argument("--pilot", action="store_true", help="plain GRPO and SFT, seed 900, over learning rates")
    args = parser.parse_args()
    if args.data:
        parser.error("--data: the tasks are generated; leave it out")
    size = QUICK if args.quick else Size()
    tasks = Tasks(args.work, size)
    if args.pilot:
        for arm, rates in (("sft", (1e-4, 3e-4, 1e-3)), ("grpo", (1e-5, 3e-5, 1e-4, 3e-4))):
            for rate in rates:
                result = train_cell(tasks, {"seed": 900, "arm": arm}, learning_rate=rate)
                print(rlvr_report.pilot_line(arm, rate, result), flush=True)
        return
    # results of --quick are of another size and stay apart
    results = args.cells or (args.work / "quick.jsonl" if args.quick else ROOT / "docs/evidence/cells/rlvr.jsonl")
    grid = cells(args.seeds or (1 if args.quick else 10), args.arms)
    harness.run_grid(results, grid, lambda cell: train_cell(tasks, cell), args.minutes)
    done, missing = harness.read_grid(results, grid)
    content = rlvr_report.summarise(done, SAMPLES)
    rlvr_report.show(content)
    if args.json:
        head = {"command": harness.command(), "machine": harness.machine()}
        settings = {"rl_learning_rate": RL_RATE, "sft_learning_rate": SFT_RATE, "fast_rate": FAST_RATE, **asdict(size)}
        harness.write_json(args.json, head | {"settings": settings} | content | {"missing_cells": missing})
        rlvr_report.plot(done, content, args.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
