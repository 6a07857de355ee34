import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from posttrain import quiet
from posttrain.cli import main
from posttrain.errors import ConfigError, DataError
from posttrain.recipe.preferences import describe
from tests.conftest import make_pairs
from tests.training import lora, settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def libraries_keep_their_voice(monkeypatch):
    # it would silence them for the tests that follow, too
    monkeypatch.setattr(quiet, "quiet_libraries", lambda: None)


@pytest.fixture(scope="module")
def adapter(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), lora())
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    model.save_pretrained(folder)
    return folder


def test_recipes_are_listed_and_copied(tmp_path, capsys):
    assert main(["recipes", "list"]) == 0
    out = capsys.readouterr().out
    assert "robust_dpo" in out and "cpu, private, single_gpu, zero3" in out and "cpu_zero3" in out
    assert main(["recipes", "copy", "robust_dpo", str(tmp_path)]) == 0
    assert (tmp_path / "robust_dpo.py").read_text() == (ROOT / "recipes/robust_dpo.py").read_text()
    assert (tmp_path / "configs/robust_dpo/cpu.yaml").exists() and (tmp_path / "configs/accelerate/cpu.yaml").exists()
    capsys.readouterr()
    assert main(["recipes", "copy", "robust_dpo", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["recipes", "copy", "nothing", str(tmp_path)]) == 2
    names = ", ".join(sorted(path.stem for path in (ROOT / "recipes").glob("*.py")))
    assert f"method is 'nothing'; it must be one of {names}" in capsys.readouterr().err


def test_recipes_are_not_copied_where_nothing_can_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["recipes", "copy", "robust_dpo", str(tmp_path / "file")]) == 4
    assert "robust_dpo.py cannot be written (File exists); choose another folder." in capsys.readouterr().err


def test_env_tells_tested_versions(capsys):
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["posttrain"] and facts["torch"] and facts["cache"]


@pytest.mark.parametrize("launched", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_train_prints_its_line_without_the_hub_token_and_passes_the_recipes_exit_code_on(capfd, monkeypatch, launched):
    if not launched:
        monkeypatch.setattr("posttrain.cli._supervised.run", lambda command, environment: 2)
    token = "hf_" + "aB3" * 11
    given = ["--hub_token", "secret", f"--hub-token={token}", token, "--dataset_name", "hf_org/my pairs.jsonl"]
    assert main(["train", "robust_dpo", *given]) == 2
    said = capfd.readouterr()
    assert said.out.rstrip().endswith("--hub_token *** --hub-token=*** hf_*** --dataset_name 'hf_org/my pairs.jsonl'")
    assert said.out.startswith("accelerate launch --quiet --config_file ")
    assert "recipes/robust_dpo.py --config " in said.out
    assert "Traceback" not in said.err
    assert token not in said.out + said.err
    assert not launched or "`hf_***` follows no key" in said.err


def launched(monkeypatch, capsys, cards: int, *given: str):
    """The launch line of a machine with so many accelerators, and what is said beside it."""
    monkeypatch.setattr("posttrain.cli._supervised.run", lambda command, environment: 0)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: cards > 0)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: cards)
    assert main(["train", "robust_dpo", *given]) == 0
    said = capsys.readouterr()
    return said.out, said.err


def test_train_starts_a_process_on_each_of_several_cards_and_says_so(monkeypatch, capsys):
    line, said = launched(monkeypatch, capsys, 4, "--learning_rate", "1e-4")
    assert "/accelerate/ddp.yaml --num_processes 4 " in line and "/robust_dpo/single_gpu.yaml" in line
    assert said == (
        "4 GPUs here: a process on each (--launch ddp), and so 4 times the config's rows a step. "
        "CUDA_VISIBLE_DEVICES=0 in the shell takes one.\n"
    )


@pytest.mark.parametrize(
    ("cards", "given", "launch"),
    [
        (1, [], "single_gpu"),
        (0, [], "cpu"),
        (4, ["--launch", "zero3"], "zero3"),
        (4, ["--launch", "single_gpu"], "single_gpu"),
        # a config for CPUs
        (4, ["--config", "cpu"], "cpu"),
        (1, ["--config", "cpu"], "cpu"),
    ],
)
def test_train_takes_what_was_named_or_fits_the_machine(monkeypatch, capsys, cards, given, launch):
    line, said = launched(monkeypatch, capsys, cards, *given)
    assert f"/accelerate/{launch}.yaml" in line and "--num_processes" not in line and not said


def test_train_knows_the_shipped_configs(capsys):
    assert main(["train", "robust_dpo", "--config", "laptop"]) == 2
    assert "config is 'laptop': no such file, and none of the shipped ones: cpu, private, single_gpu, zero3." in (
        capsys.readouterr().err
    )


def test_flags_that_no_verb_knows_are_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["env", "--jsno"])
    assert stop.value.code == 2 and "unrecognized arguments: --jsno" in capsys.readouterr().err


def test_a_dry_run_tells_batch_steps_and_sizes(tiny_folder, tmp_path):
    from posttrain import RobustDPOConfig

    split = dict(per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=-1, num_train_epochs=2)
    args = RobustDPOConfig(**settings(tmp_path / "out", **split))
    facts = describe(tiny_folder, args, make_pairs(20), lora(), processes=2)
    assert facts["pairs per step"] == 12 and facts["steps"] == 4 and facts["training pairs"] == 20
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_folder), lora())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert facts["trainable parameters"] == trainable
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["checkpoint bytes (estimate)"] == 12 * trainable
    assert facts["prompt"].startswith("<|im_start|>user\n") and facts["chosen"].endswith("<|im_end|>")
    assert not (tmp_path / "out").exists()


def dry(folder, out, pairs=None, peft=None, eval_dataset=None, **overrides):
    from posttrain import RobustDPOConfig

    args = RobustDPOConfig(**settings(out, **overrides))
    return describe(folder, args, pairs or make_pairs(4), peft or lora(), processes=1, eval_dataset=eval_dataset)


def test_a_dry_run_refuses_what_the_run_would(tiny_folder, tmp_path):
    out = tmp_path / "out"
    for fields, message in (
        (dict(target_modules=["q_projj"]), "Target modules .*q_projj.* not found"),
        (dict(target_modules=["lm_head"]), "lora_target_modules names lm_head"),
        (dict(r=0, target_modules=["q_proj"]), r"the LoRA rank \(lora_r\) is 0"),
    ):
        config = lora()
        for name, value in fields.items():
            setattr(config, name, value)
        with pytest.raises(ConfigError, match=message):
            dry(tiny_folder, out, peft=config)
    same = make_pairs(3).map(lambda row: {"rejected": row["chosen"]})
    with pytest.raises(DataError, match="train_dataset: all 3 pairs have identical sides"):
        dry(tiny_folder, out, same)
    with pytest.raises(DataError, match="eval_dataset: all 3 pairs have identical sides"):
        dry(tiny_folder, out, eval_dataset=same)
    with pytest.raises(ConfigError, match="model './gone' is a folder that does not exist"):
        dry("./gone", out)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="which cannot be written to"):
        dry(tiny_folder, tmp_path / "file" / "run")
    assert not out.exists()


def test_a_dry_run_counts_the_steps_that_training_takes(tiny_folder, tmp_path):
    # 5 pairs in steps of 4: each epoch has a second, short one
    split = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=-1, num_train_epochs=3)
    assert dry(tiny_folder, tmp_path / "out", make_pairs(5), **split)["steps"] == 6
    long = [{"prompt": "p" * 99, "chosen": "a", "rejected": "b"}] + 4 * [
        {"prompt": "p", "chosen": "a", "rejected": "b"}
    ]
    facts = dry(tiny_folder, tmp_path / "out", Dataset.from_list(long), **split | {"max_length": 50})
    assert (facts["training pairs"], facts["steps"]) == (4, 3)


def test_a_dry_run_shows_no_bars(tiny_folder, tmp_path, capfd):
    dry(tiny_folder, tmp_path / "out")
    assert "dataset" not in capfd.readouterr().err


@pytest.fixture
def placings(monkeypatch):
    """The models that were moved to where they are computed."""
    from posttrain.adapters import loading

    found, place = [], loading.placed
    monkeypatch.setattr(loading, "placed", lambda model: found.append(model) or place(model))
    # verbs that have taken the name
    monkeypatch.setattr("posttrain.hub.merging.placed", loading.placed)
    return found


def test_a_merged_model_agrees_with_base_and_adapter(tiny_folder, adapter, tmp_path, capsys, placings):
    assert main(["merge", str(adapter), str(tmp_path / "merged"), "--dtype", "float32", "--json"]) == 0
    assert len(placings) == 2, "the model with its adapter, and the merged one"
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["top1_agreement"] == 1.0 and facts["largest_logit_difference"] < 1e-4
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    layer = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(merged.get_parameter(layer), base.get_parameter(layer))
    assert main(["merge", str(adapter), str(tmp_path / "merged")]) == 2
    assert "which is not empty" in capsys.readouterr().err
    assert main(["merge", str(tmp_path), str(tmp_path / "other")]) == 2
    assert "has no adapter_config.json" in capsys.readouterr().err


def test_generate_answers_with_base_and_adapter(adapter, tmp_path, capsys, placings):
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\n")
    command = ["generate", "--adapter", str(adapter), "--max_new_tokens", "8", "--json"]
    assert main([*command, "--prompts", str(tmp_path / "prompts.txt"), "--prompt", "zero"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["prompt"] for row in rows] == ["zero", "one", "two"]
    assert any(row["base"] != row["adapter"] for row in rows)
    assert len(placings) == 1
    assert main(command) == 2
    assert "no prompt was given" in capsys.readouterr().err


def copied(adapter, folder, **changes):
    """A copy of the adapter whose config is changed."""
    shutil.copytree(adapter, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def commands(folder, tmp_path):
    yield ["merge", str(folder), str(tmp_path / "merged")]
    yield ["generate", "--adapter", str(folder), "--prompt", "a"]


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        (dict(base_model_name_or_path=None), 2, "names no base model; give it with --base MODEL."),
        (dict(base_model_name_or_path="./gone"), 2, "model './gone' is a folder that does not exist (working folder: "),
        (
            dict(base_model_name_or_path="org/gone"),
            4,
            "model 'org/gone' is no folder here and not in the cache, and the hub cannot be reached. HF_HUB_OFFLINE is "
            "set: unset it, or give a local folder.",
        ),
    ],
)
def test_a_base_that_cannot_be_had_is_named_by_both_verbs(adapter, tmp_path, capsys, changes, code, message):
    folder = copied(adapter, tmp_path / "adapter", **changes)
    for command in commands(folder, tmp_path):
        assert main(command) == code
        assert message in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_a_folder_without_an_adapter_is_named_by_both_verbs(adapter, tmp_path, capsys):
    folder = copied(adapter, tmp_path / "adapter")
    (folder / "adapter_model.safetensors").unlink()
    for command in commands(folder, tmp_path):
        assert main(command) == 2
        assert f"adapter is {folder}, which has no adapter_model.safetensors" in capsys.readouterr().err
    (folder / "adapter_config.json").write_text("{")
    (folder / "adapter_model.safetensors").touch()
    for command in commands(folder, tmp_path):
        assert main(command) == 2
        assert "adapter_config.json is no valid JSON" in capsys.readouterr().err
    for command in commands(tmp_path / "nowhere", tmp_path):
        assert main(command) == 2
        assert "which has no adapter_config.json; give an adapter's folder." in capsys.readouterr().err


def test_a_base_that_the_adapter_does_not_fit_is_refused(adapter, tmp_path, capsys):
    for command in commands(adapter, tmp_path):
        assert main([*command, "--base", "embedded:tiny"]) == 2
        assert f"the adapter in {adapter} does not fit the base model " in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def test_a_quantised_base_is_not_merged_into(tiny_folder, adapter, tmp_path, capsys):
    quantised = tmp_path / "quantised"
    shutil.copytree(tiny_folder, quantised)
    config = json.loads((quantised / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantised / "config.json").write_text(json.dumps(config))
    assert main(["merge", str(adapter), str(tmp_path / "merged"), "--base", str(quantised)]) == 2
    assert f"the base model {quantised} is stored quantised; merging into it would change it." in (
        capsys.readouterr().err
    )


def test_an_adapter_on_an_embedded_base_of_another_machine_finds_its_own(tmp_path, capsys):
    from posttrain.adapters.loading import load_adapter
    from posttrain.models import resolve_model

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(resolve_model("embedded:tiny")), lora())
    model.save_pretrained(tmp_path / "adapter")
    elsewhere = "/nowhere/" + Path(resolve_model("embedded:tiny")).name
    folder = copied(tmp_path / "adapter", tmp_path / "moved", base_model_name_or_path=elsewhere)
    assert not load_adapter(folder).training
    # its tokenizer is the base's, as it was saved without one
    assert main(["merge", str(folder), str(tmp_path / "merged"), "--json"]) == 0
    assert (tmp_path / "merged" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--temperature", "nan"], "temperature nan;"),
        (["--temperature", "inf"], "temperature inf;"),
        (["--temperature", "-0.5"], "temperature -0.5;"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--seed", "-1"], "seed is -1; it must lie in 0 to 4294967295."),
        (["--seed", str(2**32)], "seed is 4294967296;"),
        (["--seed", str(2**70)], "it must lie in 0 to 4294967295."),
    ],
)
def test_sampling_that_cannot_be_is_refused_before_the_model_loads(tmp_path, capsys, words, told):
    assert main(["generate", "--adapter", str(tmp_path / "nowhere"), "--prompt", "a", *words]) == 2
    assert told in capsys.readouterr().err


def test_the_largest_seed_is_taken(adapter, capsys):
    words = ["--seed", str(2**32 - 1), "--temperature", "0.5", "--max-new-tokens", "2"]
    assert main(["generate", "--adapter", str(adapter), "--prompt", "a", *words]) == 0
    assert "adapter:" in capsys.readouterr().out
