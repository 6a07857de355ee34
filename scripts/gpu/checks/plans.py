"""Case 2: what a new shape costs, as plans of kernels are made for each."""

import contextlib
import tempfile

from gpu.models import fused, milliseconds, padded, random_model, sizes
from gpu.record import OF_RUNS, Case

_MULTIPLES = (128, 64, 8)
_RATIO = 1.3


def run(record) -> None:
    import torch

    model = fused(random_model(record, "random-0.5b", record.pick(torch.bfloat16, torch.float32))).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    count, pairs = record.pick(60, 4), record.pick(16, 3)
    drawn = sizes(count * pairs, 0, record.pick(None, 40))
    vocab_size = model.config.vocab_size
    batches = [padded(drawn[at * pairs : (at + 1) * pairs], vocab_size, record.device, at)[0] for at in range(count)]
    # kernels that no shape has a part in: those of a small batch
    _visit(record, model, [_packed(batches[0], model, 1)])
    # of the library's own widths first: later ones may meet shapes that have a plan by then
    own = _as_the_library_packs(record, batches)
    first, second = _arm(record, model, "the library's widths", own)
    record.at_most("first visits over second visits, the library's widths", first / second, _RATIO, clock=True)
    for multiple in record.pick(_MULTIPLES, (8,)):
        packed = [_packed(batch, model, multiple) for batch in batches]
        _arm(record, model, f"multiples of {multiple}", packed)
    if record.toy:
        record.leave_out("without cuDNN", "no CUDA device at toy sizes")
        return
    with _without_cudnn():
        packed = [_packed(batch, model, 128) for batch in batches]
        _arm(record, model, "multiples of 128, without cuDNN", packed)


@contextlib.contextmanager
def _without_cudnn():
    import torch

    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def _packed(batch, model, multiple: int):
    from posttrain.mechanisms import prefix_sharing

    cost = prefix_sharing.attention_cost(model.config)
    return batch, prefix_sharing.pack_padded(*batch.values(), attention_cost=cost, multiple=multiple)


def _as_the_library_packs(record, batches) -> list:
    """Pack as a trainer does on this device."""
    from gpu.families import pair_trainer

    with tempfile.TemporaryDirectory() as folder:
        sharing = pair_trainer(record, folder)._sharing
    return [(batch, sharing.pack_rows(*batch.values())) for batch in batches]


def _arm(record, model, name: str, batches) -> tuple[float, float]:
    """Go through the batches twice; return the mean milliseconds of the first and of the second visit."""
    shapes = [tuple(packed.input_ids.shape) for _, packed in batches]
    seen = _arm.__dict__.setdefault("seen", set())
    new = [shape not in seen and shape not in shapes[:at] for at, shape in enumerate(shapes)]
    visits = [_visit(record, model, batches) for _ in range(2)]
    seen.update(shapes)
    extra = [a - b for a, b, is_new in zip(*visits, new, strict=True) if is_new]
    tokens, wanted = (sum(numbers) for numbers in zip(*((p.tokens, p.forwarded) for _, p in batches), strict=True))
    means = [sum(visit) / len(visit) for visit in visits]
    figures = dict(zip(("first visit ms", "second visit ms"), means, strict=True))
    figures |= {"new shapes": sum(new), "of batches": len(batches), "padding share": 1 - tokens / wanted}
    record.figure(name, figures | {"ms a new shape": sum(extra) / len(extra) if extra else None})
    return means[0], means[1]


def _visit(record, model, batches) -> list[float]:
    found = []
    for batch, packed in batches:
        # masks are built in each micro-batch of a run
        packed._masks.clear()

        def step(batch=batch, packed=packed):
            model(**batch, use_cache=False, fused_lm_head=True, packed=packed).log_probs.sum().backward()
            model.zero_grad(set_to_none=True)

        found += milliseconds(record.device, step)
    return found


CASE = Case(
    number=2,
    name="plans",
    proves="a micro-batch of a new shape costs little more than one of a known shape, at the library's widths",
    seconds=85,
    toy_seconds=60,
    run=run,
    imports=OF_RUNS,
)
