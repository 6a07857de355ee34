"""Tables and bars of text, and intervals of shares."""

import math
import re
from collections.abc import Sequence
from statistics import NormalDist

from posttrain.visible import one_line

_BAR = 40


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Compute Wilson's score interval of a share: `successes` of `n` trials, both ends in [0, 1].

    Unlike the normal interval it keeps its width at shares of 0 and 1. Raises ValueError unless 0 <=
    successes <= n and n > 0.
    """
    if not 0 <= successes <= n or n <= 0:
        raise ValueError(f"successes={successes}, n={n}: needs 0 <= successes <= n and n > 0.")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    return max(0.0, low), min(1.0, high)


def format_table(headers: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Draw a markdown table with aligned columns: the first to the left, the others to the right.

    Cells are one line of visible text each, in which a `|` is escaped.
    """
    cells = [[_cell(cell) for cell in row] for row in (headers, *rows)]
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]

    def line(row):
        numbers_right = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "| " + " | ".join([row[0].ljust(widths[0]), *numbers_right]) + " |"

    ruler = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(cells[0]), line(ruler), *map(line, cells[1:])])


def _cell(value) -> str:
    # backslashes before it would escape the one that escapes it
    return re.sub(r"(\\*)\|", r"\1\1\\|", one_line(value))


def histogram(values: Sequence[float], bins: int = 8) -> str:
    """Draw counts over equal spans as lines of text: the span, the count, a bar."""
    low, high = min(values), max(values)
    width = high / bins - low / bins
    if not width:
        return bars([(low, low, len(values))])
    counts = [0] * bins
    for value in values:
        counts[min(int((value - low) / width), bins - 1)] += 1
    return bars([(low + i * width, low + (i + 1) * width, count) for i, count in enumerate(counts)])


def bars(spans: Sequence[tuple[float, float, int]]) -> str:
    """Draw a line for each span: its ends, one number where they are equal, its count and a bar."""
    most = max(count for _, _, count in spans)
    lines = []
    for low, high, count in spans:
        span = f"{low:9.3g}" if low == high else f"{low:9.3g} to {high:9.3g}"
        lines.append(f"  {span}  {count:>7} {'#' * math.ceil(_BAR * count / most)}".rstrip())
    return "\n".join(lines)
