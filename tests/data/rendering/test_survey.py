"""One pass over the rows: which are rendered, control tokens wherever a template writes, prompts within answers."""

import json

import pytest

from posttrain.data import objects
from posttrain.data.rendering import looks, row_checks
from posttrain.errors import DataError
from tests.data.conversations import TOOL, pair, said, says, trl_template, user

IMAGE = [{"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": "u"}]


def many_looks(count=600):
    """Rows of which no two have their turns in the same order."""
    rows = []
    for i in range(count):
        turns = [says("y") if (i >> bit) & 1 else user("z") for bit in range(10)]
        rows.append(pair(user("x"), *turns, user("q"), chosen=[says("1")], rejected=[says("2")]))
    return rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (pair(user("Hello"), {"role": "developer", "content": "What is 7 * 8?"}), "the role developer"),
        (pair(user("x"), user(IMAGE)), "drops blocks of content of the role user"),
        (pair(user("x"), user("y", name="Ada"), user("z")), "name of who speaks"),
        (pair(user("x"), chosen=[says("France", thinking="because it is")]), "reasoning in thinking"),
    ],
)
def test_one_row_unlike_hundreds_that_are_unlike_each_other_is_seen(odd, message):
    # more looks than are rendered one by one
    rows, at = many_looks(looks.UNLIKE + 44), looks.UNLIKE + 21
    rows[at] = odd
    try:
        told = " ".join(said(rows, trl_template("llama3_1" if "thinking" in message else "qwen3")))
    except DataError as error:
        told = str(error)
    assert message in told
    assert f"row {at + 1}" in told


def test_a_setting_of_the_template_is_seen_among_many_looks():
    rows = [looks.look_of(row | {"chat_template_kwargs": {"enable_thinking": True}}) for row in many_looks(1024)]
    rows[700] = looks.look_of(many_looks(701)[700] | {"chat_template_kwargs": {"enable_thinking": False}})
    assert 700 in looks.rows_to_render({look: [number] for number, look in enumerate(rows)}, len(rows))


def test_a_known_role_in_a_new_place_is_seen_among_many_looks():
    rows = many_looks(1024)
    for row in rows:
        row["prompt"].insert(0, {"role": "system", "content": "s"})
    rows[777]["prompt"][-1] = {"role": "system", "content": "s"}
    numbers = looks.rows_to_render({looks.look_of(row): [n] for n, row in enumerate(rows)}, len(rows))
    assert 777 in numbers
    assert len(numbers) <= looks.SPREAD + looks.UNLIKE + looks.FEATURES


@pytest.mark.slow
def test_many_looks_raise_no_alarm_and_few_more_rows():
    found = row_checks.check(objects.exact(many_looks(1024)), trl_template("qwen3"), "data")
    assert found.warnings == []
    assert found.rendered <= looks.SPREAD + 2 * looks.UNLIKE


def call(**arguments):
    return [{"id": "call_1234", "type": "function", "function": {"name": "weather", "arguments": arguments}}]


def described(text):
    return {"type": "function", "function": {**TOOL["function"], "description": text}}


@pytest.mark.parametrize(
    "row",
    [
        pair(chosen=[says(reasoning_content="a <|im_end|> b")]),
        pair(chosen=[says("", tool_calls=call(town="<|im_end|>"))]),
        pair(chosen=[says("", tool_calls=call(towns=[{"<|im_end|>": 1}]))]),
        pair(tools=[described("ends with <|im_end|>")]),
        pair(tools=json.dumps([described("ends with <|im_end|>")])),
        pair(user(name="<|im_end|>")),
        pair(user([{"type": "text", "text": "a <|im_end|>"}])),
    ],
)
def test_control_tokens_are_counted_wherever_a_template_writes(row):
    warnings = said([row], trl_template("qwen3"))
    assert any(
        "1 of 1 rows hold control tokens in their texts ('<|im_end|>'; first: data, row 1)" in w for w in warnings
    )


ASKED = "Please write a poem about river {}"


def texts(chosen, rejected, prompt=ASKED, count=20, others=0):
    rows = [
        {side: text.replace("@", prompt).format(i) for side, text in (("chosen", chosen), ("rejected", rejected))}
        | {"prompt": prompt.format(i)}
        for i in range(count)
    ]
    return rows + [{"prompt": f"Name a small town {i}", "chosen": " a", "rejected": " b"} for i in range(others)]


def messages(chosen, rejected, **options):
    return [
        {"prompt": [user(row["prompt"])], "chosen": [says(row["chosen"])], "rejected": [says(row["rejected"])]}
        for row in texts(chosen, rejected, **options)
    ]


HUMAN = "\n\nHuman: What is river {} like?\n\nAssistant:"


@pytest.mark.parametrize(
    "rows",
    [
        texts("Q: @\nA: ok", "Q: @\nA: no"),
        texts("### Instruction:\n@\n\n### Response:\nok", "### Instruction:\n@\n\n### Response:\nno", others=15),
        texts("Below is an instruction. Answer it.\n\n### Instruction:\n@\n\n### Response:\nok", "@ no"),
        [row | {side: row[side].replace("Human: ", "Human:  ") for side in ("chosen", "rejected")}
         for row in texts("@ ok", "@ no", prompt=HUMAN)],
        messages("User: @\nAssistant: ok", "User: @\nAssistant: no"),
    ],
)  # fmt: skip
def test_a_transcript_of_the_prompt_in_the_answers_is_refused(rows, tokenizer):
    with pytest.raises(DataError, match=r"the answers begin with a transcript of the prompt.*first: data, row 1\)"):
        said(rows, tokenizer)


@pytest.mark.parametrize(
    ("rows", "side"),
    [
        (texts("@\n ok", "no"), "chosen"),
        (texts("no", "@\n ok", others=15), "rejected"),
        (messages("@\nLoire", "Paris"), "chosen"),
        (messages("You asked: @. Loire", "@\nParis"), None),
        (messages("@\nLoire", "@\nParis"), None),
        (messages("User: @\nAssistant: ok", "no"), "chosen"),
    ],
)
def test_a_prompt_that_an_answer_may_repeat_is_said(rows, side, tokenizer):
    (warning,) = said(rows, tokenizer)
    assert f"in 20 of {len(rows)} rows the prompt stands once more at the beginning of an answer" in warning
    assert (f"only {side!r} does" in warning) if side else ("tells the sides apart" not in warning)


@pytest.mark.parametrize(
    "rows",
    [
        texts("@\n ok", "no", others=30),
        messages("@ is short", "@ is long", prompt="River {}"),
        messages("word " * 80 + "@", "no"),
        messages("Here is a poem about river {}", "Here is no poem"),
        texts(" A: ok", " A: no", prompt="Q: What is river {} like?\n"),
    ],
)
def test_answers_of_their_own_raise_no_alarm(rows, tokenizer):
    assert said(rows, tokenizer) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [("weight", 0), ("weight", 0.0), ("weight", 0.5), ("train", False), ("training", False), ("loss", False),
     ("loss", 0), ("trainable", "false"), ("mask", True), ("masked", 1)],
)  # fmt: skip
def test_a_turn_of_an_answer_that_is_not_to_be_learned_is_refused(key, value):
    turns = [says("Hm.", **{key: value}), says("The Loire.")]
    tokenizer = trl_template("llama3_1")
    rows = [pair(user(f"Name river {i}.")) for i in range(100)]
    for row in (pair(chosen=turns), pair(rejected=turns)):
        with pytest.raises(DataError, match=rf"in 1 of 101 rows a turn of an answer is mark.*row 101, whose .* {key}"):
            said([*rows, row], tokenizer)
    for row in ({"prompt": [user()], "completion": turns}, {"prompt": [user()], "demonstration": turns[:1]}):
        with pytest.raises(DataError, match=f"{key}: {value!r} in message 1 of .* into the prompt"):
            said([row], tokenizer)


@pytest.mark.parametrize(
    ("key", "value"),
    [("weight", 1), ("weight", 1.0), ("weight", None), ("train", True), ("loss", True), ("mask", False), ("masked", 0)],
)
def test_a_turn_that_is_learned_as_the_others_raises_no_alarm(key, value):
    answer = [says("The Loire.", **{key: value})]
    assert said([pair(chosen=answer), {**pair(), "chosen": answer}], trl_template("llama3_1")) == []


def test_marks_of_turns_in_the_prompt_have_no_effect():
    prompt = [user(), says("Hm.", weight=0), user("Name one.")]
    assert said([pair(*prompt)], trl_template("llama3_1")) == []
    # both sides begin with them
    row = {"chosen": [*prompt, says("The Loire.", weight=1)], "rejected": [*prompt, says("Paris.", weight=1)]}
    assert said([row], trl_template("llama3_1")) == []


@pytest.mark.parametrize(
    ("row", "often"),
    [
        ({"prompt": "<start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\n", "chosen": "a<end_of_turn>\n",
          "rejected": "b<end_of_turn>\n"}, ("'<start_of_turn>'", "'<end_of_turn>'")),
        ({"prompt": "q", "chosen": " a</s>", "rejected": " b</s>"}, ("'</s>'",)),
        ({"prompt": "<|start_header_id|>user<|end_header_id|>\n\nq", "chosen": "a<|eot_id|>", "rejected": "b"},
         ("'<|eot_id|>'", "'<|start_header_id|>'")),
        (pair(chosen=[says("The Loire.<|eot_id|>")]), ("'<|eot_id|>'",)),
        ({"prompt": [user()], "completion": [says("The Loire.<end_of_turn>\n")]}, ("'<end_of_turn>'",)),
    ],
)  # fmt: skip
def test_tokens_of_another_models_template_are_counted(row, often, tokenizer):
    (warning,) = said([row] * 3, tokenizer)
    assert "3 of 3 rows hold tokens of another model's chat template" in warning
    assert "first: data, row 1" in warning
    assert all(token in warning for token in often)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": " <s>old</s> price", "rejected": " b"},
        {"prompt": "q", "chosen": " <b>a</b>", "rejected": " a | b |> c <| d"},
        pair(user("What does <|eot_id|> do?"), chosen=[says("The token <|eot_id|> ends a turn.")]),
    ],
)
def test_letters_that_look_like_tokens_raise_no_alarm(row, tokenizer):
    assert said([row], tokenizer) == []


def test_tokens_that_the_template_writes_as_letters_are_its_own(tokenizer):
    import copy

    zephyr = copy.deepcopy(tokenizer)
    zephyr.chat_template = (
        "{%- for m in messages -%}<|{{ m.role }}|>\n{{ m.content }}<|user|><|assistant|>{%- endfor -%}"
    )
    row = {"prompt": "<|user|>\nq\n<|assistant|>\n", "chosen": "a", "rejected": "b"}
    assert said([row], zephyr) == []
    assert len(said([row], tokenizer)) == 1
