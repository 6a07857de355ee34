"""Chat templates in bounded time and memory: they are programs that come with a model or an adapter.

transformers runs them in a sandbox, which keeps them from files and other programs, not from running for ever. Once
this module is imported, each rendering in the process is stopped after `SECONDS` of its thread's time, beyond `MEMORY`
more bytes, and with a text that is far longer than what it renders; and so are all renderings of a template together.
"""

import contextlib
import functools
import time

from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

from posttrain.bounded import Overtime, in_memory, in_time
from posttrain.errors import DataError

SECONDS = 5.0
MEMORY = 1 << 30
# Characters of one text: as many, so many times those that were given, and at the very most.
MARGIN, TIMES, LONGEST = 1 << 20, 100, 64 << 20
# Of all texts and renderings of a template: so much, and so much more for each text and each character given.
ALL_SECONDS, SECONDS_EACH, SECONDS_CHARACTER = 60.0, 0.02, 2e-6
ALL_CHARACTERS, CHARACTERS_EACH, TIMES_ALL = 16 << 20, 20_000, 10
# Of a template itself, or of the file with the tokenizer's settings that it stands in.
LONGEST_TEMPLATE = 16 << 20
# Of what is given to filters that work on it in one go, which no alarm interrupts.
LONGEST_GIVEN = 1 << 20
_FILTERS = ("indent", "pprint", "striptags", "title", "truncate", "urlize", "wordcount", "wordwrap")
# Methods of texts that take the product of both lengths, in steps of a tenth of a nanosecond
_FROM_THE_END, MOST_STEPS = ("rfind", "rindex", "rpartition", "rsplit"), 10**10


# templates that were stopped before
_endless: set[str] = set()
# of those, what was said of the ones that are not even compiled
_never_compiled: dict[str, str] = {}


class EndlessTemplate(DataError):
    """A chat template that does not come to an end, or takes more memory than a text does."""


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox of templates, whose filters and methods of texts are given no more than they finish at once."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        for name in _FILTERS:
            self.filters[name] = _limited(self.filters[name], name)

    def call(self, context, called, *args, **kwargs):
        owner = getattr(called, "__self__", None)
        if isinstance(owner, str) and getattr(called, "__name__", "") in _FROM_THE_END:
            for text in (*args, *kwargs.values()):
                if isinstance(text, str) and len(owner) * len(text) > MOST_STEPS:
                    raise EndlessTemplate(
                        f"the chat template looks for a text of {len(text):,} characters from the end of one of "
                        f"{len(owner):,}. Use another model's, or mend it."
                    )
        return super().call(context, called, *args, **kwargs)


def _limited(function, name: str):
    @functools.wraps(function)
    def limited(*args, **kwargs):
        for value in (*args, *kwargs.values()):
            if isinstance(value, str | list | tuple | dict) and len(value) > LONGEST_GIVEN:
                raise EndlessTemplate(
                    f"the chat template gives its filter {name} {len(value):,} characters or parts, and "
                    f"{LONGEST_GIVEN:,} are the most. Use another model's, or mend it."
                )
        return function(*args, **kwargs)

    return limited


class _Bounded:
    """A compiled template whose `render` and `generate` are bounded; all else is the template's own."""

    def __init__(self, template, text) -> None:
        self._template, self._text = template, text
        self._renderings, self._seconds, self._given, self._made = 0, 0.0, 0, 0

    def __getattr__(self, name: str):
        return getattr(self._template, name)

    def render(self, *args, **kwargs) -> str:
        given = _characters((args, kwargs))
        with self._bounded():
            began = time.thread_time()
            text = self._template.render(*args, **kwargs)
            _check_length(len(text), given)
            self._add(given, len(text), time.thread_time() - began)
        return text

    def generate(self, *args, **kwargs):
        # part by part: who asks for them notes how far the text has come
        given, length = _characters((args, kwargs)), 0
        with self._bounded() as clock:
            began = time.thread_time()
            for part in self._template.generate(*args, **kwargs):
                length += len(part)
                _check_length(length, given)
                clock.stopped = True
                yield part
                clock.stopped = False
            self._add(given, length, time.thread_time() - began)

    @contextlib.contextmanager
    def _bounded(self):
        # it is tried in several forms before it is given up, which are not to take their time each
        try:
            with bounded(seconds=SECONDS / 20 if self._text in _endless else SECONDS) as clock:
                yield clock
        except EndlessTemplate:
            _endless.add(self._text)
            raise

    def _add(self, given: int, made: int, seconds: float) -> None:
        self._renderings, self._seconds = self._renderings + 1, self._seconds + seconds
        self._given, self._made = self._given + given, self._made + made
        if self._seconds > ALL_SECONDS + SECONDS_EACH * self._renderings + SECONDS_CHARACTER * self._given:
            raise EndlessTemplate(
                f"the chat template took {self._seconds:.0f} s for {self._renderings:,} texts. Use another model's, or "
                "mend it."
            )
        if self._made > ALL_CHARACTERS + CHARACTERS_EACH * self._renderings + TIMES_ALL * self._given:
            raise EndlessTemplate(
                f"the chat template made {self._made:,} characters of {self._given:,} in {self._renderings:,} texts. "
                "Use another model's, or mend it."
            )


@contextlib.contextmanager
def bounded(what: str = "the chat template", seconds: float | None = None):
    """Stop what runs here after `seconds` (default: `SECONDS`), and where it takes more than `MEMORY`.

    In other threads than the main one, and on systems without these limits, as far as there are any.

    Raises:
        EndlessTemplate: it was stopped.
    """
    try:
        with in_time(SECONDS if seconds is None else seconds) as clock, in_memory(MEMORY):
            yield clock
    except Overtime:
        raise EndlessTemplate(
            f"{what} did not come to an end within {SECONDS:g} s. Use another model's, or mend it."
        ) from None
    except (MemoryError, OverflowError):
        raise EndlessTemplate(
            f"{what} asks for more than {MEMORY >> 30} GiB of memory. Use another model's, or mend it."
        ) from None


def install() -> None:
    """Bound every chat template that this process compiles from here on."""
    inner = chat_template_utils._compile_jinja_template
    if getattr(inner, "is_bounded", False):
        return

    def compiled(chat_template):
        return _Bounded(_compiled(inner, chat_template), chat_template)

    cached = functools.lru_cache(compiled)
    cached.is_bounded = True
    chat_template_utils._compile_jinja_template = cached
    chat_template_utils.ImmutableSandboxedEnvironment = _Environment


def _compiled(inner, chat_template):
    if isinstance(chat_template, str) and len(chat_template) > LONGEST_TEMPLATE:
        raise EndlessTemplate(f"the chat template has more than {LONGEST_TEMPLATE >> 20} million characters.")
    if chat_template in _never_compiled:
        raise EndlessTemplate(_never_compiled[chat_template])
    # constants are folded, and so computed, when a template is compiled
    try:
        with bounded():
            return inner(chat_template)
    except EndlessTemplate as error:
        _never_compiled[chat_template] = str(error)
        raise


def _characters(value) -> int:
    """Count the characters of all texts in what a template is given."""
    count, stack = 0, [value]
    # settings of a program's own may hold themselves
    for _ in range(10_000_000):
        if not stack:
            break
        held = stack.pop()
        if isinstance(held, str):
            count += len(held)
        elif isinstance(held, dict):
            stack += held.keys()
            stack += held.values()
        elif isinstance(held, list | tuple):
            stack += held
        else:
            # a number or null is written in some characters
            count += 10
    return count


def _check_length(length: int, given: int) -> None:
    if length > min(LONGEST, MARGIN + TIMES * given):
        raise EndlessTemplate(
            f"the chat template made a text of {length:,} characters of a row of {given:,}. Use another model's, or "
            "mend it."
        )
