"""Value heads on several ranks: each trains its own folds, and all have all of them."""

from types import SimpleNamespace

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.mechanisms import value_head
from posttrain.trainers.offline import prompt_values

NAMES = [f"prompt {i}" for i in range(10)]
PROMPTS = {name: [1] * (i % 3 + 1) for i, name in enumerate(NAMES)}
STATES = [
    torch.randn(len(ids), 8, generator=torch.Generator().manual_seed(i)) for i, ids in enumerate(PROMPTS.values())
]
REWARDS = torch.linspace(0, 1, len(NAMES))


def trainer(folder, rank, ranks, folds=3, prompts=100):
    args = SimpleNamespace(
        value_head_dir=None, output_dir=str(folder), value_folds=folds, value_prompts=prompts, value_epochs=2,
        value_learning_rate=1e-2, value_targets="answers", reward_max=1.0, seed=0,
    )  # fmt: skip
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), is_main_process=rank == 0, num_processes=ranks, process_index=rank
    )
    fold = dict(zip(NAMES, value_head.folds_of(NAMES, folds), strict=True))
    return SimpleNamespace(args=args, accelerator=accelerator, reference_key="r", value_fold=fold)


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr(prompt_values, "_key", lambda *args: "key")
    monkeypatch.setattr(prompt_values, "_states", lambda trainer, prompts, what: STATES[: len(prompts)])
    monkeypatch.setattr(prompt_values, "broadcast_object_list", lambda found, from_process: None)


def trained(given):
    return prompt_values._heads(given, NAMES, PROMPTS, (REWARDS, torch.ones(len(NAMES))), None, None)


def test_each_rank_trains_its_folds_and_gets_the_others(alone, tmp_path, monkeypatch):
    single = trained(trainer(tmp_path / "one", 0, 1))
    fitted, parts = [], {}
    fit = value_head.fit
    monkeypatch.setattr(value_head, "fit", lambda *given: fitted.append(given[6]) or fit(*given))
    moved, move = [], value_head.on_device
    monkeypatch.setattr(value_head, "on_device", lambda *given: moved.append(given[1]) or move(*given))

    def first_round(part):
        parts[len(parts)] = part
        return part

    # what each rank hands over, then all of it to each
    monkeypatch.setattr(prompt_values, "gather_object", first_round)
    for rank in range(2):
        trained(trainer(tmp_path / f"part{rank}", rank, 2))
    assert fitted == [0, 2, 1], "seeds, which are those of the folds: two on rank 0, one on rank 1"
    assert moved == 2 * [torch.device("cpu")], "states are on the device once, before the first fold"
    monkeypatch.setattr(prompt_values, "gather_object", lambda part: parts[0] + parts[1])
    for rank in range(2):
        heads = trained(trainer(tmp_path / f"both{rank}", rank, 2))
        assert len(heads) == 3 and not any(head.training for head in heads)
        for ours, theirs in zip(heads, single, strict=True):
            assert all(torch.equal(ours.state_dict()[name], value) for name, value in theirs.state_dict().items())
    # rank 0 alone keeps them
    assert (tmp_path / "both0" / value_head.FILE).exists() and not (tmp_path / "both1").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_prompts_of_one_fold_are_refused_on_every_rank(alone, tmp_path, rank):
    with pytest.raises(ConfigError, match="lie in one fold"):
        trained(trainer(tmp_path, rank, 2, folds=2, prompts=1))
