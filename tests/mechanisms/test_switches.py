import contextlib
import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from trl.trainer.utils import use_adapter

from posttrain.mechanisms.switches import Switches
from posttrain.models import tiny_model

IDS = torch.arange(3, 15).view(2, 6)


def adapted(config=None, base=torch.float32, **settings):
    """A tiny model with an adapter whose matrices are random, and another adapter called ref."""
    torch.manual_seed(0)
    config = config or LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **settings)
    model = get_peft_model(tiny_model().to(base), config)
    model.add_adapter("ref", copy.deepcopy(config))
    model.set_adapter("default")
    return model.train()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def flags(model) -> dict[str, bool]:
    return {name: parameter.requires_grad for name, parameter in model.named_parameters()}


def walked(monkeypatch, model) -> list:
    """Notes when all modules of a model are gone through."""
    found, before = [], torch.nn.Module.named_modules

    def named_modules(self, *args, **kwargs):
        if self is model:
            found.append(self)
        return before(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "named_modules", named_modules)
    return found


@pytest.mark.parametrize("name", [None, "ref"])
def test_an_adapter_is_switched_as_by_peft_bit_for_bit_and_its_flags_are_left(name, monkeypatch):
    model = adapted()
    with use_adapter(model, name):
        expected = logits(model)
    own, before = logits(model), flags(model)
    # one frozen by hand stays frozen, which PEFT would train again
    frozen = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    frozen.requires_grad_(False)
    before, switches = flags(model), Switches(model)
    with switches.adapter(name):
        assert torch.equal(logits(model), expected) and flags(model) == before
        assert model.active_adapter == ("default" if name is None else name)
    found = walked(monkeypatch, model)
    for _ in range(3):
        with switches.adapter(name):
            pass
    assert not found and flags(model) == before and model.active_adapter == "default"
    assert torch.equal(logits(model), own) and not torch.equal(own, expected)


def test_an_error_inside_puts_the_adapter_back():
    model = adapted()
    own, switches = logits(model), Switches(model)
    for name in (None, "ref"):
        with pytest.raises(RuntimeError), switches.adapter(name):
            raise RuntimeError
        assert torch.equal(logits(model), own) and model.active_adapter == "default"
        assert model.get_model_status().enabled is True


def test_an_adapter_that_comes_later_is_found():
    model = adapted()
    switches = Switches(model)
    with switches.adapter(None):
        base = logits(model)
    model.add_adapter("wide", LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "wide"])
    assert not torch.equal(logits(model), base)
    with switches.adapter(None):
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False),
        LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 4], init_lora_weights=False),
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False),
    ],
    ids=["modules_to_save", "tokens", "ia3"],
)
@pytest.mark.parametrize("name", [None, "ref"])
def test_other_kinds_of_adapters_are_switched_by_peft(config, name):
    model = adapted(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "modules_to_save.default" in key or "trainable_tokens_delta.default" in key:
                parameter.add_(0.1)
    with use_adapter(model, name):
        expected = logits(model)
    own = logits(model)
    with Switches(model).adapter(name):
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), own) and not torch.equal(own, expected)


def test_a_merged_adapter_is_taken_out_of_the_weights():
    model = adapted()
    switches = Switches(model)
    with switches.adapter(None):
        expected = logits(model)
    model.merge_adapter()
    with switches.adapter(None):
        assert torch.allclose(logits(model), expected, atol=1e-5)


@pytest.mark.parametrize("every", [1, 2])
def test_checkpointing_goes_off_and_comes_back_as_it_was(every, monkeypatch):
    model = adapted()
    model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=every)
    layers = model.get_base_model().model.layers
    then = [layer.gradient_checkpointing for layer in layers]
    assert then == [number % every == 0 for number in range(len(layers))]
    functions = [layer._gradient_checkpointing_func for layer in layers]
    switches = Switches(model)
    with switches.without_checkpointing():
        assert not model.is_gradient_checkpointing
    found = walked(monkeypatch, model)
    with pytest.raises(RuntimeError), switches.without_checkpointing():
        assert not any(layer.gradient_checkpointing for layer in layers)
        with switches.without_checkpointing():
            pass
        assert not any(layer.gradient_checkpointing for layer in layers)
        raise RuntimeError
    assert not found and [layer.gradient_checkpointing for layer in layers] == then
    assert [layer._gradient_checkpointing_func for layer in layers] == functions
    assert len(model.get_input_embeddings()._forward_hooks) == 1


def passed(model, cast: bool, monkeypatch):
    """(logits and gradients of a forward and backward under autocast, how often PEFT has cast an input)."""
    casts, before = [], BaseTunerLayer._cast_input_dtype

    def noted(self, x, dtype):
        found = before(self, x, dtype)
        casts.append(found.dtype != x.dtype)
        return found

    torch.manual_seed(1)
    with monkeypatch.context() as patch:
        patch.setattr(BaseTunerLayer, "_cast_input_dtype", noted)
        context = contextlib.nullcontext() if cast else Switches(model).without_casts()
        with context, torch.autocast("cpu", torch.bfloat16):
            output = model(input_ids=IDS, labels=IDS)
            output.loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [output.logits.detach(), *gradients], sum(casts)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32])
def test_an_input_that_autocast_casts_anyway_gives_the_same_bits(base, recomputed, monkeypatch):
    results = []
    for cast in (True, False):
        model = adapted(base=base)
        if recomputed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        results.append(passed(model, cast, monkeypatch))
    (expected, casts), (found, left) = results
    assert len(found) == len(expected) > 20 and all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert casts > 0 == left
    # a forward without autocast casts again
    with torch.no_grad():
        assert model(input_ids=IDS).logits.isfinite().all()


@pytest.mark.parametrize("settings", [dict(lora_dropout=0.1), dict(use_dora=True)])
def test_an_input_is_cast_where_the_dtype_is_known_to_matter_or_may(settings, monkeypatch):
    assert passed(adapted(base=torch.bfloat16, **settings), False, monkeypatch)[1] > 0
