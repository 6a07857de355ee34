"""Chat templates in bounded time and memory: they are programs that come with a model or an adapter.

transformers runs them in a sandbox, which keeps them from files and other programs, not from running for ever. Once
this module is imported, each rendering in the process is stopped after `SECONDS` of its thread's time, beyond `MEMORY`
more bytes, and with a text of more than `LONGEST` characters, whoever asks for it.
"""

import contextlib

from transformers.utils import chat_template_utils

from posttrain.bounded import Overtime, in_memory, in_time
from posttrain.errors import DataError

SECONDS = 5.0
MEMORY = 1 << 30
LONGEST = 64 << 20
# Of a template itself, or of the file with the tokenizer's settings that it stands in.
LONGEST_TEMPLATE = 16 << 20


# templates that were stopped before
_endless: set[str] = set()


class EndlessTemplate(DataError):
    """A chat template that does not come to an end, or takes more memory than a text does."""


class _Bounded:
    """A compiled template whose `render` and `generate` are bounded; all else is the template's own."""

    def __init__(self, template, text) -> None:
        self._template, self._text = template, text

    def __getattr__(self, name: str):
        return getattr(self._template, name)

    def render(self, *args, **kwargs) -> str:
        with self._bounded():
            text = self._template.render(*args, **kwargs)
            _check_length(len(text))
        return text

    def generate(self, *args, **kwargs):
        # part by part: who asks for them notes how far the text has come
        length = 0
        with self._bounded() as clock:
            for part in self._template.generate(*args, **kwargs):
                length += len(part)
                _check_length(length)
                clock.stopped = True
                yield part
                clock.stopped = False

    @contextlib.contextmanager
    def _bounded(self):
        # it is tried in several forms before it is given up, which are not to take their time each
        try:
            with bounded(seconds=SECONDS / 20 if self._text in _endless else SECONDS) as clock:
                yield clock
        except EndlessTemplate:
            _endless.add(self._text)
            raise


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

    compiled.is_bounded = True
    chat_template_utils._compile_jinja_template = compiled


def _compiled(inner, chat_template):
    if isinstance(chat_template, str) and len(chat_template) > LONGEST_TEMPLATE:
        raise EndlessTemplate(f"the chat template has more than {LONGEST_TEMPLATE >> 20} million characters.")
    # constants are folded, and so computed, when a template is compiled
    with bounded():
        return inner(chat_template)


def _check_length(length: int) -> None:
    if length > LONGEST:
        raise EndlessTemplate(
            f"the chat template made a text of {length:,} characters of the row. Use another model's, or mend it."
        )
