"""Whether what is trained ends the turn, and where a demonstration ends."""

import copy
import re
from types import SimpleNamespace

import pytest
from datasets import Dataset

from posttrain.data.pairs.schema import examine_preferences
from posttrain.data.processing import generation_stop_ids
from posttrain.data.rendering.ends import Closing
from posttrain.data.scored import answer_tokens
from posttrain.data.tasks import task_rows, tokens
from posttrain.errors import DataError
from tests.conftest import make_pairs
from tests.data.conversations import TEMPLATES

PROMPT = [{"role": "user", "content": "2+2?"}]


def answer(text):
    return [{"role": "assistant", "content": text}]


def of_family(tokenizer, template, special=(), eos=None, bos=None):
    changed = copy.deepcopy(tokenizer)
    changed.add_special_tokens({"additional_special_tokens": list(special)})
    changed.eos_token = eos or changed.eos_token
    if bos:
        changed.bos_token = bos
    changed.chat_template = (TEMPLATES / f"{template}.jinja").read_text() if "{" not in template else template
    return changed


def long_pairs(texts):
    rows = [{"prompt": PROMPT, "chosen": answer(a), "rejected": answer(b)} for a, b in texts]
    return Dataset.from_list(rows)


@pytest.fixture
def glm(tokenizer):
    return of_family(tokenizer, "glm4moe", ["<|user|>", "<|assistant|>", "[gMASK]", "<sop>", "<|system|>"])


@pytest.mark.parametrize(
    ("lengths", "mode", "ended", "cut"),
    [
        ([200] * 4, "keep_start", 0.0, True),
        ([200] * 4, "keep_end", 1.0, False),
        ([200, 200, 200, 5], "keep_start", 0.25, True),
        ([5] * 9 + [200], "keep_start", 0.9, False),
        ([5] * 4, "keep_start", 1.0, False),
    ],
)
def test_ends_are_those_of_the_tokens_that_are_trained(tokenizer, lengths, mode, ended, cut):
    pairs = long_pairs([("a" * n, "b" * n) for n in lengths])
    report = examine_preferences(pairs, tokenizer, 96, truncation_mode=mode)
    assert report.ended == ended
    assert report.end_of_turn == "<|im_end|>"
    warned = [line for line in report.warnings if "cuts off the end of answers" in line]
    assert len(warned) == cut
    if cut:
        assert f"{1 - ended:.1%} of those looked at" in warned[0]
        assert "max_length 224 keeps 99% of the rows whole" in warned[0]


def test_a_line_break_that_is_cut_off_behind_the_end_takes_no_end(tokenizer):
    newline = copy.deepcopy(tokenizer)
    newline.chat_template = tokenizer.chat_template.replace("'<|im_end|>'", "'<|im_end|>\n'")
    pairs = long_pairs([("aaa", "bbb")])
    whole = examine_preferences(pairs, newline).lengths.whole_99
    assert examine_preferences(pairs, newline, whole - 1).ended == 1.0
    assert examine_preferences(pairs, newline, whole - 2).ended == 0.0


def test_only_dropped_rows_do_not_count_among_ends(tokenizer):
    rows = [{"prompt": "p" * 200, "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a", "rejected": "b"}]
    assert examine_preferences(Dataset.from_list(rows), tokenizer, 96).ended == 1.0


def test_an_end_can_be_required_of_answers_that_are_cut(tokenizer):
    pairs = long_pairs([("a" * 200, "b" * 200)] * 3)
    with pytest.raises(DataError, match=r"max_length 96 cuts off the end .* set `end_of_turn: warn`"):
        examine_preferences(pairs, tokenizer, 96, end_of_turn="require")
    assert examine_preferences(pairs, tokenizer, 300, end_of_turn="require").ended == 1.0


def test_a_template_that_closes_no_turn_trains_with_a_warning_unless_an_end_is_required(glm):
    report = examine_preferences(make_pairs(3), glm)
    assert (report.ended, report.end_of_turn) == (0.0, None)
    assert ["closes no turn" in line or "close no turn" in line for line in report.warnings] == [True]
    with pytest.raises(DataError, match="no answer ends with an end-of-turn token"):
        examine_preferences(make_pairs(3), glm, end_of_turn="require")


@pytest.mark.parametrize(("mode", "warnings"), [("keep_start", 1), ("keep_end", 0)])
def test_ends_of_scored_answers_are_counted_after_cutting(tokenizer, logged, mode, warnings):
    rows = [{"prompt": PROMPT, "completion": answer("a" * 200), "reward": 1.0}] * 4
    args = SimpleNamespace(
        max_length=96, truncation_mode=mode, end_of_turn="warn", dataset_num_proc=None, dataset_text_field="text"
    )
    answer_tokens.drop_overlong(Dataset.from_list(rows), tokenizer, args, "train_dataset")
    assert len([m for m in logged.messages if "100.0% of those looked at are trained without" in m]) == warnings
    args.end_of_turn = "require"
    if warnings:
        with pytest.raises(DataError, match="cuts off the end of answers"):
            answer_tokens.drop_overlong(Dataset.from_list(rows), tokenizer, args, "train_dataset")


GEMMA = ("gemma3", ["<start_of_turn>", "<end_of_turn>", "<eos>", "<bos>"], "<eos>", "<bos>")
PHI = ("phi3", ["<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>", "<|system|>"], "<|endoftext|>", None)
LLAMA = (
    "llama3",
    ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"],
    "<|eot_id|>",
    "<|begin_of_text|>",
)
COHERE = (
    "cohere2",
    re.findall(r"<\|[A-Z_]+\|>", (TEMPLATES / "cohere2.jinja").read_text()),
    "<|END_OF_TURN_TOKEN|>",
    "<BOS_TOKEN>",
)


@pytest.mark.parametrize(
    ("family", "stops", "end"),
    [
        (GEMMA, (), "4<end_of_turn>"),
        (GEMMA, ("<eos>", "<end_of_turn>"), "4<end_of_turn>"),
        # generation does not stop at the template's end of turn
        (GEMMA, ("<eos>",), "4<end_of_turn><eos>"),
        (PHI, (), "4<|end|>"),
        (PHI, ("<|endoftext|>", "<|assistant|>", "<|end|>"), "4<|end|>"),
        (LLAMA, ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"), "4<|eot_id|>"),
        (LLAMA, (), "4<|eot_id|>"),
        (COHERE, (), "4<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
        (COHERE, ("<|END_OF_TURN_TOKEN|>",), "4<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    ],
)
def test_a_demonstration_ends_where_generation_does(tokenizer, family, stops, end):
    template, special, eos, bos = family
    changed = of_family(tokenizer, template, sorted({*special, *([bos] if bos else [])}), eos, bos)
    closing = Closing(changed, changed.convert_tokens_to_ids(list(stops)))
    for demonstration in (answer("It is 4"), "It is 4"):
        text = changed.decode(tokens._ids(PROMPT, demonstration, changed, {}, None, closing))
        assert text.endswith(end), text


def test_special_tokens_at_the_end_of_an_answer_are_no_end_of_it(tokenizer):
    changed = of_family(tokenizer, *GEMMA[:1], [*GEMMA[1], "</answer>"], *GEMMA[2:])
    ids = tokens._ids(PROMPT, answer("<answer>4</answer>"), changed, {})
    assert changed.decode(ids) == "<answer>4</answer><end_of_turn>"


@pytest.mark.parametrize(
    ("text", "ids"),
    [("4", "4<|im_end|>"), ("4<|im_end|>", "4<|im_end|>"), ("4<|im_end|>\n", "4<|im_end|>"), ("4<|pad|>", "4<|pad|>")],
)
def test_a_demonstration_of_plain_text_gets_one_end(tokenizer, text, ids):
    closing = Closing(tokenizer, tokenizer.convert_tokens_to_ids(["<|pad|>"]))
    assert tokenizer.decode(tokens._ids("2+2=", text, tokenizer, {}, None, closing)) == ids


def demonstrated(**columns):
    row = {"prompt": PROMPT, "demonstration": answer("It is 4"), **columns}
    return Dataset.from_list([row] * 2)


def settings(**changes):
    base = dict(chat_template_kwargs=None, empty_demonstrations="error", long_demonstrations="error")
    return SimpleNamespace(**{**base, "max_completion_length": 64, "end_of_turn": "warn", **changes})


def test_demonstrations_under_a_template_that_closes_no_turn_are_said_or_refused(glm, logged):
    rows = tokens.tokenise(demonstrated(), glm, settings(), "train_dataset")
    assert glm.decode(rows[0]["demonstration_ids"]).endswith("It is 4<|im_end|>")
    assert "closes no turn, so 2 of 2 demonstrations end with the tokenizer's '<|im_end|>'" in logged.text
    with pytest.raises(DataError, match="closes no turn, .* end_of_turn is require"):
        tokens.tokenise(demonstrated(), glm, settings(end_of_turn="require"), "train_dataset")


def test_generation_that_does_not_stop_at_a_demonstrations_end_is_said(tokenizer, logged):
    changed = of_family(tokenizer, *GEMMA)
    stops = changed.convert_tokens_to_ids(["<eos>"])
    tokens.tokenise(demonstrated(), changed, settings(), "train_dataset", stops)
    assert "generation does not stop at the demonstrations' end of turn, so 2 of 2" in logged.text


def test_a_template_that_leaves_the_answer_out_is_refused(tokenizer):
    silent = of_family(tokenizer, "{%- for m in messages if m.role == 'user' -%}{{ m.content }}{%- endfor -%}")
    with pytest.raises(DataError, match="row 1: the chat template renders nothing of an answer that is a text"):
        tokens.tokenise(demonstrated(), silent, settings(), "train_dataset")


def test_a_models_own_config_says_where_it_stops_if_it_has_no_generation_config(tiny_folder, tmp_path):
    import json
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 106]}')
    assert generation_stop_ids(str(folder)) == {1, 106}
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [5, 6]}))
    assert generation_stop_ids(str(folder)) == {5, 6}
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    assert generation_stop_ids(str(folder)) == set()


def calling(arguments=None, content=""):
    function = {"name": "add", "arguments": {"left": 2} if arguments is None else arguments}
    call = {"id": "call_1234", "type": "function", "function": function}
    return [{"role": "assistant", "content": content, "tool_calls": [call]}]


@pytest.mark.parametrize("content", ["", None, " "])
@pytest.mark.parametrize(
    ("family", "stops", "text"),
    [
        (("qwen3", (), None, None), ("<|im_end|>",),
         '<tool_call>\n{"name": "add", "arguments": {"left": 2}}\n</tool_call><|im_end|>'),
        (("llama3_1", *LLAMA[1:]), ("<|eom_id|>", "<|eot_id|>"),
         '{"name": "add", "parameters": {"left": 2}}<|eot_id|>'),
        (("gptoss", ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"), None, None),
         ("<|return|>", "<|call|>"), '<|channel|>commentary json<|message|>{"left": 2}<|call|>'),
    ],
)  # fmt: skip
def test_a_demonstration_that_only_calls_a_tool_is_learned_to_the_end_of_the_call(
    tokenizer, content, family, stops, text, logged
):
    template, special, eos, bos = family
    changed = of_family(tokenizer, template, sorted({*special, *([bos] if bos else [])}), eos, bos)
    rows = Dataset.from_list([{"prompt": PROMPT, "demonstration": calling(content=content)}] * 2)
    stop_ids = changed.convert_tokens_to_ids(list(stops))
    for choice in ("error", "rollouts"):
        given = settings(empty_demonstrations=choice, max_completion_length=200)
        found = tokens.tokenise(rows, changed, given, "train_dataset", stop_ids)
        assert changed.decode(found[0]["demonstration_ids"]).endswith(text)
    assert "empty" not in logged.text


@pytest.mark.parametrize("demonstration", [answer(""), [{"role": "assistant", "content": None, "tool_calls": []}], " "])
def test_a_demonstration_that_says_and_calls_nothing_is_empty(tokenizer, demonstration):
    assert tokens._ids(PROMPT, demonstration, tokenizer, {}) == []


def test_calls_of_a_demonstration_are_held_against_their_rendering(tokenizer, logged):
    logged.set_level("INFO", "posttrain")
    args = SimpleNamespace(learns_from_demonstrations=True, chat_template_kwargs=None)
    rows = Dataset.from_list([{"prompt": PROMPT, "demonstration": calling()}] * 2)
    task_rows.check(rows, of_family(tokenizer, "qwen3"), args)
    assert "the chat template adds '<think>\\n\\n</think>' to answers" in logged.text
    with pytest.raises(DataError, match="train_dataset, row 1.*arguments of tool calls as an object"):
        task_rows.check(
            Dataset.from_list([{"prompt": PROMPT, "demonstration": calling('{"left": 2}')}]),
            of_family(tokenizer, "glm4moe"), args,
        )  # fmt: skip
    with pytest.raises(DataError, match="drops tool calls"):
        task_rows.check(rows, of_family(tokenizer, "gemma3"), args)
    with pytest.raises(DataError, match="row 1: the chat template renders nothing of tool calls"):
        tokens.tokenise(rows, of_family(tokenizer, "gemma3"), settings(), "train_dataset")


@pytest.mark.parametrize(
    ("template", "lost"), [("deepseek_r1_distill", "<think>"), ("nemotron_3_nano", r"\n"), ("qwen2_5", None)]
)
def test_scored_answers_whose_prompt_loses_its_end_are_said(tokenizer, logged, template, lost):
    changed = of_family(tokenizer, template)
    rows = [{"prompt": PROMPT, "completion": answer(f"It is {i}"), "reward": float(i)} for i in range(3)]
    args = SimpleNamespace(
        max_length=None, truncation_mode="keep_start", end_of_turn="warn", dataset_num_proc=None,
        dataset_text_field="text",
    )  # fmt: skip
    answer_tokens.drop_overlong(Dataset.from_list(rows), changed, args, "train_dataset")
    said = [m for m in logged.messages if "renders prompts in another way before an answer than alone" in m]
    assert len(said) == (lost is not None)
    assert lost is None or f"their end '{lost}" in said[0]
