"""What transformers reads of `optim_args` and Adam's settings for its own optimizers; the rest is refused."""

import re
import sys
import types
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import Trainer, trainer_optimizer
from transformers.training_args import OptimizerNames

from posttrain import NoisySFTConfig
from posttrain.errors import ConfigError, EnvironmentIssue, ExcludedSetting
from posttrain.run import optimizer_args, upstream_optimizers

DOCS = Path(__file__).parents[2] / "docs"


def config(folder, **settings):
    return NoisySFTConfig(str(folder), report_to=[], use_cpu=True, bf16=False, **settings)


@pytest.mark.parametrize(
    ("optim", "text", "said"),
    [
        (
            "sgd",
            "momentun=0.9",
            r"names 'momentun', .* for optim sgd\. Did you mean momentum\? It reads momentum",
        ),
        ("adamw_torch", "eps=1e-3,foo=2", r"names 'eps', .* Set adam_epsilon instead"),
        ("adamw_torch", "foo=2", "names 'foo', .* It reads nothing"),
        ("adamw_torch", "betas=(0.5,0.6)", "names 'betas', .* Set adam_beta1 and adam_beta2 instead"),
        ("adafactor", "nonsense=1", "names 'nonsense', .* It reads nothing"),
        ("adafactor", "beta1=0.5", "names 'beta1', .* It reads nothing"),
        ("sgd", "weight_decay=0.1", "names weight_decay, which has a setting of its own"),
        ("sgd", "foo", "write name=value"),
        ("sgd", "momentum=0.9,momentum=0.8", "names momentum twice"),
        ("sgd", "momentum=(0.9,0.8)", r"momentum is \(0.9,0.8\); with optim sgd it must be a number of 0 or more"),
        ("sgd", "momentum=0.9=1", "momentum is 0.9=1; with optim sgd it must be a number of 0 or more"),
        ("sgd", "momentum=nan", "momentum is nan; .* a number of 0 or more"),
        ("sgd", "momentum=abc", "momentum is abc; with optim sgd it must be a number of 0 or more"),
        ("sgd", "momentum=inf", "a number of 0 or more"),
        ("sgd", "momentum=-0.1", "momentum is -0.1; with optim sgd it must be a number of 0 or more"),
        ("sgd", "dampening=x", "dampening is x; with optim sgd it must be a finite number"),
        # transformers takes it for false
        ("sgd", "momentum=0.9,nesterov=maybe", "nesterov is maybe; with optim sgd it must be true or false"),
        ("sgd", "nesterov=true", "nesterov is true with momentum 0 and dampening 0; it needs a momentum above 0"),
        ("sgd", "momentum=0.9,dampening=0.1,nesterov=true", "a dampening of 0"),
        ("rmsprop", "alpha=-1", "alpha is -1; with optim rmsprop it must be a number of 0 or more"),
        ("rmsprop", "centered=2", "centered is 2; .* true or false"),
        ("adagrad", "eps=-1e-8", "eps is -1e-8; .* a number of 0 or more"),
        ("sgd", "f(a,b)=1", "names 'f"),
        ("rmsprop", "alpa=0.9", "Did you mean alpha"),
    ],
)
def test_what_transformers_does_not_read_is_refused(optim, text, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        config(tmp_path, optim=optim, optim_args=text)


@pytest.mark.parametrize(
    ("optim", "text"),
    [
        ("sgd", "momentum=0.9,nesterov=false"),
        ("sgd", " momentum = 0.0 , dampening=0"),
        ("adagrad", "lr_decay=0,eps=1e-10"),
        ("rmsprop", "alpha=0.99,centered=True,momentum=0"),
        ("adamw_torch", ""),
    ],
)
def test_what_it_reads_is_taken_at_its_default_too(optim, text, tmp_path):
    assert config(tmp_path, optim=optim, optim_args=text).optim_args == text


def test_bitsandbytes_names_are_asked_as_others(tmp_path):
    pytest.importorskip("bitsandbytes")
    config(tmp_path, optim="ademamix", optim_args="alpha=5.0,t_alpha=100", adam_beta1=0.8)
    with pytest.raises(ConfigError, match="names 'bogus', .* It reads alpha, eps, beta1, beta2, beta3, t_alpha"):
        config(tmp_path, optim="ademamix", optim_args="bogus=1")
    with pytest.raises(ConfigError, match="adam_beta1 is 0.8, which optim ademamix does not read"):
        config(tmp_path, optim="ademamix", optim_args="beta1=0.7", adam_beta1=0.8)
    for text, said in (("beta1=1", r"in \[0, 1\)"), ("t_alpha=0", "of 1 or more"), ("t_alpha=1e3", "of 1 or more")):
        with pytest.raises(ConfigError, match=f"{text.replace('=', ' is ')}; with optim ademamix it must be .*{said}"):
            config(tmp_path, optim="ademamix", optim_args=text)
    # the class would have the text '0.9'
    with pytest.raises(ConfigError, match="names alpha, which transformers hands to optim rmsprop_bnb as a text"):
        config(tmp_path, optim="rmsprop_bnb", optim_args="alpha=0.9")
    config(tmp_path, optim="lion_32bit", adam_beta1=0.8)
    with pytest.raises(ConfigError, match="adam_epsilon is 0.001, which optim lion_32bit does not read"):
        config(tmp_path, optim="lion_32bit", adam_epsilon=1e-3)


@pytest.mark.parametrize("optim", ["sgd", "adagrad", "rmsprop", "adafactor"])
@pytest.mark.parametrize("setting", ["adam_beta1", "adam_beta2", "adam_epsilon"])
def test_a_setting_of_adam_is_refused_where_it_is_not_read(optim, setting, tmp_path):
    with pytest.raises(ConfigError, match=f"{setting} is 0.5, which optim {optim} does not read. Leave {setting} out"):
        config(tmp_path, optim=optim, **{setting: 0.5})
    default = NoisySFTConfig.__dataclass_fields__[setting].default
    config(tmp_path, optim=optim, **{setting: default})
    config(tmp_path, optim="adamw_torch", **{setting: 0.5})


def test_asking_leaves_the_config_as_it_is(tmp_path):
    args = config(tmp_path, optim="sgd", optim_args="momentum=0.9")
    before = dict(vars(args))
    assert upstream_optimizers.reads(args, "momentum") and not upstream_optimizers.reads(args, "foo")
    assert vars(args) == before


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize("name", [one.value for one in OptimizerNames])
def test_every_name_works_or_says_what_to_install(name, tmp_path):
    low_rank = name.startswith(("galore", "apollo"))
    given = dict(optim_target_modules="all-linear", gradient_accumulation_steps=1) if low_rank else {}
    package = upstream_optimizers._of(upstream_optimizers._PACKAGES, name)
    if package is not None and find_spec(package[0]) is None:
        with pytest.raises(EnvironmentIssue, match=f"^optim is {name}, which needs the package .*: pip install"):
            config(tmp_path, optim=name, **given)
        return
    args = config(tmp_path, optim=name, **given)
    if upstream_optimizers._of(upstream_optimizers._OF_THE_MODEL, name) is None:
        parameter = torch.nn.Parameter(torch.ones(4, 6))
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = kind([parameter], **settings)
        parameter.grad = torch.ones(4, 6)
        optimizer.step()
        assert not torch.equal(parameter.detach(), torch.ones(4, 6))


def test_every_package_that_transformers_asks_for_is_known():
    """A name of a newer transformers with a package of its own fails here."""
    plain = {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"}
    known = {one.value for one in OptimizerNames if upstream_optimizers._of(upstream_optimizers._PACKAGES, one.value)}
    assert known | plain == {one.value for one in OptimizerNames} and not known & plain


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor", "torch.optim:NAdam"])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], ["attn", "mlp"]])
def test_target_modules_are_refused_where_nothing_reads_them(optim, targets, tmp_path):
    with pytest.raises(ExcludedSetting, match="optim_target_modules is .*, which optim .* is not given|does not read"):
        config(tmp_path, optim=optim, optim_target_modules=targets)


class Low(torch.optim.SGD):
    """Stands for GaLore's and APOLLO's classes."""


@pytest.fixture
def low_rank(monkeypatch):
    """The packages of GaLore, APOLLO and LOMO, as far as they are asked before a model is there."""
    for name, kinds in (
        ("galore_torch", ("GaLoreAdafactor", "GaLoreAdamW", "GaLoreAdamW8bit")),
        ("apollo_torch", ("APOLLOAdamW",)),
        ("lomo_optim", ("Lomo", "AdaLomo")),
    ):
        module = types.ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update({kind: Low for kind in kinds})
        monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr(trainer_optimizer, f"is_{name.replace('_optim', '')}_available", lambda: True)


LOW_RANK = [
    ("galore_adamw", dict(), "optim_target_modules is None; optim galore_adamw needs the linear layers"),
    ("apollo_adamw", dict(optim_target_modules=[]), r"optim_target_modules is \[\]; optim apollo_adamw needs"),
    ("galore_adamw", dict(optim_target_modules=[3]), r"optim_target_modules is \[3\]; "),
    ("galore_adamw", dict(optim_target_modules=""), "optim_target_modules is ''; "),
    ("galore_adamw", dict(optim_target_modules=["(q"]), "is no regular expression"),
    ("galore_adamw", dict(optim_target_modules=r"(a*)*b"), "repeats what has repeats"),
    ("galore_adamw", dict(optim_args="rank=8,scal=0.5"), r"names 'scal', .* Did you mean scale\? It reads rank"),
    ("galore_adamw", dict(optim_args="rank=abc"), "rank is abc; with optim galore_adamw it must be a whole number of"),
    ("galore_adamw", dict(optim_args="rank=0"), "rank is 0; "),
    ("galore_adamw", dict(optim_args="scale=nan"), "scale is nan; .* a finite number"),
    ("galore_adamw", dict(optim_args="proj_type=(1)"), "proj_type is .* a name"),
    ("galore_adamw", dict(adam_beta1=0.8), "adam_beta1 is 0.8, which optim galore_adamw does not read"),
    ("lomo", dict(optim_target_modules=None, optim_args="rank=8"), "names 'rank', .* It reads nothing"),
    ("lomo", dict(), "optim_target_modules is 'all-linear', which optim lomo does not read"),
    (
        "apollo_adamw_layerwise",
        dict(gradient_accumulation_steps=2),
        "gradient_accumulation_steps is 2, .* Set `gradient_accumulation_steps: 1`, or use apollo_adamw",
    ),
]


@pytest.mark.parametrize(("optim", "given", "said"), LOW_RANK, ids=lambda part: str(part)[:50])
def test_what_optimizers_of_a_model_would_trip_over_is_refused_before_it(optim, given, said, low_rank, tmp_path):
    targets = {} if "needs the linear layers" in said else dict(optim_target_modules="all-linear")
    with pytest.raises(ConfigError, match=said):
        config(tmp_path, optim=optim, **dict(gradient_accumulation_steps=1) | targets | given)


@pytest.mark.parametrize(
    ("optim", "given"),
    [
        ("galore_adamw", dict(optim_target_modules=["attn"], optim_args="rank=8,scale=0.5,proj_type=std")),
        ("apollo_adamw", dict(optim_target_modules=r".*\.q_proj", optim_args="proj=random", adam_beta1=0.8)),
        ("galore_adamw_layerwise", dict(optim_target_modules="all-linear", gradient_accumulation_steps=1)),
        ("adalomo", dict()),
    ],
)
def test_what_they_read_is_taken(optim, given, low_rank, tmp_path):
    assert config(tmp_path, optim=optim, **given).optim == optim


def test_the_examples_of_help_and_documents_are_taken(tmp_path):
    told = NoisySFTConfig.__dataclass_fields__["optim"].metadata["help"]
    with pytest.raises(ConfigError, match="write name=value") as refused:
        config(tmp_path, optim="sgd", optim_args="momentum")
    for name, text in optimizer_args.EXAMPLES.items():
        assert f"{text} for {name}" in told and f"`optim_args: {text}` of optim {name}" in str(refused.value)
        assert config(tmp_path, optim=name, optim_args=text).optim_args == text
    # no other stands there
    assert set(re.findall(r"\S+=\S+", told)) == set(optimizer_args.EXAMPLES.values())
    written = re.findall(r"^optim: (\S+)\noptim_args: (\S+)$", (DOCS / "optimizers.md").read_text(), re.MULTILINE)
    assert written
    for name, text in written:
        config(tmp_path, optim=name, optim_args=text)
