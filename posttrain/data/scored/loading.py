"""Answers with a score each: reading them, unrolling pairs with two scores, checking."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from posttrain import former_names
from posttrain.data import formats, generators, objects, shapes, sources, turns
from posttrain.data.columns import first_with_system, log_left_out_columns, log_system_messages, system_in_front
from posttrain.data.generated import reversed_share
from posttrain.data.messages import described, is_empty, style_of
from posttrain.data.pairs import sides
from posttrain.data.rows import columns_of
from posttrain.data.scored.scales import check_scales, check_size
from posttrain.data.sources import read_rows
from posttrain.errors import ConfigError, DataError
from posttrain.log import get_logger
from posttrain.visible import listed

COLUMNS = ("prompt", "completion", "reward", "baseline", "tools", "chat_template_kwargs")
_ANSWERS = {"prompt", "completion", "chosen", "rejected"}
_OTHER_NAMES = ("score", "rating", "value", "label", "rewards", "scores")
_NEEDED = (
    "Needed: prompt, completion and reward, or pairs with a reward each: prompt, chosen, rejected, chosen_reward, "
    "rejected_reward."
)


def load_scored(
    source: str | Sequence[str],
    split: str = "train",
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    same_scale: bool = False,
    needs_reward: bool = True,
    keep: Iterable[str] = (),
    convert: bool = True,
    **given,
):
    """Load scored answers as a `datasets.Dataset` with the columns of `COLUMNS` that the source has.

    Args:
        source: what `posttrain.data.sources.read_rows` reads: a local .json, .jsonl, .jsonl.gz or .parquet file, a hub
            id; or several of them. Rows are prompt, completion, reward, or pairs with a reward for each side, which
            become two rows. Of `generated:reverse_list` the reward is the share of words in their right place.
        limit: the first rows of each source only, pairs counting one.
        columns: yours to ours, where the names differ: {"score": "reward"}.
        same_scale: several sources are on one scale of rewards, whatever it looks like.
        needs_reward: False where a reward function is to score the answers; all columns are kept for it.
        keep: further columns to keep.
        convert: rows of the shapes in `posttrain.data.shapes`, which is said.
        given: `name`, `data_dir`, `data_files` of `datasets.load_dataset`, for hub data sets.

    Raises:
        DataError: what cannot be read; missing columns; a reward that is missing, no number, NaN or beyond 1e18, with
            its place; sources on different scales.
        ConfigError: a limit below 1. EnvironmentIssue: the hub cannot be reached.
    """
    if limit is not None and (isinstance(limit, bool) or limit < 1):
        raise ConfigError(f"limit={limit!r} must be at least 1, or left out for all rows.")
    sources = [source] if isinstance(source, str) else list(source)
    rows, rewards, kept = [], {}, []
    for one in sources:
        found, places = read_rows(one, split, limit, **given)
        found = turns.read_all(found, places, one, columns)
        if convert and not columns:
            found, places = shapes.read_all(found, places, (shapes.ANSWERS, shapes.PAIRS, shapes.WHOLE), one)
        if generators.is_made(one) and "rejected" in found[0]:
            found = [_with_rewards(row) for row in found]
        names = columns_of(found)
        missing = sorted(set(columns or ()) - set(names))
        if missing:
            raise DataError(f"{one}: column {missing[0]!r} of columns={dict(columns)!r} is missing; found {names}.")
        renamed = [{(columns or {}).get(name, name): value for name, value in row.items()} for row in found]
        others = {"baseline", *keep} if needs_reward else set(columns_of(renamed)) - _ANSWERS
        scored = unroll(renamed, places, one, keep=sorted(others), needs_reward=needs_reward)
        rewards[one] = [row["reward"] for row in scored if "reward" in row]
        rows += scored
        wanted = dict.fromkeys((*COLUMNS, *sorted(others)))
        kept += [name for name in wanted if name in scored[0] and name not in kept]
        if needs_reward:
            log_left_out_columns(columns_of(renamed), _read_columns(columns_of(renamed), wanted), one)
    if not same_scale:
        check_scales(rewards)
    return _dataset([{name: row.get(name) for name in kept} for row in rows], ", ".join(sources))


def as_scored(
    dataset,
    name: str,
    keep: Iterable[str] = (),
    needs_reward: bool = True,
    scorer: Callable[[list[dict]], list[float]] | None = None,
):
    """Read a `datasets.Dataset` of scored answers, or of pairs with two scores, as rows of prompt, completion and
    reward.

    Args:
        name: of the data set, for messages.
        keep: further columns to keep; of a pair both rows get them.
        needs_reward: False for rows that need none.
        scorer: gives each row of prompt, completion and all further columns its reward; a column of rewards is then
            not taken for it. See `score`.

    Raises DataError as `load_scored`; ConfigError for what is no `datasets.Dataset`.
    """
    _check_kind(dataset, name)
    if len(dataset) == 0:
        raise DataError(f"{name} holds no rows.")
    needs_reward = needs_reward and scorer is None
    dataset = turns.read(objects.without_empty_images(dataset.with_format(None), name), name)
    dataset, columns = objects.restored(dataset), dataset.column_names
    _check_columns(columns, name, needs_reward)
    missing = [column for column in keep if column not in columns]
    if missing:
        raise DataError(f"{name} has no column {missing[0]!r}. Found: {listed(columns)}. Rename or add it.")
    # a reward function is handed every column, as TRL does
    others = [column for column in columns if column not in ("prompt", "completion", "chosen", "rejected")]
    places = [f"{name}, row {number}" for number in range(1, len(dataset) + 1)]
    rows = unroll(dataset, places, name, others if scorer is not None else tuple(keep), needs_reward)
    if scorer is not None:
        rows = [{**row, "reward": value} for row, value in zip(rows, scorer(rows), strict=True)]
    wanted = dict.fromkeys(("prompt", "completion", "reward", "tools", "chat_template_kwargs", *keep))
    if scorer is None:
        log_left_out_columns(columns, _read_columns(columns, wanted), name)
    return _dataset([{column: row[column] for column in wanted if column in row} for row in rows], name)


def unroll(
    rows: Iterable[Mapping], places: Sequence[str], name: str, keep: Sequence[str] = (), needs_reward: bool = True
) -> list[dict]:
    """Make rows of prompt, completion and reward.

    A pair becomes two, chosen first. Raises DataError with a row's place.
    """
    made, styles, empty, said = [], {}, 0, False
    for row, place in zip(rows, places, strict=True):
        row = _converted(row, place)
        row = {column: objects.flattened(value) for column, value in row.items()}
        if not said and first_with_system([row]):
            said = log_system_messages(row, name) or True
        row = {**row, **system_in_front(row, place)}
        _check_columns(list(row), name, needs_reward, place)
        others = {column: row[column] for column in ("tools", "chat_template_kwargs", *keep) if column in row}
        for completion, reward in _answers(row, place, needs_reward):
            one = others | {"prompt": row["prompt"], "completion": row[completion]}
            for column, value in (("prompt", row["prompt"]), (completion, row[completion])):
                style = style_of(value, column, place)
                known, where = styles.setdefault("any", (style, place))
                if style != known:
                    raise DataError(
                        f"{place}: {column} is {style}, and in {where} there is {known}; write all prompts and answers "
                        "as texts, or all as lists of messages."
                    )
            empty += is_empty(row[completion])
            if reward is not None:
                one["reward"] = reward
            made.append(one)
    if empty == len(made):
        raise DataError(f"{name}: all {empty} answers are empty. Fill them in.")
    if empty:
        get_logger().warning("%s: %d of %d answers are empty; they teach to say nothing.", name, empty, len(made))
    return made


def _check_kind(dataset, name: str) -> None:
    if isinstance(dataset, Mapping):
        raise ConfigError(
            f"{name} is a {type(dataset).__name__} of {', '.join(map(str, dataset)) or 'nothing'}. Choose a split by "
            f"its name, `{name}=data[{next(iter(dataset), 'train')!r}]`."
        )
    if isinstance(dataset, Sequence) and not hasattr(dataset, "column_names"):
        raise ConfigError(
            f"{name} is a {type(dataset).__name__}, no data set. Make one of its rows: "
            "`datasets.Dataset.from_list(rows)`."
        )
    if not hasattr(dataset, "column_names"):
        raise ConfigError(f"{name} is a {type(dataset).__name__}; give a `datasets.Dataset`.")
    if not hasattr(dataset, "__len__"):
        raise ConfigError(
            f"{name} is a stream. Values, the rows to keep and reference log-probabilities are found once, from all "
            "rows: load it into memory, `datasets.Dataset.from_list(list(stream.take(n)))`."
        )


def _answers(row: Mapping, place: str, needs_reward: bool) -> list[tuple[str, float | None]]:
    """Return the columns of a row that hold answers, each with its reward."""
    if "completion" in row:
        column = "reward" if "reward" in row or type(row.get("label")) is not bool else "label"
        return [("completion", _number(row, column, place) if needs_reward else None)]
    if not needs_reward:
        return [("chosen", None), ("rejected", None)]
    names = sides.scores_of(row)
    return [(side, _number(row, column, place)) for side, column in zip(("chosen", "rejected"), names, strict=True)]


def _read_columns(columns: Sequence[str], kept: Iterable[str]) -> set[str]:
    """Return the columns of scored answers, or of pairs, that are read."""
    read = {*kept, "label"} if "completion" in columns else {*kept, "chosen", "rejected"}
    if not {"prompt", "completion"} <= set(columns):
        # alpaca and sharegpt rows
        read |= {*formats.CONVERTED_COLUMNS, "output"}
    return read | set(sides.scores_of(columns) or ())


def _number(row: Mapping, column: str, place: str) -> float:
    value = row.get(column)
    if value is None:
        raise DataError(f"{place}: {column} is missing; every answer needs a number. Fill it in, or leave the row out.")
    if not isinstance(value, int | float):
        raise DataError(f"{place}: {column} is {described(value)}; it must be a number.")
    if not math.isfinite(value):
        raise DataError(f"{place}: {column} is {value}; it must be a finite number. Mend the row, or leave it out.")
    check_size(value, place, column)
    return float(value)


def _check_columns(columns: Sequence[str], name: str, needs_reward: bool, place: str | None = None) -> None:
    where, verb = (place, "lacks") if place else (name, "has no column")
    found = f"Found: {listed(columns)}."
    if "prompt" not in columns or not ({"completion"} <= set(columns) or {"chosen", "rejected"} <= set(columns)):
        lacking = "prompt" if "prompt" not in columns else "completion"
        raise DataError(f"{where} {verb} {lacking}. {found} {_NEEDED}{_renaming(columns)}")
    if not needs_reward or "reward" in columns or {"completion", "label"} <= set(columns):
        return
    if "completion" not in columns and sides.scores_of(columns):
        return
    lacking = "reward" if "completion" in columns else "chosen_reward and rejected_reward"
    raise DataError(f"{where} {verb} {lacking}. {found} {_NEEDED}{_renaming(columns)}")


def _renaming(columns: Sequence[str]) -> str:
    names = {one: "reward" for one in _OTHER_NAMES if one in columns and "reward" not in columns}
    names = dict(list(names.items())[:1])
    if "completion" not in columns and "chosen" not in columns:
        answer = next((one for one in ("response", "answer", "output", "generation") if one in columns), None)
        names |= {answer: "completion"} if answer else {}
    if "prompt" not in columns:
        names |= {one: ours for one, ours in formats.renames(columns).items() if ours == "prompt"}
    said = f" Rename yours:\n  dataset = dataset.rename_columns({names})" if names else ""
    whole = next((one for one in ("messages", "conversations") if one in columns), None)
    if whole and not {"prompt", "completion", "chosen"} & ({*columns} | {*names.values()}):
        parts = f'{{"prompt": row["{whole}"][:-1], "completion": row["{whole}"][-1:]}}'
        said += "\n" if said else " "
        said += f"Part the conversations before their last turn:\n  dataset = dataset.map(lambda row: {parts})"
    return said


def _converted(row: Mapping, place: str) -> Mapping:
    """Read alpaca and sharegpt rows as messages."""
    if {"prompt", "completion"} <= set(row):
        return row
    found = formats.detect(row, row)
    if found.kind in (formats.ALPACA, formats.ALPACA_PREFERENCE, formats.SHAREGPT_PREFERENCE):
        row = {**row, **formats.convert_row(row, found, place)}
        if "prompt" not in row:
            return _split(row, place)
    return row


def _split(row: Mapping, place: str) -> Mapping:
    """Part a pair of whole conversations where its sides do."""
    shape = shapes.find(row, row, (shapes.WHOLE,), place)
    try:
        return row if shape is None else shapes.convert_row(row, shape, place)[0]
    except shapes.LeftOut as reason:
        raise DataError(f"{place}: {reason}. Mend the row, or leave it out.") from None


def _dataset(rows: list[dict], source: str):
    from datasets.exceptions import DatasetGenerationError

    try:
        return objects.exact(rows)
    except (TypeError, ValueError, OverflowError, DatasetGenerationError) as error:
        # pyarrow's own errors are ValueErrors or TypeErrors
        places = [f"{source}, answer {number}" for number in range(1, len(rows) + 1)]
        raise sources.mixed_types(rows, places, source, error) from None


def _with_rewards(row: Mapping) -> dict:
    sides = {side: reversed_share(row["prompt"], row[side]) for side in ("chosen", "rejected")}
    return {**row, "chosen_reward": sides["chosen"], "rejected_reward": sides["rejected"]}


def __getattr__(name: str):
    if name in ("check_reward", "reward_key", "score"):
        return former_names.held("posttrain.data.scored.scoring", name)
    if name in ("LARGEST", "check_range"):
        return former_names.held("posttrain.data.scored.scales", name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
