"""What transformers reads of `optim_args` and Adam's settings for its own optimizers; the rest is refused."""

import pytest

from posttrain import NoisySFTConfig
from posttrain.errors import ConfigError
from posttrain.run import upstream_optimizers


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
        ("sgd", "momentum=(0.9,0.8)", "momentum is .*; with optim sgd it is a single finite value"),
        ("sgd", "momentum=0.9=1", "a single finite value"),
        ("sgd", "momentum=nan", "a single finite value"),
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
        ("rmsprop", "alpha=0.99,centered=True"),
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
