"""The reference that `sync_ref_model` moves towards the policy: kept in each checkpoint, and put back on resumption."""

from pathlib import Path

from safetensors.torch import load_model, save_model

from posttrain.errors import ConfigError
from posttrain.log import get_logger
from posttrain.run.checkpoint_files import REFERENCE
from posttrain.saved import check_safetensors


def save(trainer, folder: Path) -> None:
    """Write the synced reference model into a checkpoint; all ranks call it.

    Where an engine spreads the weights over processes, there is no file, and `load` says so.
    """
    if _moves(trainer) and not _is_spread(trainer) and trainer.accelerator.is_main_process:
        save_model(trainer.accelerator.unwrap_model(trainer.ref_model), str(folder / REFERENCE))


def load(trainer, checkpoint: Path) -> None:
    """Load a checkpoint's synced reference model into the run that resumes from it.

    Raises:
        ConfigError: the checkpoint has none, so that the run would go on with another reference; with
            `check_resume: false` a warning says so.
    """
    if not _moves(trainer):
        return
    path = checkpoint / REFERENCE
    if path.is_file() and not _is_spread(trainer):
        check_safetensors(path)
        try:
            load_model(trainer.accelerator.unwrap_model(trainer.ref_model), path)
        except RuntimeError as error:
            raise ConfigError(
                f"{path} does not fit the reference of this run: {' '.join(str(error).split())[:300]}"
            ) from None
        return
    why = "is not there" if not path.is_file() else "cannot be put into weights that are spread over processes"
    told = (
        f"sync_ref_model is true, and {path}, the reference as the run had moved it by {checkpoint.name}, {why}: the "
        "run would go on with the reference that it began with"
    )
    if trainer.args.check_resume:
        raise ConfigError(f"{told}. To go on all the same, set `check_resume: false`.")
    get_logger().warning("%s; it is not the run that was never interrupted", told)


def _moves(trainer) -> bool:
    return getattr(trainer.args, "sync_ref_model", False) and getattr(trainer, "ref_model", None) is not None


def _is_spread(trainer) -> bool:
    return trainer.is_fsdp_enabled or any(hasattr(value, "ds_shape") for value in trainer.ref_model.parameters())
