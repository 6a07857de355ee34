"""Optimizers by name: which there are, what is refused of them, and that the package computes what it did."""

import io
import logging

import pytest
import torch

from posttrain import NoisySFTConfig, PolicyGradientConfig, RobustDPOConfig
from posttrain.errors import ConfigError, EnvironmentIssue
from posttrain.run import optimizer_names, optimizer_state, optimizers
from posttrain.run.optimizer_names import SHARDABLE

OURS = sorted(name for name in SHARDABLE if ":" in name)


def config(folder, kind=NoisySFTConfig, **settings):
    return kind(**dict(output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, learning_rate=0.1) | settings)


def chosen(name, **settings):
    owner, own = name.split(":")
    kind = getattr(torch.optim, own) if owner == "torch.optim" else optimizers._package().load_optimizer(own)
    return optimizers.Chosen(name, kind, settings)


def stepped(name, weights, gradients, lr=0.1, dtype=torch.float32, **settings):
    """The weights after each step."""
    parameter, found = torch.nn.Parameter(torch.tensor(weights, dtype=dtype)), []
    optimizer = chosen(name).kind([parameter], lr=lr, **settings)
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient, dtype=dtype)
        optimizer.step()
        found.append(parameter.detach().clone())
    return found


def close(found, wanted, atol=2e-7):
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=found.dtype), rtol=0, atol=atol)


def test_ademamix_is_what_it_was():
    first, second = stepped("pytorch_optimizer:ademamix", [1.0, 2.0], [[1.0, 2.0], [-1.0, 0.5]], dtype=torch.float64)
    close(first, [0.89995003, 1.89995003], 1e-7)
    close(second, [0.90521318, 1.81680453], 1e-7)


def test_ano_is_what_it_was():
    first, second = stepped("pytorch_optimizer:ano", [1.0, 2.0], [[1.0, 2.0], [-1.0, 0.5]], dtype=torch.float64)
    close(first, [0.9, 1.9], 1e-7)
    close(second, [1.0, 1.86562395], 1e-7)


def test_sgdsai_is_what_it_was():
    start = [[1.0, 2.0], [3.0, 4.0]]
    gradients = [start, [[1.0, 0.0], [0.0, 1.0]]]
    # the ratio of the first gradient: 5.47722558 / 1.29099445 = 4.24264069
    first, second = stepped(
        "pytorch_optimizer:sgdsai", start, gradients, dtype=torch.float64, momentum=0.9, weight_decay=0.0
    )
    close(first.flatten(), [0.95757359, 1.91514719, 2.87272072, 3.83029437], 1e-7)
    close(second.flatten(), [0.87696342, 1.83877969, 2.75816941, 3.63513290], 1e-7)


def test_adabelief_and_diffgrad_are_their_formulas():
    (found,) = stepped("pytorch_optimizer:diffgrad", [1.0], [[2.0]], dtype=torch.float64)
    # the damping is sigmoid(|0 - g|), of the first step without a bias in the ratio
    assert found.item() == pytest.approx(1 - 0.1 * torch.tensor(2.0).double().sigmoid().item(), abs=1e-6)
    found = stepped("pytorch_optimizer:adabelief", [1.0, 1.0], [[1.0, -3.0]], dtype=torch.float64)[0]
    # m = (1 - b1) g, v = (1 - b2) (g - m)^2: the first step is lr / b1 against the gradient's sign
    close(found, [1 - 0.1 / 0.9, 1 + 0.1 / 0.9], 1e-5)


@pytest.mark.parametrize("name", OURS)
def test_a_name_on_the_list_moves_a_part_as_it_moves_the_whole(name):
    assert optimizers.is_elementwise(chosen(name))


@pytest.mark.parametrize("name", ["sgdsai", "lamb", "lars", "adafactor", "came", "novograd", "stableadamw", "adalite"])
def test_a_rule_that_reads_a_whole_matrix_is_told_apart(name):
    assert f"pytorch_optimizer:{name}" not in SHARDABLE and not optimizers.is_elementwise(
        chosen(f"pytorch_optimizer:{name}")
    )


@pytest.mark.parametrize("name", [*OURS, "pytorch_optimizer:sgdsai", "pytorch_optimizer:prodigy"])
def test_every_name_trains_and_its_state_is_saved_and_taken_back(name):
    target = torch.linspace(-1, 1, 24).view(4, 6)

    def run(steps, state=None, weights=None):
        parameter = torch.nn.Parameter(torch.ones(4, 6) if weights is None else weights.clone())
        groups = [{"params": [parameter], "weight_decay": 0.0}, {"params": [], "weight_decay": 0.0}]
        optimizer = chosen(name).kind(groups, lr=0.01)
        if state is not None:
            optimizer.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (parameter - target).square().sum()
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        return parameter.detach(), file.getvalue(), losses, optimizer

    straight, *_ = run(5)
    half, state, *_ = run(2)
    content = torch.load(io.BytesIO(state), weights_only=True)
    optimizer_state.check_form(content)
    groups = [[("weight", torch.Size((4, 6)))], []]
    resumed, _, _, optimizer = run(3, state, half)
    assert torch.equal(resumed, straight)
    assert optimizer_state.misfit(content, groups, chosen(name).kind) == ""
    assert optimizer_state.other_settings(content, optimizer) == ""
    _, _, losses, _ = run(40)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["pytorch_optimizer:ademamix", "pytorch_optimizer:adabelief"])
def test_a_state_of_another_shape_is_not_taken(name):
    parameter = torch.nn.Parameter(torch.ones(4, 6))
    optimizer = chosen(name).kind([parameter], lr=0.1)
    parameter.grad = torch.ones(4, 6)
    optimizer.step()
    for entry in optimizer.state[parameter]:
        for shape in ((6, 4), (1,), (24,)):
            content = optimizer.state_dict()
            content["state"] = {0: content["state"][0] | {entry: torch.zeros(shape)}}
            told = optimizer_state.misfit(content, [[("weight", torch.Size((4, 6)))]], type(optimizer))
            assert f"has {entry} of shape {list(shape)} for weight" in told


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("adamw_torch", "adamw_torch"),
        ("torch.optim.nadam", "torch.optim:NAdam"),
        ("torch.optim:NAdam", "torch.optim:NAdam"),
        ("pytorch_optimizer:AdEMAMix", "pytorch_optimizer:ademamix"),
        ("pytorch_optimizer.ano", "pytorch_optimizer:ano"),
        ("tests.run.test_optimizers:Halved", "tests.run.test_optimizers:Halved"),
    ],
)
def test_a_name_has_one_form(given, name, tmp_path):
    args = config(tmp_path, optim=given)
    assert getattr(args.optim, "value", args.optim) == name
    assert getattr(config(tmp_path, **args.to_dict()).optim, "value", args.optim) == name


@pytest.mark.parametrize("kind", [NoisySFTConfig, RobustDPOConfig, PolicyGradientConfig])
def test_every_family_takes_a_name(kind, tmp_path):
    small = dict(num_generations=4, per_device_train_batch_size=4) if kind is PolicyGradientConfig else {}
    args = config(tmp_path, kind, optim="pytorch_optimizer:ademamix", optim_args="betas=(0.8,0.9,0.99)", **small)
    assert optimizers.class_and_settings(args) == (
        chosen("pytorch_optimizer:ademamix").kind,
        {"lr": 0.1, "betas": (0.8, 0.9, 0.99), "weight_decouple": True},
    )


class Halved(torch.optim.SGD):
    """SGD at half the rate."""

    def __init__(self, params, lr, weight_decay=0.0, share: float = 0.5):
        super().__init__(params, lr * share, weight_decay=weight_decay)


class Closed(torch.optim.SGD):
    def step(self, closure):
        return super().step(closure)


class Fixed(torch.optim.SGD):
    def __init__(self, params):
        super().__init__(params, 0.1)


class Undecayed(torch.optim.SGD):
    def __init__(self, params, lr):
        super().__init__(params, lr)


class Unsaved(Halved):
    def state_dict(self):
        return super().state_dict() | {"rule": lambda step: step}


def here(name):
    return f"{__name__}:{name}"


REFUSED = [
    (dict(optim="ademamixx"), r"optim is 'ademamixx'; it must be one of .* Did you mean ademamix\?"),
    (dict(optim="ano"), r"Did you mean pytorch_optimizer:ano\?"),
    (dict(optim="NAdam"), r"Did you mean torch.optim:NAdam\?"),
    (dict(optim="my.module.Class"), "A class of your own is written my.module:Class"),
    (dict(optim=""), "optim is ''; it must be one of"),
    (dict(optim="pytorch_optimizer:sgd_sai"), r"Did you mean pytorch_optimizer:sgdsai\?"),
    (dict(optim="torch.optim:Adamm"), r"Did you mean torch.optim:Adam"),
    (dict(optim="pytorch_optimizer:sam"), "pytorch_optimizer:sam, which takes its steps at perturbed .* Set sam_rho"),
    (dict(optim="pytorch_optimizer:bsam"), "Set sam_rho"),
    (dict(optim="pytorch_optimizer:lomo"), "needs the model's modules"),
    (dict(optim="pytorch_optimizer:sophiah"), "second derivatives"),
    (dict(optim="pytorch_optimizer:lookahead"), "wraps another optimizer"),
    (dict(optim="pytorch_optimizer:muon"), "needs groups of parameters"),
    (dict(optim="torch.optim:LBFGS"), "must run the loss again by itself"),
    (dict(optim=here("Missing")), "has no 'Missing'"),
    (dict(optim=here("config")), "is no class of optimizers"),
    (dict(optim="no_such_module:X"), "the module of 'no_such_module:X' cannot be imported"),
    (dict(optim=here("Fixed")), "takes no lr"),
    (dict(optim=here("Undecayed"), weight_decay=0.1), "weight_decay is 0.1, and optim .* takes none"),
    (dict(optim=here("Closed")), "cannot take a step: TypeError: .*closure"),
    (dict(optim=here("Unsaved")), "has a state that is not of tensors and plain values"),
    (dict(optim="pytorch_optimizer:adashift"), "has a state that is not of tensors and plain values"),
    (dict(optim="pytorch_optimizer:ademamix", optim_args="alph=1"), r"names 'alph', .* Did you mean alpha\?"),
    (dict(optim="pytorch_optimizer:ademamix", optim_args="betas=(0.9,0.99)"), "3 of them"),
    (dict(optim="pytorch_optimizer:ademamix", optim_args="alpha=-1"), "cannot take a step with optim_args .*alpha"),
    (dict(optim="pytorch_optimizer:ano", adam_beta1=0.8), "adam_beta1 is 0.8, which optim .* is not given"),
    (dict(optim="torch.optim:Adam", adam_epsilon=1e-6), "adam_epsilon is 1e-06, which"),
    (dict(optim="torch.optim:Adam", optim_target_modules="all-linear"), "optim_target_modules is all-linear, which"),
]


@pytest.mark.parametrize(("given", "said"), REFUSED, ids=lambda part: str(part)[:60])
def test_what_no_trainer_could_go_on_with_is_refused(given, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        config(tmp_path, **given)


def test_a_file_of_settings_runs_no_class_that_was_not_allowed(tmp_path):
    with pytest.raises(ConfigError, match="optim names .*, code of the module tests.run.test_optimizers"):
        config(tmp_path, optim=here("Halved"), allow_code=[])
    args = config(tmp_path, optim=here("Halved"), allow_code=["tests.run"], optim_args="share=0.25")
    assert optimizers.class_and_settings(args) == (Halved, {"lr": 0.1, "share": 0.25})


def test_a_missing_package_is_named_with_what_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pytorch_optimizer", None)
    with pytest.raises(EnvironmentIssue, match=r'pip install "posttrain\[optimizers\]"'):
        config(tmp_path, optim="pytorch_optimizer:ano")
    # other names do without
    with pytest.raises(ConfigError, match="Did you mean adamw_torch"):
        config(tmp_path, optim="adamw_torchh")


def sharded(folder, monkeypatch, settings=None, **given):
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    args = config(folder)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    args.deepspeed_plugin = type("Plugin", (), {"deepspeed_config": settings or {}})()
    for name, value in given.items():
        setattr(args, name, value)
    args._written |= set(given)
    optimizers.check(args)


@pytest.mark.parametrize("name", ["adamw_torch", "pytorch_optimizer:ademamix", "torch.optim:NAdam"])
def test_an_elementwise_rule_is_taken_under_zero(name, tmp_path, monkeypatch):
    sharded(tmp_path, monkeypatch, optim=name)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("pytorch_optimizer:sgdsai", "optim pytorch_optimizer:sgdsai uses whole-matrix statistics; DeepSpeed ZeRO "),
        ("adafactor", "optim adafactor uses statistics or factors of a whole matrix"),
        ("pytorch_optimizer:prodigy", "uses norms over all parameters"),
        (here("Halved"), "is not known to treat each number by itself"),
    ],
)
def test_another_rule_is_refused_under_zero_with_its_reason(name, why, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=why):
        sharded(tmp_path, monkeypatch, optim=name)


def test_arguments_that_read_more_than_each_number_are_refused_under_zero(tmp_path, monkeypatch):
    given = dict(optim="pytorch_optimizer:adan", optim_args="max_grad_norm=0.5")
    with pytest.raises(ConfigError, match="moves a part of a matrix otherwise"):
        sharded(tmp_path, monkeypatch, **given)
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    config(tmp_path, **given)


def test_an_optimizer_block_of_deepspeed_beside_optim_is_refused(tmp_path, monkeypatch):
    block = {"optimizer": {"type": "AdamW", "params": {}}}
    with pytest.raises(ConfigError, match=r"optim is adamw_torch, and the DeepSpeed config has an `optimizer` block"):
        sharded(tmp_path, monkeypatch, block, optim="adamw_torch")
    sharded(tmp_path, monkeypatch, block)


@pytest.mark.parametrize("kind", ["Adam", "adamw", "Adagrad", "Lion", "RMSprop", "NAdam"])
def test_an_elementwise_block_of_deepspeed_is_taken(kind, tmp_path, monkeypatch):
    sharded(tmp_path, monkeypatch, {"optimizer": {"type": kind}})
    with pytest.raises(
        ConfigError, match=f"optim_args is 'eps=1e-3', and .* block \\({kind}\\), which does not read it"
    ):
        sharded(tmp_path, monkeypatch, {"optimizer": {"type": kind}}, optim_args="eps=1e-3")


@pytest.mark.parametrize(
    ("block", "why"),
    [
        (
            {"type": "Lamb"},
            "block of type Lamb, which uses a norm or a mean of each tensor; DeepSpeed ZeRO gives it flat",
        ),
        ({"type": "Muon"}, "block of type Muon, which uses statistics or factors of a whole matrix"),
        ({"type": "MuAdam"}, "which has a rate by the shape of each matrix"),
        ({"type": "Adafactor"}, "which uses statistics or factors"),
        ({"type": "Nonsense"}, "is not known to treat each number by itself"),
        ({"params": {}}, "whose type is None. Write one of Adam, AdamW, Adagrad, Lion"),
        ({"type": 3}, "whose type is 3"),
        ({}, "whose type is None"),
        (None, "whose type is None"),
        ("Adam", "whose type is None"),
    ],
)
def test_another_block_of_deepspeed_is_refused_with_its_reason(block, why, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=why):
        sharded(tmp_path, monkeypatch, {"optimizer": block})


def test_offloading_beside_a_foreign_optimizer_is_refused(tmp_path, monkeypatch):
    offload = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    with pytest.raises(ConfigError, match="Write `zero_force_ds_cpu_optimizer: false`"):
        sharded(tmp_path, monkeypatch, offload, optim="pytorch_optimizer:ano")
    sharded(tmp_path, monkeypatch, offload | {"zero_force_ds_cpu_optimizer": False}, optim="pytorch_optimizer:ano")
    sharded(tmp_path, monkeypatch, offload, optim="adamw_torch")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            dict(optim="pytorch_optimizer:prodigy", lr_scheduler_type="linear", learning_rate=0.01),
            ["lr_scheduler_type is linear", "1.0 is usual"],
        ),
        (dict(optim="pytorch_optimizer:schedulefreeadamw", lr_scheduler_type="cosine"), ["lr_scheduler_type is cosi"]),
        (dict(optim="pytorch_optimizer:prodigy", lr_scheduler_type="constant", learning_rate=1.0), []),
        (dict(optim="pytorch_optimizer:ano", lr_scheduler_type="linear"), []),
    ],
)
def test_an_optimizer_that_wants_a_constant_rate_says_so(given, said, tmp_path, caplog):
    logging.getLogger("posttrain").addHandler(caplog.handler)
    try:
        config(tmp_path, **given)
    finally:
        logging.getLogger("posttrain").removeHandler(caplog.handler)
    told = [record.getMessage() for record in caplog.records if "optim " in record.getMessage()]
    assert len(told) == len(said) and all(part in line for part, line in zip(said, told, strict=True))


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        (dict(optim="pytorch_optimizer:ademamix"), {"weight_decouple": True}),
        (dict(optim="pytorch_optimizer:ademamix", optim_args="weight_decouple=false"), {"weight_decouple": False}),
        (dict(optim="torch.optim:NAdam"), {"decoupled_weight_decay": True}),
        # decoupled by default, by a rule of its own, and with no argument for it
        (dict(optim="pytorch_optimizer:ano"), {}),
        (dict(optim="pytorch_optimizer:adan"), {}),
        (dict(optim="torch.optim:Adagrad"), {}),
    ],
)
def test_weight_decay_is_decoupled_where_a_class_can(given, settings, tmp_path, caplog):
    logging.getLogger("posttrain").addHandler(caplog.handler)
    try:
        args = config(tmp_path, weight_decay=0.1, **given)
    finally:
        logging.getLogger("posttrain").removeHandler(caplog.handler)
    found = optimizers.choose(args)
    assert found.settings == settings
    # a first step at a gradient of any size: p (1 - lr wd) beside the step without a decay
    moved = {}
    for decay in (0.0, 0.1):
        parameter = torch.nn.Parameter(torch.tensor([[2.0, -3.0]], dtype=torch.float64))
        optimizer = found.kind([parameter], lr=0.01, weight_decay=decay, **found.settings)
        parameter.grad = torch.tensor([[1.0, 50.0]], dtype=torch.float64)
        optimizer.step()
        moved[decay] = parameter.detach()
    is_decoupled = "Adagrad" not in args.optim and False not in settings.values()
    shrunk = torch.allclose(moved[0.0] - moved[0.1], torch.tensor([[0.002, -0.003]]).double(), rtol=1e-2)
    assert shrunk is is_decoupled
    assert ("does not decouple it" in caplog.text) is not is_decoupled


def test_a_class_of_ones_own_is_known_by_its_name():
    assert optimizer_names.wants_constant_rate("dog:LDoG") and optimizer_names.finds_step_size("dog:L_DoG")
    assert not optimizer_names.wants_constant_rate("mine:Dot")


def test_trying_an_optimizer_draws_no_random_number(tmp_path):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    config(tmp_path, optim="pytorch_optimizer:gravity")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["muon", "lbfgs", "torch.optim:Muonn", "pytorch_optimizer:muonn", "torch.optim:LBFG"])
def test_no_name_that_is_refused_is_suggested(name):
    with pytest.raises(ConfigError) as told:
        optimizers.canonical(name)
    suggested = str(told.value).partition("Did you mean ")[2].rstrip("?")
    refused = [f"torch.optim:{one}" for one in optimizer_names.NOT_CALLABLE_TORCH]
    refused += [f"pytorch_optimizer:{one}" for one in optimizer_names.NOT_CALLABLE]
    assert suggested not in refused
