"""Rows as well-known data sets publish them, and what they are read as."""

import json

import pytest
from datasets import Dataset

from posttrain.cli import main
from posttrain.data import shapes
from posttrain.data.pairs.loading import load_preferences
from posttrain.data.scored.loading import load_scored
from posttrain.data.tasks.loading import load_demonstrations
from posttrain.data.tokens import tokenized_pairs
from posttrain.errors import DataError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


HUMAN = "\n\nHuman: Which river?\n\nAssistant: In France?\n\nHuman: Yes.\n\nAssistant:"
TALK = [user("Which river?"), assistant("In France?"), user("Yes.")]
BINARIZED = {
    "prompt": "Which river?",
    "prompt_id": "f0",
    "chosen": [user("Which river?"), assistant("The Loire.")],
    "rejected": [user("Which river?"), assistant("None.")],
    "messages": [user("Which river?"), assistant("The Loire.")],
    "score_chosen": 8.5,
    "score_rejected": 2.0,
}
RAW = {
    "source": "evol",
    "instruction": "Which river?",
    "models": ["a", "b", "c"],
    "completions": [
        {"model": "a", "response": "A brook.", "overall_score": 5.0},
        {"model": "b", "response": "The Loire.", "overall_score": 8.5},
        {"model": "c", "response": "None.", "overall_score": 2.0},
    ],
    "correct_answers": ["None"],
}
# name: a row, its prompt, chosen and rejected
PAIRS = {
    "UltraFeedback binarized": (BINARIZED, [user("Which river?")], "The Loire.", "None."),
    "UltraFeedback of Argilla": (
        {k: v for k, v in BINARIZED.items() if not k.startswith("score")}
        | {"chosen-rating": 5.0, "rejected-rating": 3.0},
        [user("Which river?")],
        "The Loire.",
        "None.",
    ),
    "Capybara": (
        {
            "prompt": "Yes.",
            "chosen": [*TALK, assistant("The Loire.")],
            "rejected": [*TALK, assistant("None.")],
            "rating_chosen": 5,
            "rating_rejected": 4,
            "conversation": [{"input": "Which river?", "output": "In France?"}],
        },
        TALK,
        "The Loire.",
        "None.",
    ),
    "text prompt, answers as messages": (
        {"prompt": "Which river?", "chosen": [assistant("The Loire.")], "rejected": [assistant("None.")]},
        [user("Which river?")],
        "The Loire.",
        "None.",
    ),
    "UltraFeedback": (RAW, [user("Which river?")], "The Loire.", "None."),
    "HH-RLHF": ({"chosen": HUMAN + " The Loire.", "rejected": HUMAN + " None."}, TALK, "The Loire.", "None."),
    "HH-RLHF with prompts": (
        {"prompt": HUMAN, "response": " The Loire.", "chosen": " The Loire.", "rejected": " None."},
        TALK,
        "The Loire.",
        "None.",
    ),
    "Orca DPO pairs": (
        {"system": "Be short.", "question": "Which river?", "chosen": "The Loire.", "rejected": "None."},
        [system("Be short."), user("Which river?")],
        "The Loire.",
        "None.",
    ),
    "Orca with messages": (
        {"question": "Which river?", "chosen": [assistant("The Loire.")], "rejected": [assistant("None.")]},
        [user("Which river?")],
        "The Loire.",
        "None.",
    ),
    "Orca of Argilla": (
        {
            "system": "",
            "input": "Which river?",
            "chosen": "The Loire.",
            "rejected": "None.",
            "generations": ["None.", "The Loire."],
            "order": ["rejected", "chosen"],
            "rating": [2.0, 9.0],
        },
        [user("Which river?")],
        "The Loire.",
        "None.",
    ),
    "distilabel pairs": (
        {
            "instruction": "Which river?",
            "chosen_response": "The Loire.",
            "rejected_response": "None.",
            "chosen_rating": 5,
        },
        [user("Which river?")],
        "The Loire.",
        "None.",
    ),
    "SHP, A preferred": (
        {
            "history": "Which river?",
            "human_ref_A": "The Loire.",
            "human_ref_B": "None.",
            "labels": 1,
            "score_A": 7,
            "score_B": 2,
        },
        [user("Which river?")],
        "The Loire.",
        "None.",
    ),
    "SHP, B preferred": (
        {
            "history": "Which river?",
            "human_ref_A": "None.",
            "human_ref_B": "The Loire.",
            "labels": 0,
            "score_A": 2,
            "score_B": 7,
        },
        [user("Which river?")],
        "The Loire.",
        "None.",
    ),
    "PKU-SafeRLHF": (
        {
            "prompt": "Which river?",
            "response_0": "None.",
            "response_1": "The Loire.",
            "better_response_id": 1,
            "safer_response_id": 0,
        },
        [user("Which river?")],
        "The Loire.",
        "None.",
    ),
    "HelpSteer3": (
        {
            "domain": "general",
            "context": TALK,
            "response1": "The Loire.",
            "response2": "None.",
            "overall_preference": -2,
        },
        TALK,
        "The Loire.",
        "None.",
    ),
    "Nectar": (
        {
            "prompt": HUMAN + " ",
            "answers": [
                {"answer": "A brook.", "model": "a", "rank": 2.0},
                {"answer": "None.", "model": "b", "rank": 3.0},
                {"answer": "The Loire.", "model": "c", "rank": 1.0},
            ],
            "turns": 2,
        },
        TALK,
        "The Loire.",
        "None.",
    ),
    "Stack Exchange pairs": (
        {"qid": 1, "question": "Which river?", "response_j": "The Loire.", "response_k": "None."},
        [user("Which river?")],
        "The Loire.",
        "None.",
    ),
    "WebGPT comparisons": (
        {
            "question": {"full_text": "Which river?"},
            "answer_0": "None.",
            "answer_1": "The Loire.",
            "score_0": -1.0,
            "score_1": 1.0,
        },
        [user("Which river?")],
        "The Loire.",
        "None.",
    ),
    "Chatbot Arena": (
        {
            "conversation_a": [user("Which river?"), assistant("None.")],
            "conversation_b": [user("Which river?"), assistant("The Loire.")],
            "winner": "model_b",
        },
        [user("Which river?")],
        "The Loire.",
        "None.",
    ),
    "LlamaFactory": (
        {
            "conversations": [{"from": "human", "value": "Which river?"}],
            "chosen": {"from": "gpt", "value": "The Loire."},
            "rejected": {"from": "gpt", "value": "None."},
        },
        [user("Which river?")],
        "The Loire.",
        "None.",
    ),
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_published_pairs_are_read_as_prompt_and_two_answers(tmp_path, logged, name, kind):
    logged.set_level("INFO", logger="posttrain")
    row, prompt, chosen, rejected = PAIRS[name]
    source = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write(source, [row, row])
    else:
        Dataset.from_list([row, row]).to_parquet(str(source))
    found = load_preferences(str(source)).to_list()
    assert found == [{"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}] * 2
    assert "converted to" in logged.text


@pytest.mark.parametrize("columns", [{}, {"score": 1.0}])
def test_conversations_that_share_their_prompt_train_alike_converted_or_not(tokenizer, tmp_path, columns):
    # Skywork's and others' rows, of which TRL finds the prompt itself
    whole = {
        "chosen": [*TALK, assistant("The Loire.")],
        "rejected": [*TALK, assistant("None.")],
        "source": "s",
        **columns,
    }
    pairs = load_preferences(write(tmp_path / "a.jsonl", [whole]))
    assert pairs.column_names == ["chosen", "rejected"]
    with_prompt = Dataset.from_list(load_preferences(write(tmp_path / "b.jsonl", [PAIRS["Capybara"][0]])).to_list())
    assert list(tokenized_pairs(pairs, tokenizer)) == list(tokenized_pairs(with_prompt, tokenizer))


def answers_of(tmp_path, row):
    found = load_scored(write(tmp_path / "a.jsonl", [row]))
    return [(row["prompt"], row["completion"][0]["content"], row["reward"]) for row in found]


@pytest.mark.parametrize(
    ("row", "prompt", "answers"),
    [
        (BINARIZED, [user("Which river?")], [("The Loire.", 8.5), ("None.", 2.0)]),
        (PAIRS["UltraFeedback of Argilla"][0], [user("Which river?")], [("The Loire.", 5.0), ("None.", 3.0)]),
        (RAW, [user("Which river?")], [("A brook.", 5.0), ("The Loire.", 8.5), ("None.", 2.0)]),
        (PAIRS["Capybara"][0], TALK, [("The Loire.", 5.0), ("None.", 4.0)]),
        (PAIRS["SHP, B preferred"][0], [user("Which river?")], [("The Loire.", 7.0), ("None.", 2.0)]),
        (PAIRS["WebGPT comparisons"][0], [user("Which river?")], [("The Loire.", 1.0), ("None.", -1.0)]),
        (
            {"prompt": "Which river?", "response": "The Loire.", "helpfulness": 4, "correctness": 3, "verbosity": 1},
            [user("Which river?")],
            [("The Loire.", 4.0)],
        ),
        (
            {
                "prompt": "Which river?\n<extra_id_1>Assistant\nIn France?\n<extra_id_1>User\nYes.",
                "response": "The Loire.",
                "helpfulness": 4,
            },
            TALK,
            [("The Loire.", 4.0)],
        ),
        (
            {
                "chosen": [*TALK, assistant("The Loire.")],
                "rejected": [*TALK, assistant("None.")],
                "chosen_score": 9.0,
                "rejected_score": 1.0,
            },
            TALK,
            [("The Loire.", 9.0), ("None.", 1.0)],
        ),
    ],
)
def test_published_scores_are_read_with_their_answers(tmp_path, row, prompt, answers):
    assert answers_of(tmp_path, row) == [(prompt, text, score) for text, score in answers]


@pytest.mark.parametrize(
    ("row", "prompt", "demonstration", "gold"),
    [
        ({"question": "1+1?", "answer": "It is <<1+1=2>>2.\n#### 2"}, "1+1?", "It is 2.\n#### 2", "2"),
        ({"problem": "1+1?", "level": "1", "type": "a", "solution": r"So \boxed{2}."}, "1+1?", r"So \boxed{2}.", "2"),
        (
            {
                "problem": "1+1?",
                "solution": "So 2.",
                "answer": "2",
                "generations": ["<think>", "x"],
                "messages": [user("1+1?"), assistant("So 2.")],
            },
            "1+1?",
            "So 2.",
            "2",
        ),
        ({"question": "1+1?", "solution": "So 2.", "answer": "2", "cot": None}, "1+1?", "So 2.", "2"),
        (
            {"data_source": "m", "prompt": [user("1+1?")], "reward_model": {"ground_truth": "2", "style": "rule"}},
            "1+1?",
            None,
            "2",
        ),
        ({"messages": [user("1+1?")], "ground_truth": "2", "dataset": "gsm8k"}, "1+1?", None, "2"),
    ],
)
def test_published_tasks_are_read_with_their_gold_answers(tmp_path, row, prompt, demonstration, gold):
    found = load_demonstrations(write(tmp_path / "a.jsonl", [row]), need_demonstrations=demonstration is not None)[0]
    assert found["prompt"] == [user(prompt)]
    assert found.get("demonstration", None) == (None if demonstration is None else [assistant(demonstration)])
    assert found["gold"] == gold


ORDINARY = [
    {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"},
    {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
    {"chosen": "Human: an essay. Yes.", "rejected": "Human: an essay. No."},
    {"prompt": "Human: is this one? ", "chosen": "a", "rejected": "b"},
    {"prompt": "a", "completion": "b", "reward": 1.0, "helpfulness": 2},
    {"prompt": "a", "answers": ["b", "c"]},
    {"messages": [user("a"), assistant("b")], "ground_truth": "b"},
    {"instruction": "a", "input": "b", "chosen": "c", "rejected": "d"},
    {"instruction": "a", "output": "b"},
    {"question": "a", "answer": "b"},
]


@pytest.mark.parametrize("row", ORDINARY, ids=range(len(ORDINARY)))
def test_ordinary_rows_are_of_no_published_shape(row):
    assert shapes.find(row, row) is None


def test_every_shape_is_told_from_all_others():
    rows = [row for row, *_ in PAIRS.values()]
    for row in rows:
        for kind in shapes.KINDS:
            # of two that fit, find would raise
            shapes.find(row, row, (kind,))


def test_rows_that_could_be_of_two_shapes_are_not_guessed():
    row = PAIRS["SHP, A preferred"][0] | {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": 0}
    with pytest.raises(DataError, match=r"could be rows of several kinds: SHP .*; PKU-SafeRLHF .* --as-is"):
        shapes.find(row, row)


@pytest.mark.parametrize(
    ("good", "tie", "reason"),
    [
        (
            RAW,
            RAW | {"completions": [one | {"overall_score": 3.0} for one in RAW["completions"]]},
            "all answers are as good",
        ),
        (
            PAIRS["WebGPT comparisons"][0],
            PAIRS["WebGPT comparisons"][0] | {"score_0": 1.0},
            "both answers have the same score",
        ),
        (PAIRS["Chatbot Arena"][0], PAIRS["Chatbot Arena"][0] | {"winner": "tie"}, "neither answer wins"),
        (PAIRS["HelpSteer3"][0], PAIRS["HelpSteer3"][0] | {"overall_preference": 0}, "both answers are as good"),
    ],
)
def test_rows_without_a_better_answer_are_left_out_and_counted(tmp_path, logged, good, tie, reason):
    assert len(load_preferences(write(tmp_path / "a.jsonl", [good, tie, good]))) == 2
    assert f"1 rows are left out: {reason}" in logged.text
    with pytest.raises(DataError, match=f"none of its 2 rows can be used: {reason}"):
        load_preferences(write(tmp_path / "b.jsonl", [tie, tie]))


@pytest.mark.parametrize(
    ("row", "change", "problem"),
    [
        (PAIRS["SHP, A preferred"][0], {"labels": 2}, "labels is 2, not 0 or 1"),
        (PAIRS["PKU-SafeRLHF"][0], {"better_response_id": None}, "'better_response_id' is missing"),
        (PAIRS["HH-RLHF"][0], {"chosen": "no transcript"}, "a transcript begins with 'Human:'"),
        (BINARIZED, {"chosen": "a text", "rejected": "another"}, "a side is no conversation"),
        (PAIRS["Orca DPO pairs"][0], {"question": 3}, "a text is missing; found 3"),
        (PAIRS["SHP, A preferred"][0], {"score_A": None, "score_B": 1}, "score_A is null; it must be a number"),
        (PAIRS["WebGPT comparisons"][0], {"score_0": None}, "'score_0' is missing"),
        (PAIRS["WebGPT comparisons"][0], {"score_1": "N/A"}, "score_1 is 'N/A'; it must be a number"),
    ],
)
def test_a_row_unlike_the_others_is_named(tmp_path, row, change, problem):
    with pytest.raises(DataError, match=rf"a\.jsonl, line 2: .*{problem}"):
        load_preferences(write(tmp_path / "a.jsonl", [row, row | change]))


def scored(*scores):
    completions = [{"response": text, "overall_score": score} for text, score in zip("abcd", scores, strict=False)]
    return {"instruction": "q", "completions": completions}


@pytest.mark.parametrize("none", [None, float("nan"), "N/A"])
def test_answers_without_a_score_are_left_out_and_counted(tmp_path, logged, none):
    source = write(tmp_path / "a.jsonl", [scored(3, 2, none), scored(none, 4, 5, none), scored(none, 1)])
    pairs = load_preferences(source)
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in pairs] == [("a", "b"), ("c", "b")]
    assert "3 answers are left out: they have no score" in logged.text
    assert "1 rows are left out: too few have a score" in logged.text
    answers = load_scored(source)
    assert answers["reward"][:] == [3.0, 2.0, 4.0, 5.0, 1.0]
    assert [row[0]["content"] for row in answers["completion"]] == ["a", "b", "b", "c", "b"]
    with pytest.raises(DataError, match="none of its 1 rows can be used: too few have a score"):
        load_scored(write(tmp_path / "b.jsonl", [scored(none, none)]))


@pytest.mark.parametrize("name", ["SHP, A preferred", "WebGPT comparisons"])
def test_the_reason_for_a_row_that_is_refused_is_no_error_of_pythons(tmp_path, name):
    row = PAIRS[name][0]
    row |= {column: None for column in row if column.lower().startswith("score")}
    with pytest.raises(DataError) as raised:
        load_preferences(write(tmp_path / "a.jsonl", [PAIRS[name][0], row]))
    assert "Error" not in str(raised.value) and not str(raised.value).endswith("..")


@pytest.mark.parametrize(
    ("sides", "who"),
    [
        ((TALK + [assistant("b")], TALK), "rejected has"),
        ((TALK[:1], TALK[:1] + [assistant("b")]), "chosen has"),
        ((TALK[:1], TALK[:1]), "both have"),
    ],
)
def test_scored_conversations_without_an_answer_are_left_out_with_the_reason(tmp_path, logged, sides, who):
    scores = {"chosen_reward": 1.0, "rejected_reward": 0.0}
    good = {"chosen": TALK + [assistant("a")], "rejected": TALK + [assistant("b")]} | scores
    bad = dict(zip(("chosen", "rejected"), sides, strict=True)) | scores
    rows = load_scored(write(tmp_path / "a.jsonl", [good, bad]))
    assert rows["prompt"][:] == [TALK, TALK]
    assert f"1 rows are left out: {who} no answer, but the prompt alone" in logged.text


def test_rows_can_be_read_as_they_are(tmp_path):
    source = write(tmp_path / "a.jsonl", [PAIRS["HH-RLHF"][0]])
    assert load_preferences(source, convert=False)[0]["chosen"] == HUMAN + " The Loire."


def test_a_data_set_at_hand_is_converted_on_request():
    found = shapes.convert(Dataset.from_list([BINARIZED]))
    assert found[0]["prompt"] == [user("Which river?")]
    assert (found[0]["score_chosen"], found[0]["score_rejected"]) == (8.5, 2.0)
    alpaca = Dataset.from_list([{"instruction": "a", "chosen": "b", "rejected": "c"}])
    assert shapes.convert(alpaca)[0]["prompt"] == [user("a")]


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


def test_the_command_converts_and_says_what_it_read(tmp_path, capsys):
    source, out = write(tmp_path / "a.jsonl", [PAIRS["Orca DPO pairs"][0]]), tmp_path / "out.jsonl"
    code, printed, _ = run(capsys, "data", "convert", source, out)
    assert (code, "1 rows (pairs) of 1 Orca DPO pairs rows" in printed) == (0, True)
    assert json.loads(out.read_text())["prompt"] == [system("Be short."), user("Which river?")]
    assert run(capsys, "data", "convert", source, out)[0] == 2
    assert run(capsys, "data", "convert", out, tmp_path / "b.jsonl")[0] == 3


def test_the_command_asks_where_rows_can_be_read_in_two_ways(tmp_path, capsys):
    source, out = write(tmp_path / "a.jsonl", [RAW]), tmp_path / "out.jsonl"
    code, _, err = run(capsys, "data", "convert", source, out)
    assert (code, "--to pairs" in err and "--to answers" in err) == (3, True)
    assert run(capsys, "data", "convert", source, out, "--to", "answers")[0] == 0
    assert len(out.read_text().splitlines()) == 3


def test_inspect_and_stats_show_rows_as_they_are_trained(tmp_path, capsys):
    source = write(tmp_path / "a.jsonl", [PAIRS["Orca DPO pairs"][0]] * 3)
    code, printed, _ = run(capsys, "data", "inspect", source, "--model", "embedded:tiny")
    assert code == 0
    assert "Orca DPO pairs rows, converted to pairs" in printed
    assert "<|im_start|>system\nBe short.<|im_end|>" in printed
    code, printed, _ = run(capsys, "data", "stats", source, "--as-is")
    assert "converted" not in printed
    report = json.loads(run(capsys, "data", "stats", source, "--json")[1])
    assert report["converted"]["from"] == "Orca DPO pairs"
    assert report["format"]["style"] == "conversational"


@pytest.mark.parametrize("prompt", ["Which lake?", "Which", [user("Which river?")]])
def test_a_later_row_whose_prompt_is_not_in_its_conversation_is_left_out_and_said(tmp_path, prompt, logged):
    (tmp_path / "a.json").write_text(json.dumps([BINARIZED, BINARIZED | {"prompt": prompt}, BINARIZED]))
    made = load_preferences(str(tmp_path / "a.json"))
    assert made["prompt"][:] == [[user("Which river?")]] * 2
    assert "1 rows are left out: the prompt does not stand in the conversations" in logged.text
