import errno
import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file

from posttrain import RobustDPOConfig, RobustDPOTrainer
from posttrain.errors import ConfigError, DivergedError, EnvironmentIssue
from posttrain.run import checkpoint_files, checkpoints
from tests.conftest import make_pairs
from tests.training import lora, losses, settings, trainable


def build(folder, out, pairs=None, **overrides):
    return RobustDPOTrainer(
        folder,
        args=RobustDPOConfig(**settings(out, pair_loss="dpo") | overrides),
        train_dataset=pairs if pairs is not None else make_pairs(16),
        peft_config=lora(),
    )


@pytest.mark.core("nan")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_before_the_optimiser_step(tiny_folder, tmp_path, value):
    trainer = build(tiny_folder, tmp_path, max_steps=4, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    inner, calls = trainer.pair_losses, []

    def poisoned(*args):
        calls.append(None)
        # the first micro-batch of the third step, which is not its last
        return inner(*args) * (value if len(calls) == 5 else 1.0)

    trainer.pair_losses = poisoned
    with pytest.raises(
        DivergedError, match="the loss became NaN or infinite at step 3; the weights after step 2 are in"
    ):
        trainer.train()
    assert DivergedError.exit_code == 5
    assert len(losses(trainer)) == 2
    saved = load_file(tmp_path / "last-finite-2" / "adapter_model.safetensors")
    two_steps = build(tiny_folder, tmp_path / "two", per_device_train_batch_size=4, gradient_accumulation_steps=2)
    two_steps.train()
    two_steps.save_model(str(tmp_path / "two"))
    expected = load_file(tmp_path / "two" / "adapter_model.safetensors")
    assert saved.keys() == expected.keys() and all(torch.equal(saved[name], expected[name]) for name in saved)


def test_a_gradient_that_is_no_number_stops_before_the_optimiser_step(tiny_folder, tmp_path):
    trainer = build(tiny_folder, tmp_path, max_steps=3, max_grad_norm=1.0)
    parameter = next(p for n, p in trainer.model.named_parameters() if "lora_B" in n)
    parameter.register_hook(lambda g: g * float("nan") if trainer.state.global_step == 1 else g)
    with pytest.raises(DivergedError, match="the gradient became NaN or infinite at step 2; the weights after step 1"):
        trainer.train()


def test_adapters_without_gradient_stop_the_run(tiny_folder, tmp_path):
    trainer = build(tiny_folder, tmp_path, max_steps=4)
    layer = trainer.model.base_model.model.model.layers[1].self_attn.q_proj.lora_A["default"].weight
    layer.register_hook(torch.zeros_like)
    with pytest.raises(
        DivergedError, match=r"1 of \d+ adapter tensors got no gradient in the first two steps: .*q_proj"
    ):
        trainer.train()
    trainer = build(tiny_folder, tmp_path / "off", max_steps=4, check_gradients=False)
    trainer.train()


@pytest.mark.slow
def test_a_warm_up_from_zero_is_no_false_alarm(tiny_folder, tmp_path):
    trainer = build(tiny_folder, tmp_path, max_steps=4, warmup_steps=2, lr_scheduler_type="linear")
    trainer.train()
    assert trainer.state.global_step == 4


def test_adapters_that_the_loss_cannot_reach_are_named(tiny_folder, tmp_path):
    # DPO reads the last hidden state; of a model cut after its first layer the second is never run
    trainer = RobustDPOTrainer(
        tiny_folder,
        args=RobustDPOConfig(**settings(tmp_path, pair_loss="dpo", max_steps=3)),
        train_dataset=make_pairs(8),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.0),
    )
    inner = trainer.model.get_base_model().model
    inner.layers[1].forward = lambda hidden_states, **kwargs: hidden_states
    with pytest.raises(DivergedError, match="2 of 4 adapter tensors got no gradient"):
        trainer.train()


@pytest.mark.slow
def test_resuming_another_run_is_refused_by_name(tiny_folder, tmp_path):
    saving = dict(save_strategy="steps", save_steps=2)
    build(tiny_folder, tmp_path, **saving).train()
    with pytest.raises(ConfigError, match="pair_loss: dpo there, rdpo here"):
        build(tiny_folder, tmp_path, pair_loss="rdpo", max_steps=4).train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match="written by another run .*data: "):
        build(tiny_folder, tmp_path, pairs=make_pairs(16, seed=5), max_steps=4).train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match="gradient_accumulation_steps: 1 there, 2 here"):
        build(tiny_folder, tmp_path, gradient_accumulation_steps=2).train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match="learning_rate: 0.05 there, 0.01 here; weight_decay: 0.0 there, 0.5 here"):
        build(tiny_folder, tmp_path, learning_rate=0.01, weight_decay=0.5).train(resume_from_checkpoint=True)
    relaxed = build(tiny_folder, tmp_path, pairs=make_pairs(16, seed=5), max_steps=4, check_resume=False)
    relaxed.train(resume_from_checkpoint=True)
    assert relaxed.state.global_step == 4


def test_only_complete_checkpoints_are_resumed_from(tiny_folder, tmp_path):
    with pytest.raises(ConfigError, match="holds no complete checkpoint: none. Leave it out"):
        build(tiny_folder, tmp_path).train(resume_from_checkpoint=True)
    build(tiny_folder, tmp_path, save_strategy="steps", save_steps=1).train()
    newest = tmp_path / "checkpoint-2"
    (newest / checkpoints.MARKER).unlink()
    assert checkpoints.find(tmp_path, True) == tmp_path / "checkpoint-1"
    assert checkpoints.find(tmp_path, "auto") == tmp_path / "checkpoint-1"
    assert checkpoints.find(tmp_path, None) is None
    with pytest.raises(ConfigError, match="checkpoint-2, which posttrain did not write, .* The newest complete one in"):
        checkpoints.find(tmp_path, str(newest))
    with pytest.raises(ConfigError, match="which does not exist"):
        checkpoints.find(tmp_path, str(tmp_path / "nowhere"))
    (tmp_path / "checkpoint-1" / checkpoints.MARKER).unlink()
    with pytest.raises(ConfigError, match="no complete checkpoint: checkpoint-1 was not written by posttrain, or not"):
        checkpoints.find(tmp_path, True)
    assert checkpoints.find(tmp_path, "auto") is None


def test_rotation_keeps_the_newest_and_the_best_and_clears_what_is_incomplete(tmp_path):
    for step in (1, 2, 3, 4, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        checkpoint_files.mark(folder, {"identity": {}}, checkpoints.MARKER if step != 4 else checkpoint_files.SAVING)
    checkpoints.rotate(tmp_path, keep=1, best=str(tmp_path / "checkpoint-2"), identity={})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]


@pytest.mark.slow
def test_a_run_that_was_done_takes_no_further_step(tiny_folder, tmp_path):
    # five pairs in steps of two: the last step is not an epoch's end
    run = dict(pairs=make_pairs(5), max_steps=4, save_strategy="steps", save_steps=2, lr_scheduler_type="constant")
    done = build(tiny_folder, tmp_path, **run)
    done.train()
    again = build(tiny_folder, tmp_path, **run)
    again.train(resume_from_checkpoint="auto")
    assert again.state.global_step == 4 and not (tmp_path / "checkpoint-5").exists()
    ours, theirs = trainable(again.model), trainable(done.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_with_its_file(tiny_folder, tmp_path):
    run = dict(max_steps=2, save_strategy="steps", save_steps=2)
    build(tiny_folder, tmp_path, **run).train()
    folder = tmp_path / "checkpoint-2"
    for name, cut in (("README.md", None), ("adapter_model.safetensors", 10), (checkpoints.MARKER, 5)):
        kept = (folder / name).read_bytes()
        (folder / name).unlink() if cut is None else (folder / name).write_bytes(kept[:cut])
        message = {
            None: "is damaged: README.md is missing",
            10: "is damaged: adapter_model.safetensors has 10 bytes",
            5: "is damaged: posttrain_complete.json cannot be read",
        }
        with pytest.raises(ConfigError, match=f"holds no complete checkpoint: checkpoint-2 {message[cut]}"):
            build(tiny_folder, tmp_path, max_steps=4, check_resume=False).train(resume_from_checkpoint=True)
        (folder / name).write_bytes(kept)


def test_a_flipped_bit_is_found_and_the_one_before_taken(tiny_folder, tmp_path, logged):
    run = dict(save_strategy="steps", save_steps=1)
    build(tiny_folder, tmp_path, max_steps=2, **run).train()
    path = tmp_path / "checkpoint-2" / "adapter_model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ConfigError, match="checkpoint-2 is damaged: adapter_model.safetensors has another content"):
        build(tiny_folder, tmp_path, max_steps=2, **run).train(resume_from_checkpoint=str(path.parent))
    trainer = build(tiny_folder, tmp_path, max_steps=2, **run)
    trainer.train(resume_from_checkpoint="auto")
    assert f"going on from {tmp_path / 'checkpoint-1'}" in logged.text
    assert "checkpoint-2 is damaged: adapter_model.safetensors has another content than was saved" in logged.text
    assert path.read_bytes() != raw and not (tmp_path / ".saving").exists()


@pytest.mark.slow
def test_checkpoints_without_digests_are_still_gone_on_from(tiny_folder, tmp_path):
    build(tiny_folder, tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    marker = tmp_path / "checkpoint-1" / checkpoints.MARKER
    content = json.loads(marker.read_text())
    assert content["digests"].keys() == content["files"].keys()
    marker.write_text(json.dumps({name: value for name, value in content.items() if name != "digests"}))
    trainer = build(tiny_folder, tmp_path, max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 2


@pytest.mark.slow
def test_a_disk_that_torch_finds_full_is_said_as_one(tiny_folder, tmp_path, monkeypatch):
    def full(self, output_dir):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    trainer = build(tiny_folder, tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    monkeypatch.setattr(RobustDPOTrainer, "_save_rng_state", full)
    with pytest.raises(EnvironmentIssue, match="checkpoint-2 could not be saved: .*unexpected pos"):
        trainer.train()


def test_a_full_disk_leaves_the_last_complete_checkpoint(tiny_folder, tmp_path, monkeypatch):
    trainer = build(tiny_folder, tmp_path, max_steps=4, save_strategy="steps", save_steps=2, save_total_limit=1)
    original = RobustDPOTrainer._save_rng_state

    def full(self, output_dir):
        if self.state.global_step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, output_dir)

    monkeypatch.setattr(RobustDPOTrainer, "_save_rng_state", full)
    with pytest.raises(
        EnvironmentIssue, match="No space left on device. The last complete one is .*checkpoint-2; go on"
    ):
        trainer.train()
    assert [path.name for path in checkpoints.complete(tmp_path)] == ["checkpoint-2"]
    assert not (tmp_path / "checkpoint-4").exists(), "its space is given back"


def test_a_marker_tells_the_run_it_belongs_to(tiny_folder, tmp_path):
    trainer = build(tiny_folder, tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    content = json.loads((tmp_path / "checkpoint-2" / checkpoints.MARKER).read_text())
    assert content["identity"]["method"] == "RobustDPOTrainer"
    assert content["state"]["num_tokens"] == trainer.state.log_history[1]["num_tokens"]


@pytest.mark.slow
def test_the_embedded_model_works_by_its_name(tmp_path):
    trainer = build("embedded:tiny", tmp_path / "out", max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1
