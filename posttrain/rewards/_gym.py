"""Answers judged by reasoning-gym. Runs in a worker process, which minds the time: see `worker.py`."""

from functools import cache, lru_cache

import reasoning_gym

from posttrain.rewards.gym import decode_task


def score(answer: str, gold: str) -> float:
    """Return the verifier's score of an answer to the encoded task."""
    name, entry = _entry(gold)
    return float(_verifier(name)(answer, entry))


def accepts_gold(gold: str) -> bool:
    return score(_entry(gold)[1]["answer"], gold) == 1.0


def gold_error(gold) -> str | None:
    """Tell why a task cannot be used, None if it can."""
    try:
        if accepts_gold(gold):
            return None
    except Exception as error:
        return f"it is no task that reasoning-gym can score ({type(error).__name__}); make it with gym_tasks."
    return "its own verifier does not accept the answer that came with it."


@lru_cache(maxsize=4096)
def _entry(task: str) -> tuple[str, dict]:
    return decode_task(task)


@cache
def _verifier(name: str):
    return reasoning_gym.get_score_answer_fn(name)
