"""Texts with the chat template applied end once, also where the end of a turn is not the end of sequence."""

import pytest
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from posttrain import ALoLConfig, ALoLTrainer, RobustDPOConfig, RobustDPOTrainer
from posttrain.data import formats, objects
from posttrain.data.pairs.schema import examine_preferences
from posttrain.data.rendering import applied, closers, row_checks
from posttrain.data.rendering.ends import Closing
from posttrain.data.tokens import sequences, tokenized_pairs
from posttrain.errors import DataError
from posttrain.models import byte_tokenizer
from tests import scored, training
from tests.data.conversations import TEMPLATES

OTHERS = ("<eos>", "<end_of_turn>", "<start_of_turn>", "<over>")
CLOSED_OVER = "{%- for m in messages -%}{{ m.role }}: {{ m.content }}<over>\n{%- endfor -%}"


def with_end(eos="<eos>", template=None):
    tokenizer = byte_tokenizer("<|pad|>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(OTHERS)}, replace_extra_special_tokens=False)
    tokenizer.add_special_tokens({"eos_token": eos})
    tokenizer.chat_template = template
    return tokenizer


def trained(tokenizer, chosen, rejected="No", **columns):
    row = {"prompt": "Hi. ", "chosen": chosen, "rejected": rejected, **columns}
    (tokens,) = tokenized_pairs(objects.exact([row]), tokenizer)
    return [tokenizer.decode(tokens[name]) for name in ("chosen_ids", "rejected_ids")]


@pytest.mark.parametrize("name", ["gemma3", "gemma", None])
@pytest.mark.parametrize("behind", ["", "\n", " \n\n", "<end_of_turn>\n"])
def test_no_end_of_sequence_stands_behind_an_end_of_turn(name, behind):
    tokenizer = with_end(template=name and (TEMPLATES / f"{name}.jinja").read_text())
    assert trained(tokenizer, f"Yes<end_of_turn>{behind}", "No<end_of_turn>") == ["Yes<end_of_turn>", "No<end_of_turn>"]
    assert trained(tokenizer, f"Yes<end_of_turn>{behind}", "No") == ["Yes<end_of_turn>", "No<eos>"]


def test_the_template_tells_what_ends_a_turn():
    assert "<over>" in closers.closers(with_end(template=CLOSED_OVER), applied.control_tokens(with_end()))
    assert trained(with_end(template=CLOSED_OVER), "Yes<over>\n") == ["Yes<over>", "No<eos>"]
    # without it, a token of no known meaning is part of the text
    assert trained(with_end(), "Yes<over>\n") == ["Yes<over>\n<eos>", "No<eos>"]


def ending_itself():
    tokenizer = with_end()
    end = ("<eos>", tokenizer.eos_token_id)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[end])
    return tokenizer


@pytest.mark.parametrize(("text", "ends"), [("Yes", "Yes<eos>"), ("Yes<eos>", "Yes<eos>"), ("Yes<end_of_turn>", None),
                                            ("Yes<eos><eos>\n", "Yes<eos>")])  # fmt: skip
def test_a_tokenizer_that_appends_its_end_ends_texts_once(text, ends):
    assert trained(ending_itself(), text) == [ends or text, "No<eos>"]
    # as TRL, which leaves the blank to the answers
    whole = {"chosen": f"Hi.{text}", "rejected": "Hi.No"}
    (tokens,) = tokenized_pairs(objects.exact([whole]), ending_itself())
    assert ending_itself().decode(tokens["chosen_ids"]) == (ends or text)
    if text == "Yes":
        (row,) = sequences({"text": "Yes"}, formats.detect(["text"], {"text": "Yes"}), ending_itself())
        assert ending_itself().decode(row.ids) == "Yes<eos>"


def test_rollouts_from_prompts_that_the_tokenizer_ends_are_said():
    found = row_checks.check(Dataset.from_list([{"prompt": "Name a river:"}]), ending_itself(), "data")
    assert any("rollouts begin behind an end" in warning for warning in found.warnings)
    found = row_checks.check(Dataset.from_list([{"prompt": "Name a river:"}]), with_end(), "data")
    assert found.warnings == []


@pytest.mark.parametrize("chosen", ["Yes<|im_end|>", "Yes<|im_end|>\n"])
def test_chatml_ends_once_under_another_end_of_sequence(chosen):
    assert trained(with_end(), chosen, "No<eos><eos>") == ["Yes<|im_end|>", "No<eos>"]


def test_an_end_of_sequence_that_was_written_behind_the_turn_stays():
    assert trained(with_end(), "Yes<end_of_turn>\n<eos>") == ["Yes<end_of_turn>\n<eos>", "No<eos>"]


def test_texts_without_an_end_get_one_and_stay_where_they_are():
    rows = Dataset.from_list([{"prompt": "Hi. ", "chosen": "A <end_of_turn> b ", "rejected": "No"}])
    assert applied.without_doubles(rows, with_end()) is rows
    assert trained(with_end(), "A <end_of_turn> b ") == ["A <end_of_turn> b <eos>", "No<eos>"]


def test_a_text_of_its_own_ends_once():
    found = formats.detect({"text": "Yes<end_of_turn>\n"}, {"text": ""})
    for text, end in (("Yes<end_of_turn>\n", "Yes<end_of_turn>"), ("Yes", "Yes<eos>")):
        (part,) = sequences({"text": text}, found, with_end())
        assert with_end().decode(part.ids) == end


@pytest.mark.parametrize("stream", [False, True])
def test_pairs_are_trained_without_a_second_end(tiny_folder, tmp_path, stream):
    tokenizer = with_end("<|pad|>")
    rows = [
        {"prompt": f"{i}. ", "chosen": "Yes<|im_end|>\n", "rejected": ("No<|im_end|>", "No")[i % 2]} for i in (0, 1)
    ]
    rows = Dataset.from_list(rows)
    trainer = RobustDPOTrainer(
        model=tiny_folder,
        args=RobustDPOConfig(**training.settings(tmp_path, max_steps=1)),
        train_dataset=rows.to_iterable_dataset() if stream else rows,
        processing_class=tokenizer,
        peft_config=training.lora(),
    )
    seen = [[tokenizer.decode(row[side]) for side in ("chosen_ids", "rejected_ids")] for row in trainer.train_dataset]
    assert seen == [["Yes<|im_end|>", "No<|im_end|>"], ["Yes<|im_end|>", "No<|pad|>"]]
    assert closers.COLUMN not in next(iter(trainer.train_dataset))


def test_answers_are_trained_without_a_second_end(tiny_folder, tmp_path):
    tokenizer = with_end("<|pad|>")
    ends = ("<|im_end|>\n", "<|im_end|>", "")
    rows = [{"prompt": "Hi. ", "completion": f"Yes{end}", "reward": float(i)} for i, end in enumerate(ends)]
    trainer = ALoLTrainer(
        model=tiny_folder,
        args=ALoLConfig(**scored.settings(tmp_path, variant="nll")),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=training.lora(),
    )
    learned = [tokenizer.decode([token for token in row["labels"] if token != -100]) for row in trainer.train_dataset]
    assert sorted(learned) == ["Yes<|im_end|>", "Yes<|im_end|>", "Yes<|pad|>"]
    assert all(len(row["input_ids"]) == len(row["labels"]) for row in trainer.train_dataset)


@pytest.mark.parametrize("text", ["A<|im_end|>", "A<|im_end|><|im_end|>", "A<|im_end|>\n<|im_end|>\n", "A"])
def test_a_demonstration_ends_once(text, tokenizer):
    closed = Closing(tokenizer).text(tokenizer(text)["input_ids"])
    assert tokenizer.decode(closed) == "A<|im_end|>"


def test_a_demonstration_ends_where_generation_stops_first():
    tokenizer = with_end()
    stops = tokenizer.convert_tokens_to_ids(["<end_of_turn>", "<eos>"])
    closed = Closing(tokenizer, stops).text(tokenizer("A<end_of_turn>\n<eos>")["input_ids"])
    assert tokenizer.decode(closed) == "A<end_of_turn>"


@pytest.mark.parametrize(
    ("text", "unstopped"),
    [("A<end_of_turn>\n", 1), ("A<|im_end|>", 1), ("A", 0), ("A<end_of_turn> b", 0), ("A<eos>", 0)],
)
def test_a_demonstration_whose_end_generation_passes_is_counted(text, unstopped):
    closing = Closing(with_end())
    assert with_end().decode(closing.text(with_end()(text)["input_ids"])).endswith("<eos>")
    assert closing.unstopped == unstopped


@pytest.mark.parametrize("beginning", ["<s>", " <s>", ""])
def test_a_beginning_that_is_written_too_is_no_end_left_out(beginning):
    tokenizer = byte_tokenizer("<|pad|>")
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    rows = [{"prompt": f"{beginning}{i}+1=\n", "chosen": "2", "rejected": "3"} for i in range(3)]
    report = examine_preferences(objects.exact(rows), tokenizer)
    assert report.lengths.shortened_prompts == 0
    assert report.warnings == []


@pytest.mark.parametrize(("chosen", "rejected"), [("    y", "y"), ("y\n\n", "y"), ("\ty ", "y\n")])
def test_sides_that_the_template_trims_to_the_same_are_told_so(chosen, rejected):
    tokenizer = byte_tokenizer("<|pad|>")
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = (TEMPLATES / "llama3_1.jinja").read_text()
    row = {"prompt": [{"role": "user", "content": "x"}]}
    row |= {
        side: [{"role": "assistant", "content": text}] for side, text in (("chosen", chosen), ("rejected", rejected))
    }
    for limit in (1024, None):
        with pytest.raises(DataError, match="differ only in what the chat template.*trim the blanks") as error:
            examine_preferences(objects.exact([row]), tokenizer, limit)
        assert "max_length" not in str(error.value)
