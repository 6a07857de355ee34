import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel

from posttrain import RobustDPOConfig, RobustDPOTrainer
from posttrain.data.generated import reverse_list_pairs
from posttrain.hub import Destination, is_hub_id, loading_lines, write_model_card
from posttrain.models import SMOLLM2, TINY, byte_tokenizer, folder_name, tiny_model


def make_trainer(output_dir, model, peft=True, **settings):
    args = RobustDPOConfig(
        output_dir=str(output_dir), max_steps=1, per_device_train_batch_size=2, save_strategy="no", report_to=[],
        logging_steps=1, eval_strategy="steps", eval_steps=1, disable_tqdm=True, learning_rate=3e-4, **settings,
    )  # fmt: skip
    pairs = reverse_list_pairs(4, 0)
    return RobustDPOTrainer(
        model=model,
        args=args,
        train_dataset=pairs,
        eval_dataset=pairs,
        processing_class=byte_tokenizer(),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]) if peft else None,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    base = folder / "base"
    tiny_model().save_pretrained(base)
    trainer = make_trainer(folder / "my-adapter", str(base), pair_loss="rdpo", flip_rate=0.3)
    trainer.train()
    trainer.save_model()
    (folder / "my-adapter" / "curves.png").touch()
    return trainer


def card_of(trainer, **kwargs):
    card = ModelCard.load(write_model_card(trainer, **kwargs))
    return card, yaml.safe_load(card.content.split("---")[1])


def test_card_of_a_local_base_leaks_no_path_and_names_no_base(trained):
    card, metadata = card_of(trained, dataset_name=trained.args.output_dir)
    assert "runs" not in card.content and "/tmp" not in card.content and "None" not in card.content
    assert set(metadata) == {"library_name", "model-index", "pipeline_tag", "tags"}
    assert metadata["library_name"] == "peft"
    assert {"robust_dpo", "lora"} <= set(metadata["tags"])
    assert "# my-adapter\n" in card.text
    assert "a model that was on the training machine only" in card.text


def test_card_overwrites_the_one_that_peft_writes_with_the_local_path(trained):
    readme, base = Path(trained.args.output_dir) / "README.md", trained.model.config._name_or_path
    trained.model.save_pretrained(readme.parent)
    assert base in readme.read_text()
    write_model_card(trained)
    assert base not in readme.read_text()


def test_card_tells_method_settings_evaluation_versions_and_citations(trained):
    text = card_of(trained)[0].text
    rows = dict(re.findall(r"^\| (\S.*?) +\| +(\S.*?) \|$", text, re.MULTILINE))
    assert (rows["pair_loss"], rows["flip_rate"], rows["beta"], rows["learning_rate"]) == (
        "rdpo",
        "0.3",
        "0.1",
        "0.0003",
    )
    assert (rows["lora_r"], rows["lora_alpha"], rows["lora_target_modules"]) == ("4", "8", "q_proj, v_proj")
    # what a config says of itself to the parser is no setting
    assert not {"says", "replaces", "renamed"} & rows.keys()
    assert rows["optimiser steps"] == "1" and rows["seed"] == "42"
    assert rows["rows an optimiser step"].startswith("2 (per device 2")
    assert {"python", "trl", "peft", "torch", "posttrain"} <= set(rows)
    assert float(rows["eval_rewards/accuracies"]) <= 1 and "eval_runtime" not in rows
    assert "4 training rows, 4 evaluation rows" in text and "![Metrics over the training steps](curves.png)" in text
    assert "https://arxiv.org/abs/2403.00409" in text
    assert text.count("```bibtex") == 2 and "vonwerra2020trl" in text


def test_card_tells_how_the_base_is_quantised(trained, monkeypatch):
    assert "base weights" not in card_of(trained)[0].text
    rounded = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
    }
    monkeypatch.setattr(trained.model.config, "quantization_config", rounded, raising=False)
    text = card_of(trained)[0].text
    assert re.search(r"\| base weights +\| bitsandbytes \(load_in_4bit True, bnb_4bit_quant_type nf4\) +\|", text)


def test_card_tells_all_of_several_evaluation_sets(trained, monkeypatch):
    history = [{"step": 1, "eval_old_loss": 9.0}]
    for name, loss in (("easy", 0.25), ("hard", 0.75)):
        history.append(
            {"step": 2, f"eval_{name}_loss": loss, f"eval_{name}_runtime": 1.0, f"eval_{name}_num_tokens": 5}
        )
    monkeypatch.setattr(trained.state, "log_history", history)
    monkeypatch.setattr(trained, "eval_dataset", {"easy": range(4), "hard": range(3)})
    text = card_of(trained)[0].text
    evaluation = text.partition("## Evaluation")[2].partition("##")[0]
    found = dict(re.findall(r"^\| (\S.*?) +\| +(\S.*?) \|$", evaluation, re.MULTILINE))
    assert {name: value for name, value in found.items() if name.startswith("eval")} == {
        "eval_easy_loss": "0.25",
        "eval_hard_loss": "0.75",
    }
    assert "After step 2" in evaluation and "4 evaluation rows (easy), 3 evaluation rows (hard)" in text


def test_card_names_hub_base_data_and_tags(trained, monkeypatch):
    monkeypatch.setattr(trained.model.peft_config["default"], "base_model_name_or_path", "org/base-1.5B")
    monkeypatch.setattr(trained.args, "hub_model_id", "me/robust")
    card, metadata = card_of(trained, dataset_name="org/pairs", tags="mine")
    assert metadata["base_model"] == "org/base-1.5B"
    assert metadata["datasets"] == ["org/pairs"]
    assert metadata["tags"][-1] == "mine"
    assert "# robust\n" in card.text
    assert 'from_pretrained("org/base-1.5B")' in card.text and 'from_pretrained(base, "me/robust")' in card.text


def test_card_says_that_the_embedded_model_is_not_the_hubs(trained, monkeypatch):
    path = f"/home/someone/.cache/posttrain/models/{folder_name(SMOLLM2)}"
    monkeypatch.setattr(trained.model.peft_config["default"], "base_model_name_or_path", path)
    card, metadata = card_of(trained)
    assert "someone" not in card.content and "base_model" not in metadata
    assert metadata["license"] == "apache-2.0"
    assert "Q4_1" in card.text and "not the same as, the hub's" in card.text
    assert 'resolve_model("embedded:smollm2-135m")' in card.text


def test_card_names_the_base_that_a_local_one_is_said_to_be(trained, monkeypatch):
    monkeypatch.setattr(trained.args, "base_model_id", "org/base", raising=False)
    card, metadata = card_of(trained)
    assert metadata["base_model"] == "org/base"
    assert "It belongs onto [org/base](https://huggingface.co/org/base)." in card.text
    assert 'from_pretrained("org/base")' in card.text and "runs" not in card.content


def test_card_of_the_embedded_model_names_both_it_and_the_hubs(trained, monkeypatch):
    path = f"/home/someone/.cache/posttrain/models/{folder_name(SMOLLM2)}"
    monkeypatch.setattr(trained.model.peft_config["default"], "base_model_name_or_path", path)
    monkeypatch.setattr(trained.args, "base_model_id", "HuggingFaceTB/SmolLM2-135M-Instruct", raising=False)
    card, metadata = card_of(trained)
    assert metadata["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert 'resolve_model("embedded:smollm2-135m")' in card.text and "Q4_1" in card.text


def test_card_has_what_the_preflight_found(trained, monkeypatch):
    found = Destination("me/robust", "org/base", {"license": "mit"})
    monkeypatch.setattr(trained, "hub_destination", found, raising=False)
    monkeypatch.setattr(trained.args, "base_model_id", "org/base", raising=False)
    card, metadata = card_of(trained)
    assert metadata["license"] == "mit" and 'PeftModel.from_pretrained(base, "me/robust")' in card.text


def test_card_takes_the_license_of_a_local_base(trained):
    readme = Path(trained.model.config._name_or_path) / "README.md"
    readme.write_text("---\nlicense: gemma\n---\n")
    assert card_of(trained)[1]["license"] == "gemma"
    readme.unlink()
    assert "license" not in card_of(trained)[1]


def test_card_says_that_the_tiny_model_is_random(trained, monkeypatch):
    monkeypatch.setattr(
        trained.model.peft_config["default"], "base_model_name_or_path", f"/x/models/{folder_name(TINY)}"
    )
    card, metadata = card_of(trained)
    assert "random weights (`embedded:tiny`)" in card.text
    assert not {"base_model", "license"} & set(metadata)


def test_card_lists_every_paper_of_a_trainer_with_several(trained, monkeypatch):
    papers = [{"title": f"Paper {i}", "id": f"2401.0000{i}", "citation": f"@article{{p{i}}}"} for i in (1, 2)]
    monkeypatch.setattr(trained, "_paper", papers)
    text = card_of(trained)[0].text
    assert "- Paper 1 (" in text and "- Paper 2 (" in text
    assert "@article{p1}" in text and "@article{p2}" in text


def test_card_of_a_full_model_without_training_loads_with_transformers(tmp_path):
    card, metadata = card_of(make_trainer(tmp_path / "full", tiny_model(), peft=False, precompute_ref_log_probs=True))
    assert metadata["library_name"] == "transformers" and "lora" not in metadata["tags"]
    assert "A model trained with" in card.text
    assert "AutoModelForCausalLM.from_pretrained" in card.text and "PeftModel" not in card.text
    assert "## Evaluation" not in card.text and "## Curves" not in card.text


def test_loading_lines_load_the_adapter(trained):
    scope = {}
    exec(loading_lines(trained.model.config._name_or_path, trained.args.output_dir, is_adapter=True), scope)
    assert isinstance(scope["model"], PeftModel)
    assert scope["tokenizer"].eos_token == "<|im_end|>"


def test_hub_ids_are_told_from_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    assert is_hub_id("gpt2") and is_hub_id("org/model-1.5B_x")
    for name in (None, "", ".", "org", "./model", "/abs/model", "a/b/c", "~/model"):
        assert not is_hub_id(name)
