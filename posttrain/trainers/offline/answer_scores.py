"""Answers scored by a reward function before training: in rounds over all ranks, so that none waits for long."""

import contextlib

from accelerate.utils import broadcast_object_list, gather_object
from tqdm.auto import tqdm

from posttrain.data.scored import scoring
from posttrain.errors import PosttrainError
from posttrain.log import get_logger
from posttrain.mechanisms.sequence_cache import ReferenceCache
from posttrain.paths import cache_dir

# answers of a call
BATCH = 64


def score(rows: list[dict], reward_func, name: str, args) -> list[float]:
    """Score rows by the reward function; all ranks call it and get what each has scored.

    Each answer is scored by one rank, as the function may be slow or random, and the first rank keeps the scores: ranks
    may not share a disk. A round is a call of each rank, so no rank waits longer for the others than a call takes.

    Raises DataError for an answer without a score, EnvironmentIssue where the cache cannot be written.
    """
    key = scoring.reward_key(reward_func) if args.process_index == 0 else None
    cache = ReferenceCache(cache_dir() / "rewards", key) if key else None
    if args.world_size == 1:
        return scoring.score(rows, reward_func, name, cache, BATCH)
    reward = scoring.one_reward(reward_func)
    digests = [scoring.digest_of(row) for row in rows]
    known = _by_first(args, lambda: _known(cache, digests))
    missing = [i for i in range(len(rows)) if i not in known]
    pending = cache.pending() if cache is not None and missing else None
    # before anything is paid for
    _by_first(args, pending and cache.check_writable)
    with pending or contextlib.nullcontext():
        scored = _rounds(rows, missing, reward, name, args, pending, digests)
        _by_first(args, pending and pending.flush)
    get_logger().info(
        "%s: %d of %d answers scored by %s on %d processes, the others cached",
        name, len(missing), len(rows), reward.__name__, args.world_size,
    )  # fmt: skip
    scored |= known
    return [scored[i] for i in range(len(rows))]


def _rounds(rows, missing: list[int], reward, name: str, args, pending, digests) -> dict[int, float]:
    """Score the rows of these numbers, a call of each rank at a time; returns all scores on all ranks."""
    scored, size = {}, BATCH * args.world_size
    silent = args.process_index != 0 or bool(args.disable_tqdm) or not missing
    with tqdm(total=len(missing), desc=f"{name}: {reward.__name__}", disable=silent) as progress:
        for start in range(0, len(missing), size):
            # dealt in turn, so that a short last round is shared as well
            own = missing[start + args.process_index : start + size : args.world_size]
            found, refused = {}, None
            try:
                if own:
                    found, refused = scoring.score_batch(rows, own, reward, name)
            except PosttrainError as error:
                refused = error
            parts = gather_object([(args.process_index, found, refused)])
            fresh = {i: value for _, part, _ in parts for i, value in part.items()}
            keep = pending and (lambda fresh=fresh: pending.add({digests[i]: value for i, value in fresh.items()}))
            _by_first(args, keep)
            for _, _, error in sorted(parts, key=lambda part: part[0]):
                if error is not None:
                    raise error
            scored |= fresh
            progress.update(len(fresh))
    return scored


def _known(cache, digests: list[bytes]) -> dict[int, float]:
    there = cache.load() if cache is not None else {}
    return {i: there[digest] for i, digest in enumerate(digests) if digest in there}


def _by_first(args, ask):
    """Return what `ask` returns on the first rank, or raise on all ranks what it raises there; None asks nothing."""
    found = [None]
    if args.process_index == 0 and ask:
        try:
            found = [ask()]
        except PosttrainError as error:
            found = [error]
    broadcast_object_list(found, from_process=0)
    if isinstance(found[0], PosttrainError):
        raise found[0]
    return found[0]
