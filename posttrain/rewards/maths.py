"""Rewards for answers that are right or wrong: mathematics, and plain text."""

from dataclasses import dataclass
from importlib.util import find_spec

from posttrain.checks import check_choice
from posttrain.errors import ConfigError, require
from posttrain.log import get_logger
from posttrain.rewards.answers import PLACES, answer_number, final_answer, gold_answer
from posttrain.rewards.base import (
    PooledReward,
    Reward,
    column_of,
    completion_text,
)
from posttrain.rewards.golds import is_missing
from posttrain.rewards.reads import ANSWER_TAGS

ENGINES = ("auto", "math_verify", "numbers")


@dataclass(eq=False)
class MathsAnswer(PooledReward):
    """1.0 where a completion's final answer equals the gold one, 0.0 where it does not or there is none.

    Args:
        gold: column with the gold answers: numbers, LaTeX between $ signs, or worked solutions that end in `#### N` or
            a box. Check them with `check_golds` before training; an unparsable one is scored None.
        engine: `math_verify` compares expressions, in worker processes (extra `maths`); `numbers` compares exact
            numbers in this process. `auto` takes math_verify where it is installed, and says which it took.
        answer_in: where the answer is looked for: auto, tag, boxed, hash or last; see `posttrain.rewards.answers`.
        timeout: seconds a sample; one that takes longer is scored None and counted. workers: processes on each rank.

    Raises ConfigError for a bad setting, EnvironmentIssue where math-verify is asked for and missing.
    """

    gold: str = "gold"
    engine: str = "auto"
    answer_in: str = "auto"
    timeout: float = 5.0
    workers: int = 2

    __name__ = "maths_answer"
    verifier = "posttrain.rewards._math_verify"

    def __post_init__(self):
        check_choice("engine", self.engine, ENGINES)
        check_choice("answer_in", self.answer_in, PLACES)
        super().__post_init__()
        if self.engine == "math_verify":
            require("math_verify", "maths", "maths_answer with engine: math_verify")
        self.uses_math_verify = self.engine != "numbers" and find_spec("math_verify") is not None
        if self.engine == "auto":
            took = "math-verify" if self.uses_math_verify else "exact numbers (math-verify is not installed)"
            get_logger().info("maths_answer: answers are compared by %s", took)

    def __call__(self, prompts=None, completions=None, completion_ids=None, **columns) -> list[float | None]:
        golds = column_of(columns, self.gold, self, "gold")
        answers = [final_answer(completion_text(completion), self.answer_in) for completion in completions]
        if not self.uses_math_verify:
            return self._scored([_same_number(*pair) for pair in zip(answers, golds, strict=True)])
        calls = [
            None if answer is None else {"answer": answer.text, "alone": answer.alone, "gold": str(gold)}
            for answer, gold in zip(answers, golds, strict=True)
        ]
        return self._scored(self._score_in_pool(calls))

    @property
    def reads(self) -> tuple[str, ...]:
        return ANSWER_TAGS

    def start(self) -> None:
        if self.uses_math_verify:
            super().start()

    def gold_errors(self, values: list) -> list[str | None]:
        if not self.uses_math_verify:
            return [_number_error(value) for value in values]
        errors = [_missing(value) for value in values]
        asked = [index for index, error in enumerate(errors) if error is None]
        outcomes = self._pool.map("gold_error", [{"gold": str(values[index])} for index in asked])
        for index, outcome in zip(asked, outcomes, strict=True):
            errors[index] = outcome.value
            if outcome.timed_out:
                errors[index] = f"math-verify does not finish it in {self.timeout:g} s."
            elif outcome.error is not None:
                errors[index] = f"math-verify fails on it: {outcome.error}."
        return errors


@dataclass(eq=False)
class ExactMatch(Reward):
    """1.0 where a completion is the gold text, but for spaces around it and lengths of spaces within.

    Args:
        gold: column with the gold texts.
        answer_in: `all` compares the whole completion; auto, tag, boxed or hash the final answer alone, found as in
            `posttrain.rewards.answers`.
    """

    gold: str = "gold"
    answer_in: str = "all"

    __name__ = "exact_match"

    def __post_init__(self):
        super().__post_init__()
        if self.answer_in == "last":
            raise ConfigError("answer_in='last' finds a number, not a text; use the reward maths_answer for it.")
        check_choice("answer_in", self.answer_in, ("all", *(place for place in PLACES if place != "last")))

    def __call__(self, prompts=None, completions=None, completion_ids=None, **columns) -> list[float | None]:
        golds = column_of(columns, self.gold, self, "gold")
        scores = []
        for completion, gold in zip(completions, golds, strict=True):
            text = completion_text(completion)
            if self.answer_in != "all":
                answer = final_answer(text, self.answer_in)
                text = "" if answer is None else answer.text
            wanted = None if is_missing(gold) else " ".join(str(gold).split())
            scores.append(float(" ".join(text.split()) == wanted) if wanted else None)
        return self._scored(scores)

    @property
    def reads(self) -> tuple[str, ...]:
        return () if self.answer_in == "all" else ANSWER_TAGS

    def gold_errors(self, values: list) -> list[str | None]:
        return [_missing(value) for value in values]


def _same_number(answer, gold) -> float | None:
    wanted = answer_number(gold_answer(gold))
    if wanted is None:
        return None
    return float(answer_number(answer) == wanted)


def _missing(value) -> str | None:
    if is_missing(value):
        return "it is empty." if value is None or isinstance(value, str) else "it is NaN, a missing value."
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        return f"it is a {type(value).__name__}, not a text or a number."
    return None


def _number_error(value) -> str | None:
    if (error := _missing(value)) is not None:
        return error
    if answer_number(gold_answer(value)) is None:
        return (
            "it is not one number, such as 1234, -1,234.50 or 3/4; for other mathematics install math-verify: "
            'pip install "posttrain[maths]".'
        )
    return None
