"""Whether rewards lie where they can be trained with, and several sources of them look to be on one scale."""

import itertools
import math
from collections.abc import Mapping, Sequence

from posttrain.errors import DataError

# Fewer rewards say little of their scale: only such as lie far outside the other source's tell
_ENOUGH = 20
_WIDER = 2.0
_SHIFT = 1 / 3
_FAR_WIDER = 10.0
# At either end: of all rewards, of the middle 90% and of the middle half
_LEFT_OUT = (0, 0.05, 0.25)
# Optimisers square gradients in fp32, which ends at 3.4e38
LARGEST = 1e18
# How unlikely it must be that one source has no negative rewards by chance
_CHANCE = 1e-4


def check_scales(rewards: Mapping[str, Sequence[float]], what: str = "files") -> None:
    """Raise DataError where sources' rewards look to be on different scales.

    Two sources of 20 or more rewards each are told apart where, of all their rewards, of the middle 90% and of the
    middle half alike, one span is more than twice as wide as the other, or both ends lie off by more than a third of
    the two spans together; and where one has negative rewards, more often than chance would leave out of the other,
    which has none. A source of fewer is told by rewards farther outside the other's span than that is wide; one that
    mostly repeats a number by rewards that reach ten times its width beyond it. Samples of one scale pass, but for such
    as were chosen by their reward, and rarely small ones with long tails.

    Args:
        rewards: of each source, by its name. what: a word for the sources.
    """
    for one, other in itertools.combinations(rewards, 2):
        if not rewards[one] or not rewards[other] or _alike(sorted(rewards[one]), sorted(rewards[other])):
            continue
        shown = "; ".join(f"{name}: {min(rewards[name]):g} to {max(rewards[name]):g}" for name in (one, other))
        raise DataError(
            f"the rewards of these {what} are on different scales ({shown}), as far as their spans and signs tell, so "
            "one value for all would be wrong. Scale them alike (to [0, 1], say), or say that they are alike: "
            "`same_scale: true` (ALoLTrainer: `same_scale=True`)."
        )


def _alike(a: list[float], b: list[float]) -> bool:
    if len(a) < len(b):
        a, b = b, a
    if len(a) < _ENOUGH:
        return not _of_other_sizes(a, b)
    if _negative_in_one(a, b) or _negative_in_one(b, a):
        return False
    if len(b) >= _ENOUGH and (_repeats(a) or _repeats(b)):
        # ratings that are mostly one number: what the others are is a matter of chance, but for their size
        return not _far_wider(a, b) and not _far_wider(b, a)
    if len(b) < _ENOUGH:
        wide, other = (a, b) if a[0] < a[-1] else (b, a)
        if wide[0] == wide[-1] or (wide is b and len(b) < _ENOUGH):
            # what is equal throughout has no width to compare with
            return True
        width = wide[-1] - wide[0]
        return wide[0] - width <= other[0] and other[-1] <= wide[-1] + width
    return not all(_apart(*_span(a, share), *_span(b, share)) for share in _LEFT_OUT)


def _repeats(values: list[float]) -> bool:
    low, high = _span(values, 0.25)
    return low == high


def _far_wider(a: list[float], b: list[float]) -> bool:
    """Tell whether `a` reaches out of `b` by more than ten times its width, or its size where it has none."""
    reach = _FAR_WIDER * (b[-1] - b[0] or abs(b[0]) or math.inf)
    return a[0] < b[0] - reach or a[-1] > b[-1] + reach


def _of_other_sizes(a: list[float], b: list[float]) -> bool:
    """Tell, of few rewards, whether the spans do not even touch, and one is far off and of another size."""
    small, large = sorted((a, b), key=_size)
    apart = a[0] > b[-1] or b[0] > a[-1]
    far = max(small[0] - large[0], large[-1] - small[-1]) > small[-1] - small[0]
    return min(len(a), len(b)) > 1 and apart and far and 0 < 3 * _size(small) < _size(large)


def _size(values: list[float]) -> float:
    return max(abs(values[0]), abs(values[-1]))


def _span(values: list[float], left_out: float) -> tuple[float, float]:
    cut = math.ceil(left_out * len(values))
    return values[cut], values[~cut]


def _apart(low: float, high: float, other_low: float, other_high: float) -> bool:
    narrow, wide = sorted((high - low, other_high - other_low))
    together = max(high, other_high) - min(low, other_low)
    shifts = abs(low - other_low), abs(high - other_high)
    # two spans that are the same point say nothing
    return not together or wide > _WIDER * narrow or min(shifts) > _SHIFT * together


def _negative_in_one(a: list[float], b: list[float]) -> bool:
    """Tell whether `a` has negative rewards of some size and `b`, by chance, might not have none."""
    together = max(a[-1], b[-1]) - a[0]
    negative = sum(value < -0.1 * together for value in a)
    if b[0] < 0 or b[0] == b[-1] or not negative:
        # equal rewards may be all that such a source was asked for
        return False
    # that all of so many, drawn from both together, come from `a`
    return negative * math.log(len(a) / (len(a) + len(b))) < math.log(_CHANCE)


def check_range(rewards: Sequence[float], name: str, low: float, high: float, why: str, fix: str) -> None:
    """Raise DataError for the first reward outside [low, high]."""
    for number, reward in enumerate(rewards, 1):
        if not low <= reward <= high:
            span = f"outside [{low:g}, {high:g}]" if math.isfinite(high) else f"below {low:g}"
            raise DataError(f"{name}, answer {number}: reward is {reward:g}, {span}; {why}. {fix}")


def check_size(value: float, place: str, what: str) -> None:
    """Raise DataError for a number that cannot be trained with in fp32."""
    if abs(value) > LARGEST:
        raise DataError(
            f"{place}: {what} is {value:g}; numbers beyond {LARGEST:g} cannot be trained with: gradients are squared "
            "in fp32, which ends at 3.4e38. Scale all of them down, to [0, 1], say."
        )
