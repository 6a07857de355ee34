"""The places of a run's own files in its folder: refused where a link, a pipe, a device or a folder stands there."""

import fnmatch
from collections.abc import Iterable
from pathlib import Path

from accelerate.utils import gather_object

from posttrain.adapters import SIDE_FILE
from posttrain.errors import ConfigError
from posttrain.mechanisms import initial_adapter, value_head
from posttrain.privacy import ledger
from posttrain.privacy import promise as promises
from posttrain.run import checkpoint_files as files
from posttrain.run import lock
from posttrain.run.markers import NOTE, partial_name
from posttrain.visible import listed, one_line
from posttrain.whole_files import not_plain

# What a run writes at the top of its folder beside the weights
BESIDE_WEIGHTS = (
    "README.md", "metrics.csv", "metrics.jsonl", "curves.png", "resolved_config.yaml", "training_args.bin",
    "config.json", "generation_config.json", "adapter_config.json", SIDE_FILE, files.TRAINER_STATE,
    *(name for name in files.TOKENIZER if "/" not in name),
)  # fmt: skip
# The folders that a run makes beside its checkpoints
_FOLDERS = (files.PARTIAL, "completions", "additional_chat_templates", initial_adapter.REFERENCE)
_FILES = (
    *BESIDE_WEIGHTS, *files.ADAPTER, *files.MODEL, "model-*-of-*.safetensors", "pytorch_model-*-of-*.bin",
    *(partial_name(name) for name in (NOTE, *files.ADAPTER)), NOTE, lock.NAME, "metrics.tmp", "all_results.json",
    "*_results.json", value_head.FILE, promises.FILE, ledger.FILE,
)  # fmt: skip


def check_places(output_dir: str | Path, adapters: Iterable[str] = ()) -> None:
    """Refuse a run folder where a link stands in the place of a file that a run writes: it would be followed.

    Folders in the places of files, and the reverse, are refused as well.

    The folder itself may be a link to a folder. Only names are looked at.

    Args:
        output_dir: the run folder; it may be missing.
        adapters: the names of the run's adapters, each of which PEFT saves into a folder of that name.

    Raises:
        ConfigError: it names the links, and the pipes, sockets, devices and folders that stand so.
    """
    own = {*_FOLDERS, *adapters}

    def is_in_own(name: str) -> bool:
        return name.split("/")[0] in own

    paths = not_plain(Path(output_dir), is_in_own)
    found = sorted(name for name in paths if is_in_own(name) or _is_file(name))
    if found:
        raise ConfigError(
            f"output_dir is {one_line(output_dir)}, where links (or pipes, or devices) stand in the places of files "
            f"that a run writes: {listed(found)}. What they lead to would be written over. Remove them, or choose "
            "another output_dir."
        )
    there = Path(output_dir).iterdir() if Path(output_dir).is_dir() else ()
    made = own - {"default"}
    found = sorted(path.name for path in there if (_is_file(path.name) if path.is_dir() else path.name in made))
    if found:
        raise ConfigError(
            f"output_dir is {one_line(output_dir)}, where folders stand in the places of files that a run writes, or "
            f"files in those of its folders: {listed(found)}. Remove them, or choose another output_dir."
        )


def _is_file(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, form) for form in _FILES)


def check_shared(checkpoint: Path) -> None:
    """Refuse, on every rank, a checkpoint that the main one found and another does not see; all ranks call it."""
    seen = gather_object([(checkpoint / files.TRAINER_STATE).is_file()])
    blind = [str(rank) for rank, sees in enumerate(seen) if not sees]
    if blind and seen[0]:
        raise ConfigError(
            f"the checkpoint {checkpoint} is there for rank 0 and not for rank {', '.join(blind)}, of {len(seen)}. All "
            "machines of a run must see one output_dir: put it on a disk that they share."
        )
