"""What `optim_args` says, read by an optimizer's signature."""

import math

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.run import identity, optimizer_args


class Mine(torch.optim.SGD):
    def __init__(
        self, params, lr=0.1, weight_decay=0.0, betas=(0.9, 0.99), pair=(1, 2), eps: float = 0, steps: int = 5,
        scale=1, flag: bool = False, limit: float | None = None, mode: str = "fast", anything=None,
        rule=lambda step: step, **kwargs,
    ):  # fmt: skip
        super().__init__(params, lr)


class Needy(torch.optim.SGD):
    def __init__(self, params, lr, gamma):
        super().__init__(params, lr)


def read(text, kind=Mine):
    return optimizer_args.read(kind, text, "mine:Mine")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (None, {}),
        ("", {}),
        ("betas=(0.5,0.6)", {"betas": (0.5, 0.6)}),
        ("betas=[0.5, 0.6,], eps = 1e-3", {"betas": (0.5, 0.6), "eps": 1e-3}),
        ("pair=(3,4)", {"pair": (3, 4)}),
        ("eps=1", {"eps": 1.0}),
        ("steps=1e3,flag=True", {"steps": 1000, "flag": True}),
        ("flag=no", {"flag": False}),
        ("scale=0.5", {"scale": 0.5}),
        ("scale=2", {"scale": 2}),
        ("limit=none", {"limit": None}),
        ("limit=3", {"limit": 3.0}),
        ("mode=1", {"mode": "1"}),
        ("anything=2.5", {"anything": 2.5}),
        ("anything=text", {"anything": "text"}),
    ],
)
def test_a_value_has_the_kind_of_its_default(text, found):
    made = read(text)
    assert made == found and [type(value) for value in made.values()] == [type(value) for value in found.values()]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("beta=0.9", "optim_args names 'beta', which optim mine:Mine does not take. Did you mean betas"),
        ("lr=0.1", "names lr, which has a setting of its own: learning_rate"),
        ("weight_decay=0.1", "names weight_decay, which has a setting of its own: weight_decay"),
        ("params=1", "names 'params', which"),
        ("kwargs=1", "names 'kwargs', which"),
        ("foo", "write name=value,name=value"),
        ("eps=", "write name=value,name=value"),
        ("eps=1,,flag=yes", "write name=value,name=value"),
        ("eps=1,eps=2", "names eps twice"),
        ("betas=(0.9,0.99", "bracket that is not closed"),
        ("betas=0.9,0.99)", "bracket that is not closed"),
        ("betas=(0.9,0.99]", "bracket that is not closed"),
        ("betas=0.9", r"betas is 0.9; it takes numbers in brackets, such as betas=\(0.9,0.99\)"),
        ("betas=(0.9,0.99,0.999)", "2 of them"),
        ("betas=(0.9,nan)", "it takes numbers in brackets"),
        ("betas=()", "it takes numbers in brackets"),
        ("pair=(1.5,2)", "it takes numbers in brackets"),
        ("eps=nan", "eps is 'nan'; it takes a number"),
        ("eps=inf", "eps is 'inf'; it takes a number"),
        ("eps=none", "eps is none; it takes a number"),
        ("eps=(1,2)", "eps is \\(1,2\\); it takes a number"),
        ("steps=1.5", "steps is '1.5'; it takes a whole number"),
        ("steps=1e400", "it takes a whole number"),
        ("flag=2", "flag is '2'; it takes true or false"),
        ("limit=high", "limit is 'high'; it takes a number"),
        ("rule=max", "rule takes a function, which no text says"),
    ],
)
def test_what_it_cannot_be_is_refused_by_name(text, said):
    with pytest.raises(ConfigError, match=said):
        read(text)


def test_an_argument_without_a_default_is_asked_for():
    with pytest.raises(ConfigError, match="optim mine:Mine needs gamma, which have no default"):
        read(None, Needy)
    assert read("gamma=0.5", Needy) == {"gamma": 0.5}


def test_a_number_of_a_signature_is_never_read_as_infinite_or_none():
    assert all(math.isfinite(value) for value in read("eps=1e308,scale=-1").values())


def test_texts_that_say_the_same_are_one():
    for one, other in (
        ("momentum=0.90", "momentum=.9"),
        ("nesterov=true, momentum=9e-1", "momentum=0.9,nesterov=true"),
        ("betas=(0.90, 0.999)", "betas=(0.9,0.999)"),
        ("alpha=5", "alpha=5.0"),
        (" ", None),
    ):
        assert optimizer_args.canonical(one) == optimizer_args.canonical(other)
        assert identity.differing({"optim_args": one}, {"optim_args": other}) == ""
    assert identity.differing({"optim_args": "momentum=0.9"}, {"optim_args": "momentum=0.8"}) == (
        "optim_args: momentum=0.8 there, momentum=0.9 here"
    )
    assert optimizer_args.canonical("norm=l2") != optimizer_args.canonical("norm=l1")
