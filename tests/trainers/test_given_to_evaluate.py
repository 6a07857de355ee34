"""A data set given to `evaluate` is checked as the constructor's are."""

import pytest
from datasets import Dataset

from posttrain.errors import DataError
from posttrain.log import get_logger
from posttrain.recipe.tasks import TaskArguments, describe
from tests import rollouts, scored
from tests.conftest import make_pairs
from tests.trainers.test_evaluations import build
from tests.training import lora

CRITIC = {"role": "critic", "content": "Be short."}
HARD = (
    "{%- for m in messages if m.role in ('user', 'assistant') -%}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{%- endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
)


def asks(*before):
    return [*before, {"role": "user", "content": "2 + 2?"}]


def says(text="4"):
    return [{"role": "assistant", "content": text}]


def test_pairs_are_checked(tiny_folder, tmp_path):
    trainer = build(tiny_folder, tmp_path, None)
    twice = Dataset.from_list([{"prompt": asks(), "chosen": asks() + says(), "rejected": asks() + says("5")}])
    same = Dataset.from_list([{"prompt": asks(), "chosen": says(), "rejected": says()}])
    for given, name in ((twice, "eval_dataset"), ({"a": make_pairs(4), "b": twice}, "b")):
        with pytest.raises(DataError, match=f"{name}.*answers begin with the prompt"):
            trainer.evaluate(given)
    with pytest.raises(DataError, match="eval_dataset: all 1 pairs have identical sides"):
        trainer.evaluate(same)
    with pytest.raises(DataError, match="eval_dataset, row 1: the column tools holds"):
        trainer.evaluate(make_pairs(4).add_column("tools", ["{"] * 4))
    trainer.processing_class.chat_template = HARD
    lost = Dataset.from_list([{"prompt": asks(CRITIC), "chosen": says(), "rejected": says("5")}])
    said = []
    get_logger().addFilter(lambda record: said.append(record.getMessage()) or True)
    try:
        trainer.evaluate(lost)
    finally:
        get_logger().filters.pop()
    assert any("eval_dataset: the chat template drops the message of the role critic" in line for line in said)


@pytest.mark.slow
def test_sets_of_the_constructor_and_token_ids_pass(tiny_folder, tmp_path):
    trainer = build(tiny_folder, tmp_path, make_pairs(4, seed=4))
    expected = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(trainer.eval_dataset)["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.evaluate(make_pairs(4, seed=4))["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.evaluate({"a": make_pairs(4, seed=4)})["eval_a_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_scored_answers_are_checked(tiny_folder, tmp_path):
    trainer = scored.build(tiny_folder, tmp_path)
    twice = [{"prompt": asks(), "completion": asks() + says(), "reward": float(i)} for i in range(3)]
    for given in (Dataset.from_list(twice), {"a": Dataset.from_list(twice)}):
        with pytest.raises(DataError, match="answers begin with the prompt|takes a turn"):
            trainer.evaluate(given)
    with pytest.raises(DataError, match="the column tools holds"):
        trainer.evaluate(Dataset.from_list([row | {"completion": says(), "tools": "{"} for row in twice]))


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
def test_tasks_are_checked(tiny_folder, tmp_path):
    kind, config = rollouts.PRESETS["qae"]
    trainer = kind(
        tiny_folder,
        rollouts.success,
        config(**rollouts.settings(tmp_path, per_device_eval_batch_size=4)),
        rollouts.prompts([1, 0, 4, 2]),
        peft_config=lora(),
        rollout_func=rollouts.rollouts,
    )
    for given in ({"prompt": asks() + says("It is")}, {"prompt": asks(), "tools": "{"}):
        with pytest.raises(DataError, match="ends with words of the assistant|the column tools holds"):
            trainer.evaluate(Dataset.from_list([given] * 4))
        with pytest.raises(DataError, match="ends with words of the assistant|the column tools holds"):
            trainer.evaluate({"a": Dataset.from_list([given] * 4)})


@pytest.mark.parametrize("given", [{"prompt": asks() + says("It is")}, {"prompt": asks(), "tools": "{"}])
@pytest.mark.parametrize("named", [False, True])
def test_tasks_for_evaluation_are_checked_at_construction_and_in_the_dry_run(tiny_folder, tmp_path, given, named):
    kind, config = rollouts.PRESETS["qae"]
    args = config(**rollouts.settings(tmp_path, per_device_eval_batch_size=4))
    bad, good = Dataset.from_list([given] * 4), rollouts.prompts([1, 0, 4, 2])
    with pytest.raises(DataError, match="ends with words of the assistant|the column tools holds"):
        kind(tiny_folder, rollouts.success, args, good, {"a": bad} if named else bad)
    if not named:
        task_args = TaskArguments(dataset_name="a")
        with pytest.raises(DataError, match="eval_dataset.*(ends with words of the assistant|the column tools holds)"):
            describe(tiny_folder, args, task_args, good, eval_dataset=bad)
        assert describe(tiny_folder, args, task_args, good, eval_dataset=good)["training tasks"] == 4
