"""Ids that a model's embedding lacks and rows longer than its positions are found before it trains."""

import copy
from functools import partial

import pytest
import torch
from peft import LoraConfig

from posttrain import ALoLConfig, ALoLTrainer, RobustDPOConfig, RobustDPOTrainer
from posttrain.data.limits import Limits
from posttrain.errors import ConfigError
from posttrain.models import tiny_model
from posttrain.run.new_tokens import at_their_start
from tests import rollouts, scored, training
from tests.conftest import make_pairs
from tests.contract.refusals import TABLES, TOO_LONG, long_pairs, model, noted, refused


def saved(path, tokenizer, model, special=(), **attributes):
    """A folder of a model and a tokenizer with more special tokens."""
    changed = copy.deepcopy(tokenizer)
    if special:
        changed.add_special_tokens({"additional_special_tokens": list(special)})
    for name, value in attributes.items():
        setattr(changed, name, value)
    model.save_pretrained(path)
    changed.save_pretrained(path)
    return str(path)


@pytest.fixture
def longer(tmp_path, tokenizer):
    """A folder whose tokenizer has two tokens more than the embedding has rows."""
    return saved(tmp_path / "longer", tokenizer, tiny_model(), ["<note>", "</note>"])


def dpo(folder, path, data, **settings):
    args = RobustDPOConfig(**training.settings(path, **settings))
    return RobustDPOTrainer(folder, args=args, train_dataset=data, peft_config=training.lora())


def test_tokens_that_no_row_holds_are_no_fault(longer, tmp_path, logged):
    logged.set_level("INFO", logger="posttrain")
    dpo(longer, tmp_path / "run", make_pairs(8))
    assert logged.text.count("2 tokens of the tokenizer, '<note>' the first, are beyond the model's embedding") == 1
    assert not [record for record in logged.records if record.levelname == "WARNING"]


def test_an_embedding_with_rows_to_spare_is_no_fault(tmp_path, tokenizer, logged):
    folder = saved(tmp_path / "padded", tokenizer, tiny_model(vocab_size=320), ["<note>"])
    dpo(folder, tmp_path / "run", noted(make_pairs(8), "chosen"))
    assert "embedding" not in logged.text


def test_an_embedding_that_was_resized_in_memory_counts_and_not_its_config(tmp_path, tokenizer):
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"additional_special_tokens": ["<note>"]})
    model = tiny_model()
    assert Limits(model, model.config).beyond(changed) == {259: "<note>"}
    model.resize_token_embeddings(len(changed))
    assert Limits(model, model.config).beyond(changed) == {}


@pytest.mark.slow
def test_a_padding_token_that_the_embedding_lacks_is_refused(tmp_path, tokenizer):
    folder = saved(tmp_path / "pad", tokenizer, tiny_model(), ["[PAD]"], pad_token="[PAD]")
    with pytest.raises(ConfigError, match=r"the tokenizer's pad_token '\[PAD\]' has the id 259"):
        dpo(folder, tmp_path / "run", make_pairs(8))
    with pytest.raises(ConfigError, match="the tokenizer's pad_token"):
        scored.build(folder, tmp_path / "a")
    with pytest.raises(ConfigError, match="the tokenizer's pad_token"):
        rollouts.train(folder, tmp_path / "b")


def test_every_row_is_looked_at_and_not_a_sample_alone(longer, tmp_path, monkeypatch):
    from posttrain.data.pairs import schema

    monkeypatch.setattr(schema, "SAMPLE", 4)
    with pytest.raises(ConfigError, match="'<note>' has the id 259"):
        dpo(longer, tmp_path / "run", noted(make_pairs(9), "chosen"))


@pytest.mark.core("gpt2")
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("name", TABLES)
def test_rows_train_that_are_cut_to_a_table_of_positions(tmp_path, tokenizer, name):
    table = saved(tmp_path / name, tokenizer, tiny_model(name, **TABLES[name]))
    # a pair beside the other
    padded = dict(max_length=64, prefix_sharing="never")
    assert dpo(table, tmp_path / "run", long_pairs(), **padded).train().global_step == 2


@pytest.mark.slow
@pytest.mark.parametrize("refusing", TOO_LONG)
@pytest.mark.parametrize("name", [name for name in TABLES if name != "gpt2"])
def test_every_table_of_positions_refuses_longer_rows_alike(tmp_path, name, refusing):
    found = [
        str(refused(partial(TOO_LONG[refusing], partial(model, architecture=at, **TABLES[at])), tmp_path / at))
        for at in ("gpt2", name)
    ]
    assert found[0] == found[1]


@pytest.mark.slow
def test_rows_longer_than_computed_positions_are_said_once(tmp_path, tokenizer, logged):
    folder = saved(tmp_path / "short", tokenizer, tiny_model(max_position_embeddings=64))
    dpo(folder, tmp_path / "run", long_pairs(), max_length=None)
    assert logged.text.count("the model has 64 positions; it was not trained on further ones") == 1
    logged.clear()
    dpo(folder, tmp_path / "again", long_pairs(), max_length=64)
    assert "positions" not in logged.text


@pytest.mark.parametrize(
    ("architecture", "settings", "has_table"),
    [
        *((name, settings, True) for name, settings in TABLES.items()),
        ("gpt_bigcode", {}, True),
        ("codegen", dict(rotary_dim=8), True),
        ("gptj", dict(rotary_dim=8), True),
        ("llama", {}, False),
        ("gpt_neox", {}, False),
        ("bloom", {}, False),
    ],
)
def test_models_that_fail_at_a_further_position_are_told_from_those_that_do_not(architecture, settings, has_table):
    model = tiny_model(architecture, **{"max_position_embeddings": 64, **settings}).eval()
    limits = Limits(model, model.config)
    assert (limits.positions, limits.has_table, Limits("a name", model.config).has_table) == (64, has_table, has_table)
    model(input_ids=torch.ones(1, 64, dtype=torch.long))
    if has_table:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.ones(1, 65, dtype=torch.long))
    else:
        model(input_ids=torch.ones(1, 65, dtype=torch.long))


def test_scaled_positions_count_as_they_are_scaled(tmp_path):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
    model = tiny_model(max_position_embeddings=64, rope_parameters=rope)
    assert Limits(model, model.config).positions == 256
    plain = tiny_model(max_position_embeddings=64)
    limits = Limits(plain, plain.config)
    assert (limits.positions, limits.has_table) == (64, False)


@pytest.mark.core("pairs")
@pytest.mark.parametrize("family", ["pairs", "answers"])
def test_new_tokens_that_an_adapter_leaves_frozen_are_said(tmp_path, tokenizer, logged, family):
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"additional_special_tokens": ["<note>", "<unused>"]})
    model = tiny_model()
    model.resize_token_embeddings(len(changed))
    folder = saved(tmp_path / "resized", changed, model)

    def train(adapter=None, **columns):
        if family == "answers":
            rows = scored.make_scored(8)
            for row in range(8):
                rows = noted(rows, "completion", row)
            args = ALoLConfig(**scored.settings(tmp_path / "a"))
            return ALoLTrainer(folder, args, train_dataset=rows, peft_config=adapter)
        args = RobustDPOConfig(**training.settings(tmp_path / "a"))
        return RobustDPOTrainer(folder, args=args, train_dataset=noted(make_pairs(8), "chosen"), peft_config=adapter)

    train(training.lora())
    warned = [message for message in logged.messages if "where a new token's starts" in message]
    assert len(warned) == 1
    assert "the embedding of '<note>' is where" in warned[0]
    logged.clear()
    train(LoraConfig(r=4, target_modules="all-linear", modules_to_save=["embed_tokens"]))
    if family == "answers":
        train()
    assert "new token" not in logged.text


@pytest.mark.parametrize(("row", "new"), [("mean", True), ("zero", False), ("random", False), ("near the mean", False)])
def test_rows_of_an_embedding_at_their_start_are_told_from_trained_ones(row, new):
    torch.manual_seed(0)
    weight = torch.randn(300, 32) + 0.5
    mean = weight.mean(dim=0)
    values = {"mean": mean, "zero": mean * 0, "random": weight[7], "near the mean": mean + 0.2 * (weight[7] - mean)}
    weight[10] = values[row]
    assert at_their_start(weight, [9, 10]) == [10] * new
