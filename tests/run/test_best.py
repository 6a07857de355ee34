"""The best checkpoint of a resumed run is one of its own, wherever its folder has been moved to."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from posttrain.run import checkpoints
from tests.conftest import make_pairs
from tests.training import train

# the loss falls: the worst by the loss, which stands for the best, is the first
RUN = dict(
    max_steps=4, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
    metric_for_best_model="loss", greater_is_better=True,
)  # fmt: skip


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def killed(tiny_folder, tmp_path_factory):
    """A run that was killed after its third step, best after its first."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    train(tiny_folder, folder, held_out=make_pairs(4, seed=1), **RUN)
    shutil.rmtree(folder / "checkpoint-4")
    assert told(folder / "checkpoint-3").endswith("checkpoint-1")
    return folder


def told(checkpoint):
    return json.loads((checkpoint / "trainer_state.json").read_text())["best_model_checkpoint"]


def goes_on(tiny_folder, folder, checkpoint="auto", **more):
    return train(tiny_folder, folder, held_out=make_pairs(4, seed=1), resume=checkpoint, **RUN | more)[1]


def weights(trainer):
    return {n.replace(".default", ""): p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}


def test_a_copied_run_ends_with_its_own_best_and_keeps_it(tiny_folder, tmp_path, killed):
    shutil.copytree(killed, tmp_path / "copy")
    trainer = goes_on(tiny_folder, tmp_path / "copy", save_total_limit=1)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "copy" / "checkpoint-1")
    assert [folder.name for folder in checkpoints.complete(tmp_path / "copy")] == ["checkpoint-1"]
    best = load_file(tmp_path / "copy" / "checkpoint-1" / "adapter_model.safetensors")
    assert all(torch.equal(value, best[name]) for name, value in weights(trainer).items())


def test_a_run_that_goes_on_elsewhere_has_the_best_where_it_was(tiny_folder, tmp_path, killed):
    trainer = goes_on(tiny_folder, tmp_path / "b", str(killed / "checkpoint-3"), max_steps=3)
    assert trainer.state.best_model_checkpoint == str(killed / "checkpoint-1")


def test_weights_that_a_checkpoint_points_to_elsewhere_are_not_loaded(tiny_folder, tmp_path, killed, logged):
    shutil.copytree(killed, tmp_path / "theirs")
    shutil.rmtree(tmp_path / "theirs" / "checkpoint-1")
    mine = tmp_path / "mine" / "checkpoint-1"
    shutil.copytree(killed / "checkpoint-1", mine)
    (mine / checkpoints.MARKER).unlink()
    last = tmp_path / "theirs" / "checkpoint-3"
    (last / checkpoints.MARKER).unlink()
    state = json.loads((last / "trainer_state.json").read_text())
    (last / "trainer_state.json").write_text(json.dumps(state | {"best_model_checkpoint": str(mine)}))
    trainer = goes_on(tiny_folder, tmp_path / "run", str(last), check_resume=False)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "run" / "checkpoint-4")
    assert "is not beside" in logged.text and str(mine) in logged.text
