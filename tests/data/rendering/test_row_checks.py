"""Every text of a row is in its rendering once, an answer's among what is learned; else it is said, or refused."""

import copy
import json
import re

import pytest
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from posttrain.data import objects
from posttrain.data.pairs.loading import load_preferences
from posttrain.data.pairs.schema import examine_preferences
from posttrain.data.rendering import looks, row_checks
from posttrain.data.tokens import tokenized_pairs
from posttrain.errors import DataError
from posttrain.models import byte_tokenizer
from tests.data.conversations import (
    CALL,
    PLAIN,
    TOOL,
    every_template,
    pair,
    plain,
    said,
    says,
    templated,
    trl_template,
    user,
)

ORDINARY = {
    "one turn": [pair(user(f"Name river {i}.")) for i in range(3)],
    "short texts": [pair(user("a"), chosen=[says("a")], rejected=[says("e")])],
    "several turns": [pair(user("Hi"), says("Hello! "), user(" Name a river.\n"), chosen=[says("```\n1\n\n2\n```\n")])],
    "other letters": [pair(user("Was heißt 🙂 &lt;b&gt; \u2028x?"), chosen=[says("👨‍👩‍👧 é e\u0301")])],
    "a long text": [pair(user("word " * 3000))],
    "no answer": [pair(chosen=[says("")]), pair()],
    "implicit": [{"chosen": [user(), says()], "rejected": [user(), says("Paris.")]}],
    "whole conversations": [{"messages": [user(), says(), user("More"), says("The Rhine.")]}],
    "completions": [{"prompt": [user()], "completion": [says()]}],
    "prompts": [{"prompt": [user()]}],
    "texts": [{"prompt": "Name a river:", "chosen": " The Loire", "rejected": " Paris"}],
    "continuations": [{"prompt": "a", "chosen": "ab", "rejected": "ac"}],
    "text": [{"text": "The Loire."}],
}
# these take lists of blocks, which a model's processor makes, and no texts
_OF_IMAGES = ("idefics3", "smolvlm", "llava_next")


@pytest.mark.core("deepseekv3", "phi3", "smolvlm")
@pytest.mark.parametrize("name", every_template())
def test_ordinary_rows_raise_no_alarm_under_the_templates_of_trl(name):
    tokenizer = trl_template(name)
    if name.startswith(_OF_IMAGES):
        with pytest.raises(DataError, match="takes blocks of content|cannot be turned into tokens"):
            said(ORDINARY["one turn"], tokenizer)
        return
    for kind in ("one turn", "several turns", "completions", "prompts"):
        assert said(ORDINARY[kind], tokenizer) == [], kind


@pytest.mark.core("qwen3-", "gptoss-", "None-")
@pytest.mark.parametrize("kind", ORDINARY)
@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "gemma3", "gptoss", None])
def test_ordinary_rows_raise_no_alarm(kind, name, tokenizer):
    assert said(ORDINARY[kind], trl_template(name) if name else tokenizer) == []


@pytest.mark.parametrize("name", ["qwen3", "glm4moe", "llama3_1", "nemotron_3_nano", "gptoss"])
def test_templates_that_know_tools_raise_no_alarm(name):
    rows = [pair(user("Weather?"), chosen=[says(words, tool_calls=CALL)], tools=[TOOL]) for words in ("", None)]
    result = {"role": "tool", "name": "weather", "tool_call_id": "call_1234", "content": '{"sky": "mild"}'}
    rows += [pair(user("Weather?"), says("", tool_calls=CALL), result, tools=[TOOL])]
    assert said(rows, trl_template(name)) == []


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("qwen3", pair({"role": "developer", "content": "Be short."}, user()), "the role developer.*to system"),
        ("qwen3", pair({"role": "critic", "content": "Be short."}, user()), "drops the message of the role critic"),
        ("qwen3", pair(user("Hi"), says("<think>\nhm\n</think>\n\nHello"), user()), "drops the reasoning of the prom"),
        ("qwen3", pair(user("Hi"), says("Hello", reasoning_content="hm"), user()), "reasoning of the prompt in reaso"),
        ("llama3_1", pair(chosen=[says(reasoning_content="France has it")]), "drops the answer's reasoning in reason"),
        ("llama3_1", pair(chosen=[says(thinking="France has it")]), "drops the answer's reasoning in thinking"),
        ("deepseek_r1_distill", pair(chosen=[says("<think>hm</think>The Loire.")]), "drops the answer's reasoning be"),
        ("gemma3", pair(tools=[TOOL]), r"drops the tools.*weather"),
        ("gemma3", pair(chosen=[says(tool_calls=CALL)]), "drops tool calls"),
        ("qwen3", pair(user(name="Ada")), "drops the name of who speaks.*'Ada'"),
        ("qwen3", pair(chosen=[says(), {"role": "tool", "content": "x"}, says("So.")]), "in 1 answers a tool takes a"),
    ],
)  # fmt: skip
def test_what_a_template_loses_is_said_with_the_row(name, row, message):
    rows = [pair(user(f"Name river {i}.")) for i in range(8)]
    rows.insert(5, row)
    (warning,) = said(rows, trl_template(name))
    assert warning.startswith("data: ")
    assert "row 6" in warning
    assert re.search(message, warning)


@pytest.mark.parametrize(
    ("tokenizer", "row", "message"),
    [
        # the question, or the answer, is not there
        (plain("m.content if m.role != 'user' else ''"), pair(), "drops the message of the role user"),
        (plain("m.content if m.role == 'user' else ''"), pair(), "drops the message of the role assistant"),
        (trl_template("phi3"), pair(user(), chosen=[{"role": "model", "content": "The Loire."}]), "of the role model"),
        (trl_template("gemma3"), pair(chosen=[says("", tool_calls=CALL)]), "drops tool calls"),
        # said twice
        (plain("m.content ~ ' ' ~ m.content"), pair(), "renders a message of the role assistant 2 times"),
        # Python's print
        (plain(), pair(user([{"type": "text", "text": "See:"}, {"type": "image"}])), "a list of blocks as Python pri"),
        (plain(), pair(chosen=[says([{"type": "refusal", "text": "a"}])]), "a list of blocks as Python prints it"),
        (plain("m.content ~ m.tool_calls"), pair(chosen=[says("a", tool_calls=CALL)]), "the arguments of a tool call"),
        # blocks that a template for texts leaves out
        (trl_template("qwen3"), pair(user([{"type": "text", "text": "See:"}, {"type": "image"}])), "blocks of content"),
        (plain("m.content if m.content is string else m.content[0].text"),
         pair(user([{"type": "text", "text": "See:"}, {"type": "image"}])), "drops blocks of the type image"),
        # arguments that are a text already, as a text of a text
        (plain("m.content ~ (m.tool_calls | tojson if m.tool_calls else '')"), pair(chosen=[says("a", tool_calls=[
            {"type": "function", "function": {"name": "weather", "arguments": '{"town": "Lyon"}'}}])]), "quotes the "),
    ],
)  # fmt: skip
def test_what_would_be_learned_wrong_is_refused(tokenizer, row, message):
    rows = [pair(user(f"Name river {i}."), chosen=[says()]) for i in range(3)] + [row]
    with pytest.raises(DataError, match=message):
        said(rows, tokenizer)
    with pytest.raises(DataError, match=message):
        examine_preferences(objects.exact(rows), tokenizer)


def test_a_row_that_a_template_refuses_is_named():
    strict = plain("m.content if m.role != 'tool' else raise_exception('no tools here')")
    rows = [pair(user(f"Name river {i}.")) for i in range(2000)]
    rows[1333] = pair({"role": "tool", "content": "x"}, user())
    with pytest.raises(
        DataError, match="data, row 1334: the row cannot be turned into tokens: TemplateError: no tools h"
    ):
        said(rows, strict)


def test_messages_in_another_order_are_said():
    backwards = templated(PLAIN.replace("BODY", "m.content").replace("in messages", "in messages[:-3] + messages[-3:]"))
    assert said([pair(user("One"), says("Two"), user("Three"))], backwards) == []
    swapped = "{%- set messages = messages[1:2] + messages[:1] + messages[2:] -%}" + PLAIN.replace("BODY", "m.content")
    (warning,) = said([pair(user("One"), says("Two"), user("Three"))], templated(swapped))
    assert "renders messages in another order" in warning


@pytest.mark.parametrize("name", ["deepseekv3", "cohere2"])
def test_a_late_system_turn_that_a_template_puts_first_is_said(name):
    late = [user("Hi there."), says("Hello."), {"role": "system", "content": "From here on German."}, user()]
    found = said([pair(*late)], trl_template(name))
    assert any("renders messages in another order" in warning for warning in found)
    first = [{"role": "system", "content": "Be short, please."}, user("Hi there."), says("Hello."), user()]
    assert not any("another order" in warning for warning in said([pair(*first)], trl_template(name)))


def test_a_system_turn_at_the_beginning_may_stand_anywhere():
    moved = "{%- set messages = messages[1:2] + messages[:1] + messages[2:] -%}" + PLAIN.replace("BODY", "m.content")
    first = {"role": "system", "content": "Be short, please."}
    assert said([pair(first, user("One"), says("Two"), user("Three"))], templated(moved)) == []


@pytest.mark.parametrize(
    "prompt",
    [
        [{"role": "system", "content": "Be short."}, {"role": "system", "content": "Speak German."}, user()],
        [user("Hi there."), says("Hello."), {"role": "system", "content": "Speak German."}, user()],
        [user("Hi there."), says("Hello."), {"role": "developer", "content": "Speak German."}, user()],
    ],
)
def test_a_system_turn_that_is_left_out_for_its_place_is_no_matter_of_blocks(prompt):
    (warning,) = said([pair(*prompt)], trl_template("gptoss"))
    assert "drops the message of the role" in warning and "blocks" not in warning
    assert "Join it to the system message" in warning


@pytest.mark.parametrize("name", ["qwen3_5_think", "qwen3_5_nothink", "nemotron_3_nano"])
@pytest.mark.parametrize(("value", "shown"), [(True, "True"), (False, "False"), (None, "None")])
def test_a_value_of_a_call_that_is_written_as_python_does_is_said(name, value, shown):
    calls = [{"type": "function", "function": {"name": "lights", "arguments": {"room": "hall", "on": value}}}]
    found = said([pair(user("Lights?"), chosen=[says("", tool_calls=calls)])], trl_template(name))
    (warning,) = [warning for warning in found if "among the arguments" in warning]
    assert f"row 1: {shown})" in warning


@pytest.mark.parametrize("form", ["{'z': None}", "['a', True]"])
def test_a_nested_value_that_is_written_as_python_does_is_said(form):
    body = (
        "m.content ~ (m.tool_calls[0].function.name ~ m.tool_calls[0].function.arguments.x ~ '|' "
        "if m.tool_calls else '')"
    )
    value = {"{'z': None}": {"z": None}, "['a', True]": ["a", True]}[form]
    calls = [{"type": "function", "function": {"name": "lights", "arguments": {"x": value}}}]
    found = said([pair(user("Lights?"), chosen=[says("", tool_calls=calls)])], plain(body))
    assert any(f"among the arguments of a tool call as Python prints it, in 1 of 1 rows rendered (first: data, row 1: "
               f"{form})" in warning for warning in found)  # fmt: skip


@pytest.mark.core("arguments0-", "arguments1-qwen3")
@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "glm4moe", "qwen3_5_think", "nemotron_3_nano", "gemma4"])
@pytest.mark.parametrize("arguments", [{"a": "True", "b": 0.5, "c": 3}, {"a": [1, 2], "b": -1e-7}, {"a": "None"}])
def test_values_that_python_and_json_write_alike_raise_no_alarm(name, arguments):
    calls = [{"type": "function", "function": {"name": "lights", "arguments": arguments}}]
    found = said([pair(user("Lights?"), chosen=[says("", tool_calls=calls)])], trl_template(name))
    assert not any("Python" in warning for warning in found)


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "glm4moe"])
def test_values_that_a_template_writes_as_json_raise_no_alarm(name):
    calls = [{"type": "function", "function": {"name": "lights", "arguments": {"on": True, "x": {"y": [None]}}}}]
    found = said([pair(user("Lights?"), chosen=[says("", tool_calls=calls)])], trl_template(name))
    assert not any("Python" in warning for warning in found)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("thought", "The Loire is long."),
        ("thoughts", "The Loire is long."),
        ("analysis", "The Loire is long."),
        ("reasoning_details", [{"type": "reasoning.text", "text": "The Loire is long."}]),
        ("reasoning_details", [{"type": "reasoning.summary", "summary": "The Loire is long."}]),
        ("thinking", [{"type": "thinking", "thinking": "The Loire is long."}]),
    ],
)
def test_reasoning_under_any_of_its_keys_is_said_to_be_dropped(key, value):
    row = pair(user(), chosen=[says(**{key: value})], rejected=[says("Paris.", **{key: value})])
    (warning,) = said([row, row], trl_template("qwen3"))
    assert f"drops the answer's reasoning in {key}" in warning and "The Loire is long." in warning


def test_a_thought_under_two_keys_of_which_one_is_rendered_raises_no_alarm():
    thought = {"reasoning_content": "The Loire is long.", "reasoning_details": [{"text": "The Loire is long."}]}
    row = pair(user(), chosen=[says(**thought)], rejected=[says("Paris.", **thought)])
    assert said([row], trl_template("qwen3")) == []


@pytest.mark.parametrize(
    ("name", "row", "remedy"),
    [
        ("gemma", pair({"role": "system", "content": "Be short."}, user()), "Put the system's text at the beginning"),
        ("gemma", pair(user("Hi there."), user()), "Join turns of one role that follow each other, which this"),
        ("gemma", pair({"role": "system", "content": "Be short."}, user("Hi."), user()), "'s turn, and join turns of"),
        ("llama3_1", pair(chosen=[says("", tool_calls=[CALL[0]["function"]])]), 'Write each call as {"type": "functi'),
        ("deepseekv3", pair(chosen=[says("", tool_calls=[CALL[0]["function"]])]), "its arguments as a JSON text, whi"),
        ("gemma", pair(says("Hello."), user()), "Leave out rows whose turns do not alternate"),
    ],
)
def test_a_refusal_comes_with_a_form_that_the_template_takes(name, row, remedy):
    with pytest.raises(DataError, match=re.escape(remedy)):
        said([row], trl_template(name))


@pytest.mark.parametrize(
    "given",
    [
        "add_generation_prompt",
        "tokenize",
        "return_dict",
        "tools",
        "tokenizer",
        "continue_final_message",
        "conversation",
    ],
)
def test_arguments_of_rendering_are_no_settings_of_the_template(given, tokenizer):
    rows = [pair(), pair(user("Name two."), chat_template_kwargs={given: True})]
    with pytest.raises(DataError, match=f"row 2: chat_template_kwargs holds {given}, which is no setting"):
        said(rows, tokenizer)
    with pytest.raises(DataError, match=f"data: chat_template_kwargs holds {given}"):
        said([pair()], tokenizer, settings={given: True})
    assert said([pair(chat_template_kwargs={"enable_thinking": False})], trl_template("qwen3")) == []


@pytest.mark.parametrize("kind", ["text", "input_text", "output_text"])
def test_blocks_of_text_are_text_under_each_of_their_names(kind, tokenizer):
    row = pair(user([{"type": kind, "text": "Name a "}, {"type": kind, "text": "river."}]),
               chosen=[says([{"type": kind, "text": "The Loire."}])])  # fmt: skip
    made, asked = objects.exact([row]), objects.exact([pair()])
    assert said([row], trl_template("qwen3")) == []
    assert list(tokenized_pairs(made, tokenizer)) == list(tokenized_pairs(asked, tokenizer))
    with pytest.raises(DataError, match="all 1 pairs have an empty side"):
        examine_preferences(objects.exact([pair(chosen=[says([{"type": kind, "text": " "}])])]), tokenizer)


MESSAGES = [user("Name river 1."), says()]
TRANSCRIPT = "\n\nHuman: Name river {}.\n\nAssistant:"


@pytest.mark.parametrize(
    "rows",
    [
        [pair(user(), chosen=[user(), says()], rejected=[user(), says("Paris.")])],
        [pair(user("Hi"), says("Hello"), user(), chosen=[user(), says()], rejected=[user(), says("Paris.")])],
        [{"prompt": TRANSCRIPT.format(i), "chosen": TRANSCRIPT.format(i) + " Yes.", "rejected": TRANSCRIPT.format(i)
          + " No."} for i in range(4)],
        [{"prompt": " a question? ", "completion": "a question? An answer."} for _ in range(2)],
        [{"prompt": f"{i}+1=", "chosen": f"{i}+1=2", "rejected": f"{i}+1=3"} for i in range(9)],
        [{"prompt": [user()], "completion": [user(), says()]}],
    ],
)  # fmt: skip
def test_a_prompt_that_stands_in_the_answers_too_is_refused(rows, tokenizer):
    with pytest.raises(DataError, match="answers begin with the prompt.*twice(.|\n)*remove_columns"):
        said(rows, tokenizer)


def test_a_few_answers_that_repeat_their_question_are_said(tokenizer):
    rows = [{"prompt": f"What is {i} + {i}?", "chosen": f" {2 * i}", "rejected": " 1"} for i in range(20)]
    rows[4] |= {"chosen": "What is 4 + 4? It is 8.", "rejected": "What is 4 + 4? It is 9."}
    (warning,) = said(rows, tokenizer)
    assert "in 1 of 20 rows the answers begin with the prompt and repeat it (first: data, row 5)" in warning


@pytest.mark.parametrize("role", ["user", "system", "developer"])
@pytest.mark.parametrize("column", ["chosen", "rejected", "completion", "implicit"])
def test_anothers_turn_within_an_answer_is_refused(role, column, tokenizer):
    turns = [says(), {"role": role, "content": "And in Spain?"}, says("The Ebro.")]
    row = (
        {"prompt": [user()], "completion": turns}
        if column == "completion"
        else pair(**{"chosen": turns, column: turns})
    )
    if column == "implicit":
        row = {"chosen": [user(), *turns], "rejected": [user(), says("Paris.")]}
    with pytest.raises(
        DataError, match=rf"in \d answers the {role} takes a turn \(first: data, row 1\).*into the prompt"
    ):
        said([row], tokenizer)


def test_control_tokens_in_texts_are_counted_with_the_first_row(tokenizer):
    rows = [pair(user(f"Name river {i}.")) for i in range(6)]
    rows[2] = pair(chosen=[says("A turn ends with <|im_end|>, as you know.")])
    rows[4] = pair(user("What are <|im_end|> and <|im_start|>?"))
    (warning,) = said(rows, tokenizer)
    assert (
        "2 of 6 rows hold control tokens in their texts ('<|im_end|>', '<|im_start|>'; first: data, row 3)" in warning
    )
    assert "split_special_tokens" in warning
    (warning,) = said([{"prompt": "a", "chosen": "b<|pad|>c", "rejected": "d"}] + ORDINARY["texts"] * 3, tokenizer)
    assert "1 of 4 rows hold control tokens in their texts ('<|pad|>'; first: data, row 1)" in warning
    (warning,) = said([{"messages": [user(), says("a<|im_end|>")]}], tokenizer)
    assert "1 of 1 rows hold control tokens" in warning


def test_a_text_about_control_tokens_is_none_with_the_template_applied(tokenizer):
    (warning,) = said([{"prompt": "Explain <|im_end|>.", "chosen": " It ends.", "rejected": " No."}], tokenizer)
    assert "1 of 1 rows hold control tokens in their texts" in warning


APPLIED = "<|im_start|>user\nName river {}.<|im_end|>\n<|im_start|>assistant\n"


def texts(prompt=APPLIED, chosen="The Loire.<|im_end|>", rejected="Paris.<|im_end|>"):
    return [{"prompt": prompt.format(i), "chosen": chosen, "rejected": rejected} for i in range(3)]


@pytest.mark.parametrize("end", ["", "<|im_end|>", "<|im_end|>\n", "<|im_end|> \n\n"])
def test_answers_with_the_template_applied_end_once(end, tokenizer):
    data = objects.exact(texts(chosen=f"The Loire.{end}", rejected=f"Paris.{end}"))
    for row in tokenized_pairs(data, tokenizer):
        assert tokenizer.decode(row["chosen_ids"]) == "The Loire.<|im_end|>"
        assert tokenizer.decode(row["rejected_ids"]) == "Paris.<|im_end|>"
    found = row_checks.check(data, tokenizer, "data")
    assert found.warnings == []
    assert "the chat template was applied to them already" in found.notes[0]


@pytest.mark.parametrize("column", ["prompt", "sides", "no prompt"])
def test_texts_with_a_beginning_of_their_own_begin_once(column):
    tokenizer = byte_tokenizer("<|pad|>")
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    begin = ("<s>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[begin])
    row = {"prompt": "<s>1+1= ", "chosen": "2", "rejected": "3"}
    if column != "prompt":
        row = {"chosen": "<s>1+1= 2", "rejected": "<s>1+1= 3"} | ({"prompt": ""} if column == "sides" else {})
    (tokens,) = tokenized_pairs(objects.exact([row]), tokenizer)
    whole = tokenizer.decode(tokens["prompt_ids"] + tokens["chosen_ids"])
    assert whole == "<s>1+1= 2<|im_end|>"


def test_a_beginning_stays_where_the_tokenizer_adds_none(tokenizer):
    plain = copy.deepcopy(tokenizer)
    plain.add_special_tokens({"bos_token": "<s>"})
    (tokens,) = tokenized_pairs(objects.exact([{"prompt": "<s>a ", "chosen": "b", "rejected": "c"}]), plain)
    assert plain.decode(tokens["prompt_ids"]) == "<s>a "


def test_several_turns_in_an_answer_with_the_template_applied_are_said(tokenizer):
    more = f"The Loire.<|im_end|>\n{APPLIED.format(2)}The Rhine.<|im_end|>"
    (warning,) = said(texts(chosen=more), tokenizer)
    assert "in 3 of 3 rows an answer has control tokens before its end" in warning


BEGUN = [user("2 + 2?"), says("It is")]


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "gemma3", "qwen2_5", "phi3", None])
def test_an_answer_goes_on_with_the_words_that_its_prompt_ends_with(name, tokenizer):
    tokenizer = trl_template(name) if name else tokenizer
    rows = objects.exact([pair(*BEGUN, chosen=[says(" 4.")], rejected=[says(" 5.")]), pair()])
    begun, plain = tokenized_pairs(rows, tokenizer)
    assert tokenizer.decode(begun["prompt_ids"]).endswith("It is")
    assert tokenizer.decode(begun["chosen_ids"]).count(" 4.") == 1
    assert tokenizer.decode(begun["chosen_ids"]).startswith(" 4.")
    assert tokenizer.decode(begun["rejected_ids"]).startswith(" 5.")
    assert tokenizer.decode(plain["prompt_ids"]) == tokenizer.decode(next(tokenized_pairs(rows.select([1]), tokenizer))[
        "prompt_ids"
    ])  # fmt: skip
    if name in (None, "qwen3", "qwen2_5"):
        report = examine_preferences(rows, tokenizer)
        assert report.ended == 1
        assert report.warnings == []


def test_words_that_both_sides_of_a_pair_begin_with_are_continued(tokenizer):
    rows = [{"chosen": [*BEGUN, says(" 4.")], "rejected": [*BEGUN, says(" 5.")]}]
    rows += [{"chosen": [user(), says()], "rejected": [user(), says("Paris.")]}]
    begun, plain = tokenized_pairs(objects.exact(rows), tokenizer)
    assert tokenizer.decode(begun["prompt_ids"]).endswith("<|im_start|>assistant\nIt is")
    assert tokenizer.decode(begun["chosen_ids"]) == " 4.<|im_end|>"
    assert tokenizer.decode(plain["chosen_ids"]) == "The Loire.<|im_end|>"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (pair(says("It is"), chosen=[says(" 4.")]), "nothing but words of the assistant"),
        (pair(user(), says("It is"), chosen=[says("b")]), "cannot continue"),
    ],
)
def test_words_that_cannot_be_continued_are_refused(row, message):
    with pytest.raises(DataError, match=message):
        list(tokenized_pairs(objects.exact([row]), plain("m.content if m.role == 'user' else m.content | upper")))


def test_rollouts_do_not_go_on_with_the_assistants_words(tokenizer):
    for columns in ({}, {"demonstration": [says(" 4.")]}):
        with pytest.raises(
            DataError, match="row 2: the prompt ends with words of the assistant.*continue_final_message"
        ):
            said([{"prompt": [user()], **columns}, {"prompt": BEGUN, **columns}], tokenizer)


def test_rows_that_look_unlike_the_others_are_rendered():
    rows = [pair(user(f"Name river {i}.")) for i in range(5000)]
    odd = {777: pair(user("x"), name="b") | {"prompt": [user("x", name="Ada")]}, 4001: pair(tools=[TOOL])}
    odd[2345] = pair(user("a"), says("b"), user("c"))
    for number, row in odd.items():
        rows[number] = {key: row.get(key) for key in ("prompt", "chosen", "rejected", "tools")}
    found = row_checks.check(objects.exact(rows), trl_template("gemma3"), "data")
    assert looks.SPREAD + len(odd) <= found.rendered <= looks.SPREAD + len(odd) + 2
    assert sorted("tools" if "the tools" in warning else "name" for warning in found.warnings) == ["name", "tools"]


def test_characters_that_the_tokenizer_does_not_know_are_said():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "one": 2, "two": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="</s>")
    assert said([{"prompt": "one", "chosen": " two", "rejected": " one"}], tokenizer) == []
    (warning,) = said([{"prompt": "one", "chosen": " zwei", "rejected": " one"}], tokenizer)
    assert "no token for some characters, and writes '<unk>'" in warning


def test_the_rows_given_stay_as_they_are(tokenizer):
    rows = [pair(*BEGUN), pair(user([{"type": "text", "text": "a"}]))]
    data = Dataset.from_list(rows, on_mixed_types="use_json")
    before = copy.deepcopy(list(data))
    row_checks.check(data, tokenizer, "data")
    assert list(data) == before


def test_transcripts_whose_prompt_stands_again_in_the_answers_are_split_behind_it(tmp_path):
    rows = [
        {"prompt": TRANSCRIPT.format(i), "chosen": TRANSCRIPT.format(i) + " Yes.", "rejected": before + " No."}
        for i, before in enumerate((TRANSCRIPT.format(0), "", TRANSCRIPT.format(2)))
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number, row in enumerate(load_preferences(str(path))):
        assert row["prompt"] == [user(f"Name river {number}.")]
        assert (row["chosen"], row["rejected"]) == ([says("Yes.")], [says("No.")])


def letters(unknown=None, normalizer=None, known="", blanks=True):
    """A tokenizer of single characters: ASCII's and the `known`, others as `unknown` or not at all."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["</s>", *([unknown] if unknown else []), *map(chr, range(32, 127)), "\n", "\t", *known]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token=unknown))
    made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated") if blanks else pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", pad_token="</s>", **({"unk_token": unknown} if unknown else {})
    )
    tokenizer.chat_template = PLAIN.replace("BODY", "m.content")
    return tokenizer


def everywhere(words):
    """Rows that hold the words in a turn, an answer, a whole conversation, a prompt and texts."""
    return [
        [pair(user(words))],
        [pair(chosen=[says(words)])],
        [{"messages": [user(), says(words)]}],
        [{"prompt": [user(words)]}],
        [{"prompt": "Name it:", "chosen": f" {words}", "rejected": " no"}],
        [{"text": words}],
    ]


@pytest.mark.parametrize("words", ["Füße 漢字", "naïve", "5 €", "🙂 ok"])
def test_unknown_characters_are_said_of_messages_as_of_texts(words):
    for rows in everywhere(words):
        (warning,) = said(rows, letters("<unk>"))
        assert "no token for some characters, and writes '<unk>'" in warning
    for rows in everywhere("plain words <unk>"):
        assert not any("no token" in warning for warning in said(rows, letters("<unk>")))


@pytest.mark.parametrize(
    ("normalizer", "words", "named"),
    [
        (None, "Füße 漢字 ok", "'ü', 'ß', '漢', '字' are lost"),
        (None, "5 €", "'€' is lost"),
        ("NFKC", "x² + ½", "'²', '½' are lost and '2', '1', '⁄' written"),
        ("NFKC", "ﬂy", "'ﬂ' is lost and 'f', 'l' written"),
        ("Lowercase", "the LYS", "'L', 'Y', 'S'"),
        ("StripAccents", "cafe\u0301", "'é' is lost and 'e' written"),
    ],
)
def test_characters_that_the_tokenizer_changes_are_said_once_with_their_names(normalizer, words, named):
    from tokenizers import normalizers

    made = getattr(normalizers, normalizer)() if normalizer else None
    for rows in everywhere(words)[5 if normalizer == "Lowercase" else 0 :]:
        warnings = said(rows * 3, letters(normalizer=made, known="⁄"))
        assert [("the tokenizer changes characters" in warning) for warning in warnings] == [True]
        assert named in warnings[0]


@pytest.mark.parametrize(
    "words", ["Was heißt 🙂?", "e\u0301 x² ½ 漢字", "a  b\tc \r\nd", "I do not , know .", "<|im_end|>"]
)
def test_a_tokenizer_that_keeps_all_characters_changes_none(words, tokenizer):
    for rows in everywhere(words):
        assert not any("tokenizer" in w and "changes" in w for w in said(rows, tokenizer))


def test_a_blank_put_in_front_and_accents_composed_are_no_change():
    from tokenizers import decoders, normalizers

    made = letters(normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Prepend(" ")]), known="é")
    assert said([pair(chosen=[says("cafe\u0301 au lait")])], made) == []
    made.backend_tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    assert said([pair(chosen=[says("do not , I 'm")])], made) == []


CODE = "def f():\n    return 1"


@pytest.mark.parametrize("words", [CODE, "- one\n- two", "One.\n\nTwo.", "if x:\n\ty = 1"])
@pytest.mark.parametrize(
    "body", [r"m.content.replace('\n', ' ')", "m.content.split() | join(' ')", r"m.content.split('\n') | join"]
)
def test_line_breaks_that_a_template_loses_are_said(words, body):
    for rows in everywhere(words)[:4]:
        (warning,) = said(rows, plain(body))
        assert "the chat template loses line breaks or indentation within a message" in warning


def test_indentation_and_blank_lines_that_a_template_loses_are_said():
    (warning,) = said([pair(chosen=[says(CODE)])], plain(r"m.content.replace('    ', ' ')"))
    assert "loses line breaks or indentation" in warning
    (warning,) = said([pair(user("One.\n\nTwo."))], plain(r"m.content.replace('\n\n', '\n')"))
    assert "role user" in warning


@pytest.mark.parametrize("words", [CODE, "- one\n- two", "One.\n\nTwo."])
def test_line_breaks_that_a_tokenizer_loses_are_said(words):
    for rows in everywhere(words):
        (warning,) = said(rows, letters(blanks=False))
        assert "the tokenizer loses line breaks or indentation" in warning


@pytest.mark.parametrize("body", ["m.content | trim", "m.content.strip() ~ '\n'", r"m.content.rstrip('\n')"])
def test_a_template_that_trims_the_ends_raises_no_alarm(body):
    for rows in everywhere(f"\n\n  {CODE}\n\n")[:4]:
        assert said(rows, plain(body)) == []


@pytest.mark.core("gemma3", "glm4moe")
@pytest.mark.parametrize("name", every_template())
def test_code_and_lists_raise_no_alarm_under_the_templates_of_trl(name):
    if name.startswith(_OF_IMAGES):
        return
    words = f"See:\r\n\n```\n{CODE}\n\n\n\tx  y \n```\n- é\n  - 漢字\n"
    for rows in everywhere(words)[:4]:
        assert said(rows, trl_template(name)) == []


TABLES = ["x  y\tz", "a\tb", "f(x,  y)", "|a   | b|"]


@pytest.mark.parametrize("words", TABLES)
@pytest.mark.parametrize("body", ["m.content.split() | join(' ')", r"m.content.replace('\t', ' ').replace('  ', ' ')"])
def test_tabs_and_runs_of_blanks_that_a_template_loses_are_said(words, body):
    for rows in everywhere(words)[:4]:
        (warning,) = said(rows, plain(body))
        assert "the chat template loses tabs or blanks within a line" in warning


@pytest.mark.parametrize("words", TABLES)
def test_tabs_and_runs_of_blanks_that_a_tokenizer_loses_are_said(words):
    from tokenizers import Regex, normalizers

    for rows in everywhere(words):
        (warning,) = said(rows * 3, letters(normalizer=normalizers.Replace(Regex("[ \\t]+"), " ")))
        assert "the tokenizer loses tabs or blanks within a line, in 3 of 3 rows" in warning


def test_a_tokenizer_that_joins_words_is_said():
    from tokenizers import normalizers

    (warning,) = said([pair(chosen=[says("Not now, no.")])], letters(normalizer=normalizers.Replace(" ", "")))
    assert "the tokenizer loses tabs or blanks" in warning


@pytest.mark.slow
@pytest.mark.parametrize("words", ["One two, three - four.", "  at both ends \t", "a b\n", "do not , know .", "5 % of"])
@pytest.mark.parametrize("body", ["m.content | trim", "m.content.split() | join(' ')", "m.content"])
def test_single_blanks_and_trimmed_ends_raise_no_alarm(words, body):
    for rows in everywhere(words)[:4]:
        assert said(rows, plain(body)) == []


ARGUMENTS = [('{"town": "Lyon"}', "an object, not as a JSON text"), ({"town": "Lyon"}, "a JSON text, not as an object")]


@pytest.mark.parametrize(
    ("name", "given", "form"),
    [(n, *ARGUMENTS[0]) for n in ("glm4moe", "qwen3_5_think", "nemotron_3_nano")] + [("deepseekv3", *ARGUMENTS[1])],
)
def test_arguments_in_a_form_that_the_template_refuses_are_named_with_the_other(name, given, form):
    calls = [{"type": "function", "function": {"name": "weather", "arguments": given}}]
    for row in (
        pair(chosen=[says("", tool_calls=calls)]),
        pair(user(), says("", tool_calls=calls), {"role": "tool", "name": "weather", "content": "mild"}, user("So?")),
        {"prompt": [user()], "completion": [says("", tool_calls=calls)]},
        {"messages": [user(), says("", tool_calls=calls)]},
    ):
        with pytest.raises(DataError, match=rf"data, row 1: .* cannot be turned .* arguments of tool calls as {form}"):
            said([row], trl_template(name))


def test_a_refusal_for_another_reason_gets_no_remedy_of_arguments():
    strict = plain("m.content if m.role != 'tool' else raise_exception('no tools here')")
    row = pair(user(), says("", tool_calls=CALL), {"role": "tool", "name": "weather", "content": "x"}, user())
    with pytest.raises(DataError, match="no tools here$"):
        said([row], strict)
