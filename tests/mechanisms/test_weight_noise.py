"""Noise on frozen weights: what it is, when there is any, and what is kept of it for the backward pass."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model

from posttrain.adapters.calibration import calibrate
from posttrain.adapters.gift_sw import GiftSWConfig, layers_of
from posttrain.mechanisms.noise.weights import RowNoise, WeightNoise
from posttrain.models import tiny_model

IDS = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return tiny_model(num_hidden_layers=2)


@pytest.fixture
def armed(base):
    """A model with a calibrated adapter that has moved, and its noise."""
    model = get_peft_model(copy.deepcopy(base), GiftSWConfig(r=8, target_modules="all-linear", bits=3))
    calibrate(model, IDS.tolist())
    noise = WeightNoise(5)
    torch.manual_seed(1)
    for _, layer, _, _ in layers_of(model):
        layer.weight_noise = noise
        layer.lora_B["default"].weight.data.normal_(std=0.02)
    return model, noise


def gradients(model, noise, step=0):
    model.zero_grad()
    with noise.during_step(model, step):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
    return loss.item(), [layer.lora_B["default"].weight.grad.clone() for _, layer, _, _ in layers_of(model)]


def relative(values, others):
    gap = sum((a - b).double().square().sum() for a, b in zip(values, others, strict=True))
    return (gap / sum(b.double().square().sum() for b in others)).sqrt().item()


def test_loss_and_gradients_are_those_of_the_weights_with_their_noise_added(armed, base):
    model, noise = armed
    dense, changes = copy.deepcopy(base).requires_grad_(False), []
    for path, layer, variant, _ in layers_of(model):
        module = dense.get_submodule(path)
        change = layer.lora_B["default"].weight.detach().clone().requires_grad_()
        drawn = variant.rows.draw(module.weight, "gaussian", noise.seed_of(variant.rows.number))
        assert not drawn[:, variant.columns].any()

        def forward(x, module=module, change=change, drawn=drawn, columns=variant.columns):
            full = (module.weight + drawn).index_add(1, columns, change)
            return F.linear(x, full, module.bias)

        module.forward = forward
        changes.append(change)
    expected = dense(IDS, labels=IDS).loss
    expected.backward()
    loss, found = gradients(model, noise)
    clean, _ = gradients(model, WeightNoise(5))
    assert loss == pytest.approx(expected.item(), rel=1e-5) and abs(loss - clean) > 1e-3
    assert relative(found, [change.grad for change in changes]) < 1e-4


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_recomputed_forward_has_the_noise_of_the_first(reentrant, armed):
    model, noise = armed
    _, expected = gradients(model, noise)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    _, found = gradients(model, noise)
    assert relative(found, expected) < 1e-5


def test_a_draw_is_of_the_run_the_step_and_the_layer(armed):
    model, noise = armed
    losses = [gradients(model, noise, step)[0] for step in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]
    assert len({WeightNoise(seed).seed_of(number) for seed in range(3) for number in range(3)}) == 9


def test_the_backward_pass_keeps_neither_weights_nor_a_copy_of_them(armed):
    model, noise = armed
    weights = {layer.get_base_layer().weight.data_ptr() for _, layer, _, _ in layers_of(model)}

    def saved(context) -> tuple[int, int]:
        kept = []
        with (
            context,
            torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t),
        ):
            model(IDS, labels=IDS)
        sizes = [(tensor.nbytes, tensor.data_ptr() in weights) for tensor in kept]
        return sum(size for size, _ in sizes), sum(size for size, of_base in sizes if of_base)

    (clean, of_base), (noisy, left) = saved(contextlib.nullcontext()), saved(noise.during_step(model, 0))
    # of copies as much would be kept as of the weights themselves
    assert of_base > 0 == left and noisy <= clean - of_base


def test_there_is_none_without_a_step_a_gradient_or_the_adapter(armed):
    model, noise = armed
    clean = model(IDS, labels=IDS).loss.item()
    with model.disable_adapter():
        off = model(IDS, labels=IDS).loss.item()
    with noise.during_step(model, 0):
        noisy = model(IDS, labels=IDS).loss.item()
        with torch.no_grad():
            assert model(IDS, labels=IDS).loss.item() == clean != noisy
            # after a forward of the policy, as a reference
            assert model.get_base_model()(IDS, labels=IDS).loss.item() == clean
        with model.disable_adapter():
            assert model(IDS, labels=IDS).loss.item() == off
        assert model(IDS, labels=IDS).loss.item() == noisy
        model.merge_adapter()
        merged = model(IDS, labels=IDS).loss.item()
        model.unmerge_adapter()
    assert merged == pytest.approx(clean, rel=1e-5)
    assert model(IDS, labels=IDS).loss.item() == pytest.approx(clean, rel=1e-5)


def test_its_ratio_to_the_weights_is_the_expected_one(armed):
    model, noise = armed
    noise.measured = {}
    gradients(model, noise)
    drawn, weights = torch.stack(list(noise.measured.values())).sum(dim=0).tolist()
    assert len(noise.measured) == len(layers_of(model))
    assert (drawn / weights) ** 0.5 == pytest.approx(noise.take_ratio(), rel=0.05)
    assert noise.take_ratio() == 0


def test_the_ratio_leaves_out_the_columns_without_noise(armed):
    model, noise = armed
    noise.measured = {}
    squares, first = torch.zeros(2, dtype=torch.float64), layers_of(model)[0]
    with torch.no_grad():
        # what is salient may be large
        first[1].get_base_layer().weight[:, first[2].columns] = 100.0
    for _, layer, variant, _ in layers_of(model):
        weight = layer.get_base_layer().weight.detach().double()
        rest = torch.ones(weight.size(1), dtype=torch.bool).index_fill(0, variant.columns, False)
        expected = variant.rows.step.double().square().sum() * rest.sum() / 4, weight[:, rest].square().sum()
        squares += torch.stack(expected)
        found = RowNoise(variant.rows.step, variant.columns, 0, weight.float()).squares("gaussian")
        assert found == pytest.approx([part.item() for part in expected], rel=1e-6)
    gradients(model, noise)
    assert noise.take_ratio() == pytest.approx((squares[0] / squares[1]).sqrt().item(), rel=1e-6)
    drawn, weights = torch.stack(list(noise.measured.values())).sum(dim=0).tolist()
    assert weights == pytest.approx(squares[1].item(), rel=1e-5) and drawn == pytest.approx(squares[0].item(), rel=0.1)


@pytest.mark.parametrize(("kind", "spread"), [("gaussian", 0.5), ("uniform", 12**-0.5)])
def test_its_size_is_that_of_the_rows_step(kind, spread):
    weight, step = torch.zeros(4, 4096), torch.tensor([0.1, 1.0, 0.0, 2.0])
    drawn = RowNoise(step, torch.tensor([7, 9]), 0, weight).draw(weight, kind, 3)
    assert not drawn[:, [7, 9]].any()
    torch.testing.assert_close(drawn.std(dim=1), step * spread, rtol=0.05, atol=1e-6)
    assert kind == "gaussian" or (drawn.abs() <= step[:, None] / 2).all()


def test_a_copy_runs_its_own_weights_and_no_noise(armed):
    model, noise = armed
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for _, layer, _, _ in layers_of(twin):
            layer.get_base_layer().weight.zero_()
    clean = twin(IDS, labels=IDS).loss.item()
    with noise.during_step(model, 0):
        assert twin(IDS, labels=IDS).loss.item() == clean
        assert model(IDS, labels=IDS).loss.item() != clean
        assert all("forward" not in vars(module) for module in (*twin.modules(), *model.modules()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_under_autocast_gradients_keep_their_dtypes(dtype, armed):
    model, noise = armed
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        _, found = gradients(model, noise)
    _, expected = gradients(model, noise)
    assert found[0].dtype == torch.float32
    assert relative(found, expected) < (0.1 if dtype == torch.bfloat16 else 1e-5)
