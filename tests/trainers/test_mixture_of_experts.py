import pytest
import torch
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from posttrain import ALoLConfig, ALoLTrainer, RobustDPOConfig, RobustDPOTrainer
from posttrain.errors import ConfigError
from posttrain.models import tiny_model
from tests.conftest import make_pairs
from tests.scored import make_scored
from tests.scored import settings as scored_settings
from tests.training import distance, settings, trainable

TYPES = {
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.5),
    "qwen2_moe": dict(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32,
        router_aux_loss_coef=0.5,
    ),
    "olmoe": dict(num_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.5),
}  # fmt: skip


@pytest.fixture(scope="module", params=TYPES)
def experts(request, tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(request.param, **TYPES[request.param]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def preference(folder, output_dir, trainer_class=RobustDPOTrainer, config_class=RobustDPOConfig, peft=True, **over):
    if config_class is RobustDPOConfig:
        over = dict(pair_loss="dpo") | over
    trainer = trainer_class(
        folder,
        args=config_class(**settings(output_dir, **over)),
        train_dataset=make_pairs(16),
        eval_dataset=make_pairs(6, seed=5),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if peft else None,
    )
    before = trainable(trainer.model)
    trainer.train()
    after = trainable(trainer.model)
    return {name: after[name] - before[name] for name in before}, trainer


@pytest.mark.slow
@pytest.mark.parametrize("peft", [True, False])
def test_the_auxiliary_loss_is_the_parents_bit_for_bit(experts, tmp_path, peft):
    plain = dict(use_cpu=True, bf16=False, gradient_checkpointing=False)
    shared = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2, peft=peft)
    parent, theirs = preference(experts, tmp_path / "trl", DPOTrainer, DPOConfig, **shared, **plain)
    change, ours = preference(experts, tmp_path / "ours", **shared)
    assert all(torch.equal(change[name], parent[name]) for name in parent)
    names = ("loss", "aux_loss")
    assert [{n: row[n] for n in names} for row in ours.state.log_history if "loss" in row] == [
        {n: pytest.approx(row[n], rel=1e-5) for n in names} for row in theirs.state.log_history if "loss" in row
    ]
    assert ours.evaluate()["eval_aux_loss"] == pytest.approx(theirs.evaluate()["eval_aux_loss"], rel=1e-5)
    without, _ = preference(experts, tmp_path / "off", router_aux_loss_coef=0.0, prefix_sharing="never", **shared)
    assert peft or distance(without, change) > 1e-2, "without the auxiliary loss the update is another"


@pytest.mark.slow
def test_pairs_are_padded_while_the_auxiliary_loss_is_on(experts, tmp_path, logged):
    logged.set_level("INFO", logger="posttrain")
    trainer = preference(experts, tmp_path / "on", max_steps=1)[1]
    assert not trainer._sharing.active
    assert "the auxiliary loss of a mixture of experts counts prompt tokens" in logged.text
    assert preference(experts, tmp_path / "off", max_steps=1, router_aux_loss_coef=0.0)[1]._sharing.active
    with pytest.raises(ConfigError, match="prefix_sharing is always, which does not work here: the auxiliary loss"):
        preference(experts, tmp_path / "always", prefix_sharing="always")


@pytest.mark.slow
def test_only_a_loss_that_weighs_pairs_is_refused(experts, tmp_path):
    with pytest.raises(ConfigError, match="router_aux_loss_coef is 0.5 and Dr. DPO weighs the pairs of a step"):
        preference(experts, tmp_path / "weighs", reduction="dr_dpo")
    change, _ = preference(experts, tmp_path / "inf", reduction="dr_dpo", beta_prime=float("inf"))
    plain, _ = preference(experts, tmp_path / "mean")
    assert all(torch.equal(change[name], plain[name]) for name in plain)
    preference(experts, tmp_path / "zero", reduction="dr_dpo", router_aux_loss_coef=0.0, max_steps=1)
    preference(experts, tmp_path / "rdpo", pair_loss="rdpo", max_steps=1)


def offline(folder, output_dir, trainer_class=ALoLTrainer, config_class=ALoLConfig, **over):
    rows = make_scored(16, length=12)
    if config_class is ALoLConfig:
        over = dict(variant="nll", prefix_sharing="never") | over
    fields = scored_settings(output_dir, **over)
    if config_class is SFTConfig:
        del fields["prefix_sharing"]
        rows = rows.remove_columns("reward")
    trainer = trainer_class(folder, args=config_class(**fields), train_dataset=rows)
    before = trainable(trainer.model)
    trainer.train()
    after = trainable(trainer.model)
    return {name: after[name] - before[name] for name in before}, trainer


@pytest.mark.slow
def test_answers_train_with_the_auxiliary_loss_averaged_over_the_window(experts, tmp_path):
    # all answers have equally many tokens, n, so that SFT's mean over tokens is the mean over answers, over n
    split = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=1, learning_rate=0.01)
    plain = dict(use_cpu=True, bf16=False, gradient_checkpointing=False, loss_type="nll")
    change, ours = offline(experts, tmp_path / "ours", **split)
    tokens = next(sum(label != -100 for label in row["labels"]) for row in ours.train_dataset)
    # scaled up by n, SFT takes the coefficient down by n for the same sum
    scaled = split | dict(learning_rate=0.01 * tokens, router_aux_loss_coef=0.5 / tokens)
    parent, theirs = offline(experts, tmp_path / "sft", SFTTrainer, SFTConfig, **scaled, **plain)
    assert distance(change, parent) < 1e-4
    without, _ = offline(experts, tmp_path / "off", router_aux_loss_coef=0.0, **split)
    assert distance(without, parent) > 1e-2
    aux = [row["aux_loss"] for row in ours.state.log_history if "aux_loss" in row]
    assert aux == pytest.approx([row["aux_loss"] for row in theirs.state.log_history if "aux_loss" in row], rel=1e-5)


@pytest.mark.slow
def test_weighed_answers_train_with_the_auxiliary_loss(experts, tmp_path):
    change, _ = offline(experts, tmp_path / "on", variant="a_lol", max_steps=1)
    without, _ = offline(experts, tmp_path / "off", variant="a_lol", max_steps=1, router_aux_loss_coef=0.0)
    assert any(not torch.equal(change[name], without[name]) for name in change if "gate" in name or "router" in name)
