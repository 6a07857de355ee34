"""Scoring answers by a reward function, of which what was scored once is kept."""

import asyncio
import contextlib
import hashlib
import inspect
import json
import math
import struct
from collections.abc import Callable, Collection, Mapping

from posttrain.data.rows import columns_of
from posttrain.data.scored.scales import check_size
from posttrain.errors import ConfigError, DataError
from posttrain.log import get_logger


def score(rows: list[dict], reward, name: str, cache=None, batch_size: int = 64) -> list[float]:
    """Return the score of each row of prompt, completion and further columns, by a reward function.

    With a cache, an answer whose row was scored before, by this function, is not scored again; values are rounded to
    fp32 either way. What the function reads beside its arguments (a file, a server) is not part of an entry's key.

    What was scored is kept every minute, and when an error ends it.

    Raises DataError for an answer without a score, EnvironmentIssue where the cache cannot be written.
    """
    reward = one_reward(reward)
    known = cache.load() if cache is not None else {}
    digests = [digest_of(row) for row in rows]
    missing = [i for i, digest in enumerate(digests) if digest not in known]
    fresh: dict[bytes, float] = {}
    with cache.pending() if cache is not None and missing else contextlib.nullcontext() as pending:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            scores, refused = score_batch(rows, batch, reward, name)
            found = {digests[i]: value for i, value in scores.items()}
            fresh |= found
            if pending is not None:
                pending.add(found)
            if refused is not None:
                raise refused
    get_logger().info(
        "%s: %d of %d answers scored by %s, the others cached", name, len(missing), len(rows), reward.__name__
    )
    known |= fresh
    return [known[digest] for digest in digests]


def score_batch(rows: list[dict], batch: list[int], reward, name: str) -> tuple[dict[int, float], DataError | None]:
    """Score the rows of these numbers in one call of a reward function; what is wrong with one leaves the others.

    Returns the scores by number, and the error that the first row without a score is answered with, or None.
    """
    columns = {column: [rows[i].get(column) for i in batch] for column in columns_of(rows[i] for i in batch)}
    prompts, completions = columns.pop("prompt"), columns.pop("completion")
    scores = reward(prompts=prompts, completions=completions, **columns)
    if inspect.isawaitable(scores):
        scores = asyncio.run(_awaited(scores))
    # those beside one that is refused are paid for too
    found, refused = {}, None
    for i, value in zip(batch, scores, strict=True):
        try:
            found[i] = _checked(value, f"{name}, answer {i + 1}", reward)
        except DataError as error:
            refused = refused or error
    return found, refused


def check_reward(reward, allowed: Collection[str] | None = None) -> None:
    """Raise ConfigError for what is no reward function, or several."""
    one_reward(reward, allowed)


def reward_key(reward) -> str | None:
    """Digest a reward function's code and settings, and our version, whose rewards are known by their names alone.

    None where it has parts that cannot be read.
    """
    from datasets.fingerprint import Hasher

    from posttrain import __version__

    try:
        return Hasher.hash([one_reward(reward), __version__])
    # whatever the function closes over is asked to serialise itself
    except Exception as error:
        get_logger().info("the reward function's scores are not cached: %s", error)
        return None


def one_reward(reward: Callable, allowed: Collection[str] | None = None):
    """Return the reward function that is given or named. Raises ConfigError for several, or none."""
    from posttrain.rewards import get_rewards

    rewards = get_rewards(reward, allowed, config_field="reward_func")
    if len(rewards) != 1:
        raise ConfigError(f"{len(rewards)} reward functions are given; answers are scored by one.")
    return rewards[0]


def _checked(value: float | None, place: str, reward) -> float:
    if value is None or not math.isfinite(value):
        why = f" The last exception: {reward.last_exception}" if reward.last_exception else ""
        raise DataError(
            f"{place}: reward function {reward.__name__} gave {value}; every answer needs a number. Mend the "
            f"function, or leave the row out.{why}"
        )
    check_size(value, place, f"the score by {reward.__name__}")
    return _fp32(value)


async def _awaited(scores):
    return await scores


def digest_of(row: Mapping) -> bytes:
    """Return what a row is known by in a cache of scores."""
    content = json.dumps(row, sort_keys=True, default=str).encode()
    return hashlib.blake2b(content, digest_size=16).digest()


def _fp32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]
