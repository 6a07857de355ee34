"""A run folder belongs to one run: refused to another, noted where a model is saved, replaced where that is asked."""

import math
import re
import shutil
from pathlib import Path

from transformers import TrainerCallback

from posttrain.errors import ConfigError
from posttrain.hub.base import loaded_from
from posttrain.log import get_logger
from posttrain.trainers import _checkpoint_files as files
from posttrain.trainers import _checkpoints
from posttrain.trainers._checkpoint_files import MARKER, mark
from posttrain.trainers._identity import differing

# In the run folder: whose model lies there, and of which files it consists.
NOTE = "posttrain_run.json"
_SHARD = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")
_KEPT_README = "README.before.md"
# what `log_completions` writes, a file a step
_COMPLETIONS = "completions/completions_*.parquet"


def check_args(args, method: str | None) -> None:
    """Refuse the run folder that settings name, as far as they tell, before data and model are there.

    Args:
        args: the trainer's config.
        method: the trainer's class, where it is known.

    Raises:
        ConfigError: as `check_folder` and `check_way` do.
    """
    known = vars(args) | ({"method": method} if method else {})
    check_folder(args.output_dir, known if args.check_resume and not args.overwrite else {})
    if args.check_resume and args.max_steps > 0 and not hasattr(args, "steps_per_generation"):
        # a checkpoint of another library is not resumed from, so the run begins at one of ours or at step 0
        newest = next(reversed(_checkpoints.complete(args.output_dir)), None)
        check_way(args, _checkpoints.step_of(newest) if newest else 0, args.max_steps)


def check_folder(output_dir: str | Path, now: dict) -> None:
    """Refuse a run folder with the model, or the complete checkpoints, of another run, or anyone else's model.

    Args:
        output_dir: the folder; missing or empty is as good as any.
        now: what is known of the run that wants to write there, by name: names of its identity, and others. Empty
            where it may take the place of another run.

    Raises:
        ConfigError: it is another run's, or holds a model of which no run says that it is its own.
    """
    folder = Path(output_dir)
    weights = _weights(folder)
    if weights is not None and not (folder / NOTE).is_file():
        raise ConfigError(
            f"output_dir is {output_dir}, which holds a model ({weights}) that no run has noted as its own, and that "
            "this one would write over. Choose another output_dir."
        )
    newest = next(reversed(_checkpoints.complete(folder)), None)
    if not now or weights is None and newest is None:
        return
    then = files.content_of(folder / NOTE if weights is not None else newest / MARKER)["identity"]
    shared = now.keys() & then
    told = differing({name: now[name] for name in shared}, {name: then[name] for name in shared})
    if told:
        what = "a model" if weights is not None else "checkpoints"
        raise ConfigError(
            f"output_dir is {output_dir}, which holds {what} written by another run ({told}). Choose another "
            "output_dir, or set `overwrite: true`: what that run wrote is then replaced, and nothing else. To go on "
            "from its checkpoints with these settings, set `check_resume: false`."
        )


def check_way(args, begun: int, steps: int, save_steps: int | None = None, any_step: bool = False) -> None:
    """Refuse a run folder where something that is not ours lies where this run is going to save.

    Args:
        args: the trainer's config.
        begun: the step that the run begins at.
        steps: the step that it ends at.
        save_steps: how many lie between two saves; of the settings by default.
        any_step: a save may fall on any step, whatever the settings say.

    Raises:
        ConfigError: a file, a link, or a checkpoint that another library wrote, of a step that is going to be saved.
    """
    strategy = getattr(args.save_strategy, "value", args.save_strategy)
    if strategy == "no":
        return
    every = save_steps or (args.save_steps if args.save_steps >= 1 else math.ceil(steps * args.save_steps))
    for folder in _checkpoints.folders(args.output_dir):
        step = _checkpoints.step_of(folder)
        saved = any_step or strategy != "steps" or step % every == 0 or step == steps
        if begun < step <= steps and saved and files.is_occupied(folder):
            raise ConfigError(
                f"output_dir is {args.output_dir}, which holds {folder.name}, and posttrain did not write it: the "
                f"checkpoint of step {step} would be written over it. Choose another output_dir."
            )


def check_start_stays(args, model) -> None:
    """Refuse `overwrite` where it would delete the weights that the run starts from."""
    source = loaded_from(model)
    if not args.overwrite or not source or not Path(source).exists():
        return
    if Path(source).resolve().is_relative_to(Path(args.output_dir).resolve()):
        raise ConfigError(
            f"overwrite is true, and the model that the run starts from, {source}, lies in output_dir "
            f"{args.output_dir}, where it would be deleted. Choose another output_dir."
        )


class RunFolder(TrainerCallback):
    """Keeps a run folder to one run: refuses another's at construction, or replaces it when training begins.

    Raises ConfigError as `check_folder` and `check_way` do. A run with the same identity may start anew.
    """

    def __init__(self, trainer):
        self._trainer = trainer
        args, folder = trainer.args, Path(trainer.args.output_dir)
        # the identity takes a pass over the data, which a new folder does not need
        if args.check_resume and not args.overwrite and ((folder / NOTE).is_file() or _checkpoints.complete(folder)):
            check_folder(folder, trainer._identity())

    def on_train_begin(self, args, state, control, **kwargs):
        check_way(args, state.global_step, state.max_steps, state.save_steps, self._trainer.saves_may_wait)
        if state.global_step or not state.is_world_process_zero:
            return
        left = _checkpoints.complete(args.output_dir)
        if args.overwrite:
            replace(args.output_dir)
        elif left:
            ready = _checkpoints.find(args.output_dir, "auto", weights_only=args.resume_weights_only)
            would = f"`resume_from_checkpoint: auto` would have gone on from {ready.name}, " if ready else ""
            get_logger().warning(
                "%s holds checkpoints of an earlier run, up to step %s; this run starts anew beside them. "
                "%s`overwrite: true` would have replaced them.",
                args.output_dir,
                _checkpoints.step_of(left[-1]),
                would,
            )


def begin_note(folder: Path, identity: dict) -> set[str]:
    """Note in a run folder whose model is going to be saved there; returns the files that are there before."""
    folder.mkdir(parents=True, exist_ok=True)
    _keep_readme(folder)
    before = _top_files(folder)
    note_model(folder, identity, before)
    return before


def _keep_readme(folder: Path) -> None:
    """Copy a README that no run wrote to another name: the model's card is going to take its own."""
    readme, kept = folder / "README.md", folder / _KEPT_README
    if readme.is_file() and not (folder / NOTE).is_file() and not kept.exists():
        shutil.copy2(readme, kept)
        get_logger().warning("%s was there before this run, whose card takes its name; it is kept as %s", readme, kept)


def note_model(folder: Path, identity: dict, before: set[str]) -> None:
    """Note in a run folder whose model lies there: all files that were not there `before`, or were noted already."""
    there = _top_files(folder)
    mark(folder, {"identity": identity, "files": sorted(there & (_noted(folder) | (there - before)))}, NOTE)


def replace(output_dir: str | Path) -> None:
    """Delete what earlier runs left in a run folder: checkpoints with our marker or note, and the noted model's files.

    Reports and value heads are written over by the run itself. What no run of ours wrote stays.
    """
    folder = Path(output_dir)
    own = [path for path in _checkpoints.folders(folder) if path.is_dir() and not path.is_symlink()]
    own = [path for path in own if files.is_complete(path) or files.is_half_left(path)]
    for path in own:
        _checkpoints.clear(path)
    noted = _noted(folder)
    if (folder / NOTE).is_file():
        noted |= {path.relative_to(folder).as_posix() for path in folder.glob(_COMPLETIONS)}
    for name in noted:
        (folder / name).unlink(missing_ok=True)
    if own or noted:
        get_logger().info(
            "overwrite: %s of an earlier run deleted from %s",
            ", ".join([*(path.name for path in own), *(["its model"] if noted else [])]),
            output_dir,
        )
    (folder / NOTE).unlink(missing_ok=True)


def _noted(folder: Path) -> set[str]:
    if not (folder / NOTE).is_file():
        return set()
    listed = files.content_of(folder / NOTE).get("files", [])
    return {name for name in listed if isinstance(name, str) and Path(name).name == name}


def _top_files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()} - {NOTE} if folder.is_dir() else set()


def _weights(folder: Path) -> str | None:
    """The name of a model's or an adapter's weights in a folder."""
    if not folder.is_dir():
        return None
    known = next((name for name in files.ADAPTER + files.MODEL if (folder / name).is_file()), None)
    return known or next((path.name for path in folder.iterdir() if _SHARD.fullmatch(path.name)), None)
