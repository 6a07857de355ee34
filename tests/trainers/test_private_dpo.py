"""Private preference training: a pair, or a person's pairs, bounded together; what couples pairs is refused."""

import math
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import LoraConfig

from posttrain import RobustDPOConfig, RobustDPOTrainer
from posttrain.errors import ConfigError, DataError
from posttrain.hub import Destination, write_model_card
from posttrain.hub.files import files_to_push
from posttrain.mechanisms.row_groups import RowGroups
from posttrain.privacy import promise as promises
from posttrain.privacy.config import PrivacyConfig
from posttrain.privacy.promise import FIGURES
from posttrain.trainers.preference import mixin as preference_mixin
from tests import runs, training
from tests.clipped import by_hand, forwards_without_empty_micro_batches
from tests.contract.test_resume import resumes
from tests.families import METHODS, RDPO
from tests.made_up import make_pairs
from tests.runs import distance, trainable

NOISELESS = dict(target_epsilon=math.inf, expected_batch_size=4)


def build(folder, output_dir, draws=None, privacy=None, pairs=None, peft=True, resume=None, **settings):
    given = training.settings(output_dir, **dict(max_steps=2, per_device_train_batch_size=2, beta=0.5) | settings)
    del given["gradient_accumulation_steps"]
    trainer = RobustDPOTrainer(
        model=folder,
        args=RobustDPOConfig(**given),
        train_dataset=make_pairs(8) if pairs is None else pairs,
        peft_config=runs.lora() if peft is True else peft,
        privacy=PrivacyConfig(**NOISELESS | (privacy or {})),
    )
    trainer._private.draws = draws
    return trainer


def of_margin(loss):
    """The loss of a pair whose answers are forwarded alone, by that of beta times its margin."""

    def logps(model, prompt, answer):
        ids = torch.tensor([prompt + answer])
        found = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        return found.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].sum()

    def loss_of(model, row):
        sides = [(row["prompt_ids"], row[side]) for side in ("chosen_ids", "rejected_ids")]
        with torch.no_grad(), model.disable_adapter():
            reference = [logps(model, *side) for side in sides]
        ratios = [logps(model, *side) - ref for side, ref in zip(sides, reference, strict=True)]
        return loss(0.5 * (ratios[0] - ratios[1]))

    return loss_of


def dpo(z):
    return -torch.nn.functional.logsigmoid(z)


LOSSES = {
    "dpo": (dict(), dpo),
    "rdpo": (
        dict(pair_loss="rdpo", flip_rate=0.2),
        lambda z: (0.8 * dpo(z) - 0.2 * dpo(-z)) / 0.6,
    ),
}


@pytest.mark.core("rdpo")
@pytest.mark.parametrize("name", LOSSES)
def test_a_run_without_noise_is_training_on_clipped_pairs(name, tiny_folder, tmp_path):
    plan, (settings, loss) = [[0, 3, 5], [1, 2, 4, 6, 7]], LOSSES[name]
    trainer = build(tiny_folder, tmp_path, lambda step: plan[step], dict(clip_norm=0.5), **settings)
    assert trainer.args.gradient_accumulation_steps == 4 and trainer.args.prefix_sharing == "never"
    reference = build(tiny_folder, tmp_path / "b", privacy=dict(clip_norm=0.5), **settings)
    expected = by_hand(reference, plan, of_margin(loss), clip_norm=0.5, expected=4, rate=0.05)
    change, _ = runs.fit(trainer)
    assert distance(change, expected) < 1e-4
    assert all(value.any() for part, value in change.items() if "lora_B" in part)


def test_the_unit_is_a_person_where_a_column_says_so(tiny_folder, tmp_path):
    pairs = make_pairs(8).add_column("person", [f"p{row % 3}" for row in range(8)])
    people = dict(privacy_unit_column="person", rows_per_unit=3, expected_batch_size=2, clip_norm=0.5)
    plan, steps = [[0, 1], [2]], [[(0, 3, 6), (1, 4, 7)], [(2, 5)]]
    given = dict(pairs=pairs, privacy=people, per_device_train_batch_size=4)
    trainer = build(tiny_folder, tmp_path, lambda step: plan[step], **given)
    hand = dict(loss_of=of_margin(dpo), clip_norm=0.5, expected=2, rate=0.05)
    expected = by_hand(build(tiny_folder, tmp_path / "b", **given), steps, **hand)
    change, _ = runs.fit(trainer)
    assert distance(change, expected) < 1e-4
    # pairs clipped for themselves, the known wrong variant, end elsewhere
    alone = [[pair for unit in step for pair in unit] for step in steps]
    assert distance(change, by_hand(build(tiny_folder, tmp_path / "c", **given), alone, **hand)) > 1e-2


def test_a_step_without_pairs_moves_nothing_without_noise(tiny_folder, tmp_path):
    change, trainer = runs.fit(build(tiny_folder, tmp_path, lambda step: []))
    assert trainer.state.global_step == 2 and not any(value.any() for value in change.values())


@pytest.mark.parametrize("name", ["dpo", pytest.param("rdpo", marks=pytest.mark.slow)])
def test_micro_batches_without_pairs_are_not_run_and_nothing_changes(name, tiny_folder, tmp_path, monkeypatch):
    plan, settings = [[0, 3, 5], [], [1, 2, 4, 6, 7]], LOSSES[name][0] | dict(max_steps=3)
    noisy = dict(target_epsilon=None, noise_multiplier=0.3, target_delta=1e-3, clip_norm=0.5, expected_batch_size=3)
    counts, _ = forwards_without_empty_micro_batches(
        lambda name: build(tiny_folder, tmp_path / name, lambda step: plan[step], noisy, **settings),
        "score",
        monkeypatch,
    )
    # the reference's as well
    assert counts == [(6, 6), (12, 12)]


def test_a_private_run_promises_and_goes_on_with_what_it_spent(tiny_folder, tmp_path):
    private = dict(target_epsilon=None, noise_multiplier=1.0, target_delta=0.01)
    given = dict(privacy=private, save_strategy="steps", save_steps=1)
    runs.fit(build(tiny_folder, tmp_path, **given))
    first = promises.read(tmp_path)
    assert (first.steps, first.thrown_away, first.is_private) == (2, 0, True)
    _, trainer = runs.fit(build(tiny_folder, tmp_path, **given), trainable, str(tmp_path / "checkpoint-1"))
    told = trainer.promise()
    assert (told.steps, told.thrown_away) == (2, 1) and told.epsilon > told.epsilon_of_weights == first.epsilon


@pytest.mark.core("nan", "huge")
@pytest.mark.parametrize("kind", ["nan", "inf", "huge"])
def test_a_pair_that_is_no_number_stops_nothing_and_tells_nothing(kind, tiny_folder, tmp_path, monkeypatch):
    score, losses = RobustDPOTrainer.score, RobustDPOTrainer.pair_losses

    def bad_answer(self, model, batch, **given):
        found = score(self, model, batch, **given)
        if len(found.chosen_logps) == 8:
            found.chosen_logps = found.chosen_logps * torch.tensor([float(kind), *[1.0] * 7])
        return found

    def beyond_all_numbers_together(self, *given):
        found = losses(self, *given)
        return torch.cat([found[:2] + 3e38, found[2:]]) if len(found) == 8 else found

    if kind == "huge":
        monkeypatch.setattr(RobustDPOTrainer, "pair_losses", beyond_all_numbers_together)
    else:
        monkeypatch.setattr(RobustDPOTrainer, "score", bad_answer)
    all_of_them = dict(expected_batch_size=8)
    change, trainer = runs.fit(build(tiny_folder, tmp_path, privacy=all_of_them, per_device_train_batch_size=8))
    assert trainer.state.global_step == 2 and any(value.any() for value in change.values())
    assert all(torch.isfinite(value).all() for value in change.values())
    for entry in runs.entries(trainer):
        assert entry["private/rows_not_finite"] == (0 if kind == "huge" else 2)
        told = [value for name, value in entry.items() if name != "loss" or kind != "huge"]
        assert all(math.isfinite(value) for value in told), entry


REFUSED = [
    (dict(reduction="dr_dpo"), "reduction is dr_dpo, which weighs each pair by the others"),
    (dict(max_grad_norm=1.0), "max_grad_norm is 1.0, which would cut the noisy gradient"),
    (dict(peft=None), "there is no LoRA to train"),
    (dict(peft=LoraConfig(use_dora=True)), "use_dora of the adapter is True"),
    (dict(peft=LoraConfig(modules_to_save=["lm_head"])), "modules_to_save of the adapter"),
]


@pytest.mark.parametrize(("given", "said"), REFUSED)
def test_what_couples_pairs_is_refused(given, said, tiny_folder, tmp_path):
    with pytest.raises(ConfigError, match=said):
        build(tiny_folder, tmp_path, **given)


def test_a_column_of_people_that_is_missing_is_refused(tiny_folder, tmp_path):
    with pytest.raises(DataError, match="train_dataset has no column person"):
        build(tiny_folder, tmp_path, privacy=dict(privacy_unit_column="person"))


def test_groups_of_several_answers_are_refused_whose_units_are_not_known(tiny_folder, tmp_path):
    own = build(tiny_folder, tmp_path / "a").data_collator

    def grouped(examples):
        batch = own(examples)
        return batch | {"row_groups": RowGroups.pairs(len(examples))}

    private = dict(target_epsilon=math.inf, expected_batch_size=4)
    with pytest.raises(ConfigError, match=r"data_collator puts groups of several answers into a batch \(row_groups\)"):
        training.build(tiny_folder, tmp_path / "b", collator=grouped, privacy=PrivacyConfig(**private))
    training.build(tiny_folder, tmp_path / "c", collator=own, privacy=PrivacyConfig(**private))


def test_policy_and_reference_are_compared_on_made_up_pairs_alone(tiny_folder, tmp_path, monkeypatch):
    """A run that stopped for the pairs of data would tell of them."""
    trainer = build(tiny_folder, tmp_path / "a")
    seen = []
    monkeypatch.setattr(preference_mixin, "check_zero_margin", lambda *given: seen.append(given))
    trainer.train()
    assert not seen
    build(tiny_folder, tmp_path / "b")
    assert len(seen) == 1
    monkeypatch.undo()
    own = RobustDPOTrainer.compute_ref_log_probs

    def of_another(self, model, inputs):
        return tuple(value - 1.0 for value in own(self, model, inputs))

    monkeypatch.setattr(RobustDPOTrainer, "compute_ref_log_probs", of_another)
    with pytest.raises(ConfigError, match="policy and reference differ by"):
        build(tiny_folder, tmp_path / "c")
    build(tiny_folder, tmp_path / "d", check_reference=False)


@pytest.mark.parametrize(
    "precomputed", [pytest.param(False, id="live"), pytest.param(True, id="precomputed", marks=pytest.mark.slow)]
)
def test_a_resumed_run_is_the_straight_one_bit_for_bit_without_noise(precomputed, tiny_folder, tmp_path):
    settings = NOISELESS | RDPO | dict(expected_batch_size=8, rows=8, max_steps=4, save_strategy="steps", save_steps=2)
    settings |= dict(per_device_train_batch_size=4, precompute_ref_log_probs=precomputed)
    resumes(METHODS["robust_dpo"], settings, 2, tiny_folder, tmp_path)
    for other, said in (
        (dict(clip_norm=0.25), "clip_norm: 1.0 there, 0.25 here"),
        (dict(expected_batch_size=4), "expected_batch_size: 8 there, 4 here"),
    ):
        with pytest.raises(ConfigError, match=said):
            METHODS["robust_dpo"].train(tiny_folder, tmp_path, **settings | other)


@pytest.mark.slow
def test_a_run_without_privacy_does_not_go_on_from_a_private_one_nor_the_reverse(tiny_folder, tmp_path):
    method = METHODS["robust_dpo"]
    plain = dict(rows=8, per_device_train_batch_size=8, save_strategy="steps", save_steps=1)
    private = plain | dict(target_epsilon=None, noise_multiplier=1.0, target_delta=0.01, expected_batch_size=8)
    method.train(tiny_folder, tmp_path / "plain", **plain)
    with pytest.raises(ConfigError, match="does not say which private steps its weights come from"):
        method.train(tiny_folder, tmp_path / "plain", resume=str(tmp_path / "plain/checkpoint-1"), **private)
    method.train(tiny_folder, tmp_path / "private", **private)
    with pytest.raises(ConfigError, match="is of a private run, and this one is not"):
        method.train(tiny_folder, tmp_path / "private", resume=str(tmp_path / "private/checkpoint-1"), **plain)


def test_a_private_runs_card_tells_its_settings_and_has_no_figures_of_its_pairs(tiny_folder, tmp_path):
    private = dict(target_epsilon=None, noise_multiplier=1.0, target_delta=0.01)
    trainer = build(tiny_folder, tmp_path, privacy=private, pair_loss="rdpo", flip_rate=0.2)
    trainer.eval_dataset = trainer.train_dataset
    runs.fit(trainer)
    trainer.evaluate()
    trainer.save_model()
    card = ModelCard.load(write_model_card(trainer))
    for part in ("2403.00409", "1607.00133", "## Privacy", "units an optimiser step", "dp-accounting"):
        assert part in card.text
    told = dict(noise_multiplier="1", clip_norm="1", expected_batch_size="4", flip_rate="0.2")
    for name, value in told.items():
        assert re.search(rf"^\| {name} +\| +{value} +\|$", card.text, re.MULTILINE), name
    assert "## Evaluation" not in card.text and "eval_loss" not in card.content
    settings = yaml.safe_load((tmp_path / "resolved_config.yaml").read_text())
    assert settings["privacy"]["noise_multiplier"] == 1.0 and settings["privacy"]["expected_batch_size"] == 4
    assert not set(FIGURES) & set(files_to_push(tmp_path, tmp_path, Destination("me/run", "org/base", {})))
