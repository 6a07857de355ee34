"""Settings of a recipe beside its method's: which rows, and which model."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from trl import DatasetMixtureConfig, ModelConfig
from trl.scripts.utils import DatasetConfig

from posttrain.checks import check_choice
from posttrain.config.mixture import check_datasets
from posttrain.config.schemes import SCHEMES
from posttrain.errors import ConfigError, ExcludedSetting


@dataclass
class ModelArguments(ModelConfig):
    """TRL's own names for models, LoRA and quantisation; the adapter drops nothing out unless it is asked to.

    Raises ConfigError for settings that exclude each other, or have no effect beside the adapter.
    """

    adapter: str | None = field(
        default=None,
        metadata={
            "help": "lora; allora, a LoRA whose rows have rates by the norms of their changes; gift_sw, the lora_r "
            "most salient columns of each linear layer, with noise on the others; or none, the whole model. Default: "
            "lora with use_peft, else none."
        },
    )
    lora_r: int | None = field(
        default=None, metadata={"help": "LoRA rank, or the number of salient columns. Default: 16, of gift_sw 128."}
    )
    lora_alpha: int | None = field(
        default=None, metadata={"help": "LoRA alpha. Default: 32; allora and gift_sw have none beside lora_r."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout; allora and gift_sw have none."})
    allora_eta: float = field(
        default=2.0, metadata={"help": "allora: the rate's factor of a row that has not changed, its largest."}
    )
    allora_form: str = field(
        default="gradient",
        metadata={
            "help": "allora: what a row's factor multiplies; gradient, the gradients of A and B, as published; or "
            "update, the optimizer's update of B, which Adam does not undo."
        },
    )
    gift_bits: int = field(
        default=4, metadata={"help": "gift_sw: bits of the rounding whose step gives the noise its size, 2 to 8."}
    )
    gift_noise: str = field(
        default="auto",
        metadata={"help": "gift_sw: auto (gaussian in supervised fine-tuning, else none), none, gaussian or uniform."},
    )
    gift_metric: str = field(
        default="sensitivity",
        metadata={"help": "gift_sw: what columns are chosen by, sensitivity or activation, the largest input alone."},
    )
    gift_calibration_rows: int = field(
        default=128, metadata={"help": "gift_sw: how many rows, the first ones, columns are chosen on."}
    )

    def __new__(cls, *args, **kwargs):
        self = super().__new__(cls)
        # false is the default of use_peft as well: one that somebody wrote is told apart
        self._peft_written = kwargs.get("use_peft") is not None
        return self

    def __post_init__(self):
        if self.adapter is not None:
            check_choice("adapter", self.adapter, tuple(SCHEMES))
        if self.adapter == "none" and self.use_peft:
            raise ExcludedSetting(
                "adapter is none with use_peft: true; leave one of them out.",
                {"use_peft": ("adapter",), "adapter": ("use_peft",)},
            )
        if self._peft_written and not self.use_peft and self.adapter not in (None, "none"):
            raise ExcludedSetting(
                f"use_peft is false with adapter: {self.adapter}, which trains an adapter; leave one of them out.",
                {"use_peft": ("adapter",), "adapter": ("use_peft",)},
            )
        self.adapter = self.adapter or ("lora" if self.use_peft else "none")
        self.use_peft = self.adapter != "none"
        self._check_scheme()
        super().__post_init__()

    def _check_scheme(self) -> None:
        """Refuse settings that the adapter does not read; give rank and alpha their defaults."""
        own = SCHEMES[self.adapter]
        for name, scheme in ((name, scheme) for scheme, row in SCHEMES.items() for name in row.fields):
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if scheme != self.adapter and value != default:
                raise ExcludedSetting(
                    f"{name} is {value!r}, which has no effect on adapter: {self.adapter}. Set `adapter: {scheme}`, or "
                    f"leave {name} out.",
                    {name: ("adapter",)},
                )
        if own.unquantised and (self.load_in_4bit or self.load_in_8bit):
            name = "load_in_4bit" if self.load_in_4bit else "load_in_8bit"
            raise ExcludedSetting(
                f"{name} is true with adapter: {self.adapter}, {own.unquantised}. Leave {name} out, or set `adapter: "
                "lora`.",
                {name: ("adapter",), "adapter": (name,)},
            )
        self.lora_r = own.rank if self.lora_r is None else self.lora_r
        if own.alpha is None:
            neutral = {"lora_alpha": self.lora_r, "lora_dropout": 0.0}
            for name, value in neutral.items():
                if getattr(self, name) not in (None, value):
                    raise ExcludedSetting(
                        f"{name} is {getattr(self, name)!r} with adapter: {self.adapter} and lora_r {self.lora_r}; "
                        f"{own.why}. Leave {name} out.",
                        {name: ("adapter",)},
                    )
        if self.lora_alpha is None:
            self.lora_alpha = self.lora_r if own.alpha is None else own.alpha


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
