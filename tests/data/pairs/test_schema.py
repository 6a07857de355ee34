import copy
import logging
import shutil
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from posttrain.data.pairs import schema
from posttrain.data.pairs.schema import check_preferences, check_run, examine_preferences
from posttrain.data.processing import template_facts
from posttrain.errors import ConfigError, DataError
from tests.conftest import make_pairs

USER = [{"role": "user", "content": "q"}]
TURN_END = 257


def answer(text):
    return [{"role": "assistant", "content": text}]


def pair(prompt=USER, chosen="a", rejected="b", **others):
    sides = {"chosen": chosen, "rejected": rejected}
    if not isinstance(prompt, str):
        sides = {name: answer(side) if isinstance(side, str) else side for name, side in sides.items()}
    return {"prompt": prompt, **sides, **others}


def data(*rows):
    return Dataset.from_list(list(rows))


def text_pairs(n, prompt_length=lambda i: i + 1):
    return data(*(pair("p" * prompt_length(i), f"yes {i}", f"no {i}") for i in range(n)))


def with_template(tokenizer, template):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


@pytest.fixture
def logged(monkeypatch):
    lines = []
    logger = logging.Logger("test")
    logger.addHandler(SimpleNamespace(level=0, handle=lambda record: lines.append(record)))
    monkeypatch.setattr(schema, "get_logger", lambda: logger)
    return lines


@pytest.mark.core("conversational-43", "conversational-None", "standard-30", "implicit-60")
@pytest.mark.parametrize("max_length", [8, 30, 43, 60, 80, 500, None])
@pytest.mark.parametrize("kind", ["conversational", "standard", "implicit"])
def test_rows_dropped_and_cut_are_those_that_trl_drops_and_cuts(tokenizer, kind, max_length):
    pairs = make_pairs(40) if kind == "conversational" else text_pairs(40)
    if kind == "implicit":
        pairs = pairs.map(lambda row: {side: row["prompt"] + row[side] for side in ("chosen", "rejected")})
        pairs = pairs.remove_columns("prompt")
    arguments = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start")
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    kept = DPOTrainer._prepare_dataset(trainer, pairs, tokenizer, arguments, "train")
    if len(kept) == 0:
        with pytest.raises(DataError, match=f"max_length is {max_length}, and every prompt alone is that long"):
            examine_preferences(pairs, tokenizer, max_length)
        return
    lengths = examine_preferences(pairs, tokenizer, max_length).lengths
    assert lengths.dropped == len(pairs) - len(kept)
    collator = DataCollatorForPreference(pad_token_id=0, max_length=max_length)
    cut = 0
    for row in kept:
        left = collator([row])["completion_mask"].sum()
        cut += int(left) < len(row["chosen_ids"]) + len(row["rejected_ids"])
    assert lengths.cut == cut
    assert lengths.parts["chosen"]["max"] >= max(len(row["chosen_ids"]) for row in kept)


def test_the_advised_max_length_is_the_smallest_that_keeps_99_percent(tokenizer):
    pairs = text_pairs(250, prompt_length=lambda i: 250 - i)
    advised = examine_preferences(pairs, tokenizer, 100).lengths
    assert advised.dropped == 151
    assert examine_preferences(pairs, tokenizer, advised.keeps_99).lengths.dropped == 2
    assert examine_preferences(pairs, tokenizer, advised.keeps_99 - 1).lengths.dropped == 3
    lost = [examine_preferences(pairs, tokenizer, advised.whole_99 - less).lengths for less in (0, 1)]
    assert [lengths.dropped + lengths.cut for lengths in lost] == [2, 3]


def test_dropped_rows_and_the_advice_are_said(tokenizer):
    report = examine_preferences(text_pairs(100), tokenizer, 81, name="train_dataset")
    assert report.warnings == [
        "train_dataset: max_length 81 drops 20 of 100 rows, whose prompt alone is that long; max_length 100 keeps 99% "
        "of the rows, 106 keeps 99% of them whole."
    ]


def test_every_row_dropped_is_an_error_that_names_the_length_to_set(tokenizer):
    with pytest.raises(DataError) as error:
        examine_preferences(text_pairs(100, lambda i: i + 5), tokenizer, 5, name="eval_dataset")
    assert str(error.value) == (
        "eval_dataset: max_length is 5, and every prompt alone is that long (5 to 104 tokens), so no row would be left "
        "to train on; max_length 104 keeps 99% of the rows, 110 keeps 99% of them whole."
    )


def test_of_a_large_set_a_sample_spread_over_all_of_it_is_measured(tokenizer, monkeypatch):
    monkeypatch.setattr(schema, "SAMPLE", 10)
    report = examine_preferences(text_pairs(100), tokenizer, 51)
    # rows 1, 11, ..., 91 have prompts of as many tokens
    assert (report.is_sample, report.lengths.rows, report.rows) == (True, 10, 100)
    assert (report.lengths.shortest_prompt, report.lengths.dropped) == (1, 5)
    assert "drops 5 of 10 rows looked at" in report.warnings[0]
    assert "in 10 of them" in report.summary()


def test_all_rows_are_tokenised_before_a_sample_may_say_that_every_one_is_dropped(tokenizer, monkeypatch):
    monkeypatch.setattr(schema, "SAMPLE", 10)
    long = text_pairs(40, lambda i: 3 if i == 33 else 50)
    assert examine_preferences(long, tokenizer, 50).lengths.dropped == 10
    with pytest.raises(DataError, match="every prompt alone is that long"):
        examine_preferences(long.select(range(33)), tokenizer, 50)


def test_keeping_the_end_drops_nothing(tokenizer):
    lengths = examine_preferences(text_pairs(40), tokenizer, 20, truncation_mode="keep_end").lengths
    assert (lengths.dropped, lengths.cut) == (0, 40 - 13)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (pair(chosen=None), r"row 2: chosen is null\. It must be a text, or a list of messages such as"),
        (pair(rejected=[]), "row 2: rejected is an empty list"),
        (pair(prompt=[]), "row 2: prompt is an empty list"),
        (pair(chosen=[{"role": "assistant", "content": None}]), "item 1 has a content that is null"),
        (pair(chosen=[{"role": None, "content": "x"}]), r"item 1 has no role \(its keys: role, content\)"),
    ],
)
def test_a_value_that_trl_would_fall_over_is_named_with_its_row(tokenizer, row, message):
    with pytest.raises(DataError, match=message):
        examine_preferences(data(pair(), row), tokenizer, name="train_dataset")


@pytest.mark.parametrize(
    ("value", "described"),
    [
        (5, r"a number \(5\)"),
        (1.5, r"a number \(1\.5\)"),
        (["a"], r"a list whose item 1 is a text \('a'\)"),
        ([[1, 2]], "a list whose item 1 is a list of int"),
        ({"content": "x"}, "an object with the keys content"),
        ([{"content": "x"}], r"a list whose item 1 has no role \(its keys: content\)"),
        ([{"role": "user", "content": 3}], r"item 1 has a content that is a number \(3\)"),
    ],
)
def test_a_column_of_the_wrong_type_is_described(tokenizer, value, described):
    with pytest.raises(DataError, match=rf"the data set, row 1: rejected is {described}|row 1: .*{described}"):
        examine_preferences(data(pair(rejected=value)), tokenizer)


def test_texts_beside_messages_are_refused_with_the_usual_remedy(tokenizer):
    rows = data({"prompt": "q", "chosen": USER + answer("a"), "rejected": USER + answer("b")})
    with pytest.raises(DataError, match="row 1: prompt is a text, but chosen is a list of messages; if chosen begins"):
        examine_preferences(rows, tokenizer)
    fixed = rows.remove_columns("prompt")
    assert str(examine_preferences(fixed, tokenizer).format) == "conversational preference with implicit prompt"
    rows = data({"prompt": USER, "chosen": answer("a"), "rejected": "b"})
    with pytest.raises(DataError, match="prompt is a list of messages, but rejected is a text; write both as texts"):
        examine_preferences(rows, tokenizer)


def test_a_column_that_would_mislead_trl_is_refused(tokenizer):
    with pytest.raises(DataError, match=r'completion is of another kind.*\n  dataset = dataset.remove_columns\("compl'):
        examine_preferences(data(pair(completion="text")), tokenizer)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"question": "q", "good": "a", "bad": "b"},
            "no column chosen and rejected. Found: question, good, bad. Needed: chosen, rejected, and prompt unless "
            "both sides begin with it. Rename yours:\n"
            "  names = {'question': 'prompt', 'good': 'chosen', 'bad': 'rejected'}\n"
            "  dataset = dataset.rename_columns(names)",
        ),
        ({"prompt": "q", "chosen": "a"}, "no column rejected. Found: prompt, chosen."),
        (
            {"messages": USER},
            "These look like conversational language modelling rows (column messages, of lists of messages with role "
            "and content), without a second answer to compare with.",
        ),
        ({"x": 1}, 'renamed:\n  {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}\n  dataset = dataset.rename'),
        (
            {"instruction": "i", "chosen": "a", "rejected": "b"},
            "train_dataset holds alpaca preference rows (columns instruction, chosen and rejected), which must be "
            "converted first:\n  from posttrain.data.formats import convert\n  dataset = convert(dataset)",
        ),
    ],
)
def test_missing_columns_are_answered_with_found_needed_and_a_fix(tokenizer, columns, message):
    with pytest.raises(DataError) as error:
        examine_preferences(data(columns), tokenizer, name="train_dataset")
    assert message in str(error.value)


def test_the_fix_for_converted_rows_works(tokenizer):
    rows = data({"instruction": "i", "input": "x", "chosen": "a", "rejected": "b"})
    assert str(examine_preferences(schema.convert(rows), tokenizer).format) == "conversational preference"


def test_no_rows_are_an_error(tokenizer):
    with pytest.raises(DataError, match="train_dataset holds no rows"):
        check_preferences(make_pairs(3).select([]), tokenizer)


@pytest.mark.parametrize(
    ("fault", "words"), [(("", "b"), "an empty side"), ((" \n", " "), "an empty side"), (("a", "a"), "identical sides")]
)
@pytest.mark.parametrize("prompt", [USER, "q"])
def test_empty_and_identical_sides_are_counted_and_refused_where_there_is_nothing_else(tokenizer, prompt, fault, words):
    good, bad = pair(prompt), pair(prompt, *fault)
    report = examine_preferences(data(good, bad, good, bad), tokenizer, name="train_dataset")
    assert (report.empty, report.identical) == ((2, 0) if "empty" in words else (0, 2))
    assert f"train_dataset: 2 of 4 pairs have {words} (first: train_dataset, row 2)." in report.warnings[0]
    with pytest.raises(DataError, match=f"train_dataset: all 2 pairs have {words}"):
        examine_preferences(data(bad, bad), tokenizer, name="train_dataset")


def test_a_tool_call_is_no_empty_side(tokenizer):
    call = [{"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}]
    called = "message['content'] + (message.tool_calls | tojson if message.tool_calls else '') + '<|im_end|>'"
    calls = with_template(tokenizer, tokenizer.chat_template.replace("message['content'] + '<|im_end|>'", called))
    assert examine_preferences(data(pair(chosen=call)), calls).empty == 0
    with pytest.raises(DataError, match="the chat template drops tool calls"):
        examine_preferences(data(pair(chosen=call)), tokenizer)


def test_sides_that_share_no_beginning_have_no_prompt(tokenizer):
    rows = data({"chosen": USER + answer("a"), "rejected": answer("b")})
    with pytest.raises(DataError, match="row 1: there is no prompt, and the two sides do not begin with the same mess"):
        examine_preferences(rows, tokenizer)
    texts = [{"chosen": "xa", "rejected": "xb"}, {"chosen": "a", "rejected": "b"}]
    report = examine_preferences(data(*texts), tokenizer)
    assert "1 of 2 pairs have no prompt (first: the data set, row 2)" in report.warnings[0]
    with pytest.raises(DataError, match="all 2 pairs have no prompt. Add a column prompt"):
        examine_preferences(data(texts[1], texts[1]), tokenizer)


def test_sides_that_max_length_makes_equal_are_said_or_refused(tokenizer):
    same_start = pair("q", "the same, then A", "the same, then B")
    report = examine_preferences(data(same_start, pair("q", "C", "D")), tokenizer, 6)
    assert "max_length 6 cuts 1 of 2 rows to sides that are the same" in report.warnings[0]
    with pytest.raises(DataError, match="in all 1 rows, the two sides are the same tokens as far as max_length 6 lets"):
        examine_preferences(data(same_start), tokenizer, 6)


def test_tokenised_pairs_are_measured_as_they_are(tokenizer):
    rows = [{"prompt_ids": [1] * n, "chosen_ids": [2, TURN_END], "rejected_ids": [3, TURN_END]} for n in (4, 9)]
    report = examine_preferences(data(*rows), tokenizer, 9)
    assert str(report.format) == "tokenised preference"
    assert (report.lengths.dropped, report.lengths.cut, report.end_of_turn) == (1, 0, "<|im_end|>")
    endless = [row | {"chosen_ids": [2], "rejected_ids": [3]} for row in rows]
    assert "Append the token to chosen_ids" in examine_preferences(data(*endless), tokenizer).warnings[-1]
    with pytest.raises(DataError, match="row 1: chosen_ids is a list of str; it must be a list of token ids"):
        examine_preferences(data(rows[0] | {"chosen_ids": ["a"]}), tokenizer)


def test_answers_that_do_not_end_the_turn_are_said_and_refused_where_an_end_is_required(tokenizer):
    endless = with_template(
        tokenizer, tokenizer.chat_template.replace("message['content'] + '<|im_end|>'", "message['content']")
    )
    with pytest.raises(DataError, match="no answer ends with an end-of-turn token .* would not learn to stop"):
        examine_preferences(make_pairs(3), endless, end_of_turn="require")
    report = examine_preferences(make_pairs(3), endless)
    assert (report.end_of_turn, report.ended) == (None, 0.0)
    assert "would not learn to stop. Some models' chat templates close no turn" in report.warnings[0]
    report = examine_preferences(make_pairs(3), tokenizer)
    assert (report.end_of_turn, report.ended, report.warnings) == ("<|im_end|>", 1.0, [])


def test_an_end_of_turn_before_a_newline_counts(tokenizer):
    with_newline = with_template(tokenizer, tokenizer.chat_template.replace("'<|im_end|>'", "'<|im_end|>\n'"))
    assert examine_preferences(make_pairs(3), with_newline).end_of_turn == "<|im_end|>"


def test_some_answers_without_an_end_are_counted(tokenizer):
    rows = [{"prompt_ids": [1], "chosen_ids": [2, TURN_END], "rejected_ids": [3]}]
    report = examine_preferences(data(*rows), tokenizer)
    assert report.ended == 0.5
    assert "50.0% of the answers looked at do not end with" in report.warnings[0]


def test_generation_that_stops_at_another_token_is_said(tokenizer):
    report = examine_preferences(make_pairs(3), tokenizer, stop_ids={258})
    assert report.warnings == [
        "the data set: answers end with '<|im_end|>', but generation stops at '<|pad|>'. Set "
        "`model.generation_config.eos_token_id = [257, 258]`, or it will run on after the answer."
    ]
    assert examine_preferences(make_pairs(3), tokenizer, stop_ids={257, 258}).warnings == []


def test_a_prompt_that_the_template_renders_otherwise_before_an_answer_is_said(tokenizer):
    thinking = with_template(
        tokenizer, tokenizer.chat_template.replace("assistant\\n' -}}{%- endif", "assistant\\n<think>' -}}{%- endif")
    )
    report = examine_preferences(make_pairs(3), thinking)
    assert report.lengths.shortened_prompts == 3
    assert "their end '<think>' is left out in training" in report.warnings[0]
    assert examine_preferences(make_pairs(3), tokenizer).lengths.shortened_prompts == 0


def test_a_tokenizer_that_lacks_what_the_rows_need_is_a_setting_to_mend(tokenizer):
    with pytest.raises(ConfigError, match="rows are conversational, and the tokenizer has no chat template"):
        examine_preferences(make_pairs(3), with_template(tokenizer, None))
    no_eos = copy.deepcopy(tokenizer)
    no_eos.eos_token = None
    with pytest.raises(ConfigError, match="tokenizer has no eos_token to end an answer with"):
        examine_preferences(text_pairs(3), no_eos)


def test_a_row_that_the_template_refuses_is_named(tokenizer):
    strict = with_template(
        tokenizer,
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + tokenizer.chat_template,
    )
    bad = pair([{"role": "system", "content": "s"}, *USER])
    with pytest.raises(DataError, match="row 3: the row cannot be turned into tokens: TemplateError: no system"):
        examine_preferences(data(pair(), pair(), bad), strict)


def test_what_trl_says_of_the_template_is_reported(tokenizer):
    assert template_facts(tokenizer) == {"prefix_preserving": True, "stop_token_trained": True}
    unmarked = tokenizer.chat_template.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    assert template_facts(with_template(tokenizer, unmarked))["stop_token_trained"] is None
    late = tokenizer.chat_template.replace(
        " + '<|im_end|>' -}}{%- endgeneration -%}", " -}}{%- endgeneration -%}<|im_end|>"
    )
    assert template_facts(with_template(tokenizer, late))["stop_token_trained"] is False
    last_only = tokenizer.chat_template.replace("message['role'] + '\\n'", "message['role'] + (loop.last | string)")
    assert template_facts(with_template(tokenizer, last_only))["prefix_preserving"] is False
    assert template_facts(with_template(tokenizer, None)) == {"prefix_preserving": None, "stop_token_trained": None}


def test_one_line_sums_up_and_each_warning_has_its_own(tokenizer, logged):
    check_preferences(data(pair(), pair(chosen="b")), tokenizer, 100)
    assert [record.levelname for record in logged] == ["INFO", "WARNING"]
    assert logged[0].getMessage() == (
        "train_dataset: 2 pairs (conversational preference); median and longest, in tokens: prompt 20 and 20, "
        "chosen 2 and 2, rejected 2 and 2; max_length 100 drops 0 and cuts 0; answers end with '<|im_end|>'"
    )


def test_a_stream_is_not_read(tokenizer, logged):
    def never():
        raise AssertionError("read")
        yield

    from datasets import IterableDataset

    assert check_preferences(IterableDataset.from_generator(never), tokenizer) is None
    assert "train_dataset: a stream; its rows are not checked" in logged[0].getMessage()


def test_the_check_leaves_random_numbers_and_the_data_set_alone(tokenizer, tmp_path):
    make_pairs(5).save_to_disk(tmp_path / "pairs")
    pairs = Dataset.load_from_disk(tmp_path / "pairs")
    before = torch.get_rng_state(), sorted(path.name for path in (tmp_path / "pairs").iterdir())
    examine_preferences(pairs, tokenizer, 100)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert sorted(path.name for path in (tmp_path / "pairs").iterdir()) == before[1]


@pytest.fixture
def settings(tmp_path):
    return DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=60)


def test_a_run_is_checked_without_its_weights(tiny_folder, tmp_path, settings, logged):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    (folder / "model.safetensors").unlink()
    evaluation = {"near": make_pairs(4), "far": make_pairs(5)}
    reports = check_run(str(folder), None, settings, make_pairs(6), evaluation)
    assert {name: report.rows for name, report in reports.items()} == {"train_dataset": 6, "near": 4, "far": 5}
    assert reports["far"].max_length == 60
    assert list(check_run(str(folder), None, settings, make_pairs(6), None)) == ["train_dataset"]
    (folder / "generation_config.json").write_text('{"eos_token_id": [256, 258]}')
    warned = check_run(str(folder), None, settings, make_pairs(6))["train_dataset"].warnings
    assert "generation stops at '<|im_start|>' or '<|pad|>'" in warned[-1]


def test_the_name_of_the_data_set_at_fault_is_in_the_error(tiny_folder, settings, tokenizer):
    same = data(pair(chosen="b"))
    with pytest.raises(DataError, match="eval_dataset: all 1 pairs have identical sides"):
        check_run(tiny_folder, tokenizer, settings, make_pairs(3), same)


def test_a_model_without_a_tokenizer_is_a_setting_to_mend(tmp_path, settings):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="model '.*empty' has no tokenizer that can be loaded"):
        check_run(str(tmp_path / "empty"), None, settings, make_pairs(3))
    from posttrain.models import tiny_model

    with pytest.raises(ConfigError, match="the model has no name to load a tokenizer by; pass `processing_class`"):
        check_run(tiny_model(), None, settings, make_pairs(3))
