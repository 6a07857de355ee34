"""Environments and tools: prompts that an environment owns, turns with tool calls, and evaluation on both."""

from pathlib import Path

import pytest
import trl
from datasets import Dataset, IterableDataset
from trl import GRPOTrainer

from posttrain import HPTTrainer, PolicyGradientConfig, PolicyGradientTrainer, QAETrainer
from posttrain.adapters.gift_sw import GiftSWConfig
from posttrain.errors import ConfigError, DataError
from posttrain.models import byte_tokenizer, tiny_model
from tests import rollouts
from tests.rollouts import entries

CALL = '<tool_call>\n{"name": "add", "arguments": {"by": 3}}\n</tool_call>'


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


class Counter:
    """Asks for a number, and pays what was added up."""

    resets: list = []

    def reset(self, **row) -> str:
        self.total = 0
        Counter.resets.append(row)
        return "Count to 3."

    def add(self, by: int) -> int:
        """Add to the total.

        Args:
            by: how much.

        Returns:
            The total.
        """
        self.total += by
        return self.total

    def get_reward(self) -> float:
        return float(self.total == 3)


@pytest.fixture
def counter():
    Counter.resets = []
    return Counter


def chat_tokenizer():
    tokenizer = byte_tokenizer("<|pad|>")
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text()
    return tokenizer


def build(output_dir, data=None, kind=QAETrainer, config=None, reward=None, calls=True, sets=None, **fields):
    """A trainer of whose rollouts every second one calls the tool, and then stops."""
    given = {name: fields.pop(name) for name in ("environment_factory", "tools", "peft_config") if name in fields}
    fields = rollouts.settings(
        output_dir, max_completion_length=400, per_device_eval_batch_size=4, max_steps=1, gradient_accumulation_steps=2,
        **fields,
    )  # fmt: skip
    tokenizer = chat_tokenizer()
    trainer = kind(
        tiny_model(),
        reward,
        (config or kind._config_class)(**fields),
        data,
        sets,
        processing_class=tokenizer,
        **given,
    )
    said = []

    def turn(prompt_ids, images, multimodal, num_generations, has_tool_images=False):
        texts = [tokenizer.decode(ids) for ids in prompt_ids]
        said.extend(texts)
        answers = [
            CALL if i % 2 == 0 and "<tool_response>" not in text and calls else "no" for i, text in enumerate(texts)
        ]
        ids = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
        return [[*one, tokenizer.eos_token_id] for one in ids], None

    trainer._generate_single_turn = turn
    trainer.prompts_seen = said
    return trainer


def asked(n=4, **columns):
    rows = [{"prompt": [{"role": "user", "content": f"Row {i}: "}], "level": i} for i in range(n)]
    return Dataset.from_list([row | columns for row in rows])


DATA = {
    "none": lambda: None,
    "no prompts": lambda: asked().remove_columns("prompt"),
    "prompts": asked,
    "stream": lambda: asked().to_iterable_dataset(),
}


@pytest.mark.slow
@pytest.mark.parametrize("data", DATA, ids=[name.replace(" ", "_") for name in DATA])
@pytest.mark.parametrize("kind", [PolicyGradientTrainer, QAETrainer])
def test_an_environment_may_own_prompts_and_rewards(tmp_path, counter, kind, data):
    trainer = build(tmp_path, DATA[data](), kind, environment_factory=counter, num_generations=4)
    trainer.train()
    row = entries(trainer)[0]
    assert row["rewards/Counter/mean"] == row["rollouts/pass_at_1"] == row["tools/call_frequency"] == 0.5
    assert len(counter.resets) == 8 and all("Count to 3." in text for text in trainer.prompts_seen)
    columns = {"none": {"prompt"}, "no prompts": {"level"}}.get(data, {"prompt", "level"})
    assert set(counter.resets[0]) == columns
    assert row["grad_norm"] > 0 and row["rows/kept_share"] > 0


def test_an_adapter_is_calibrated_on_the_prompts_of_an_environment_as_they_are(tmp_path, counter):
    adapter = GiftSWConfig(r=4, target_modules=["q_proj"], calibration_rows=2)
    trainer = build(tmp_path, asked(), environment_factory=counter, num_generations=4, peft_config=adapter)
    assert len(trainer.model.peft_config["default"].salient) == 2 and not counter.resets
    assert trainer.environment_factories is not None


@pytest.mark.slow
def test_dead_rows_of_several_turns_are_dropped_without_a_change_of_the_gradient(tmp_path, counter):
    norms = []
    for name, fields in (
        ("ours", {}),
        ("all", dict(drop_zero_advantage_rows=False, prefix_sharing="never")),
        ("trl", dict(kind=GRPOTrainer, config=trl.GRPOConfig)),
    ):
        reward = None
        fields = {"kind": PolicyGradientTrainer} | fields
        trainer = build(
            tmp_path / name, asked(), reward=reward, environment_factory=counter, scale_rewards="none", **fields
        )
        score = iter([1.0, 0.0, 0.0, 0.0] + [0.0] * 4)
        trainer.reward_funcs[0] = lambda environments, score=score, **_: [next(score) for _ in environments]
        trainer.train()
        norms.append(entries(trainer)[0]["grad_norm"])
    assert norms[1] == norms[2] > 0
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_demonstrations_stand_beside_turns_with_tools(tmp_path, counter):
    data = asked(demonstration="It is 3.")
    trainer = build(tmp_path, data, HPTTrainer, environment_factory=counter, calls=False, num_generations=4)
    trainer.train()
    row = entries(trainer)[0]
    assert row["hpt/frac_sft_prompts"] == 1 and row["hpt/sft_nll"] > 1


def test_tools_of_ones_own_are_used_in_training_and_evaluation(tmp_path):
    def add(by: int) -> int:
        """Add to nothing.

        Args:
            by: how much.

        Returns:
            As much.
        """
        added.append(by)
        return by

    def called(completions, **columns):
        return [float(any(turn["role"] == "tool" for turn in one)) for one in completions]

    added = []
    trainer = build(tmp_path, asked(), reward=called, sets=asked(3), tools=[add], num_generations=4)
    trainer.train()
    assert entries(trainer)[0]["rewards/called/mean"] == 0.5 and len(added) == 4
    metrics = trainer.evaluate()
    # three prompts in a batch of four: rows 0 and 2 call
    assert metrics["eval_greedy_success"] == pytest.approx(2 / 3)


def test_greedy_evaluation_resets_environments_and_leaves_nothing_behind(tmp_path, counter):
    def told(environments, log_extra, log_metric, **columns):
        log_extra("total", [one.total for one in environments])
        log_metric("seen", float(len(environments)))
        return [0.0] * len(environments)

    data = asked(3)
    sets = {"a": data, "b": data.select(range(2))}
    trainer = build(tmp_path, asked(), reward=told, sets=sets, environment_factory=counter, num_generations=4)
    trainer.train()
    counter.resets = []
    before = {name: list(rows) for name, rows in trainer._logs["rewards"].items()}
    metrics = trainer.evaluate()
    # 3 and 2 prompts: four samples of each, then one each, in whole batches of four
    assert len(counter.resets) == 12 + 4 + 8 + 4
    assert metrics["eval_a_greedy_success"] == pytest.approx(2 / 3) and metrics["eval_b_greedy_success"] == 0.5
    assert metrics["eval_a_seen"] == 4, "a batch of samples"
    assert not trainer._pending_metrics and not trainer._pending_extra_logs and not trainer._metrics["eval"]
    assert {name: list(rows) for name, rows in trainer._logs["rewards"].items()} == before
    assert trainer.num_generations_eval == 4 and trainer.generation_config.do_sample


@pytest.mark.slow
def test_several_environments_are_told_apart_by_row(tmp_path, counter):
    class Other(Counter):
        def reset(self, **row) -> str:
            super().reset(**row)
            return "Count to 4."

    data = Dataset.from_list([{"environment": name} for name in ("one", "two") * 2])
    trainer = build(tmp_path, data, environment_factory={"one": Counter, "two": Other}, sets=data, num_generations=4)
    trainer.train()
    assert "eval_greedy_success" in trainer.evaluate()
    assert {text.partition("Count to ")[2][0] for text in trainer.prompts_seen} == {"3", "4"}
    with pytest.raises(ConfigError, match="requires a `train_dataset` with an `environment` column"):
        build(tmp_path / "none", None, environment_factory={"one": Counter, "two": Other})


def test_prompts_are_still_asked_for_without_an_environment(tmp_path):
    with pytest.raises(DataError, match="train_dataset has no column 'prompt'"):
        build(tmp_path, asked().remove_columns("prompt"), reward=rollouts.success)


@pytest.mark.parametrize("given", ["environment_factory", "tools"])
def test_prompts_of_plain_text_are_refused_where_answers_are_turns(tmp_path, counter, given):
    data = Dataset.from_list([{"prompt": "Row"}] * 4)
    tool = {"environment_factory": counter, "tools": [counter.add]}[given]
    with pytest.raises(DataError, match="train_dataset, row 1: the prompt is a text.*list of messages"):
        build(tmp_path, data, reward=rollouts.success, **{given: tool})


def test_an_environment_given_by_its_place_is_seen(tmp_path, counter):
    args = PolicyGradientConfig(**rollouts.settings(tmp_path))
    rest = (None, None, (None, None), None, None, None, None, counter)
    trainer = PolicyGradientTrainer(tiny_model(), None, args, None, None, chat_tokenizer(), *rest)
    assert trainer.reward_func_names == ["Counter"] and not isinstance(trainer.train_dataset, IterableDataset)
