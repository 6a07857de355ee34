"""What is ours in a run folder is rotated, resumed from and replaced; what is not stays as it is."""

import errno
import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer
from trl import DPOConfig, DPOTrainer

from posttrain import RobustDPOConfig, RobustDPOTrainer
from posttrain.errors import ConfigError, EnvironmentIssue, PosttrainError
from posttrain.run import checkpoint_files, checkpoints, markers, run_folder, training_state
from posttrain.run.checkpoint_files import MARKER, SAVING
from posttrain.run.markers import NOTE, content_of
from tests.conftest import make_pairs
from tests.training import lora, losses, settings

SAVES = dict(save_strategy="steps", save_steps=2, optim="adamw_torch", learning_rate=1e-3)


def build(folder, out, eval_dataset=None, **overrides):
    return RobustDPOTrainer(
        folder,
        args=RobustDPOConfig(**settings(out, pair_loss="dpo", max_steps=4, **SAVES) | overrides),
        train_dataset=make_pairs(16),
        eval_dataset=eval_dataset,
        peft_config=lora(),
    )


@pytest.fixture(scope="module")
def trl_run(tiny_folder, tmp_path_factory):
    """A run of TRL's trainer with checkpoints of steps 2 and 4, and the rows it logged."""
    out = tmp_path_factory.mktemp("trl") / "run"
    given = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, max_steps=4) | SAVES
    trainer = DPOTrainer(
        tiny_folder, args=DPOConfig(**settings(out) | given), train_dataset=make_pairs(16), peft_config=lora()
    )
    trainer.train()
    return out, losses(trainer)


@pytest.fixture(scope="module")
def our_run(tiny_folder, tmp_path_factory):
    """A run with complete checkpoints of steps 2 and 4, and the rows it logged."""
    out = tmp_path_factory.mktemp("ours") / "run"
    trainer = build(tiny_folder, out)
    trainer.train()
    return out, losses(trainer)


def state_of(folder):
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file()
    }


def half_left(folder, identity, *names):
    folder.mkdir(parents=True)
    checkpoint_files.mark(folder, {"identity": identity}, SAVING)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("half")
    return folder


def finished(folder, *names):
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text(name)
    checkpoint_files.mark(folder, {"identity": {}, "files": checkpoint_files.sizes(folder)})
    return folder


# rotation


@pytest.mark.slow
def test_a_first_save_leaves_trls_checkpoints_as_they_are(tiny_folder, trl_run, tmp_path):
    shutil.copytree(trl_run[0], tmp_path / "run")
    before = state_of(tmp_path / "run" / "checkpoint-2") | state_of(tmp_path / "run" / "checkpoint-4")
    build(tiny_folder, tmp_path / "run", max_steps=3, save_steps=3, save_total_limit=1).train()
    assert state_of(tmp_path / "run" / "checkpoint-2") | state_of(tmp_path / "run" / "checkpoint-4") == before
    assert [path.name for path in checkpoints.complete(tmp_path / "run")] == ["checkpoint-3"]


@pytest.mark.slow
@pytest.mark.parametrize("best", [True, False])
def test_the_best_alone_is_left_of_our_checkpoints_and_everything_of_others(tiny_folder, trl_run, tmp_path, best):
    out = tmp_path / "run"
    shutil.copytree(trl_run[0] / "checkpoint-4", out / "checkpoint-40")
    (out / "checkpoint-50").write_text("a note of mine")
    trainer = build(
        tiny_folder, out, make_pairs(4, seed=1), save_total_limit=1, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=best, metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    assert len(checkpoints.complete(out)) == 1 and (out / "checkpoint-50").read_text() == "a note of mine"
    assert (out / "checkpoint-40" / "optimizer.pt").stat().st_size > 0
    assert trainer.args.save_total_limit == 1


def test_rotation_touches_nothing_but_our_own(tmp_path):
    mine, other = {"method": "A"}, {"method": "B"}
    finished(tmp_path / "checkpoint-1", "optimizer.pt", "model.safetensors")
    (tmp_path / "checkpoint-1" / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint-1" / "plots").mkdir()
    (tmp_path / "checkpoint-1" / "plots" / "a.png").write_text("mine")
    finished(tmp_path / "elsewhere", "optimizer.pt")
    (tmp_path / "checkpoint-2").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "checkpoint-3").write_text("a file")
    half_left(tmp_path / "checkpoint-4", mine, "adapter_model.safetensors", "global_step4/zero_optim_states.pt")
    half_left(tmp_path / "checkpoint-5", other, "adapter_model.safetensors")
    (tmp_path / "checkpoint-6").mkdir()
    finished(tmp_path / "checkpoint-007", "optimizer.pt")
    finished(tmp_path / "checkpoint-8-kept", "optimizer.pt")
    half_left(tmp_path / "checkpoint-9", mine, "rng_state_1.pth")
    (tmp_path / "checkpoint-9" / "my-eval.json").write_text("mine")
    last = finished(tmp_path / "checkpoint-10", "optimizer.pt")
    os.utime(last / MARKER, ns=(2**62, 2**62))
    checkpoints.rotate(tmp_path, keep=1, best=None, identity=mine)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()) == [
        "checkpoint-007/optimizer.pt", f"checkpoint-007/{MARKER}",
        "checkpoint-1/notes.txt", "checkpoint-1/plots/a.png",
        "checkpoint-10/optimizer.pt", f"checkpoint-10/{MARKER}",
        "checkpoint-3", "checkpoint-5/adapter_model.safetensors", f"checkpoint-5/{SAVING}",
        "checkpoint-8-kept/optimizer.pt", f"checkpoint-8-kept/{MARKER}", "checkpoint-9/my-eval.json",
        "elsewhere/optimizer.pt", f"elsewhere/{MARKER}",
    ]  # fmt: skip
    assert (tmp_path / "checkpoint-2").is_symlink() and (tmp_path / "checkpoint-6").is_dir()
    assert not (tmp_path / "checkpoint-4").exists()


def test_a_marker_cannot_have_files_elsewhere_deleted(tmp_path):
    (tmp_path / "precious").write_text("x")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.bin").write_text("x")
    folder = finished(tmp_path / "run" / "checkpoint-1", "optimizer.pt")
    (folder / "linked").symlink_to(tmp_path / "data")
    listed = {"../../precious": 1, "linked/rows.bin": 1, str(tmp_path / "precious"): 1, "optimizer.pt": 12}
    checkpoint_files.mark(folder, {"identity": {}, "files": listed})
    checkpoints.clear(folder)
    assert (tmp_path / "precious").exists() and (tmp_path / "data" / "rows.bin").exists()
    assert not (folder / "optimizer.pt").exists() and not (folder / MARKER).exists()


def test_a_removal_that_is_killed_leaves_no_checkpoint_that_says_it_is_complete(tmp_path, monkeypatch):
    folder = finished(tmp_path / "checkpoint-1", "optimizer.pt", "adapter_model.safetensors")

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_files, "_unlink", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint_files.remove(folder)
    monkeypatch.undo()
    assert checkpoints.complete(tmp_path) == [] and checkpoint_files.is_half_left(folder, {})
    checkpoints.rotate(tmp_path, keep=1, best=None, identity={})
    assert not folder.exists()


def test_a_save_that_is_killed_at_its_first_byte_is_no_hindrance(tmp_path):
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / f".{SAVING}.partial").write_text('{"ide')
    assert not checkpoint_files.is_occupied(folder) and checkpoint_files.begin(folder, {"method": "A"}) == set()
    (folder / SAVING).rename(folder / f".{SAVING}.partial")
    checkpoints.rotate(tmp_path, keep=None, best=None, identity={"method": "A"})
    assert not folder.exists()
    # with a file of someone's beside it, it is that one's folder
    folder.mkdir()
    for name in (f".{SAVING}.partial", "optimizer.pt"):
        (folder / name).write_text("x")
    assert checkpoint_files.is_occupied(folder)


@pytest.mark.slow
@pytest.mark.parametrize("every", [4, 1])
def test_a_save_that_is_killed_at_any_call_hinders_no_later_one(tiny_folder, tmp_path, monkeypatch, every):
    trainer = build(tiny_folder, tmp_path, save_strategy="no")
    trainer.train()
    folder = tmp_path / "checkpoint-4"

    class Killed(BaseException):
        pass

    def save(killed_at):
        calls = []

        def counted(function):
            def call(*args, **kwargs):
                calls.append(function)
                if len(calls) == killed_at:
                    raise Killed
                return function(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for owner, name in (
                (os, "replace"), (Path, "mkdir"), (Path, "write_text"), (Path, "unlink"), (Trainer, "_save"),
                (Trainer, "_save_optimizer_and_scheduler"), (Trainer, "_save_rng_state"),
            ):  # fmt: skip
                patch.setattr(owner, name, counted(getattr(owner, name)))
            trainer._save_checkpoint(trainer.model, None)

    # over nothing, and over a whole checkpoint of an earlier run
    for over in (False, True):
        killed_at, killed = 0, True
        while killed:
            killed_at += every
            shutil.rmtree(folder, ignore_errors=True)
            if over:
                save(0)
            try:
                save(killed_at)
                killed = False
            except Killed:
                assert not checkpoint_files.is_occupied(folder)
                assert not checkpoint_files.is_complete(folder) or checkpoints.read(folder, None)
                save(0)
            assert checkpoints.find(tmp_path, "auto") == folder and checkpoints.read(folder, None)
            assert not (folder / SAVING).exists()
        assert killed_at > 9


def test_a_save_that_fails_takes_back_its_own_files_only(tiny_folder, tmp_path, monkeypatch):
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "notes.txt").write_text("mine")

    def full(self, output_dir):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RobustDPOTrainer, "_save_rng_state", full)
    with pytest.raises(EnvironmentIssue, match="checkpoint-2 could not be saved: .*No space left on device"):
        build(tiny_folder, tmp_path).train()
    assert [path.name for path in (tmp_path / "checkpoint-2").iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_a_save_over_our_own_checkpoint_keeps_no_file_of_the_earlier_one(tiny_folder, our_run, tmp_path):
    out = shutil.copytree(our_run[0], tmp_path / "run")
    folder = out / "checkpoint-2"
    stale = {"identity": {}, "files": checkpoint_files.sizes(folder) | {"rng_state_1.pth": 1}}
    (folder / "rng_state_1.pth").write_text("x")
    checkpoint_files.mark(folder, stale)
    (folder / "notes.txt").write_text("mine")
    build(tiny_folder, out, max_steps=2, check_resume=False).train()
    assert not (folder / "rng_state_1.pth").exists() and (folder / "notes.txt").exists()
    listed = json.loads((folder / MARKER).read_text())["files"]
    assert "optimizer.pt" in listed and not {"notes.txt", SAVING, MARKER} & listed.keys()
    assert not (folder / SAVING).exists()


# what lies where a run would save


@pytest.mark.core("overrides3-link")
@pytest.mark.parametrize("what", ["trl", "file", "link", "unmarked"])
@pytest.mark.parametrize("overrides", [{}, dict(overwrite=True), dict(check_resume=False), dict(max_steps=-1)])
def test_what_is_not_ours_is_not_written_over(tiny_folder, trl_run, our_run, tmp_path, what, overrides):
    out = tmp_path / "run"
    out.mkdir()
    if what == "trl":
        shutil.copytree(trl_run[0] / "checkpoint-4", out / "checkpoint-4")
    elif what == "file":
        (out / "checkpoint-4").write_text("x")
    elif what == "link":
        shutil.copytree(our_run[0] / "checkpoint-4", tmp_path / "far")
        (out / "checkpoint-4").symlink_to(tmp_path / "far")
    else:
        shutil.copytree(our_run[0] / "checkpoint-4", out / "checkpoint-4")
        (out / "checkpoint-4" / MARKER).unlink()
    before = state_of(out)
    overrides = overrides | dict(num_train_epochs=2)
    with pytest.raises(
        ConfigError, match="holds checkpoint-4, and posttrain did not write it: the checkpoint of step 4"
    ):
        build(tiny_folder, out, **overrides).train()
    assert {name: value for name, value in state_of(out).items() if name in before} == before
    assert not (out / "checkpoint-2").exists(), "known before the first step"


def test_it_is_known_before_the_model_loads_where_the_steps_are(tmp_path):
    (tmp_path / "checkpoint-4").write_text("x")
    with pytest.raises(ConfigError, match="holds checkpoint-4"):
        build("./no-such-model", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [dict(max_steps=3), dict(save_steps=3, max_steps=6), dict(save_strategy="no"), dict(save_steps=0.5, max_steps=10)],
)
def test_what_lies_where_no_save_falls_is_no_hindrance(tiny_folder, trl_run, tmp_path, overrides):
    shutil.copytree(trl_run[0] / "checkpoint-4", tmp_path / "checkpoint-4")
    trainer = build(tiny_folder, tmp_path, **overrides)
    trainer.train()
    assert trainer.state.global_step == trainer.args.max_steps
    assert not checkpoint_files.is_complete(tmp_path / "checkpoint-4")


def test_a_folder_that_others_fill_while_the_run_goes_on_is_not_written_over(tiny_folder, tmp_path):
    trainer = build(tiny_folder, tmp_path, max_steps=2)
    step = trainer.training_step

    def meanwhile(*args):
        (tmp_path / "checkpoint-2").mkdir(exist_ok=True)
        (tmp_path / "checkpoint-2" / "optimizer.pt").write_text("theirs")
        return step(*args)

    trainer.training_step = meanwhile
    with pytest.raises(EnvironmentIssue, match="something lies there that posttrain did not write"):
        trainer.train()
    assert (tmp_path / "checkpoint-2" / "optimizer.pt").read_text() == "theirs"


# checkpoints of another library


@pytest.mark.slow
def test_a_checkpoint_of_trl_is_resumed_from_when_told_to(tiny_folder, trl_run, tmp_path, logged):
    folder = trl_run[0] / "checkpoint-2"
    with pytest.raises(ConfigError, match="which posttrain did not write.* set `check_resume: false`"):
        build(tiny_folder, tmp_path).train(resume_from_checkpoint=str(folder))
    with pytest.raises(ConfigError, match="which posttrain did not write"):
        RobustDPOConfig(**settings(tmp_path, resume_from_checkpoint=str(folder)))
    trainer = build(tiny_folder, tmp_path, check_resume=False)
    trainer.train(resume_from_checkpoint=str(folder))
    assert "its method, model, data, seed and batch split, cannot be checked" in logged.text
    # one forward more or less in the last digits; a new optimizer is off by a hundred times as much
    assert losses(trainer) == pytest.approx(trl_run[1], abs=3e-5)
    assert state_of(folder) and not (folder / MARKER).exists()


@pytest.mark.slow
def test_no_checkpoint_of_another_library_is_taken_by_itself(tiny_folder, trl_run, tmp_path, logged):
    out = shutil.copytree(trl_run[0], tmp_path / "run")
    for wanted in (None, "auto"):
        assert checkpoints.find(out, wanted, check=False) is None
    with pytest.raises(
        ConfigError, match="no complete checkpoint: checkpoint-2 was not written by posttrain, .*checkp"
    ):
        checkpoints.find(out, True, check=False)
    trainer = build(tiny_folder, out, save_strategy="no", max_steps=1)
    trainer.train(resume_from_checkpoint="auto")
    assert "is auto: starting anew. Passed over: checkpoint-2 was not written by posttrain" in logged.text


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        (["trainer_state.json"], "checkpoint-2, which is not complete"),
        (["adapter_model.safetensors"], "checkpoint-2, which is not complete"),
        (["optimizer.pt"], "has no optimizer.pt"),
        (["scheduler.pt", "rng_state.pth"], "has no scheduler.pt, rng_state.pth"),
    ],
)
def test_a_foreign_checkpoint_that_is_not_whole_is_named_with_what_it_lacks(trl_run, tmp_path, gone, message):
    folder = shutil.copytree(trl_run[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    for name in gone:
        (folder / name).unlink()
    with pytest.raises(ConfigError, match=message):
        checkpoints.find(tmp_path, str(folder), check=False)


def test_weights_that_are_not_the_runs_own_are_refused_and_not_loaded_in_part(tiny_folder, trl_run, tmp_path):
    from peft import LoraConfig

    folder = str(trl_run[0] / "checkpoint-2")
    for adapter, named in (
        (LoraConfig(r=2, target_modules="all-linear"), "tensors differ in name or shape"),
        (LoraConfig(r=4, target_modules=["q_proj"]), "tensors differ in name or shape"),
        (None, "holds an adapter, and this run trains the whole model"),
    ):
        trainer = RobustDPOTrainer(
            tiny_folder,
            args=RobustDPOConfig(**settings(tmp_path, pair_loss="dpo", max_steps=4, check_resume=False)),
            train_dataset=make_pairs(16),
            peft_config=adapter,
        )
        with pytest.raises(ConfigError, match=named):
            trainer.train(resume_from_checkpoint=folder)


def test_a_foreign_checkpoint_of_an_adapter_that_moves_the_base_is_refused(tiny_folder, tmp_path):
    from peft import LoraConfig

    adapter = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa", lora_dropout=0.0)
    args = RobustDPOConfig(**settings(tmp_path, pair_loss="dpo", max_steps=2, check_resume=False) | SAVES)
    trainer = RobustDPOTrainer(tiny_folder, args=args, train_dataset=make_pairs(8), peft_config=adapter)
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    (folder / MARKER).unlink()
    with pytest.raises(ConfigError, match="init_lora_weights moves the base weights, of which it holds no trace"):
        trainer.train(resume_from_checkpoint=str(folder))


# checkpoints without optimizer, schedule or random state


@pytest.fixture(scope="module")
def weights_run(tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("weights") / "run"
    build(tiny_folder, out, save_only_model=True, lr_scheduler_type="cosine").train()
    return out


@pytest.mark.slow
def test_a_checkpoint_of_weights_alone_is_not_resumed_from_without_a_word(tiny_folder, weights_run, tmp_path):
    given = dict(save_only_model=True, lr_scheduler_type="cosine")
    lacking = "has no optimizer.pt, scheduler.pt, rng_state.pth .* `resume_weights_only: true` goes on from its weights"
    for wanted in (True, str(weights_run / "checkpoint-2")):
        with pytest.raises(ConfigError, match=lacking):
            build(tiny_folder, weights_run, **given).train(resume_from_checkpoint=wanted)
    with pytest.raises(ConfigError, match=lacking):
        RobustDPOConfig(**settings(weights_run, resume_from_checkpoint="true"))


@pytest.mark.slow
def test_auto_says_which_checkpoints_it_passed_over(tiny_folder, our_run, tmp_path, logged):
    out = shutil.copytree(our_run[0], tmp_path / "run")
    (out / "checkpoint-4" / "optimizer.pt").unlink()
    assert checkpoints.find(out, "auto") == checkpoints.find(out, True) == out / "checkpoint-2"
    trainer = build(tiny_folder, out)
    trainer.train(resume_from_checkpoint="auto")
    assert f"going on from {out / 'checkpoint-2'}. Passed over: checkpoint-4 has no optimizer.pt" in logged.text
    assert losses(trainer) == our_run[1]


@pytest.mark.parametrize("gone", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_each_part_of_the_state_is_missed(our_run, tmp_path, gone):
    out = shutil.copytree(our_run[0], tmp_path / "run")
    (out / "checkpoint-4" / gone).unlink()
    with pytest.raises(ConfigError, match=f"checkpoint-4 has no {gone} "):
        checkpoints.find(out, str(out / "checkpoint-4"), check=False)
    assert checkpoints.find(out, "auto") == out / "checkpoint-2"
    assert checkpoints.find(out, "auto", weights_only=True) == out / "checkpoint-4"


@pytest.mark.parametrize(
    ("there", "lost"),
    [
        (["optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"], []),
        (["global_step4/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "rng_state_0.pth", "latest"], []),
        (["global_step4/mp_rank_00_model_states.pt", "rng_state_0.pth"], ["optimizer.pt"]),
        (["optimizer_0/__0_0.distcp", "pytorch_model_fsdp_0/__0_0.distcp", "scheduler.pt", "rng_state_0.pth"], []),
        (["optimizer.bin", "pytorch_model_fsdp.bin", "rng_state_0.pth"], ["scheduler.pt"]),
        (["adapter_model.safetensors", "trainer_state.json"], ["optimizer.pt", "scheduler.pt", "rng_state.pth"]),
    ],
)
def test_the_state_is_looked_for_in_the_form_of_each_engine(tmp_path, there, lost):
    for name in there:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert checkpoint_files.missing_state(tmp_path) == lost


def test_a_rank_whose_random_state_was_deleted_is_missed(tmp_path):
    folder = finished(tmp_path / "checkpoint-1", "optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state_1.pth")
    assert checkpoints.find(tmp_path, "auto") == folder
    (folder / "rng_state_1.pth").unlink()
    assert checkpoint_files.missing_state(folder) == ["rng_state_1.pth"]
    assert checkpoints.find(tmp_path, "auto") is None


@pytest.mark.slow
@pytest.mark.parametrize("source", ["weights alone", "whole"])
def test_weights_alone_go_on_with_a_new_optimizer_at_the_rate_of_their_step(
    tiny_folder, weights_run, our_run, tmp_path, logged, source
):
    given = dict(resume_weights_only=True, lr_scheduler_type="cosine", check_resume=source != "whole")
    out = weights_run if source == "weights alone" else our_run[0]
    trainer = build(tiny_folder, tmp_path / "on", save_strategy="no", **given)
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    assert "going on from the weights of" in logged.text and "at step 2 with a new optimizer" in logged.text
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["learning_rate"] for row in rows[2:]] == pytest.approx([5e-4, 1e-3 * (1 - 0.5**0.5) / 2])
    steps = {state["step"].item() for state in trainer.optimizer.state.values()}
    assert steps == {2.0}, "two steps of the new optimizer"


# running again


def test_the_notes_of_a_run_are_named_where_another_comes(tiny_folder, our_run):
    with pytest.raises(
        ConfigError, match=r"\(beta: 1.0 there, 0.2 here\). Choose another output_dir, or set `overwrite:"
    ):
        build(tiny_folder, our_run[0], beta=0.2)


@pytest.mark.slow
def test_overwrite_replaces_what_the_earlier_run_wrote_and_nothing_else(
    tiny_folder, our_run, trl_run, tmp_path, logged
):
    out = shutil.copytree(our_run[0], tmp_path / "run")
    earlier = build(tiny_folder, out, max_steps=1, save_strategy="no")
    (out / "config.json").write_text("{}")
    earlier.save_model()
    earlier.save_model(str(out))
    noted = json.loads((out / run_folder.NOTE).read_text())["files"]
    assert {"adapter_model.safetensors", "training_args.bin"} <= set(noted) and "config.json" not in noted
    (out / "notes.txt").write_text("mine")
    (out / "checkpoint-2" / "notes.txt").write_text("mine")
    shutil.copytree(trl_run[0] / "checkpoint-4", out / "checkpoint-400")
    half_left(out / "checkpoint-77", {"method": "Other"}, "optimizer.pt")
    kept = ("notes.txt", "config.json", "checkpoint-2/notes.txt", "checkpoint-400/optimizer.pt")
    with pytest.raises(ConfigError, match="holds a model written by another run"):
        build(tiny_folder, out, beta=0.2)
    trainer = build(tiny_folder, out, beta=0.2, overwrite=True, save_strategy="no", max_steps=1)
    assert (out / "adapter_model.safetensors").exists(), "until training begins"
    trainer.train()
    assert not (out / "adapter_model.safetensors").exists() and not (out / "checkpoint-77").exists()
    assert all((out / name).exists() for name in kept) and checkpoints.complete(out) == []
    trainer.save_model()
    assert build(tiny_folder, out, beta=0.2)
    assert (out / "metrics.jsonl").read_text().count('"loss"') == 1


@pytest.mark.slow
def test_overwrite_and_auto_go_on_with_the_same_run_and_replace_another(tiny_folder, our_run, tmp_path, logged):
    out = shutil.copytree(our_run[0], tmp_path / "run")
    (out / "checkpoint-4" / "optimizer.pt").unlink()
    same = build(tiny_folder, out, overwrite=True)
    same.train(resume_from_checkpoint="auto")
    assert losses(same) == our_run[1] and "deleted from" not in logged.text
    logged.clear()
    other = build(tiny_folder, out, overwrite=True, learning_rate=5e-4, max_steps=2, save_steps=1)
    other.train(resume_from_checkpoint="auto")
    assert "learning_rate: 0.001 there, 0.0005 here): overwrite is true, this one starts anew" in logged.text
    assert [path.name for path in checkpoints.complete(out)] == ["checkpoint-1", "checkpoint-2"]


def test_overwrite_never_takes_a_model_that_is_not_ours(tiny_folder, tmp_path):
    for name in ("model.safetensors", "model-00001-of-00002.safetensors", "adapter_model.bin"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
        for overrides in (dict(overwrite=True), dict(check_resume=False), {}):
            with pytest.raises(ConfigError, match=r"holds a model \(.*\) that no run has noted as its own"):
                build(tiny_folder, tmp_path / name, **overrides)


def test_overwrite_does_not_delete_the_model_that_the_run_starts_from(tiny_folder, tmp_path):
    base = shutil.copytree(tiny_folder, tmp_path / "run" / "base")
    with pytest.raises(ConfigError, match="overwrite is true, and the model that the run starts from, .*base, lies in"):
        build(str(base), tmp_path / "run", overwrite=True)
    assert build(str(base), tmp_path / "run")


@pytest.mark.slow
def test_a_run_that_was_interrupted_and_saved_by_hand_may_start_again(tiny_folder, tmp_path):
    build(tiny_folder, tmp_path, save_strategy="no").save_model()
    assert build(tiny_folder, tmp_path)
    with pytest.raises(ConfigError, match=r"holds a model written by another run \(beta: 1.0 there, 0.2 here\)"):
        build(tiny_folder, tmp_path, beta=0.2)


@pytest.mark.core("error3")
@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0"),
            "a file could not be written whole: the disk is full, or a quota or size limit was met",
        ),
        (
            RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
            "a file could not be written whole: the disk is full, or a quota or size limit was met",
        ),
        (OSError(27, "File too large"), "[Errno 27] File too large."),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device."),
    ],
)
def test_a_file_that_cannot_be_written_whole_is_told_in_words(tiny_folder, tmp_path, monkeypatch, error, told):
    trainer = build(tiny_folder, tmp_path)

    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(EnvironmentIssue, match=re.escape(f"checkpoint-2 could not be saved: {told}")):
        trainer.train()
    assert not (tmp_path / "checkpoint-2").exists()


def test_every_folder_of_a_new_checkpoint_is_synced_before_it_has_its_name(tmp_path, monkeypatch):
    partial, folder, synced = tmp_path / ".saving" / "checkpoint-3", tmp_path / "checkpoint-3", []
    checkpoint_files.begin(partial, {})
    (partial / "global_step3").mkdir()
    for name in ("model.safetensors", "global_step3/rank0_optim_states.pt"):
        (partial / name).write_bytes(b"x")
    sync = checkpoint_files.sync
    for module in (checkpoint_files, markers):
        monkeypatch.setattr(module, "sync", lambda path: (synced.append((path, folder.exists())), sync(path)))
    checkpoint_files.put_in_place(partial, folder, {"identity": {}, "files": checkpoint_files.sizes(partial)})
    assert (partial / "global_step3", False) in synced and (partial, False) in synced
    assert synced[-1] == (tmp_path, True) and checkpoint_files.is_complete(folder) and not partial.exists()


DAMAGED = [
    {}, {"state": {}}, {"state": "x"}, {"state": {"num_tokens": "x"}}, {"state": {"num_tokens": 1, "method": "x"}},
    {"state": {"num_tokens": 1, "schedule": {"total": "x", "knots": []}}},
    {"state": {"num_tokens": 1, "schedule": {"total": 1, "knots": [[1]]}}}, {"files": ["x"]}, {"digests": {"x": 1}},
]  # fmt: skip


@pytest.mark.parametrize("part", DAMAGED, ids=str)
def test_a_marker_that_was_edited_by_hand_is_damaged(tmp_path, part):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    good = {"identity": {}, "state": {"num_tokens": 1, "schedule": {"total": 4, "knots": [[2, 1.5]]}}}
    (folder / MARKER).write_text(json.dumps(good))
    assert checkpoints.read(folder, None) == good
    (folder / MARKER).write_text(json.dumps({"identity": {}} | part))
    with pytest.raises(ConfigError, match=f"{MARKER} is damaged"):
        checkpoints.read(folder, None)


def forged(folder, change):
    """Have the optimizer of a checkpoint hold something else, of which the marker says that it was saved so."""
    content = torch.load(folder / "optimizer.pt", weights_only=True)
    change(content)
    torch.save(content, folder / "optimizer.pt")
    marker = json.loads((folder / MARKER).read_text())
    marker["files"]["optimizer.pt"] = (folder / "optimizer.pt").stat().st_size
    marker["digests"]["optimizer.pt"] = hashlib.sha256((folder / "optimizer.pt").read_bytes()).hexdigest()
    (folder / MARKER).write_text(json.dumps(marker))


def of_another_shape(content):
    for state in content["state"].values():
        state.update(exp_avg=torch.zeros(3), exp_avg_sq=torch.zeros(3))


def test_a_state_of_another_shape_is_passed_over_refused_by_name_and_never_loaded(
    tiny_folder, our_run, tmp_path, logged
):
    out = tmp_path / "run"
    shutil.copytree(our_run[0], out)
    forged(out / "checkpoint-4", of_another_shape)
    trainer = build(tiny_folder, out)
    assert trainer._found_checkpoint("auto") == out / "checkpoint-2"
    told = r"checkpoint-4 is damaged: optimizer.pt has exp_avg of shape \[3\] for base_model.*lora_A.* of shape \[\d+, "
    assert re.search(f"Passed over: {told}", logged.text)
    with pytest.raises(ConfigError, match=told):
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-4"))
    # where settings are not compared, it shows as it is loaded
    trainer = build(tiny_folder, out, check_resume=False, max_steps=5)
    with pytest.raises(ConfigError, match="optimizer.pt or scheduler.pt of the checkpoint .* has exp_avg of shape"):
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-4"))
    forged(out / "checkpoint-2", lambda content: content["param_groups"][0].update(maximize=True))
    with pytest.raises(ConfigError, match="has maximize True, and the run False"):
        trainer.train(resume_from_checkpoint=str(out / "checkpoint-2"))


def test_weights_that_are_no_numbers_are_damage(our_run, tmp_path):
    folder = shutil.copytree(our_run[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    weights = load_file(folder / "adapter_model.safetensors")
    name = max(weights)
    weights[name].view(-1)[-1] = float("nan")
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    told = training_state.fault(folder)
    assert told == f"adapter_model.safetensors holds numbers that are none (NaN), in {name}"
    weights[name].view(-1)[-1] = float("-inf")
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    assert training_state.fault(folder) == ""


def test_a_finished_run_is_not_trained_again_from_an_earlier_checkpoint(tiny_folder, our_run, tmp_path, logged):
    """As a run without saves has one of a preemption, from which it went on to its end."""
    out, given = tmp_path / "run", dict(save_strategy="no", max_steps=4)
    shutil.copytree(our_run[0], out, ignore=shutil.ignore_patterns("checkpoint-4"))
    trainer = build(tiny_folder, out, **given)
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_model(_internal_call=True)
    assert content_of(out / NOTE)["finished"]["step"] == 4
    again = build(tiny_folder, out, **given)
    for wanted in ("auto", True):
        with pytest.raises(ConfigError, match="finished at step 4, and no checkpoint later than checkpoint-2"):
            again.train(resume_from_checkpoint=wanted)
    again.args.overwrite = True
    assert again._found_checkpoint("auto") == out / "checkpoint-2"
    assert build(tiny_folder, out, **given | dict(max_steps=6))._found_checkpoint("auto") == out / "checkpoint-2"
    assert "the run goes on from there, and its model is going to replace that one" in logged.text
    # while a run that was named trains, it is not finished
    again.args.overwrite = False
    again.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    assert "finished" not in content_of(out / NOTE)


@pytest.mark.slow
def test_a_finished_run_with_a_checkpoint_of_its_end_may_be_asked_again(tiny_folder, our_run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(our_run[0], out)
    trainer = build(tiny_folder, out)
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_model(_internal_call=True)
    assert content_of(out / NOTE)["finished"]["step"] == 4
    assert build(tiny_folder, out)._found_checkpoint("auto") == out / "checkpoint-4"


def test_a_state_that_a_checkpoint_would_not_keep_whole_is_refused_when_it_is_written(tmp_path):
    state = {"method": {"scores": [1.0, math.nan], "drawn_by": "ab" * 32}}
    kept = {"identity": {"hub_token": "hf_abc"}, "state": state}
    markers.mark(tmp_path, kept)
    told = json.loads((tmp_path / MARKER).read_text())
    assert json.dumps(told["state"]) == json.dumps(kept["state"]) and told["identity"] == {}
    with pytest.raises(PosttrainError, match="Give it another name in method_state"):
        markers.mark(tmp_path, {"identity": {}, "state": {"method": {"canaries": {"secret": "ab" * 32}}}})
