"""What a user can get wrong, through the recipe's own command line: the text, the exit code, and nothing half-written.

The recipe runs in this process, as a subprocess takes ten seconds to import; `test_robust_dpo.py` and `test_verbs.py`
have one each.
"""

import errno
import functools

import pytest

from posttrain import RobustDPOTrainer
from posttrain.run import checkpoints, checks, watches
from tests.recipe.in_process import PAIRS, lines, robust_dpo


@pytest.fixture
def recipe(tiny_folder, tmp_path, monkeypatch):
    """Runs the recipe with these settings on four pairs and a tiny model: exit code and what was said on stderr."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(robust_dpo, tmp_path, tiny_folder)


def test_an_adapter_on_one_named_module_trains(recipe):
    assert recipe(lora_target_modules="q_proj")[0] == 0


@pytest.mark.parametrize("mode", ["true", "false"])
def test_flash_attention_that_is_not_installed_ends_with_code_4(recipe, monkeypatch, mode):
    monkeypatch.setitem(checks._FLASH_ATTENTION, "flash_attention_2", lambda: False)
    monkeypatch.setattr(checks, "is_kernels_available", lambda: False)
    code, said = recipe(attn_implementation="flash_attention_2", dry_run=mode)
    assert code == 4
    assert "attn_implementation is flash_attention_2, whose package is not installed here. Install flash-attn" in said


def test_fsdp_without_an_accelerator_ends_with_code_2(recipe, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    for mode in ("true", "false"):
        code, said = recipe(fsdp="full_shard", dry_run=mode)
        assert code == 2 and "FSDP was asked for on a machine without an accelerator" in said


def test_dr_dpo_of_one_pair_is_warned_about(recipe):
    one = dict(pair_loss="dpo", reduction="dr_dpo", dr_dpo_scope="micro_batch", per_device_train_batch_size=1)
    code, said = recipe(**one, dry_run="true")
    assert code == 0
    assert "dr_dpo_scope is micro_batch with per_device_train_batch_size 1: of one pair Dr. DPO is DPO." in said


def test_another_runs_folder_is_neither_written_into_nor_resumed_from(recipe, tmp_path):
    saving = dict(save_strategy="steps", save_steps=1)
    assert recipe(**saving)[0] == 0
    (tmp_path / "other.jsonl").write_text(lines(PAIRS[1:]))
    there, elsewhere = {}, dict(output_dir="elsewhere", resume_from_checkpoint="run/checkpoint-1")
    for place in (there, elsewhere):
        written = "written by another run ("
        code, said = recipe(**saving, **place, pair_loss="dpo")
        assert code == 2 and written in said and "pair_loss: rdpo there, dpo here" in said
        code, said = recipe(**saving, **place, dataset_name="other.jsonl")
        assert code == 2 and written in said and "data: " in said
    assert recipe(**saving, max_steps=2, resume_from_checkpoint="true")[0] == 0
    assert [path.name for path in checkpoints.complete("run")] == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.slow
def test_overwrite_replaces_another_runs_folder_from_the_command_line_too(recipe, tmp_path):
    saving = dict(save_strategy="steps", save_steps=1)
    assert recipe(**saving, max_steps=2)[0] == 0
    (tmp_path / "run" / "notes.txt").write_text("mine")
    code, said = recipe(**saving, flip_rate="0.3")
    assert code == 2 and "(flip_rate: 0.1 there, 0.3 here). Choose another output_dir, or set `overwrite: true`" in said
    assert recipe(**saving, flip_rate="0.3", dry_run="true")[0] == 2, "a dry run says so as well"
    code, said = recipe(**saving, flip_rate="0.3", overwrite="true", resume_from_checkpoint="auto")
    assert code == 0 and "overwrite is true, this one starts anew" in said
    assert [path.name for path in checkpoints.complete("run")] == ["checkpoint-1"]
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert recipe(**saving, flip_rate="0.3", max_steps=1)[0] == 0


def test_a_full_disk_ends_with_code_4_and_the_last_complete_checkpoint(recipe, monkeypatch):
    original = RobustDPOTrainer._save_rng_state

    def full(self, output_dir):
        if self.state.global_step == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, output_dir)

    monkeypatch.setattr(RobustDPOTrainer, "_save_rng_state", full)
    code, said = recipe(save_strategy="steps", save_steps=1, max_steps=2)
    assert code == 4
    assert "No space left on device. The last complete one is run/checkpoint-1; go on from it with `resume_from" in said
    assert [path.name for path in checkpoints.complete("run")] == ["checkpoint-1"]


def test_a_loss_that_is_no_number_ends_with_code_5_and_the_last_finite_weights(recipe, tmp_path, monkeypatch):
    inner = RobustDPOTrainer.pair_losses

    def poisoned(self, *args):
        return inner(self, *args) * (float("nan") if self.state.global_step == 1 else 1.0)

    monkeypatch.setattr(RobustDPOTrainer, "pair_losses", poisoned)
    code, said = recipe(max_steps=2)
    assert code == 5
    assert "the loss became NaN or infinite at step 2; the weights after step 1 are in run/last-finite-1." in said
    assert (tmp_path / "run" / "last-finite-1" / "adapter_model.safetensors").is_file()


def test_adapters_without_gradient_end_with_code_5(recipe, monkeypatch):
    monkeypatch.setattr(watches.LiveGradients, "_note", lambda self, name, gradient: None)
    code, said = recipe(max_steps=3)
    assert code == 5 and "adapter tensors got no gradient in the first two steps: " in said


def test_no_file_of_a_run_holds_the_hub_token(recipe, tmp_path):
    token = "hf_" + "aB3" * 11
    assert recipe(hub_token=token, save_strategy="steps", save_steps=1)[0] == 0
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert sum(path.name == "training_args.bin" for path in files) == 2
    assert not [path for path in files if token.encode() in path.read_bytes()]


def test_an_error_does_not_repeat_the_hub_token(recipe):
    token = "hf_" + "aB3" * 11
    code, said = recipe(token)
    assert code == 2 and "command line: `hf_***` follows no key; write `--key value`." in said
    assert token not in said
