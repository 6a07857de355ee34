"""An adapter's config that its base has no layers or tokens for is refused before the base is loaded."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from posttrain.adapters import loading
from posttrain.errors import ConfigError, EnvironmentIssue

BASE = SimpleNamespace(num_hidden_layers=3, vocab_size=259)


@pytest.mark.parametrize(
    "settings",
    [
        {"layer_replication": [[0, 10**7]]},
        {"layer_replication": [[0, 1]] * 31},
        {"layer_replication": [[-1, 2]]},
        {"layer_replication": [[2, 2]]},
        {"layer_replication": [[0, 2, 3]]},
        {"layer_replication": [[0, "2"]]},
        {"layer_replication": 5},
        {"trainable_token_indices": [0, 259]},
        {"trainable_token_indices": [-1]},
        {"trainable_token_indices": ["a"]},
        {"trainable_token_indices": [True]},
        {"trainable_token_indices": {"embed_tokens": [5], "lm_head": [259]}},
        {"trainable_token_indices": 5},
    ],
)
def test_layers_and_tokens_that_the_base_does_not_have_are_refused(settings):
    with pytest.raises(ConfigError, match=f"the adapter in x: {next(iter(settings))} is .*base"):
        loading._check_against(settings, BASE, "the adapter in x")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"layer_replication": None, "trainable_token_indices": None},
        {"layer_replication": [[0, 2], [1, 3]], "trainable_token_indices": [0, 258]},
        {"trainable_token_indices": {"embed_tokens": [5]}},
    ],
)
def test_layers_and_tokens_of_the_base_are_taken(settings):
    loading._check_against(settings, BASE, "the adapter in x")
    loading._check_against(settings, SimpleNamespace(), "the adapter in x")


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (IndexError("index 3 is out of range"), ConfigError, "does not fit the base model .*index 3"),
        (AttributeError("no copy"), ConfigError, "does not fit the base model .*no copy"),
        (AssertionError("scale"), ConfigError, "does not fit the base model .*scale"),
        (ZeroDivisionError("by zero"), ConfigError, "does not fit the base model .*by zero"),
        (ImportError("'scipy' is not installed"), EnvironmentIssue, "needs a package that is missing: 'scipy'"),
    ],
)
def test_what_peft_fails_over_is_an_answer(tmp_path, tiny_folder, monkeypatch, raised, kind, message):
    def fail(*args, **options):
        raise raised

    save_adapter(tmp_path, tiny_folder)
    monkeypatch.setattr("peft.PeftModel.from_pretrained", fail)
    with pytest.raises(kind, match=message):
        loading.load_adapter(tmp_path)


def save_adapter(folder, base) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")


class Placed:
    """A model that notes where it is moved to; `full` devices have no room for it."""

    def __init__(self, full=(), **given):
        self.moves, self.full = [], full
        vars(self).update(given)

    def to(self, device):
        self.moves.append(str(device))
        if str(device) in self.full:
            raise torch.OutOfMemoryError("none left")
        return self


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))


def test_a_model_is_placed_on_the_accelerator(card):
    assert loading.placed(Placed()).moves == ["cuda"]


def test_what_its_loading_placed_stays(card):
    assert loading.placed(Placed(is_quantized=True)).moves == []
    assert loading.placed(Placed(hf_device_map={"": 0})).moves == []


def test_a_model_that_does_not_fit_stays_on_the_cpu_and_that_is_said(card, logged):
    assert loading.placed(Placed(full=("cuda",))).moves == ["cuda", "cpu"]
    assert "does not fit into the memory of cuda" in logged.text


def test_without_an_accelerator_nothing_moves(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert loading.placed(Placed()).moves == []
