"""Modules and functions by the names that they had before each kind of thing got a folder."""

import importlib
import sys

_MODULES = {
    "posttrain.answers": ("posttrain.recipe.scored_answers",),
    "posttrain.data.answer_tokens": ("posttrain.data.scored.answer_tokens",),
    "posttrain.data.baselines": ("posttrain.data.scored.baselines",),
    "posttrain.data.demonstrations": ("posttrain.data.tasks.loading",),
    "posttrain.data.gym": ("posttrain.data.tasks.gym", "posttrain.rewards.gym"),
    "posttrain.data.preferences": ("posttrain.data.pairs.loading", "posttrain.data.sources"),
    "posttrain.data.procedural": ("posttrain.data.generated",),
    "posttrain.data.schema": ("posttrain.data.pairs.schema", "posttrain.data.tokens", "posttrain.data.rows"),
    "posttrain.dry_run": ("posttrain.recipe.dry_run", "posttrain.recipe.preferences"),
    "posttrain.mechanisms.reference_cache": ("posttrain.mechanisms.sequence_cache",),
    "posttrain.reporting": ("posttrain.run.report", "posttrain.tables", "posttrain.environment"),
    "posttrain.tasks": ("posttrain.recipe.tasks",),
    "posttrain.trainers._demonstrations": (
        "posttrain.trainers.policy_gradient.demonstrations", "posttrain.data.tasks.tokens",
    ),
}  # fmt: skip


class _Finder:
    """Finds modules by their former names, behind all other finders."""

    @staticmethod
    def find_spec(name: str, path=None, target=None):
        if name not in _MODULES:
            return None
        from importlib.machinery import ModuleSpec

        return ModuleSpec(name, _Finder)

    @staticmethod
    def create_module(spec):
        return None

    @staticmethod
    def exec_module(module) -> None:
        names = _MODULES[module.__name__]

        def found(attribute: str):
            # looked for in every module that is loaded, by inspect among others
            for name in () if attribute.startswith("__") else names:
                held = importlib.import_module(name)
                if hasattr(held, attribute):
                    return getattr(held, attribute)
            raise AttributeError(f"module {module.__name__!r} has no attribute {attribute!r}; see {', '.join(names)}")

        module.__getattr__ = found


def held(module: str, name: str):
    """Return what `module` holds by `name`: for the `__getattr__` of a module that held it before."""
    return getattr(importlib.import_module(module), name)


def register() -> None:
    """Let the former names be imported."""
    if _Finder not in sys.meta_path:
        sys.meta_path.append(_Finder)
