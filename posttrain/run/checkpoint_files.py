"""Files of a checkpoint folder: which run wrote them, whether they are whole, which training state is missing.

A folder is ours by one of two small files: the marker of a complete checkpoint, or the note that a save begins with and
that its marker takes the place of. A folder with neither belongs to someone else, and so does every file in ours that
the save did not write. Neither is deleted or written over.
"""

import fnmatch
import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from safetensors import safe_open

from posttrain.adapters import SIDE_FILE
from posttrain.errors import ConfigError
from posttrain.hub.files import TOKENIZER
from posttrain.private import without_secrets
from posttrain.run.markers import MARKER, SAVING, content_of, mark, partial_name
from posttrain.visible import one_line
from posttrain.whole_files import not_plain, sync

# the folder of a run in which a checkpoint lies until it is whole
PARTIAL = ".saving"
TRAINER_STATE = "trainer_state.json"
# the reference that `sync_ref_model` moves
REFERENCE = "posttrain_reference.safetensors"
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
MODEL = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_OPTIMIZER = (
    "optimizer.pt",
    "optimizer.bin",
    "optimizer_*/*",
    "rank*-of-*-optimizer.pt",
    "global_step*/*optim_states*",
)
# DeepSpeed keeps a schedule of its own with its engine
_SCHEDULER = ("scheduler.pt", "global_step*/*")
_RANDOM = ("rng_state.pth", "rng_state_*.pth")
_STATE = {"optimizer.pt": _OPTIMIZER, "scheduler.pt": _SCHEDULER, "rng_state.pth": _RANDOM}


# What a save writes, in the form of each engine
WRITTEN = (
    *ADAPTER, *MODEL, *_OPTIMIZER, *_SCHEDULER, *_RANDOM, *TOKENIZER, TRAINER_STATE, REFERENCE,
    "model-*-of-*.safetensors", "pytorch_model-*-of-*.bin", "pytorch_model_fsdp*", "adapter_config.json", "config.json",
    "generation_config.json", "README.md", "training_args.bin", "scaler.pt", "entropy_ctrl_state.json", "latest",
    "zero_to_*.py", "*/adapter_config.json", "*/adapter_model.safetensors", SIDE_FILE, f"*/{SIDE_FILE}",
    partial_name(ADAPTER[0]), partial_name(MARKER), partial_name(SAVING),
)  # fmt: skip

# What loading looks for, as a file or in a folder; PEFT takes every folder that has an adapter's file
_READ = (
    *ADAPTER, *MODEL, *_OPTIMIZER, *_SCHEDULER, *_RANDOM, TRAINER_STATE, REFERENCE, "model-*-of-*.safetensors",
    "pytorch_model-*-of-*.bin", "*pytorch_model_fsdp*", "*optimizer*", "adapter_config.json", "config.json",
    "scaler.pt", "latest", *(f"*/{name}" for name in ADAPTER),
)  # fmt: skip


def digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Return the SHA-256 of files, several at a time; what they hold is on the disk then."""

    def digest(name: str) -> str:
        sync(folder / name)
        with (folder / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    names = list(names)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def damage(folder: Path, weights_only: bool = False, by_content: bool = False) -> str:
    """Say which file of a complete checkpoint is not as it was saved, or none of its own; empty where all are.

    Args:
        folder: of the checkpoint.
        weights_only: optimizer, schedule and random state do not matter.
        by_content: compare digests too, which reads all of it; checkpoints of earlier versions have none.

    Raises:
        ConfigError: its marker cannot be read.
    """
    content = content_of(folder / MARKER)
    listed = {name: size for name, size in content.get("files", {}).items() if not (weights_only and is_state(name))}
    for name, size in listed.items():
        try:
            there = (folder / name).stat().st_size if (folder / name).is_file() else None
        except OSError as error:
            return f"{one_line(name)[:200]} cannot be read ({error.strerror})"
        if there != size:
            said = f"has {there} bytes instead of {one_line(size)}" if there is not None else "is missing"
            return f"{one_line(name)} {said}"
    if content.get("files") and (stray := _stray(folder, content["files"])):
        top = stray.partition("/")[0]
        moved = one_line(f"{top}/" if (folder / top).is_dir() else top)[:200]
        return (
            f"{one_line(stray)[:200]} was not saved with it, and loading would read it. Move {moved} out of the "
            "checkpoint"
        )
    saved = {name: digest for name, digest in content.get("digests", {}).items() if name in listed}
    if by_content:
        try:
            found = digests(folder, saved)
        except OSError as error:
            return f"{one_line(error.filename or 'a file')} cannot be read ({error.strerror})"
        changed = next((name for name in saved if found[name] != saved[name]), None)
        return "" if changed is None else f"{one_line(changed)} has another content than was saved"
    return ""


def _stray(folder: Path, listed: Iterable[str]) -> str | None:
    """Return what lies in a checkpoint that is none of its files, and that loading would read; None for nothing."""
    known = {str(path) for name in listed for path in (PurePosixPath(name), *PurePosixPath(name).parents)}
    there = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    return min((name for name in there if name not in known and _matches(name, _READ)), default=None)


def is_complete(folder: Path) -> bool:
    return (folder / MARKER).is_file()


def is_half_left(folder: Path, identity: dict | None = None) -> bool:
    """Return whether a save of ours, or of the run with this identity, began there and was not finished."""
    if is_complete(folder):
        return False
    if not (folder / SAVING).is_file():
        # killed before the note was whole, when there was nothing else yet
        return files_in(folder) == {partial_name(SAVING)}
    try:
        return identity is None or content_of(folder / SAVING)["identity"] == json.loads(
            json.dumps(without_secrets(identity))
        )
    except ConfigError:
        return False


def is_occupied(folder: Path) -> bool:
    """Return whether a save there would write over a file, a link or a checkpoint that is not ours, or could not."""
    if folder.is_symlink():
        return True
    if not folder.is_dir():
        return folder.exists()
    if any(map(_is_in_the_way, not_plain(folder, lambda name: True))) or _has_another_kind(folder):
        return True
    return not (is_complete(folder) or is_half_left(folder)) and any(map(_is_written, files_in(folder)))


def is_foreign(folder: Path) -> bool:
    """Return whether a folder is a checkpoint that another library wrote, or one that lost its marker."""
    if is_complete(folder) or is_half_left(folder) or not (folder / TRAINER_STATE).is_file():
        return False
    return any((folder / name).is_file() for name in ADAPTER + MODEL) or has(folder, "global_step*/*")


def files_in(folder: Path) -> set[str]:
    """Return the paths of all files in a folder, relative to it."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() or path.is_symlink()}


def has(folder: Path, *patterns: str) -> bool:
    return any(_matches(name, patterns) for name in files_in(folder))


def sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of each file that a save wrote, to compare on resumption."""
    names = sorted(files_in(folder) - {MARKER, SAVING})
    return {name: (folder / name).stat().st_size for name in names}


def put_in_place(partial: Path, folder: Path, content: dict) -> None:
    """Give a checkpoint that was saved under another name its own, with its marker; `content`: of the marker.

    A folder of that name is one of ours; what lies in it that is not ours stays.
    """
    names = sorted(content["files"])
    if not folder.exists():
        for inside in {(partial / name).parent for name in names} - {partial}:
            sync(inside)
        mark(partial, content)
        (partial / SAVING).unlink()
        os.rename(partial, folder)
        return sync(folder.parent)
    begin(folder, content["identity"])
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / name, folder / name)
    for inside in {folder / name for name in names}:
        sync(inside.parent)
    mark(folder, content)
    (folder / SAVING).unlink()
    remove(partial, set(names))


def partials(output_dir: Path) -> list[Path]:
    """Return the folders in which saves of ours began that have not ended."""
    return [path for path in (output_dir / PARTIAL).glob("*") if (path / SAVING).is_file() or is_complete(path)]


def begin(folder: Path, identity: dict) -> set[str]:
    """Prepare a folder for a save: write the note, then delete what an earlier save of ours left there.

    Returns the files that are not ours.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = own_files(folder)
    mark(folder, {"identity": identity}, SAVING)
    (folder / MARKER).unlink(missing_ok=True)
    _unlink(folder, own)
    return files_in(folder) - {SAVING}


def remove(folder: Path, own: set[str] | None = None) -> bool:
    """Delete what we wrote into a folder, and the folder if nothing else is in it; returns whether it is gone.

    A removal that is killed leaves an unfinished save behind, never a checkpoint that says that it is complete.
    `own`: our files; by default what the marker lists, or for an unfinished save what one writes.
    """
    if own is None:
        own = own_files(folder)
    if is_complete(folder):
        os.replace(folder / MARKER, folder / SAVING)
    _unlink(folder, own)
    (folder / SAVING).unlink(missing_ok=True)
    try:
        folder.rmdir()
    except OSError:
        return not folder.exists()
    return True


def own_files(folder: Path) -> set[str]:
    """Return the files of a folder that a save of ours wrote."""
    there = files_in(folder)
    try:
        if is_complete(folder):
            return there & content_of(folder / MARKER).get("files", {}).keys()
    except ConfigError:
        pass
    return set(filter(_is_written, there)) if is_complete(folder) or is_half_left(folder) else set()


def missing_state(folder: Path) -> list[str]:
    """Return the files of optimizer, schedule and random state that a checkpoint lacks to be resumed from."""
    there = files_in(folder)
    lost = [name for name, forms in _STATE.items() if not any(_matches(found, forms) for found in there)]
    if is_complete(folder):
        try:
            listed = content_of(folder / MARKER).get("files", {})
        except ConfigError:
            return lost
        lost += [name for name in listed if is_state(name) and name not in there and name not in lost]
    return lost


def is_state(name: str) -> bool:
    """Return whether a file holds optimizer, schedule or random state."""
    return any(_matches(name, forms) for forms in _STATE.values())


def check_adapter_fits(model, folder: Path, shapes: bool = True) -> None:
    """Refuse a checkpoint whose weights are not those that the run trains: upstream loads whatever matches.

    `shapes`: compare them too; they cannot be read where weights are partitioned.

    Raises:
        ConfigError: an adapter in the place of a model, or the reverse, or tensors of other names or shapes.
    """
    from accelerate.utils import is_peft_model
    from peft import get_peft_model_state_dict

    peft = is_peft_model(model)
    own = model.active_adapters[0] if peft else None
    # upstream loads every sub-folder that has an adapter's file, under the folder's name
    inside = [path for name in ADAPTER for path in folder.glob(f"*/{name}")] if peft else []
    known = own_files(folder) if is_complete(folder) else ()
    stray = sorted(
        path.parent.name
        for path in inside
        if (path.relative_to(folder).as_posix() not in known if known else path.parent.name not in model.peft_config)
    )
    if stray:
        raise ConfigError(
            f"the checkpoint {folder} holds an adapter in {stray[0]}/ that is none of this run's, and it would be "
            f"loaded with the checkpoint. Move {stray[0]}/ out of the checkpoint."
        )
    adapter = folder / ADAPTER[0]
    if not peft:
        if adapter.is_file():
            raise ConfigError(f"the checkpoint {folder} holds an adapter, and this run trains the whole model.")
        return
    if own != "default" and (folder / own / ADAPTER[0]).is_file():
        adapter = folder / own / ADAPTER[0]
    if not adapter.is_file():
        # an engine that spreads the weights keeps them in files of its own
        if (adapter.parent / ADAPTER[1]).is_file() or is_complete(folder) and has(folder, "pytorch_model_fsdp*"):
            return
        raise ConfigError(f"the checkpoint {folder} holds no adapter, and this run trains one.")
    ours = {name: tuple(value.shape) for name, value in get_peft_model_state_dict(model, adapter_name=own).items()}
    with safe_open(adapter, "pt") as tensors:
        theirs = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    differing = sorted(ours.keys() ^ theirs.keys())
    if shapes and not differing:
        differing = sorted(name for name in ours if ours[name] != theirs[name])
    if differing:
        raise ConfigError(
            f"the adapter in the checkpoint {folder} is not the one of this run: {len(differing)} tensors differ in "
            f"name or shape ({differing[0]} among them). Give the run the rank and the target modules of that one."
        )


def _unlink(folder: Path, names: set[str]) -> None:
    real = folder.resolve()
    for name in names:
        path = folder / name
        # nothing behind a link, or outside
        if path.parent.resolve() == (real / name).parent and (real / name).is_relative_to(real):
            path.unlink(missing_ok=True)
    for path in sorted((p for p in folder.rglob("*") if p.is_dir() and not p.is_symlink()), reverse=True):
        inside = f"{path.relative_to(folder).as_posix()}/"
        if any(name.startswith(inside) for name in names) and not any(path.iterdir()):
            path.rmdir()


def _is_in_the_way(link: str) -> bool:
    """Return whether a save would write to this path, or to one behind it if it is a link to a folder."""
    behind = (form.partition("/")[0] for form in WRITTEN if "/" in form and not form.startswith("*"))
    return link in (MARKER, SAVING) or _is_written(link) or any(fnmatch.fnmatchcase(link, form) for form in behind)


def _has_another_kind(folder: Path) -> bool:
    """Return whether a folder stands where a save writes a file, or a file where it makes a folder."""
    files = [form for form in (*WRITTEN, MARKER, SAVING) if not form.endswith("*")]
    folders = [form.partition("/")[0] for form in WRITTEN if "/" in form and not form.startswith("*")]
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        # a star stands for slashes as well
        forms = files if path.is_dir() else folders if "/" not in name else ()
        if any(fnmatch.fnmatchcase(name, form) for form in forms):
            return True
    return False


def _is_written(name: str) -> bool:
    return _matches(name, WRITTEN)


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}/*") for pattern in patterns)
