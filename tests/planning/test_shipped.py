"""Every shipped config for GPUs fits the card that its first lines name, and the window of its model."""

import functools
import re
from dataclasses import fields

import pytest
import yaml
from trl import GRPOConfig

from posttrain.adapters.schemes import adapter_config
from posttrain.cli import plan as verb
from posttrain.paths import configs_dir
from posttrain.planning import memory, settings
from posttrain.planning.cards import card_of
from posttrain.planning.shapes import known_models

PATHS = [path for path in sorted(configs_dir().glob("*/*.yaml")) if path.parent.name != "accelerate"]
ON_GPUS = [path for path in PATHS if "laptop" not in path.read_text()]
FOLDER = configs_dir() / "accelerate"


def name_of(path) -> str:
    return f"{path.parent.name}-{path.stem}"


@functools.cache
def planned(path, *words):
    """The run and the launch of a shipped config, and the card that it names."""
    named = re.search(r"(one|\d+) GPUs? of (\d+) GB", path.read_text().replace("\n# ", " "))
    assert named, "the first lines name no card"
    launch = verb._launch(path, None, None, None)
    assert launch.processes == (1 if named[1] == "one" else int(named[1]))
    _, model_args, args = verb._settings(path.parent.name, path, list(words))
    job = verb._job(model_args.model_name_or_path, None, model_args, args, adapter_config(model_args))
    return job, launch, card_of(named[2]).memory, args


def test_configs_for_gpus_are_all_but_those_for_laptops():
    assert {path.stem for path in PATHS} - {path.stem for path in ON_GPUS} == {"cpu", "gift_sw", "private", "dp"}
    # clients that take turns in one process are for a laptop
    assert len(ON_GPUS) == 2 * len({path.parent.name for path in PATHS} - {"fedsvd"})


@pytest.mark.parametrize("path", ON_GPUS, ids=name_of)
def test_it_fits_the_card_that_it_names(path):
    job, launch, card, _ = planned(path)
    found = memory.phases(job, launch, card)
    assert memory.need(found) <= card, found
    assert memory.rows_of_vllm(job, card) is None or memory.rows_of_vllm(job, card) >= 16


@pytest.mark.core("robust_dpo-zero3", "noisy_sft-single_gpu", "hpt-zero3")
@pytest.mark.parametrize("path", ON_GPUS, ids=name_of)
def test_a_much_larger_batch_would_not_fit(path):
    """So that the test above can fail."""
    _, _, _, args = planned(path)
    words = ["--per_device_train_batch_size", str(32 * args.per_device_train_batch_size)]
    job, launch, card, _ = planned(path, *words)
    assert memory.need(memory.phases(job, launch, card)) > card


@pytest.mark.parametrize("path", ON_GPUS, ids=name_of)
def test_its_rows_lie_within_the_models_window(path):
    job, _, _, args = planned(path)
    assert settings.length_of(args) <= job.shapes.positions
    window = getattr(args, "vllm_max_model_length", None)
    if getattr(args, "use_vllm", False):
        assert settings.length_of(args) <= window <= job.shapes.positions


def test_longer_answers_would_leave_the_window():
    """So that the test above can fail."""
    path = configs_dir() / "hpt" / "zero3.yaml"
    job, _, _, args = planned(path, "--max_completion_length", "8192")
    assert settings.length_of(args) > job.shapes.positions


@pytest.mark.parametrize("path", PATHS, ids=name_of)
def test_names_of_vllms_settings_are_those_of_the_installed_trl(path):
    known = {entry.name for entry in fields(GRPOConfig)}
    assert {name for name in yaml.safe_load(path.read_text()) if "vllm" in name} <= known


@pytest.mark.parametrize("path", PATHS, ids=name_of)
def test_the_shapes_of_its_model_are_known_without_a_connection(path):
    assert yaml.safe_load(path.read_text())["model_name_or_path"] in known_models()
