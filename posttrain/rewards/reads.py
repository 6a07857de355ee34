"""Which texts a reward function looks for: the constants of its code, and of what its code refers to."""

import contextlib
import re
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from types import CodeType, FunctionType, MethodType

# What answers are found by, see `posttrain.rewards.answers`
ANSWER_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# How many functions deep, and into how large a table of texts, a function is followed
_DEPTH, _LARGEST = 3, 1000


def texts_of(function) -> set[str]:
    """Collect every text in a function's code, defaults, closure and own attributes, and in the globals that it names.

    A compiled pattern counts as its text. Functions that it refers to are followed, but for those of Python's own
    library; other objects are not. A text that is put together at run time is not found.
    """
    found: set[str] = set()
    seen: set[int] = set()
    while isinstance(function, partial):
        _look([*function.args, *function.keywords.values()], found, seen, _DEPTH)
        function = function.func
    if not isinstance(function, FunctionType | MethodType):
        # an object that is called
        _look([*getattr(function, "__dict__", {}).values()], found, seen, _DEPTH)
        function = getattr(type(function), "__call__", None)  # noqa: B004
    elif isinstance(function, MethodType):
        _look([*getattr(function.__self__, "__dict__", {}).values()], found, seen, _DEPTH)
        function = function.__func__
    _look(function, found, seen, _DEPTH)
    return found


def _look(value, found: set[str], seen: set[int], depth: int) -> None:
    if isinstance(value, str):
        found.add(value)
    elif isinstance(value, re.Pattern):
        found.add(str(value.pattern))
    elif id(value) in seen:
        return
    elif isinstance(value, Mapping | list | tuple | set | frozenset) and len(value) <= _LARGEST:
        seen.add(id(value))
        parts = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
        for part in parts:
            _look(part, found, seen, depth)
    elif isinstance(value, FunctionType | MethodType) and depth > 0:
        seen.add(id(value))
        function = getattr(value, "__func__", value)
        if (function.__module__ or "").partition(".")[0] not in sys.stdlib_module_names - {"__main__"}:
            for part in _parts(function):
                _look(part, found, seen, depth - 1)


def _parts(function: FunctionType) -> Iterable:
    """Tell what a function's code holds and names; its docstring is no text that it looks for."""
    codes = [function.__code__]
    for code in codes:
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    for code in codes:
        yield from (one for one in code.co_consts if not isinstance(one, CodeType) and one != function.__doc__)
        yield from (function.__globals__[name] for name in code.co_names if name in function.__globals__)
    for cell in function.__closure__ or ():
        # the name may not be bound yet
        with contextlib.suppress(ValueError):
            yield cell.cell_contents
    yield from (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
