"""What engines that spread weights over ranks are told, and what is refused under them."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from posttrain.errors import ConfigError
from posttrain.mechanisms.spread_weights import keep_fp32_outputs
from posttrain.run import config
from posttrain.run.engines import add_up_in_fp32
from tests.families import METHODS

BF16 = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, method in METHODS.items() for case in method.unspread]
)
def test_what_fsdp_cannot_do_is_refused_before_anything_loads(name, case, tiny_folder, tmp_path, monkeypatch):
    method = METHODS[name]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    # which refuses all of FSDP where there is no accelerator
    monkeypatch.setattr(config, "under_fsdp", lambda args: False)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *args, **kwargs: pytest.fail())
    with pytest.raises(ConfigError, match="under FSDP"):
        method.build(tiny_folder, tmp_path, **(method.cases | method.ranks)[case])


def test_policies_of_fsdp2_keep_outputs_and_add_up_in_fp32():
    plugin = SimpleNamespace(mixed_precision_policy=BF16)
    keep_fp32_outputs(plugin)
    assert plugin.mixed_precision_policy == dataclasses.replace(BF16, output_dtype=None, reduce_dtype=torch.float32)
    for other in (None, MixedPrecisionPolicy(), object()):
        plugin.mixed_precision_policy = other
        keep_fp32_outputs(plugin)
        assert plugin.mixed_precision_policy is other


@pytest.mark.parametrize(
    ("stage", "settings", "dtype"),
    [
        (2, {"bf16": {"enabled": True}}, "fp32"),
        (3, {"bf16": {"enabled": True}}, "fp32"),
        # there DeepSpeed would take another optimizer for it
        (1, {"bf16": {"enabled": True}}, None),
        (3, {"bf16": {"enabled": False}}, None),
        (3, {"fp16": {"enabled": True}}, None),
        (3, {}, None),
        (3, {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "bf16"}}, "bf16"),
    ],
)
def test_zero_adds_up_in_fp32_what_it_computes_in_bf16(stage, settings, dtype):
    add_up_in_fp32(SimpleNamespace(zero_stage=stage, deepspeed_config=settings))
    assert settings.get("data_types", {}).get("grad_accum_dtype") == dtype
