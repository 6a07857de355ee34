"""What a template writes into the learned part of an answer is said; tags of reasoning that are words are none."""

import re

import pytest

from posttrain.data import objects
from posttrain.data.rendering import looks, row_checks
from posttrain.data.rendering.additions import added, misreads
from posttrain.errors import DataError
from tests.data.conversations import CALL, TOOL, every_template, pair, plain, says, trl_template, user

THOUGHT = "<think>\nFrance has it.\n</think>\n\nThe Loire."
TOKENS = ("<|im_start|>", "<|im_end|>")


def found(rows, tokenizer):
    return row_checks.check(objects.exact(rows), tokenizer, "data")


@pytest.mark.parametrize(
    ("learned", "answer", "texts"),
    [
        ("The Loire.<|im_end|>\n", [says()], []),
        ("<think>\n\n</think>\n\nThe Loire.<|im_end|>\n", [says()], ["<think>\n\n</think>"]),
        # a short answer is not found within a tag or a token
        ("<think>\n\n</think>\n\nn<|im_end|>", [says("n")], ["<think>\n\n</think>"]),
        ("<think>\n\n</think>\n\nthink<|im_end|>", [says("think")], ["<think>\n\n</think>"]),
        # the row's own thought
        ("<think>\nhm\n</think>\n\nThe Loire.<|im_end|>", [says(reasoning_content="hm")], []),
        (f"{THOUGHT}<|im_end|>", [says(THOUGHT)], []),
        ("hm\n</think>\n\nThe Loire.<|im_end|>", [says("hm\n</think>\n\nThe Loire.")], []),
        ("<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>The Loire.<|return|>",
         [says(thinking="hm")], []),
        # who speaks, between turns
        ("One<|im_end|>\n<|im_start|>assistant\nTwo<|im_end|>", [says("One"), says("Two")], []),
        ("One<|im_end|>\n<|im_start|>assistant\n<think></think>Two<|im_end|>", [says("One"), says("Two")],
         ["<think></think>"]),
        (" to=user<|message|>The Loire.<|eot|>", [says()], []),
        # anything else that is neither
        ("Answer: The Loire.<|im_end|>", [says()], ["Answer:"]),
        ("The Loire. (end)<|im_end|>", [says()], ["(end)"]),
        # the syntax of calls is the template's
        ('<think></think><tool_call>\n{"name": "weather"}\n</tool_call><|im_end|>', [says("", tool_calls=CALL)],
         ["<think></think>"]),
        ('I look.<tool_call>\n{"name": "weather"}\n</tool_call><|im_end|>', [says("I look.", tool_calls=CALL)], []),
        # a text that is not there as it is, which is said elsewhere
        ("LOIRE<|im_end|>", [says()], []),
    ],
)  # fmt: skip
def test_what_is_neither_the_answers_own_nor_a_mark_of_turns_is_found(learned, answer, texts):
    assert added(learned, answer, TOKENS) == texts


@pytest.mark.parametrize(
    ("content", "how"),
    [
        (THOUGHT, None),
        ("hm\n</think>\n\nThe Loire.", None),
        ("So it is.</think>The Loire.", None),
        ("<think>a b</think> c", None),
        ("The <think> tag opens it.", None),
        ("They close it with </think> and go on.", "mentions"),
        ("Write <think> and </think> around it.", "mentions"),
        ("I see</think>The Loire.", None),
        ('She said "yes"</think>The Loire.', None),
        ("Use `</think>`.", "mentions"),
        ('Close it with "</think>". Then go on.', "mentions"),
        ("End the thought (</think>) first.", "mentions"),
        ("<think>a</think> x <think>b</think> y", "mentions"),
        (f"{THOUGHT} It ends with </think> here.", "mentions"),
        ("<think>\nhm never ends", "unclosed"),
    ],
)
def test_tags_of_reasoning_that_enclose_no_thought_are_told(content, how):
    assert misreads(content) == how


@pytest.mark.core("chosen-They", "rejected-<think>")
@pytest.mark.parametrize("name", ["qwen3", "glm4moe", "deepseekv3", "deepseek_r1_distill"])
@pytest.mark.parametrize(
    "words",
    ["They close it with </think> and go on.", "Write <think> and </think> round it.", f"{THOUGHT} </think> x"],
)
@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_an_answer_that_speaks_of_the_tag_is_not_learned_as_a_thought(name, words, side):
    # among many that think
    rows = [pair(chosen=[says(THOUGHT)], rejected=[says(THOUGHT.replace("Loire", f"{i}"))]) for i in range(100)]
    rows[57] = rows[57] | {side: [says(words)]}
    with pytest.raises(DataError, match="takes an answer that speaks of </think>, or has it more .*row 58"):
        found(rows, trl_template(name))


@pytest.mark.parametrize("name", ["gemma3", "llama3_1", "nemotron_3_nano", "phi3"])
def test_an_answer_that_speaks_of_the_tag_raises_no_alarm_where_it_stays_as_it_is(name):
    words = "They close it with </think> and go on."
    assert found([pair(chosen=[says(words)], rejected=[says(f"{words} So.")])], trl_template(name)).warnings == []


@pytest.mark.parametrize("name", ["qwen3", "glm4moe", "qwen3_5_think"])
def test_a_thought_that_never_ends_behind_an_empty_one_is_said(name):
    rows = [pair(chosen=[says(THOUGHT)], rejected=[says(THOUGHT)]) for _ in range(60)]
    rows[44] = pair(chosen=[says(THOUGHT)], rejected=[says("<think>\nhm never ends")])
    (warning,) = found(rows, trl_template(name)).warnings
    assert re.search(r"opens one and never closes it, in 1 of \d+ rows rendered \(first: data, row 45", warning)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen3", r"'<think>\n\n</think>'"),
        ("glm4moe", "'<think></think>'"),
        ("qwen3_5_think", "'</think>'"),
        ("nemotron_3_nano", "'</think>'"),
    ],
)
def test_an_empty_thought_that_the_template_adds_is_noted_with_the_setting_that_leaves_it_out(name, text):
    tokenizer = trl_template(name)
    for rows in (
        [pair(user(f"Name river {i}.")) for i in range(3)],
        [{"prompt": [user()], "completion": [says()]}] * 3,
    ):
        checked = found(rows, tokenizer)
        (note,) = checked.notes
        assert f"adds {text} to answers, and it is learned with them, in 3 of 3 rows" in note
        assert "`enable_thinking: false`" in note
        assert checked.warnings == []
        off = [row | {"chat_template_kwargs": {"enable_thinking": False}} for row in rows]
        assert (found(off, tokenizer).notes, found(off, tokenizer).warnings) == ([], [])


def test_a_setting_that_changes_nothing_is_no_remedy():
    tokenizer = plain("('Answer: ' if m.role == 'assistant' else '') ~ m.content")
    (note,) = found([pair()], tokenizer).notes
    assert "adds 'Answer:' to answers" in note
    assert "enable_thinking" not in note
    # a setting that the thinking side would not be rendered with
    (warning,) = found([pair(chosen=[says(THOUGHT)])], trl_template("qwen3")).warnings
    assert r"adds '<think>\n\n</think>' to the rejected answer alone, which tells the sides apart" in warning
    assert "enable_thinking" not in warning


SYSTEM = {"role": "system", "content": "Be short."}
WELL_FORMED = {
    "system": pair(SYSTEM, user()),
    "several turns": pair(user("Hi"), says("Hello"), user()),
    "reasoning": pair(chosen=[says(reasoning_content="hm")], rejected=[says("Paris.", reasoning_content="no")]),
    "thoughts": pair(chosen=[says(THOUGHT)], rejected=[says("<think>\nno\n</think>\n\nParis.")]),
    "calls": pair(chosen=[says("I look.", tool_calls=CALL)], rejected=[says("No.", tool_calls=CALL)], tools=[TOOL]),
}


@pytest.mark.core("deepseekv3", "qwen3")
@pytest.mark.parametrize("name", every_template(training=False))
def test_nothing_but_tags_of_reasoning_is_found_in_the_templates_of_trl(name):
    tokenizer = trl_template(name)
    for row in WELL_FORMED.values():
        try:
            checked = found([row], tokenizer)
        # templates that know no system message, no calls, no texts
        except DataError as error:
            assert "added" not in str(error)
            continue
        said = [line for line in (*checked.warnings, *checked.notes) if "adds" in line]
        assert all(re.search(r"adds '(<think>)?(\\n)*(</think>)?' to", line) for line in said), said


@pytest.mark.parametrize("content", ["<think>\nhm", "a </think> b", THOUGHT, "The Loire."])
def test_answers_whose_tags_differ_in_kind_look_unlike(content):
    kinds = {looks.look_of({"chosen": [says(one)]}) for one in ("<think>\nhm", "a </think> b", THOUGHT, "The Loire.")}
    assert len(kinds) == 4
    assert looks.look_of({"chosen": [says(content)]}) in kinds
