"""Memory of a card by part and phase, from shapes and settings.

A phase's parts are those of the moment in which it takes most: its gradients may be the head's alone, where all of them
are there only once activations are gone. A run needs its largest phase. Rows count at their full length, so that a
batch of the longest rows still fits. Measured against peaks of runs on CPUs, where the sum is within 15%
(`tests/planning/test_measured.py`); what only cards have is marked as an estimate.
"""

from dataclasses import replace

from posttrain.planning import activations
from posttrain.planning.job import ENGINES, Job, Launch

# Estimates: what a process has on a card before the first tensor, with NCCL, and what an allocator cannot use.
CONTEXT, NCCL, SLACK = 0.8e9, 1.0e9, 0.05
# vLLM keeps so much of a card while it sleeps: its own context and graphs. An estimate.
ASLEEP = 1.5e9
# DeepSpeed's defaults, in numbers
_BUCKET, _MOST_LIVE = 5e8, 1.05e9
# of the fused head: scored tokens and words of the vocabulary at a time
_TILE, _WORDS = 4096, 32768
# tiles of fp32 beside the first where torch and no kernel computes the head's gradient
_TILES_OF_TORCH = 8
# prompts of a batch that a value head learns from, and training passes' copies of their states
_VALUE_BATCH, _VALUE_COPIES = 32, 6

# Numbers that an optimizer keeps of each parameter, by the beginning of its name; of AdamW's size where unknown.
_STATES = {"sgd": 0, "lion": 1, "paged_lion": 1, "ademamix": 3, "paged_ademamix": 3, "adafactor": 0, "adagrad": 1,
           "rmsprop": 1, "galore": 1, "apollo": 1, "lomo": 0, "adalomo": 0, "muon": 1}  # fmt: skip
_OF_TORCH = ("sgd", "adamw_torch", "adagrad", "rmsprop", "adafactor", "lion")


def state_bytes(optimizer: str, parameter_bytes: float) -> float:
    """Return the bytes that an optimizer keeps of each parameter, which itself has so many."""
    # of torch.optim:NAME and the like the name
    name = optimizer.lower().rpartition(":")[2]
    count = next((held for start, held in _STATES.items() if name.startswith(start)), 2)
    if "4bit" in name:
        return 0.53 * count
    if "8bit" in name or name == "adamw_torch_8bit":
        # one scale for each block of numbers
        return 1.02 * count
    # bitsandbytes keeps fp32 whatever the parameters are
    return count * (4.0 if "32bit" in name or "bnb" in name or "paged" in name else parameter_bytes)


def phases(job: Job, launch: Launch, card: float | None = None) -> dict[str, dict[str, float]]:
    """Return the bytes a card by part, of each phase of a run.

    Args:
        job: the run. launch: how it is spread.
        card: bytes that a card has, of which vLLM takes a share; None where there is no card, or vLLM has its own.
    """
    kept = _resident(job, launch)
    vllm = job.vllm * card if job.vllm is not None and card else 0.0
    training = kept | _moving(job, launch)
    if vllm:
        training["vLLM"] = ASLEEP if job.sleeps else vllm
    found = {"training": training}
    if job.answers:
        found["generation"] = kept | ({"vLLM": vllm} if job.vllm is not None else _generating(job, launch))
    if job.reference == "precomputed":
        found["reference pass"] = _scoring(job, launch)
    if job.value_prompts:
        found["value head"] = {"weights": kept["weights"]} | _value_head(job)
    found = {name: {part: size for part, size in parts.items() if size} for name, parts in found.items()}
    for parts in found.values():
        if not job.on_cpu:
            parts["context and allocator"] = (
                CONTEXT + NCCL * (launch.processes > 1) + SLACK * (sum(parts.values()) - parts.get("vLLM", 0.0))
            )
    return found


def need(found: dict[str, dict[str, float]]) -> float:
    """Return the bytes of the largest phase."""
    return max(sum(parts.values()) for parts in found.values())


def _weight_bytes(job: Job, launch: Launch) -> float:
    """Return the bytes of a weight of the base while it trains."""
    if launch.kind in ENGINES and launch.mixed:
        return min(job.weight_bytes, 2.0)
    if launch.kind == "fsdp2" and launch.mixed and job.shapes.adapter is None:
        # accelerate makes fp32 of what trains
        return 4.0
    return job.weight_bytes


def trained_bytes(job: Job, launch: Launch) -> float:
    """Return the bytes of a number that trains: an adapter's are fp32 outside of engines."""
    if launch.kind in ENGINES and launch.mixed:
        return 2.0
    return 4.0 if job.shapes.adapter is not None else _weight_bytes(job, launch)


def _gradient_bytes(job: Job, launch: Launch) -> float:
    """Return the bytes of a gradient between micro-batches: engines here add them up in fp32."""
    return 4.0 if launch.kind in ENGINES else trained_bytes(job, launch)


def _resident(job: Job, launch: Launch) -> dict[str, float]:
    """Return what stays on a card from step to step."""
    shapes, weight = job.shapes, _weight_bytes(job, launch)
    trained, trainable = trained_bytes(job, launch), job.trainable
    # quantisation leaves embeddings in half precision
    coarse = min(weight, 2.0) if weight >= 2 else weight
    base = shapes.linears * (weight if weight >= 2 else coarse)
    base += (shapes.parameters - shapes.linears) * max(weight, 2.0)
    parts = {"weights": 0.0 if launch.offloads_weights else base / launch.weight_shards}
    if shapes.adapter is not None:
        parts["adapter"] = shapes.adapter * trained / launch.weight_shards
    engine = launch.kind in ENGINES and launch.mixed
    states = 0.0 if launch.offloads_states else trainable / launch.state_shards
    # engines keep fp32 of everything that trains, and states of that
    parts["optimizer states"] = states * state_bytes(job.optimizer, 4.0 if engine else trained)
    parts["fp32 masters"] = states * 4.0 if engine else 0.0
    if job.reference == "live" and job.own_reference:
        # of ZeRO-2 and DDP each card holds it whole
        shards = launch.processes if launch.kind in ("zero3", "fsdp2") else 1
        parts["reference model"] = shapes.parameters * job.weight_bytes / shards
    return parts


def _moving(job: Job, launch: Launch) -> dict[str, float]:
    """Return what comes and goes within a step, at the moment of the step that takes most."""
    shapes, trained = job.shapes, trained_bytes(job, launch)
    gradients = job.trainable * _gradient_bytes(job, launch) / launch.state_shards
    if job.drawn:
        # of each row apart, and their sum so far
        gradients += 4.0 * job.trainable * (job.rows + 1)
    stored, head = activations.stored(job, launch), _head(job, launch)
    # all gradients are there while a later micro-batch has its activations
    before = gradients if launch.kind in ENGINES or job.accumulation > 1 else 0.0
    of_head = shapes.head * _gradient_bytes(job, launch) / launch.state_shards if shapes.adapter is None else 0.0
    # the gradient of a whole embedding is made beside what was there before
    second = shapes.embedding * trained / launch.weight_shards if shapes.adapter is None else 0.0
    moments = (
        {"gradients": before, "activations": stored, "head": head},
        {"gradients": before or of_head, "activations": stored + activations.in_backward(job, launch)},
        {"gradients": gradients + second},
    )
    parts = {"gathered weights": gathered(job, launch), "buffers of the engine": _buffers(job, launch)}
    parts["half copies of weights"] = _casts(job, launch)
    return parts | max(moments, key=lambda moment: sum(moment.values()))


def _casts(job: Job, launch: Launch) -> float:
    """Return the bytes of the bf16 copies that autocast makes of fp32 matrices."""
    if not launch.mixed or launch.kind not in ("single", "ddp") or job.weight_bytes <= 2:
        return 0.0
    # it keeps those of matrices that train through a forward, and a backward needs those that it went through
    whole = job.shapes.adapter is None or not job.checkpointing
    return 2.0 * (job.shapes.linears if whole else job.shapes.layer)


def rows_of_vllm(job: Job, card: float) -> int | None:
    """Return how many whole rows vLLM can hold at a time in its share of a card; None where it has none.

    Beside keys and values it has the whole model in half precision, and graphs of about a gigabyte and a half.
    """
    if not job.vllm:
        return None
    shapes = job.shapes
    free = job.vllm * card - 2.0 * shapes.parameters - ASLEEP
    return max(int(free / (job.length * 4.0 * shapes.key_width * shapes.layers)), 0)


def _buffers(job: Job, launch: Launch) -> float:
    if launch.kind == "ddp" and launch.processes > 1:
        # buckets are copies of the gradients
        return job.trainable * trained_bytes(job, launch)
    if launch.kind in ENGINES:
        return 2.0 * _BUCKET
    return 0.0


def gathered(job: Job, launch: Launch) -> float:
    """Return the bytes of whole weights that a card holds for a moment: layers, and the head."""
    shapes, half = job.shapes, 2.0 if launch.mixed else 4.0
    if launch.weight_shards == 1 and not launch.offloads_weights:
        return 0.0
    # one layer that is in use, one that comes
    least = (2 * shapes.layer + shapes.head) * half
    if launch.kind == "zero3":
        # what is soon in use again stays
        return max(least, min(shapes.parameters, _MOST_LIVE) * half)
    return least


def _head(job: Job, launch: Launch, gradient: bool = True) -> float:
    shapes, half = job.shapes, activations.compute_bytes(job, launch)
    rows, words = min(job.scored, _TILE), min(_WORDS, shapes.vocab)
    found = rows * _WORDS * half + job.scored * shapes.hidden * half
    if job.on_cpu:
        # of the buffer only what is written becomes memory, and torch makes tiles beside it
        found += rows * words * 4.0 * (1 + (_TILES_OF_TORCH if gradient else 3)) - rows * _WORDS * half
    if gradient:
        found += job.scored * shapes.hidden * 4.0
        if shapes.adapter is None:
            # its gradient is summed in fp32 and then handed on in the weights' own type
            found += shapes.head * (4.0 + (trained_bytes(job, launch) if trained_bytes(job, launch) < 4 else 0.0))
    return found


def _generating(job: Job, launch: Launch) -> dict[str, float]:
    shapes, half = job.shapes, activations.compute_bytes(job, launch)
    cache = job.answers * job.length * 2 * shapes.key_width * shapes.layers * half
    return {"cache of keys and values": cache, "head": job.answers * shapes.vocab * (half + 8.0)}


def _scoring(job: Job, launch: Launch) -> dict[str, float]:
    """Return what a pass of the reference before training takes: no optimizer is there yet."""
    shapes, kept = job.shapes, _resident(job, launch)
    job = replace(job, rows=job.scoring_rows or job.rows)
    parts = {"weights": kept["weights"], "adapter": kept.get("adapter", 0.0)}
    if launch.kind in ENGINES and job.own_reference:
        parts["reference model"] = shapes.parameters * min(job.weight_bytes, 2.0) / launch.weight_shards
    elif job.own_reference:
        parts["reference model"] = shapes.parameters * job.weight_bytes / launch.weight_shards
    parts["gathered weights"] = gathered(job, launch)
    parts["activations"] = activations.without_gradient(job, launch)
    parts["head"] = _head(job, launch, gradient=False)
    return parts


def _value_head(job: Job) -> dict[str, float]:
    # query, key, value and output matrices with gradients and AdamW's states in fp32
    hidden = job.shapes.hidden
    states = min(job.value_prompts, _VALUE_BATCH) * job.length * hidden
    return {"value head": 4 * hidden**2 * 16.0, "states of prompts": states * 4.0 * _VALUE_COPIES}
