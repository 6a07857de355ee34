"""FSDP2 on CPUs: accelerate spreads weights over accelerators alone, so the ranks say that their CPUs are some."""

import os
from pathlib import Path

import yaml
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import training_args

from posttrain.paths import configs_dir
from posttrain.run import config


def launch_file(folder: Path, **fsdp) -> Path:
    """Write the shipped launch file of FSDP2 for two ranks in fp32; `fsdp`: entries of its `fsdp_config` to change."""
    settings = yaml.safe_load((configs_dir() / "accelerate" / "fsdp2.yaml").read_text())
    settings |= dict(num_processes=2, mixed_precision="no", main_process_port=0)
    settings["fsdp_config"] |= fsdp
    path = folder / "fsdp2.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def is_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP") == "true"


def on_cpus() -> dict:
    """Have this process's CPU count as an accelerator; returns the settings that each of its runs needs."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = lambda self, *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
    training_args.is_torch_bf16_gpu_available = lambda: True
    # what refuses FSDP where accelerate would leave it out
    config.under_fsdp = lambda args: False
    return dict(use_cpu=False, bf16=False, gradient_checkpointing=False)
