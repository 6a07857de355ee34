"""Settings of a recipe beside its method's: which rows, and which model."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from trl import DatasetMixtureConfig, ModelConfig
from trl.scripts.utils import DatasetConfig

from posttrain.config.mixture import check_datasets
from posttrain.errors import ConfigError


@dataclass
class ModelArguments(ModelConfig):
    """TRL's own names for models, LoRA and quantisation; the adapter drops nothing out unless it is asked to."""

    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout."})


@dataclass
class DataArguments(DatasetMixtureConfig):
    """Where the rows come from: one data set, or a mixture of several. The names are TRL's."""

    # the command line's wins over the file's
    replaces: ClassVar = {"datasets": ("dataset_name",), "dataset_name": ("datasets",)}

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub id, local .json, .jsonl, .jsonl.gz or .parquet, or generated:reverse_list."},
    )
    datasets: list[DatasetConfig] | None = field(
        default=None,
        metadata={
            "help": "Several data sets to train on, in the place of dataset_name: a list of path, and of name, "
            "data_dir, data_files, split, columns and fraction where needed."
        },
    )
    streaming: bool = field(default=False, metadata={"help": "Not supported: rows are checked before the first step."})
    test_split_size: float | None = field(
        default=None, metadata={"help": "Share of the training rows, drawn by the seed, to evaluate on instead."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Like dataset_name, for evaluation. Default: dataset_test_split of dataset_name."},
    )
    dataset_test_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    max_train_rows: int | None = field(default=None, metadata={"help": "Train on the first rows only."})
    max_eval_rows: int | None = field(default=None, metadata={"help": "Evaluate on the first rows only."})
    convert_rows: bool = field(
        default=True,
        metadata={
            "help": "Convert rows of the shapes that well-known data sets have (UltraFeedback, HH-RLHF, ...), which is "
            "said; false reads the columns as they are."
        },
    )

    # stands on DatasetMixtureConfig.__post_init__, which makes the entries without checks
    def __post_init__(self):
        if self.datasets is not None:
            self.datasets = check_datasets(self.datasets)
            if self.dataset_name is not None:
                raise ConfigError(
                    f"dataset_name is {self.dataset_name!r} beside datasets; make it an entry of datasets, or leave "
                    "one of the two out."
                )
        if self.streaming:
            raise ConfigError(
                "streaming is True: all rows are read and checked before the model loads. Leave it out; in Python a "
                "trainer takes a stream as train_dataset where its method can."
            )
        size = self.test_split_size
        if size is not None and not 0 < size < 1:
            raise ConfigError(f"test_split_size is {size}; it must be a share above 0 and below 1.")
        if size is not None and self.eval_dataset_name is not None:
            raise ConfigError(
                f"test_split_size is {size} beside eval_dataset_name {self.eval_dataset_name!r}; leave one of them out."
            )
        for name in ("max_train_rows", "max_eval_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}; it must be 1 or more, or left out for all rows.")

    @property
    def sources(self) -> list[DatasetConfig]:
        """The data sets to train on, one or several."""
        if self.datasets is not None:
            return self.datasets
        return [DatasetConfig(self.dataset_name, split=self.dataset_train_split)] if self.dataset_name else []


def is_local(dataset_name: str) -> bool:
    """Tell whether a data set's name means something on this machine only: a file, a folder, or one that is made."""
    return dataset_name.startswith(("generated:", "gym:")) or Path(dataset_name).exists()
