"""Data sets in folders of this machine: that what `datasets` will read for one lies in it, whoever wrote it."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import yaml

from posttrain import yaml_text
from posttrain.errors import DataError
from posttrain.saved import read_text
from posttrain.visible import one_line

# What datasets reads of a folder beside its rows
_CARD, _SETTINGS, _INFOS = "README.md", ".huggingface.yaml", "dataset_infos.json"
_SAVED, _SEVERAL, _INFO = "state.json", "dataset_dict.json", "dataset_info.json"
# Formats whose files name other files, which are read as well
_NAME_OTHERS = {"harbor", "hdf5", "lance"}
_INSTEAD = "Copy what it names into the folder, or name that file yourself."


def check_before(source: str) -> None:
    """Raise DataError where the card or the settings of a folder name files outside of it, or servers."""
    folder = Path(source)
    for name in (_CARD, _SETTINGS, _INFOS):
        if os.path.lexists(folder / name):
            check_inside(folder, folder / name)
    for name in (_CARD, _SETTINGS):
        if (folder / name).is_file():
            for pattern in _patterns(folder / name):
                _check_relative(folder, name, pattern)


def check_files(source: str, builder) -> None:
    """Raise DataError where a file that a builder of `datasets` found for a folder does not lie in it."""
    folder = Path(source)
    kind = type(builder).__module__.rpartition(".")[2]
    if kind in _NAME_OTHERS:
        raise DataError(
            f"the data set in the folder {source!r} is of the kind {kind}, whose files name others to read. Write its "
            "rows as .jsonl or .parquet."
        )
    for files in (builder.config.data_files or {}).values():
        for file in files:
            check_inside(folder, Path(file))


def check_saved(source: str) -> None:
    """Raise DataError where a folder that `save_to_disk` wrote names files outside of it."""
    folder = Path(source)
    several = folder / _SEVERAL
    parts = [folder]
    if several.is_file():
        check_inside(folder, several)
        parts = [folder / _relative(folder, _SEVERAL, split) for split in _items(several, "splits")]
    for part in parts:
        for name in (_INFO, _SAVED):
            if os.path.lexists(part / name):
                check_inside(folder, part / name)
        if (part / _SAVED).is_file():
            for entry in _items(part / _SAVED, "_data_files"):
                named = entry.get("filename") if isinstance(entry, dict) else entry
                check_inside(folder, part / _relative(folder, _SAVED, named))


def check_media(source: str, dataset) -> None:
    """Raise DataError where a row of a folder's data set names an image, a sound or a film outside of the folder."""
    features = dataset.features or {}
    for column, feature in features.items():
        for chunk in dataset.data.column(column).chunks:
            for path in _media(chunk, feature):
                if "://" in path or "::" in path:
                    raise _named(source, f"the column {one_line(column)}", path)
                check_inside(Path(source), Path(path))


def check_inside(folder: Path, file: Path) -> None:
    """Raise DataError for a file that is none of the folder's own: elsewhere, behind a link that leads out, a pipe."""
    root, real = Path(os.path.realpath(folder)), Path(os.path.realpath(file))
    roots = [root]
    # a snapshot in a cache of the hub, whose files are links to those of its repository
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("datasets--"):
        roots.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(one) for one in roots):
        how = "is a link that leads" if os.path.lexists(file) and _is_in(file, root) else "lies"
        raise DataError(
            f"the data set in the folder {str(folder)!r} reads {one_line(str(file))}, which {how} out of that folder. "
            f"{_INSTEAD}"
        )
    if real.exists() and not real.is_file():
        raise DataError(f"the data set in the folder {str(folder)!r} reads {one_line(str(file))}, which is no file.")


def _is_in(file: Path, root: Path) -> bool:
    return Path(os.path.abspath(file)).is_relative_to(root)


def _patterns(file: Path) -> Iterator[str]:
    """Read which files the settings of a data set, or the head of its card, take its rows from."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    text = read_text(file)
    if file.name == _CARD:
        head = REGEX_YAML_BLOCK.search(text)
        text = head[2] if head else ""
    try:
        content = yaml_text.load(text)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{file} is no valid YAML: {' '.join(str(error).split())}.") from None
    configs = content.get("configs") if isinstance(content, dict) else None
    for config in configs if isinstance(configs, list) else []:
        if isinstance(config, dict):
            yield from _texts([config.get("data_files"), config.get("data_dir")])


def _texts(value) -> Iterator[str]:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if isinstance(value, str):
        yield value
    for item in inside:
        yield from _texts(item)


def _items(file: Path, key: str) -> list:
    try:
        found = json.loads(read_text(file))[key]
    except (ValueError, KeyError, TypeError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise DataError(f"{file} has no list of {key}, so the data set there cannot be read. Save it again.")
    return found


def _relative(folder: Path, place: str, named) -> str:
    if not isinstance(named, str):
        raise DataError(f"{place} of the data set in the folder {str(folder)!r} names {one_line(named)}, no file.")
    _check_relative(folder, place, named)
    return named


def _check_relative(folder: Path, place: str, named: str) -> None:
    # a chain of file systems has two colons: zip://rows.jsonl::https://host/file.zip
    out = ".." in Path(named).parts or Path(named).is_absolute() or named.startswith("~")
    if out or "://" in named or "::" in named:
        raise _named(str(folder), place, named)


def _named(source: str, place: str, named: str) -> DataError:
    where = "a server or another file system" if "://" in named or "::" in named else "a file out of that folder"
    return DataError(f"{place} of the data set in the folder {source!r} names {one_line(named)}, {where}. {_INSTEAD}")


def _media(values, feature) -> Iterator[str]:
    """Yield the paths of images, sounds and films that Arrow values hold without their bytes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_null(values.type):
        return
    if isinstance(values, pa.ExtensionArray):
        return
    if isinstance(feature, dict):
        for name, part in feature.items():
            yield from _media(values.field(name), part)
    elif isinstance(feature, list) or hasattr(feature, "feature"):
        part = feature[0] if isinstance(feature, list) else feature.feature
        # of Sequence({...}), which is an object of lists
        if pa.types.is_struct(values.type):
            for name, inner in part.items():
                yield from _media(values.field(name).flatten(), inner)
        else:
            yield from _media(values.flatten(), part)
    elif getattr(feature, "decode", False) and pa.types.is_struct(values.type):
        names = {field.name for field in values.type}
        if {"bytes", "path"} <= names:
            bare = pc.and_(pc.is_null(values.field("bytes")), pc.is_valid(values.field("path")))
            yield from values.field("path").filter(bare).to_pylist()
