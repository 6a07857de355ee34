"""What a user can get wrong, through the recipe's own command line: the text, the exit code, and nothing half-written.

The recipe runs in this process, as a subprocess takes ten seconds to import; `test_robust_dpo.py` and `test_verbs.py`
have one each.
"""

import errno
import json
import runpy
import sys

import pytest

from posttrain import RobustDPOTrainer
from posttrain.paths import recipes_dir
from posttrain.run import checkpoints, checks, watches

TEXTS = [{"prompt": f"Is {i} even?", "chosen": " yes", "rejected": f" no, {i}"} for i in range(4)]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def recipe(tiny_folder, tmp_path, monkeypatch, capsys):
    """Runs the recipe with these settings on four pairs and a tiny model: exit code and what was said on stderr."""
    (tmp_path / "pairs.jsonl").write_text(lines(TEXTS))
    monkeypatch.chdir(tmp_path)

    def run(*settings, **given):
        defaults = {
            "model_name_or_path": tiny_folder, "dataset_name": "pairs.jsonl", "output_dir": "run", "max_steps": 1,
            "per_device_train_batch_size": 2, "use_peft": "true", "lora_r": 2, "lora_target_modules": "all-linear",
            "max_length": 128, "disable_tqdm": "true", "save_strategy": "no", "pair_loss": "rdpo",
        }  # fmt: skip
        flags = [f"--{name}={value}" for name, value in (defaults | given).items() if value is not None]
        monkeypatch.setattr(sys, "argv", ["robust_dpo.py", *flags, *settings])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(recipes_dir() / "robust_dpo.py"), run_name="__main__")
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return caught.value.code, said

    return run


SETTINGS = [
    (dict(flip_rate=0.5), "flip_rate is 0.5; it must lie in [0, 0.5)"),
    (dict(learning_rate="fast"), "command line: `learning_rate` is 'fast'; it takes a number."),
    (dict(learning_rat=0.1), "unknown key `learning_rat`; did you mean `learning_rate` (RobustDPOConfig)?"),
    (dict(warmup_ratio=0.1), "`warmup_ratio` is not a setting any more: write `warmup_steps: 0.1`"),
    (dict(max_train_rows=0), "max_train_rows is 0; it must be 1 or more, or left out for all rows."),
    (dict(report_to="wandbb"), "report_to is 'wandbb'; it must be one of"),
    (dict(attn_implementation="spda"), "attn_implementation is 'spda'; it must be one of"),
    (dict(dtype="bfloat"), "`dtype` is 'bfloat'; it takes auto, bfloat16, float16 or float32."),
    (dict(lora_r=0), "the LoRA rank (lora_r) is 0; it must be a whole number of 1 or more."),
    (dict(lora_target_modules="q_projj"), "these settings: Target modules {'q_projj'} not found in the base model."),
    (dict(resume_from_checkpoint="nope"), "resume_from_checkpoint is nope, which does not exist"),
    (
        dict(resume_from_checkpoint="true"),
        "resume_from_checkpoint is true, but run holds no complete checkpoint",
    ),
    (dict(output_dir="pairs.jsonl/run"), "output_dir is pairs.jsonl/run, which cannot be written to"),
    (dict(model_name_or_path="./no-such-model"), "model './no-such-model' is a folder that does not exist"),
    (dict(model_name_or_path="pairs.jsonl"), "model 'pairs.jsonl' is a file; give the folder that holds it"),
    (dict(dataset_name=""), "dataset_name is not set; give it in the config file or as --dataset_name VALUE."),
    (dict(dataloader_num_workers=-1), "dataloader_num_workers is -1; it must be a whole number of 0 or more."),
    (dict(adam_beta1=1.5), "adam_beta1 is 1.5; it must lie in [0, 1)."),
    (dict(lora_task_type="CAUSALLM"), "the adapter cannot be built with these settings: Invalid task type: 'CAUSALLM'"),
    (dict(output_dir=""), "output_dir is empty; give the folder that the run is to be saved in."),
    (dict(optim="adamw_torchh"), "Did you mean adamw_torch?"),
    (dict(output_dir="x" * 300), "output_dir cannot be a folder (File name too long): xxx"),
    (dict(lora_alpha=-3), "lora_alpha is -3; it must be a number above 0 (at 0 the adapter would never train)."),
    (dict(beta="inf"), "beta is inf; it must be a finite number."),
    (dict(logging_steps="nan"), "logging_steps is nan; it must be a finite number."),
    (dict(warmup_steps="nan"), "warmup_steps is nan; it must be a finite number."),
    (dict(eval_steps="inf", eval_strategy="steps"), "eval_steps is inf; it must be a finite number."),
    (
        dict(optim_args="foo"),
        "optim adamw_torch_fused cannot be built with optim_args 'foo' (written name=value,name=value): ",
    ),
    (
        dict(lr_scheduler_kwargs='{"foo": 1}'),
        "lr_scheduler_type linear cannot be built with lr_scheduler_kwargs {'foo': 1}: ",
    ),
    (
        dict(lr_scheduler_type="warmup_stable_decay"),
        "lr_scheduler_type warmup_stable_decay cannot be built with lr_scheduler_kwargs None: get_wsd_schedule() "
        "missing 1 required positional argument: 'num_decay_steps'",
    ),
    (
        dict(lr_scheduler_type="cosine_with_min_lr"),
        "lr_scheduler_type cosine_with_min_lr cannot be built with lr_scheduler_kwargs None: One of min_lr or",
    ),
    (dict(config="none.yaml"), "the config file none.yaml cannot be read: No such file or directory."),
]


@pytest.mark.parametrize(("given", "message"), SETTINGS, ids=lambda value: "" if isinstance(value, str) else str(value))
def test_a_setting_that_cannot_be_ends_with_code_2(recipe, tmp_path, given, message):
    code, said = recipe(**given)
    assert code == 2 and message in said
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


# one of each place that refuses: config, parser, adapter, folder, model, optimiser
@pytest.mark.parametrize(("given", "message"), [SETTINGS[i] for i in (0, 1, 9, 12, 13, -3)])
def test_a_dry_run_refuses_a_setting_in_the_same_words(recipe, tmp_path, given, message):
    code, said = recipe(**given, dry_run="true")
    assert code == 2 and message in said
    assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir())


FILES = [
    ("extra: 1\nseed: &x [*x]\n", "2: what the anchor names here contains itself."),
    ("seed: 1\n~: 4\n", "2: the key `~` is no text, as all keys are."),
    ('env: {WANDB_NAME: "a\\0b"}\n', "1: `env` cannot set 'WANDB_NAME': embedded null byte."),
    ("seed: " + "1" * 5000, "1: not valid YAML: a value cannot be read as int (Exceeds the limit"),
]


@pytest.mark.parametrize(("content", "message"), FILES, ids=["cycle", "no text", "env", "digits"])
def test_a_config_file_that_cannot_be_ends_with_code_2_and_its_line(recipe, tmp_path, content, message):
    (tmp_path / "bad.yaml").write_text(content)
    code, said = recipe(config="bad.yaml")
    assert code == 2 and f"bad.yaml:{message}" in said
    assert not (tmp_path / "run").exists()


DATA = [
    (lines(row | {"rejected": row["chosen"]} for row in TEXTS), "train_dataset: all 4 pairs have identical sides."),
    (lines(row | {"chosen": " "} for row in TEXTS), "train_dataset: all 4 pairs have an empty side. Fill it in"),
    (lines({"prompt": "q", "chosen": "a"} for _ in range(4)), "line 1 has no column rejected. Found: prompt, ch"),
    (lines([TEXTS[0], TEXTS[1] | {"rejected": None}]), "line 2: 'rejected' is null; every row needs both sides."),
    (lines([TEXTS[0], TEXTS[1] | {"prompt": None}]), "line 2: 'prompt' is null; fill it in, or leave the row out."),
    (lines([TEXTS[0], TEXTS[1] | {"chosen": 5}]), "line 2: chosen is a number, and in bad.jsonl, line 1 it is a text;"),
    (lines(row | {"chosen": 5} for row in TEXTS), "train_dataset, row 1: chosen is a number (5). It must be a text"),
    (lines(row | {"flip_rate": 0.7} for row in TEXTS), "flip_rate of 0.7 in row 1; every row's flip_rate must lie in"),
    (lines(TEXTS[:2]) + '{"prompt": "q",\n', "bad.jsonl, line 3, column 16: broken JSON: "),
    (lines(row | {"prompt": "p" * 200} for row in TEXTS), "max_length is 128, and every prompt alone is that long"),
    (lines([TEXTS[0], TEXTS[1] | {"chosen": "\ud83d"}]), "bad.jsonl, line 2: '\\ud83d' is half of a surrogate pair"),
    ("", "bad.jsonl holds no rows"),
]


@pytest.mark.parametrize(("content", "message"), DATA, ids=[message[:40] for _, message in DATA])
def test_data_that_cannot_be_trained_on_ends_with_code_3(recipe, tmp_path, content, message):
    (tmp_path / "bad.jsonl").write_text(content)
    code, said = recipe(dataset_name="bad.jsonl")
    assert code == 3 and message in said
    assert not (tmp_path / "run").exists()


def test_data_that_is_not_there_ends_with_code_3(recipe, tmp_path):
    code, said = recipe(dataset_name="gone.jsonl")
    assert code == 3 and f"gone.jsonl does not exist (working folder: {tmp_path})." in said
    (tmp_path / "folder").mkdir()
    code, said = recipe(dataset_name="folder")
    assert code == 3 and "the data set 'folder' is a folder without data files that can be read" in said


def test_a_hub_that_cannot_be_reached_ends_with_code_4_for_data_and_model(recipe):
    code, said = recipe(model_name_or_path="org/gone")
    assert code == 4 and "model 'org/gone' is no folder here and not in the cache, and the hub cannot be" in said
    code, said = recipe(dataset_name="org/gone")
    assert code == 4 and "the data set 'org/gone' is no file or folder here, and the hub cannot be" in said


@pytest.mark.parametrize(
    ("optim", "package"), [("galore_adamw", "galore_torch"), ("lomo", "lomo_optim"), ("stable_adamw", "torch-optimi")]
)
def test_an_optimiser_whose_package_is_missing_ends_with_code_4(recipe, optim, package):
    code, said = recipe(optim=optim)
    assert code == 4
    assert f"these settings need a package that is missing: You need to install `{package}` in order to use" in said


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
    (tmp_path / "other.jsonl").write_text(lines(TEXTS[1:]))
    there, elsewhere = {}, dict(output_dir="elsewhere", resume_from_checkpoint="run/checkpoint-1")
    for place in (there, elsewhere):
        written = "written by another run ("
        code, said = recipe(**saving, **place, pair_loss="dpo")
        assert code == 2 and written in said and "pair_loss: rdpo there, dpo here" in said
        code, said = recipe(**saving, **place, dataset_name="other.jsonl")
        assert code == 2 and written in said and "data: " in said
    assert recipe(**saving, max_steps=2, resume_from_checkpoint="true")[0] == 0
    assert [path.name for path in checkpoints.complete("run")] == ["checkpoint-1", "checkpoint-2"]


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
