"""The table of adapter schemes: what `adapter` names in a recipe, and where each scheme's own code is.

A scheme is a module in `posttrain.adapters` with a config (a `SchemeConfig`), a row here, and the fields of
`ModelArguments` that the row names. What it does in a run, if anything, is in a module of `posttrain.run`.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Scheme:
    """A scheme of adapters, as a recipe names it.

    Attributes:
        rank: lora_r where it is left out.
        alpha: lora_alpha where it is left out; None for a scheme without a scaling, of which it is lora_r.
        why: of a scheme without a scaling and without dropout, the reason.
        config: the class of its config, `module:class`; None where it is PEFT's own, or there is no adapter.
        in_run: the class of what it does in a run, `module:class`; None where that is nothing.
        fields: the fields of `ModelArguments` that it alone reads, by the names that its config has for them.
        unquantised: why its base may not be quantised; None where it may.
    """

    rank: int = 16
    alpha: int | None = 32
    why: str | None = None
    config: str | None = None
    in_run: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    unquantised: str | None = None


SCHEMES = {
    "lora": Scheme(),
    "allora": Scheme(
        alpha=None,
        why="ALLoRA has rates of its own for each row in their place",
        config="posttrain.adapters.allora:ALLoRAConfig",
        in_run="posttrain.run.row_scales:RowScales",
        fields={"allora_eta": "eta", "allora_form": "form"},
    ),
    "gift_sw": Scheme(
        rank=128,
        alpha=None,
        why="the change of a salient column is neither scaled nor dropped out",
        config="posttrain.adapters.gift_sw:GiftSWConfig",
        in_run="posttrain.run.weight_noise:SalientColumns",
        fields={
            "gift_bits": "bits",
            "gift_noise": "noise",
            "gift_metric": "metric",
            "gift_calibration_rows": "calibration_rows",
        },
        unquantised="whose columns are weights of the base itself: the adapter alone would not hold a quantised one",
    ),
    "none": Scheme(),
}


def named(path: str):
    """Return the class that `module:class` names."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
