"""Prompts of rollouts rendered with what their own row says: its tools, and its settings of the chat template."""

import contextlib
import itertools
from collections.abc import Callable, Mapping

from posttrain.data.row_options import template_kwargs_of, tools_of
from posttrain.errors import ConfigError


@contextlib.contextmanager
def of_rows(trainer, rows: list[Mapping]):
    """Render prompts by the templates of `rows`, inside; nothing changes where none has tools or settings."""
    own = any(tools_of(row) or template_kwargs_of(row) for row in rows)
    trainer._rows = rows if own else None
    try:
        yield
    finally:
        trainer._rows = None


def tokenise(trainer, prompts: list, upstream: Callable):
    """Tokenise all prompts by `upstream`, each rendered with its row's `tools` and `chat_template_kwargs`.

    A row's settings go over the run's. Tools that the trainer was given, which it can call, stay those that are shown.
    Raises ConfigError for prompts with images.
    """
    run_tools, run_kwargs = trainer.tools, trainer.chat_template_kwargs
    ids = []
    try:
        settings = [(run_tools or tools_of(row) or [], run_kwargs | template_kwargs_of(row)) for row in trainer._rows]
        for (tools, kwargs), group in itertools.groupby(zip(settings, prompts, strict=True), key=lambda pair: pair[0]):
            trainer.tools, trainer.chat_template_kwargs = tools, kwargs
            found, images, fields = upstream([prompt for _, prompt in group])
            if images or fields:
                raise ConfigError(
                    "rows with tools or chat_template_kwargs of their own cannot have images. Pass the settings to the "
                    "trainer, or leave the columns out."
                )
            ids += found
    finally:
        trainer.tools, trainer.chat_template_kwargs = run_tools, run_kwargs
    return ids, None, {}
