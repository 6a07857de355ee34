"""Checkpoints that are either complete or not there: a marker, the newest marked one, rotation, a run's identity.

A checkpoint counts only with its marker, a small JSON file that the main process writes after every rank has saved. A
run that is killed while it saves leaves a folder without one, which is never resumed from and is cleared away later.
A run folder that holds what another run left is refused, so that no folder mixes two.
"""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import xxhash
from safetensors import SafetensorError
from transformers import TrainerCallback

from posttrain.errors import ConfigError, EnvironmentIssue
from posttrain.hub.base import adapter_config, base_name, loaded_from
from posttrain.log import get_logger

MARKER = "posttrain_complete.json"
# In the run folder: whose model lies there.
NOTE = "posttrain_run.json"
_WEIGHTS = (
    "adapter_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "adapter_model.bin",
    "pytorch_model.bin",
)
# Columns of rows that were tokenised before the run
_TOKENS = ("prompt_ids", "chosen_ids", "rejected_ids", "input_ids", "labels")
# Settings on which an update depends; the number of steps is not among them, as runs are made longer
_UPDATE = (
    "data_seed", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args",
    "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16",
    "train_sampling_strategy",
)  # fmt: skip
_FOLDER = re.compile(r"checkpoint-(\d+)")


def fingerprint(dataset) -> str | None:
    """A digest of the tokens of a prepared dataset, in order; None for a stream."""
    tokens = [name for name in _TOKENS if name in (dataset.column_names or ())]
    columns = tokens and tokens + [name for name in ("flip_rate", "reward") if name in dataset.column_names]
    if not hasattr(dataset, "__len__"):
        return None
    if not columns:
        # not tokenised before the run: prompts for rollouts, with what rewards read
        digest = xxhash.xxh3_128(f"{len(dataset)}|{sorted(dataset.column_names)}".encode())
        for row in dataset:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return digest.hexdigest()
    digest = xxhash.xxh3_128(f"{len(dataset)}|{columns}".encode())
    for batch in dataset.select_columns(columns).with_format("numpy").iter(1000):
        for name in columns:
            for value in batch[name]:
                digest.update(value.tobytes())
                digest.update(b"|")
    return digest.hexdigest()


def identity(trainer) -> dict:
    """What a run must share with the one it resumes, or else goes on with other numbers."""
    args, source, adapter = trainer.args, loaded_from(trainer.model), adapter_config(trainer.model)
    return {
        "method": type(trainer).__name__,
        # of a local folder its name alone, as it may lie elsewhere by the time the run goes on
        "model": base_name(source) or (Path(source).name if source else None),
        "adapter": f"{adapter.peft_type.value} r {getattr(adapter, 'r', None)}" if adapter else None,
        "data": fingerprint(trainer.train_dataset),
        "seed": args.seed,
        "world_size": trainer.accelerator.num_processes,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        **trainer.identity_settings(),
    }


def update_settings(trainer) -> dict:
    """What else a run must share with the checkpoint it goes on from; one that starts anew may change it."""
    adapter = adapter_config(trainer.model)
    shape = ("lora_alpha", "lora_dropout", "use_rslora", "use_dora") if adapter else ()
    settings = {name: _plain(getattr(trainer.args, name)) for name in _UPDATE}
    return settings | {name: _plain(getattr(adapter, name, None)) for name in shape}


def mark(folder: Path, content: dict, name: str = MARKER) -> None:
    """Write the marker at once, so that it is never half there."""
    partial = folder / f".{name}.partial"
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, folder / name)


def check_folder(output_dir: str | Path, now: dict) -> None:
    """Refuse a run folder with the model, or the complete checkpoints, of another run.

    Args:
        output_dir: the folder; missing or empty is as good as any.
        now: what is known of the run that wants to write there, by name: names of its identity, and others.

    Raises:
        ConfigError: it is another run's, or holds a model of which no run says that it is its own.
    """
    folder = Path(output_dir)
    weights = next((name for name in _WEIGHTS if (folder / name).is_file()), None)
    newest = next(reversed(complete(folder)), None)
    advice = (
        "Choose another output_dir, or delete that one. `resume_from_checkpoint` goes on with the same settings and "
        "data only; to write there all the same, set `check_resume: false`."
    )
    if weights is None and newest is None:
        return
    note = folder / NOTE if weights is not None else newest / MARKER
    if not note.is_file():
        raise ConfigError(
            f"output_dir is {output_dir}, which holds a model ({weights}) that no run has noted as its own. {advice}"
        )
    then = _content(note)["identity"]
    shared = now.keys() & then
    differing = _differing({name: now[name] for name in shared}, {name: then[name] for name in shared})
    if differing:
        what = "a model" if weights is not None else "checkpoints"
        raise ConfigError(
            f"output_dir is {output_dir}, which holds {what} written by another run ({differing}). {advice}"
        )


class RunFolder(TrainerCallback):
    """Keeps a run folder to one run: refuses another's at construction, and notes in it whose model it holds.

    Raises ConfigError as `check_folder` does. A run with the same identity may start anew.
    """

    def __init__(self, trainer):
        self._trainer = trainer
        folder = Path(trainer.args.output_dir)
        # the identity takes a pass over the data, which a new folder does not need
        if trainer.args.check_resume and ((folder / NOTE).is_file() or complete(folder)):
            check_folder(folder, trainer._identity())

    def on_train_begin(self, args, state, control, **kwargs):
        left = complete(args.output_dir)
        if state.global_step == 0 and left and state.is_world_process_zero:
            get_logger().warning(
                "%s holds checkpoints of an earlier run, up to step %s; this run starts anew beside them. "
                "`resume_from_checkpoint: auto` would have gone on from there.",
                args.output_dir,
                left[-1].name.removeprefix("checkpoint-"),
            )

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            mark(Path(args.output_dir), {"identity": self._trainer._identity()}, NOTE)


def complete(output_dir: str | Path) -> list[Path]:
    """The checkpoints with a marker, oldest step first."""
    return [path for path in _folders(output_dir) if _marker(path).exists()]


def rotate(output_dir: str | Path, keep: int | None, best: str | None) -> None:
    """Delete folders without a marker, and all but the newest `keep` and the best complete checkpoints.

    The newest are those written last: a run that starts anew may stand beside further steps of an earlier one.
    """
    marked = sorted(complete(output_dir), key=lambda folder: _marker(folder).stat().st_mtime_ns)
    kept = {path.resolve() for path in (marked[-keep:] if keep and keep > 0 else marked)}
    if best is not None:
        kept.add(Path(best).resolve())
    for folder in _folders(output_dir):
        if folder.resolve() not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def find(output_dir: str | Path, wanted: str | bool | None) -> Path | None:
    """The checkpoint to resume from.

    Args:
        output_dir: the run folder.
        wanted: None or False for none; True for the newest complete one, an error if there is none; "auto" for the
            newest complete one if there is any; or a path.

    Raises:
        ConfigError: no complete checkpoint where one was asked for.
    """
    if wanted is None or wanted is False or str(wanted).lower() in ("false", "none"):
        return None
    newest = next(reversed(complete(output_dir)), None)
    if str(wanted).lower() == "auto":
        return newest
    if wanted is True or str(wanted).lower() == "true":
        if newest is None:
            partial = [path.name for path in _folders(output_dir)]
            found = f"only incomplete ones ({', '.join(partial)})" if partial else "none"
            raise ConfigError(
                f"resume_from_checkpoint is true, but {output_dir} holds no complete checkpoint: {found}. Leave it out "
                "to start anew, or set `resume_from_checkpoint: auto`."
            )
        return newest
    folder = Path(wanted)
    if _marker(folder).exists():
        return folder
    inside = next(reversed(complete(folder)), None)
    if inside is not None:
        raise ConfigError(f"resume_from_checkpoint is {wanted}, which is a run folder; give a checkpoint: {inside}.")
    hint = f" The newest complete one in {output_dir} is {newest}." if newest else ""
    if folder.is_dir():
        raise ConfigError(f"resume_from_checkpoint is {wanted}, which is not complete (no {MARKER} in it).{hint}")
    raise ConfigError(
        f"resume_from_checkpoint is {wanted}, which does not exist (working folder: {Path.cwd()}). It takes true, "
        f"auto, or the path of a checkpoint.{hint}"
    )


def read(folder: Path, now: dict | None) -> dict:
    """The marker's content; ConfigError for a checkpoint that is damaged, or of other settings than `now`.

    `now`: identity and update settings of the run that resumes; None to take any.
    """
    content = _content(folder / MARKER)
    for name, size in content.get("files", {}).items():
        there = (folder / name).stat().st_size if (folder / name).is_file() else None
        if there != size:
            what = f"has {there} bytes instead of {size}" if there is not None else "is missing"
            raise ConfigError(
                f"the checkpoint {folder} is damaged: {name} {what}. Resume from another one, or delete it."
            )
    then = content["identity"] | content.get("update", {})
    differing = "" if now is None else _differing(now, then)
    if differing:
        raise ConfigError(
            f"the checkpoint {folder} was written by another run ({differing}). Resume with the same settings and "
            "data, or start anew in another output_dir. To go on all the same, set `check_resume: false`."
        )
    return content


@contextlib.contextmanager
def complete_or_not_there(trainer):
    """Around the saving of a checkpoint by all ranks: the marker last, then rotation.

    Raises:
        EnvironmentIssue: the disk is full or cannot be written to; the last complete checkpoint is left as it is.
    """
    output_dir, main = trainer.args.output_dir, trainer.accelerator.is_main_process
    folder = Path(output_dir) / f"checkpoint-{trainer.state.global_step}"
    if main:
        (folder / MARKER).unlink(missing_ok=True)
    trainer.accelerator.wait_for_everyone()
    # Upstream would rotate before the marker is written, and might delete the last complete checkpoint
    limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None
    try:
        yield
        trainer.accelerator.wait_for_everyone()
        if main:
            state = {"num_tokens": trainer._total_train_tokens}
            content = {"identity": trainer._identity(), "update": update_settings(trainer)}
            mark(folder, content | {"state": state, "files": _sizes(folder)})
    except (OSError, SafetensorError, RuntimeError) as error:
        if not is_write_error(error):
            raise
        shutil.rmtree(folder, ignore_errors=True)
        last = next(reversed(complete(output_dir)), None)
        kept = f"The last complete one is {last}; go on from it with `resume_from_checkpoint: auto`." if last else ""
        raise EnvironmentIssue(f"the checkpoint {folder} could not be saved: {error}. {kept}") from error
    finally:
        trainer.args.save_total_limit = limit
    if main:
        rotate(output_dir, limit, trainer.state.best_model_checkpoint)


def _plain(value):
    """As JSON will hold it, an enumeration by its value."""
    return json.loads(json.dumps(getattr(value, "value", value), default=str))


def _content(path: Path) -> dict:
    """What a marker or a note says; ConfigError if it is damaged."""
    try:
        content = json.loads(path.read_text())
        if isinstance(content["identity"], dict):
            return content
    except (ValueError, KeyError, TypeError):
        pass
    raise ConfigError(f"{path} is damaged, so nothing says what run wrote {path.parent}. Delete that folder.")


def _sizes(folder: Path) -> dict[str, int]:
    """Bytes of each file of a checkpoint, which a resumption looks for again."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MARKER)
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}


def is_write_error(error: Exception) -> bool:
    """Whether a disk that is full or cannot be written to is behind it; torch.save has a RuntimeError for that."""
    return not isinstance(error, RuntimeError) or any(words in str(error) for words in ("inline_container", "write"))


def _differing(now: dict, then: dict) -> str:
    """What of two identities differs, in words; empty if nothing does."""
    names = [name for name in sorted(now.keys() | then) if now.get(name) != then.get(name)]
    # digests of data say nothing to a reader
    words = {"data": "data: other rows there than here"}
    return "; ".join(words.get(name, f"{name}: {then.get(name)} there, {now.get(name)} here") for name in names)


def _marker(folder: Path) -> Path:
    return folder / MARKER


def _folders(output_dir: str | Path) -> list[Path]:
    root = Path(output_dir)
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found)]
