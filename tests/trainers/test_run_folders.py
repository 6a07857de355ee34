"""An output folder belongs to one run."""

import json
import os
import shutil

import pytest
from peft import LoraConfig

from posttrain import RobustDPOConfig, RobustDPOTrainer
from posttrain.errors import ConfigError
from posttrain.run import checkpoint_files, checkpoints, run_folder
from tests.conftest import make_pairs
from tests.training import lora, settings


def build(folder, out, pairs=None, peft=None, eval_dataset=None, **overrides):
    return RobustDPOTrainer(
        folder,
        args=RobustDPOConfig(**settings(out, pair_loss="dpo", max_steps=1) | overrides),
        train_dataset=pairs if pairs is not None else make_pairs(8),
        eval_dataset=eval_dataset,
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


@pytest.mark.core("change0")
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (dict(pair_loss="rdpo"), "flip_rate: 0.0 there, 0.1 here; pair_loss: dpo there, rdpo here"),
        (dict(seed=4), "seed: 3 there, 4 here"),
        (dict(pairs=make_pairs(8, seed=5)), "data: other rows there than here"),
        (dict(learning_rate=0.01), "learning_rate: 0.05 there, 0.01 here"),
        (dict(optim="adamw_torch"), "optim: sgd there, adamw_torch here"),
        (dict(dataloader_drop_last=True), "dataloader_drop_last: False there, True here"),
        (dict(disable_dropout=False), "disable_dropout: True there, False here"),
        (
            dict(peft=LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.0)),
            "target_modules: .* there, q_proj .*",
        ),
        (dict(peft=LoraConfig(r=4, target_modules="all-linear", lora_alpha=3)), "lora_alpha: 8 there, 3 here"),
        (dict(peft=LoraConfig(r=2, target_modules=["q_proj"])), "adapter: LORA r 4 there, LORA r 2 here; .*"),
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
    with pytest.raises(ConfigError, match="learning_rate: 0.05 there, 0.01 here"):
        build("./no-such-model", finished, learning_rate=0.01)


@pytest.mark.slow
def test_the_same_run_may_start_anew_and_go_on(tiny_folder, finished, logged):
    build(tiny_folder, finished).train()
    assert "starts anew beside them. It replaces those of steps that it saves too, and the model." in logged.text
    longer = build(tiny_folder, finished, max_steps=2)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 2
    assert json.loads((finished / run_folder.NOTE).read_text())["identity"]["adapter"] == "LORA r 4"


def test_a_model_of_unknown_origin_is_not_written_over(tiny_folder, tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match=r"holds a model \(model.safetensors\) that no run has noted as its own"):
        build(tiny_folder, tmp_path)


@pytest.mark.slow
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
    with pytest.raises(ConfigError, match=r"holds checkpoints written by another run \(beta: 1.0 there, 0.2 here\)"):
        build(tiny_folder, tmp_path, beta=0.2)
    again = build(tiny_folder, tmp_path, max_steps=1)
    again.train()
    # what the first start wrote is not taken for someone else's
    assert not list(tmp_path.glob("*.before.*")) and "is kept as" not in logged.text
    assert "holds checkpoints of an earlier run, up to step 1; this run starts anew beside them" in logged.text


def test_rotation_keeps_what_was_written_last_beside_an_earlier_runs_later_steps(tmp_path):
    for age, step in enumerate((60, 20)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        checkpoint_files.mark(folder, {})
        os.utime(folder / checkpoints.MARKER, ns=(age, age))
    checkpoints.rotate(tmp_path, keep=1, best=None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-20"]


def test_a_run_folder_is_no_checkpoint_but_names_its_own(finished):
    newest = checkpoints.complete(finished)[-1]
    with pytest.raises(ConfigError, match=f"which is a run folder; give a checkpoint: {newest}."):
        checkpoints.find(finished, str(finished))


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
    run_folder.replace(tmp_path)
    assert (tmp_path / "README.before.md").read_text() == "my notes\n"


@pytest.mark.slow
def test_files_of_others_are_kept_before_training_writes(tiny_folder, tmp_path, logged):
    mine = ("metrics.csv", "metrics.jsonl", "curves.png", "resolved_config.yaml", "tokenizer.json", "config.json")
    for name in (*mine, "notes.txt", ".gitattributes"):
        (tmp_path / name).write_text("mine")
    trainer = build(tiny_folder, tmp_path, eval_dataset=make_pairs(4, seed=1))
    trainer.evaluate()
    trainer.train()
    trainer.save_model()
    for name in mine:
        stem, end = name.rsplit(".", 1)
        assert (tmp_path / f"{stem}.before.{end}").read_text() == "mine"
    assert (tmp_path / "notes.txt").read_text() == (tmp_path / ".gitattributes").read_text() == "mine"
    assert len(list(tmp_path.glob("*.before.*"))) == len(mine) and logged.text.count("metrics.before.csv") == 1


@pytest.mark.slow
def test_an_evaluation_before_training_leaves_nothing_that_seems_foreign(tiny_folder, tmp_path, logged):
    trainer = build(tiny_folder, tmp_path, eval_dataset=make_pairs(4, seed=1))
    trainer.evaluate()
    trainer.train()
    trainer.save_model()
    assert not list(tmp_path.glob("*.before.*")) and "is kept as" not in logged.text


@pytest.mark.slow
def test_a_run_that_saved_nothing_yet_may_change_its_settings(tiny_folder, tmp_path):
    build(tiny_folder, tmp_path).train()
    build(tiny_folder, tmp_path, learning_rate=0.01).train()
    assert json.loads((tmp_path / run_folder.NOTE).read_text())["update"]["learning_rate"] == 0.01


@pytest.mark.parametrize(
    "name", ["consolidated.00.pth", "model-q4.gguf", "tf_model.h5", "pytorch_model.bin", "ggml-model.bin"]
)
def test_weights_in_other_forms_are_a_model_of_unknown_origin(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=f"holds a model \\({name}\\)"):
        run_folder.check_folder(tmp_path, {})


@pytest.mark.parametrize("name", ["training_args.bin", "tokens.bin", "optimizer.pt", "plot.h5"])
def test_other_binary_files_are_no_model(tmp_path, name):
    (tmp_path / name).touch()
    run_folder.check_folder(tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_model_is_not_saved_into_another_runs_folder(tiny_folder, finished, tmp_path):
    trainer, before = build(tiny_folder, tmp_path, learning_rate=0.01), state_of(finished)
    with pytest.raises(ConfigError, match=r"is the folder of another run \(learning_rate: 0.05 there, 0.01 here\)"):
        trainer.save_model(str(finished))
    assert state_of(finished) == before
    trainer.save_model(str(tmp_path / "elsewhere"))
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / "adapter_model.safetensors").is_file()


def test_an_adapter_that_someone_put_into_a_checkpoint_is_named(tiny_folder, finished, tmp_path):
    checkpoint = tmp_path / "checkpoint-1"
    shutil.copytree(finished / "checkpoint-1", checkpoint)
    (checkpoint / "mine").mkdir()
    shutil.copy2(checkpoint / "adapter_model.safetensors", checkpoint / "mine")
    with pytest.raises(ConfigError, match="Move mine/ out of the checkpoint"):
        build(tiny_folder, tmp_path / "new", max_steps=2).train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.slow
def test_skipping_no_rows_on_resumption_is_told(tiny_folder, finished, tmp_path, logged):
    again = build(tiny_folder, tmp_path, max_steps=2, ignore_data_skip=True)
    again.train(resume_from_checkpoint=str(finished / "checkpoint-1"))
    assert "ignore_data_skip: going on from" in logged.text
