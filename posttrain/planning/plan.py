"""A plan of a run: its memory, steps, tokens and hours on cards that need not be here, as facts and as text."""

import functools
import math
from collections.abc import Callable
from dataclasses import replace

from posttrain import tables
from posttrain.errors import ConfigError
from posttrain.planning import advice, hours, memory
from posttrain.planning.cards import GB, Card
from posttrain.planning.job import Job, Launch

_UNITS = {"preference": "pairs", "policy_gradient": "prompts", "offline": "answers", "instructions": "rows"}
_SHOWN_FIXES = 6


def facts(
    job: Job,
    launch: Launch,
    card: Card,
    args,
    rows: int | None = None,
    tokens: int | None = None,
    takes: Callable[[str], bool] = lambda kind: True,
) -> dict:
    """Return what a run takes, by name.

    Args:
        args: the trainer's config, for its steps.
        rows: pairs, prompts, answers or rows of the data set; None where not known.
        tokens: of a row on average, of both answers of a pair each; None for the longest.
        takes: whether the trainer takes these settings under a kind of launch; others are not proposed.

    Returns:
        plain values: bytes, tokens, hours; `steps`, `tokens` and `hours` are None where the rows or the card's rates
        are not known.
    """
    found = memory.phases(job, launch, card.memory)
    needed, steps = memory.need(found), steps_of(job, launch, args, rows)
    mean = min(tokens or job.length, job.length)
    spent = hours.estimate(job, launch, card, steps, mean) if steps else None
    a_step = (job.drawn or job.rows * job.accumulation * launch.processes) * mean
    at_a_time = memory.rows_of_vllm(job, card.memory)
    fits = needed <= card.memory and at_a_time != 0
    longest = job.shapes.positions
    return {
        "gpu": card.name,
        "gpu_bytes": card.memory,
        "launch": launch.kind,
        "gpus": launch.processes,
        "nodes": launch.machines,
        "parameters": job.shapes.parameters,
        "trainable_parameters": job.trainable,
        "row_tokens": job.length,
        "beyond_positions": longest if longest is not None and job.length > longest else None,
        "bytes": found,
        "needed_bytes": needed,
        "fits": fits,
        "fixes": [] if fits else [{"change": text, "bytes": size} for text, size in _fixes(job, launch, card, takes)],
        "vllm_rows_at_a_time": at_a_time,
        "steps": steps,
        "tokens_per_step": round(a_step),
        "tokens": None if steps is None else round(a_step * steps),
        "hours": None if spent is None else list(spent.total),
        "hours_of_generation": None if spent is None or not job.answers else list(spent.generation),
        "utilisation": list(hours.UTILISATION),
    }


def _fixes(job: Job, launch: Launch, card: Card, takes: Callable[[str], bool]) -> list[tuple[str, float]]:
    return advice.fixes(job, launch, card.memory, functools.cache(takes))[:_SHOWN_FIXES]


def steps_of(job: Job, launch: Launch, args, rows: int | None) -> int | None:
    """Return how many optimiser steps a run has on so many rows; None where neither they nor the steps are known."""
    if args.max_steps > 0:
        return args.max_steps
    if rows is None:
        return None
    privacy = getattr(args, "privacy", None)
    # a private run draws units of privacy, as many as there are rows at most
    drawn = None if privacy is None else privacy.expected_batch_size
    a_step = drawn or args.per_device_train_batch_size * job.accumulation * launch.processes
    if job.family == "policy_gradient":
        a_step = max(a_step / args.num_generations, 1 / 1024)
    return math.ceil(math.ceil(rows / a_step) * args.num_train_epochs)


def shown(found: dict, job: Job, model: str, approximate: bool = False) -> str:
    """Return a plan's facts as text. `approximate`: whether the shapes are those of another model of the size."""
    about = "a llama of about that size: " if approximate else ""
    cards = f"{found['gpus']} x {found['gpu']}" + (f" on {found['nodes']} nodes" if found["nodes"] > 1 else "")
    lines = [
        f"{model}: {about}{found['parameters']:,} parameters, {found['trainable_parameters']:,} of them train",
        f"{found['launch']} on {cards}, rows of up to {found['row_tokens']:,} tokens",
        "",
    ]
    names = list(found["bytes"])
    parts = list(dict.fromkeys(part for phase in found["bytes"].values() for part in phase))
    rows = [(part, *(_gb(found["bytes"][name].get(part)) for name in names)) for part in parts]
    rows.append(("in all", *(_gb(sum(found["bytes"][name].values())) for name in names)))
    lines += [tables.format_table(("GB a card", *names), rows), ""]
    needed, there = found["needed_bytes"] / GB, found["gpu_bytes"] / GB
    lines.append(f"{needed:.1f} GB of {there:.1f} GB: it {'fits' if found['fits'] else 'does NOT fit'}.")
    if not found["fits"]:
        if found["fixes"]:
            lines.append("It would fit with one of:")
            lines += [f"  {fix['change']}  ({fix['bytes'] / GB:.1f} GB)" for fix in found["fixes"]]
        else:
            lines.append("No change that the plan knows makes it fit.")
    if found["vllm_rows_at_a_time"] is not None:
        lines.append(f"vLLM's share holds {found['vllm_rows_at_a_time']:,} of the longest rows at a time.")
    if found["beyond_positions"]:
        lines.append(
            f"The rows are longer than the {found['beyond_positions']:,} positions that the model was made for."
        )
    unit = _UNITS[job.family]
    lines += ["", f"tokens a step, at most: {found['tokens_per_step']:,}"]
    if found["steps"] is None:
        lines.append(f"steps: not known; give the number of {unit} as --rows N")
    else:
        lines.append(f"steps: {found['steps']:,}; tokens: {found['tokens']:,}")
        lines.append(_hours(found))
    return "\n".join(lines)


def _hours(found: dict) -> str:
    if found["hours"] is None:
        return "hours: not known, as the rates of this card are not"
    low, high = map(_count, found["hours"])
    shares = " to ".join(f"{share:.0%}" for share in reversed(found["utilisation"]))
    text = f"hours: {low} to {high}, at {shares} of the card's multiplications by data sheet"
    if found["hours_of_generation"] is not None:
        text += "; of them rollouts {} to {}".format(*map(_count, found["hours_of_generation"]))
    network = ", the network between cards" if found["gpus"] > 1 else ""
    return text + f"; loading, evaluation, saving{network} and rewards come on top"


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _gb(size: float | None) -> str:
    return "" if size is None else f"{size / GB:.2f}"


def here(args, config, peft_config, model_args=None) -> str:
    """Return what a run needs of memory on each process of this launch, as one line for a dry run."""
    from posttrain.planning import settings
    from posttrain.planning.shapes import shapes_of

    try:
        length = settings.length_of(args)
    except ConfigError:
        return "not known, as max_length is null"
    try:
        shapes = shapes_of(config, peft_config)
    except ConfigError:
        return "not known of this kind of model"
    job = settings.job_of(args, model_args, shapes, length)
    on_cpu = args.device.type == "cpu"
    job = replace(job, checkpointing=bool(args.gradient_checkpointing), on_cpu=on_cpu)
    found = memory.phases(job, settings.launch_of(args))
    phase, parts = max(found.items(), key=lambda entry: sum(entry[1].values()))
    parts = ", ".join(f"{name} {_gb(size)}" for name, size in parts.items())
    return f"{_gb(sum(found[phase].values()))} GB with rows of {length:,} tokens ({phase}: {parts})"
