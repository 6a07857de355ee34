"""Checking the list `datasets:` of a config: TRL's `DatasetMixtureConfig`, whose entries may have a weight each."""

import contextlib
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

from trl.scripts.utils import DatasetConfig

from posttrain.checks import near, plain
from posttrain.errors import ConfigError

_HUB_FIELDS = ("name", "data_dir", "data_files")


def check_datasets(entries) -> list[DatasetConfig]:
    """Turn the entries of `datasets` into TRL's `DatasetConfig`s.

    Args:
        entries: mappings or `DatasetConfig`s; what their fields mean is told in `docs/data.md`.

    Raises:
        ConfigError: no entry, an unknown key, a value of the wrong type, a setting that the kind of source does not
            take, or fractions that give no mixture; the entry and its field are named.
    """
    if isinstance(entries, list) and len(entries) == 1 and isinstance(entries[0], list):
        # a command line's one text
        entries = entries[0]
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        raise ConfigError(
            f"datasets is {entries!r}; it must be a list of one entry or more, such as `- path: a.jsonl`."
        )
    made = [_entry(entry, f"datasets[{number}]") for number, entry in enumerate(entries)]
    given = [entry.fraction for entry in made]
    if any(one is not None for one in given):
        if None in given:
            raise ConfigError(
                f"datasets[{given.index(None)}] has no fraction, and others have one; give every entry a fraction, or "
                "none of them."
            )
        if not math.isfinite(sum(given)):
            raise ConfigError("datasets: the fractions add up to more than a number holds; give smaller ones.")
        if not sum(given):
            raise ConfigError("datasets: every fraction is 0, which leaves no row; set one of them above 0.")
    return made


def rows_of_each(lengths: Sequence[int], fractions: Sequence[float | None]) -> list[int]:
    """Count the first rows of each data set that make up the mixture, by TRL's rule.

    With fractions w_i, scaled to a sum of one, the mixture has N rows, as many as it can without a row coming up
    twice: N = min over w_i > 0 of length_i / w_i. Of each data set the first round(w_i N) rows are taken. Without
    fractions all rows are.
    """
    if None in fractions:
        return list(lengths)
    shares = [one / sum(fractions) for one in fractions]
    total = min(length / share for length, share in zip(lengths, shares, strict=True) if share > 0)
    return [round(share * total) for share in shares]


def _entry(entry, where: str) -> DatasetConfig:
    if isinstance(entry, DatasetConfig):
        entry = vars(entry)
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where} is {entry!r}; it must be a mapping, such as `path: {entry}`.")
    known = [field.name for field in fields(DatasetConfig)]
    for key in entry:
        if key not in known:
            close = "fraction" if key == "weight" else near(str(key), known)
            hint = f"did you mean {close!r}?" if close else f"it takes {', '.join(known)}."
            raise ConfigError(f"{where} has the unknown key {key!r}; {hint}")
    if not entry.get("path"):
        raise ConfigError(f"{where} has no path; name a local file, a folder, a hub id or a generated data set.")
    made = DatasetConfig(**plain(dict(entry)))
    if isinstance(made.fraction, str):
        # YAML reads 1e-9 as a text
        with contextlib.suppress(ValueError):
            made.fraction = float(made.fraction)
    for name in ("path", "name", "data_dir", "split"):
        value = getattr(made, name)
        if not isinstance(value, str) and not (value is None and name in ("name", "data_dir")):
            raise ConfigError(f"{where}: {name} is {value!r}; it must be a text, in quotes if YAML reads it otherwise.")
    if made.columns is not None and not (
        isinstance(made.columns, list) and made.columns and all(isinstance(name, str) for name in made.columns)
    ):
        raise ConfigError(f"{where}: columns is {made.columns!r}; it must be a list of column names.")
    if made.fraction is not None and (
        isinstance(made.fraction, bool)
        or not isinstance(made.fraction, int | float)
        or not 0 <= made.fraction <= sys.float_info.max
    ):
        raise ConfigError(f"{where}: fraction is {made.fraction!r}; it must be a number of 0 or more.")
    if Path(made.path).is_file() and made.split != "train":
        raise ConfigError(f"{where}: split is {made.split!r}, and the file {made.path} has no splits; leave it out.")
    if made.path.startswith(("generated:", "gym:")):
        for name in _HUB_FIELDS:
            if getattr(made, name) is not None:
                raise ConfigError(
                    f"{where}: {name} is for data sets of the hub, and {made.path} is made; leave it out."
                )
    return made
