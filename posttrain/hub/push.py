"""Pushing a saved run: one commit of the files it is meant to share, tried again where that may help."""

import contextlib
import shlex
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from posttrain.hub.base_model import run_of
from posttrain.hub.files import files_to_push
from posttrain.hub.merging import merge_adapter
from posttrain.hub.repository import RETRY_DELAYS, Destination, check_kind, destination_of, with_retries
from posttrain.log import get_logger
from posttrain.privacy import promise as promises


@dataclass(frozen=True)
class Pushed:
    """What arrived on the hub.

    Attributes:
        commit: the client's account of the commit: its `commit_url`, `oid` and message.
        files: the paths in the repository, sorted.
    """

    commit: object
    files: tuple[str, ...]


def push_folder(
    folder: str | Path,
    destination: Destination,
    *,
    commit_message: str = "Upload by posttrain",
    merged: bool = False,
    weights: Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    delays: Sequence[float] = RETRY_DELAYS,
) -> Pushed:
    """Push a run folder, or a checkpoint in one, as one commit.

    The folder itself is left as it is: its adapter config may go on naming a local base model, the pushed one names
    `destination.base_model_id`.

    Args:
        folder: where the run was saved.
        destination: from `open_repository`.
        commit_message: its first line.
        merged: push the base model with the adapter merged into it, as `merge_adapter` does.
        weights: the folder of the model from `merged_weights`, where the adapter was merged before.
        revision: a branch that exists; the main one by default.
        token: the one to use instead of HF_TOKEN or the stored login.
        delays: seconds before each further try.

    Raises:
        DataError: there is nothing to push.
        ConfigError: `merged` for a run that cannot be merged; an adapter for a repository with a whole model, or the
            reverse.
        EnvironmentIssue: what the hub or the connection answered, after the last try; a merged model that is another
            one than base and adapter.
    """
    folder, run = Path(folder), run_of(folder)
    say_what_weights_tell(run)
    with merged_weights(folder) if merged and weights is None else contextlib.nullcontext(weights or folder) as source:
        files = files_to_push(source, run, destination)
        return _commit(files, destination, commit_message, revision, token, delays)


@contextlib.contextmanager
def merged_weights(folder: str | Path):
    """Open a folder, there while the context lasts, of a run's base model with its adapter merged into it.

    Raises as `merge_adapter` does.
    """
    with tempfile.TemporaryDirectory(prefix="posttrain-merged-") as temporary:
        merge_adapter(folder, Path(temporary) / "merged")
        yield Path(temporary) / "merged"


def push_run(
    trainer,
    commit_message: str = "End of training",
    *,
    blocking: bool = True,
    revision: str | None = None,
    token: str | None = None,
    private: bool | None = None,
    delays: Sequence[float] = RETRY_DELAYS,
):
    """Push what a trainer has saved in its output folder. Never raises: a trained run is not lost for a push.

    Where it fails, a warning says why and gives the command that tries again. Call it on the main process, after the
    model and the card were saved.

    Returns:
        The commit, or None where the push failed; with `blocking=False` a Future of it.
    """
    args, destination = trainer.args, None
    token, revision = token or args.hub_token, revision or args.hub_revision
    try:
        destination = destination_of(trainer, private=private, delays=delays)
        files = files_to_push(Path(args.output_dir), Path(args.output_dir), destination)
        say_what_weights_tell(Path(args.output_dir))
    except Exception as error:
        _warn(error, args, destination)
        return None if blocking else _done(None)

    def push():
        try:
            return _commit(files, destination, commit_message, revision, token, delays).commit
        except Exception as error:
            _warn(error, args, destination)
            return None

    return push() if blocking else _in_background(trainer, push)


def push_checkpoint(trainer, folder: str | Path, *, delays: Sequence[float] = RETRY_DELAYS) -> None:
    """Push a checkpoint's weights in the background, as `hub_strategy: every_save` asks; a failure is a warning.

    Optimizer states stay here. Does nothing with `hub_strategy: end`, on other ranks than the main one, and while the
    last push is under way (unless `hub_always_push`).
    """
    args, folder = trainer.args, Path(folder)
    if not trainer.is_world_process_zero() or getattr(args.hub_strategy, "value", args.hub_strategy) == "end":
        return
    running = trainer.push_in_progress
    if running is not None and not running.is_done() and not args.hub_always_push:
        return
    destination, step = trainer.hub_destination, trainer.state.global_step
    try:
        files = files_to_push(folder, Path(args.output_dir), destination)
    except Exception as error:
        get_logger().warning("step %d was not pushed to %s: %s", step, destination.repo_id, error)
        return

    def push():
        try:
            message = f"Training in progress, step {step}"
            _commit(files, destination, message, args.hub_revision, args.hub_token, delays)
        except Exception as error:
            # By now the checkpoint may have made room for a newer one, which is pushed in its turn
            if folder.exists():
                get_logger().warning("step %d was not pushed to %s: %s", step, destination.repo_id, error)

    _in_background(trainer, push)


def say_what_weights_tell(run: Path) -> None:
    """Say, before a run's weights leave, that rows may be read back from them where it was not private."""
    promise = promises.read(run)
    if promise is None or not promise.is_private:
        get_logger().warning(
            "%s was trained without differential privacy: rows that it was trained on may be read back from the "
            "weights, so whoever gets them may get the rows", run
        )  # fmt: skip


def retry_command(folder: str, repo_id: str, base_model_id: str | None, private: bool | None) -> str:
    """Return the command that pushes a saved run."""
    words = ["posttrain", "push", str(folder), repo_id]
    words += ["--base-model-id", base_model_id] if base_model_id else []
    words += ["--private"] if private else []
    return shlex.join(words)


def _commit(files, destination: Destination, message, revision, token, delays) -> Pushed:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    check_kind(destination.repo_id, "adapter_config.json" in files, revision, token, delays=delays)

    def commit():
        # New ones each time: if only the answer to the last try was lost, these find their files there already
        operations = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
        return api.create_commit(destination.repo_id, operations, commit_message=message, revision=revision)

    return Pushed(with_retries(commit, destination.repo_id, delays), tuple(sorted(files)))


def _in_background(trainer, job) -> Future:
    from transformers.utils import PushInProgress

    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="posttrain-push")
    future = executor.submit(job)
    executor.shutdown(wait=False)
    running = getattr(trainer, "push_in_progress", None)
    earlier = [] if running is None or running.is_done() else running.jobs
    trainer.push_in_progress = PushInProgress([*earlier, future])
    return future


def _done(value) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future


def _warn(error: Exception, args, destination: Destination | None) -> None:
    base = destination.base_model_id if destination else getattr(args, "base_model_id", None) or "ORG/BASE"
    repo_id = destination.repo_id if destination else args.hub_model_id or Path(args.output_dir).resolve().name
    get_logger().warning(
        "the run was not pushed to %s: %s\nIt is saved in %s. To push it from there:\n  %s",
        repo_id,
        error,
        args.output_dir,
        retry_command(args.output_dir, repo_id, base, args.hub_private_repo),
    )
