"""Post-training for data that is noisy, scarce or private.

The names below are imported when first used, so that `import posttrain` is fast and loads no torch.
"""

import importlib
import pkgutil

from posttrain import former_names, started, trainers  # noqa: F401  `started` as early as can be

__version__ = "0.1.0"


def _public() -> dict[str, str]:
    """Return the module of each name that a family's folder makes public."""
    found = {}
    for family in pkgutil.iter_modules(trainers.__path__, f"{trainers.__name__}."):
        named = getattr(importlib.import_module(family.name), "PUBLIC", {}) if family.ispkg else {}
        found |= {name: f"{family.name}.{module}" for module, names in named.items() for name in names}
    return found


_MODULES = _public()
__all__ = ["__version__", *_MODULES]
former_names.register()


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module 'posttrain' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
