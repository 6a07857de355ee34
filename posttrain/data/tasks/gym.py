"""Tasks of the reasoning-gym package, by name (extra `gym`)."""

from collections.abc import Iterable
from dataclasses import fields

from posttrain.bounded import Overtime, in_memory, in_time
from posttrain.checks import check_integer, check_option, near, plain
from posttrain.errors import ConfigError, DataError, require
from posttrain.rewards.gym import encode_task

# for one task
SECONDS, MEMORY = 10.0, 1 << 30


def gym_tasks(name: str, n: int, seed: int, exclude: Iterable[dict] = (), conversational: bool = True, **options):
    """Make `n` tasks of a reasoning-gym data set such as `chain_sum`.

    Args:
        name: of the data set. options: fields of its config, its difficulty among them.
        seed: of the generator. exclude: rows of an earlier call, whose questions do not come again.
        conversational: messages if true, texts if false.

    Returns a `datasets.Dataset` with the columns prompt, demonstration (the bare answer: reasoning-gym has no worked
    solutions), gold (the answer) and gym_task (the task as the reward
    `gym` reads it). No question comes twice.

    Raises EnvironmentIssue where reasoning-gym is missing, ConfigError for an unknown name or option, DataError where
    a task has no answer that its own verifier scores 1.0, or there are too few different questions.
    """
    from datasets import Dataset

    n, seed = check_integer("n", n, 1, 1_000_000), plain(seed)
    prompts = (row["prompt"] for row in exclude)
    seen = {prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts}
    # Rows are made when asked for, so a large size costs little. Most data sets seed row i with seed + i: those of the
    # next seed are nearly all among the excluded ones.
    source = _create(name, seed, 4 * (n + len(seen)) + 100, options)
    rows, tried = [], 0
    while len(rows) < n:
        if tried == len(source):
            raise DataError(
                f"gym:{name} has only {len(rows)} different questions among {tried}, not {n}; ask for fewer, or "
                "choose options that make it harder."
            )
        entry = _entry(name, source, tried)
        tried += 1
        if entry["question"] in seen:
            continue
        seen.add(entry["question"])
        rows.append(_row(name, source, entry, conversational))
    return Dataset.from_list(rows)


def _entry(name: str, source, number: int):
    """Draw a task; ConfigError where the options make one that takes a machine's time or memory."""
    try:
        with in_time(SECONDS), in_memory(MEMORY):
            return source[number]
    except (Overtime, MemoryError):
        raise ConfigError(
            f"gym:{name}: a task with these options takes more than {SECONDS:g} s or {MEMORY >> 30} GiB. Choose "
            "smaller ones."
        ) from None


def _create(name: str, seed: int, size: int, options: dict):
    require("reasoning_gym", "gym", f"gym:{name}")
    from reasoning_gym import create_dataset
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        close = near(name, DATASETS)
        hint = f"Did you mean {close!r}?" if close else "Such as 'chain_sum' or 'gcd'; its documentation lists them."
        raise ConfigError(f"reasoning-gym has no data set {name!r}. {hint}")
    known = [field.name for field in fields(DATASETS[name][1]) if field.name not in ("seed", "size")]
    for option in options:
        check_option(f"gym:{name}", option, known)
    try:
        return create_dataset(name, seed=seed, size=size, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"gym:{name} does not take the options {options!r}: {error}.") from None


def _row(name: str, source, entry: dict, conversational: bool) -> dict:
    answer = entry["answer"]
    accepted = isinstance(answer, str) and answer.strip() and source.score_answer(answer, entry) == 1.0
    if not accepted:
        raise DataError(
            f"gym:{name}: the task {entry['question'][:80]!r} has the answer {answer!r}, which its own verifier does "
            "not score 1.0; choose another data set."
        )
    try:
        task = encode_task(name, entry)
    except (TypeError, ValueError) as error:
        raise DataError(f"gym:{name}: a task cannot be stored as text: {error}; choose another data set.") from None
    prompt, demonstration = entry["question"], answer
    if conversational:
        prompt = [{"role": "user", "content": prompt}]
        demonstration = [{"role": "assistant", "content": demonstration}]
    return {"prompt": prompt, "demonstration": demonstration, "gold": answer, "gym_task": task}
