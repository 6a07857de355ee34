"""LoRA adapters on disk, read as factors without a model, and written as plain LoRAs that PEFT loads."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain import model_sizes, patterns
from posttrain.adapters import SIDE_FILE, lora_settings
from posttrain.checks import check_links, shorten
from posttrain.errors import ConfigError, DataError
from posttrain.models import embedded_name
from posttrain.saved import check_safetensors, read_json
from posttrain.visible import listed, one_line
from posttrain.whole_files import answered

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# of linear layers and of embeddings
_NAMES = {"linear": ("lora_A.weight", "lora_B.weight"), "embedding": ("lora_embedding_A", "lora_embedding_B")}
_MATRIX = re.compile(rf"{re.escape(_PREFIX)}([\w.-]+)\.({'|'.join(map(re.escape, sum(_NAMES.values(), ())))})")
# the weight of an embedding, which PEFT saves beside an adapter of one
_CARRIED = re.compile(r"(?!.*\.lora_)(?!.*modules_to_save).+\.weight")
# of a config, what says which modules PEFT adapts
WHERE = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_FLOATS = ("F64", "F32", "F16", "BF16")
# numbers of one matrix: the largest embedding's with a rank of a thousand has a quarter of it
_MOST_NUMBERS = 1 << 30


class Placed(NamedTuple):
    """The adapter of one module in a file.

    Attributes:
        kind: linear or embedding. scale: alpha / r, or alpha / sqrt(r) of rsLoRA.
        rank, width, height: A is (rank, width), B (height, rank).
    """

    kind: str
    scale: float
    rank: int
    width: int
    height: int


class SavedLora(NamedTuple):
    """A LoRA adapter in a folder, whose config and file are whole and fit each other.

    Attributes:
        modules: the adapters by the path of their module in the base model.
        others: names of tensors beside them.
        refused: why it cannot be added to others or truncated, a reason each.
        scheme: what a file of this library beside it says that it was trained as; None for a plain one.
        scheme_settings: what that file tells of the scheme's own settings, by name.
    """

    folder: Path
    config: dict
    modules: dict[str, Placed]
    others: list[str]
    refused: list[str]
    scheme: str | None
    scheme_settings: dict[str, object]

    @contextlib.contextmanager
    def opened(self) -> Iterator:
        """Open the file; the tensors of a name are read by `get_tensor`."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.folder / WEIGHTS, "pt") as tensors:
                yield tensors
        except (SafetensorError, OSError) as error:
            raise DataError(f"{self.folder / WEIGHTS} cannot be read: {error}.") from None

    def factors(self, path: str, tensors) -> tuple[Tensor, Tensor, float]:
        """Read A, B and scale of a module from the opened file."""
        a, b = (tensors.get_tensor(f"{_PREFIX}{path}.{name}") for name in _NAMES[self.modules[path].kind])
        return a, b, self.modules[path].scale

    def check_plain(self) -> None:
        """Raise ConfigError where the adapter is more than A and B of linear layers and embeddings."""
        if self.refused:
            raise ConfigError(f"the adapter in {self.folder} cannot be added or truncated: {self.refused[0]}.")


def read(folder: str | Path) -> SavedLora:
    """Read a saved LoRA adapter, of its weights the names and shapes alone.

    Raises:
        ConfigError: no folder of an adapter, links in the place of its files, an adapter of another kind, settings of
            other types or sizes of no model.
        DataError: a file that is damaged, or weights that are not those of its config.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"adapter is {folder}, which is no folder; give the folder of a saved adapter.")
    for name in (CONFIG, WEIGHTS):
        if (folder / name).is_symlink():
            raise ConfigError(
                f"{folder / name} is a link, and none is followed; give a folder that holds the file, not one of the "
                "hub's cache: copy it with `cp -rL`, or download with `hf download REPOSITORY --local-dir FOLDER`."
            )
        if not os.path.lexists(folder / name):
            pickled = name == WEIGHTS and (folder / "adapter_model.bin").exists()
            why = "; weights as a pickle (adapter_model.bin) are not read, save them as safetensors" if pickled else ""
            raise ConfigError(f"adapter is {folder}, which has no {name}{why or '; give the folder of an adapter'}.")
        if not (folder / name).is_file():
            # a pipe would be waited for
            raise ConfigError(f"{folder / name} is no regular file; give the folder of an adapter.")
    config = read_json(folder / CONFIG)
    owner = f"the adapter in {folder}"
    lora_settings.check(config, owner)
    matched = patterns.check_adapter(config, f"{owner}: ")
    names = check_safetensors(folder / WEIGHTS)
    shapes = _shapes(folder / WEIGHTS, names)
    paths = sorted({found[1] for found in map(_MATRIX.fullmatch, names) if found})
    patterns.check_on(matched, paths, owner)
    _check_adapted(config, paths, folder)
    modules = {path: _placed(config, path, shapes, folder / WEIGHTS) for path in paths}
    if not modules:
        raise DataError(f"{folder / WEIGHTS} holds no matrices A and B of a LoRA; it has {shorten(sorted(names))}.")
    others = sorted(name for name in names if not _MATRIX.fullmatch(name))
    refused = lora_settings.refusals(config)
    foreign = [name for name in others if not _CARRIED.fullmatch(name)]
    if foreign and not refused:
        refused = [f"its file holds {one_line(foreign[0])} beside A and B"]
    return SavedLora(folder, config, modules, others, refused, *_scheme(folder))


def tensors_of(path: str, kind: str, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """Return the factors of a module by their names in a file."""
    return {f"{_PREFIX}{path}.{name}": value for name, value in zip(_NAMES[kind], (A, B), strict=True)}


def is_factor(name: str) -> bool:
    """Tell whether a tensor's name in a file is that of an A or a B."""
    return _MATRIX.fullmatch(name) is not None


def padded(name: str, value: Tensor, rank: int) -> Tensor:
    """Return an A with rows, or a B with columns, of zeros up to a rank. `name`: in a file."""
    side = 0 if "_A" in _MATRIX.fullmatch(name)[2] else 1
    shape = list(value.shape)
    shape[side] = rank - shape[side]
    return torch.cat([value, value.new_zeros(shape)], dim=side)


def write(folder: str | Path, settings: dict, tensors: dict[str, Tensor], beside: Mapping[str, Path]) -> None:
    """Write a plain LoRA adapter into a folder that is new or empty, whole or not at all.

    Args:
        settings: of `LoraConfig`. tensors: by their names in the file. beside: files to copy with it, by their names.

    Raises:
        ConfigError: a folder that is not empty, links that lead nowhere, or settings that PEFT refuses.
        EnvironmentIssue: the disk does not take it.
    """
    from peft import LoraConfig
    from safetensors.torch import save_file

    folder = check_new(folder).absolute()
    try:
        config = LoraConfig(**settings)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"PEFT refuses the settings of the adapter: {str(error).rstrip('.')}.") from error
    above = next(path for path in folder.parents if path.exists())
    with (
        answered(f"the adapter cannot be written to {folder}", "Nothing was left there."),
        tempfile.TemporaryDirectory(prefix=f".{folder.name}.partial-", dir=above) as temporary,
    ):
        partial = Path(temporary) / folder.name
        partial.mkdir()
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(partial))
        for name, path in beside.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, partial / name)
        # safetensors' own are for their owner alone
        (partial / WEIGHTS).chmod((partial / CONFIG).stat().st_mode)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists():
            folder.rmdir()
        os.rename(partial, folder)


def check_new(folder: str | Path) -> Path:
    """Return the path of a folder to write; ConfigError where something is there already."""
    check_links(folder, "output")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"output is {folder}, which is not empty; give a new folder.")
    return folder


def same_base(first: SavedLora, other: SavedLora) -> bool:
    """Tell whether two adapters name one base model, and one revision of it."""
    names = [found.config.get("base_model_name_or_path") for found in (first, other)]
    revisions = [found.config.get("revision") or "main" for found in (first, other)]
    if revisions[0] != revisions[1]:
        return False
    names = [embedded_name(name) or name for name in names]
    if names[0] == names[1]:
        return True
    return all(name and os.path.isdir(name) for name in names) and os.path.samefile(*names)


def _shapes(path: Path, names: set[str]) -> dict[str, tuple[list[int], str]]:
    from safetensors import safe_open

    with safe_open(path, "pt") as tensors:
        parts = {name: tensors.get_slice(name) for name in names}
        return {name: (part.get_shape(), part.get_dtype()) for name, part in parts.items()}


def _placed(config: dict, path: str, shapes: dict, file: Path) -> Placed:
    found = {
        kind: [shapes.get(f"{_PREFIX}{path}.{name}") for name in names]
        for kind, names in _NAMES.items()
        if any(f"{_PREFIX}{path}.{name}" in shapes for name in names)
    }
    shown = one_line(path)[:200]
    if len(found) > 1 or None in (pair := next(iter(found.values()))):
        raise DataError(f"{file} holds one of A and B of {shown} without the other, or those of two kinds.")
    (a, a_type), (b, b_type) = pair
    rank, scale = lora_settings.rank_and_scale(config, path)
    if {a_type, b_type} - set(_FLOATS):
        raise DataError(f"{file} holds {a_type} and {b_type} numbers of {shown}; they must be of {listed(_FLOATS)}.")
    if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
        raise DataError(
            f"{file} holds A {a} and B {b} of {shown}; by its config they must be matrices of the rank {rank}, A with "
            f"{rank} rows and B with {rank} columns."
        )
    for shape in (a, b):
        if min(shape) < 1 or max(shape) > model_sizes.WIDEST or shape[0] * shape[1] > _MOST_NUMBERS:
            raise DataError(f"{file} holds a matrix of {shape} of {shown}, a size that no adapter has.")
    return Placed(next(iter(found)), scale, rank, a[1], b[0])


def _check_adapted(config: dict, paths: list[str], folder: Path) -> None:
    """Raise DataError where the file has a module that PEFT, by the config, would not adapt, or none that it names."""
    from types import SimpleNamespace

    from peft.tuners.tuners_utils import check_target_module_exists

    if config.get("target_modules") in (None, "all-linear"):
        # what they stand for depends on the base
        return
    settings = SimpleNamespace(**{name: config.get(name) for name in WHERE}, target_parameters=None)
    for path in paths:
        if not check_target_module_exists(settings, path):
            raise DataError(
                f"{folder / WEIGHTS} holds {one_line(path)[:200]}, which {CONFIG} does not adapt (target_modules, "
                "exclude_modules, layers_to_transform): PEFT would leave it out. Save the adapter again."
            )
    if not paths or settings.exclude_modules:
        # of a name all modules may be left out
        return
    parts = [path.split(".") for path in paths]
    there = {
        "target_modules": {".".join(words[place:]) for words in parts for place in range(len(words))},
        "layers_to_transform": {word for words in parts for word in words},
    }
    for name, found in there.items():
        named = getattr(settings, name)
        for one in named if isinstance(named, list) else ():
            if str(one) not in found:
                raise DataError(
                    f"{folder / WEIGHTS} holds no module of {one_line(str(one))[:200]}, which {CONFIG} names in "
                    f"{name}: the file is not whole, or the base has no such module. Save the adapter again, or take "
                    "the name out."
                )


def _scheme(folder: Path) -> tuple[str | None, dict[str, object]]:
    """Return the scheme that a file of this library names, and its settings; DataError for one of another form."""
    path = folder / SIDE_FILE
    if not path.is_file():
        return None, {}
    scheme = read_json(path).get("scheme")
    if not isinstance(scheme, str):
        raise DataError(f"{path} names no scheme: it is damaged. Save the adapter again.")
    from posttrain.config.schemes import SCHEMES, named

    known = SCHEMES.get(scheme)
    if known is None or known.config is None:
        return one_line(scheme)[:100], {}
    try:
        return scheme, named(known.config).read_saved(folder)["settings"]
    except ConfigError as error:
        raise DataError(f"{str(error).rstrip('.')}. Save the adapter again.") from None
