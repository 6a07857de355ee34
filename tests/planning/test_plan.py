"""`posttrain plan`: what it tells of a config, and what it says to what cannot be planned."""

import dataclasses
import json

import pytest
from transformers import AutoConfig

from posttrain import RobustDPOConfig, quiet
from posttrain.cli import main
from posttrain.errors import ConfigError
from posttrain.paths import configs_dir
from posttrain.planning import hours, memory, plan
from posttrain.planning.cards import CARDS, GB, card_of
from posttrain.planning.job import Job, Launch
from posttrain.planning.shapes import config_of, shapes_of
from posttrain.recipe import preferences
from tests import training
from tests.conftest import make_pairs

PRIVATE_SFT = sorted((configs_dir() / "dp_sft").glob("*.yaml"))
SMALL = shapes_of(config_of("Qwen/Qwen3-0.6B"))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(quiet, "quiet_libraries", lambda: None)


def planned(capsys, *words) -> dict:
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *words) -> str:
    assert main(["plan", *words]) == 2
    return capsys.readouterr().err


def test_a_shipped_config_is_planned_for_the_cards_of_its_launch(capsys):
    found = planned(capsys, "robust_dpo/zero3", "--rows", "60000", "--tokens", "500")
    assert (found["launch"], found["gpus"], found["nodes"]) == ("zero3", 8, 1)
    # 64 pairs a step, of two answers
    assert found["steps"] == 938 and found["tokens"] == 938 * 64 * 2 * 500
    assert found["fits"] and found["needed_bytes"] == max(sum(parts.values()) for parts in found["bytes"].values())
    assert 0 < found["hours"][0] < found["hours"][1]


def test_prompts_of_a_generation_make_steps(capsys):
    found = planned(capsys, "hpt/single_gpu", "--rows", "7473")
    # 8 x 16 rollouts a step, 8 a prompt
    assert found["steps"] == 468 and found["hours_of_generation"][1] < found["hours"][1]


def test_cards_nodes_launch_and_settings_can_be_others(capsys):
    words = ("robust_dpo/zero3", "--gpus", "16", "--nodes", "2", "--gpu", "a100", "--max_length", "1024")
    found = planned(capsys, *words, "--launch", "fsdp2")
    assert (found["launch"], found["gpus"], found["nodes"], found["gpu"]) == ("fsdp2", 16, 2, "a100")
    assert found["row_tokens"] == 1024


@pytest.mark.core("words1", "words5")
@pytest.mark.parametrize(
    "words, said",
    [
        (["robust_dpo/single_gpu", "--gpus", "4", "--launch", "fsdp2"], "precompute_ref_log_probs is true under FSDP"),
        (["a_lol/single_gpu", "--gpus", "2", "--launch", "fsdp2"], "value is head, which reads the states"),
        (["robust_dpo/zero3", "--sam_rho", "0.05"], "sam_rho is 0.05 under DeepSpeed ZeRO"),
        (["noisy_sft/gift_sw", "--gpus", "2", "--launch", "fsdp2"], "adapter gift_sw under FSDP"),
        (
            ["robust_dpo/single_gpu", "--gpus", "2", "--launch", "zero2", "--refactor_every", "5"],
            "refactor_every under",
        ),
        (["robust_dpo/zero3", "--optim", "torch.optim:Adafactor"], "DeepSpeed ZeRO gives it flat or cut parts"),
    ],
)
def test_a_launch_that_the_trainer_refuses_is_not_planned(capsys, words, said):
    assert said in refusal(capsys, *words)
    # nothing of the supposed launch stays
    assert planned(capsys, "robust_dpo/single_gpu", "--sam_rho", "0.05")["launch"] == "single"


def test_launches_that_the_trainer_refuses_are_not_proposed(capsys):
    words = ("robust_dpo/zero3", "--gpu", "24", "--launch", "single_gpu")
    changes = [fix["change"] for fix in planned(capsys, *words)["fixes"]]
    assert any("--launch zero" in change for change in changes)
    changes = [fix["change"] for fix in planned(capsys, *words, "--sam_rho", "0.05")["fixes"]]
    assert changes and not any("--launch zero" in change for change in changes)


def test_launch_files_are_read_with_what_they_name(capsys, tmp_path):
    content = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    (tmp_path / "ds.json").write_text(json.dumps(content))
    file = tmp_path / "launch.yaml"
    file.write_text(
        "distributed_type: DEEPSPEED\nnum_processes: 8\ndeepspeed_config:\n  deepspeed_config_file: ds.json\n"
    )
    found = planned(capsys, "robust_dpo/zero3", "--launch", str(file))
    assert found["launch"] == "zero3" and "fp32 masters" not in found["bytes"]["training"]
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}))
    of_file = planned(capsys, "robust_dpo/zero3", "--launch", str(file))["needed_bytes"]
    written = "distributed_type: DEEPSPEED\nnum_processes: 8\nmixed_precision: bf16\ndeepspeed_config:\n"
    (tmp_path / "out.yaml").write_text(f"{written}  zero_stage: 3\n  offload_optimizer_device: null\n")
    assert of_file == planned(capsys, "robust_dpo/zero3", "--launch", str(tmp_path / "out.yaml"))["needed_bytes"]
    (tmp_path / "out.yaml").write_text(f"{written}  zero_stage: 3\n  offload_optimizer_device: gpuu\n")
    assert "offload_optimizer_device is 'gpuu'" in refusal(
        capsys, "robust_dpo/zero3", "--launch", str(tmp_path / "out.yaml")
    )
    (tmp_path / "out.yaml").write_text(f"{written}  zero_stage: auto\n")
    assert "ZeRO's stage is 'auto'; a plan knows 2, 3" in refusal(
        capsys, "robust_dpo/zero3", "--launch", str(tmp_path / "out.yaml")
    )
    assert "no such file" in refusal(capsys, "robust_dpo/zero3", "--launch", 5000 * "a")
    (tmp_path / "out.yaml").write_text("distributed_type: NO\n")
    assert planned(capsys, "robust_dpo/single_gpu", "--launch", str(tmp_path / "out.yaml"))["launch"] == "single"
    for offload, parts in (("'false'", True), ("true", False)):
        sharded = f"distributed_type: FSDP\nnum_processes: 8\nfsdp_config:\n  fsdp_offload_params: {offload}\n"
        (tmp_path / "out.yaml").write_text(sharded)
        found = planned(capsys, "robust_dpo/zero3", "--launch", str(tmp_path / "out.yaml"))
        assert ("weights" in found["bytes"]["training"]) is parts
    (tmp_path / "ds.json").write_text("[]")
    assert "is no DeepSpeed config" in refusal(capsys, "robust_dpo/zero3", "--launch", str(file))
    (tmp_path / "ds.json").unlink()
    assert "cannot be read: no such file" in refusal(capsys, "robust_dpo/zero3", "--launch", str(file))
    file.write_text("distributed_type: FSDP\nnum_processes: 8\nfsdp_config:\n  fsdp_version: 1\n")
    assert "fsdp_version is 1; a plan knows 2 alone" in refusal(capsys, "robust_dpo/zero3", "--launch", str(file))
    file.write_text("distributed_type: MULTI_CPU\nnum_processes: 2\n")
    assert "it knows 'NO', MULTI_GPU" in refusal(capsys, "robust_dpo/zero3", "--launch", str(file))


def test_cards_have_the_names_that_drivers_and_shops_give_them():
    for name, card in {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H100 NVL": "h100-nvl",
        "a100-80gb": "a100",
        "NVIDIA A100-SXM4-40GB": "a100-40",
        "NVIDIA GeForce RTX 4090": "rtx4090",
        "NVIDIA RTX A6000": "a6000",
    }.items():
        assert card_of(name) == CARDS[card]
    with pytest.raises(ConfigError) as caught:
        card_of("h20")
    assert "Did you mean" not in str(caught.value)


def test_every_pass_over_a_row_takes_its_time():
    job = Job(SMALL, "preference", 4, 1024)
    forward = hours.flops_per_token(job, 512.0) / 4
    for other, passes in (({"more_forwards": 1.0}, 5), ({"twice": True}, 8), ({"reference": "live"}, 5)):
        assert hours.flops_per_token(dataclasses.replace(job, **other), 512.0) == pytest.approx(passes * forward)


def test_what_does_not_fit_is_said_with_what_would(capsys):
    assert main(["plan", "robust_dpo/zero3", "--gpu", "24"]) == 0
    out = capsys.readouterr().out
    assert "does NOT fit" in out and "It would fit with one of:" in out
    assert main(["plan", "robust_dpo/zero3"]) == 0
    assert "it fits" in capsys.readouterr().out


def test_a_model_that_is_not_at_hand_has_its_size_or_its_folder_told(capsys, tiny_folder):
    words = ("noisy_sft/zero3", "--model_name_or_path")
    said = refusal(capsys, *words, "no/such-model")
    assert "config.json of model 'no/such-model' cannot be read" in said and "--params 7b" in said
    assert planned(capsys, *words, tiny_folder)["parameters"] < 1e6
    assert planned(capsys, *words, "no/such-model", "--params", "7b")["parameters"] == pytest.approx(7e9, rel=0.2)


@pytest.mark.parametrize(
    "words, said",
    [
        (["robust_dpo/zero3", "--gpu", "h9000"], "gpu is 'h9000'"),
        (["robust_dpo/zero3", "--gpus", "0"], "gpus is '0'"),
        (["robust_dpo/zero3", "--gpus", "-3"], "gpus is '-3'"),
        (["robust_dpo/zero3", "--gpus", "8", "--nodes", "3"], "no whole number a node"),
        (["robust_dpo/zero3", "--nodes", "two"], "nodes is 'two'"),
        (["robust_dpo/zero3", "--rows", "1e9"], "rows is '1e9'"),
        (["robust_dpo/zero3", "--tokens", "9" * 400], "tokens is"),
        (["robust_dpo/zero3", "--launch", "zero9"], "launch is 'zero9'"),
        (["robust_dpo/none"], "no such file"),
        (["../elsewhere/none"], "no such file"),
        (["accelerate/zero3"], "no such file"),
        (["robust_dpo/zero3", "--method", "ppo"], "method is 'ppo'"),
        (["robust_dpo/zero3", "--max_length", "null"], "max_length is null"),
        (["robust_dpo/zero3", "--params", "huge"], "params is 'huge'"),
        (["robust_dpo/zero3", "--no_such_setting", "1"], "no_such_setting"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_what_cannot_be_planned_is_refused(words, said, capsys, tmp_path, monkeypatch):
    # what a relative path names must not depend on where the tests run
    monkeypatch.chdir(tmp_path)
    assert said in refusal(capsys, *words)


def test_a_config_elsewhere_names_its_method(capsys, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model_name_or_path: Qwen/Qwen3-0.6B\ndataset_name: pairs.jsonl\noutput_dir: runs/a\n")
    assert "--method NAME" in refusal(capsys, str(path))
    found = planned(capsys, str(path), "--method", "robust-dpo")
    assert found["gpus"] == 1 and found["launch"] == "single"
    # a second model of fp32 weights beside the policy
    assert found["bytes"]["training"]["reference model"] == 4 * SMALL.parameters


def test_an_adapter_that_does_not_fit_and_a_model_that_is_none_are_refused(capsys, tmp_path):
    words = ("noisy_sft/single_gpu", "--lora_target_modules", "no_such_module")
    assert "the adapter does not fit the model" in refusal(capsys, *words)
    (tmp_path / "config.json").write_text("{")
    assert "cannot be read here" in refusal(capsys, "noisy_sft/zero3", "--model_name_or_path", str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "mamba2"}')
    assert "--params 7b" in refusal(capsys, "noisy_sft/zero3", "--model_name_or_path", str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}')
    assert "cannot be read here" in refusal(capsys, "noisy_sft/zero3", "--model_name_or_path", str(tmp_path))


def test_a_dry_run_tells_what_its_processes_need(tiny_folder, tmp_path):
    settings = training.settings(tmp_path, max_length=64, per_device_train_batch_size=2)
    told = preferences.describe(tiny_folder, RobustDPOConfig(**settings), make_pairs(8))
    said = told["memory a process (estimate)"]
    assert said.startswith("0.0") and "rows of 64 tokens" in said and "weights 0.00" in said
    unbounded = RobustDPOConfig(**settings | dict(max_length=None))
    assert (
        "max_length is null"
        in preferences.describe(tiny_folder, unbounded, make_pairs(8))["memory a process (estimate)"]
    )
    strange = AutoConfig.for_model("mamba2")
    assert plan.here(RobustDPOConfig(**settings), strange, None) == "not known of this kind of model"


def test_hours_lie_between_the_shares_of_the_cards_rate():
    job = Job(SMALL, "instructions", rows=8, length=1024, checkpointing=False)
    # 6 multiplications and additions a parameter and token, beside attention over half of a row
    a_token = 6 * (SMALL.linears + SMALL.head) + 3 * 4 * 28 * 2048 * 512
    assert hours.flops_per_token(job, 1024) == a_token
    low, high = hours.estimate(job, Launch(), CARDS["h100"], 100, 1024).total
    floor = a_token * 100 * 8 * 1024 / 989e12 / 3600
    assert low == pytest.approx(2 * floor) and high == pytest.approx(floor / 0.15)
    assert hours.estimate(job, Launch(), card_of("80"), 100, 1024) is None


def test_a_reference_checkpointing_and_a_frozen_base_change_the_passes():
    def passes(shapes=SMALL, **given):
        job = Job(shapes, "preference", rows=8, length=1024, **dict(checkpointing=False) | given)
        return hours.flops_per_token(job, 1024) / hours.flops_per_token(
            Job(SMALL, "preference", rows=8, length=1024, checkpointing=False), 1024
        )

    assert passes(checkpointing=True) == pytest.approx(4 / 3) and passes(reference="live") == pytest.approx(4 / 3)
    assert passes(dataclasses.replace(SMALL, adapter=1000)) == pytest.approx(2 / 3)


def test_steps_are_those_of_the_rows(tmp_path):
    class Args:
        max_steps, num_train_epochs, per_device_train_batch_size, num_generations = -1, 2, 4, 8

    job = Job(SMALL, "instructions", rows=4, length=8, accumulation=2)
    assert plan.steps_of(job, Launch("ddp", 2), Args, 33) == 2 * 3
    assert plan.steps_of(job, Launch(), Args, None) is None


def test_steps_that_are_drawn_have_as_many_rows_on_average_as_are_expected(capsys):
    found = planned(capsys, "dp_sft/ddp", "--rows", "100000", "--tokens", "500")
    # 49 steps draw each of 100,000 rows once, 2048 of them at a time
    assert (found["gpus"], found["steps"], found["tokens"]) == (8, 3 * 49, 3 * 49 * 2048 * 500)
    # each card has an eighth of the rows, whatever its micro-batches hold
    plain = Job(SMALL, "instructions", rows=256, length=500)
    few = dataclasses.replace(plain, rows=8, drawn=2048)
    spent = [hours.estimate(job, Launch("ddp", 8), CARDS["h100"], 10, 500).total for job in (plain, few)]
    assert spent[0] == pytest.approx(spent[1])


def test_gradients_of_rows_take_memory_with_the_rows():
    # so many values train that their gradients are the most of a step
    wide = dataclasses.replace(SMALL, adapter=200_000_000)

    def needed(rows, **given):
        job = Job(wide, "instructions", rows=rows, length=16, **given)
        return sum(memory.phases(job, Launch(), 80e9)["training"].values())

    assert needed(8, drawn=64) - needed(8) == pytest.approx(4.0 * 200_000_000 * 9, rel=0.05)


@pytest.mark.core("dp_sft/cpu", "robust_dpo/private")
@pytest.mark.parametrize("name", [*(f"dp_sft/{path.stem}" for path in PRIVATE_SFT), "robust_dpo/private"])
def test_private_runs_are_planned_and_no_engine_that_they_are_refused_under(name, capsys):
    found = planned(capsys, name, "--rows", "10000")
    assert found["launch"] in ("single", "ddp") and found["fits"] and found["steps"]
    large = (name, "--per_device_train_batch_size", "64")
    card = 0.8 * planned(capsys, *large)["needed_bytes"] / GB
    fixes = planned(capsys, *large, "--gpu", f"{card:.3f}")["fixes"]
    assert fixes and not [fix for fix in fixes if "--launch" in fix["change"]]
    for launch in ("zero2", "zero3", "fsdp2"):
        said = refusal(capsys, name, "--launch", launch)
        assert "which reduces gradients before they are clipped" in said and "is refused under: the run is" in said


def test_a_private_step_of_pairs_has_both_answers_of_each_pair_that_is_drawn(capsys):
    words = ("robust_dpo/private", "--rows", "5000", "--tokens", "100", "--max_steps", "-1", "--target_delta", "1e-5")
    found = planned(capsys, *words, "--num_train_epochs", "2")
    # 313 steps draw each of 5,000 pairs once, 16 at a time
    assert (found["steps"], found["tokens_per_step"]) == (2 * 313, 16 * 2 * 100)
    people = planned(capsys, *words, "--num_train_epochs", "2", "--privacy_unit_column", "user", "--rows_per_unit", "2")
    assert (people["steps"], people["tokens_per_step"]) == (2 * 313, 2 * 16 * 2 * 100)
    plain = planned(capsys, "robust_dpo/cpu", "--rows", "480")
    assert plain["steps"] == 60


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--reduction", "dr_dpo", "--pair_loss", "dpo", "--flip_rate", "0"], "reduction is dr_dpo, which weighs each"),
        (["--max_grad_norm", "1"], "max_grad_norm is 1.0, which would cut the noisy gradient"),
        (["--use_peft", "false"], "there is no LoRA to train"),
        (["--use_dora", "true"], "use_dora of the adapter is True"),
        (["--noise_multiplier", "1", "--target_epsilon", "3"], "which follow from each other"),
        (["--expected_batch_size", "null"], "expected_batch_size is null"),
    ],
)
def test_a_private_run_that_the_trainer_refuses_is_not_planned(words, said, capsys):
    assert said in refusal(capsys, "robust_dpo/private", *words)
