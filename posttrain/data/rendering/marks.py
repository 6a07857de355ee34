"""Keys of messages beside role and content: their reasoning, and marks that leave a turn out of the loss."""

from collections.abc import Mapping

# Keys that hold the reasoning before an answer.
REASONING = (
    *("reasoning_content", "reasoning", "thinking", "thought", "thoughts", "analysis"),
    "reasoning_details",
)

# What says under each key that a turn is learned as the others.
_LEARNED = dict.fromkeys(("weight", "train", "training", "trainable", "loss"), (1, "1", "1.0", "true", "True"))
_LEFT_OUT = dict.fromkeys(("mask", "masked"), (0, "0", "0.0", "false", "False"))
_SWITCHES = _LEARNED | _LEFT_OUT


def switch_of(turn) -> str | None:
    """Return the key by which a message says that it is not learned, or with a weight of its own.

    None where it says none.
    """
    for key, neutral in _SWITCHES.items():
        value = turn.get(key) if isinstance(turn, Mapping) else None
        if isinstance(value, bool | int | float | str) and value != "" and value not in neutral:
            return key
    return None
