"""A model that several trainers use one after the other, left as each of them found it; and what they leave behind."""

import contextlib
import gc
from collections.abc import Iterator

from torch import nn

# what trainers and accelerate put in the place of a module's own methods
_PATCHED = ("forward", "_original_forward")
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


@contextlib.contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Take off at the end what was put onto a model's modules inside: hooks, and forwards in the place of their own.

    A trainer wraps the forward of the model that it is given, and is never asked to unwrap it: a hundred of them, one
    after the other, would be a hundred wrappers deep. Weights, and what modules are in the model, stay as they are.
    """
    modules = list(model.modules())
    patched = [{name: module.__dict__[name] for name in _PATCHED if name in module.__dict__} for module in modules]
    hooks = [{name: dict(getattr(module, name)) for name in _HOOKS} for module in modules]
    try:
        yield
    finally:
        for module, methods, held in zip(modules, patched, hooks, strict=True):
            for name in _PATCHED:
                module.__dict__.pop(name, None)
            module.__dict__.update(methods)
            for name, entries in held.items():
                # the dictionary itself stays, which handles of hooks refer to
                now = getattr(module, name)
                now.clear()
                now.update(entries)


@contextlib.contextmanager
def collected_alone() -> Iterator[None]:
    """Have the garbage collector look only at what is made inside, and collect that at the end.

    A training begins with a whole collection (accelerate's), which for a small model takes longer than its steps: it
    looks at every object of all imported libraries. What was there before counts again afterwards.
    """
    if gc.get_freeze_count():
        # somebody else's, who would have it undone
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()
