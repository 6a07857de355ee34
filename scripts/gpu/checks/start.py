"""Case 6: how far rounding alone moves equal weights apart, which the check at the start of a run must bear."""

import contextlib

from gpu.models import fused, padded, random_model, sizes
from gpu.record import Case, Skipped

# nats per token, over all tokens of a few micro-batches
_POOLED = 3e-2
_SMOLLM2 = "embedded:smollm2-135m"
# pairs in a policy's micro-batch, and in a batch of the pass before training
_PACKED, _PADDED = 8, 20


def run(record) -> None:
    import torch

    # a graph for each precision, of which case 4 says whether the library has room for them
    torch._dynamo.config.recompile_limit = 64
    names = ["random-0.5b"] if record.toy else ["random-0.5b", _SMOLLM2]
    attentions = record.pick(("sdpa", "flex_attention"), ("sdpa",))
    if record.toy:
        record.leave_out(_SMOLLM2, "toy sizes")
        record.leave_out("flex_attention", "its compilation takes longer than the rest at toy sizes")
        record.leave_out("TF32", "no CUDA device at toy sizes")
    for name in names:
        try:
            model = _load(record, name)
        except Skipped as reason:
            record.leave_out(name, reason)
            continue
        pairs = _short_pairs(record, model.config.vocab_size)
        for precision in record.pick(("fp32", "tf32", "bf16 autocast", "bf16"), ("fp32", "bf16 autocast", "bf16")):
            if precision == "bf16":
                model = model.to(torch.bfloat16)
            for attention in attentions:
                model.set_attn_implementation(attention)
                _measure(record, f"{name}, {precision}, {attention}", model, pairs, precision)


def _load(record, name: str):
    import torch
    from transformers import AutoModelForCausalLM

    from posttrain.errors import PosttrainError
    from posttrain.models import resolve_model

    if name.startswith("random"):
        return fused(random_model(record, name, torch.float32)).eval()
    try:
        folder = resolve_model(name)
    except PosttrainError as error:
        raise Skipped(error) from None
    return fused(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(record.device)).eval()


def _short_pairs(record, vocab_size: int):
    """Return batches of pairs whose answers have 2 to 60 tokens, in two layouts: those packed, those padded."""
    count, cut = record.pick(200, 40), record.pick(60, 24)
    drawn = sizes(count, 1)
    drawn = [(prompt, *(2 + answer % (cut - 1) for answer in answers)) for prompt, *answers in drawn]
    if record.toy:
        drawn = [(min(prompt, 20), *answers) for prompt, *answers in drawn]
    layouts = []
    for batch in (_PACKED, _PADDED):
        # one seed a pair, so that both layouts hold the same tokens
        parts = [drawn[at : at + batch] for at in range(0, count, batch)]
        layouts.append([_batch(part, at * batch, vocab_size, record.device) for at, part in enumerate(parts)])
    return layouts


def _batch(drawn, first: int, vocab_size: int, device) -> dict:
    """Return pairs as a padded batch, the tokens of each by its number; sides of a pair follow each other."""
    import torch

    singles = [padded([sizes], vocab_size, "cpu", first + at)[0] for at, sizes in enumerate(drawn)]
    width = max(single["input_ids"].size(1) for single in singles)
    fill = dict(input_ids=0, attention_mask=0, labels=-100)
    return {
        name: torch.cat(
            [torch.nn.functional.pad(one[name], (0, width - one[name].size(1)), value=fill[name]) for one in singles]
        ).to(device)
        for name in singles[0]
    }


def _sums(model, batches, is_packed: bool, context):
    """Return each sequence's sum of log-probs and its number of answer tokens."""
    import torch

    from posttrain.mechanisms.prefix_sharing import pack_padded

    sums, counts = [], []
    with torch.no_grad(), context():
        for batch in batches:
            packed = pack_padded(*batch.values(), multiple=8) if is_packed else None
            more = dict(packed=packed) if is_packed else {}
            found = model(**batch, use_cache=False, fused_lm_head=True, **more).log_probs
            sums.append(found.double().sum(1))
            counts.append((batch["labels"][:, 1:] != -100).sum(1))
    return torch.cat(sums), torch.cat(counts)


@contextlib.contextmanager
def _tf32():
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _measure(record, arm: str, model, layouts, precision: str) -> None:
    import torch

    from posttrain.run.reference import ZERO_MARGIN_TOLERANCE

    contexts = {"tf32": _tf32, "bf16 autocast": lambda: torch.autocast(record.device.type, torch.bfloat16)}
    context = contexts.get(precision, contextlib.nullcontext)
    (policy, counts), (reference, _) = (
        _sums(model, layout, is_packed, context) for layout, is_packed in zip(layouts, (True, False), strict=True)
    )
    gaps = (policy - reference).abs()
    a_token = gaps / counts
    half = precision != "fp32"
    limit = ZERO_MARGIN_TOLERANCE[torch.bfloat16 if half else torch.float32]
    parts = [2 * _PACKED * at for at in range(-(-len(gaps) // (2 * _PACKED)))]
    worst = [a_token[at : at + 2 * _PACKED].max().item() for at in parts]
    pooled = (gaps.sum() / counts.sum()).item()
    record.figure(
        arm,
        {
            "nats a token, largest of a sequence": max(worst),
            "nats a token, pooled": pooled,
            "micro-batches whose largest is above the limit": f"{sum(one > limit for one in worst)} of {len(worst)}",
        },
    )
    record.at_most(f"{arm}: nats a token, pooled", pooled, _POOLED if half else ZERO_MARGIN_TOLERANCE[torch.float32])
    with context():
        _self_check(record, arm, model, half)


def _self_check(record, arm: str, model, half: bool) -> None:
    from posttrain.mechanisms import prefix_sharing

    *gaps, trouble = prefix_sharing.compare_padded_and_packed(model, model.config, record.device)
    fault = trouble or prefix_sharing.mismatch_reason(*gaps, half)
    record.equal(f"{arm}: fault of the packed forward", fault, None)


CASE = Case(
    number=6,
    name="start",
    proves="rounding of short answers stays within what the check at the start of a run allows",
    seconds=45,
    toy_seconds=90,
    run=run,
)
