"""LoRA adapters as products of two factors: refactored, added, truncated and looked at, without the full product."""

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.adapters import saved_lora
from posttrain.adapters.saved_lora import SavedLora
from posttrain.errors import ConfigError, DataError
from posttrain.log import get_logger
from posttrain.objectives import factors, low_rank, spectrum
from posttrain.objectives.low_rank import Compressed, refactor, truncate
from posttrain.visible import one_line

__all__ = [
    "Compressed",
    "PlainLora",
    "Spectrum",
    "merge_adapters",
    "refactor",
    "spectra",
    "truncate",
    "truncate_adapter",
]


class Part(NamedTuple):
    """One module of a sum.

    Attributes:
        ranks: of the adapters that are added, 0 where one does not adapt it.
        exact_rank: of their sum. rank: as it is kept.
        singular_values: of the sum, (exact_rank,). relative_error: of what is kept, as stored.
    """

    ranks: list[int]
    exact_rank: int
    rank: int
    singular_values: list[float]
    relative_error: float


class PlainLora(NamedTuple):
    """A plain LoRA adapter that is not on disk yet.

    Attributes:
        settings: of its `LoraConfig`: each module's alpha is its rank, so that its scale is 1.
        tensors: by their names in a file.
        parts: by the path of their module.
        relative_error: ||what is stored - exact|| / ||exact|| over all modules, in the Frobenius norm.
    """

    settings: dict
    tensors: dict[str, Tensor]
    parts: dict[str, Part]
    relative_error: float

    def save(self, folder: str | Path, beside: Mapping[str, Path] | None = None) -> None:
        """Write it into a folder that is new or empty, whole or not at all.

        `beside`: files to copy with it, by their names there.

        Raises ConfigError for one that is not, EnvironmentIssue where the disk does not take it.
        """
        saved_lora.write(folder, self.settings, self.tensors, beside or {})


class Spectrum(NamedTuple):
    """What a saved adapter does to one module.

    Attributes:
        rank, scale: as stored. shape: of the weight that it changes, (d_out, d_in).
        singular_values: of scale B A, the largest first, with those that are rounding alone.
    """

    rank: int
    scale: float
    shape: tuple[int, int]
    singular_values: Tensor

    @property
    def norm(self) -> float:
        """The Frobenius norm of the change."""
        return factors.norm(self.singular_values)

    @property
    def effective_rank(self) -> float:
        """exp(entropy) of the singular values' shares: the rank that equally large ones would have."""
        return spectrum.effective_rank(self.singular_values)

    def rank_for(self, energy: float) -> int:
        """Return the least rank that keeps this share of the sum of squared singular values; 0 for no change."""
        return spectrum.kept_rank(self.singular_values, energy=energy) if self.norm else 0

    def left_out(self) -> Tensor:
        """Return the relative error of the best approximation of each rank 0, 1, ..., (K + 1,)."""
        shares = self.singular_values / (self.norm or 1.0)
        tails = shares.square().flip(0).cumsum(0).flip(0).sqrt()
        return torch.cat([tails, tails.new_zeros(1)])


def merge_adapters(
    adapters: Sequence,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    *,
    energy: float | None = None,
    base: str | None = None,
    dtype: torch.dtype | None = None,
) -> Compressed | PlainLora:
    """Add LoRA adapters: exactly, in factors of the sum's own rank, or the best approximation of a lower one.

    Args:
        adapters: folders of saved adapters, or (A, B, scale) each with A (r, d_in) and B (d_out, r). Folders may adapt
            different modules, with different ranks, alphas, `rank_pattern`, `alpha_pattern` and rsLoRA.
        weights: a finite number for each, of any sign; 1 by default.
        rank: the most that a module's sum may have. energy: in (0, 1], the least share of the sum of squared singular
            values that each module keeps. Without both, the sum is exact to the rounding of its type.
        base: of folders, the name of the base model that the result is for, where they do not name the same.
        dtype: of the result. By default fp32 for folders, and for factors the type that holds all of theirs.

    Returns:
        for factors a `Compressed`; for folders a `PlainLora`, whose `save` writes a folder that PEFT loads.

    Raises:
        ConfigError: an adapter that is more than A and B, adapters of different bases or shapes, values out of range.
        DataError: files that are damaged, or numbers that are not finite.
    """
    if not isinstance(adapters, list | tuple) or not adapters:
        raise ConfigError(f"adapters is {adapters!r:.200}; give a list of one or more.")
    if not all(isinstance(one, str | os.PathLike) for one in adapters):
        if any(isinstance(one, str | os.PathLike) for one in adapters) or base is not None:
            raise ConfigError("adapters are folders, or (A, B, scale) each, and base is for folders; give one kind.")
        return low_rank.merge(adapters, weights, rank, energy, dtype=dtype)
    if base is not None and not (isinstance(base, str) and base.strip()):
        raise ConfigError(f"base is {base!r:.100}; give the name of a model, or leave it out.")
    low_rank.check_size(rank, energy)
    weights = low_rank.check_weights(weights, len(adapters))
    dtype = torch.float32 if dtype is None else dtype
    if dtype not in factors.DTYPES:
        raise ConfigError(f"dtype is {dtype}; it must be one of {', '.join(map(str, factors.DTYPES))}.")
    found = [saved_lora.read(folder) for folder in adapters]
    for one in found:
        one.check_plain()
        if one.scheme is not None:
            get_logger().info(
                "%s was trained as %s; what is made of it is a plain LoRA, without the settings of that scheme",
                one.folder, one.scheme,
            )  # fmt: skip
    _check_bases(found, base)
    tensors, parts, norms = {}, {}, []
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(one.opened()) for one in found]
        for path in sorted({path for one in found for path in one.modules}):
            kind = _kind(found, path)
            given = [entry for entry in zip(found, files, weights, strict=True) if path in entry[0].modules]
            part = _sum(path, given, rank, energy, dtype)
            ranks = [one.modules[path].rank if path in one.modules else 0 for one in found]
            values = part.singular_values.tolist()
            parts[path] = Part(ranks, len(values), len(part.A), values, part.relative_error)
            norms.append(part.norms)
            tensors |= saved_lora.tensors_of(path, kind, part.A, part.B)
        tensors |= _carried(found, files)
    gap, whole = (math.hypot(*values) for values in zip(*norms, strict=True))
    tensors, settings = _settled(found, parts, tensors, base)
    return PlainLora(settings, tensors, parts, gap / whole if whole else 0.0)


def truncate_adapter(
    folder: str | Path, rank: int | None = None, energy: float | None = None, *, dtype: torch.dtype | None = None
) -> PlainLora:
    """Find the best approximation of a saved adapter of a lower rank; without rank and energy, of its own.

    Arguments, result and errors are those of `merge_adapters`.
    """
    _check_folder(folder)
    return merge_adapters([folder], None, rank, energy=energy, dtype=dtype)


def spectra(adapter: str | Path | SavedLora) -> dict[str, Spectrum]:
    """Return the singular values of what a saved adapter adds to each module, by its path.

    Of an adapter that is more than A and B, as DoRA, it is what these two make. Raises as `merge_adapters`.
    """
    if not isinstance(adapter, SavedLora):
        _check_folder(adapter)
    found = adapter if isinstance(adapter, SavedLora) else saved_lora.read(adapter)
    spectrums = {}
    with found.opened() as tensors:
        for path, placed in found.modules.items():
            a, b, scale = found.factors(path, tensors)
            with _naming(found, path):
                values = spectrum.singular_values(a, b, scale)
            spectrums[path] = Spectrum(placed.rank, scale, (placed.height, placed.width), values)
    return spectrums


def _check_folder(adapter) -> None:
    if not isinstance(adapter, str | os.PathLike):
        raise ConfigError(f"adapter is {adapter!r:.100}; give the folder of an adapter.")


def _sum(path: str, given, rank, energy, dtype) -> Compressed:
    """Add the adapters of one module. `given`: the adapters that have it, each with its file and weight."""
    parts = []
    for one, file, weight in given:
        a, b, scale = one.factors(path, file)
        with _naming(one, path):
            factors.check(a, b)
            parts.append((a, b, factors.share(weight, scale)))
    with _naming(given[0][0], path):
        return low_rank.merge(parts, None, rank, energy, dtype=dtype)


@contextlib.contextmanager
def _naming(found: SavedLora, path: str):
    """Name file and module in an error of numbers."""
    try:
        yield
    except (ConfigError, DataError) as error:
        raise type(error)(f"{found.folder / saved_lora.WEIGHTS}, {one_line(path)[:200]}: {error}") from None


def _kind(found: list[SavedLora], path: str) -> str:
    """Return the kind of a module; ConfigError where adapters have different ones or shapes there."""
    own = [one for one in found if path in one.modules]
    first = own[0].modules[path]
    for one in own[1:]:
        other = one.modules[path]
        if (other.kind, other.height, other.width) != (first.kind, first.height, first.width):
            raise ConfigError(
                f"{one_line(path)[:200]} is {first.kind}, {first.height} x {first.width}, in {own[0].folder} and "
                f"{other.kind}, {other.height} x {other.width}, in {one.folder}: they are of different base models."
            )
    return first.kind


def _check_bases(found: list[SavedLora], base: str | None) -> None:
    for one in found[1:] if base is None else ():
        if not saved_lora.same_base(found[0], one):
            told = [f"{one.config.get('base_model_name_or_path')} in {one.folder}" for one in (found[0], one)]
            raise ConfigError(
                f"the adapters name different base models, or revisions of one: {told[0]}, {told[1]}. A change of one "
                "model is none of another. Where both are the same model, give its name: --base MODEL (base=)."
            )


def _carried(found: list[SavedLora], files: list) -> dict[str, Tensor]:
    """Return the embeddings that PEFT saved beside the adapters, which must be the same in all."""
    names = sorted({name for one in found for name in one.others})
    carried = {}
    for name in names:
        without = [one.folder for one in found if name not in one.others]
        if without:
            raise ConfigError(
                f"{one_line(name)}, an embedding of the base, is saved in one adapter and not in {without[0]}: it is "
                "not known to be the same. Save that adapter with save_embedding_layers=False."
            )
        carried[name] = files[0].get_tensor(name)
        for one, file in zip(found[1:], files[1:], strict=True):
            if not torch.equal(file.get_tensor(name), carried[name]):
                raise ConfigError(
                    f"{one_line(name)}, an embedding of the base, is another one in {one.folder} than in "
                    f"{found[0].folder}: they are of different base models."
                )
    return carried


def _settled(found: list[SavedLora], parts: dict[str, Part], tensors: dict, base: str | None) -> tuple[dict, dict]:
    """Return the tensors, and the settings by which PEFT puts them where they belong."""
    from peft.utils.other import get_pattern_key

    rank = max(part.rank for part in parts.values())
    ranks = {path: part.rank for path, part in parts.items() if part.rank != rank}
    if any(ranks.get(get_pattern_key(ranks, path), rank) != part.rank for path, part in parts.items()):
        # the name of one module is the end of another's: by rows and columns of zeros all have one rank
        ranks = {}
        for name, value in tensors.items():
            if saved_lora.is_factor(name):
                tensors[name] = saved_lora.padded(name, value, rank)
    first = found[0].config
    where = {name: first.get(name) for name in saved_lora.WHERE}
    if any({name: one.config.get(name) for name in saved_lora.WHERE} != where for one in found[1:]):
        where = {"target_modules": sorted(parts)}
    tasks = {one.config.get("task_type") for one in found}
    settings = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": ranks,
        "alpha_pattern": dict(ranks),
        "fan_in_fan_out": any(one.config.get("fan_in_fan_out") for one in found),
        "task_type": tasks.pop() if len(tasks) == 1 else None,
        "base_model_name_or_path": base or first.get("base_model_name_or_path"),
        "revision": None if base else first.get("revision"),
        "inference_mode": True,
        **where,
    }
    return tensors, settings
