"""Gradients of rows against a loop over rows: architectures, recomputation, autocast, layers that run twice, faults."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from trl import ModelConfig, get_quantization_config

from posttrain.errors import ConfigError
from posttrain.mechanisms import row_gradients
from posttrain.mechanisms.row_gradients import RowGradients
from posttrain.models import tiny_model

# two rows of three tokens: what B is given, and the gradient of what it returns
HIDDEN = [[[1, 0], [0, 2], [1, -1]], [[0.5, 0.5], [1, 0], [0, 0]]]
GRADIENT = [[[1, -1], [0, 1], [2, 0]], [[3, 0], [0, 4], [1, 1]]]
# g^T h of each
GOLDEN = [[[3, -2], [-1, 2]], [[1.5, 1.5], [4, 0]]]


def adapted(kind="llama", freeze_a=False, **settings):
    torch.manual_seed(0)
    silent = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0) if kind == "gpt2" else {}
    model = tiny_model(kind, **silent)
    settings = dict(r=4, lora_alpha=8, target_modules="all-linear", fan_in_fan_out=kind == "gpt2") | settings
    model = get_peft_model(model, LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
        if freeze_a and "lora_A" in name:
            parameter.requires_grad_(False)
    return model.train()


def batch(rows=4, width=14):
    ids = torch.randint(5, 200, (rows, width), generator=torch.Generator().manual_seed(1))
    mask, labels = torch.ones_like(ids), ids.clone()
    for row in range(rows):
        length = width - 3 * row
        mask[row, length:], labels[row, length:], labels[row, :3] = 0, -100, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def row_losses(model, rows):
    rows = dict(rows)
    labels = rows.pop("labels")[:, 1:]
    logits = model(**rows, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2).float(), labels, ignore_index=-100, reduction="none")
    return losses.sum(1) / (labels != -100).sum(1)


def loop(model, rows, losses=row_losses):
    """Each row's gradients alone, (rows, ...), by name."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = []
    for row in range(len(rows["labels"])):
        alone = {name: value[row : row + 1] for name, value in rows.items()}
        found.append(torch.autograd.grad(losses(model, alone).sum(), parameters))
    return {name: torch.stack(parts).float() for name, parts in zip(names, zip(*found, strict=True), strict=True)}


def collected(model, rows, losses=row_losses):
    gradients = RowGradients(model)
    with gradients.collected(len(rows["labels"])):
        losses(model, rows).sum().backward()
    return gradients.take()


def gap(found, expected):
    assert list(found) == list(expected)
    return max(((found[name] - rows).norm() / rows.norm()).item() for name, rows in expected.items())


def of_one_layer(layer, name="B"):
    """The two matrices of golden rows through a linear layer."""
    taken = row_gradients._Rows({name: layer.weight})
    x, delta = torch.tensor(HIDDEN, dtype=torch.float64), torch.tensor(GRADIENT, dtype=torch.float64)
    layer.forward = row_gradients._forward(layer, name, 2, taken)
    layer(x.requires_grad_()).backward(delta)
    return taken.take()[name], x.grad, delta


def test_the_gradients_of_rows_are_the_golden_ones():
    layer = nn.Linear(2, 2, bias=False, dtype=torch.float64)
    rows, of_x, delta = of_one_layer(layer)
    # of matrices in float64 they are as well
    golden = torch.tensor(GOLDEN, dtype=torch.float64)
    torch.testing.assert_close(rows, golden, atol=1e-12, rtol=0)
    torch.testing.assert_close(of_x, delta @ layer.weight.detach())
    assert layer.weight.grad is None
    # norms: sqrt(18), sqrt(20.5)
    torch.testing.assert_close(rows.flatten(1).norm(dim=1), torch.tensor([18.0, 20.5], dtype=torch.float64).sqrt())


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize(("kind", "freeze_a"), [("llama", False), ("llama", True), ("gpt2", False)])
def test_they_are_those_of_a_loop_over_rows(kind, freeze_a, reentrant):
    model, rows = adapted(kind, freeze_a), batch()
    expected = loop(model, rows)
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
    assert gap(collected(model, rows), expected) < 1e-5
    assert all(parameter.grad is None for parameter in model.parameters())
    # neighbours of a row that its loss cannot see do not count as its own
    assert expected and all(len(value) == 4 for value in expected.values())


@pytest.mark.parametrize("reentrant", [None, False])
def test_under_autocast_they_are_those_of_a_loop(reentrant):
    model, rows = adapted(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected = loop(model, rows)
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        found = collected(model, rows)
    assert {value.dtype for value in found.values()} == {torch.float32}
    # other shapes are multiplied in other orders, in 8 bits
    assert gap(found, expected) < 0.05


def test_the_loss_and_the_input_have_the_gradients_that_they_had():
    model, rows = adapted(), batch()
    embeddings = model.get_input_embeddings()
    states = []
    handle = embeddings.register_forward_hook(lambda module, given, made: states.append(made.requires_grad_()))
    plain = row_losses(model, rows).sum()
    (expected,) = torch.autograd.grad(plain, states[0])
    gradients = RowGradients(model)
    with gradients.collected(4):
        loss = row_losses(model, rows).sum()
        (found,) = torch.autograd.grad(loss, states[1])
    handle.remove()
    assert torch.equal(loss, plain)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-5)


class Twice(nn.Module):
    """One adapted layer that every row goes through twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential()
        self.inner.add_module("linear", nn.Linear(6, 6))

    def forward(self, x):
        return self.inner(torch.tanh(self.inner(x)))


def of_states(model, rows):
    return model(rows["x"]).square().sum(dim=(1, 2))


def test_a_layer_that_runs_twice_has_the_gradients_of_both():
    model = get_peft_model(Twice(), LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False))
    rows = {"x": torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(2)), "labels": torch.zeros(3)}

    def losses(model, rows):
        return of_states(model, rows)

    expected = loop(model, rows, losses)
    right = gap(collected(model, rows, losses), expected)
    assert right < 1e-5

    class Forgetful(dict):
        # the known wrong variant: the second call's gradients in the place of the first's
        def get(self, name, default=None):
            return default

    gradients = RowGradients(model)
    gradients._taken._reached = Forgetful()
    with gradients.collected(3):
        losses(model, rows).sum().backward()
    assert gap(gradients.take(), expected) > 0.1


def test_a_key_by_the_saved_weight_would_lose_rows_where_activations_are_recomputed(monkeypatch):
    """Keyed by the tensor that backward has, a layer's rows are found under no parameter: why they have names."""
    model, rows = adapted(), batch()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    found = {}

    def by_weight(ctx, gradient):
        x, weight = ctx.saved_tensors
        found[weight] = torch.bmm(gradient.transpose(1, 2), x)
        return gradient @ weight, None, None, None

    monkeypatch.setattr(row_gradients._RowLinear, "backward", staticmethod(by_weight))
    collected(model, rows)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(found) == len(trained) and not any(parameter in found for parameter in trained)


def test_a_quantised_base_has_gradients_of_rows(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config = get_quantization_config(ModelConfig(load_in_4bit=True))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).train()
    rows = batch()
    assert gap(collected(model, rows), loop(model, rows)) < 1e-2


def test_the_model_is_left_as_it_was():
    model, rows = adapted(), batch()
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    wrapped = next(module for name, module in model.named_modules() if name.endswith("lora_B.default"))

    def others(x):
        return nn.Linear.forward(wrapped, x)

    wrapped.forward = others
    gradients = RowGradients(model)
    with pytest.raises(ZeroDivisionError), gradients.collected(4):
        raise ZeroDivisionError
    assert wrapped.forward is others
    del wrapped.forward
    collected(model, rows)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    copy.deepcopy(model)
    row_losses(model, rows).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_what_was_taken_is_gone():
    model, rows = adapted(), batch()
    gradients = RowGradients(model)
    with gradients.collected(4):
        row_losses(model, rows).sum().backward()
    assert gradients.take() and not gradients.take()


@pytest.mark.parametrize("together", [1, 300, 10**9])
def test_consecutive_matrices_lie_behind_each_other_in_one_tensor(together):
    model, rows = adapted(), batch()
    gradients = RowGradients(model)
    found = []
    for take in (RowGradients.take, RowGradients.take_together):
        gradients._taken = row_gradients._Rows(gradients.parameters, together)
        with gradients.collected(4):
            row_losses(model, rows).sum().backward()
        found.append(take(gradients))
    apart, joined = found
    whole = torch.cat([part.flatten(1) for part in apart.values()], dim=1)
    torch.testing.assert_close(torch.cat(list(joined.values()), dim=1), whole)
    names, sizes = list(gradients.parameters), [p.numel() for p in gradients.parameters.values()]
    for name, tensor in joined.items():
        own = [sum(sizes[names.index(name) : end]) for end in range(names.index(name) + 1, len(names) + 1)]
        # whole matrices, as many as fit
        assert tensor.size(1) in own and (tensor.size(1) <= together or tensor.size(1) == own[0])
    assert len(joined) == {1: len(names), 10**9: 1}.get(together, len(joined)) and not gradients.take_together()


def test_a_matrix_that_no_backward_reaches_is_zero_beside_those_that_one_does():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

        def forward(self, x):
            self.second(x)
            return self.first(x)

    model = get_peft_model(Branches(), LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False))
    gradients = RowGradients(model)
    for _ in range(2):
        with gradients.collected(3):
            model(torch.randn(3, 5, 4)).sum().backward()
        ((name, tensor),) = gradients.take_together().items()
        # 2 x 4 values of each A and B
        assert name == next(iter(gradients.parameters)) and tensor.shape == (3, 32)
        assert tensor[:, :16].ne(0).all() and tensor[:, 16:].eq(0).all()
        # what is freed and made anew may hold anything
        tensor.fill_(float("nan"))
    with gradients.collected(3):
        model(torch.randn(3, 5, 4)).sum().backward()
    assert [name.split(".")[2] for name in gradients.take()] == ["first", "first"]


def test_a_layer_that_does_not_get_rows_is_named():
    model = get_peft_model(Twice(), LoraConfig(r=2, target_modules=["linear"]))
    gradients = RowGradients(model)
    for states in (torch.randn(15, 6), torch.randn(5, 3, 6)):
        with gradients.collected(3), pytest.raises(ConfigError, match=r"inner.linear.lora_A.default.weight is given"):
            model(states)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(modules_to_save=["ln_f"], target_modules=["c_attn"]), "ln_f.*would be trained as well"),
        (dict(bias="lora_only", target_modules=["c_attn"]), "bias.*would be trained as well"),
        (dict(use_dora=True), "lora_magnitude_vector.*would be trained as well"),
        (dict(target_modules=["wte"]), "no LoRA on linear layers"),
        (dict(target_modules=["c_attn", "wte"]), "lora_embedding_A.*would be trained as well"),
        (dict(trainable_token_indices=[3, 4]), "trainable_tokens.*would be trained as well"),
    ],
)
def test_what_else_is_trained_is_refused(settings, said):
    model = get_peft_model(tiny_model("gpt2"), LoraConfig(**dict(r=2, fan_in_fan_out=True) | settings))
    with pytest.raises(ConfigError, match=said):
        RowGradients(model)


def test_models_without_a_trained_adapter_and_shared_matrices_are_refused():
    with pytest.raises(ConfigError, match="no LoRA on linear layers"):
        RowGradients(tiny_model())
    model = adapted(target_modules=["q_proj"])
    first, second = [module for name, module in model.named_modules() if name.endswith("lora_A.default")][:2]
    second.weight = first.weight
    with pytest.raises(ConfigError, match="1 of the adapter's 4 matrices are shared"):
        RowGradients(model)
