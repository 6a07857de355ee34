import math

import pytest
import torch
from trl import DPOConfig, DPOTrainer

from posttrain import RobustDPOConfig, RobustDPOTrainer
from posttrain.errors import ConfigError, DivergedError
from posttrain.objectives import preference
from tests.conftest import make_pairs
from tests.training import distance, losses, settings, train

PARENT = dict(trainer_class=DPOTrainer, config_class=DPOConfig, use_cpu=True, bf16=False, gradient_checkpointing=False)
DR_DPO = dict(reduction="dr_dpo", beta_prime=0.3)


@pytest.mark.slow
def test_rdpo_is_trl_robust(tiny_folder, tmp_path):
    reference, parent = train(tiny_folder, tmp_path / "trl", loss_type="robust", label_smoothing=0.2, **PARENT)
    change, trainer = train(tiny_folder, tmp_path / "ours", pair_loss="rdpo", flip_rate=0.2, prefix_sharing="never")
    assert losses(trainer) == pytest.approx(losses(parent), abs=1e-5)
    assert distance(change, reference) < 1e-5


@pytest.mark.slow
def test_two_pass_and_rescale_agree(tiny_folder, tmp_path):
    split = dict(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    two_pass, first = train(tiny_folder, tmp_path / "a", **split, **DR_DPO)
    rescale, second = train(tiny_folder, tmp_path / "b", **split, **DR_DPO, dr_dpo_window="rescale")
    assert distance(rescale, two_pass) <= 1e-4
    assert losses(second) == pytest.approx(losses(first), rel=1e-5)


@pytest.mark.slow
def test_a_mean_of_means_over_weighs_a_short_last_micro_batch(tiny_folder, tmp_path):
    # 13 rows: the second step holds 5, in micro-batches of 4 and 1. TRL averages the two means.
    pairs, split = make_pairs(13), dict(per_device_train_batch_size=4, gradient_accumulation_steps=2)
    whole, _ = train(tiny_folder, tmp_path / "whole", pairs=pairs, pair_loss="dpo")
    ours, _ = train(tiny_folder, tmp_path / "ours", pairs=pairs, pair_loss="dpo", **split)
    theirs, _ = train(tiny_folder, tmp_path / "trl", pairs=pairs, **PARENT, **split)
    assert distance(ours, whole) <= 1e-4
    assert distance(theirs, whole) > 1e-3


@pytest.mark.slow
def test_dr_dpo_logs_its_objective_and_its_batch(tiny_folder, tmp_path):
    split = dict(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    _, trainer = train(tiny_folder, tmp_path, **split, **DR_DPO)
    first, second = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["drdpo/effective_pairs"] == pytest.approx(8, abs=1e-3)
    assert second["drdpo/batch_pairs"] == 8
    assert second["loss"] < second["drdpo/dpo_loss"]
    assert 1 <= second["drdpo/effective_pairs"] < 7
    assert 1 / 8 < second["drdpo/weight_max"] <= 1


def test_rdpo_logs_the_plain_loss_beside_its_own(tiny_folder, tmp_path):
    _, trainer = train(tiny_folder, tmp_path, pair_loss="rdpo", flip_rate=0.4, learning_rate=0.3)
    entry = [entry for entry in trainer.state.log_history if "loss" in entry][1]
    assert entry["rdpo/kappa"] == pytest.approx(2.0)
    # the mean of -log sigmoid(z) - kappa z
    assert entry["loss"] == pytest.approx(entry["rdpo/dpo_loss"] - 2.0 * entry["rewards/margins"], rel=1e-4)
    assert 0 <= entry["rdpo/negative_loss_fraction"] <= 1


def test_flip_rates_per_row_come_from_their_column(tiny_folder, tmp_path):
    pairs, padded = make_pairs(16), dict(prefix_sharing="never")
    constant, _ = train(tiny_folder, tmp_path / "a", pairs=pairs, pair_loss="rdpo", flip_rate=0.2, **padded)
    column, trainer = train(
        tiny_folder, tmp_path / "b", pairs=pairs.add_column("flip_rate", [0.2] * 16), pair_loss="rdpo", **padded
    )
    assert distance(column, constant) < 2e-5
    assert trainer.state.log_history[0]["rdpo/kappa"] == pytest.approx(1 / 3)
    mixed, _ = train(tiny_folder, tmp_path / "c", pairs=pairs.add_column("flip_rate", [0.0, 0.4] * 8), pair_loss="rdpo")
    assert distance(mixed, constant) > 1e-2


@pytest.mark.slow
def test_evaluation_does_not_depend_on_its_batch_size(tiny_folder, tmp_path):
    _, trainer = train(tiny_folder, tmp_path, **DR_DPO)
    held_out = make_pairs(11, seed=10)
    results = []
    for size in (11, 3):
        trainer.args.per_device_eval_batch_size = size
        results.append(trainer.evaluate(held_out))
    first, second = ({k: v for k, v in r.items() if "/" in k or k == "eval_loss"} for r in results)
    assert first == pytest.approx(second, rel=1e-4)
    assert first["eval_loss"] == pytest.approx(first["eval_drdpo/dpo_loss"], rel=1e-5)
    assert first["eval_drdpo/objective"] < first["eval_drdpo/dpo_loss"]


@pytest.mark.slow
def test_evaluation_objective_is_that_of_the_whole_set(tiny_folder, tmp_path):
    _, trainer = train(tiny_folder, tmp_path, per_device_eval_batch_size=4, **DR_DPO)
    kept = []
    inner = trainer.pair_losses
    trainer.pair_losses = lambda *args: kept.append(inner(*args)) or kept[-1]
    metrics = trainer.evaluate(make_pairs(10, seed=9))
    assert metrics["eval_drdpo/objective"] == pytest.approx(preference.dr_dpo(torch.cat(kept), 0.3).item(), rel=1e-5)


@pytest.mark.slow
def test_rescale_says_so_when_all_weights_underflow(tiny_folder, tmp_path):
    with pytest.raises(DivergedError, match="Set `dr_dpo_window: two_pass`"):
        train(tiny_folder, tmp_path, reduction="dr_dpo", beta_prime=0.005, dr_dpo_window="rescale")
    change, _ = train(tiny_folder, tmp_path, reduction="dr_dpo", beta_prime=0.005)
    assert all(torch.isfinite(value).all() for value in change.values())


@pytest.mark.slow
def test_one_dominant_pair_is_warned_about_after_ten_logs(tiny_folder, tmp_path, logged):
    train(tiny_folder, tmp_path, reduction="dr_dpo", beta_prime=1e-5, max_steps=14)
    assert "drdpo/effective_pairs was below 2 for 10 logs running" in logged.text


@pytest.mark.slow
def test_bf16_passes_agree(tiny_folder, tmp_path):
    # the weights of two_pass are computed from the losses of pass one: pass two must see the same ones
    args = RobustDPOConfig(
        **settings(tmp_path, **DR_DPO, bf16=True, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    )
    trainer = RobustDPOTrainer(tiny_folder, args=args, train_dataset=make_pairs(16), peft_config=None)
    first_pass, second_pass = [], []
    score_window, reduce_pairs = trainer._score_window, trainer.reduce_pairs
    trainer._score_window = lambda batches: first_pass.append(score_window(batches)) or first_pass[-1]

    def watched(pair_losses, inputs, mode):
        second_pass.append(pair_losses.detach())
        return reduce_pairs(pair_losses, inputs, mode)

    trainer.reduce_pairs = watched
    trainer.train()
    assert torch.equal(torch.cat(first_pass), torch.cat(second_pass))
    assert torch.cat(first_pass).dtype == torch.float32
    assert torch.cat(first_pass).std() > 0.01


@pytest.mark.slow
def test_a_step_of_one_micro_batch_needs_no_second_forward(tiny_folder, tmp_path, monkeypatch):
    forwards = []
    score = RobustDPOTrainer.score
    monkeypatch.setattr(RobustDPOTrainer, "score", lambda *args: forwards.append(None) or score(*args))
    train(tiny_folder, tmp_path, **DR_DPO)
    assert len(forwards) == 2 * 2, "policy and reference, in each of two steps"
    forwards.clear()
    train(tiny_folder, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, **DR_DPO)
    assert len(forwards) == 2 * 2 * 3, "and the first pass where a step has several micro-batches"


def test_hardware_defaults_without_an_accelerator(tmp_path):
    if torch.accelerator.is_available():
        args = RobustDPOConfig(str(tmp_path))
        assert not args.use_cpu and args.gradient_checkpointing
    else:
        args = RobustDPOConfig(str(tmp_path))
        assert args.use_cpu and not args.bf16 and not args.gradient_checkpointing
        assert RobustDPOConfig(str(tmp_path), gradient_checkpointing=True).gradient_checkpointing


REFUSED = [
    (dict(pair_loss="ppo"), "pair_loss is 'ppo'; it must be one of dpo, cdpo, rdpo, hinge, ipo."),
    (dict(reduction="sum"), "reduction is 'sum'; it must be one of mean, dr_dpo."),
    (
        dict(reduction="dr_dpo", dr_dpo_scope="local"),
        "dr_dpo_scope is 'local'; it must be one of global, micro_batch.",
    ),
    (dict(dr_dpo_window="one_pass"), "dr_dpo_window is 'one_pass'; it must be one of two_pass, rescale."),
    (dict(flip_rate=0.5), "flip_rate is 0.5; it must lie in [0, 0.5)"),
    (dict(flip_rate=-0.1), "flip_rate is -0.1; it must lie in [0, 0.5)"),
    (dict(pair_loss="dpo", flip_rate=0.2), "flip_rate is 0.2, which has no effect on pair_loss: dpo"),
    (dict(reduction="dr_dpo", beta_prime=0.0), "beta_prime is 0; it must be above 0"),
    (dict(reduction="dr_dpo", beta_prime=float("nan")), "beta_prime is nan; it must be above 0"),
    (
        dict(reduction="dr_dpo", pair_loss="rdpo"),
        "pair_loss is rdpo and reduction is dr_dpo; rDPO's loss is unbounded",
    ),
    (
        dict(reduction="dr_dpo", dr_dpo_window="rescale", fp16=True),
        "dr_dpo_window is rescale and fp16 is true",
    ),
    (dict(beta=0.0), "beta is 0.0; it must be a number above 0"),
    (dict(beta="0.1"), "beta is '0.1'; it takes a number"),
    (dict(per_device_train_batch_size=0), "per_device_train_batch_size is 0; it must be a whole number of 1 or more."),
    (dict(gradient_accumulation_steps=0), "gradient_accumulation_steps is 0; it must be a whole number of 1 or more."),
    (dict(learning_rate=-1.0), "learning_rate is -1.0; it must be a number of 0 or more."),
    (dict(learning_rate="1e-4"), "learning_rate is '1e-4'; it takes a number."),
    (dict(learning_rate=float("nan")), "learning_rate is nan; it must be a number of 0 or more."),
    (dict(seed=-1), "seed is -1; it must be a whole number of 0 or more."),
    (dict(max_length=0), "max_length is 0; it must be a whole number of 2 or more."),
    (dict(max_steps=0), "max_steps is 0; give a number above 0, or -1 to go by num_train_epochs."),
    (dict(num_train_epochs=0), "num_train_epochs is 0; it must be above 0."),
    (dict(ld_alpha=1.5), "ld_alpha is 1.5; it must lie in [0, 1]"),
    (dict(loss_type="sft"), "loss_type is sft, which this trainer does not have: it has sigmoid, hinge, ipo, robust"),
    (dict(loss_type="robust", pair_loss="ipo"), "loss_type is robust and pair_loss is ipo; give one of them."),
    (dict(loss_type=["sigmoid", "sft"]), "loss_type is ['sigmoid', 'sft'] with loss_weights None; this trainer trains"),
    (dict(loss_weights=[0.5]), "loss_type is ['sigmoid'] with loss_weights [0.5]; this trainer trains one pair loss"),
    (
        dict(f_divergence_type="js_divergence"),
        "f_divergence_type is js_divergence, which this trainer does not use",
    ),
    (dict(use_weighting=True), "use_weighting is True, which this trainer does not use"),
    (dict(label_smoothing=0.1), "label_smoothing is 0.1, which has no effect on pair_loss: dpo (it reads none)"),
    (
        dict(label_smoothing=0.1, flip_rate=0.2),
        "label_smoothing is 0.1, which has no effect on pair_loss: rdpo (flip_rate is 0.2)",
    ),
    (dict(padding_free=True), "padding_free is True, which this trainer does not use"),
]


@pytest.mark.parametrize(
    ("fields", "message"), REFUSED, ids=[next(iter(f)) + f"-{i}" for i, (f, _) in enumerate(REFUSED)]
)
def test_impossible_settings_are_refused_by_name(tmp_path, fields, message):
    with pytest.raises(ValueError) as error:
        RobustDPOConfig(str(tmp_path), **fields)
    assert message in str(error.value)


def test_rescale_is_refused_under_deepspeed(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="dr_dpo_window is rescale under DeepSpeed"):
        RobustDPOConfig(str(tmp_path), reduction="dr_dpo", dr_dpo_window="rescale")


def test_fsdp_without_an_accelerator_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match="FSDP was asked for on a machine without an accelerator"):
        RobustDPOConfig(str(tmp_path))


def test_dr_dpo_of_one_pair_is_warned_about(tmp_path, logged):
    RobustDPOConfig(str(tmp_path), reduction="dr_dpo", dr_dpo_scope="micro_batch", per_device_train_batch_size=1)
    assert "of one pair Dr. DPO is DPO" in logged.text


def test_defaults_are_trls_dpo(tmp_path):
    plain, dr = RobustDPOConfig(str(tmp_path)), RobustDPOConfig(str(tmp_path), reduction="dr_dpo")
    assert (plain.pair_loss, plain.flip_rate) == ("dpo", 0.0)
    assert (dr.pair_loss, dr.flip_rate, dr.beta_prime) == ("dpo", 0.0, 1.0)


def test_full_fine_tuning_of_a_nameless_model_asks_for_its_reference(tokenizer, tmp_path):
    from posttrain.models import tiny_model

    given = dict(args=RobustDPOConfig(**settings(tmp_path)), train_dataset=make_pairs(8), processing_class=tokenizer)
    with pytest.raises(ConfigError, match=r"Pass `ref_model=copy.deepcopy\(model\)`, or a `peft_config`"):
        RobustDPOTrainer(tiny_model(), **given)
    assert RobustDPOTrainer(tiny_model(), ref_model=tiny_model(), **given)


@pytest.mark.slow
def test_batches_may_be_grouped_by_length(tiny_folder, tmp_path):
    _, trainer = train(tiny_folder, tmp_path, train_sampling_strategy="group_by_length", max_steps=2)
    lengths = trainer.train_dataset["length"]
    row = trainer.train_dataset[0]
    assert lengths[0] == len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
    assert trainer.state.global_step == 2


@pytest.mark.slow
def test_a_flip_rate_column_that_nothing_reads_is_said(tiny_folder, tmp_path, logged):
    pairs = make_pairs(8).add_column("flip_rate", [0.1] * 8)
    train(tiny_folder, tmp_path, pairs=pairs, pair_loss="dpo", max_steps=1)
    assert "train_dataset's column flip_rate is not read by pair_loss dpo; `pair_loss: rdpo` or" in logged.text
