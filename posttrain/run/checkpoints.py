"""Checkpoints that are either complete or not there: the newest one, rotation, saving, resuming.

A checkpoint counts only with its marker, a small JSON file that the main process writes after every rank has saved. A
run that is killed while it saves leaves a folder without one, which is never resumed from and is cleared away later.
"""

import contextlib
import re
from collections.abc import Callable
from pathlib import Path

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from posttrain.errors import ConfigError, EnvironmentIssue
from posttrain.log import get_logger
from posttrain.run import checkpoint_files as files
from posttrain.run import lock, training_state
from posttrain.run.checkpoint_files import MARKER
from posttrain.run.identity import differing, update_settings
from posttrain.run.markers import content_of, damaged
from posttrain.run.schedule import Schedule
from posttrain.run.training_state import trainer_state

_FOLDER = re.compile(r"checkpoint-(0|[1-9]\d*)")


def folders(output_dir: str | Path) -> list[Path]:
    """Return all paths named as checkpoints are, oldest step first, whatever they hold."""
    root = Path(output_dir)
    if not root.is_dir():
        return []
    return sorted((path for path in root.iterdir() if is_named(path)), key=step_of)


def is_named(path: Path) -> bool:
    """Return whether a path is named as checkpoints are."""
    return _FOLDER.fullmatch(path.name) is not None


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def complete(output_dir: str | Path) -> list[Path]:
    """Return the checkpoints with a marker, oldest step first."""
    return list(filter(files.is_complete, folders(output_dir)))


def rotate(output_dir: str | Path, keep: int | None, best: str | None, identity: dict | None = None) -> None:
    """Delete all but the newest `keep` and the best complete checkpoints, and what this run left half-written.

    The newest are those written last: a run that starts anew may stand beside further steps of an earlier one. Links,
    folders without a marker of ours, and files that no save wrote are left alone.

    Args:
        output_dir: the run folder.
        keep: how many; None or less than 1 for all.
        best: a checkpoint to keep besides.
        identity: of this run.
    """
    own = [folder for folder in folders(output_dir) if folder.is_dir() and not folder.is_symlink()]
    marked = sorted(filter(files.is_complete, own), key=lambda folder: (folder / MARKER).stat().st_mtime_ns)
    kept = {path.resolve() for path in (marked[-keep:] if keep and keep > 0 else marked)}
    if best is not None:
        kept.add(Path(best).resolve())
    half_left = [folder for folder in own if identity is not None and files.is_half_left(folder, identity)]
    for folder in (*marked, *half_left):
        if folder.resolve() not in kept:
            clear(folder)


def clear(folder: Path) -> None:
    """Delete a checkpoint of ours; log where files of others stay in it."""
    try:
        if not files.remove(folder):
            get_logger().info("%s stays for the files in it that no run wrote", folder)
    except OSError as error:
        get_logger().warning("%s could not be deleted: %s", folder, error)


def find(
    output_dir: str | Path,
    wanted: str | bool | None,
    check: bool = True,
    weights_only: bool = False,
    by_content: bool = False,
    fits: Callable[[Path], str] | None = None,
) -> Path | None:
    """Find the checkpoint to resume from.

    Args:
        output_dir: the run folder.
        wanted: None or False for none; True for the newest complete one, an error if there is none; "auto" for the
            newest complete one if there is any; or a path.
        check: refuse one that another library wrote; it is taken by its path alone in any case.
        weights_only: take one without optimizer, schedule or random state as well.
        by_content: read them whole, to compare what they hold with what was saved.
        fits: says of a checkpoint that is whole why this run could not load it, empty where it could.

    Raises:
        ConfigError: no complete checkpoint where one was asked for.
    """
    if wanted is None or wanted is False or str(wanted).lower() in ("false", "none"):
        return None
    ready = [folder for folder in complete(output_dir) if weights_only or not files.missing_state(folder)]
    newest = next((folder for folder in reversed(ready) if not _damage(folder, weights_only, by_content, fits)), None)
    if str(wanted).lower() == "auto":
        return newest
    if wanted is True or str(wanted).lower() == "true":
        if newest is None:
            raise ConfigError(
                f"resume_from_checkpoint is true, but {output_dir} holds no complete checkpoint: {_others(output_dir)} "
                "Leave it out to start anew, or set `resume_from_checkpoint: auto`."
            )
        return newest
    folder = Path(wanted)
    hint = f" The newest complete one in {output_dir} is {newest}." if newest else ""
    if files.is_complete(folder) or (not check and files.is_foreign(folder)):
        lost = files.missing_state(folder)
        if lost and not weights_only:
            raise ConfigError(f"the checkpoint {folder} {_without_state(lost)}{hint}")
        return folder
    inside = next(reversed(complete(folder)), None)
    if inside is not None:
        raise ConfigError(f"resume_from_checkpoint is {wanted}, which is a run folder; give a checkpoint: {inside}.")
    if files.is_foreign(folder):
        raise ConfigError(
            f"resume_from_checkpoint is {wanted}, which posttrain did not write, or not to its end (no {MARKER} in "
            "it): nothing says whether it is complete, or of what settings and data. To go on from it all the same, "
            f"set `check_resume: false`.{hint}"
        )
    if folder.is_dir():
        raise ConfigError(f"resume_from_checkpoint is {wanted}, which is not complete (no {MARKER} in it).{hint}")
    raise ConfigError(
        f"resume_from_checkpoint is {wanted}, which does not exist (working folder: {Path.cwd()}). It takes true, "
        f"auto, or the path of a checkpoint.{hint}"
    )


def passed_over(
    output_dir: str | Path, taken: Path | None, weights_only: bool = False, fits: Callable[[Path], str] | None = None
) -> str:
    """List the later checkpoints of a run folder that were not resumed from, each with the reason; empty for none."""
    first = step_of(taken) if taken is not None else -1
    found = _reasons(output_dir, weights_only, by_content=True, fits=fits, after=first)
    return " ".join(f"{folder.name} {reason}" for folder, reason in found)


def _damage(folder: Path, weights_only: bool, by_content: bool, fits: Callable[[Path], str] | None = None) -> str:
    try:
        return (
            files.damage(folder, weights_only, by_content)
            or (training_state.fault(folder, weights_only) if by_content else "")
            or (fits(folder) if fits else "")
        )
    except ConfigError:
        return f"{MARKER} cannot be read"


def _others(output_dir: str | Path) -> str:
    """Describe what an output_dir without a complete checkpoint holds instead, for an error message."""
    found = _reasons(output_dir)
    incomplete = [folder.name for folder, reason in found if reason == _INCOMPLETE]
    told = [f"{folder.name} {reason}" for folder, reason in found if reason != _INCOMPLETE]
    if incomplete:
        told.insert(0, f"only incomplete ones ({', '.join(incomplete)}).")
    return " ".join(told) or "none."


_INCOMPLETE = "is not complete."


def _reasons(
    output_dir: str | Path,
    weights_only: bool = False,
    by_content: bool = False,
    fits: Callable[[Path], str] | None = None,
    after: int = -1,
) -> list[tuple[Path, str]]:
    """Return the checkpoint folders of later steps that cannot be resumed from as they are, each with the reason."""
    found = []
    for folder in (path for path in folders(output_dir) if path.is_dir() and step_of(path) > after):
        lost = files.missing_state(folder) if files.is_complete(folder) and not weights_only else []
        if lost:
            found.append((folder, _without_state(lost)))
        elif files.is_complete(folder):
            if what := _damage(folder, weights_only, by_content, fits):
                found.append((folder, f"is damaged: {what}."))
        elif files.is_foreign(folder):
            found.append(
                (folder, "was not written by posttrain, or not to its end: name it, with `check_resume: false`.")
            )
        elif not files.is_complete(folder):
            found.append((folder, _INCOMPLETE))
    return found


def _without_state(lost: list[str]) -> str:
    return (
        f"has no {', '.join(lost)} (deleted, or left out by save_only_model), so the run cannot go on as it was. "
        "`resume_weights_only: true` goes on from its weights with a new optimizer."
    )


def read(folder: Path, now: dict | None, weights_only: bool = False, before: dict | None = None) -> dict:
    """Read a checkpoint's marker; ConfigError if the checkpoint is damaged, or of other settings than `now`.

    Of a checkpoint that another library wrote, what its own state tells.

    Args:
        folder: of the checkpoint.
        now: identity and update settings of the run that resumes; None to take any.
        weights_only: optimizer, schedule and random state may be gone.
        before: what settings count as that the checkpoint, of an earlier version, does not tell.
    """
    if not files.is_complete(folder):
        get_logger().warning(
            "the checkpoint %s was not written by posttrain, or not to its end: whether its files are whole, and its "
            "method, model, data, seed and batch split, cannot be checked",
            folder,
        )
        logs = trainer_state(folder).get("log_history") or []
        return {"state": {"num_tokens": next((row["num_tokens"] for row in reversed(logs) if "num_tokens" in row), 0)}}
    content = content_of(folder / MARKER)
    if "num_tokens" not in content.get("state", {}):
        raise damaged(folder / MARKER)
    refuse_damaged(folder, weights_only)
    told = "" if now is None else differing(now, settings_of(content), before)
    if told:
        raise ConfigError(
            f"the checkpoint {folder} was written by another run ({told}). Resume with the same settings and "
            "data, or start anew in another output_dir. To go on all the same, set `check_resume: false`."
        )
    return content


def refuse_damaged(
    folder: Path, weights_only: bool, by_content: bool = False, fits: Callable[[Path], str] | None = None
) -> None:
    """Raise ConfigError where a file of a checkpoint is not as it was saved, or `by_content` holds no state.

    `fits`: as in `find`.
    """
    what = files.damage(folder, weights_only, by_content) if files.is_complete(folder) else ""
    if what := what or (by_content and training_state.fault(folder, weights_only)) or (fits and fits(folder)):
        raise ConfigError(f"the checkpoint {folder} is damaged: {what}. Resume from another one, or delete it.")


def settings_of(content: dict) -> dict:
    """Return the identity and the update settings of a checkpoint's run."""
    return content["identity"] | content.get("update", {})


def planned_steps(folder: Path) -> int:
    """Return how many steps the run that wrote a checkpoint was to take."""
    return trainer_state(folder)["max_steps"]


def warn_of_missing_random_state(folder: Path, ranks: int) -> None:
    """Warn where a checkpoint lacks the random state of one of these ranks, which upstream passes over in silence."""
    wanted = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    lost = [name for name in wanted if not (folder / name).is_file()]
    if lost:
        get_logger().warning(
            "the checkpoint %s has no %s: chance (dropout, sampling) goes on from the seed there, as on another number "
            "of processes",
            folder,
            ", ".join(lost),
        )


@contextlib.contextmanager
def complete_or_not_there(trainer, folder: Path):
    """Save a checkpoint by all ranks, inside, into the folder that is given there; then name it, mark it and rotate.

    Raises:
        EnvironmentIssue: the disk is full or cannot be written to, or what is not ours came to lie there; the last
            complete checkpoint is left as it is.
    """
    output_dir, main = folder.parent, trainer.accelerator.is_main_process
    told = [_hindrance(folder) if main else ""]
    broadcast_object_list(told)
    if told[0]:
        raise EnvironmentIssue(f"the checkpoint {folder} could not be saved: {told[0]}")
    partial = output_dir / files.PARTIAL / folder.name
    # Upstream would rotate before the marker is written, and might delete the last complete checkpoint
    limit, trainer.args.save_total_limit = trainer.args.save_total_limit, None
    try:
        if main:
            for left in files.partials(output_dir):
                clear(left)
            files.begin(partial, trainer._identity())
        trainer.accelerator.wait_for_everyone()
        yield partial
        trainer.accelerator.wait_for_everyone()
        _name_best(trainer, partial, folder)
        if main:
            schedule = trainer._schedule.now or Schedule(trainer.state.max_steps)
            state = {"num_tokens": trainer._total_train_tokens, "schedule": schedule.as_content()}
            method = trainer.method_state()
            state |= {"method": method} if method else {}
            content = {"identity": trainer._identity(), "update": update_settings(trainer)}
            sizes = files.sizes(partial)
            content |= {"state": state, "files": sizes, "digests": files.digests(partial, sizes)}
            files.put_in_place(partial, folder, content)
            with contextlib.suppress(OSError):
                partial.parent.rmdir()
    except (OSError, SafetensorError, RuntimeError) as error:
        if not is_write_error(error):
            raise
        if main and partial.is_dir():
            with contextlib.suppress(OSError):
                files.remove(partial, files.files_in(partial))
                partial.parent.rmdir()
        raise EnvironmentIssue(
            f"the checkpoint {folder} could not be saved: {write_reason(error)}. {_last_of(output_dir)}"
        ) from error
    finally:
        trainer.args.save_total_limit = limit
    if main:
        rotate(output_dir, limit, trainer.state.best_model_checkpoint, trainer._identity())


def _hindrance(folder: Path) -> str:
    """Say why no checkpoint can be saved as a folder; empty where one can."""
    try:
        lock.check_held(folder.parent)
    except EnvironmentIssue as error:
        return str(error)
    if files.is_occupied(folder):
        return (
            f"something lies there that posttrain did not write, and that would be written over. "
            f"{_last_of(folder.parent)}"
        )
    return ""


def _name_best(trainer, partial: Path, folder: Path) -> None:
    """Have the trainer's state name the best checkpoint by the place where it is going to be."""
    state = trainer.state
    if state.best_model_checkpoint is None or Path(state.best_model_checkpoint) != partial:
        return
    state.best_model_checkpoint = str(folder)
    if trainer.accelerator.is_main_process:
        state.save_to_json(str(partial / files.TRAINER_STATE))


def is_write_error(error: Exception) -> bool:
    """Return whether an error comes of a full or unwritable disk; torch.save raises a RuntimeError for that."""
    if isinstance(error, EnvironmentIssue) and error.__cause__ is not None:
        # the model's part of a checkpoint, which says so by itself
        return is_write_error(error.__cause__)
    return not isinstance(error, RuntimeError) or any(words in str(error) for words in ("inline_container", "write"))


def write_reason(error: Exception) -> str:
    """Say why a file could not be written; torch.save names a place in its own source."""
    if isinstance(error, EnvironmentIssue) and error.__cause__ is not None:
        return write_reason(error.__cause__)
    if not isinstance(error, RuntimeError):
        return str(error).rstrip(".")
    said = " ".join(str(error).split()).rstrip(".")
    return f"a file could not be written whole: the disk is full, or a quota or size limit was met ({said})"


def _last_of(output_dir: Path) -> str:
    last = next(reversed(complete(output_dir)), None)
    return f"The last complete one is {last}; go on from it with `resume_from_checkpoint: auto`." if last else ""
