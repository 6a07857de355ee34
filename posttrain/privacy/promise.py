"""What a run promises about its rows, in a file beside its weights: read for the card, and before anything leaves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from posttrain.errors import DataError
from posttrain.privacy import accounting
from posttrain.saved import read_json
from posttrain.tables import format_table
from posttrain.whole_files import replace

if TYPE_CHECKING:
    from posttrain.privacy.audit import Audit
    from posttrain.privacy.ledger import Ledger

FILE = "posttrain_privacy.json"
# of a run's folder: figures computed from rows without noise
FIGURES = ("curves.png", "metrics.jsonl", "metrics.csv")
_ACCOUNTANTS = {"pld": "privacy loss distributions", "rdp": "Renyi divergences"}
_NEIGHBOURS = {
    "add_remove": "with a unit and without it (add_remove)",
    "replace_one": "with a unit and with another in its place (replace_one)",
}


class Promise(NamedTuple):
    """What a run promises, has spent, and how it came to that; plain values.

    Attributes:
        is_private: false of a run that clips and draws as a private one, without noise.
        publish_metrics: whether losses, norms, evaluations and curves may leave the machine.
        epsilon: of all steps on these rows that the ledger knows; None where it is not private.
        epsilon_of_weights: of the steps that the weights come from.
        delta: of both. column: of the unit of privacy; None where it is a row.
        rows_per_unit: most rows of a unit in a step. units: how many there are.
        neighbours, accountant, noise_multiplier, clip_norm, clipping: the settings.
        rate: probability of a unit in a step. expected, cap: units of a step on average, and at most.
        steps: that the weights come from. thrown_away: steps that were taken besides.
        audit: lower bound on epsilon, its confidence and its number of canaries; None without one.
        accountant_version: of dp-accounting, by which epsilon was computed; None without a promise, and of runs of a
            version that did not note it.
    """

    is_private: bool
    publish_metrics: bool
    epsilon: float | None
    epsilon_of_weights: float | None
    delta: float
    column: str | None
    rows_per_unit: int
    units: int
    neighbours: str
    accountant: str
    noise_multiplier: float
    clip_norm: float | None
    clipping: str
    rate: float
    expected: int
    cap: int
    steps: int
    thrown_away: int
    audit: dict | None
    accountant_version: str | None = None

    @classmethod
    def of(cls, privacy, ledger: Ledger, found: Audit | None = None) -> Promise:
        """Gather what a run's settings, ledger and audit say."""
        kind, private = ledger.kind, privacy.is_private
        return cls(
            is_private=private,
            publish_metrics=privacy.publish_private_metrics,
            epsilon=ledger.spent() if private else None,
            epsilon_of_weights=ledger.of_weights() if private else None,
            delta=privacy.target_delta,
            column=privacy.privacy_unit_column,
            rows_per_unit=privacy.rows_per_unit,
            units=kind.units,
            neighbours=privacy.neighbours,
            accountant=privacy.accountant,
            noise_multiplier=kind.noise_multiplier,
            clip_norm=privacy.clip_norm if math.isfinite(privacy.clip_norm) else None,
            clipping=privacy.clipping,
            rate=kind.rate,
            expected=privacy.expected_batch_size,
            cap=kind.cap or kind.units,
            steps=sum(entry.steps for entry in ledger.lineage),
            thrown_away=ledger.thrown_away(),
            audit=None if found is None else {
                "lower_bound": found.lower_bound, "confidence": found.confidence, "canaries": found.canaries
            },
            accountant_version=accounting.version() if private else None,
        )  # fmt: skip

    @property
    def withholds_metrics(self) -> bool:
        """Return whether figures of the rows stay on this machine."""
        return self.is_private and not self.publish_metrics

    @property
    def is_refuted(self) -> bool:
        """Return whether the audit found more than the steps that it saw were to spend."""
        return self.is_private and self.audit is not None and self.audit["lower_bound"] > self.epsilon_of_weights

    def passage(self) -> str:
        """Write the card's passage: the promise as a table, what it covers and what it does not."""
        return "\n\n".join([self._opening(), format_table(("privacy", "value"), self._rows()), self._closing()])

    def _unit(self) -> str:
        if self.column is None:
            return "a row"
        most = f", of which a step takes {self.rows_per_unit} at most" if self.rows_per_unit > 1 else ", one in a step"
        return f"all rows with the same {self.column}{most}"

    def _opening(self) -> str:
        if not self.is_private:
            return (
                "Trained without noise: **nothing is promised** about the training rows, and the weights may give rows "
                "back."
            )
        return (
            f"Trained with differential privacy (DP-SGD): the weights, and all steps of its runs, are "
            f"**({self.epsilon:.4g}, {self.delta:g})-differentially private** for each unit of privacy, which is "
            f"{self._unit()}.{self._refutation()}"
        )

    def _refutation(self) -> str:
        if not self.is_refuted:
            return ""
        return (
            f" **Its audit found otherwise**: epsilon is at least {self.audit['lower_bound']:.3g}, where these steps "
            f"were to spend {self.epsilon_of_weights:.4g}. Something in the run is not as it says; do not rely on it."
        )

    def _rows(self) -> list[tuple[str, str]]:
        clip = "none" if self.clip_norm is None else f"{self.clip_norm:g} ({self.clipping})"
        rows = [
            ("unit of privacy", self._unit()),
            ("units", f"{self.units:,}"),
            ("clip_norm", clip),
            ("probability of a unit in a step", f"{self.rate:.4g} ({self.expected} on average, {self.cap} at most)"),
            ("steps", f"{self.steps:,}"),
        ]
        if not self.is_private:
            return rows
        library = ("dp-accounting", self.accountant_version)
        rows = [
            ("epsilon", f"{self.epsilon:.4g}"),
            ("delta", f"{self.delta:g}"),
            ("neighbours", f"data sets {_NEIGHBOURS[self.neighbours]}"),
            *rows,
            ("noise_multiplier", f"{self.noise_multiplier:.6g}"),
            ("accountant", f"{_ACCOUNTANTS[self.accountant]} ({' '.join(filter(None, library))})"),
        ]
        if self.thrown_away:
            told = f"{self.thrown_away:,}; without them epsilon {self.epsilon_of_weights:.4g}"
            rows.append(("steps that were taken and thrown away", told))
        if self.audit is not None:
            bound, share, canaries = (self.audit[name] for name in ("lower_bound", "confidence", "canaries"))
            rows.append(("audit", f"epsilon is at least {bound:.3g} ({share:.0%} sure, {canaries:,} canaries)"))
        return rows

    def _closing(self) -> str:
        if not self.is_private:
            return "Gradients were clipped and rows drawn as in a private run, for comparison with one."
        figures = (
            "Losses, norms, evaluations and curves were computed from the rows without noise and are published all the "
            "same; the promise does not cover them."
            if self.publish_metrics
            else "Losses, norms, evaluations and curves of the rows are not published, as they are computed without "
            "noise."
        )
        return (
            f"{figures} The number of units counts as known. Not covered either: settings that were chosen by earlier "
            "runs on the same rows, and attacks on the rounding of floating-point noise. The noise and the draws come "
            "from the operating system's entropy, not from the seed."
        )


def write(folder: Path, promise: Promise) -> None:
    """Write a promise into a run's folder, at once and synced."""
    replace(Path(folder) / FILE, lambda path: path.write_text(json.dumps(promise._asdict(), indent=1) + "\n"))


def read(folder: Path) -> Promise | None:
    """Return the promise in a run's folder, None where there is none.

    Raises:
        DataError: the file is damaged, so nothing says what may leave the machine.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return None
    content = read_json(path)
    try:
        promise = Promise(**content)
        promise.passage()
        if not all(isinstance(value, bool) for value in (promise.is_private, promise.publish_metrics)):
            raise ValueError(promise.is_private)
        if not isinstance(promise.accountant_version, str | None):
            raise ValueError(promise.accountant_version)
    except (TypeError, ValueError, KeyError):
        raise DataError(
            f"{path} is damaged, so nothing says whether figures of private rows may be published. Restore it, or "
            "train the run again."
        ) from None
    return promise
