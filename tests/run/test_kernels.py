"""What packed rows and torch's attention are given on an accelerator, by the settings and by default."""

from types import SimpleNamespace

import pytest
import torch

from posttrain import NoisySFTConfig, PolicyGradientConfig, RobustDPOConfig
from posttrain.errors import ConfigError
from posttrain.mechanisms.prefix_sharing import attention_cost
from posttrain.models import tiny_model
from posttrain.run import sharing
from tests import training

CONFIG = tiny_model().config


def shaped(device, attention="sdpa", **settings):
    CONFIG._attn_implementation = attention
    given = dict(attention_cost_factor=None, packed_width_multiple=None, cudnn_attention=True) | settings
    trainer = SimpleNamespace(args=SimpleNamespace(**given), accelerator=SimpleNamespace(device=torch.device(device)))
    return sharing._shape_of_rows(trainer, CONFIG)


@pytest.fixture(autouse=True)
def limit():
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=8):
        yield torch._dynamo.config
    CONFIG._attn_implementation = "sdpa"


def test_on_the_cpu_rows_are_as_narrow_as_their_tokens(limit):
    own = {"attention_cost": attention_cost(CONFIG), "multiple": 1, "few_shapes": False, "least_rows": 1}
    assert shaped("cpu") == shaped("cpu", "flex_attention") == own
    assert limit.recompile_limit == 8


def test_on_a_card_shapes_are_few_and_sdpa_is_dear():
    found = shaped("cuda")
    assert found["multiple"] == 128 and found["few_shapes"] and found["least_rows"] == 1
    assert found["attention_cost"] == 3 * attention_cost(CONFIG)
    assert shaped("xpu")["attention_cost"] == attention_cost(CONFIG)


def test_flex_attention_has_room_to_compile_and_never_a_single_row(limit):
    found = shaped("cuda", "flex_attention")
    assert found["least_rows"] == 2 and found["attention_cost"] == attention_cost(CONFIG)
    assert limit.recompile_limit == 64


def test_a_users_own_limit_of_compilations_stays(limit):
    limit.recompile_limit = 500
    shaped("cuda", "flex_attention")
    assert limit.recompile_limit == 500


def test_settings_come_before_the_defaults():
    found = shaped("cuda", attention_cost_factor=1.5, packed_width_multiple=64)
    assert found["attention_cost"] == 1.5 * attention_cost(CONFIG) and found["multiple"] == 64


@pytest.mark.parametrize("device, wanted, left", [("cuda", True, True), ("cuda", False, False), ("cpu", False, True)])
def test_cudnn_is_taken_unless_the_settings_say_no(device, wanted, left):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        sharing.use_kernels(SimpleNamespace(cudnn_attention=wanted), torch.device(device))
        assert torch.backends.cuda.cudnn_sdp_enabled() is left
        # the next trainer has what it asks for; what the user left out stays out
        sharing.use_kernels(SimpleNamespace(cudnn_attention=True), torch.device(device))
        assert torch.backends.cuda.cudnn_sdp_enabled()
        torch.backends.cuda.enable_cudnn_sdp(False)
        sharing.use_kernels(SimpleNamespace(cudnn_attention=True), torch.device(device))
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.mark.parametrize("kind", [RobustDPOConfig, NoisySFTConfig, PolicyGradientConfig])
@pytest.mark.parametrize(
    "settings",
    [
        dict(attention_cost_factor=0), dict(attention_cost_factor=-1.0), dict(attention_cost_factor=float("nan")),
        dict(attention_cost_factor=True), dict(attention_cost_factor=1e9), dict(packed_width_multiple=0),
        dict(packed_width_multiple=True), dict(packed_width_multiple=10**9), dict(packed_width_multiple=8.5),
        dict(cudnn_attention="no"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_none_is_refused(kind, settings, tmp_path):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        kind(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_they_are_no_part_of_what_a_run_is(tiny_folder, tmp_path):
    """Off the CPU's defaults, the update is that of the defaults."""
    change, _ = training.train(tiny_folder, tmp_path / "a")
    other, _ = training.train(tiny_folder, tmp_path / "b", attention_cost_factor=200.0, packed_width_multiple=32)
    assert training.distance(other, change) < 1e-4
