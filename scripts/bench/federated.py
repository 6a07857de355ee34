"""Time of a federated round's server at the shapes of Llama-3-8B, and the bytes that a round moves.

    OMP_NUM_THREADS=2 python scripts/bench/federated.py --json docs/evidence/federated_speed.json

Nothing is downloaded; factors are random. All sides run in one process and take turns; the first turn does not count.

Section `server`, of 224 layers, 8 clients and rank 16, computed in fp64: `check`, the replies looked at; `average`, of
B alone (FFA-LoRA); `first`, the average and the refactorisation of a round whose A is PEFT's own; `fedsvd`, that of
every later round, whose A is orthonormal already; `both`, the averages of A and B (FedAvg-LoRA). Section `naive`: the
product and its full SVD in fp32, of one layer of each of the two smallest shapes, and that times the number of such
layers, 128 of the 224: the larger ones, of which one takes minutes, would come on top. A refactorisation must leave
the average's product as it is, or the run ends with an error. Section `bytes`: what a client sends and is sent in a
round, of each method. Seconds of the processor stand beside those that passed, which other programs make longer.
"""

import math
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import harness
from bench.low_rank import check, factors, full_svd

RANK, CLIENTS = 16, 8
# (d_out, d_in) of a block's matrices by name: those of Llama-3-8B
MATRICES = {
    "q_proj": (4096, 4096),
    "k_proj": (1024, 4096),
    "v_proj": (1024, 4096),
    "o_proj": (4096, 4096),
    "gate_proj": (14336, 4096),
    "up_proj": (14336, 4096),
    "down_proj": (4096, 14336),
}
BLOCKS = 32
# of --quick: by how much widths are divided, and blocks
QUICK_DIVISOR, QUICK_BLOCKS = 16, 2
WANTED = {"seconds of a server's round in fp64, at most": 1.0}


def shapes_of(quick: bool) -> tuple[dict, int]:
    divisor = QUICK_DIVISOR if quick else 1
    return {name: (height // divisor, width // divisor) for name, (height, width) in MATRICES.items()}, (
        QUICK_BLOCKS if quick else BLOCKS
    )


def made(shapes: dict, blocks: int):
    """(what clients share, with PEFT's A and with an orthonormal one; each client's reply)."""
    import torch

    from posttrain.federated.methods import Shared
    from posttrain.federated.replies import Reply

    names = {f"model.layers.{block}.{name}": shape for block in range(blocks) for name, shape in shapes.items()}
    own, orthonormal, zeros = {}, {}, {}
    for place, (name, (height, width)) in enumerate(names.items()):
        own[name], zeros[name] = factors(RANK, height, width, seed=place)
        orthonormal[name] = torch.linalg.qr(own[name].double().T).Q.T.float().contiguous()
    replies = [
        Reply(
            f"c{client}",
            100 + client,
            {
                name: factors(RANK, *shape, seed=1000 * client + place)[1]
                for place, (name, shape) in enumerate(names.items())
            },
            own,
            {"loss": 1.0},
        )
        for client in range(CLIENTS)
    ]
    return Shared(own, zeros, {}), Shared(orthonormal, zeros, {}), replies


def measure_server(shapes: dict, blocks: int, rounds: int) -> list[dict]:
    """A row for each side of the server's round."""
    import dataclasses

    from posttrain.federated import methods, replies
    from posttrain.federated.config import FederatedConfig

    own, orthonormal, given = made(shapes, blocks)
    b_alone = [dataclasses.replace(reply, A={}) for reply in given]
    rows, B = {one.client: one.rows for one in given}, {one.client: one.B for one in given}
    A = {one.client: one.A for one in given}
    settings = {name: FederatedConfig(method=name, num_clients=CLIENTS) for name in methods.METHODS}

    def step(method, shared, sent=None):
        return lambda: methods.step(shared, sent or {}, B, rows, settings[method], 1)

    calls = {
        "check": lambda: replies.check(b_alone, rows, own, settings["fedsvd"], 1),
        "average": step("ffa_lora", own),
        "first": step("fedsvd", own),
        "fedsvd": step("fedsvd", orthonormal),
        "both": step("fedavg_lora", own, A),
    }
    found = []
    for name, (seconds, of_cpu) in turns(calls, rounds).items():
        error = None
        if name in ("first", "fedsvd"):
            error = _error(calls[name](), step("ffa_lora", own if name == "first" else orthonormal)())
            check(name, error, 1e-5)
        found.append(row("server", name, seconds, of_cpu) | {"relative_error": error})
    return found


def turns(calls: dict, rounds: int) -> dict[str, tuple[list, list]]:
    """Seconds of each side by turns, those that passed and those of the processor; the first turn does not count."""
    found = {name: ([], []) for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            begun, of_cpu = time.perf_counter(), time.process_time()
            call()
            if number:
                found[name][0].append(time.perf_counter() - begun)
                found[name][1].append(time.process_time() - of_cpu)
    return found


def row(section: str, side: str, seconds: list[float], of_cpu: list[float]) -> dict:
    spreads = {"seconds": list(harness.spread(seconds)), "cpu_seconds": list(harness.spread(of_cpu))}
    return {"section": section, "side": side} | spreads


def _error(shared, expected) -> float:
    """The largest relative error of a product of the first block's layers."""
    import torch

    names = [name for name in shared.B if name.startswith("model.layers.0.")]
    gaps = []
    for name in names:
        product = expected.product(name)
        gaps.append((torch.linalg.norm(shared.product(name) - product) / torch.linalg.norm(product)).item())
    return max(gaps)


def measure_naive(shapes: dict, blocks: int) -> list[dict]:
    """A row for the SVD of the full product of one layer of each of the two smallest shapes, and of all such layers."""
    found, whole, of_cpu, count = [], 0.0, 0.0, 0
    for shape in sorted(set(shapes.values()), key=math.prod)[:2]:
        A, B = factors(RANK, *shape)
        ((seconds, own),) = turns({"svd": lambda A=A, B=B: full_svd(A, B)}, 1).values()
        layers = blocks * list(shapes.values()).count(shape)
        whole, of_cpu, count = whole + seconds[0] * layers, of_cpu + own[0] * layers, count + layers
        found.append(row("naive", "x".join(map(str, shape)), seconds, own) | {"layers": layers})
    return [*found, row("naive", "all layers of these shapes", [whole], [of_cpu]) | {"layers": count}]


def bytes_of(shapes: dict, blocks: int) -> list[dict]:
    """What a client sends and is sent in a round by each method, in fp32; of those that move the base, in round two."""
    a, b = (4 * RANK * blocks * sum(shape[side] for shape in shapes.values()) for side in (1, 0))
    found = []
    from posttrain.federated.methods import METHODS

    for name, method in METHODS.items():
        down = a + b
        if method.moves_base:
            # the factors of what the clients' products came to in round one
            times = CLIENTS if name == "flora" else CLIENTS + 1
            down += times * (a + b)
        found.append({"section": "bytes", "side": name, "up": a + b if method.trains_a else b, "down": down})
    return found


def targets_of(rows: list[dict]) -> list[dict]:
    """What is wanted of a round, looked at and refactored, and reached."""
    reached = sum(
        one["seconds"][0] for one in rows if one["section"] == "server" and one["side"] in ("check", "fedsvd")
    )
    return [
        {"target": name, "wanted": wanted, "reached": reached, "met": reached <= wanted}
        for name, wanted in WANTED.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    options = harness.options(__doc__.split("\n")[0])
    options.add_argument("--rounds", type=int, metavar="N", help="turns of every side")
    args = options.parse_args(arguments)
    os.environ.setdefault("POSTTRAIN_LOG", "warning")
    from posttrain.tables import format_table

    shapes, blocks = shapes_of(args.quick)
    rows = measure_server(shapes, blocks, args.rounds or (3 if args.quick else 7))
    targets = [] if args.quick else targets_of(rows)
    rows += measure_naive(shapes, blocks) + bytes_of(shapes, blocks)
    timed = [one for one in rows if "seconds" in one]
    lines = [
        (
            f"{one['section']} {one['side']}",
            *("{:.4g} [{:.4g}, {:.4g}]".format(*one[name]) for name in ("seconds", "cpu_seconds")),
            one.get("layers", ""),
        )
        for one in timed
    ]
    print(format_table(("side", "seconds", "of the processor", "layers"), lines))
    sizes = [(one["side"], f"{one['up'] / 1e6:.1f}", f"{one['down'] / 1e6:.1f}") for one in rows if "up" in one]
    print(format_table(("method", "MB up", "MB down"), sizes))
    for one in targets:
        print(f"{'met' if one['met'] else 'NOT MET':8}{one['target']}: {one['reached']:.3g} ({one['wanted']:g})")
    if args.json:
        content = {"command": harness.command(), "machine": harness.machine(), "rows": rows}
        harness.write_json(args.json, content | {"targets": targets})


if __name__ == "__main__":
    main()
