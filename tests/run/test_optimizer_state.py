"""What an optimizer's and a schedule's file may hold: pure functions on states as optimizers make them."""

import math

import pytest
import torch
from transformers import get_scheduler
from transformers.optimization import Adafactor

from posttrain.run import optimizer_state, training_state

SHAPES = {"wide": (3, 4), "flat": (5,), "one": (1,), "deep": (2, 3, 4)}


def parameters():
    return {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in SHAPES.items()}


def stepped(kind, **settings):
    """Return an optimizer that has taken a step, and the groups that its state is compared with."""
    named = parameters()
    if kind.__name__ == "Muon":
        named = {"wide": named["wide"]}
    names = list(named)
    halves = [names[:2], names[2:]] if len(names) > 2 else [names]
    optimizer = kind([{"params": [named[name] for name in half]} for half in halves], **settings)
    for parameter in named.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer, [[(name, named[name].shape) for name in half] for half in halves]


KINDS = [
    (torch.optim.AdamW, dict(lr=0.1, amsgrad=True)),
    (torch.optim.AdamW, dict(lr=torch.tensor(0.1), fused=True)),
    (torch.optim.Adam, dict(lr=0.1)),
    (torch.optim.SGD, dict(lr=0.1)),
    (torch.optim.SGD, dict(lr=0.1, momentum=0.9, nesterov=True)),
    (torch.optim.RMSprop, dict(lr=0.1, centered=True, momentum=0.9)),
    (torch.optim.Adagrad, dict(lr=0.1)),
    (torch.optim.Adadelta, dict(lr=0.1)),
    (torch.optim.Adafactor, dict(lr=0.1)),
    (torch.optim.NAdam, dict(lr=0.1)),
    (torch.optim.RAdam, dict(lr=0.1)),
    (torch.optim.Rprop, dict(lr=0.1)),
    (torch.optim.ASGD, dict(lr=0.1)),
    (torch.optim.Muon, dict(lr=0.1)),
    (Adafactor, dict(relative_step=True)),
    (Adafactor, dict(lr=0.1, relative_step=False, beta1=0.9)),
]


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_what_an_optimizer_saved_is_taken(tmp_path, kind, settings):
    optimizer, groups = stepped(kind, **settings)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    content = training_state._loaded(tmp_path / "optimizer.pt")
    optimizer_state.check_form(content)
    assert optimizer_state.misfit(content, groups, kind) == ""
    assert optimizer_state.other_settings(content, optimizer) == ""


@pytest.mark.parametrize("scales", [1, 2])
def test_states_of_8_bits_have_a_scale_for_each_256_numbers(scales):
    """In the form of bitsandbytes, of which AdEMAMix has two first moments in one."""
    kind = type("AdamW8bit", (), {"__module__": "bitsandbytes.optim.adamw"})
    own = torch.Size((30, 40))
    double = (2, *own) if scales == 2 else own

    def told(**other):
        state = dict(step=3, qmap1=torch.zeros(256), qmap2=torch.zeros(256), gnorm_vec=torch.zeros(100))
        state |= dict(state1=torch.zeros(double, dtype=torch.uint8), state2=torch.zeros(own, dtype=torch.uint8))
        state |= dict(absmax1=torch.zeros((2, 5) if scales == 2 else 5), absmax2=torch.zeros(5)) | other
        content = {"state": {0: state}, "param_groups": [{"params": [0]}]}
        optimizer_state.check_form(content)
        return optimizer_state.misfit(content, [[("weight", own)]], kind)

    assert told() == ""
    assert "has absmax2 of shape [4] for weight, of shape [30, 40]" in told(absmax2=torch.zeros(4))
    assert "has qmap1 of shape [16]" in told(qmap1=torch.zeros(16))
    assert "has state2 of shape [1200]" in told(state2=torch.zeros(1200))
    assert "has state1 of shape [1]" in told(state1=torch.zeros(1))


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_no_moment_of_another_shape_is_taken(kind, settings):
    optimizer, groups = stepped(kind, **settings)
    tried = 0
    for number, entry in [(n, e) for n, held in optimizer.state_dict()["state"].items() for e in held]:
        value = optimizer.state_dict()["state"][number][entry]
        if not isinstance(value, torch.Tensor) or value.numel() == 1:
            continue
        for other in (torch.zeros(7), torch.zeros(()), torch.zeros(*value.shape, 2), value.flatten()[:-1]):
            content = optimizer.state_dict()
            content["state"] = {**content["state"], number: {**content["state"][number], entry: other}}
            assert f"has {entry} of shape {list(other.shape)} for " in optimizer_state.misfit(content, groups, kind)
            tried += 1
    assert tried or kind is torch.optim.SGD and "momentum" not in settings


def test_the_state_of_an_optimizer_of_somebody_else_is_not_compared_by_shape():
    kind = type("Mine", (torch.optim.AdamW,), {"__module__": "mine"})
    optimizer, groups = stepped(kind, lr=0.1)
    content = optimizer.state_dict()
    content["state"][0]["exp_avg"] = torch.zeros(2, 2)
    assert optimizer_state.misfit(content, groups, kind) == ""
    assert "groups of [2, 2] parameters, and the run of [2]" in optimizer_state.misfit(content, groups[:1], kind)


def moment(content, value, name="exp_avg"):
    content["state"][0][name] = value


def group(content, **settings):
    content["param_groups"][1].update(settings)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda content: moment(content, torch.full((3, 4), math.nan)), "exp_avg of parameter 0 holds numbers"),
        (lambda content: moment(content, torch.full((3, 4), math.inf, dtype=torch.bfloat16)), "not finite"),
        (lambda content: moment(content, {"inner": [torch.tensor(math.nan)]}), "inner|0 of parameter 0"),
        (lambda content: moment(content, torch.zeros(1).expand(1 << 40)), "larger than its file"),
        (lambda content: moment(content, torch.tensor(-5.0), "step"), "step of parameter 0 is no number of 0 or more"),
        (lambda content: moment(content, torch.zeros(3), "step"), "step of parameter 0 is no number"),
        (lambda content: moment(content, math.nan, "RMS"), "RMS of parameter 0 is not finite"),
        (lambda content: content["state"].update({99: {}}), "not those of its groups"),
        (lambda content: content["param_groups"][1].update(params=[0, 1]), "not those of its groups"),
        (lambda content: content["param_groups"].clear(), "no groups of parameters"),
        (lambda content: group(content, lr=math.nan), "lr is no finite number"),
        (lambda content: group(content, lr=torch.tensor(math.inf)), "lr is no finite number"),
        (lambda content: group(content, lr=-1.0), "lr is no number of 0 or more"),
        (lambda content: group(content, lr="0.1"), "lr is no number of 0 or more"),
        (lambda content: group(content, lr=True), "lr is no number of 0 or more"),
        (lambda content: group(content, lr=10**400), "lr is no finite number"),
        (lambda content: group(content, betas=0.9), "betas are not two or three numbers"),
        (lambda content: group(content, betas=(2.0, 3.0)), "betas are not two or three numbers"),
        (lambda content: group(content, betas=(0.9,)), "betas are not two or three numbers"),
        (lambda content: group(content, eps=[math.inf, 1.0]), "eps is no finite number"),
        (lambda content: group(content, weight_decay=None, eps=-1e-8), "eps is no number of 0 or more"),
    ],
)  # fmt: skip
def test_a_state_that_no_optimizer_has_written_is_refused(damage, told):
    optimizer, _ = stepped(torch.optim.AdamW, lr=0.1)
    content = optimizer.state_dict()
    optimizer_state.check_form(content)
    damage(content)
    with pytest.raises((TypeError, ValueError), match=told):
        optimizer_state.check_form(content)


def test_a_beta_of_one_is_taken_where_the_optimizer_may_have_it():
    optimizer, groups = stepped(torch.optim.AdamW, lr=0.1)
    content = optimizer.state_dict()
    group(content, betas=(0.9, 1.0))
    optimizer_state.check_form(content)
    assert "has a beta of 1" in optimizer_state.misfit(content, groups, torch.optim.AdamW)
    # of PNM, whose second beta is 1
    kind = type("PNM", (torch.optim.AdamW,), {"__module__": "pytorch_optimizer.optimizer.pnm"})
    assert optimizer_state.misfit(content, groups, kind) == ""
    group(content, growth_rate=math.inf)
    optimizer_state.check_form(content)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (dict(maximize=True), "has maximize True, and the run False"),
        (dict(amsgrad=1), "has amsgrad 1, and the run False"),
        (dict(betas=(0.9, 0.99, 0.999)), "has betas"),
        (dict(eps=(1e-8, 1e-3)), "has eps"),
        (dict(foreach=True, fused=True, later="x", lr=torch.tensor(0.2)), ""),
    ],
)
def test_a_group_is_of_the_kind_that_the_runs_own_optimizer_has(settings, told):
    optimizer, _ = stepped(torch.optim.AdamW, lr=0.1)
    content = optimizer.state_dict()
    group(content, **settings)
    found = optimizer_state.other_settings(content, optimizer)
    assert told in found and bool(told) == bool(found)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup", "cosine_with_min_lr"])
def test_a_schedule_has_a_rate_for_each_group(kind):
    optimizer, groups = stepped(torch.optim.AdamW, lr=0.1)
    more = {"min_lr": 0.01} if kind == "cosine_with_min_lr" else None
    content = get_scheduler(kind, optimizer, 1, 10, scheduler_specific_kwargs=more).state_dict()
    training_state._check_schedule(content, len(groups))
    training_state._check_schedule(content)
    for other, told in [
        (dict(base_lrs=[0.1]), "base_lrs has 1 entries, and the optimizer 2 groups"),
        (dict(_last_lr=[0.1] * 3), "_last_lr has 3 entries"),
        (dict(lr_lambdas=[]), "lr_lambdas has 0 entries"),
        (dict(base_lrs=[0.1, math.nan]), "no learning rate"),
        (dict(base_lrs=[0.1, "x"]), "no learning rate"),
        (dict(base_lrs=0.1), "base_lrs is no list"),
        (dict(last_epoch=-1), "last_epoch is no whole number"),
        (dict(optimizer=5), "it would replace a part of the program"),
    ]:
        with pytest.raises((TypeError, ValueError), match=told):
            training_state._check_schedule(content | other, len(groups))
