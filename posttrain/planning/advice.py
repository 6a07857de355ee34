"""What would make a run fit a card that it does not fit, by trying one setting after the other."""

from collections.abc import Iterator
from dataclasses import replace

from posttrain.planning import memory
from posttrain.planning.job import Job, Launch


def fixes(job: Job, launch: Launch, card: float) -> list[tuple[str, float]]:
    """Return changes by which a run fits a card, each with the bytes that it then needs; the least change first.

    Single changes are tried first; where none does, what goes with them: all memory-saving ones at once.
    """
    tried = [(text, *changed) for text, *changed in _changes(job, launch)]
    fitting = [(text, _need(other, spread, card)) for text, other, spread in tried]
    fitting = [(text, size) for text, size in fitting if size <= card]
    if fitting:
        return fitting
    texts, best, spread = [], job, launch
    while True:
        sized = [(_need(*changed, card), text, *changed) for text, *changed in _changes(best, spread)]
        sized = [entry for entry in sized if entry[0] < _need(best, spread, card)]
        if not sized or len(texts) == 8:
            return []
        size, text, best, spread = min(sized, key=lambda entry: entry[0])
        texts.append(text)
        if size <= card:
            return [(", and ".join(texts), size)]


def _need(job: Job, launch: Launch, card: float) -> float:
    needed = memory.need(memory.phases(job, launch, card))
    # a share in which vLLM cannot hold a single row is none
    return needed if memory.rows_of_vllm(job, card) != 0 else max(needed, 1.001 * card)


def _changes(job: Job, launch: Launch) -> Iterator[tuple[str, Job, Launch]]:
    """Yield changes that keep what is learned first, each with the run and the launch that it makes."""
    whole = job.shapes.adapter is None
    for share in (0.5, 0.7, 0.85):
        if job.vllm and job.sleeps and job.vllm < share:
            yield f"vllm_gpu_memory_utilization: {share}", replace(job, vllm=share), launch
    if not job.checkpointing:
        yield "gradient_checkpointing: true", replace(job, checkpointing=True), launch
    if job.vllm and not job.sleeps:
        yield "vllm_enable_sleep_mode: true", replace(job, sleeps=True), launch
    if job.reference == "live" and job.own_reference and job.family == "preference":
        yield "precompute_ref_log_probs: true", replace(job, reference="precomputed"), launch
    unit = 2 if job.family == "preference" else 1
    for share in (2, 4, 8, 16):
        if job.rows // unit >= share and job.rows // unit % share == 0:
            accumulated = job.accumulation * share
            text = f"per_device_train_batch_size: {job.rows // unit // share}, "
            text += f"gradient_accumulation_steps: {accumulated}"
            yield text, replace(job, rows=job.rows // share, accumulation=accumulated), launch
    for share in (0.5, 0.3, 0.2):
        if job.vllm and job.vllm > share:
            yield f"vllm_gpu_memory_utilization: {share}", replace(job, vllm=share), launch
    if whole and job.weight_bytes > 2 and launch.kind in ("single", "ddp"):
        yield "dtype: bfloat16 (weights and optimizer states are then rounded)", replace(job, weight_bytes=2.0), launch
    if whole and "8bit" not in job.optimizer and memory.state_bytes(job.optimizer, 4.0) > 2:
        yield "optim: adamw_bnb_8bit", replace(job, optimizer="adamw_bnb_8bit"), launch
    if launch.kind in ("single", "ddp", "zero2"):
        for kind in ("zero2", "zero3"):
            if kind != launch.kind:
                cards = max(launch.processes, 8)
                spread = replace(launch, kind=kind, processes=cards)
                more = f" on {cards} cards" if cards > launch.processes else ""
                yield f"--launch {kind}{more}", job, spread
    elif launch.processes < 256:
        for times in (2, 4, 8):
            spread = replace(launch, processes=launch.processes * times, machines=launch.machines * times)
            yield f"{spread.processes} cards", job, spread
    if whole:
        shapes = job.shapes
        # rank 16 on all matrices, by their widths
        ranks = 7 * 16
        widths = 5 * shapes.hidden + shapes.query_width + shapes.inner
        outs = shapes.query_width + 2 * shapes.key_width + 2 * shapes.hidden + 2 * shapes.inner
        adapter = shapes.layers * 16 * (widths + outs)
        small = replace(shapes, adapter=adapter, adapted_inputs=widths, ranks=ranks)
        yield "use_peft: true (another training)", replace(job, shapes=small, weight_bytes=2.0), launch
    elif job.weight_bytes > 1 and launch.kind in ("single", "ddp"):
        yield "load_in_4bit: true", replace(job, weight_bytes=0.5625), launch
    for share in (2, 4):
        if job.length // share >= 128:
            name = "max_completion_length" if job.family == "policy_gradient" else "max_length"
            length = job.length // share
            yield f"{name}: {length - job.prompt}", replace(job, length=length), launch
