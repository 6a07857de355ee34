"""ALLoRA as an adapter: PEFT's own layers, a plain LoRA on disk, and three steps that a dense weight takes as well."""

import copy
import json
import math
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.layer import Linear
from torch import nn

from posttrain.adapters import SIDE_FILE, allora
from posttrain.adapters.allora import ALLoRAConfig, apply_allora, layers_of
from posttrain.adapters.gift_sw import GiftSWConfig
from posttrain.adapters.scaled_updates import ScaledUpdates
from posttrain.adapters.schemes import adapter_config
from posttrain.config import ModelArguments, parse
from posttrain.errors import ConfigError, ExcludedSetting
from posttrain.hub.files import saved_weights
from posttrain.models import tiny_model
from posttrain.objectives.row_scales import allora_scale
from tests.runs import distance, trainable

IDS = torch.randint(0, 250, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return tiny_model(num_hidden_layers=2)


def moved(model, std=0.05):
    """Put random numbers into B: at zero every factor is eta, and many a wrong one too."""
    torch.manual_seed(1)
    for name, value in sorted(model.named_parameters()):
        if "lora_B" in name:
            value.data.normal_(std=std)
    return model


def adapted(base, config=None, **settings):
    config = config or ALLoRAConfig(**dict(r=4, target_modules="all-linear") | settings)
    torch.manual_seed(6)
    return moved(get_peft_model(copy.deepcopy(base), config)).eval()


def plain(base, **settings):
    return adapted(base, LoraConfig(**dict(r=4, lora_alpha=4, target_modules="all-linear") | settings))


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def gradients(model, ids=IDS):
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: value.grad for name, value in model.named_parameters() if value.requires_grad}


class Dense(nn.Module):
    """A LoRA layer by its dense change, as the paper's listing has it.

    `factor`: of the rows of the change's gradient. `on_input`: whether the input's gradient has it as well.
    """

    def __init__(self, layer, factor, on_input=False):
        super().__init__()
        self.base_layer, self.lora_A, self.lora_B = layer.base_layer, layer.lora_A, layer.lora_B
        self.factor, self.on_input = factor, on_input

    def forward(self, x):
        A, B = self.lora_A["default"].weight, self.lora_B["default"].weight
        factor, change = self.factor(A, B).to(B.dtype), B @ A
        change.register_hook(lambda gradient: factor[:, None] * gradient)
        if not self.on_input or not x.requires_grad:
            return self.base_layer(x) + F.linear(x, change)
        # the first product has the gradient of the input alone, the others cancel but for that of the change
        made = F.linear(x, change.detach())
        made.register_hook(lambda gradient: factor * gradient)
        return self.base_layer(x) + (made + F.linear(x.detach(), change) - F.linear(x.detach(), change.detach()))


def dense(model, factor, **more):
    for path, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, Dense(module, factor, **more))
    return model


def stepped(model, steps=3, rate=2.0, micro=(3,)):
    """The change of A and B in some steps of SGD, of the loss's sum over micro-batches."""
    before = trainable(model)
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=rate)
    for step in range(steps):
        rows = (IDS + 7 * step) % 250
        for part in rows.split(micro if len(micro) > 1 else micro[0]):
            (model(part, labels=part).loss * len(part) / len(rows)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value - before[name] for name, value in trainable(model).items()}


def by(norms, eta=2.0):
    return lambda A, B: (norms(A.detach(), B.detach()) + eta**-2).rsqrt()


def fp32_gram(A, B):
    return ((B @ (A @ A.T)) * B).sum(dim=1).clamp(min=0).sqrt()


RIGHT = by(lambda A, B: (B.double() @ A.double()).norm(dim=1))
WRONG = {
    "the norm's square": (by(lambda A, B: (B @ A).square().sum(dim=1)), {}),
    "the norm of B's rows": (by(lambda A, B: B.norm(dim=1)), {}),
    "the norm of the product's columns": (by(lambda A, B: (B @ A).norm().expand(B.size(0))), {}),
    "another eta": (by(lambda A, B: (B @ A).norm(dim=1), eta=1.9), {}),
    "the input's gradient has it too": (RIGHT, dict(on_input=True)),
    "none, a plain LoRA": (lambda A, B: torch.ones(B.size(0)), {}),
}


@pytest.fixture(scope="module")
def three_steps(base):
    return stepped(adapted(base))


def test_three_steps_are_those_of_the_dense_weight(base, three_steps):
    reference = stepped(dense(adapted(base), RIGHT))
    assert len(reference) == 2 * 14 and distance(three_steps, reference) < 1e-5


@pytest.mark.parametrize("name", WRONG)
def test_wrong_factors_are_told_apart(name, base, three_steps):
    factor, more = WRONG[name]
    assert distance(three_steps, stepped(dense(adapted(base), factor, **more))) > 1e-2


def test_a_gram_matrix_in_fp32_is_told_apart(base):
    """Rows of A that are nearly parallel, and B in the direction that they hardly have."""

    def parallel(model):
        torch.manual_seed(2)
        for name, value in sorted(model.named_parameters()):
            if "lora_A" in name:
                value.data[1:] = value.data[:1] + 3e-5 * torch.randn_like(value.data[1:])
            elif "lora_B" in name:
                value.data[:, 1:] = 0.0
                value.data[:, 0] *= 4e4
                value.data[:, 1] = -value.data[:, 0]
        return model

    ours = stepped(parallel(adapted(base)), steps=1, rate=1e-3)
    assert distance(ours, stepped(dense(parallel(adapted(base)), RIGHT), steps=1, rate=1e-3)) < 2e-2
    assert distance(ours, stepped(dense(parallel(adapted(base)), by(fp32_gram)), steps=1, rate=1e-3)) > 0.2


def test_the_forward_is_loras_bit_for_bit_and_so_is_the_start(base):
    assert torch.equal(logits(adapted(base)), logits(plain(base)))
    assert (logits(adapted(base)) - logits(base)).abs().max() > 1e-2
    # drawn alike: A is what a plain LoRA's would be
    torch.manual_seed(3)
    one = get_peft_model(copy.deepcopy(base), ALLoRAConfig(r=4, target_modules=["q_proj"]))
    torch.manual_seed(3)
    two = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"]))
    assert all(torch.equal(*pair) for pair in zip(one.parameters(), two.parameters(), strict=True))


def test_at_the_start_every_row_has_eta(base):
    ours, theirs = adapted(base, eta=3.0), plain(base)
    for model in (ours, theirs):
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.data.zero_()
    found, expected = gradients(ours), gradients(theirs)
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name] * (3.0 if "lora_B" in name else 0.0), atol=1e-9, rtol=1e-6)


def test_two_micro_batches_are_one_batch(base, three_steps):
    assert distance(stepped(adapted(base), micro=(2, 1)), three_steps) < 1e-5


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_changes_nothing(reentrant, base, three_steps):
    model = adapted(base)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=reentrant))
    model.enable_input_require_grads()
    model.train()
    found = stepped(model)
    assert all(torch.equal(found[name], value) for name, value in three_steps.items())


def test_plain_peft_loads_and_merges_it_with_equal_logits(base, tmp_path):
    model = adapted(base, eta=3.0)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORA" and saved.keys() == LoraConfig().to_dict().keys() | {"auto_mapping"}
    assert saved["lora_alpha"] == saved["r"] == 4
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert not layers_of(again) and torch.equal(logits(again), logits(model))
    for one in (again, model):
        expected = logits(one)
        torch.testing.assert_close(logits(one.merge_and_unload()), expected, atol=1e-5, rtol=1e-4)


def test_merged_and_taken_out_again_it_is_what_it_was(base):
    model = adapted(base)
    before, found = logits(model), gradients(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(base), atol=1e-5, rtol=1e-4)
    assert distance(gradients(model), found) < 1e-4


def test_its_settings_lie_beside_it_and_are_pushed(base, tmp_path):
    adapted(base, eta=3.0, form="update").save_pretrained(tmp_path)
    found = json.loads((tmp_path / SIDE_FILE).read_text())
    assert found == {"scheme": "allora", "eta": 3.0, "form": "update"}
    assert SIDE_FILE in saved_weights(tmp_path)
    config = ALLoRAConfig.from_pretrained(tmp_path)
    assert (config.eta, config.form, config.r, config.lora_alpha) == (3.0, "update", 4, 4)
    # loaded with it, it is trained on as one
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, config=config, is_trainable=True)
    assert {variant.eta for _, _, variant, _ in layers_of(again)} == {3.0} and len(layers_of(again)) == 14


def test_a_folder_of_another_adapter_is_none_of_it(base, tmp_path):
    plain(base).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"has no {SIDE_FILE} of an ALLoRA adapter; use peft.LoraConfig"):
        ALLoRAConfig.from_pretrained(tmp_path)
    for text in ('{"scheme": "gift_sw", "columns": {}}', "{}"):
        (tmp_path / SIDE_FILE).write_text(text)
        with pytest.raises(ConfigError, match="it must have the scheme allora"):
            ALLoRAConfig.from_pretrained(tmp_path)
    (tmp_path / SIDE_FILE).write_text('{"scheme": "allora", "eta": NaN}')
    with pytest.raises(ConfigError, match="it must have the scheme allora, an eta from 0.0001 to 10000 and a form"):
        ALLoRAConfig.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="gone is no folder here; give that of a saved adapter"):
        ALLoRAConfig.from_pretrained(tmp_path / "gone")


def test_one_that_was_made_elsewhere_becomes_one(base, tmp_path):
    model = plain(base)
    assert apply_allora(model, 3.0) is model and model.peft_config["default"].scheme == "allora eta 3.0, gradient form"
    expected = gradients(adapted(base, eta=3.0))
    assert all(torch.equal(value, expected[name]) for name, value in gradients(model).items())
    model.save_pretrained(tmp_path)
    assert ALLoRAConfig.from_pretrained(tmp_path).eta == 3.0
    # and another eta again
    apply_allora(model, 1.5)
    assert {variant.eta for _, _, variant, _ in layers_of(model)} == {1.5}


def test_a_second_adapter_on_the_same_layers_becomes_one_where_it_is_asked_for(base):
    model = plain(base)
    model.add_adapter("b", ALLoRAConfig(r=2, target_modules=["q_proj", "up_proj"]))
    assert not layers_of(model)
    apply_allora(model, 2.0, "b")
    assert [name for *_, name in layers_of(model)] == ["b"] * 4
    twin = copy.deepcopy(model)
    assert len(layers_of(twin, "b")) == 4
    twin.delete_adapter("b")
    assert not layers_of(twin) and layers_of(model)
    # only its own gradients are scaled
    model.set_adapter("default")
    expected = gradients(plain(base))
    assert all(torch.equal(value, expected[name]) for name, value in gradients(model).items())


def test_what_cannot_become_one_is_left_as_it_was(base):
    for settings, said in (
        (dict(lora_alpha=8), "lora_alpha is 8 with rank 4"),
        (dict(rank_pattern={"up_proj": 2}), "up_proj has a scaling of 2"),
        (dict(lora_dropout=0.1), "lora_dropout is 0.1"),
        (dict(use_dora=True), "use_dora is True"),
        (dict(lora_bias=True), "lora_bias is True"),
        (dict(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
        (dict(target_modules=["q_proj", "embed_tokens"]), "embed_tokens is a Embedding"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = plain(base, **settings)
        config = model.peft_config["default"]
        with pytest.raises(ConfigError, match=said):
            apply_allora(model, 2.0)
        assert not layers_of(model) and model.peft_config["default"] is config


def test_only_an_adapter_of_lora_is_taken(base):
    with pytest.raises(ConfigError, match="takes a PeftModel, not a LlamaForCausalLM"):
        apply_allora(base, 2.0)
    with pytest.raises(ConfigError, match="no adapter 'b'; it has 'default'"):
        apply_allora(plain(base), 2.0, "b")
    columns = get_peft_model(copy.deepcopy(base), GiftSWConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="is of the scheme gift_sw; ALLoRA is made of a plain LoRA"):
        apply_allora(columns, 2.0)
    with pytest.raises(ConfigError, match="eta is True; it must be a number from 0.0001"):
        apply_allora(plain(base), True)


@pytest.mark.parametrize("eta", [0, -1.0, math.nan, math.inf, True, "2", None, 1e-9, 1e9, 10**400, [2.0]])
def test_eta_is_a_number_in_its_range(eta):
    with pytest.raises(ConfigError, match="allora: eta is"):
        ALLoRAConfig(eta=eta)


def test_patterns_whose_scaling_is_one_are_taken(base):
    settings = dict(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2})
    with pytest.raises(ConfigError, match="q_proj has a scaling of 2 .*the same value in alpha_pattern"):
        get_peft_model(copy.deepcopy(base), ALLoRAConfig(**settings))
    model = adapted(base, **settings, alpha_pattern={"q_proj": 2})
    assert sorted({layer.r[name] for _, layer, _, name in layers_of(model)}) == [2, 4]


def test_a_scaling_that_is_set_later_is_not_trained_with(base):
    model = adapted(base)
    for _, layer, _, _ in layers_of(model):
        layer.scale_layer(0.5)
    half = plain(base, lora_alpha=2)
    torch.testing.assert_close(logits(model), logits(half))
    with pytest.raises(ConfigError, match="is trained with a scaling of 0.5, which was set after it was made"):
        gradients(model)


def test_layers_are_pefts_own(base):
    kinds = {type(layer) for _, layer, _, _ in layers_of(adapted(base))}
    assert kinds == {Linear}
    with pytest.raises(ConfigError, match="embed_tokens is a Embedding, and ALLoRA is for linear layers"):
        get_peft_model(copy.deepcopy(base), ALLoRAConfig(r=4, target_modules=["embed_tokens"]))
    convolved = nn.Sequential(nn.Conv1d(4, 4, 3))
    with pytest.raises(ConfigError, match="0 is a Conv1d, and ALLoRA is for linear layers"):
        get_peft_model(convolved, ALLoRAConfig(r=4, target_modules=["0"]))


def test_weights_that_are_transposed_are_taken(tmp_path):
    """GPT-2's Conv1D, of which PEFT makes a linear layer and notes it in the config."""
    torch.manual_seed(0)
    whole = tiny_model("gpt2").eval()
    with pytest.warns(UserWarning, match="Setting fan_in_fan_out to True"):
        model, other = (made(whole, target_modules=["c_attn"]) for made in (adapted, plain))
    assert torch.equal(logits(model), logits(other))
    for name, value in gradients(model).items():
        if "lora_B" in name:
            A, B = (dict(model.named_parameters())[name.replace("lora_B", part)] for part in ("lora_A", "lora_B"))
            expected = allora_scale(A, B, 2.0)[:, None] * gradients(other)[name]
            torch.testing.assert_close(value.double(), expected, atol=1e-7, rtol=1e-5)
    model.save_pretrained(tmp_path)
    saved, theirs = json.loads((tmp_path / "adapter_config.json").read_text()), other.peft_config["default"]
    assert saved["fan_in_fan_out"] == theirs.fan_in_fan_out


def test_a_layer_that_multiplies_by_its_matrices_itself_is_refused(base, monkeypatch):
    class Own(Linear):
        def forward(self, x, *args, **kwargs):
            return self.base_layer(x)

    made = allora.LoraModel._create_new_module

    def owning(config, name, target, **kwargs):
        layer = made(config, name, target, **kwargs)
        layer.__class__ = Own
        return layer

    monkeypatch.setattr(allora.LoraModel, "_create_new_module", staticmethod(owning))
    with pytest.raises(ConfigError, match="q_proj is a Linear, of which PEFT makes a Own, which multiplies by its"):
        get_peft_model(copy.deepcopy(base), ALLoRAConfig(r=4, target_modules=["q_proj"]))


def test_the_layers_of_peft_that_ask_their_variant_are_known():
    from peft.tuners.lora import layer, tp_layer
    from peft.tuners.lora.awq import AwqLoraLinear
    from peft.tuners.lora.gptq import GPTQLoraLinear

    asks = allora._asks_its_variant
    assert asks(layer.Linear) and asks(GPTQLoraLinear)
    others = (AwqLoraLinear, tp_layer.LoraParallelLinear, layer.ParamWrapper, layer.MultiheadAttention)
    assert not any(map(asks, others))


def test_quantised_bases_keep_their_layers():
    bnb = pytest.importorskip("bitsandbytes")
    from peft.tuners.lora.bnb import Linear4bit

    torch.manual_seed(0)
    weight = torch.randn(64, 64)

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4") for _ in range(2))
            for layer in (self.first, self.second):
                layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")

        def forward(self, x):
            return self.second(self.first(x))

    found = {}
    for kind, config in (("ours", ALLoRAConfig), ("theirs", LoraConfig)):
        base = Small().to("cpu")
        base.is_loaded_in_4bit = True
        torch.manual_seed(6)
        model = moved(get_peft_model(base, config(r=4, lora_alpha=4, target_modules=["first", "second"])))
        torch.manual_seed(4)
        model(torch.randn(5, 64)).square().mean().backward()
        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        assert {type(layer) for layer in layers} == {Linear4bit}
        found[kind] = [
            (layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.lora_B["default"].weight.grad)
            for layer in layers
        ]
    for (A, B, ours), (_, _, theirs) in zip(found["ours"], found["theirs"], strict=True):
        torch.testing.assert_close(ours.double(), allora_scale(A, B, 2.0)[:, None] * theirs, atol=1e-6, rtol=1e-4)


def test_of_a_mixture_all_linear_is_what_it_can_take(tmp_path):
    import transformers

    from tests.adapters.test_gift_sw import FAMILIES

    torch.manual_seed(0)
    whole = transformers.AutoModelForCausalLM.from_config(FAMILIES["qwen3_moe"][0]()).eval()
    model = adapted(whole)
    assert len(layers_of(model)) == 8 and "Qwen3MoeExperts" in model.peft_config["default"].what_was_left_out()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(whole), tmp_path).eval()
    torch.testing.assert_close(logits(again), logits(model), atol=1e-6, rtol=1e-5)


def divided(model, scaled=False):
    """The change in three steps of an optimizer that divides each gradient by its size; whether updates are scaled."""
    values = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.RMSprop(values, lr=1e-2, alpha=0.0)
    hooks = ScaledUpdates(model, optimizer) if scaled else None
    before = trainable(model)
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if hooks:
        assert hooks.steps == 3
        hooks.remove()
    return {name: value - before[name] for name, value in trainable(model).items()}


def test_an_update_that_is_scaled_is_the_optimizers_row_by_row(base):
    """One step, against that of a plain LoRA with the same optimizer."""
    ours, theirs = adapted(base, form="update"), plain(base)
    scales = {path: allora_scale(layer.lora_A[name].weight, layer.lora_B[name].weight, 2.0)
              for path, layer, _, name in layers_of(ours)}  # fmt: skip
    changes = []
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([v for v in model.parameters() if v.requires_grad], lr=1e-2, weight_decay=0.0)
        if model is ours:
            ScaledUpdates(model, optimizer)
        found, before = gradients(model), trainable(model)
        optimizer.step()
        changes.append((found, {name: value - before[name] for name, value in trainable(model).items()}))
    (own, change), (plain_gradients, expected) = changes
    assert all(torch.equal(own[name], value) for name, value in plain_gradients.items())
    for name, value in change.items():
        path = name.removeprefix("base_model.model.").split(".lora_")[0]
        factor = scales[path][:, None] if "lora_B" in name else 1.0
        torch.testing.assert_close(value.double(), factor * expected[name].double(), atol=1e-8, rtol=1e-5)
    # where the gradients are scaled, such an optimizer undoes it
    assert distance(divided(adapted(base)), divided(plain(base))) < 0.3
    assert distance(divided(adapted(base, form="update"), scaled=True), divided(plain(base))) > 0.5


def test_updates_are_scaled_only_where_that_can_be(base):
    values = lambda model: [value for value in model.parameters() if value.requires_grad]  # noqa: E731
    model = adapted(base, form="update")
    for optimizer, said in (
        (torch.optim.AdamW(values(model), weight_decay=0.1), "weight_decay is 0.1 with allora's form update"),
        (torch.optim.SGD([torch.zeros(1)]), "14 of the adapter's 14 matrices B are none of this optimizer's"),
        (object(), "object has no hooks around its step"),
    ):
        with pytest.raises(ConfigError, match=said):
            ScaledUpdates(model, optimizer)
    with pytest.raises(ConfigError, match="is no ALLoRA adapter of the form update"):
        ScaledUpdates(adapted(base), torch.optim.SGD(values(model)))


def test_updates_that_nothing_scales_are_told_once(base, logged):
    model = adapted(base, form="update")
    logits(model)
    assert not logged.text
    for _ in range(2):
        gradients(model)
    assert logged.text.count("nothing scales the updates of an optimizer here") == 1
    logged.clear()
    other = adapted(base, form="update")
    ScaledUpdates(other, torch.optim.SGD([value for value in other.parameters() if value.requires_grad], lr=0.1))
    gradients(other)
    assert not logged.text


def test_one_optimizer_s_updates_are_scaled_once(base):
    made = adapted(base, form="update")
    optimizer = torch.optim.SGD([value for value in made.parameters() if value.requires_grad], lr=0.1)
    first = ScaledUpdates(made, optimizer)
    with pytest.raises(ConfigError, match="scaled already.*`remove`"):
        ScaledUpdates(made, optimizer)
    first.remove()
    again = ScaledUpdates(made, optimizer)
    gradients(made)
    optimizer.step()
    assert (first.steps, again.steps) == (0, 1)
    # of another model's matrices, and twice removed
    other = adapted(base, form="update")
    ScaledUpdates(other, torch.optim.SGD([value for value in other.parameters() if value.requires_grad], lr=0.1))
    again.remove()
    again.remove()
    ScaledUpdates(made, optimizer)


def test_recipes_settings_name_the_scheme():
    made = adapter_config(ModelArguments(adapter="allora", lora_r=8, allora_eta=1.0, lora_target_modules=["q_proj"]))
    assert isinstance(made, ALLoRAConfig) and (made.r, made.lora_alpha, made.lora_dropout) == (8, 8, 0.0)
    assert (made.eta, made.form, made.target_modules) == (1.0, "gradient", {"q_proj"})
    made = adapter_config(ModelArguments(adapter="allora", allora_form="update", load_in_4bit=True))
    assert (made.r, made.lora_alpha, made.eta, made.form) == (16, 16, 2.0, "update")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(adapter="allora", lora_alpha=32), "lora_alpha is 32 with adapter: allora and lora_r 16"),
        (dict(adapter="allora", lora_dropout=0.05), "lora_dropout is 0.05 with adapter: allora"),
        (dict(adapter="gift_sw", lora_dropout=0.05), "lora_dropout is 0.05 with adapter: gift_sw"),
        (dict(use_peft=True, allora_eta=1.0), "allora_eta is 1.0, which has no effect on adapter: lora"),
        (dict(adapter="gift_sw", allora_form="update"), "allora_form is 'update', which has no effect on adapter: gif"),
        (dict(adapter="allora", gift_bits=3), "gift_bits is 3, which has no effect on adapter: allora"),
        (dict(allora_eta=1.0), "allora_eta is 1.0, which has no effect on adapter: none"),
        (dict(adapter="lora", use_peft=False), "use_peft is false with adapter: lora, which trains an adapter"),
        (dict(adapter="allora", use_peft=False), "use_peft is false with adapter: allora"),
        (dict(adapter="gift_sw", use_peft=False), "use_peft is false with adapter: gift_sw"),
        (dict(adapter="none", use_peft=True), "adapter is none with use_peft: true"),
    ],
)
def test_settings_without_effect_beside_the_adapter_are_refused(given, said):
    with pytest.raises(ExcludedSetting, match=said):
        ModelArguments(**given)


@pytest.mark.parametrize(
    ("file", "words", "adapter"),
    [
        ("adapter: allora\nuse_peft: false", [], None),
        ("", ["--adapter", "allora", "--use_peft", "false"], None),
        # of a file and a command line the command line's stays
        ("adapter: allora", ["--use_peft", "false"], "none"),
        ("use_peft: false", ["--adapter", "allora"], "allora"),
        ("use_peft: false", ["--adapter", "none"], "none"),
        ("use_peft: false", [], "none"),
        ("adapter: allora", ["--use_peft", "true"], "allora"),
    ],
)
def test_use_peft_false_beside_an_adapter_is_answered_wherever_they_stand(file, words, adapter, tmp_path, logged):
    logged.set_level("INFO", logger="posttrain")
    (tmp_path / "run.yaml").write_text(f"model_name_or_path: m\n{file}\n")
    given = (ModelArguments,), ["--config", str(tmp_path / "run.yaml"), *words]
    if adapter is None:
        with pytest.raises(ConfigError, match=r"use_peft is false with adapter: allora.* \(.*use_peft: "):
            parse(*given)
        return
    (args,) = parse(*given)
    assert (args.adapter, args.use_peft) == (adapter, adapter != "none")
    gives_way = "use_peft: false" in file and "allora" in words or "allora" in file and "false" in words
    assert ("is left out, as the command line has" in logged.text) is gives_way


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(bias="all"), "bias is 'all' with adapter allora: its factors are of the product B A"),
        (dict(bias="lora_only"), "bias is 'lora_only' with adapter allora"),
        (dict(layer_replication=[(0, 1), (0, 1)]), "layer_replication is .* the layers that the model has"),
        (dict(loftq_config={"loftq_bits": 4}), "loftq_config is .* its B begins at zero"),
        (dict(corda_config=CordaConfig()), "corda_config is .* its B begins at zero"),
        (dict(eva_config=EvaConfig()), "eva_config is .* its B begins at zero"),
        (dict(megatron_config={"a": 1}), "megatron_config is .* with adapter allora"),
    ],
)
def test_what_trains_without_factors_or_starts_otherwise_is_refused(settings, said):
    with warnings.catch_warnings():
        # PEFT's own, of configs without effect
        warnings.simplefilter("ignore")
        with pytest.raises(ConfigError, match=said):
            ALLoRAConfig(r=4, target_modules="all-linear", **settings)


def test_whole_modules_train_beside_it_with_their_own_gradients(base):
    made = adapted(base, target_modules=["q_proj"], modules_to_save=["norm"], trainable_token_indices=[1, 2])
    found = gradients(made)
    expected = gradients(
        plain(base, target_modules=["q_proj"], modules_to_save=["norm"], trainable_token_indices=[1, 2])
    )
    others = [name for name in found if "lora_" not in name]
    assert len(others) == 6 and all(torch.equal(found[name], expected[name]) for name in others)


def test_the_example_of_the_page_runs(base, tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "methods" / "allora.md").read_text()
    code = re.search(r"## Models that are wrapped elsewhere.*?```python\n(.*?)```", text, re.DOTALL)[1]
    scope = dict(base=copy.deepcopy(base), other_base=copy.deepcopy(base), input_ids=IDS, folder=tmp_path)
    exec(code, scope)
    model, loaded = scope["model"], scope["loaded"]
    etas = [(name, variant.eta) for *_, variant, name in layers_of(model)]
    assert sorted(etas) == [("default", 2.0)] * 4 + [("second", 1.0)] * 2
    assert {variant.eta for *_, variant, _ in layers_of(loaded)} == {2.0} and (tmp_path / SIDE_FILE).is_file()
    # B began at zero, where all rows have eta, and A has no gradient
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    change = {name: value.detach().clone() for name, value in theirs.named_parameters() if "lora_B" in name}
    for name, value in theirs.named_parameters():
        if name in change:
            value.data.zero_()
    assert distance(change, {name: -0.1 * 2.0 * gradients(theirs)[name] for name in change}) < 1e-4


def test_an_optimizer_keeps_the_parameters_of_what_becomes_one(base):
    model = plain(base)
    held, found = list(model.parameters()), logits(model)
    apply_allora(model, 2.0)
    assert all(one is other for one, other in zip(model.parameters(), held, strict=True))
    assert torch.equal(logits(model), found)
