"""Case 3: what an attended position costs beside a token's linear layers: the setting `attention_cost_factor`."""

import math
import statistics

from gpu.checks.masks import added, attend, backends, inputs
from gpu.models import config_of, free, milliseconds, packed_mask
from gpu.record import Case

_SHAPES = {
    "0.5b": dict(name="random-0.5b"),
    "8b": dict(name="random-1.5b", hidden_size=4096, intermediate_size=14336, num_attention_heads=32)
    | dict(num_key_value_heads=8, head_dim=128),
}
# seconds that a compilation may need
_LEAST = 15.0
_TOKENS, _WIDTHS = 8192, (512, 1024, 2048, 4096, 8192)


def run(record) -> None:
    import torch

    from posttrain.mechanisms.prefix_sharing import attention_cost

    # a graph for each width, of which case 4 says whether the library has room for them
    torch._dynamo.config.recompile_limit = 64
    for name, shape in record.pick(_SHAPES, {"tiny": dict(name="tiny")}).items():
        shape = dict(shape)
        config = config_of(shape.pop("name"), **shape)
        tokens = record.pick(_TOKENS, 128)
        linear = _linear(record, config, tokens) / tokens
        record.figure(f"{name}: linear layers, ns a token", 1e6 * linear)
        factors = {}
        for width in record.pick(_WIDTHS, (32, 64)):
            for arm, ms in _attention(record, config, tokens // width, width).items():
                factor = ms / tokens / (linear * width * attention_cost(config))
                factors.setdefault(arm, {})[width] = factor
        for arm, by_width in factors.items():
            record.figure(f"{name}: attention_cost_factor as measured by width, {arm}", by_width)
            # narrow rows are launches more than attention
            middle = statistics.median([*by_width.values()][-3:])
            record.equal(f"{name}: {arm} costs something", math.isfinite(middle) and middle > 0, True)
            record.figure(f"{name}: attention_cost_factor, {arm}", middle)


def _linear(record, config, tokens: int) -> float:
    """Return the milliseconds of a layer's linear maps, forward and backward."""
    import torch

    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    outputs = [config.num_attention_heads * head] + [config.num_key_value_heads * head] * 2 + [inner] * 2
    shapes = [(hidden, out) for out in outputs] + [(config.num_attention_heads * head, hidden), (inner, hidden)]
    made = dict(dtype=torch.bfloat16, device=record.device, requires_grad=True)
    pairs = [(torch.randn(tokens, given, **made), torch.randn(out, given, **made)) for given, out in shapes]

    def step():
        for states, weight in pairs:
            output = torch.nn.functional.linear(states, weight)
            output.backward(torch.ones_like(output))

    return statistics.median(milliseconds(record.device, step, record.pick(6, 2))[1:])


def _attention(record, config, rows: int, width: int) -> dict[str, float]:
    """Return the milliseconds of packed attention by backend, forward and backward."""
    import torch

    shape = (rows, width, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    *own, output_gradient = inputs(record, shape, torch.bfloat16)
    own = [tensor.requires_grad_() for tensor in own]
    packed = packed_mask(rows, width, record.device)
    mask, found = added(packed.visible(), torch.bfloat16), {}
    arms = {name: (enter, "sdpa", mask) for name, enter in backends(record).items()}
    if record.toy:
        record.leave_out("flex", "FlexAttention has no backward on CPUs")
    elif record.left < _LEAST:
        record.leave_out(f"flex, width {width}", "no time left to compile")
    else:
        block_mask = packed.attention_mask("flex_attention", torch.bfloat16)
        arms["flex"] = (backends(record)["default"], "flex_attention", block_mask)
    for arm, (enter, implementation, given) in arms.items():

        def step(enter=enter, implementation=implementation, given=given):
            with enter():
                attend(*own, given, implementation).backward(output_gradient)

        free(record.device)
        try:
            found[arm] = statistics.median(milliseconds(record.device, step, record.pick(5, 2))[1:])
        except RuntimeError as error:
            record.leave_out(f"{arm}, width {width}", error)
    return found


CASE = Case(
    number=3,
    name="costs",
    proves="the factor by which an attended position costs more than its multiplications (a figure, no pass mark)",
    seconds=50,
    toy_seconds=60,
    run=run,
)
