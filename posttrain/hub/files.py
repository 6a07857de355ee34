"""What of a run leaves the machine: an allow-list of files, and their texts without local paths."""

import json
import os
import re
from pathlib import Path

from posttrain import yaml_text
from posttrain.adapters import SIDE_FILE
from posttrain.errors import DataError
from posttrain.hub.base_model import is_hub_id
from posttrain.hub.config_secrets import config_without_secrets
from posttrain.hub.metadata import parse_card
from posttrain.hub.own_files import found, is_own_file, links_in, name_links
from posttrain.hub.passages import short_body, with_hub_ids
from posttrain.hub.repository import Destination
from posttrain.privacy import promise as promises
from posttrain.private import hide, without_secrets
from posttrain.saved import check_safetensors, check_shards, read_json, read_text, read_yaml

_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", SIDE_FILE)
_MODEL = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
)
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "processor_config.json",
    "preprocessor_config.json",
)
_REPORT = (*promises.FIGURES, "resolved_config.yaml", promises.FILE)
_CONFIGS = (
    "adapter_config.json",
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "processor_config.json",
    "preprocessor_config.json",
)
# of all that a run's folder may hold for a push
_ALL = (*_ADAPTER, *_MODEL, *TOKENIZER, *_REPORT, "README.md")
_FOLDER_SIGN = re.compile(r"[\\/]")
_WHOLE_PATH = re.compile(r"(?:~|[A-Za-z]:)?[\\/](?:.*[\\/])?([^\\/]*)[\\/]*")
# The folders of an absolute path; not those of a web address or a hub id
_FOLDERS = re.compile(r"(?<![\w.:/\\-])(?:~|[A-Za-z]:)?[\\/](?:[^\s\"',;:\\/]+[\\/])+")


def files_to_push(weights: Path, run: Path, destination: Destination) -> dict[str, Path | bytes]:
    """Return the files of a run, by their path in the repository: content where it was read or cleaned, else where
    it lies.

    Adapter or model and tokenizer come from `weights`, a checkpoint or the run itself; card, curves, metrics and
    resolved settings from `run`, as they are at this moment. Optimizer states, checkpoints and pickles never.
    Figures of private rows stay here unless the run says that they may be published.

    Raises:
        DataError: `weights` holds neither an adapter nor a model as safetensors, or a file cannot be read.
    """
    check_files(weights, run)
    for folder in dict.fromkeys((weights, run)):
        name_links(folder, _ALL)
    files = saved_weights(weights) | found(weights, TOKENIZER)
    is_adapter = "adapter_config.json" in files
    local_names = {name: destination.base_model_id for name in _local_bases(weights, run)}
    for name in _CONFIGS:
        if name in files:
            files[name] = _without_paths_in_config(files[name].read_bytes(), destination.base_model_id)
    for name, path in _report(run).items():
        files[name] = path.read_bytes()
    if "resolved_config.yaml" in files:
        files["resolved_config.yaml"] = _without_paths_in_yaml(files["resolved_config.yaml"])
    card = run / "README.md"
    text = read_text(card) if is_own_file(card, run) else ""
    local_names[str(run.resolve())] = destination.repo_id
    published = published_card(text, destination, is_adapter, local_names, title=run.resolve().name)
    files["README.md"] = published.encode()
    return files


def check_files(weights: Path, run: Path) -> None:
    """Refuse a run of which a file that is to be pushed is damaged.

    Args:
        weights: the folder of adapter or model, and tokenizer.
        run: the folder of card and settings.

    Raises:
        DataError: there are no weights, or a file is cut off, or not of the form that its name says; it is named.
    """
    for name, path in (saved_weights(weights) | found(weights, TOKENIZER)).items():
        if name.endswith(".safetensors"):
            check_safetensors(path)
        elif name.endswith(".index.json"):
            check_shards(path)
        elif name.endswith(".json"):
            read_json(path)
    for name, path in _report(run).items():
        if name.endswith(".yaml"):
            read_yaml(path)
    if is_own_file(run / "README.md", run):
        parse_card(read_text(run / "README.md"), run / "README.md")


def _report(run: Path) -> dict[str, Path]:
    """Return what a run tells beside its weights and may publish, by the names of the files."""
    files, promise = found(run, _REPORT), promises.read(run)
    withheld = promises.FIGURES if promise is not None and promise.withholds_metrics else ()
    return {name: path for name, path in files.items() if name not in withheld}


def saved_weights(folder: Path) -> dict[str, Path]:
    """Return the adapter, or else the model, in a folder: its config and safetensors, by their names.

    Raises:
        DataError: there is neither.
    """
    is_adapter = is_own_file(folder / "adapter_config.json", folder)
    files = found(folder, _ADAPTER if is_adapter else _MODEL)
    if not any(name.endswith(".safetensors") for name in files):
        needed = "adapter_model.safetensors" if is_adapter else "adapter_model.safetensors or model.safetensors"
        links = ", ".join(links_in(folder, (*_ADAPTER, *_MODEL)))
        but = f" but links, which are not followed ({links})" if links else ""
        raise DataError(
            f"{folder} holds no {needed}{but}, so there is nothing to push. Name the folder of a saved run."
        )
    return files


def published_card(
    text: str, destination: Destination, is_adapter: bool, local_names: dict[str, str], title: str = ""
) -> str:
    """Write a run's card as it stands in the repository.

    What a person wrote into it stays, metadata and evaluations included, without secrets. The base model and the
    repository get their hub ids, and where an adapter was merged, the lines that load it become those of a model.

    Args:
        text: the card in the run folder; a short one is made where it is empty.
        destination: the repository and the base model.
        is_adapter: whether an adapter is pushed, or a whole model.
        local_names: what to write in place of names that only this machine knows.
        title: the run folder's name; where it is the card's title, or names its evaluations, the repository's is.

    Raises:
        DataError: the card's metadata cannot be read.
    """
    base, repo_id = destination.base_model_id, destination.repo_id
    card = parse_card(text, "README.md")
    _hide_in_card(card)
    data, was, name = card.data, card.data.get("base_model"), repo_id.split("/")[1]
    dropped = () if is_adapter else ("lora",)
    tags = [tag for tag in _as_list(data.get("tags")) if tag not in dropped and not tag.startswith("base_model:")]
    data["library_name"] = "peft" if is_adapter else "transformers"
    data["tags"] = tags or None
    data["datasets"] = [name for name in _as_list(data.get("datasets")) if is_hub_id(name)] or None
    data["base_model"] = base
    data["pipeline_tag"] = data.get("pipeline_tag", "text-generation")
    if data.get("license") is None:
        for key, value in destination.license.items():
            data[key] = value
    for model in data.get("model-index", []) if isinstance(data.get("model-index"), list) else []:
        if title and isinstance(model, dict) and model.get("name") == title:
            model["name"] = name

    body = _titled(card.text, title, name) if title else card.text
    if not body.strip():
        body = short_body(base, repo_id, is_adapter)
    body = with_hub_ids(body, base, repo_id, is_adapter, was if isinstance(was, str) else None)
    card.text = "\n" + _replace_paths(body, local_names).lstrip()
    return str(card)


def clean_readme(folder: str | Path, base_model_id: str | None = None) -> None:
    """Take the local path of the base model out of the card that PEFT writes beside each adapter it saves.

    `base_model_id` stands in for it where it is known; the card then has no base model where it is not.
    """
    card = Path(folder) / "README.md"
    if not is_own_file(card, Path(folder)):
        return
    try:
        parsed = parse_card(read_text(card), card)
    except DataError:
        return
    local, base = _local_bases(Path(folder)), parsed.data.get("base_model")
    if isinstance(base, str) and not is_hub_id(base):
        local.add(base)
        parsed.data["base_model"] = base_model_id
    if not local:
        return
    tags = _as_list(parsed.data.get("tags"))
    parsed.data["tags"] = [tag for tag in tags if not tag.startswith("base_model:")]
    parsed.text = "\n" + _replace_paths(parsed.text, dict.fromkeys(local, base_model_id or "a local model")).lstrip()
    card.write_text(str(parsed), encoding="utf-8")


def _hide_in_card(card) -> None:
    """Hide secrets in a parsed card; `***` in the text of its metadata would be no YAML."""
    card.text = hide(card.text)
    held = vars(card.data)
    clean = without_secrets(held)
    if clean != held:
        held.clear()
        held.update(clean)


def _titled(card: str, folder_name: str, title: str) -> str:
    """Return the card under another title, where its own is the name of the run folder."""
    return re.sub(rf"^# {re.escape(folder_name)}$", f"# {title}", card, count=1, flags=re.MULTILINE)


def _local_bases(*folders: Path) -> set[str]:
    """Return the names of base models in the folders' adapter configs that mean something on this machine only."""
    names = set()
    for folder in folders:
        config = folder / "adapter_config.json"
        if is_own_file(config, folder):
            name = json.loads(config.read_text(encoding="utf-8")).get("base_model_name_or_path")
            names |= {name} if name and not is_hub_id(name) else set()
    return names


def _replace_paths(text: str, names: dict[str, str]) -> str:
    # Longest first: one may be a part of another. A bare word is no path, and may stand for something else.
    for name in sorted(filter(_FOLDER_SIGN.search, names), key=len, reverse=True):
        text = text.replace(name, names[name])
    return text


def _without_paths_in_config(content: bytes, base_model_id: str) -> bytes:
    config = json.loads(content)
    clean = config_without_secrets(config)
    if "base_model_name_or_path" in clean:
        if clean["base_model_name_or_path"] != base_model_id and "revision" in clean:
            clean["revision"] = None
        clean["base_model_name_or_path"] = base_model_id
    for name, value in clean.items():
        if isinstance(value, str) and os.path.isabs(value) and os.path.exists(value):
            clean[name] = base_model_id if name in ("_name_or_path", "name_or_path") else Path(value).name
    return content if clean == config else (json.dumps(clean, indent=2, ensure_ascii=False) + "\n").encode()


def _without_paths_in_yaml(content: bytes) -> bytes:
    clean = without_secrets(yaml_text.load(content.decode()))
    return yaml_text.dump(_without_folders(clean)).encode()


def _without_folders(value):
    """Return `value` with the last part only of each absolute path in its strings."""
    if isinstance(value, dict):
        return {name: _without_folders(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    return _WHOLE_PATH.sub(r"\1", value) if _WHOLE_PATH.fullmatch(value) else _FOLDERS.sub("", value)


def _as_list(value) -> list[str]:
    return [str(item) for item in (value if isinstance(value, list) else [] if value is None else [value])]
