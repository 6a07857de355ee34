import json

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from posttrain import RobustDPOConfig, RobustDPOTrainer, quiet
from posttrain.adapters.loading import load_adapter
from posttrain.cli import main
from posttrain.errors import ConfigError, EnvironmentIssue
from posttrain.hub import merging, push
from posttrain.hub.merging import merge_adapter
from posttrain.models import tiny_model
from tests import training
from tests.conftest import make_pairs

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied:UserWarning"),
]
IDS = torch.arange(40).view(2, 20)


@pytest.fixture(autouse=True)
def libraries_keep_their_voice(monkeypatch):
    monkeypatch.setattr(quiet, "quiet_libraries", lambda: None)


@pytest.fixture(scope="module")
def tied(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("tied")
    tiny_model(tie_word_embeddings=True).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def adapter(base, folder, config):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    model.save_pretrained(folder)
    return folder


def lora(**settings):
    return LoraConfig(**(dict(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM") | settings))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def merged_as_before(model):
    """The known fault: the adapter of the embedding goes into the head as well."""
    return model.merge_and_unload(safe_merge=True)


@pytest.mark.core("settings1", "settings2", "settings5", "settings7")
@pytest.mark.parametrize(
    ("settings", "parted"),
    [
        (dict(), False),
        (dict(target_modules=["q_proj", "embed_tokens"]), True),
        (dict(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True), False),
        (dict(modules_to_save=["embed_tokens"]), True),
        (dict(modules_to_save=["lm_head"]), True),
        (dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True), False),
        (dict(trainable_token_indices=[3, 4, 5]), False),
        (dict(trainable_token_indices=[3, 4, 5], target_modules="all-linear"), False),
    ],
)
def test_tied_embeddings_are_parted_only_where_the_adapter_parts_them(settings, parted, tied, tmp_path):
    folder = adapter(tied, tmp_path / "adapter", lora(**settings))
    assert merge_adapter(folder, tmp_path / "merged", dtype="float32").top1_agreement == 1.0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(load_adapter(folder)), atol=1e-3, rtol=1e-4)
    assert merged.config.tie_word_embeddings is not parted
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) is not parted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merge_that_is_another_model_ends_with_4_and_leaves_nothing(dtype, tied, tmp_path, capsys, monkeypatch):
    folder = adapter(tied, tmp_path / "adapter", lora(target_modules=["q_proj", "embed_tokens"]))
    command = ["merge", str(folder), str(tmp_path / "new" / "merged"), "--dtype", dtype]
    monkeypatch.setattr(merging, "_merged", merged_as_before)
    assert main(command) == 4
    said = capsys.readouterr().err
    assert "the merged model is another one than base and adapter" in said and "95% is the least" in said
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    monkeypatch.undo()
    monkeypatch.setattr(quiet, "quiet_libraries", lambda: None)
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["top1_agreement"] >= merging.LEAST_AGREEMENT


def test_a_merged_push_of_another_model_sends_nothing(tied, tmp_path, monkeypatch):
    folder = adapter(tied, tmp_path / "adapter", lora(target_modules=["q_proj", "embed_tokens"]))
    monkeypatch.setattr(merging, "_merged", merged_as_before)
    monkeypatch.setattr(push, "_commit", lambda *args: pytest.fail("it was pushed"))
    with pytest.raises(EnvironmentIssue, match="the merged model is another one"):
        push.push_folder(folder, None, merged=True)


def test_an_interrupted_merge_leaves_nothing(tied, tmp_path, monkeypatch):
    folder = adapter(tied, tmp_path / "adapter", lora())

    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "_compared", stopped)
    with pytest.raises(KeyboardInterrupt):
        merge_adapter(folder, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_empty_folder_is_filled(tied, tmp_path):
    folder = adapter(tied, tmp_path / "adapter", lora(use_dora=True, target_modules="all-linear"))
    (tmp_path / "merged").mkdir()
    assert merge_adapter(folder, tmp_path / "merged", dtype="float32").top1_agreement == 1.0
    assert (tmp_path / "merged" / "model.safetensors").is_file()


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig])
def test_learned_prompts_have_nothing_to_merge(kind, tied, tmp_path):
    folder = adapter(tied, tmp_path / "adapter", kind(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ConfigError, match="of learned prompts .* change no weight: there is nothing to merge"):
        merge_adapter(folder, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.slow
def test_a_base_that_the_run_did_not_train_on_is_said(tied, tmp_path, tokenizer, logged):
    other = tmp_path / "other"
    tiny_model(seed=5, tie_word_embeddings=True).save_pretrained(other)
    tokenizer.save_pretrained(other)
    for name, base, settings in (
        ("plain", tied, {}), ("pissa", tied, {"init_lora_weights": "pissa"}), ("bf16", tied, {"bf16": True}),
    ):  # fmt: skip
        run, args = tmp_path / name, {"bf16": settings.pop("bf16", False)}
        trainer = RobustDPOTrainer(
            base, args=RobustDPOConfig(**training.settings(run, max_steps=1, **args)), train_dataset=make_pairs(8),
            peft_config=lora(**settings),
        )  # fmt: skip
        trainer.train()
        trainer.save_model()
        logged.clear()
        merge_adapter(run, tmp_path / f"{name}-right")
        assert "trained on" not in logged.text
        merge_adapter(run, tmp_path / f"{name}-wrong", base=str(other))
        assert f"the base {other} does not have the weights" in logged.text
    # the folder of another program tells nothing
    (tmp_path / "plain" / "posttrain_run.json").unlink()
    logged.clear()
    merge_adapter(tmp_path / "plain", tmp_path / "unknown", base=str(other))
    assert "trained on" not in logged.text


def test_what_cannot_be_saved_merged_is_refused_and_leaves_nothing(tied, tmp_path, capsys):
    folder = adapter(tied, tmp_path / "adapter", lora(layer_replication=[[0, 2], [1, 2]]))
    assert main(["merge", str(folder), str(tmp_path / "merged")]) == 2
    said = capsys.readouterr().err
    assert "cannot be merged: The weights trying to be saved contained shared tensors" in said and ".. " not in said
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
