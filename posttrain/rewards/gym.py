"""The score that reasoning-gym's own verifiers give."""

import json
from dataclasses import dataclass

from posttrain.errors import require
from posttrain.rewards.answers import final_answer
from posttrain.rewards.base import PooledReward, column_of, completion_text
from posttrain.rewards.reads import ANSWER_TAGS

# Keeps what JSON has no words for, since verifiers tell tuples from lists.
_KIND = "__kind__"
_KINDS = {"tuple": tuple, "set": set, "frozenset": frozenset, "dict": dict}


@dataclass(eq=False)
class GymScore(PooledReward):
    """reasoning-gym's score of a completion's final answer, between 0 and 1 as its verifier gives it.

    Many verifiers give a wrong answer 0.01 or 0.05 where it has the right form, some give more for a part of the
    solution, and a right number among words can get 0.3: only 1.0 is a solved task. Where success has to be told from
    failure, set the trainer's threshold at 0.99.

    Args:
        gold: column with the tasks, as `posttrain.data.tasks.gym.gym_tasks` writes them.
        timeout: seconds a sample; one that takes longer is scored None and counted. workers: processes on each rank.

    The answer is what `<answer>`, a box or #### marks, or else the whole text after any thinking. Raises
    EnvironmentIssue where reasoning-gym is missing (extra `gym`).
    """

    gold: str = "gym_task"
    timeout: float = 5.0
    workers: int = 2

    __name__ = "gym"
    verifier = "posttrain.rewards._gym"

    def __post_init__(self):
        super().__post_init__()
        require("reasoning_gym", "gym", "the reward gym")

    def __call__(self, prompts=None, completions=None, completion_ids=None, **columns) -> list[float | None]:
        tasks = column_of(columns, self.gold, self, "gold")
        answers = [final_answer(completion_text(completion)) for completion in completions]
        calls = [
            None if answer is None else {"answer": answer.text.strip(), "gold": task}
            for answer, task in zip(answers, tasks, strict=True)
        ]
        return self._scored(self._score_in_pool(calls))

    @property
    def reads(self) -> tuple[str, ...]:
        return ANSWER_TAGS

    def gold_errors(self, values: list) -> list[str | None]:
        outcomes = self._pool.map("gold_error", [{"gold": value} for value in values])
        return [
            f"its verifier does not finish in {self.timeout:g} s." if one.timed_out else one.value or one.error
            for one in outcomes
        ]


def encode_task(name: str, entry: dict) -> str:
    """Encode a task as one text, from which `decode_task` makes an equal one."""
    return json.dumps([name, _encode(entry)])


def decode_task(task: str) -> tuple[str, dict]:
    """Return the data set's name, and the task as its verifier takes it."""
    name, entry = json.loads(task)
    return name, _decode(entry)


def _encode(value):
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value) and _KIND not in value:
            return {key: _encode(one) for key, one in value.items()}
        return {_KIND: "dict", "items": [[_encode(key), _encode(one)] for key, one in value.items()]}
    if isinstance(value, list):
        return [_encode(one) for one in value]
    if type(value).__name__ in _KINDS and type(value) is _KINDS[type(value).__name__]:
        return {_KIND: type(value).__name__, "items": [_encode(one) for one in value]}
    return value


def _decode(value):
    if isinstance(value, list):
        return [_decode(one) for one in value]
    if not isinstance(value, dict):
        return value
    if _KIND not in value:
        return {key: _decode(one) for key, one in value.items()}
    return _KINDS[value[_KIND]](_decode(one) for one in value["items"])
