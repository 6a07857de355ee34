"""The best checkpoint of a run: found again on resumption, and kept alone at the end."""

from pathlib import Path

from posttrain.errors import ConfigError
from posttrain.log import get_logger
from posttrain.run import checkpoint_files as files
from posttrain.run import checkpoints
from posttrain.run.identity import differing


def find_again(trainer, checkpoint: Path) -> None:
    """Have the state of a resumed run name its best checkpoint where it lies, and nothing else.

    The state of `checkpoint` tells the path that it was saved to. A run folder that was moved has it beside
    `checkpoint`; a run that goes on in another folder has it where it was told, if that is a checkpoint of the same
    run. Of other paths, nothing is loaded: the best is the best of the steps to come.
    """
    told = checkpoints.trainer_state(checkpoint).get("best_model_checkpoint")
    if not isinstance(told, str):
        return
    beside = checkpoint.parent / Path(told).name
    state = trainer.state
    if checkpoints.is_named(beside) and beside.is_dir() and not beside.is_symlink():
        state.best_model_checkpoint = str(beside)
    elif not _is_of_this_run(trainer, Path(told)):
        get_logger().warning(
            "the best checkpoint of the run so far, %s, is not beside %s: the best of the steps to come is taken",
            told,
            checkpoint,
        )
        state.best_model_checkpoint = state.best_metric = state.best_global_step = None


def keep_alone(trainer, output_dir: Path) -> None:
    """Delete our checkpoints but for the best at the end of training with `save_total_limit: 1`, as upstream does."""
    best = trainer.state.best_model_checkpoint
    if trainer.args.save_total_limit != 1 or best is None or not trainer.args.should_save:
        return
    for folder in checkpoints.complete(output_dir):
        if not folder.is_symlink() and folder.resolve() != Path(best).resolve():
            checkpoints.clear(folder)


def _is_of_this_run(trainer, folder: Path) -> bool:
    if not checkpoints.is_named(folder) or folder.is_symlink() or not files.is_complete(folder):
        return False
    try:
        then, now = files.content_of(folder / files.MARKER)["identity"], trainer._identity()
    except ConfigError:
        return False
    return now.keys() <= then.keys() and not differing(now, then)
