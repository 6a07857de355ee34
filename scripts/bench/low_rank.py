"""Speed of refactoring, adding and truncating LoRA adapters by their factors, beside SVDs of the full product.

    OMP_NUM_THREADS=2 python scripts/bench/low_rank.py --json docs/evidence/low_rank_speed.json

Nothing is downloaded; factors are random. All sides run in one process and take turns; the first turn does not count.

Section `refactor`, of one layer: `full_svd`, the product and its SVD in fp32; `ours`, in fp64 inside; `ours_fp32`. The
section `adapter` refactors all layers of a model of 32 blocks with 7 matrices each. Section `merge`, of two adapters on
one model: PEFT's `add_weighted_adapter` with `cat`, which keeps the sum of the ranks, and with `svd`, to rank r; ours
exact and ours to rank r, in memory. Each must have the sum's product to the error that is printed, or the run ends with
an error.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness

# rank, width of a square layer
RANK, WIDTH, QUICK_WIDTH = 16, 4096, 512
# of the model that two adapters are added on: width, inner width, blocks
MODEL, QUICK_MODEL = (768, 2048, 1), (256, 512, 1)
# blocks and matrices (d_out, d_in) of one, in units of the width: those of a Llama of 7B
BLOCKS, MATRICES = 32, ((1, 1),) * 4 + ((2.6875, 1),) * 2 + ((1, 2.6875),)
WEIGHTS = (0.7, -0.3)
# how often a side runs in a turn
OFTEN = 200
WANTED = {"seconds of a refactorisation in fp32, at most": 0.9e-3, "times as fast as the full SVD, at least": 1e4}


def sides_of(calls: dict, rounds: int, repeats: dict[str, int]) -> dict[str, list[float]]:
    """Seconds of one run of each side, by turns; the first turn does not count.

    In this thread, unlike the steps of trainers: of another one's heap the system takes back what a call frees, and
    gives it out anew, page by page, which takes longer than the algebra of so small factors.
    """
    found, order = {name: [] for name in calls}, list(calls)
    for number in range(rounds + 1):
        for name in order:
            begun, times = time.perf_counter(), repeats.get(name, 1)
            for _ in range(times):
                calls[name]()
            if number:
                found[name].append((time.perf_counter() - begun) / times)
        order = order[1:] + order[:1]
    return found


def factors(rank: int, height: int, width: int, seed: int = 0):
    """Random A (rank, width) as PEFT begins it, and B (height, rank) as large as after some training."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    A = torch.empty(rank, width).uniform_(-1, 1, generator=generator) / width**0.5
    return A, torch.randn(height, rank, generator=generator) * 0.02


def full_svd(A, B):
    """The refactorisation as it is written down: the SVD of the product."""
    import torch

    left, values, right = torch.linalg.svd(B @ A, full_matrices=False)
    return right[: len(A)], left[:, : len(A)] * values[: len(A)]


def measure_refactor(width: int, rounds: int) -> list[dict]:
    """A row for each side of one layer."""
    import torch

    from posttrain.adapters.low_rank import refactor

    A, B = factors(RANK, width, width)
    calls = {
        "full_svd": lambda: full_svd(A, B),
        "ours": lambda: refactor(A, B),
        "ours_fp32": lambda: refactor(A, B, precision=torch.float32),
    }
    seconds = sides_of(calls, rounds, {"ours": OFTEN, "ours_fp32": OFTEN})
    product = B.double() @ A.double()
    rows = []
    for name, values in seconds.items():
        made_a, made_b = (part.double() for part in calls[name]())
        off = (torch.linalg.norm(made_b @ made_a - product) / torch.linalg.norm(product)).item()
        turned = torch.linalg.matrix_norm(made_a @ made_a.T - torch.eye(RANK, dtype=torch.float64), ord=2).item()
        check(name, off, 1e-5)
        over = [own / theirs for own, theirs in zip(seconds["full_svd"], values, strict=True)]
        rows.append(row("refactor", name, values, off, layer=[width, width], over=over, not_orthonormal=turned))
    return rows


def measure_adapter(width: int, rounds: int, blocks: int) -> list[dict]:
    """A row of all layers of a model."""
    from posttrain.adapters.low_rank import refactor

    shapes = [(int(height * width), int(wide * width)) for height, wide in MATRICES]
    layers = [factors(RANK, *shape, seed=place) for place, shape in enumerate(shapes)]
    seconds = sides_of({"ours": lambda: [refactor(*layer) for layer in layers * blocks]}, rounds, {})
    return [row("adapter", "ours", seconds["ours"], None, layers=len(layers) * blocks)]


def measure_merge(shape: tuple[int, int, int], rounds: int) -> list[dict]:
    """A row for each way to add two adapters."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    from posttrain.adapters.low_rank import merge_adapters
    from posttrain.adapters.refactoring import factors_of

    width, inner, blocks = shape
    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=blocks, vocab_size=259,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    model = get_peft_model(
        AutoModelForCausalLM.from_config(config),
        LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear"),
        adapter_name="first",
    )
    model.add_adapter("second", LoraConfig(r=RANK // 2, lora_alpha=RANK // 2, target_modules="all-linear"))
    layers = {}
    for place, name in enumerate(("first", "second")):
        model.set_adapter(name)
        for one in factors_of(model, name):
            made = factors(*one.A.shape[:1], one.B.shape[0], one.A.shape[1], seed=7 * len(layers) + place)
            one.A.data, one.B.data = made
            layers.setdefault(one.path, []).append((*made, 1.0))

    def theirs(kind, **more):
        def call():
            # an adapter that is there already would be kept
            made = f"sum{len(model.peft_config)}"
            model.add_weighted_adapter(["first", "second"], list(WEIGHTS), made, combination_type=kind, **more)
            held = [one for _, one in model.named_modules() if made in getattr(one, "lora_A", {})]
            return [(one.lora_A[made].weight.data, one.lora_B[made].weight.data) for one in held]

        return call

    def ours(rank=None):
        return [merge_adapters(both, WEIGHTS, rank) for both in layers.values()]

    calls = {
        "peft_cat": theirs("cat"), "peft_svd": theirs("svd", svd_rank=RANK), "ours": ours,
        "ours_to_r": lambda: ours(RANK),
    }  # fmt: skip
    seconds = sides_of(calls, rounds, {})
    best = max(part.relative_error for part in ours(RANK))
    rows = []
    for name, values in seconds.items():
        made = calls[name]()
        offs, ranks = [], []
        for part, both in zip(made, layers.values(), strict=True):
            exact = sum(weight * b.double() @ a.double() for weight, (a, b, _) in zip(WEIGHTS, both, strict=True))
            gap = part[1].double() @ part[0].double() - exact
            offs.append((torch.linalg.norm(gap) / torch.linalg.norm(exact)).item())
            ranks.append(len(part[0]))
        check(name, max(offs), best * (1 + 1e-4) if name in ("peft_svd", "ours_to_r") else 1e-5)
        over = [own / theirs for own, theirs in zip(seconds["peft_svd"], values, strict=True)]
        rows.append(row("merge", name, values, max(offs), layers=len(layers), over=over, rank=max(ranks)))
    return rows


def targets_of(rows: list[dict]) -> list[dict]:
    """What is wanted of a layer of the full width, and reached."""
    # the full SVD computes in fp32 as well
    ours = next(one for one in rows if (one["section"], one["side"]) == ("refactor", "ours_fp32"))
    found = []
    for (name, wanted), reached in zip(WANTED.items(), (ours["seconds"][0], ours["speedup"][0]), strict=True):
        met = reached <= wanted if name.endswith("most") else reached >= wanted
        found.append({"target": f"{RANK} x {WIDTH}: {name}", "wanted": wanted, "reached": reached, "met": met})
    return found


def row(section: str, side: str, seconds: list[float], error: float | None, over=None, **more) -> dict:
    found = {"section": section, "side": side, "seconds": list(harness.spread(seconds)), "relative_error": error}
    if over is not None:
        found["speedup"] = list(harness.spread(over))
    return found | more


def check(side: str, error: float, most: float) -> None:
    """SystemExit where a side's product is another one than the factors'."""
    if not error <= most:
        raise SystemExit(f"the product of {side} has a relative error of {error:.3g}, and {most:.3g} is the most")


def main(arguments: list[str] | None = None) -> None:
    options = harness.options(__doc__.split("\n")[0])
    options.add_argument("--rounds", type=int, metavar="N", help="turns of every side")
    args = options.parse_args(arguments)
    os.environ.setdefault("POSTTRAIN_LOG", "warning")
    from posttrain.tables import format_table

    rounds = args.rounds or (3 if args.quick else 7)
    width, blocks, model = (QUICK_WIDTH, 2, QUICK_MODEL) if args.quick else (WIDTH, BLOCKS, MODEL)
    rows = [*measure_refactor(width, rounds), *measure_adapter(width, rounds, blocks), *measure_merge(model, rounds)]
    targets = [] if args.quick else targets_of(rows)
    lines = [
        (
            f"{one['section']} {one['side']}",
            "{:.4g} [{:.4g}, {:.4g}]".format(*(1000 * value for value in one["seconds"])),
            "{:.3g} [{:.3g}, {:.3g}]".format(*one["speedup"]) if "speedup" in one else "",
            one.get("rank", RANK),
            "" if one["relative_error"] is None else f"{one['relative_error']:.2g}",
        )
        for one in rows
    ]
    print(format_table(("side", "ms", "speedup over full SVD", "rank", "relative error"), lines))
    for one in targets:
        print(f"{'met' if one['met'] else 'NOT MET':8}{one['target']}: {one['reached']:.3g} ({one['wanted']:g})")
    if args.json:
        content = {"command": harness.command(), "machine": harness.machine(), "rows": rows}
        harness.write_json(args.json, content | {"targets": targets})


if __name__ == "__main__":
    main()
