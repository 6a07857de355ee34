"""Reading the files of a saved run or model: an error that names the file where one is damaged."""

import json
from pathlib import Path

import yaml

from posttrain import yaml_text
from posttrain.errors import DataError

# of a file that is read as a whole; a tokenizer's has some ten million
_MOST_CHARACTERS = 128 << 20
# of lists and objects in one another; far fewer than a program can follow
_MOST_LEVELS = 64

_OF_TOKENIZERS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "processor_config.json", "preprocessor_config.json", "chat_template.json",
)  # fmt: skip


def read_text(path: Path) -> str:
    """Return the text of a file; DataError where it is not UTF-8 or cannot be read."""
    try:
        # a pipe would be waited for
        if path.exists() and not path.is_file():
            raise DataError(f"{path} cannot be read: it is no regular file.")
        with open(path, encoding="utf-8") as file:
            text = file.read(_MOST_CHARACTERS + 1)
        if len(text) > _MOST_CHARACTERS:
            raise DataError(f"{path} has more than {_MOST_CHARACTERS >> 20} million characters.")
        return text
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None


def read_json(path: Path) -> dict:
    """Return the object in a JSON file; DataError where there is none."""
    try:
        content = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no valid JSON: {error}.") from None
    if _is_deep(content):
        raise DataError(f"{path} is nested more than {_MOST_LEVELS} levels deep.")
    return _named(content, path, "JSON object")


def read_yaml(path: Path) -> dict:
    """Return the names and values in a YAML file, none where it is empty; DataError where it holds something else."""
    try:
        content = yaml_text.load(yaml_text.read(path).decode())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no valid YAML: {' '.join(str(error).split())}.") from None
    return _named({} if content is None else content, path, "YAML mapping")


def check_safetensors(path: Path) -> set[str]:
    """Return the names of the tensors in a file; DataError where it is damaged: cut off, or another kind of file."""
    from safetensors import SafetensorError, safe_open

    try:
        # the header tells how long the file must be
        with safe_open(path, "pt") as tensors:
            return set(tensors.keys())
    except (SafetensorError, OSError) as error:
        raise DataError(
            f"{path} is damaged, or no safetensors file ({error}). Save it again, or name another checkpoint."
        ) from None


def check_tokenizer_files(folder: Path) -> None:
    """Refuse a folder in which a file of a tokenizer is damaged: cut off, of another form, a folder, not UTF-8.

    Raises DataError, which names it.
    """
    for pattern, read in (("*.json", read_json), ("*.jinja", read_text), ("*.txt", read_text)):
        for path in (*folder.glob(pattern), *folder.glob(f"additional_chat_templates/{pattern}")):
            # the model's own configs are no part of it
            if path.suffix == ".jinja" or path.name in _OF_TOKENIZERS:
                read(path)


def check_shards(index: Path) -> None:
    """Refuse the index of weights in several files of which one is missing, damaged, or without its tensors.

    Raises:
        DataError: in each of these cases, or where the index itself cannot be read.
    """
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(name, str) for name in placed.values()):
        raise DataError(f"{index} says nothing of where the tensors lie (no weight_map of file names).")
    for name in sorted(set(placed.values())):
        path = index.with_name(name)
        if not path.is_file():
            raise DataError(f"{index} names {name}, which is missing.")
        lost = {tensor for tensor, file in placed.items() if file == name} - check_safetensors(path)
        if lost:
            raise DataError(f"{path} holds no {min(lost)}, which {index.name} says lies there.")


def _is_deep(content) -> bool:
    level = [content]
    for _ in range(_MOST_LEVELS):
        parts = (part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list))
        if not (level := [held for part in parts for held in part if isinstance(held, dict | list)]):
            return False
    return True


def _named(content, path: Path, form: str) -> dict:
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}; it must be a {form}, of names and values.")
    return content
