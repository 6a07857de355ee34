"""Cards by name: what of their memory programs can have, and what they can do at best."""

import math
import re
from dataclasses import dataclass

from posttrain.checks import near
from posttrain.errors import ConfigError

GB = 1e9


@dataclass(frozen=True)
class Card:
    """A card as a plan sees it.

    Attributes:
        name: what tables call it.
        memory: bytes that a program can have, as drivers report them.
        flops: dense bf16 multiplications and additions a second by the vendor's data sheet; None where not known.
        bandwidth: bytes a second between memory and cores by the data sheet; None where not known.
    """

    name: str
    memory: float
    flops: float | None = None
    bandwidth: float | None = None


# other names, and words around one that tools and shops write
_ALSO = {"a100-80": "a100", "h100-80": "h100", "h100-94": "h100-nvl", "h200-141": "h200"}
_BESIDE = re.compile(
    r"nvidia|geforce|tesla|quadro|rtx(?=-?a\d)|-(sxm\d?|pcie|hbm\d?e?|tensor|core|gpu)(?=-|$)|(?<=\d)gb(?=-|$)"
)

# Memory is what drivers report, in GiB; rates are of the vendors' data sheets, without sparsity.
_TABLE = {
    "b200": (178.0, 2250, 8.0),
    "h200": (139.8, 989, 4.8),
    "h100": (79.1, 989, 3.35),
    "h100-nvl": (93.1, 835, 3.9),
    "a100": (79.1, 312, 2.04),
    "a100-40": (39.4, 312, 1.56),
    "l40s": (44.4, 362, 0.86),
    "a6000": (47.4, 155, 0.77),
    "a10g": (22.0, 70, 0.60),
    "l4": (22.0, 121, 0.30),
    "rtx5090": (31.4, 209, 1.79),
    "rtx4090": (23.5, 165, 1.01),
    "rtx3090": (23.6, 71, 0.94),
}
CARDS = {name: Card(name, gib * 2**30, tera * 1e12, rate * 1e12) for name, (gib, tera, rate) in _TABLE.items()}
_LEAST, _MOST = 1.0, 1000.0


def card_of(name: str) -> Card:
    """Return the card of a name, or one of so many GB, of which no rates are known: `h100`, `80`, `80GB`.

    Raises ConfigError for a name that is not known, and for sizes below 1 or above 1000 GB.
    """
    key = name.strip().lower().replace("_", "-").replace(" ", "-")
    short = re.sub("-+", "-", _BESIDE.sub("", key)).strip("-")
    short = re.sub(r"rtx-(?=\d)", "rtx", _ALSO.get(short, short))
    if short in CARDS:
        return CARDS[short]
    try:
        size = float(key.removesuffix("gb").rstrip("-"))
    except ValueError:
        # the same card of another size, or another card, is no misspelling
        close = near(short, [known for known in CARDS if _digits(known) == _digits(short)])
        hint = f" Did you mean {close}?" if close else ""
        raise ConfigError(
            f"gpu is {name!r}; it must be one of {', '.join(CARDS)}, or a memory in GB such as 80.{hint}"
        ) from None
    if not math.isfinite(size) or not _LEAST <= size <= _MOST:
        raise ConfigError(f"gpu is {name!r}; a memory must lie between {_LEAST:g} and {_MOST:g} GB.")
    return Card(f"{size:g} GB", size * GB)


def _digits(name: str) -> str:
    return re.sub(r"\D", "", name)
