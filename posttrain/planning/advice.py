"""What would make a run fit a card that it does not fit, by trying one setting after the other."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from posttrain.planning import memory
from posttrain.planning.job import Job, Launch

# Ways in which several changes are taken, each as far as it helps, until the run fits: with more cards what is learned
# stays, with an adapter fewer cards do.
_SPARING = ("checkpointing", "sleep", "reference", "batch", "share")
_WAYS = (
    (*_SPARING, "cards", *_SPARING, "optimizer", "length"),
    (*_SPARING, "adapter", *_SPARING, "quantised", *_SPARING, "length", "cards"),
)


def fixes(
    job: Job, launch: Launch, card: float, takes: Callable[[str], bool] = lambda kind: True
) -> list[tuple[str, float]]:
    """Return changes by which a run fits a card, each with the bytes that it then needs; the least change first.

    Single changes are tried first; where none does, several at once, with more cards or with an adapter. `takes`:
    whether the trainer takes its settings under a kind of launch.
    """
    tried = [(text, _need(other, spread, card)) for _, text, other, spread in _changes(job, launch, takes)]
    found = [(text, size) for text, size in tried if size <= card]
    if not found:
        found = [fix for way in _WAYS if (fix := _by_way(way, job, launch, card, takes))]
    return list(dict.fromkeys(found))


def _by_way(way: tuple[str, ...], job: Job, launch: Launch, card: float, takes) -> tuple[str, float] | None:
    """Return the changes of a way by which a run fits; None where it does not."""
    texts, needed = [], _need(job, launch, card)
    for kind in way:
        sized = [(_need(*made, card), text, *made) for own, text, *made in _changes(job, launch, takes) if own == kind]
        fitting = [entry for entry in sized if entry[0] <= card]
        # the mildest that fits, or else what saves most
        size, text, *made = fitting[0] if fitting else min(sized, key=lambda entry: entry[0], default=(needed, ""))
        if size < needed:
            needed, (job, launch) = size, made
            texts.append(text)
        if needed <= card:
            return ", and ".join(texts), needed
    return None


def _need(job: Job, launch: Launch, card: float) -> float:
    needed = memory.need(memory.phases(job, launch, card))
    # a share in which vLLM cannot hold a single row is none
    return needed if memory.rows_of_vllm(job, card) != 0 else max(needed, 1.001 * card)


def _changes(job: Job, launch: Launch, takes: Callable[[str], bool]) -> Iterator[tuple[str, str, Job, Launch]]:
    """Yield changes by kind, those that keep what is learned first, each with the run and the launch that it makes."""
    whole = job.shapes.adapter is None
    for share in (0.5, 0.7, 0.85):
        if job.vllm and job.sleeps and job.vllm < share:
            yield "share", f"vllm_gpu_memory_utilization: {share}", replace(job, vllm=share), launch
    if not job.checkpointing:
        yield "checkpointing", "gradient_checkpointing: true", replace(job, checkpointing=True), launch
    if job.vllm and not job.sleeps:
        yield "sleep", "vllm_enable_sleep_mode: true", replace(job, sleeps=True), launch
    if job.reference == "live" and job.own_reference and job.family == "preference":
        yield "reference", "precompute_ref_log_probs: true", replace(job, reference="precomputed"), launch
    unit = 2 if job.family == "preference" else 1
    for share in (2, 4, 8, 16):
        if job.rows // unit >= share and job.rows // unit % share == 0:
            accumulated = job.accumulation * share
            text = f"per_device_train_batch_size: {job.rows // unit // share}"
            # of steps that are drawn it follows
            text += "" if job.drawn else f", gradient_accumulation_steps: {accumulated}"
            yield "batch", text, replace(job, rows=job.rows // share, accumulation=accumulated), launch
    for share in (0.5, 0.3, 0.2):
        if job.vllm and job.vllm > share:
            yield "share", f"vllm_gpu_memory_utilization: {share}", replace(job, vllm=share), launch
    if whole and job.weight_bytes > 2 and launch.kind in ("single", "ddp"):
        text = "dtype: bfloat16 (weights and optimizer states are then rounded)"
        yield "optimizer", text, replace(job, weight_bytes=2.0), launch
    if whole and "8bit" not in job.optimizer and memory.state_bytes(job.optimizer, 4.0) > 2:
        yield "optimizer", "optim: adamw_bnb_8bit", replace(job, optimizer="adamw_bnb_8bit"), launch
    # no engine shards a quantised base
    if job.weight_bytes < 2:
        pass
    elif launch.kind in ("single", "ddp", "zero2"):
        for kind in ("zero2", "zero3"):
            if kind != launch.kind and takes(kind):
                cards = max(launch.processes, 8)
                spread = replace(launch, kind=kind, processes=cards)
                more = f" on {cards} cards" if cards > launch.processes else ""
                yield "cards", f"--launch {kind}{more}", job, spread
    elif launch.processes < 256:
        for times in (2, 4, 8):
            spread = replace(launch, processes=launch.processes * times, machines=launch.machines * times)
            yield "cards", f"{spread.processes} cards", job, spread
    if whole:
        shapes = job.shapes
        # rank 16 on all matrices, by their widths
        ranks = 7 * 16
        widths = 5 * shapes.hidden + shapes.query_width + shapes.inner
        outs = shapes.query_width + 2 * shapes.key_width + 2 * shapes.hidden + 2 * shapes.inner
        adapter = shapes.layers * 16 * (widths + outs)
        small = replace(shapes, adapter=adapter, adapted_inputs=widths, ranks=ranks)
        yield "adapter", "use_peft: true (another training)", replace(job, shapes=small, weight_bytes=2.0), launch
    elif job.weight_bytes > 1 and launch.kind in ("single", "ddp"):
        yield "quantised", "load_in_4bit: true", replace(job, weight_bytes=0.5625), launch
    for share in (2, 4):
        if job.length // share >= 128:
            name = "max_completion_length" if job.family == "policy_gradient" else "max_length"
            length = job.length // share
            yield "length", f"{name}: {length - job.prompt}", replace(job, length=length), launch
