"""Code of the user's own that settings name as `module:function`: which modules may be imported, and from where."""

import importlib
import importlib.util
import os
import re
import sys
import types
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path

from posttrain.checks import near
from posttrain.errors import ConfigError, PosttrainError
from posttrain.log import get_logger
from posttrain.paths import recipes_dir
from posttrain.visible import one_line

_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def import_function(name: str, setting: str, allowed: Collection[str] | None = None) -> Callable:
    """Import what `module:function` names, where that module may be imported.

    Args:
        name: a module where Python imports from or in the working folder, and a function or class in it.
        setting: that names it, for errors.
        allowed: modules that the user allowed by `--allow_code`; a module beside the recipe needs no word. None where a
            program of the user's names the function itself: then any module will do.

    Raises:
        ConfigError: it has not this form, its module was not allowed, cannot be imported or lacks it; with `allowed`,
            it is not made by that module but only in its reach.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{setting}: {name!r} must be module:function, such as my_rewards:shortness.")
    module_name, _, path = name.partition(":")
    if allowed is not None:
        check_allowed(name, setting, allowed)
    # A recipe's own folder is searched by Python, the working folder is not.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module_name)
    except PosttrainError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{setting}: the module of {name!r} cannot be imported: {type(error).__name__}: {one_line(error)} (working "
            f"folder: {os.getcwd()})."
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            close = near(part, dir(found))
            hint = f" Did you mean {close!r}?" if close else ""
            raise ConfigError(f"{setting}: {name!r}: {module_name} has no {part!r}.{hint}")
        found = getattr(found, part)
        if allowed is not None:
            _check_own(found, part, name, setting)
    if not callable(found):
        raise ConfigError(f"{setting}: {name!r} is {type(found).__name__}, not a function.")
    return found


def check_allowed(name: str, setting: str, allowed: Collection[str]) -> None:
    """Refuse the `module:function` of a settings file unless its module was allowed or lies beside the recipe; imports
    nothing. Says which module is going to be imported.
    """
    module = name.partition(":")[0]
    by_word = any(module == one or module.startswith(f"{one}.") for one in allowed)
    if not by_word and not _is_beside_the_recipe(module):
        raise ConfigError(
            f"{setting} names {name.partition('?')[0]!r}, code of the module {module}, which settings alone do not "
            f"run. Where you trust that code, add --allow_code {module} to the command line."
        )
    why = "allowed by --allow_code" if by_word else "a module beside the recipe"
    get_logger().info("%s: the module %s is imported, and its code runs (%s)", setting, module, why)


def _is_beside_the_recipe(module: str) -> bool:
    """Tell whether a module is a file, or a package, in the folder of the script that runs."""
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    if script is None:
        return False
    folder = Path(script).resolve().parent
    # the recipes that come with the library stand beside each other
    if folder == recipes_dir().resolve() or folder.is_relative_to(Path(__file__).resolve().parent):
        return False
    top = module.partition(".")[0]
    try:
        # of a top name alone: of a dotted one, its parents would be imported
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return False
    origin = spec.origin if spec is not None else None
    if origin in (None, "built-in", "frozen"):
        return False
    place = Path(origin).resolve()
    return place.parent == folder or (place.name == "__init__.py" and place.parent.parent == folder)


def _check_own(found, part: str, name: str, setting: str) -> None:
    """Refuse what lies in the reach of an allowed module without being its own: `my_rewards:os.system`."""
    module = name.partition(":")[0].partition(".")[0]
    made = found
    while isinstance(made, partial):
        made = made.func
    is_code = isinstance(made, types.ModuleType | type) or isinstance(
        made,
        types.FunctionType | types.BuiltinFunctionType | types.MethodType | types.MethodWrapperType
        | types.MethodDescriptorType | types.WrapperDescriptorType,
    )  # fmt: skip
    of = made.__name__ if isinstance(made, types.ModuleType) else getattr(made, "__module__", None)
    if (part.startswith("__") and part.endswith("__")) or (is_code and str(of).partition(".")[0] != module):
        raise ConfigError(
            f"{setting}: {name.partition('?')[0]!r} is not made by the module that is allowed, but by {of}. Write a "
            "function of your own that calls it."
        )
