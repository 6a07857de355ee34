"""Case 4: FlexAttention on packed rows: enough room to compile, and SDPA's numbers."""

import contextlib
import tempfile
import time
from pathlib import Path

from gpu.families import pair_trainer
from gpu.models import cosine, fused, milliseconds, padded, random_model, saved_model, sizes
from gpu.record import OF_RUNS, Case

_SHAPES, _COMPARED = 40, 6
_LOG_PROB, _COSINE = 2e-2, 0.999


def run(record) -> None:
    import torch

    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if record.toy:
        _forward_alone(record)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = saved_model(record, "random-0.5b", Path(folder) / "model")
        more = dict(
            peft=False, precompute_ref_log_probs=True, model_init_kwargs=dict(attn_implementation="flex_attention")
        )
        trainer = pair_trainer(record, folder, path, **more)
        record.equal("prefix sharing is used", trainer._sharing.active, True)
        _train_and_score(record, trainer)


def _forward_alone(record) -> None:
    """On a CPU: the block mask in a forward without gradient, not compiled, which would take a minute."""
    import torch

    from posttrain.mechanisms.prefix_sharing import pack_padded

    record.leave_out("gradients", "FlexAttention has none on CPUs")
    record.leave_out("compilation", "toy sizes")
    model = fused(random_model(record, "random-0.5b", torch.float32)).eval()
    batch, groups = padded(sizes(3, 0, 20), model.config.vocab_size, record.device)
    found = {}
    for attention in ("sdpa", "flex_attention"):
        model.set_attn_implementation(attention)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            found[attention] = _score(model, batch, pack_padded(*batch.values(), groups, multiple=8))
    gap = (found["flex_attention"] - found["sdpa"]).abs().max().item()
    record.at_most("largest difference from SDPA, nats", gap, _LOG_PROB)


def _score(model, batch, packed):
    return model(**batch, use_cache=False, fused_lm_head=True, packed=packed).log_probs


def _train_and_score(record, trainer) -> None:
    import torch
    from torch._dynamo.utils import counters

    model, sharing, device = trainer.model, trainer._sharing, record.device
    model.gradient_checkpointing_enable({"use_reentrant": False})
    begun = time.perf_counter()
    sharing.check(model)
    record.equal("prefix sharing is used after its own check", sharing.active, True)
    batches = []
    for at in range(_SHAPES):
        # few pairs and many, short ones and long ones
        drawn = sizes(1 + at % 16, at, None if at % 3 else 120)
        batches.append(padded(drawn, model.config.vocab_size, device, at))
    packed = [sharing.pack_rows(*batch.values(), groups) for batch, groups in batches]
    record.figure("shapes", len({tuple(form.input_ids.shape) for form in packed}))

    def forward(at, gradient: bool, training: bool):
        model.train(training)
        with torch.set_grad_enabled(gradient), trainer.accelerator.autocast():
            found = _score(model, batches[at][0], packed[at])
        if gradient:
            model.zero_grad(set_to_none=True)
            found.sum().backward()
        return found.detach().float()

    visits = {"reference": (False, True), "gradient": (True, True), "evaluation": (False, False)}
    try:
        for name, how in visits.items():
            with trainer.plain_forward() if name == "reference" else contextlib.nullcontext():
                times = [milliseconds(device, lambda at=at, how=how: forward(at, *how))[0] for at in range(_SHAPES)]
            record.figure(f"{name}: ms of first visits", dict(first=times[0], median=sorted(times)[_SHAPES // 2]))
    except Exception as error:
        if "recompile" not in f"{type(error).__name__} {error}".lower():
            raise
        record.failed("recompilation", f"{type(error).__name__}: {str(error)[:200]}", "no limit reached")
        return
    record.figure("compiled and run, s", time.perf_counter() - begun)
    record.figure("graphs", counters["stats"].get("unique_graphs"))
    record.equal("recompilation limit reached", False, False)
    _compare(record, model, forward)


def _compare(record, model, forward) -> None:
    found = {}
    for attention in ("flex_attention", "sdpa"):
        model.set_attn_implementation(attention)
        for at in range(_COMPARED):
            log_probs = forward(at, True, True)
            found[attention, at] = log_probs, [p.grad for p in model.parameters()]
    for at in range(_COMPARED):
        (ours, own), (theirs, others) = found["flex_attention", at], found["sdpa", at]
        scored = theirs != 0
        gap = (ours - theirs).abs()[scored].mean().item()
        record.at_most(f"batch {at}: mean difference from SDPA, nats", gap, _LOG_PROB)
        record.at_least(f"batch {at}: cosine of the gradients with SDPA's", cosine(own, others), _COSINE)


CASE = Case(
    number=4,
    name="flex",
    proves="FlexAttention has room to compile for the shapes of a run, and SDPA's log-probabilities and gradients",
    seconds=110,
    toy_seconds=90,
    run=run,
    imports=OF_RUNS,
)
