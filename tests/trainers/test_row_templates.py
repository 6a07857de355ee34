"""What a row's own columns say of its prompt reaches the trainers: system messages, tools, template settings."""

import copy

import pytest
from datasets import Dataset

from posttrain import RobustDPOConfig, RobustDPOTrainer
from posttrain.data.pairs.schema import examine_preferences
from posttrain.data.tasks.loading import load_demonstrations
from posttrain.models import tiny_model
from posttrain.trainers.policy_gradient import row_templates
from tests import rollouts, scored, training
from tests.conftest import make_pairs
from tests.data.rendering import test_ends

TEMPLATE = (
    "{%- if tools -%}<|im_start|>tools {{ tools | map(attribute='function') | map(attribute='name') | join(' ') }}"
    "<|im_end|>{%- endif -%}{%- if mood -%}<|im_start|>mood {{ mood }}<|im_end|>{%- endif -%}"
    "{%- for m in messages -%}<|im_start|>{{ m.role }} {{ m.content }}<|im_end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant {% endif -%}"
)
TOOLS = [[{"type": "function", "function": {"name": name, "parameters": {}}}] for name in ("add", "look_up")]


@pytest.fixture
def folder(tiny_folder, tokenizer, tmp_path):
    import shutil

    path = tmp_path / "model"
    shutil.copytree(tiny_folder, path)
    (path / "chat_template.jinja").unlink(missing_ok=True)
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = TEMPLATE
    changed.save_pretrained(path)
    return str(path)


def tasks(n=8):
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Add {i}."}],
            "demonstration": [{"role": "assistant", "content": f"It is {i}."}],
            "system": "Be short.",
        }
        for i in range(n)
    ]
    return Dataset.from_list(rows)


@pytest.mark.slow
def test_pairs_and_scored_answers_in_python_get_their_system_message(tiny_folder, tmp_path, tokenizer):
    pairs = make_pairs(16, system=["Be short."] * 16)
    args = RobustDPOConfig(**training.settings(tmp_path / "a"))
    trainer = RobustDPOTrainer(tiny_folder, args=args, train_dataset=pairs, eval_dataset={"e": pairs})
    for dataset in (trainer.train_dataset, trainer.eval_dataset["e"]):
        assert "system\nBe short.<|im_end|>" in tokenizer.decode(dataset[0]["prompt_ids"])
    rows = scored.make_scored(16, system=["Be short."] * 16)
    trainer = scored.build(tiny_folder, tmp_path / "b", rows)
    assert "system\nBe short.<|im_end|>" in tokenizer.decode(trainer.train_dataset[0]["input_ids"])


def test_rollouts_and_demonstrations_see_the_rows_system_tools_and_settings(folder, tmp_path, tokenizer):
    import json

    data = tasks().add_column("tools", [json.dumps(TOOLS[i % 2]) for i in range(8)])
    data = data.add_column(
        "chat_template_kwargs", [{"mood": "calm", "other": None}] * 4 + [{"mood": None, "other": 1}] * 4
    )
    seen = []

    def reward(prompts, completions, **columns):
        return [float(i % 2) for i in range(len(prompts))]

    trainer = rollouts.train(
        folder, tmp_path / "run", preset="hpt", data=data, reward=reward, made_up=False, max_steps=1,
        before=lambda trainer: watch(trainer, seen),
    )[1]  # fmt: skip
    assert trainer.state.global_step == 1
    assert len(seen) == 16
    for text in seen:
        number = int(text.split("Add ")[1].split(".")[0])
        tool = ("add", "look_up")[number % 2]
        mood = "<|im_start|>mood calm<|im_end|>" if number < 4 else ""
        assert text == (
            f"<|im_start|>tools {tool}<|im_end|>{mood}<|im_start|>system Be short.<|im_end|>"
            f"<|im_start|>user Add {number}.<|im_end|><|im_start|>assistant "
        )
    for row in trainer.train_dataset:
        assert tokenizer.decode(row["demonstration_ids"]).endswith("<|im_end|>")
        assert "tools" not in tokenizer.decode(row["demonstration_ids"])


def watch(trainer, seen):
    upstream = trainer._tokenize_prompts

    def watched(prompts):
        result = upstream(prompts)
        seen.extend(trainer.processing_class.decode(ids) for ids in result[0])
        return result

    trainer._tokenize_prompts = watched


def test_rows_without_settings_are_rendered_by_upstream_alone(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(row_templates, "tokenise", lambda *args: pytest.fail("called"))
    data = Dataset.from_list([{**row, "tools": None, "chat_template_kwargs": {"mood": None}} for row in tasks()])
    trainer = rollouts.train(
        folder,
        tmp_path / "run",
        data=data,
        reward=lambda prompts, **c: [0.5 * (i % 2) for i in range(len(prompts))],
        made_up=False,
        max_steps=1,
    )[1]
    assert trainer.state.global_step == 1
    assert trainer.tools == []


def test_the_dry_run_renders_a_tasks_tools_and_settings(folder, tmp_path):
    import json

    from posttrain import HPTConfig
    from posttrain.recipe import tasks as recipe

    data = (
        tasks()
        .add_column("tools", [json.dumps(TOOLS[0])] * 8)
        .add_column("chat_template_kwargs", [{"mood": "calm"}] * 8)
    )
    args = HPTConfig(**rollouts.settings(tmp_path / "run"))
    facts = recipe.describe(folder, args, recipe.TaskArguments(dataset_name="a"), data)
    assert facts["prompt"].startswith(
        "<|im_start|>tools add<|im_end|><|im_start|>mood calm<|im_end|><|im_start|>system Be"
    )


def test_loaded_tasks_keep_tools_and_settings(tmp_path):
    import json

    rows = [
        {"prompt": "q", "demonstration": "a", "gold": "1", "tools": TOOLS[i], "chat_template_kwargs": {"mood": "calm"}}
        for i in range(2)
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_demonstrations(str(tmp_path / "a.jsonl"))
    assert [json.loads(row["tools"]) for row in found] == TOOLS
    assert found["chat_template_kwargs"][:] == [{"mood": "calm"}] * 2


def test_a_run_with_required_ends_is_refused_before_the_model_loads(folder, tmp_path, tokenizer):
    from posttrain.errors import DataError

    args = RobustDPOConfig(**training.settings(tmp_path / "a", max_length=24, end_of_turn="require"))
    with pytest.raises(DataError, match="max_length 24 cuts off the end of answers"):
        RobustDPOTrainer(str(folder), args=args, train_dataset=long_pairs())
    assert examine_preferences(long_pairs(), tokenizer, 24).ended == 0


def long_pairs():
    rows = [
        {
            "prompt": [{"role": "user", "content": "q"}],
            "chosen": [{"role": "assistant", "content": f"{i}" * 80}],
            "rejected": [{"role": "assistant", "content": "no " * 80}],
        }
        for i in range(8)
    ]
    return Dataset.from_list(rows)


def test_end_of_turn_is_one_of_two(tmp_path):
    from posttrain.errors import ConfigError

    for config in (RobustDPOConfig, rollouts.HPTConfig, scored.ALoLConfig):
        with pytest.raises(ConfigError, match="end_of_turn is 'always'; it must be one of warn, require"):
            config(str(tmp_path), end_of_turn="always")


@pytest.mark.parametrize("family", [test_ends.GEMMA, test_ends.PHI, test_ends.LLAMA], ids=lambda family: family[0])
@pytest.mark.parametrize("as_text", [False, True])
def test_a_demonstration_ends_with_a_token_at_which_rollouts_stop(tmp_path, tokenizer, family, as_text):
    template, special, eos, bos = family
    model, changed = tiny_model(vocab_size=320), test_ends.of_family(tokenizer, template, special, eos, bos)
    # the model's own names several, the template's end of turn among them
    ends = [token for token in special if token in ("<eos>", "<end_of_turn>", "<|end|>", "<|eot_id|>", "<|eom_id|>")]
    model.generation_config.eos_token_id = changed.convert_tokens_to_ids([*ends, eos])
    model.save_pretrained(tmp_path / "model")
    changed.save_pretrained(tmp_path / "model")
    data = tasks().remove_columns("system")
    if as_text:
        data = data.map(
            lambda row: {"demonstration": row["demonstration"][0]["content"]}, remove_columns="demonstration"
        )
    args = rollouts.HPTConfig(**rollouts.settings(tmp_path / "run", max_completion_length=32))
    trainer = rollouts.HPTTrainer(str(tmp_path / "model"), rollouts.success, args, data)
    for row in trainer.train_dataset:
        ids = row["demonstration_ids"]
        assert [token in trainer.eos_token_ids for token in ids] == [False] * (len(ids) - 1) + [True]
