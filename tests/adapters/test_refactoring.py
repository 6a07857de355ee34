"""A LoRA that is refactored while it trains: the same function, gradients and means in new factors, others refused."""

import copy

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from peft import LoraConfig, get_peft_model

from posttrain.adapters import refactoring
from posttrain.adapters.allora import ALLoRAConfig
from posttrain.adapters.gift_sw import GiftSWConfig
from posttrain.adapters.refactoring import RefactorCallback, factors_of, refactor_adapter, second_moment_estimate
from posttrain.errors import ConfigError, DataError, DivergedError
from posttrain.mechanisms import scaled_rows
from posttrain.models import tiny_model
from posttrain.objectives import low_rank

IDS = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(0))
OPTIMIZERS = {
    "sgd": lambda values: torch.optim.SGD(values, lr=0.1),
    "momentum": lambda values: torch.optim.SGD(values, lr=0.1, momentum=0.9, dampening=0.1, nesterov=False),
    "nesterov": lambda values: torch.optim.SGD(values, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda values: torch.optim.AdamW(values, lr=1e-3, weight_decay=0.1),
    "adam": lambda values: torch.optim.Adam(values, lr=1e-3),
}
# linear layers and no scale
SCHEMES = {ALLoRAConfig: dict(target_modules=["q_proj", "down_proj"], lora_alpha=None)}
KINDS = [LoraConfig, ALLoRAConfig]


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return tiny_model(num_hidden_layers=2).double()


def adapted(base, kind=LoraConfig, **settings):
    given = dict(r=4, target_modules=["q_proj", "down_proj", "embed_tokens"], lora_alpha=12)
    config = kind(**given | SCHEMES.get(kind, {}) | settings)
    model = get_peft_model(copy.deepcopy(base), config)
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        if "lora_" in name:
            # rows of A of unlike sizes, which nearly agree
            value.data = torch.randn(value.shape, generator=generator, dtype=value.dtype) * 0.1
            if "lora_A" in name or "embedding_A" in name:
                value.data += 0.3 * value.data[:1]
                value.data *= torch.arange(1.0, len(value) + 1)[:, None].to(value)
    return model


def trained(model):
    return [value for value in model.parameters() if value.requires_grad]


def loss(model, ids=IDS):
    return model(input_ids=ids, labels=ids).loss


def steps(model, make, count=3):
    optimizer = make(trained(model))
    for step in range(count):
        optimizer.zero_grad()
        loss(model, IDS[:, step:]).backward()
        optimizer.step()
    return optimizer


def gap(ours, theirs):
    return (torch.linalg.norm(ours - theirs) / torch.linalg.norm(theirs)).item()


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_stays_and_a_becomes_orthonormal(kind, base):
    model = adapted(base, kind)
    scalings = [dict(layer.scaling) for layer in model.modules() if hasattr(layer, "lora_A")]
    before, held = loss(model).item(), [one.A for one in factors_of(model)]
    with torch.no_grad():
        logits = model(IDS).logits
        assert refactor_adapter(model) == []
        torch.testing.assert_close(model(IDS).logits, logits, atol=1e-11, rtol=1e-11)
    assert loss(model).item() == pytest.approx(before, rel=1e-11)
    for one, parameter in zip(factors_of(model), held, strict=True):
        assert one.A is parameter
        torch.testing.assert_close(one.A @ one.A.T, torch.eye(4, dtype=one.A.dtype), atol=1e-11, rtol=0)
        sizes = one.B.detach().norm(dim=0)
        assert sizes.tolist() == sorted(sizes.tolist(), reverse=True)
    assert scalings == [dict(layer.scaling) for layer in model.modules() if hasattr(layer, "lora_A")]
    assert len(held) == {LoraConfig: 5, ALLoRAConfig: 4}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_the_new_factors_are_the_old_ones_turned(kind, base):
    model = adapted(base, kind)
    loss(model).backward()
    made = [(one.A.grad, one.B.grad, low_rank.refactored(one.A.detach(), one.B.detach())) for one in factors_of(model)]
    refactor_adapter(model)
    model.zero_grad()
    loss(model).backward()
    for one, (of_a, of_b, turned) in zip(factors_of(model), made, strict=True):
        right = gap(turned.back.T @ of_a, one.A.grad), gap(of_b @ turned.to.T, one.B.grad)
        wrong = gap(turned.to @ of_a, one.A.grad), gap(of_b @ turned.back, one.B.grad)
        assert max(right) < 1e-10 < 1e-2 < min(wrong)


def test_rows_factors_of_b_alone_would_not_turn(base, monkeypatch):
    monkeypatch.setattr(scaled_rows, "scale_of", lambda gram, B, eta: (B.norm(dim=1) + eta**-2).rsqrt())
    with pytest.raises(AssertionError):
        test_gradients_in_the_new_factors_are_the_old_ones_turned(ALLoRAConfig, base)


def products(model):
    return torch.cat([(one.B @ one.A).detach().flatten() for one in factors_of(model)])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_sgd_of_b_beside_an_orthonormal_a_does_not_notice_a_refactorisation(kind, momentum, base):
    """New factors are a rotation of the old ones then, and so is the path of SGD."""
    made = {}
    for is_orthonormal in (True, False):
        for refactors in (True, False):
            model = adapted(base, kind)
            if is_orthonormal:
                refactor_adapter(model)
            optimizer = torch.optim.SGD([one.B for one in factors_of(model)], lr=0.1, momentum=momentum)
            optimizer.add_param_group({"params": [one.A for one in factors_of(model)], "lr": 0.0})
            before = products(model)
            for step in range(3):
                optimizer.zero_grad()
                loss(model, IDS[:, step:]).backward()
                optimizer.step()
                if refactors:
                    refactor_adapter(model, optimizer)
            made[is_orthonormal, refactors] = products(model) - before
    assert gap(made[True, True], made[True, False]) < 1e-9
    assert gap(made[False, True], made[False, False]) > 1e-2


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_running_means_are_those_of_the_turned_gradients(name, base):
    model = adapted(base)
    optimizer = steps(model, OPTIMIZERS[name])
    parameters = {id(p) for one in factors_of(model) for p in one[1:]}
    then = {id(p): {n: v.clone() for n, v in optimizer.state[p].items() if v is not None} for p in trained(model)}
    made = [low_rank.refactored(one.A.detach(), one.B.detach()) for one in factors_of(model)]
    refactor_adapter(model, optimizer)
    for one, turned in zip(factors_of(model), made, strict=True):
        for p, matrix, rows in ((one.A, turned.back.T, lambda m: m), (one.B, turned.to, lambda m: m.T)):
            before, after = then[id(p)], optimizer.state[p]
            for entry in {"exp_avg", "momentum_buffer"} & before.keys():
                assert gap(rows(after[entry]), matrix @ rows(before[entry])) < 1e-11
                assert after[entry].dtype == before[entry].dtype
            if "exp_avg_sq" in before:
                assert (after["exp_avg_sq"] >= 0).all() and torch.equal(after["step"], before["step"])
                assert gap(rows(after["exp_avg_sq"]), matrix.square() @ rows(before["exp_avg_sq"])) < 1e-11
    assert {"sgd": 0, "momentum": 1, "nesterov": 1}.get(name, 3) == max(map(len, then.values()))
    assert parameters == {id(p) for p in trained(model)}


def test_other_parameters_and_optimizers_wrapped_by_accelerate(base):
    model = adapted(base)
    norm = model.get_base_model().model.norm.weight
    norm.requires_grad_(True)
    optimizer = steps(model, OPTIMIZERS["adamw"])
    before = {name: value.clone() for name, value in optimizer.state[norm].items()}
    wrapped = AcceleratedOptimizer.__new__(AcceleratedOptimizer)
    wrapped.optimizer = optimizer
    first = {id(one.A): optimizer.state[one.A]["exp_avg"].clone() for one in factors_of(model)}
    refactor_adapter(model, wrapped)
    assert all(torch.equal(value, before[name]) for name, value in optimizer.state[norm].items())
    assert all(gap(optimizer.state[one.A]["exp_avg"], first[id(one.A)]) > 1e-2 for one in factors_of(model))


def test_the_estimate_of_second_moments():
    generator = torch.Generator().manual_seed(0)
    squares = torch.rand(3, 5, generator=generator, dtype=torch.float64)
    # rows that change places and sizes are known exactly
    turn = torch.tensor([[0, -2.0, 0], [0, 0, 0.5], [1, 0, 0]], dtype=torch.float64)
    gradients = torch.randn(7, 3, 5, generator=generator, dtype=torch.float64)
    exact = (turn @ gradients).square().mean(0)
    torch.testing.assert_close(second_moment_estimate(gradients.square().mean(0), turn), exact)
    # independent ones, in the mean
    mixed = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    many = torch.randn(200_000, 3, 5, generator=generator, dtype=torch.float64) * squares.sqrt()
    found = second_moment_estimate(many.square().mean(0), mixed)
    assert gap(found, (mixed @ many).square().mean(0)) < 0.01
    assert gap(mixed @ squares, (mixed @ many).square().mean(0)) > 0.1


def test_a_layer_whose_rows_depend_on_each_other_stays_as_it_is(base, logged):
    model = adapted(base)
    one = factors_of(model)[1]
    one.A.data[3] = one.A.data[0] - one.A.data[1]
    before, others = one.A.detach().clone(), [other.A.detach().clone() for other in factors_of(model)]
    callback, state = RefactorCallback(2), type("State", (), dict(global_step=2))()
    with logged.at_level("WARNING", logger="posttrain"):
        for _ in range(2):
            callback.on_step_end(None, state, None, model=model)
    assert torch.equal(one.A, before)
    assert sum(torch.equal(now.A, then) for now, then in zip(factors_of(model), others, strict=True)) == 1
    assert (
        logged.text.count(f"left 1 layers as they are, whose A has rows that depend on each other, as {one.path}") == 1
    )


def test_only_every_nth_step_refactors(base):
    model, callback = adapted(base), RefactorCallback(3)
    before, moved = [one.A.detach().clone() for one in factors_of(model)], []
    for step in range(1, 7):
        callback.on_step_end(None, type("State", (), dict(global_step=step))(), None, model=model)
        moved.append(not all(torch.equal(one.A, then) for one, then in zip(factors_of(model), before, strict=True)))
    assert moved == [False, False, True, True, True, True]


class Mine(torch.optim.AdamW):
    pass


def made(kind, **settings):
    return lambda values: kind(values, lr=0.1, **settings)


REFUSED_OPTIMIZERS = {
    "the optimizer is torch.optim.rmsprop.RMSprop": made(torch.optim.RMSprop),
    "the optimizer is torch.optim.adagrad.Adagrad": made(torch.optim.Adagrad),
    "the optimizer is torch.optim.nadam.NAdam": made(torch.optim.NAdam),
    "the optimizer is tests.adapters.test_refactoring.Mine": made(Mine),
    r"keeps the largest second moments \(amsgrad\)": made(torch.optim.AdamW, amsgrad=True),
    "the weight_decay 0.1 of SGD": made(torch.optim.SGD, momentum=0.9, weight_decay=0.1),
    "the weight_decay 0.1 of Adam,": made(torch.optim.Adam, weight_decay=0.1),
}


@pytest.mark.parametrize("said", REFUSED_OPTIMIZERS)
def test_optimizers_that_cannot_follow_are_refused(said, base):
    model = adapted(base)
    optimizer, before = REFUSED_OPTIMIZERS[said](trained(model)), factors_of(model)[0].A.detach().clone()
    with pytest.raises(ConfigError, match=said):
        refactor_adapter(model, optimizer)
    with pytest.raises(ConfigError, match=said):
        RefactorCallback(2).on_train_begin(None, None, None, model=model, optimizer=optimizer)
    assert torch.equal(factors_of(model)[0].A, before)


@pytest.mark.parametrize("kind", [made(torch.optim.SGD, weight_decay=0.1), made(torch.optim.AdamW, weight_decay=0.1)])
def test_a_decay_that_is_apart_is_taken(kind, base):
    model = adapted(base)
    assert refactor_adapter(model, kind(trained(model))) == []


def test_second_moments_may_be_refused(base):
    model = adapted(base)
    for name in ("adam", "adamw"):
        with pytest.raises(ConfigError, match="refactor_second_moment is refuse and the optimizer is Adam"):
            refactor_adapter(model, OPTIMIZERS[name](trained(model)), second_moment="refuse")
    assert refactor_adapter(model, OPTIMIZERS["momentum"](trained(model)), second_moment="refuse") == []


def frozen(model):
    next(value for name, value in model.named_parameters() if "lora_A" in name).requires_grad_(False)


def half(model):
    for name, value in model.named_parameters():
        if "lora_" in name:
            value.data = value.data.bfloat16()


def shared(model):
    first, second = [layer for layer in model.modules() if "default" in getattr(layer, "lora_A", {})][:2]
    second.lora_A["default"] = first.lora_A["default"]


LAYERS = {
    "one of its factors is frozen": (dict(), frozen),
    "its factors are of torch.bfloat16, which would round the model": (dict(), half),
    "it shares its factors with another layer": (dict(target_modules=["q_proj", "k_proj"]), shared),
    r"of its 64 inputs no 70 rows \(its rank\) are orthonormal": (dict(r=70, target_modules=["q_proj"]), None),
    "use_dora, whose magnitudes train beside the factors": (dict(use_dora=True, target_modules=["q_proj"]), None),
    "it is no plain LoRA": (dict(alora_invocation_tokens=[3], target_modules=["q_proj"], task_type="CAUSAL_LM"), None),
}


@pytest.mark.parametrize("said", LAYERS)
def test_adapters_that_cannot_be_refactored_are_refused(said, base):
    settings, change = LAYERS[said]
    model = adapted(base, **settings)
    if change:
        change(model)
    with pytest.raises(ConfigError, match=said):
        refactor_adapter(model)


def test_models_without_such_an_adapter_are_refused(base):
    for model in (base, get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"]), "other")):
        with pytest.raises(ConfigError, match="the model has no LoRA of the name 'default'"):
            refactor_adapter(model)
    columns = get_peft_model(copy.deepcopy(base), GiftSWConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="with an adapter of the scheme gift_sw, which fixes its factors"):
        refactor_adapter(columns)
    updates = adapted(base, ALLoRAConfig, form="update")
    with pytest.raises(ConfigError, match="with an adapter of the scheme allora of the form update, which fixes its"):
        refactor_adapter(updates)
    broken = adapted(base)
    factors_of(broken)[0].B.data[0, 0] = float("nan")
    with pytest.raises(DataError, match="down_proj|q_proj|embed_tokens.*: B holds numbers that are not finite"):
        refactor_adapter(broken)
    with pytest.raises(DivergedError, match="after step 2 the adapter cannot be refactored: .* lower learning_rate"):
        RefactorCallback(2).on_step_end(None, type("State", (), dict(global_step=2))(), None, model=broken)


@pytest.mark.parametrize("given", [dict(every=0), dict(every=True), dict(every=1.5), dict(every=2, second_moment="x")])
def test_settings_of_the_callback_are_checked(given):
    with pytest.raises(ConfigError, match=r"every=|second_moment is 'x'"):
        RefactorCallback(**given)


@pytest.mark.parametrize(("setting", "variable"), [("deepspeed", "ACCELERATE_USE_DEEPSPEED"),
                                                  ("fsdp", "ACCELERATE_USE_FSDP")])  # fmt: skip
def test_engines_that_hold_the_weights_are_refused(setting, variable, monkeypatch):
    refactoring.check_engine(type("Args", (), dict(deepspeed=None, fsdp=[]))())
    with pytest.raises(ConfigError, match="whose optimizer holds copies or parts"):
        refactoring.check_engine(type("Args", (), {setting: "x"})())
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ConfigError, match="whose optimizer holds copies or parts"):
        refactoring.check_engine(type("Args", (), {})())
