"""What clients that train privately spend: where each one's ledger is, and what it may tell the server."""

import hashlib
import math
from urllib.parse import quote

# of the name of a file, in which a character may take up to nine
_LONGEST = 120


def folder_name(client: str) -> str:
    """Return the name of the folder of a client's ledger, which no other client has, whatever is in its id."""
    name = quote(client, safe=" @+=,").replace(".", "%2E")
    if len(name) <= _LONGEST:
        return name
    return f"{name[:_LONGEST]}-{hashlib.sha256(client.encode()).hexdigest()[:16]}"


def is_private(trainer) -> bool:
    """Tell whether a trainer promises privacy to its rows."""
    private = getattr(trainer, "_private", None)
    return private is not None and private.privacy.is_private


def metrics_of(trainer, found) -> dict[str, float]:
    """Return what a client may tell the server of its turn, by name, after the training.

    A private client tells the epsilon and delta of all its turns so far, its ledger's, and no loss, which is computed
    from its rows without noise, unless `publish_private_metrics` has it.

    Args:
        trainer: that has trained. found: what its `train` returned.
    """
    metrics = {"loss": found.training_loss, "steps": found.global_step}
    if not is_private(trainer):
        return metrics
    run = trainer._private
    spent = run.ledger.spent()
    if not run.privacy.publish_private_metrics:
        del metrics["loss"]
    # of a client that took steps without noise before, nothing is promised
    return metrics | ({"epsilon": spent, "delta": run.privacy.target_delta} if math.isfinite(spent) else {})
