"""A run folder belongs to one run: refused to another, noted where a model is saved, replaced where that is asked."""

import fnmatch
import math
import re
import shutil
from pathlib import Path

from transformers import TrainerCallback

from posttrain.config.setting import before_declared, identity_of
from posttrain.errors import ConfigError, EnvironmentIssue
from posttrain.hub.base_model import loaded_from
from posttrain.log import get_logger
from posttrain.run import best, checkpoints, lock, training_state
from posttrain.run import checkpoint_files as files
from posttrain.run.identity import differing, update_of, update_settings
from posttrain.run.markers import MARKER, NOTE, content_of, mark
from posttrain.run.places import BESIDE_WEIGHTS, check_places
from posttrain.visible import one_line

_SHARD = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.(safetensors|bin)")
# Other libraries' and other programs' forms of weights
_FOREIGN_WEIGHTS = (
    "consolidated*.pth", "consolidated*.safetensors", "*.gguf", "tf_model.h5", "flax_model.msgpack", "*model*.bin",
    "ggml*.bin",
)  # fmt: skip
# what `log_completions` writes, a file a step
_COMPLETIONS = "completions/completions_*.parquet"


def check_args(args, method: str | None) -> None:
    """Refuse the run folder of another run, as far as the settings tell, before data and model are loaded.

    Args:
        args: the trainer's config.
        method: the trainer's class, where it is known.

    Raises:
        ConfigError: as `check_places`, `check_folder` and `check_way` do.
    """
    check_places(args.output_dir)
    known = vars(args) | identity_of(args) | update_of(args) | ({"method": method} if method else {})
    known = {name: value for name, value in known.items() if name not in args.known_later}
    asked = known if args.check_resume and not args.overwrite else {}
    check_folder(args.output_dir, asked, before_declared(type(args)))
    if args.check_resume and args.max_steps > 0 and not hasattr(args, "steps_per_generation"):
        # a checkpoint of another library is not resumed from, so the run begins at one of ours or at step 0
        newest = next(reversed(checkpoints.complete(args.output_dir)), None)
        check_way(args, checkpoints.step_of(newest) if newest else 0, args.max_steps)


def check_folder(output_dir: str | Path, now: dict, before: dict | None = None) -> None:
    """Refuse a run folder with the model, or the complete checkpoints, of another run, or anyone else's model.

    Args:
        output_dir: the folder; missing or empty is as good as any.
        now: what is known of the run that wants to write there, by name: of its identity, of the settings its updates
            depend on, and others. Empty where it may take the place of another run.
        before: what settings count as that a run of an earlier version did not tell.

    Raises:
        ConfigError: it is another run's, or holds a model of which no run says that it is its own.
    """
    folder = Path(output_dir)
    weights = _weights(folder)
    if weights is not None and not (folder / NOTE).is_file():
        raise ConfigError(
            f"output_dir is {output_dir}, which holds a model ({weights}) that no run has noted as its own, and whose "
            "place this one would take. Choose another output_dir."
        )
    newest = next(reversed(checkpoints.complete(folder)), None)
    if not now or weights is None and newest is None:
        return
    then = checkpoints.settings_of(content_of(folder / NOTE if weights is not None else newest / MARKER))
    told = differing(now, then, before)
    if told:
        what = "a model" if weights is not None else "checkpoints"
        raise ConfigError(
            f"output_dir is {output_dir}, which holds {what} written by another run ({told}). Choose another "
            "output_dir, or set `overwrite: true`: what that run wrote is then replaced, and nothing else. To go on "
            "from its checkpoints with these settings, set `check_resume: false`."
        )


def check_way(args, begun: int, steps: int, save_steps: int | None = None, any_step: bool = False) -> None:
    """Refuse a run folder where something that is not ours lies in the place of a checkpoint to come.

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
    for folder in checkpoints.folders(args.output_dir):
        step = checkpoints.step_of(folder)
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
        check_free(trainer)

    def on_train_begin(self, args, state, control, **kwargs):
        self._trainer._finished_at = None
        if self._trainer.resumed_from is not None:
            training_state.check_intervals(args, state, self._trainer.resumed_from)
            # upstream goes on with those of the checkpoint
            state.compute_steps(args, state.max_steps)
            best.find_again(self._trainer, self._trainer.resumed_from)
        check_way(args, state.global_step, state.max_steps, state.save_steps, self._trainer.saves_may_wait)
        if not state.is_world_process_zero:
            return
        if not state.global_step:
            self._begin_anew(args)
        note_run(Path(args.output_dir), self._trainer)
        unfinish(Path(args.output_dir))

    def _begin_anew(self, args) -> None:
        folder, left = Path(args.output_dir), checkpoints.complete(args.output_dir)
        if args.overwrite:
            replace(args.output_dir)
        elif left:
            # a damaged one would have been passed over
            ready = checkpoints.find(args.output_dir, "auto", weights_only=args.resume_weights_only, by_content=True)
            would = f"`resume_from_checkpoint: auto` would have gone on from {ready.name}, " if ready else ""
            get_logger().warning(
                "%s holds checkpoints of an earlier run, up to step %s; this run starts anew beside them. It replaces "
                "those of steps that it saves too%s. %s`overwrite: true` would have replaced them all.",
                args.output_dir,
                checkpoints.step_of(left[-1]),
                ", and the model" if _weights(folder) else "",
                would,
            )
        elif _weights(folder):
            get_logger().warning("%s holds the model of an earlier run; this run is going to replace it", folder)


def check_free(trainer) -> None:
    """Refuse the run folder of a trainer where it is another run's, unless it may take that one's place.

    Raises:
        ConfigError: as `check_folder` does.
    """
    args, folder = trainer.args, Path(trainer.args.output_dir)
    # the identity takes a pass over the data, which a new folder does not need
    if args.check_resume and not args.overwrite and ((folder / NOTE).is_file() or checkpoints.complete(folder)):
        check_folder(folder, trainer._identity() | update_settings(trainer), before_declared(type(args)))


def claim(folder: Path, trainer) -> None:
    """Take a run folder before the first write, on the main process: keep others' files, note whose run it is.

    Raises:
        EnvironmentIssue: the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        keep_others(folder)
        note_run(folder, trainer)
    except OSError as error:
        raise EnvironmentIssue(f"{folder} cannot be written to: {error.strerror or error}") from error


def note_run(folder: Path, trainer) -> None:
    """Note whose run a folder belongs to; the note of a model that lies there stays until another is saved."""
    if _weights(folder) is None:
        _note(folder, trainer, _noted(folder))


def check_not_anothers(folder: Path, trainer) -> None:
    """Refuse to save a model into the run folder of another run, whose note and card would then describe it.

    Raises:
        ConfigError: it has a note of a run with other settings.
    """
    if not (folder / NOTE).is_file():
        return
    then = checkpoints.settings_of(content_of(folder / NOTE))
    told = differing(trainer._identity() | update_settings(trainer), then, before_declared(type(trainer.args)))
    if told:
        raise ConfigError(
            f"the model cannot be saved to {folder}, which is the folder of another run ({told}). Save it elsewhere."
        )


def begin_note(folder: Path, trainer) -> set[str]:
    """Note in a run folder whose model is about to be saved; returns the files that are there before."""
    folder.mkdir(parents=True, exist_ok=True)
    keep_others(folder)
    before = _top_files(folder)
    note_model(folder, trainer, before)
    return before


def keep_others(folder: Path) -> None:
    """Copy files that no run wrote to other names where this run is going to write over them."""
    if (folder / NOTE).is_file() or not folder.is_dir():
        return
    if any(files.is_complete(path) or files.is_half_left(path) for path in checkpoints.folders(folder)):
        return
    kept = []
    for path in (folder / name for name in BESIDE_WEIGHTS):
        other = path.with_name(f"{path.stem}.before{path.suffix}")
        if path.is_file() and not other.exists():
            shutil.copy2(path, other)
            kept.append(f"{path.name} is kept as {other.name}")
    if kept:
        get_logger().warning(
            "%s holds files that no run has noted as its own, and whose names this one takes: %s",
            folder,
            ", ".join(kept),
        )


def note_model(folder: Path, trainer, before: set[str]) -> None:
    """Note in a run folder which run's model lies there: all files not there `before`, or noted already."""
    there = _top_files(folder)
    _note(folder, trainer, there & (_noted(folder) | (there - before)), _finish(trainer))


def _note(folder: Path, trainer, own: set[str], finish: dict | None = None) -> None:
    content = {"identity": trainer._identity(), "update": update_settings(trainer), "files": sorted(own)}
    mark(folder, content | ({"finished": finish} if finish else {}), NOTE)


def _finish(trainer) -> dict | None:
    """Return at which step of which length of run a trainer's training has come to its end; None where it has not."""
    if trainer._finished_at is None:
        return None
    return {"step": trainer._finished_at} | _length(trainer.args)


def _length(args) -> dict:
    return {"max_steps": args.max_steps, "num_train_epochs": args.num_train_epochs}


def check_unfinished(trainer, found: Path | None) -> None:
    """Refuse to go on by itself from a checkpoint of a run that was finished since, whose model would be replaced.

    A run that is to be longer than it was goes on from there with a warning.

    Args:
        trainer: of the run that resumes.
        found: the newest checkpoint.

    Raises:
        ConfigError: the model of the finished run lies in the folder, and no checkpoint of its last step.
    """
    args, folder = trainer.args, Path(trainer.args.output_dir)
    if found is None or args.overwrite or _weights(folder) is None or not (folder / NOTE).is_file():
        return
    finish, step = content_of(folder / NOTE).get("finished"), checkpoints.step_of(found)
    if not isinstance(finish, dict) or type(finish.get("step")) is not int or finish["step"] <= step:
        return
    said = (
        f"{one_line(args.output_dir)} holds the model of this run, which was finished at step {finish['step']}, and "
        f"no checkpoint later than {found.name}"
    )
    if {name: finish.get(name) for name in _length(args)} != _length(args):
        get_logger().warning("%s: the run goes on from there, and its model is going to replace that one", said)
        return
    raise ConfigError(
        f"{said}: there is nothing to go on with. To train from that checkpoint again, in the place of the model, name "
        f"it: `resume_from_checkpoint: {found}`. To keep a checkpoint of the last step, set `save_strategy: steps`."
    )


def unfinish(folder: Path) -> None:
    """Take out of a run folder's note that the run was finished, as it goes on or begins anew."""
    if (folder / NOTE).is_file():
        content = content_of(folder / NOTE)
        if content.pop("finished", None) is not None:
            mark(folder, content, NOTE)


def replace(output_dir: str | Path) -> None:
    """Delete what earlier runs left in a run folder: checkpoints with our marker or note, and the noted model's files.

    Reports and value heads are written over by the run itself. What no run of ours wrote stays.
    """
    folder = Path(output_dir)
    own = [path for path in checkpoints.folders(folder) if path.is_dir() and not path.is_symlink()]
    own = [path for path in own if files.is_complete(path) or files.is_half_left(path)] + files.partials(folder)
    for path in own:
        checkpoints.clear(path)
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
    listed = content_of(folder / NOTE).get("files", [])
    return {name for name in listed if isinstance(name, str) and Path(name).name == name}


def _top_files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()} - {NOTE, lock.NAME} if folder.is_dir() else set()


def _weights(folder: Path) -> str | None:
    """Return the file name of a model's or an adapter's weights in a folder."""
    if not folder.is_dir():
        return None
    known = next((name for name in files.ADAPTER + files.MODEL if (folder / name).is_file()), None)
    if known is not None:
        return known
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    foreign = (name for name in names if any(fnmatch.fnmatchcase(name, form) for form in _FOREIGN_WEIGHTS))
    return next((name for name in names if _SHARD.fullmatch(name)), None) or next(foreign, None)
