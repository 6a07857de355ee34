r"""A reward for the form of a completion, whatever it says."""

import re
from dataclasses import dataclass

from posttrain import patterns
from posttrain.bounded import Overtime, in_time
from posttrain.checks import check_choice, shorten
from posttrain.errors import ConfigError
from posttrain.rewards.answers import final_answer
from posttrain.rewards.base import Reward, completion_text, reasoning_of
from posttrain.rewards.reads import ANSWER_TAGS

# for one completion
SECONDS = 1.0

# Text without any of the tags, so that each tag comes once. Every character is looked at once: no backtracking.
_ANY = r"(?:(?!</?(?:think|answer)>)[\s\S])*+"
_SOME = rf"(?=\s*[^\s<]|\s*<(?!/?(?:think|answer)>)){_ANY}"

TEMPLATES = {
    "think_answer": rf"\s*<think>{_SOME}</think>\s*<answer>{_SOME}</answer>\s*",
    "think": rf"\s*<think>{_SOME}</think>{_SOME}",
    "answer": rf"{_ANY}<answer>{_SOME}</answer>\s*",
    "hash": r"(?:(?!####)[\s\S])*+####[ \t]*+[^\s#][^\n#]*+\s*",
    # a box's braces nest, which no regular expression counts
    "boxed": None,
}


@dataclass(eq=False)
class Format(Reward):
    r"""1.0 where a whole completion has the form, 0.0 otherwise.

    Args:
        template: think_answer, `<think>...</think><answer>...</answer>`; think, `<think>...</think>` and a text;
            answer, a text that ends with `<answer>...</answer>`; hash, a text whose last line ends with `#### ...`;
            boxed, a `\boxed{...}` after any thinking. Each tag and #### comes exactly once, and none is empty.
            Reasoning that a chat template has parsed out of a message stands between think tags before its content.
        pattern: a regular expression of your own instead, for the whole completion, where `.` is any character. It
            runs in this process; a completion that takes it more than a second of the main thread is scored None and
            counted.
        prefix: put before every completion, for chat templates whose prompt ends with an opening `<think>`.

    Raises ConfigError for an unknown template, and a pattern that is broken or that `patterns.check` refuses.
    """

    template: str | None = None
    pattern: str | None = None
    prefix: str = ""

    __name__ = "format"

    def __post_init__(self):
        super().__post_init__()
        if self.template is not None and self.pattern is not None:
            raise ConfigError(
                f"template={self.template!r} and pattern={self.pattern!r} exclude each other; leave one out."
            )
        if self.pattern is None:
            self.template = self.template or "think_answer"
            check_choice("template", self.template, tuple(TEMPLATES))
        expression = self.pattern if self.pattern is not None else TEMPLATES[self.template]
        self._matches = None if expression is None else patterns.check(expression, "pattern", re.DOTALL).fullmatch

    def __call__(self, prompts=None, completions=None, completion_ids=None, **columns) -> list[float | None]:
        return self._scored([self._score(self._whole(one)) for one in completions])

    @property
    def reads(self) -> tuple[str, ...]:
        if self.pattern is not None:
            return (self.pattern,)
        # the others refuse any of the tags in the wrong place
        return () if self.template == "hash" else ANSWER_TAGS

    def _whole(self, completion) -> str:
        reasoning = reasoning_of(completion)
        if not reasoning or "think" not in (self.pattern or self.template):
            return self.prefix + completion_text(completion)
        # an opening tag that the prompt ends with is parsed away too
        return f"<think>\n{reasoning}\n</think>\n\n{completion_text(completion)}"

    def _score(self, text: str) -> float | None:
        try:
            with in_time(SECONDS):
                return float(self._fits(text))
        except Overtime:
            self._note_timeout(f"the completion {shorten(text)}")
            return None

    def _fits(self, text: str) -> bool:
        if self._matches is not None:
            return self._matches(text) is not None
        answer = final_answer(text, "boxed")
        return answer is not None and bool(answer.text)
