"""Case 1: masks of packed rows through every backend of torch's attention, against fp32."""

import contextlib
import itertools

from gpu.models import departure, free, milliseconds, packed_mask
from gpu.record import Case

# rows, width, heads, key-value heads, channels of a head
_SHAPES = (
    (2, 24, 14, 2, 64),
    (16, 840, 14, 2, 64),
    (16, 896, 14, 2, 64),
    (4, 2048, 12, 2, 128),
    (1, 4096, 32, 8, 128),
    (4, 8448, 32, 8, 128),
)
_TOY = ((2, 24, 4, 2, 16), (3, 40, 4, 2, 16))
_OUTPUT, _GRADIENT = 2e-2, 3e-2
# torch's operation of a backend, behind the common part of its name
_OPERATION = "aten::_scaled_dot_product_"


def backends(record) -> dict[str, object]:
    """Return what enters each backend, by name."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if record.toy:
        return {"default": contextlib.nullcontext, "math": lambda: sdpa_kernel([SDPBackend.MATH])}
    return {
        "default": contextlib.nullcontext,
        "cudnn": lambda: sdpa_kernel([SDPBackend.CUDNN_ATTENTION]),
        "efficient": lambda: sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION]),
    }


def attend(q, k, v, mask, implementation: str = "sdpa"):
    """Return attention as transformers computes it in a layer with grouped key-value heads, (R, W, H, d)."""
    from torch import nn
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    layer = nn.Module()
    layer.num_key_value_groups, layer.is_causal = q.size(1) // k.size(1), True
    scaling = q.size(-1) ** -0.5
    return ALL_ATTENTION_FUNCTIONS[implementation](layer, q, k, v, mask, scaling=scaling, dropout=0.0)[0]


def inputs(record, shape, dtype):
    """Return queries, keys, values and the gradient of the output, the same at every call."""
    import torch

    rows, width, heads, key_heads, channels = shape
    generator = torch.Generator(record.device).manual_seed(0)
    sizes = [(rows, n, width, channels) for n in (heads, key_heads, key_heads)] + [(rows, width, heads, channels)]
    made = [torch.randn(size, generator=generator, device=record.device, dtype=torch.float32) for size in sizes]
    # outputs then stay below 4, where bf16 rounds by 8e-3 at most
    made[2] *= 0.5
    return [tensor.to(dtype) for tensor in made]


def added(visible, dtype):
    import torch

    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, -torch.inf)


def exact(q, k, v, output_gradient, visible):
    """Return the output and the gradients of q, k and v in fp32, a group of heads of a row at a time."""
    import torch

    group = q.size(1) // k.size(1)
    output = torch.empty(output_gradient.shape, dtype=torch.float32, device=q.device)
    gradients = [torch.empty(tensor.shape, dtype=torch.float32, device=q.device) for tensor in (q, k, v)]
    for row, head in itertools.product(range(q.size(0)), range(k.size(1))):
        of_group = slice(head * group, (head + 1) * group)
        own = [part.float().requires_grad_() for part in (q[row, of_group], k[row, head], v[row, head])]
        scores = (own[0] @ own[1].mT) * q.size(-1) ** -0.5
        result = scores.masked_fill(~visible[row, 0], -torch.inf).softmax(-1) @ own[2]
        result.backward(output_gradient[row, :, of_group].transpose(0, 1).float())
        output[row, :, of_group] = result.detach().transpose(0, 1)
        for whole, part, place in zip(gradients, own, (of_group, head, head), strict=True):
            whole[row, place] = part.grad
    return output, gradients


def operations(call) -> set[str]:
    """Return the names of torch's attention operations that a call goes through."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    names = {event.key for event in found.key_averages()}
    return {name.removeprefix(_OPERATION) for name in names if name.startswith(_OPERATION) and "backward" not in name}


def run(record) -> None:
    import torch

    for shape in record.pick(_SHAPES, _TOY):
        named = "R{} W{} H{} KV{} d{}".format(*shape)
        packed = packed_mask(*shape[:2], record.device)
        visible = packed.visible()
        tensors = inputs(record, shape, torch.bfloat16)
        wanted = exact(*tensors, visible)
        for kind, (name, enter) in itertools.product(("bool", "added"), backends(record).items()):
            mask = visible if kind == "bool" else added(visible, torch.bfloat16)
            free(record.device)
            arm = f"{named}, {kind} mask, {name}"
            try:
                _measure(record, arm, tensors, mask, enter, wanted, is_default=name == "default")
            except RuntimeError as error:
                if name == "default":
                    raise
                record.leave_out(arm, error)


def _measure(record, arm, tensors, mask, enter, wanted, is_default: bool) -> None:
    import torch
    from torch.utils.checkpoint import checkpoint

    *own, output_gradient = tensors
    own = [tensor.detach().requires_grad_() for tensor in own]
    kept = {}

    def step(recomputed: bool = False):
        for tensor in own:
            tensor.grad = None
        with enter():
            output = checkpoint(attend, *own, mask, use_reentrant=False) if recomputed else attend(*own, mask)
            output.backward(output_gradient)
        kept["output"] = output.detach()

    def held(what: str):
        output, gradients = wanted
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in (kept["output"], *(t.grad for t in own)))
        record.equal(f"{what}: finite", finite, True)
        record.at_most(f"{what}: largest error of the output", (kept["output"] - output).abs().max().item(), _OUTPUT)
        worst = max(departure(tensor.grad, exact) for tensor, exact in zip(own, gradients, strict=True))
        record.at_most(f"{what}: error of the gradients", worst, _GRADIENT)

    times = milliseconds(record.device, step, record.pick(10, 2))
    figures = {"first ms": times[0], "last ms": times[-1]}
    if not record.toy:
        figures["peak MiB"] = torch.cuda.max_memory_allocated() / 2**20
    figures["operations"] = sorted(operations(step))
    record.figure(arm, figures)
    held(arm)
    if is_default:
        record.equal(f"{arm}: falls back to the plain form", "attention_math" in figures["operations"], False)
        step(recomputed=True)
        held(f"{arm}, recomputed")


CASE = Case(
    number=1,
    name="masks",
    proves="torch's attention takes the masks of packed rows: fp32's values and gradients, and no slow fallback",
    seconds=75,
    toy_seconds=60,
    run=run,
)
