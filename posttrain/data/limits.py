"""What a model can take in: the ids that its embedding has a row for, and the positions that it knows."""

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

from posttrain.bounded import in_memory
from posttrain.data import formats
from posttrain.data.processing import tokenizer_of
from posttrain.data.tokens import render, tokenized_pairs
from posttrain.errors import ConfigError
from posttrain.log import get_logger

# Prompts that are rendered before a run
_SAMPLE = 1000
_SHORTER = "Set max_length to that number, or a smaller one."
# Bytes of tables that a model computes as it is built
_TABLES = 1 << 30
# What tables of positions are called in the models of transformers
_POSITION_TABLES = (
    *("wpe", "embed_positions", "position_embeddings", "position_embedding", "positions_embed"),
    *("pos_embed", "pos_emb", "pos_encoding"),
)


class Limits:
    """The limits of one model.

    Args:
        model: a hub id or folder, whose weights are not read, or a model.
        config: the model's config.
    """

    def __init__(self, model, config):
        self._model, self._config = model, config
        self._said: set[str] = set()
        text = config.get_text_config()
        self.vocabulary = _embedding_rows(model) or getattr(text, "vocab_size", None) or math.inf
        self.positions = _positions(text)

    @functools.cached_property
    def has_table(self) -> bool:
        """Tell whether positions are looked up in a table, so that a further one is an error and no guess."""
        model = self._model
        if isinstance(model, str):
            from accelerate import init_empty_weights
            from transformers import AutoModelForCausalLM

            try:
                # tables that are computed are there
                with init_empty_weights(), in_memory(_TABLES):
                    model = AutoModelForCausalLM.from_config(self._config)
            # a model of another kind, or code of its own
            except Exception:
                return False
        for path, module in model.named_modules():
            if path.rpartition(".")[2] in _POSITION_TABLES and hasattr(module, "num_embeddings"):
                return True
            # sines that were computed once, up to the last position
            tables = (getattr(module, name, None) for name in _POSITION_TABLES)
            if any(len(getattr(table, "shape", ())) and len(table) == self.positions for table in tables):
                return True
        return False

    def beyond(self, tokenizer) -> dict[int, str]:
        """Return the tokenizer's tokens that the embedding has no row for."""
        return {index: token for token, index in tokenizer.get_vocab().items() if index >= self.vocabulary}

    def check_tokenizer(self, processing_class) -> None:
        """Refuse a padding token that the embedding has no row for: it stands in every batch."""
        tokenizer = tokenizer_of(processing_class)
        token = "pad_token" if tokenizer.pad_token_id is not None else "eos_token"
        index = getattr(tokenizer, f"{token}_id")
        if index is not None and index >= self.vocabulary:
            raise ConfigError(f"the tokenizer's {token} {self._fault(index, tokenizer)}")

    def check(self, dataset, sequences: Sequence[Sequence[str]], processing_class, name: str, most: int | None) -> None:
        """Refuse token ids that the embedding lacks, and sequences of more tokens than a table of positions has.

        Args:
            dataset: a `datasets.Dataset` with columns of ids.
            sequences: the columns of each sequence: (("prompt_ids", "chosen_ids"), ...).
            most: what max_length cuts a sequence to; None where it does not.

        Raises ConfigError with the row. Sequences beyond the positions of a model that computes them are said, once for
        a data set.
        """
        names = list(dict.fromkeys(column for columns in sequences for column in columns))
        largest, longest = _extent(dataset, sequences)
        if largest >= self.vocabulary:
            for column in names:
                self.check_ids(dataset[column], processing_class, name)
        self.check_length(min(longest, most or math.inf), name, _SHORTER)

    def check_reports(self, reports: Mapping, datasets: Mapping, processing_class, most: int | None) -> None:
        """Check as `check` does pairs looked at as tokens: of each by its name a `PairReport`, and the data set."""
        if any(report.lengths for report in reports.values()):
            self.check_tokenizer(processing_class)
        for name, report in reports.items():
            if report.lengths is None:
                continue
            if report.lengths.largest_id >= self.vocabulary:
                rows = tokenized_pairs(datasets[name], processing_class)
                self.check_ids((itertools.chain(*row.values()) for row in rows), processing_class, name)
            self.check_length(min(report.lengths.longest, most or math.inf), name, _SHORTER)
            self._log_unused_tokens(tokenizer_of(processing_class))

    def check_answers(self, dataset, processing_class, args, name: str) -> None:
        """Check as `check` does scored answers with the column input_ids."""
        self.check_tokenizer(processing_class)
        self.check(dataset, (("input_ids",),), processing_class, name, args.max_length)
        self._log_unused_tokens(tokenizer_of(processing_class))

    def check_prompts(self, dataset, processing_class, args, name: str) -> None:
        """Check as `check` does prompts with rollouts of up to `max_completion_length` tokens behind them.

        Of many rows a sample is rendered, all of them where the tokenizer has tokens that the embedding lacks, or the
        model a table of positions. Rows with images are not looked at.

        Raises ConfigError, and DataError for a row that cannot be rendered.
        """
        columns = set(getattr(dataset, "column_names", None) or ())
        if (
            "prompt" not in columns
            or not hasattr(dataset, "__len__")
            or columns & {"image", "images"}
            or not len(dataset)
        ):
            return
        tokenizer = tokenizer_of(processing_class)
        if tokenizer is not processing_class or (
            formats.is_messages(dataset[0]["prompt"]) and not tokenizer.chat_template
        ):
            return
        self.check_tokenizer(tokenizer)
        rows = len(dataset)
        if rows > _SAMPLE and not self.beyond(tokenizer) and not self.has_table:
            dataset = dataset.select([i * rows // _SAMPLE for i in range(_SAMPLE)])
        read = [column for column in ("prompt", "tools", "chat_template_kwargs") if column in columns]
        longest, kwargs = 0, args.chat_template_kwargs or {}
        for number, row in enumerate(dataset.with_format(None).select_columns(read), 1):
            if row["prompt"] is None:
                # an environment's own
                continue
            place = f"{name}, row {number if len(dataset) == rows else (number - 1) * rows // _SAMPLE + 1}"
            ids = render(row["prompt"], row, tokenizer, place, add_generation_prompt=True, **kwargs)
            self._check_row(ids, tokenizer, place)
            longest = max(longest, len(ids))
        self._log_unused_tokens(tokenizer)
        self.check_length(
            longest + args.max_completion_length,
            name,
            f"The longest prompt has {longest}: set max_completion_length to {self.positions - longest:g} or less."
            if longest < self.positions
            else "The longest prompt alone is that long; leave such rows out.",
        )

    def check_ids(self, rows: Iterable[Iterable[int]], processing_class, name: str) -> None:
        """Raise ConfigError for the first of the rows' token ids that the embedding lacks."""
        for number, ids in enumerate(rows, 1):
            self._check_row(ids, tokenizer_of(processing_class), f"{name}, row {number}")

    def _check_row(self, ids: Iterable[int], tokenizer, place: str) -> None:
        index = next((index for index in ids if index >= self.vocabulary), None)
        if index is not None:
            raise ConfigError(f"{place}: {self._fault(index, tokenizer)}")

    def check_length(self, tokens: float, name: str, advice: str) -> None:
        """Refuse a sequence of more tokens than a table of positions has; say it of positions that are computed."""
        if tokens <= self.positions:
            return
        found = f"{name}: a sequence of {tokens:g} tokens, and the model has {self.positions} positions"
        if self.has_table:
            raise ConfigError(f"{found}, each with a row of its own, so a longer sequence fails. {advice}")
        if name not in self._said:
            self._said.add(name)
            get_logger().warning("%s; it was not trained on further ones. %s", found, advice)

    def _log_unused_tokens(self, tokenizer) -> None:
        """Say that the tokenizer has tokens that the embedding lacks, and that no row holds."""
        beyond = self.beyond(tokenizer)
        if beyond and "tokenizer" not in self._said:
            self._said.add("tokenizer")
            get_logger().info(
                "%d tokens of the tokenizer, %r the first, are beyond the model's embedding of %d rows; no row that "
                "was looked at has one", len(beyond), beyond[min(beyond)], self.vocabulary,
            )  # fmt: skip

    def _fault(self, index: int, tokenizer) -> str:
        size = len(tokenizer)
        found = f"{tokenizer.decode([index])!r} has the id {index}" if index < size else f"the id is {index}"
        beyond = f"{found}, and the model's embedding has rows for ids below {self.vocabulary}."
        if index >= size:
            return f"{beyond} The rows were made with another tokenizer."
        return (
            f"{beyond} Tokens were added to the tokenizer, and not to the model. Resize it, and save both together:\n"
            f"  model.resize_token_embeddings({size})\n"
            "or use the model's own tokenizer."
        )


def _embedding_rows(model) -> int | None:
    if isinstance(model, str):
        return None
    try:
        weight = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        return None
    # of a weight that ZeRO-3 holds in parts
    return getattr(weight, "ds_shape", weight.shape)[0] or None


def _positions(config) -> float:
    """Return the positions of a model's config, scaled as it says; infinite where it says none."""
    given = getattr(config, "max_position_embeddings", None)
    if not isinstance(given, int) or given <= 0:
        return math.inf
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    found = [given]
    # models with several kinds of layers have one for each
    for one in [rope, *rope.values()] if isinstance(rope, Mapping) else []:
        if isinstance(one, Mapping) and one.get("factor") and one.get("original_max_position_embeddings"):
            found.append(int(one["factor"] * one["original_max_position_embeddings"]))
    return max(found)


def _extent(dataset, sequences: Sequence[Sequence[str]]) -> tuple[int, int]:
    """Return the largest id and the longest sequence, without a Python number for every id."""
    import pyarrow.compute as pc

    names = list(dict.fromkeys(column for columns in sequences for column in columns))
    largest, longest = -1, 0
    for table in dataset.select_columns(names).with_format("arrow").iter(1000):
        for column in names:
            largest = max(largest, pc.max(pc.list_flatten(table.column(column))).as_py() or -1)
        for columns in sequences:
            lengths = sum(pc.list_value_length(table.column(column)).to_numpy() for column in columns)
            longest = max(longest, int(lengths.max(initial=0)))
    return largest, longest
