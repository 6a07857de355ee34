"""An evaluation's results: each set's under its own name, every row in `compute_metrics`."""

import json

import numpy as np
import pytest
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from posttrain import QAEConfig, RobustDPOConfig, RobustDPOTrainer
from posttrain.errors import ConfigError
from tests import rollouts, scored
from tests.conftest import make_pairs
from tests.training import lora, settings

PARENT = dict(trainer_class=DPOTrainer, config_class=DPOConfig)


def swapped(pairs):
    return pairs.rename_columns({"chosen": "rejected", "rejected": "chosen"})


def build(folder, output_dir, sets, trainer_class=RobustDPOTrainer, config_class=RobustDPOConfig, seen=None, **fields):
    return trainer_class(
        folder,
        args=config_class(**settings(output_dir, per_device_eval_batch_size=2, use_cpu=True, bf16=False, **fields)),
        train_dataset=make_pairs(16),
        eval_dataset=sets,
        peft_config=lora(),
        compute_metrics=seen,
    )


def dpo(folder, output_dir, **fields):
    pairs = make_pairs(5, seed=4)
    trainer = build(folder, output_dir, {"easy": pairs, "hard": swapped(pairs)}, **fields)
    return trainer, "rewards/margins", lambda sets: sets["easy"] == pytest.approx(-sets["hard"], rel=1e-4)


def a_lol(folder, output_dir, **fields):
    rows = scored.make_scored(8, seed=4)
    low, high = (rows.map(lambda row, by=by: {"reward": row["reward"] * by}) for by in (0.5, 1.0))
    fields = dict(variant="a_lol", per_device_eval_batch_size=3) | fields
    trainer = scored.build(folder, output_dir, eval_dataset={"easy": low, "hard": high}, **fields)
    return trainer, "rewards/mean", lambda sets: sets["easy"] == pytest.approx(sets["hard"] / 2, rel=1e-4)


def policy(folder, output_dir, **fields):
    rows = [rollouts.prompts([n, n], demonstrations=False) for n in (3, 1)]
    kind, config = rollouts.PRESETS["qae"]
    fields = rollouts.settings(output_dir, per_device_eval_batch_size=4, **fields)
    trainer = kind(
        folder,
        rollouts.success,
        config(**fields),
        rollouts.prompts([1, 0, 4, 2, 0, 3, 0, 1]),
        {"easy": rows[0], "hard": rows[1]},
        peft_config=lora(),
        rollout_func=rollouts.rollouts,
    )
    return trainer, "rollouts/pass_at_1", lambda sets: sets == {"easy": 0.75, "hard": 0.25}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.mark.slow
@pytest.mark.parametrize("family", [dpo, a_lol, policy])
def test_each_set_has_its_metrics_under_its_name_wherever_they_are_told(tiny_folder, tmp_path, family):
    trainer, name, as_expected = family(
        tiny_folder, tmp_path, eval_strategy="steps", eval_steps=2, max_steps=2, logging_steps=2
    )
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    told = [trainer.evaluate(), *({k: v for row in rows_ for k, v in row.items()} for rows_ in (
        trainer.state.log_history[-2:], [row for row in rows if any(key.startswith("eval_") for key in row)]
    ))]  # fmt: skip
    for values in told:
        assert as_expected({key: values[f"eval_{key}_{name}"] for key in ("easy", "hard")})
        nameless = [
            key for key in values if key.startswith("eval_") and not key.startswith(("eval_easy_", "eval_hard_"))
        ]
        assert not nameless
    assert trainer._metrics["eval"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("best, step", [("hard_rewards/accuracies", 1), ("eval_easy_rewards/accuracies", 3)])
def test_the_best_model_is_that_of_the_set_that_is_named(tiny_folder, tmp_path, monkeypatch, best, step):
    pairs = make_pairs(16)
    sets = {"easy": pairs.select(range(4)), "hard": swapped(pairs).select(range(4))}
    run = dict(eval_strategy="steps", save_strategy="steps", eval_steps=1, save_steps=1, max_steps=3)
    trainer = build(tiny_folder, tmp_path, sets, load_best_model_at_end=True, metric_for_best_model=best, **run)
    # the easy set is evaluated first
    shares = iter([0.25, 0.75, 0.5, 0.5, 0.75, 0.25])

    def finish(metrics, mode):
        if mode == "eval":
            metrics["rewards/accuracies"] = next(shares)

    monkeypatch.setattr(trainer, "finish_metrics", finish)
    trainer.train()
    assert (trainer.state.best_global_step, trainer.state.best_metric) == (step, pytest.approx(0.75))


@pytest.mark.parametrize(
    "build_it, sets",
    [
        (lambda folder, out, sets, **f: build(folder, out, sets, **f), make_pairs(4)),
        (lambda folder, out, sets, **f: scored.build(folder, out, eval_dataset=sets, **f), scored.make_scored(4)),
        (
            lambda folder, out, sets, **f: rollouts.PRESETS["qae"][0](
                folder, rollouts.success, QAEConfig(**rollouts.settings(out, **f)), rollouts.prompts([1] * 8), sets
            ),
            rollouts.prompts([1]),
        ),
    ],
    ids=["dpo", "a_lol", "qae"],
)
def test_a_best_metric_of_no_set_is_refused_before_the_model_loads(tiny_folder, tmp_path, monkeypatch, build_it, sets):
    run = dict(eval_strategy="steps", save_strategy="steps", load_best_model_at_end=True)
    with pytest.raises(ConfigError, match="`metric_for_best_model: eval_a_loss`"):
        build_it(tiny_folder, tmp_path, {"a": sets, "b": sets}, **run)


@pytest.mark.slow
def test_a_set_given_to_evaluate_and_a_prediction_carry_their_prefix(tiny_folder, tmp_path):
    trainer = build(tiny_folder, tmp_path, None)
    pairs = make_pairs(3, seed=9)
    found = trainer.evaluate({"a": pairs, "b": swapped(pairs)})
    assert found["eval_a_rewards/margins"] == pytest.approx(-found["eval_b_rewards/margins"], abs=2e-5)
    found = trainer.evaluate(pairs, metric_key_prefix="test")
    assert "test_rewards/margins" in found and "eval_rewards/margins" not in found
    prepared = trainer._prepare_dataset(pairs, trainer.processing_class, trainer.args, "c")
    metrics = trainer.predict(prepared).metrics
    assert metrics["test_logps/chosen"] == pytest.approx(found["test_logps/chosen"])
    # nothing of a prediction is left for the next evaluation
    assert trainer.evaluate(swapped(pairs))["eval_logps/chosen"] == pytest.approx(found["test_logps/rejected"])


@pytest.mark.slow
def test_an_evaluation_that_breaks_off_leaves_nothing_for_the_next(tiny_folder, tmp_path, monkeypatch):
    pairs = make_pairs(4, seed=9)
    trainer = build(tiny_folder, tmp_path, None)
    whole = trainer.evaluate(pairs)
    calls, inner = [], trainer.compute_loss

    def breaks(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return inner(*args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", breaks)
    with pytest.raises(KeyboardInterrupt):
        trainer.evaluate(swapped(pairs))
    again = trainer.evaluate(pairs)
    names = [name for name in whole if "/" in name]
    assert len(names) > 5 and all(again[name] == whole[name] for name in names)


def rows_of(folder, output_dir, pairs, sets=None, **fields):
    """What `compute_metrics` was given: (predictions, labels) of each call."""
    seen = []

    def note(prediction, compute_result=True):
        seen.append((prediction.predictions, prediction.label_ids, compute_result))
        return {"calls": len(seen)}

    trainer = build(folder, output_dir, sets if sets is not None else pairs, seen=note, **fields)
    return trainer.evaluate(), seen, trainer


def answers(labels) -> set[tuple]:
    return {tuple(int(id) for id in row if id >= 0) for row in np.asarray(labels)}


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
def test_full_batches_are_handed_to_compute_metrics_as_trl_hands_them(tiny_folder, tmp_path):
    pairs = make_pairs(4)
    _, ours, _ = rows_of(tiny_folder, tmp_path / "ours", pairs, prefix_sharing="never")
    _, trls, _ = rows_of(tiny_folder, tmp_path / "trl", pairs, **PARENT)
    for mine, theirs in zip(ours[0][:2], trls[0][:2], strict=True):
        assert np.array_equal(mine, theirs)


@pytest.mark.core("3")
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_compute_metrics_sees_both_answers_of_every_pair(tiny_folder, tmp_path, rows):
    pairs = make_pairs(rows, seed=2)
    metrics, ((predictions, labels, _),), trainer = rows_of(
        tiny_folder, tmp_path, pairs, include_for_metrics=["inputs"]
    )
    assert len(predictions) == len(labels) == 2 * rows and metrics["eval_calls"] == 1
    tokenised = trainer.eval_dataset
    wanted = [row["prompt_ids"] + row[side] for row in tokenised for side in ("chosen_ids", "rejected_ids")]
    pad = trainer.processing_class.pad_token_id
    found = sorted([int(id) for id in row if id not in (-100, pad)] for row in labels)
    assert found == sorted([id for id in ids if id != pad] for ids in wanted)


@pytest.mark.slow
def test_batches_and_lists_of_compute_metrics_are_whole_too(tiny_folder, tmp_path):
    pairs = make_pairs(5, seed=2)
    metrics, seen, _ = rows_of(tiny_folder, tmp_path / "a", pairs, batch_eval_metrics=True)
    assert [len(predictions) for predictions, _, _ in seen] == [4, 4, 2]
    assert [last for *_, last in seen] == [False, False, True] and metrics["eval_calls"] == 3
    _, ((predictions, labels, _),), _ = rows_of(tiny_folder, tmp_path / "b", pairs, eval_do_concat_batches=False)
    assert [len(part) for part in predictions] == [len(part) for part in labels] == [4, 4, 2]
    metrics, seen, _ = rows_of(tiny_folder, tmp_path / "c", pairs, {"one": pairs, "two": pairs.select(range(3))})
    assert [len(predictions) for predictions, _, _ in seen] == [10, 6]
    assert (metrics["eval_one_calls"], metrics["eval_two_calls"]) == (1, 2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
def test_compute_metrics_sees_every_scored_answer(tiny_folder, tmp_path):
    rows, seen = scored.make_scored(5), []
    plain = rows.remove_columns("reward")
    for kind in ("ours", "trl"):
        where = dict(per_device_eval_batch_size=2, use_cpu=True, bf16=False, gradient_checkpointing=False)
        if kind == "trl":
            where |= dict(trainer_class=SFTTrainer, config_class=SFTConfig, rows=scored.make_scored(16))
        trainer = scored.build(tiny_folder, tmp_path / kind, eval_dataset=rows if kind == "ours" else plain, **where)
        trainer.compute_metrics = lambda prediction: seen.append(prediction) or {"rows": len(prediction.label_ids)}
        assert trainer.evaluate()["eval_rows"] == 5
    assert np.array_equal(seen[0].label_ids, seen[1].label_ids)
    np.testing.assert_allclose(seen[0].predictions, seen[1].predictions, atol=1e-5)


@pytest.mark.slow
def test_preprocessed_predictions_keep_a_row_for_each_answer(tiny_folder, tmp_path):
    pairs, seen = make_pairs(3, seed=2), []
    trainer = build(tiny_folder, tmp_path, pairs, seen=lambda prediction: seen.append(prediction) or {})
    trainer.preprocess_logits_for_metrics = lambda logits, labels: (logits.argmax(-1), logits.mean(dim=(1, 2)))
    trainer.evaluate()
    tokens, means = seen[0].predictions
    assert len(tokens) == len(means) == len(seen[0].label_ids) == 6
