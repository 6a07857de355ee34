"""What trainers learn is what the rows say: the tokens in their data sets against the rows that they were given."""

import copy

import pytest
from datasets import Dataset

from posttrain import ALoLConfig, ALoLTrainer, RobustDPOConfig, RobustDPOTrainer
from posttrain.data import objects
from posttrain.data.tokens import tokenized_pairs
from posttrain.errors import DataError
from posttrain.models import byte_tokenizer
from tests import rollouts, scored, training

TOOLS = (
    "{%- if tools -%}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{%- endif -%}"
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{{ (m.tool_calls | tojson) if m.tool_calls else '' }}<|im_end|>\n{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
)


def user(content):
    return {"role": "user", "content": content}


def says(content, **keys):
    return {"role": "assistant", "content": content, **keys}


def call(name, **arguments):
    return says("", tool_calls=[{"type": "function", "function": {"name": name, "arguments": arguments}}])


def tool(name, **properties):
    return {"type": "function", "function": {"name": name, "parameters": properties}}


def rows():
    """As Arrow has them: tools and calls with the keys of all others, as null; blocks; words to go on with."""
    pairs = [
        (
            [user("Weather?")],
            call("weather", town="Lyon"),
            says("No idea."),
            [tool("weather", town={"type": "string"})],
        ),
        ([user("Add 2 and 3")], call("add", left=2, right=3), says("6"), [tool("add", left={"type": "integer"})]),
        ([user("2 + 2?"), says("It is")], says(" 4."), says(" 5."), None),
    ]
    made = [{"prompt": p, "chosen": [c], "rejected": [r], "tools": t} for p, c, r, t in pairs]
    return Dataset.from_list(made)


@pytest.fixture
def tools_tokenizer():
    tokenizer = byte_tokenizer("<|pad|>")
    tokenizer.chat_template = TOOLS
    return tokenizer


def test_pairs_are_trained_on_as_they_were_written(tiny_folder, tmp_path, tools_tokenizer):
    trainer = RobustDPOTrainer(
        model=tiny_folder,
        args=RobustDPOConfig(**training.settings(tmp_path, max_length=None)),
        train_dataset=rows(),
        eval_dataset={"some": rows().select([1, 2])},
        processing_class=tools_tokenizer,
        peft_config=training.lora(),
    )
    read = tools_tokenizer.decode
    seen = [[read(row[k]) for k in ("prompt_ids", "chosen_ids", "rejected_ids")] for row in trainer.train_dataset]
    assert '"parameters": {"town": {"type": "string"}}' in seen[0][0]
    assert '"arguments": {"town": "Lyon"}' in seen[0][1]
    assert '"arguments": {"left": 2, "right": 3}' in seen[1][1]
    assert "null" not in str(seen)
    assert seen[2][0].endswith("<|im_start|>assistant\nIt is")
    assert [side.split("<")[0] for side in seen[2][1:]] == [" 4.", " 5."]
    checked = list(tokenized_pairs(rows(), tools_tokenizer))
    assert [row["chosen_ids"] for row in checked] == trainer.train_dataset["chosen_ids"][:]
    assert trainer.eval_dataset["some"]["prompt_ids"][:] == [row["prompt_ids"] for row in checked[1:]]
    given = trainer.evaluate(rows().select([2]))
    assert given["eval_logps/chosen"] == pytest.approx(trainer.evaluate(rows().select([2]))["eval_logps/chosen"])


@pytest.mark.slow
def test_a_row_whose_words_fill_max_length_is_dropped_as_any_other(tiny_folder, tmp_path, tools_tokenizer):
    length = len(next(tokenized_pairs(rows().select([2]), tools_tokenizer))["prompt_ids"])
    for max_length, kept in ((length, 1), (length + 1, 2)):
        short = Dataset.from_list([{"prompt": [user("2")], "chosen": [says("4")], "rejected": [says("5")]}])
        pairs = objects.exact([*short, *(row | {"tools": None} for row in rows().select([2]))])
        trainer = RobustDPOTrainer(
            model=tiny_folder,
            args=RobustDPOConfig(**training.settings(tmp_path / str(kept), max_length=max_length)),
            train_dataset=pairs,
            processing_class=tools_tokenizer,
            peft_config=training.lora(),
        )
        assert len(trainer.train_dataset) == kept


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning")
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_answers_are_trained_on_as_they_were_written(tiny_folder, tmp_path, tools_tokenizer, known, mode):
    answers = rows().remove_columns("rejected").rename_column("chosen", "completion")
    answers = answers.add_column("reward", [0.1, 0.5, 1.0])
    (tmp_path / "template.jinja").write_text(TOOLS)
    later = {} if known else {"chat_template_path": str(tmp_path / "template.jinja")}
    settings = scored.settings(tmp_path, variant="nll", max_length=1000 if mode == "keep_start" else 20, **later)
    trainer = ALoLTrainer(
        model=tiny_folder,
        args=ALoLConfig(**settings, truncation_mode=mode),
        train_dataset=answers,
        processing_class=tools_tokenizer,
        peft_config=training.lora(),
    )
    learned = [
        tools_tokenizer.decode([token for token in row["labels"] if token != -100]) for row in trainer.train_dataset
    ]
    assert learned[2].split("<")[0] == " 4."
    assert all("null" not in tools_tokenizer.decode(row["input_ids"]) for row in trainer.train_dataset)
    if mode == "keep_start":
        assert '"arguments": {"left": 2, "right": 3}' in learned[1]
        assert trainer.train_dataset["prompt"][2] == [user("2 + 2?"), says("It is")]


BLOCKS = [{"role": "user", "content": [{"type": "text", "text": "Name "}, {"type": "text", "text": "a river."}]}]


def tasks(prompt, demonstration="The Loire."):
    return Dataset.from_list([{"prompt": prompt, "demonstration": [says(demonstration)], "gold": "1"}] * 4)


def test_rollouts_begin_with_the_text_of_the_blocks(tiny_folder, tmp_path):
    trainer = rollouts.QAETrainer(
        model=tiny_folder,
        reward_funcs=rollouts.success,
        args=rollouts.QAEConfig(**rollouts.settings(tmp_path)),
        train_dataset=tasks(BLOCKS),
        eval_dataset={"some": tasks(BLOCKS)},
    )
    for dataset in (trainer.train_dataset, trainer.eval_dataset["some"]):
        assert dataset[0]["prompt"] == [user("Name a river.")]


@pytest.mark.parametrize(
    ("prompt", "demonstration", "message"),
    [
        ([user("2 + 2?"), says("It is")], " 4.", "row 1: the prompt ends with words of the assistant"),
        ([user([{"type": "image"}])], "The Loire.", "cannot be turned into tokens|drops|Python"),
    ],
)
def test_tasks_whose_prompts_cannot_be_seen_are_refused(tiny_folder, tmp_path, prompt, demonstration, message):
    with pytest.raises(DataError, match=message):
        rollouts.HPTTrainer(
            model=tiny_folder,
            reward_funcs=rollouts.success,
            args=rollouts.HPTConfig(**rollouts.settings(tmp_path)),
            train_dataset=tasks(prompt, demonstration),
        )


def test_a_dropped_instruction_of_a_task_is_said(tiny_folder, tmp_path, tokenizer, logged):
    deaf = copy.deepcopy(tokenizer)
    deaf.chat_template = tokenizer.chat_template.replace(
        "{%- for message in messages -%}", "{%- for message in messages if message.role != 'developer' -%}"
    )
    rollouts.QAETrainer(
        model=tiny_folder,
        reward_funcs=rollouts.success,
        args=rollouts.QAEConfig(**rollouts.settings(tmp_path)),
        train_dataset=tasks([{"role": "developer", "content": "In French."}, user("Name a river.")]),
        processing_class=deaf,
    )
    assert "train_dataset: the chat template drops the message of the role developer, in 4 of 4 tasks" in logged.text
