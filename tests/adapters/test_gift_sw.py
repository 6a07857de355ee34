"""GIFT-SW as an adapter: a plain LoRA on disk, whose columns are chosen before any forward and known again."""

import copy
import json

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from posttrain.adapters import SIDE_FILE, calibration
from posttrain.adapters.gift_sw import GiftSWConfig, GiftSWLinear, file_share, layers_of
from posttrain.adapters.schemes import adapter_config
from posttrain.config import ModelArguments
from posttrain.errors import ConfigError, DataError
from posttrain.hub.files import saved_weights
from posttrain.models import tiny_model

IDS = torch.randint(0, 250, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return tiny_model(num_hidden_layers=2)


def adapted(base, calibrated=True, moved=True, **settings):
    config = GiftSWConfig(**dict(r=8, target_modules="all-linear") | settings)
    model = get_peft_model(copy.deepcopy(base), config)
    if calibrated:
        calibration.calibrate(model, IDS.tolist())
    torch.manual_seed(1)
    for _, layer, _, _ in layers_of(model):
        layer.lora_B["default"].weight.data.normal_(std=0.02 if moved else 0.0)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def test_plain_peft_loads_and_merges_it_with_equal_logits(base, tmp_path):
    model = adapted(base)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORA" and saved.keys() == LoraConfig().to_dict().keys() | {"auto_mapping"}
    plain = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert not any(isinstance(module, GiftSWLinear) for module in plain.modules())
    assert torch.equal(logits(plain), logits(model))
    assert (logits(plain) - logits(base)).abs().max() > 1e-2
    merged = plain.merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(model), atol=1e-5, rtol=1e-4)


def test_a_push_takes_the_file_with_its_columns(base, tmp_path):
    adapted(base).save_pretrained(tmp_path)
    assert SIDE_FILE in saved_weights(tmp_path)


def test_the_loaded_adapter_goes_on_with_its_columns(base, tmp_path):
    model = adapted(base, bits=3, metric="activation")
    model.save_pretrained(tmp_path)
    config = GiftSWConfig.from_pretrained(tmp_path)
    assert (config.bits, config.metric, config.r) == (3, "activation", 8)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, config=config, is_trainable=True)
    # no sequence is looked at
    assert calibration.calibrate(again, []) is False
    for (_, _, ours, _), (_, _, theirs, _) in zip(layers_of(again), layers_of(model), strict=True):
        assert torch.equal(ours.columns, theirs.columns) and torch.equal(ours.rows.step, theirs.rows.step)
    assert torch.equal(logits(again.eval()), logits(model))


def test_a_folder_of_another_adapter_is_none_of_it(base, tmp_path):
    get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"has no {SIDE_FILE}"):
        GiftSWConfig.from_pretrained(tmp_path)
    (tmp_path / SIDE_FILE).write_text('{"scheme": "allora", "columns": {}}')
    with pytest.raises(ConfigError, match="it must have the scheme gift_sw"):
        GiftSWConfig.from_pretrained(tmp_path)


def test_a_layer_that_is_not_calibrated_is_no_layer_to_train(base):
    model = adapted(base, calibrated=False)
    with pytest.raises(ConfigError, match="salient columns are not chosen"):
        model(IDS)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base))


def test_only_the_changes_of_columns_train(base):
    model = adapted(base)
    for _ in range(2):
        model.set_adapter("default")
        with model.disable_adapter():
            pass
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    assert trained and all(name.endswith("lora_B.default.weight") for name in trained)


def test_unloaded_nothing_of_it_stays(base):
    model = adapted(base)
    expected = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-4)
    assert all(type(merged.get_submodule(name)) is type(module) for name, module in base.named_modules())
    assert not any("forward" in vars(module) for module in merged.modules())


def test_the_files_share_of_places_is_told(base, tmp_path):
    from safetensors.torch import load_file

    model = adapted(base, target_modules=["q_proj", "k_proj"])
    model.save_pretrained(tmp_path)
    sizes = {name: value.numel() for name, value in load_file(tmp_path / "adapter_model.safetensors").items()}
    of_a = sum(size for name, size in sizes.items() if "lora_A" in name)
    assert file_share(model) == pytest.approx(of_a / sum(sizes.values()))


def test_columns_are_those_whose_inputs_and_rounding_are_large(base):
    twin = copy.deepcopy(base)
    with torch.no_grad():
        twin.model.layers[0].input_layernorm.weight[[3, 50]] = 100.0
    model = adapted(twin, r=2, target_modules=["q_proj"])
    assert layers_of(model)[0][2].columns.tolist() == [3, 50]
    assert layers_of(adapted(base, r=2, target_modules=["q_proj"]))[0][2].columns.tolist() != [3, 50]


@pytest.mark.parametrize("norm", [float("inf"), 2.0])
def test_calibration_does_not_hang_on_how_tokens_are_laid_out(norm, base):
    settings = dict(activation_norm=norm, calibrated=False)
    one, two = adapted(base, **settings), adapted(base, **settings)
    calibration.calibrate(one, IDS.tolist())
    calibration.calibrate(two, reversed(IDS.tolist()))
    assert one.peft_config["default"].salient == two.peft_config["default"].salient
    # as ranks that share what the first one found
    shared = []
    three = adapted(base, **settings)
    calibration.calibrate(three, IDS.tolist(), shared=lambda tensor: shared.append(tensor) or tensor)
    assert len(shared) == 2 * len(layers_of(three))


def test_calibration_leaves_the_model_as_it_was(base):
    model = adapted(base, calibrated=False)
    model.train()
    model.get_base_model().model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    calibration.calibrate(model, IDS.tolist())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_there_must_be_tokens_and_finite_weights(base):
    with pytest.raises(DataError, match="there is no token to calibrate on"):
        calibration.calibrate(adapted(base, calibrated=False), [])
    broken = adapted(base, calibrated=False)
    broken.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight.data[0, 0] = float("nan")
    with pytest.raises(ConfigError, match="layers.1.mlp.(up|down)_proj are not finite numbers"):
        calibration.calibrate(broken, IDS.tolist())


@pytest.mark.parametrize("settings", [dict(weight_norm=60.0), dict(activation_norm=1e4), dict(activation_power=1000.0)])
def test_columns_are_chosen_by_exponents_of_any_size(settings, base):
    columns = [variant.columns.tolist() for _, _, variant, _ in layers_of(adapted(base, **settings))]
    assert columns.count(list(range(8))) == 0
    with pytest.raises(ConfigError, match="activation_power is inf; it must be a number from 0 to"):
        GiftSWConfig(activation_power=float("inf"))


def test_a_layer_of_which_no_column_stands_out_is_named(base):
    broken = adapted(base, calibrated=False)
    broken.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight.data.zero_()
    with pytest.raises(ConfigError, match="no column of model.layers.1.mlp.up_proj is more salient than another"):
        calibration.calibrate(broken, IDS.tolist())


def test_columns_of_a_checkpoint_are_taken_over_and_compared(base):
    ours, theirs = adapted(base), adapted(base, metric="activation")
    table = theirs.peft_config["default"].salient
    assert table != ours.peft_config["default"].salient
    calibration.restore(ours, table)
    calibration.check(ours)
    for (_, _, one, _), (_, _, other, _) in zip(layers_of(ours), layers_of(theirs), strict=True):
        assert torch.equal(one.columns, other.columns) and torch.equal(one.rows.step, other.rows.step)
    assert torch.equal(logits(ours), logits(theirs))
    layers_of(ours)[3][2].columns[0] += 1
    with pytest.raises(ConfigError, match="the matrix A of .* is not that of the salient columns"):
        calibration.check(ours)
    for damaged in ({}, {path: ids[:-1] for path, ids in table.items()}, {path: [99999] * 8 for path in table}):
        with pytest.raises(ConfigError, match="the saved salient columns are of another adapter"):
            calibration.restore(ours, damaged)


class Other(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_layers_without_columns_to_choose_are_refused(base):
    with pytest.raises(ConfigError, match="64 salient columns .*, and .*q_proj has 64 in all"):
        adapted(base, r=64)
    with pytest.raises(ConfigError, match="c_attn is a Conv1D, whose weight is transposed"):
        get_peft_model(tiny_model("gpt2"), GiftSWConfig(r=4, target_modules=["c_attn"]))
    with pytest.raises(ConfigError, match="embed_tokens is a Embedding"):
        adapted(base, target_modules=["embed_tokens"])
    twin = copy.deepcopy(base)
    twin.model.layers[0].mlp.up_proj.__class__ = Other
    with pytest.raises(ConfigError, match="up_proj is a Other"):
        adapted(twin, target_modules=["up_proj"])
    twin.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ConfigError, match="up_proj is quantised"):
        adapted(twin)


SMALL = dict(
    vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
FAMILIES = {
    # experts and router are fused tensors
    "qwen3_moe": (lambda: transformers.Qwen3MoeConfig(**SMALL, head_dim=8, **EXPERTS), 8,
                  "2 Qwen3MoeExperts, 2 Qwen3MoeTopKRouter, and linear layers that are named like"),
    # the router is a linear layer with a forward of its own
    "phimoe": (lambda: transformers.PhimoeConfig(**SMALL, num_local_experts=4), 8, "2 PhimoeTopKRouter"),
    # whose forward adds the bias apart
    "falcon": (lambda: transformers.FalconConfig(vocab_size=259, hidden_size=32, num_hidden_layers=2,
                                                 num_attention_heads=4), 8, ""),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_what_it_can_take(family, tmp_path, logged):
    made, count, left_out = FAMILIES[family]
    torch.manual_seed(0)
    whole = transformers.AutoModelForCausalLM.from_config(made()).eval()
    with logged.at_level("INFO", logger="posttrain"):
        model = adapted(whole, r=4)
    assert len(layers_of(model)) == count and model.peft_config["default"].what_was_left_out().startswith(left_out)
    assert logged.text.count("left out of all-linear") == bool(left_out) and left_out in logged.text
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(copy.deepcopy(whole), tmp_path).eval()
    assert sum(isinstance(module, LoraLayer) for module in plain.modules()) == count
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-6, rtol=1e-5)
    config = GiftSWConfig.from_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(whole), tmp_path, config=config, is_trainable=True)
    assert calibration.calibrate(again, []) is False and len(layers_of(again)) == count


def test_what_was_named_and_cannot_be_taken_is_refused():
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES["phimoe"][0]())
    with pytest.raises(ConfigError, match="router is a PhimoeTopKRouter"):
        get_peft_model(model, GiftSWConfig(r=4, target_modules=["router", "q_proj"]))
    twin = tiny_model(num_hidden_layers=1)
    for module in twin.model.layers.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = Other
    with pytest.raises(ConfigError, match=r"all-linear has no plain linear layer in this model.*\(7 Other\)"):
        adapted(twin)


def test_what_is_left_out_stands_beside_what_was_excluded():
    for before, after in ((None, ["a.b"]), (["c"], ["a.b", "c"]), (r".*\.c", r"(?:.*\.c)|a\.b")):
        config = GiftSWConfig(r=4, target_modules="all-linear", exclude_modules=before)
        config.leave_out("a.b", nn.Identity(), False)
        config.leave_out("a.experts.down_proj", nn.Identity(), True)
        assert config.to_dict()["exclude_modules"] == after


def test_recipes_settings_name_the_scheme():
    made = adapter_config(ModelArguments(adapter="gift_sw", gift_bits=3, lora_target_modules=["q_proj"]))
    assert isinstance(made, GiftSWConfig) and (made.r, made.lora_alpha, made.bits) == (128, 128, 3)
    assert made.target_modules == {"q_proj"}
    for given, kind in (({}, type(None)), (dict(use_peft=True), LoraConfig), (dict(adapter="lora"), LoraConfig)):
        made = adapter_config(ModelArguments(**given))
        assert type(made) is kind and (made is None or (made.r, made.lora_alpha) == (16, 32))
    assert adapter_config(ModelArguments(adapter="none")) is None
