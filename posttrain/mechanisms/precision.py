"""The precision of weights, kept over what loads others into their place."""

import contextlib


@contextlib.contextmanager
def same_precision(model):
    """Keep each parameter's dtype while weights are loaded inside; PEFT makes 16-bit adapters fp32 on loading."""
    before = {name: value.dtype for name, value in model.named_parameters()}
    yield
    for name, value in model.named_parameters():
        if value.is_floating_point() and value.dtype != before.get(name, value.dtype):
            value.data = value.data.to(before[name])
