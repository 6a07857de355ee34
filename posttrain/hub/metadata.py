"""Reading and making the metadata of a model card, with huggingface_hub's classes."""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import yaml

from posttrain import yaml_text
from posttrain.errors import DataError
from posttrain.saved import read_text

_LICENSE_KEYS = ("license", "license_name", "license_link")
_NOT_EVALUATION = re.compile(r"eval_(.*_)?(runtime|num_tokens|model_preparation_time|.*_per_second)")
# The hub's metadata wants a type and a name of each data set; cards that cannot tell say so in this word
_UNKNOWN = "unknown"


class Evaluation(NamedTuple):
    """The last evaluation of a run.

    Attributes:
        step: the optimiser step after which it was made.
        metrics: by the names under which they were logged, `eval_` included.
    """

    step: int
    metrics: dict[str, float]


def parse_card(text: str, where: str | Path):
    """Parse a card into huggingface_hub's `RepoCard`: `data` is its metadata, `text` what stands below it.

    All metadata stays as it is written, another program's evaluations included; a key that is null counts as missing.

    Args:
        text: the whole card; it may have no metadata.
        where: the file, for the error.

    Raises:
        DataError: the metadata is no YAML mapping.
    """
    from huggingface_hub import RepoCard
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    if not text.lstrip().startswith("---"):
        text = f"---\n{{}}\n---\n\n{text}"
    try:
        metadata = REGEX_YAML_BLOCK.search(text)
        if metadata:
            yaml_text.compose(metadata[2])
        return RepoCard(text)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise DataError(
            f"the metadata of {where}, between its two lines of ---, is no valid YAML of names and values: "
            f"{' '.join(str(error).split())}. Mend it, or delete those lines with all between them."
        ) from None


def render_card(data, body: str) -> str:
    """Render a card from its metadata, a `CardData` of huggingface_hub, and the text below it."""
    card = parse_card("", "a new card")
    card.data, card.text = data, f"\n{body.lstrip()}"
    return str(card)


def read_metadata(card: Path) -> dict:
    """Read the metadata of a card that this library did not write; none where it cannot be read."""
    try:
        return parse_card(read_text(card), card).data.to_dict()
    except DataError:
        return {}


def license_fields(metadata: dict) -> dict[str, str]:
    """Take a license out of a card's metadata in the hub's three fields, without links into the base's repository."""
    fields = {key: metadata[key] for key in _LICENSE_KEYS if isinstance(metadata.get(key), str)}
    if "://" not in fields.get("license_link", "://"):
        del fields["license_link"]
    return fields if fields.get("license") else {}


def last_evaluation(log_history: list[dict]) -> Evaluation | None:
    """Find the metrics of the last evaluation in a trainer's log history; several data sets have an entry each."""
    measured = [(entry["step"], found) for entry in log_history if (found := _evaluation_metrics(entry))]
    if not measured:
        return None
    step = measured[-1][0]
    return Evaluation(step, {name: value for at, found in measured if at == step for name, value in found.items()})


def eval_results(metrics: dict, names: Iterable[str], dataset: str | None = None, split: str | None = None) -> list:
    """Turn metrics into the `EvalResult`s from which huggingface_hub writes a card's `model-index`.

    A metric's type is the name under which it was logged without `eval_` and the data set's name; its name is the
    logged one. What is no finite number is left out: the hub's metadata is JSON.

    Args:
        metrics: as in `Evaluation`.
        names: of the evaluation's data sets where there are several; each is given as a split, since the hub keeps
            results apart by data set and split.
        dataset: the data set's id on the hub; None for local or generated rows.
        split: the split that was read, where there is one data set.
    """
    from huggingface_hub import EvalResult

    results = []
    ordered = sorted(names, key=len, reverse=True)
    for logged, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            continue
        name = next((name for name in ordered if logged.startswith(f"eval_{name}_")), None)
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=dataset or _UNKNOWN,
                dataset_name=dataset or "Local or generated data",
                dataset_split=name or split,
                metric_type=logged.removeprefix(f"eval_{name}_" if name else "eval_"),
                metric_name=logged,
                metric_value=value,
            )
        )
    return results


def _evaluation_metrics(entry: dict) -> dict:
    return {
        name: value for name, value in entry.items() if name.startswith("eval_") and not _NOT_EVALUATION.fullmatch(name)
    }
