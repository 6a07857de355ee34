"""An output folder belongs to one run."""

import json
import os

import pytest
from peft import LoraConfig

from posttrain import RobustDPOConfig, RobustDPOTrainer
from posttrain.errors import ConfigError
from posttrain.trainers import _checkpoints, _run_folder
from tests.conftest import make_pairs
from tests.training import lora, settings


def build(folder, out, pairs=None, peft=None, **overrides):
    return RobustDPOTrainer(
        folder,
        args=RobustDPOConfig(**settings(out, pair_loss="dpo", max_steps=1) | overrides),
        train_dataset=pairs if pairs is not None else make_pairs(8),
        peft_config=peft or lora(),
    )


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    """A run that has trained, with a checkpoint, and saved."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    trainer = build(tiny_folder, out, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model()
    return out


def state_of(folder):
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(pair_loss="rdpo"), "flip_rate: 0.0 there, 0.1 here; pair_loss: dpo there, rdpo here"),
        (dict(seed=4), "seed: 3 there, 4 here"),
        (dict(pairs=make_pairs(8, seed=5)), "data: other rows there than here"),
        (dict(peft=LoraConfig(r=2, target_modules=["q_proj"])), "adapter: LORA r 4 there, LORA r 2 here"),
    ],
)
def test_another_run_is_not_written_over_and_the_way_on_is_said(tiny_folder, finished, change, named):
    before = state_of(finished)
    with pytest.raises(
        ConfigError, match=rf"holds a model written by another run \({named}\). Choose another output_dir"
    ):
        build(tiny_folder, finished, **change)
    assert state_of(finished) == before
    assert build(tiny_folder, finished, check_resume=False, **change)


def test_settings_are_refused_before_the_model_loads(finished):
    with pytest.raises(ConfigError, match="beta: 1.0 there, 0.2 here"):
        build("./no-such-model", finished, beta=0.2)


def test_the_same_run_may_start_anew_and_go_on(tiny_folder, finished):
    build(tiny_folder, finished, learning_rate=0.01).train()
    longer = build(tiny_folder, finished, max_steps=2)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 2
    assert json.loads((finished / _run_folder.NOTE).read_text())["identity"]["adapter"] == "LORA r 4"


def test_a_model_of_unknown_origin_is_not_written_over(tiny_folder, tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match=r"holds a model \(model.safetensors\) that no run has noted as its own"):
        build(tiny_folder, tmp_path)


def test_a_crashed_run_starts_again_with_its_settings_and_not_with_others(tiny_folder, tmp_path, logged):
    class Crash(Exception):
        pass

    def crash(*args, **kwargs):
        raise Crash

    crashing = build(tiny_folder, tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trained = crashing.training_step
    crashing.training_step = lambda *args: trained(*args) if crashing.state.global_step == 0 else crash()
    with pytest.raises(Crash):
        crashing.train()
    assert not (tmp_path / _run_folder.NOTE).exists()
    with pytest.raises(ConfigError, match=r"holds checkpoints written by another run \(beta: 1.0 there, 0.2 here\)"):
        build(tiny_folder, tmp_path, beta=0.2)
    again = build(tiny_folder, tmp_path, max_steps=1)
    again.train()
    assert "holds checkpoints of an earlier run, up to step 1; this run starts anew beside them" in logged.text


def test_rotation_keeps_what_was_written_last_beside_an_earlier_runs_later_steps(tmp_path):
    for age, step in enumerate((60, 20)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        _checkpoints.mark(folder, {})
        os.utime(folder / _checkpoints.MARKER, ns=(age, age))
    _checkpoints.rotate(tmp_path, keep=1, best=None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-20"]


def test_a_run_folder_is_no_checkpoint_but_names_its_own(finished):
    newest = _checkpoints.complete(finished)[-1]
    with pytest.raises(ConfigError, match=f"which is a run folder; give a checkpoint: {newest}."):
        _checkpoints.find(finished, str(finished))


def test_a_checkpoint_that_is_not_there_is_named_with_the_settings(tmp_path):
    with pytest.raises(
        ConfigError, match="resume_from_checkpoint is nope, which does not exist .* It takes true, auto"
    ):
        RobustDPOConfig(str(tmp_path / "out"), resume_from_checkpoint="nope")
    with pytest.raises(ConfigError, match="resume_from_checkpoint is true, but .* holds no complete checkpoint: none"):
        RobustDPOConfig(str(tmp_path / "out"), resume_from_checkpoint="true")
    assert RobustDPOConfig(str(tmp_path / "out"), resume_from_checkpoint="auto")


def test_a_readme_that_was_there_is_kept_under_another_name(tiny_folder, tmp_path, logged):
    (tmp_path / "README.md").write_text("my notes\n")
    trainer = build(tiny_folder, tmp_path)
    for _ in range(2):
        trainer.save_model()
        trainer.create_model_card()
    assert (tmp_path / "README.before.md").read_text() == "my notes\n"
    assert "my notes" not in (tmp_path / "README.md").read_text()
    assert logged.text.count("is kept as") == 1
    _run_folder.replace(tmp_path)
    assert (tmp_path / "README.before.md").read_text() == "my notes\n"
