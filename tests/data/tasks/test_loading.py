import gzip
import json
import os
from pathlib import Path

import pytest

from posttrain.data.tasks.gym import gym_tasks
from posttrain.data.tasks.loading import load_demonstrations
from posttrain.errors import ConfigError, DataError, EnvironmentIssue
from posttrain.rewards import GymScore, MathsAnswer, check_golds
from posttrain.rewards.gym import decode_task, encode_task

GSM8K = [
    {"question": "2 boxes of 600?", "answer": "He has 2*600=<<2*600=1200>>1200.\n#### 1,200"},
    {"question": "Half of 5?", "answer": "5/2\n#### 2.5"},
]


def write(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


@pytest.mark.parametrize("name", ["train.jsonl", "train.jsonl.gz"])
def test_gsm8k_files_become_prompt_demonstration_and_gold(tmp_path, name):
    source = write(tmp_path / name, GSM8K)
    rows = load_demonstrations(source)
    assert rows.column_names == ["prompt", "demonstration", "gold"]
    assert rows[0] == {
        "prompt": [{"role": "user", "content": "2 boxes of 600?"}],
        "demonstration": [{"role": "assistant", "content": "He has 2*600=1200.\n#### 1,200"}],
        "gold": "1200",
    }
    assert rows["gold"][:] == ["1200", "2.5"]
    bare = load_demonstrations(source, conversational=False, keep_notes=True, limit=1)
    assert bare.to_list() == [{"prompt": "2 boxes of 600?", "demonstration": GSM8K[0]["answer"], "gold": "1200"}]


@pytest.mark.parametrize(
    "row, gold",
    [
        ({"problem": "1+1?", "solution": "so 2", "answer": "2"}, "2"),
        ({"problem": "1+1?", "solution": r"so \boxed{\frac{4}{2}}"}, r"\frac{4}{2}"),
        ({"prompt": "1+1?", "demonstration": "so 2", "gold": 2, "other": "x"}, "2"),
        ({"prompt": "1+1?", "demonstration": "#### 2", "difficulty": 3}, "2"),
    ],
)
def test_known_columns_are_mapped(tmp_path, row, gold):
    (made,) = load_demonstrations(write(tmp_path / "rows.jsonl", [row]), conversational=False)
    assert (made["prompt"], made["gold"]) == ("1+1?", gold)
    assert made["demonstration"] == row.get("demonstration", row.get("solution"))
    assert ("difficulty" in made) == ("difficulty" in row) and "other" not in made


def test_other_columns_are_mapped_by_name_and_messages_stay(tmp_path):
    row = {
        "ask": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "1+1?"}],
        "said": [{"role": "assistant", "content": "1<<3>>2 is no note"}],
        "right": "2",
    }
    columns = {"prompt": "ask", "demonstration": "said", "gold": "right"}
    (made,) = load_demonstrations(write(tmp_path / "rows.jsonl", [row]), columns=columns)
    assert made["prompt"] == row["ask"] and made["gold"] == "2"
    assert made["demonstration"] == row["said"]


@pytest.mark.parametrize(
    "rows, columns, message",
    [
        ([{"question": "q"}], None, r"no columns for prompt and .*; found \['question'\].*gold_column.*columns="),
        ([{"question": "q", "answer": "4"}], None, r"line 1: 'answer' ends without '#### N'.*ends in '4'"),
        ([*GSM8K, {"question": "q", "answer": "####"}], None, "line 3: 'answer' ends without.*gold_column in a recipe"),
        ([{"question": " ", "answer": "#### 4"}], None, "line 1: 'question', the prompt, is an empty text"),
        ([{"question": "q", "answer": None}], None, "line 1: 'answer', the demonstration, is null"),
        ([{"problem": "q", "solution": "s", "answer": None}], None, "line 1: 'answer', the gold answer, is null"),
        ([{"prompt": "q", "demonstration": [{"role": "assistant"}]}], None, "'demonstration', the demonstration, is a"),
        ([{"a": 1}], {"prompt": "b"}, "column 'b' of columns=.* is missing; found"),
        ([{"prompt": "q", "demonstration": [{"role": "assistant", "content": "#### 1"}]}], None, "must both be texts"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used_are_named(tmp_path, rows, columns, message):
    with pytest.raises(DataError, match=message):
        load_demonstrations(write(tmp_path / "rows.jsonl", rows), columns=columns)


def test_rows_of_unlike_types_are_named(tmp_path):
    rows = [{**GSM8K[0], "difficulty": 1}, {**GSM8K[1], "difficulty": "hard"}]
    with pytest.raises(DataError, match="rows.jsonl: the rows do not have the same types throughout"):
        load_demonstrations(write(tmp_path / "rows.jsonl", rows))


def test_sources_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(DataError, match="missing.jsonl does not exist"):
        load_demonstrations("missing.jsonl")
    for config in (None, "main"):
        with pytest.raises(EnvironmentIssue, match="'openai/gsm8k' is no.*, and the hub cannot be reached"):
            load_demonstrations("openai/gsm8k", config=config)
    source = write(tmp_path / "rows.jsonl", GSM8K)
    with pytest.raises(ConfigError, match="limit=0 must be at least 1"):
        load_demonstrations(source, limit=0)
    with pytest.raises(ConfigError, match="'answer' is not one of prompt, demonstration, gold"):
        load_demonstrations(source, columns={"answer": "answer"})
    with pytest.raises(ConfigError, match="must name the columns of at least prompt and demonstration"):
        load_demonstrations(source, columns={"prompt": "question"})


def test_demonstrations_may_be_missing_where_nothing_learns_from_them(tmp_path):
    source = write(tmp_path / "rows.jsonl", [{"problem": "1 + 1", "answer": "2"}])
    (made,) = load_demonstrations(source, need_demonstrations=False)
    assert made == {"prompt": [{"role": "user", "content": "1 + 1"}], "gold": "2"}
    (made,) = load_demonstrations(source, columns={"prompt": "problem", "gold": "answer"}, need_demonstrations=False)
    assert made["gold"] == "2" and "demonstration" not in made
    rows = [{"prompt": "a", "demonstration": text, "gold": "2"} for text in ("it is 2", " ", None)]
    source = write(tmp_path / "rows.jsonl", rows)
    made = load_demonstrations(source, need_demonstrations=False, conversational=False)
    assert made["demonstration"] == ["it is 2", "", ""]
    made = load_demonstrations(source, need_demonstrations=False)
    assert [turns[0]["content"] for turns in made["demonstration"]] == ["it is 2", "", ""]
    with pytest.raises(DataError, match="no columns for prompt and gold"):
        load_demonstrations(write(tmp_path / "rows.jsonl", [{"prompt": "a"}]), need_demonstrations=False)
    with pytest.raises(ConfigError, match="at least prompt and demonstration or gold"):
        load_demonstrations(source, columns={"prompt": "prompt"}, need_demonstrations=False)


def test_a_hub_data_set_is_asked_for_its_config_and_mapped(monkeypatch):
    import datasets

    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_list(GSM8K)

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = load_demonstrations("openai/gsm8k", split="test", config="main", limit=1)
    assert asked == [(("openai/gsm8k",), {"name": "main", "split": "test"})]
    assert rows["gold"][:] == ["1200"]


def test_generated_tasks_are_named_with_their_options():
    rows = load_demonstrations("generated:arithmetic?n=30&seed=3&operands=2-3&digits=2&operators=+*")
    assert len(rows) == 30 and {"prompt", "demonstration", "gold", "difficulty"} == set(rows.column_names)
    asked = " ".join(row["prompt"][0]["content"] for row in rows)
    assert "+" in asked and "*" in asked and "-" not in asked
    held_out = load_demonstrations("generated:modular_sum?n=20&terms=2", "test", conversational=False)
    train = load_demonstrations("generated:modular_sum?n=20&terms=2", conversational=False)
    assert not set(held_out["prompt"]) & set(train["prompt"])
    assert len(load_demonstrations("generated:modular_sum", limit=7)) == 7
    check_golds(rows, "gold", MathsAnswer(engine="numbers"))


@pytest.mark.parametrize(
    "source, message",
    [
        ("generated:arithmetics", "'generated:arithmetics' is not known; generated tasks are generated:arithmetic"),
        ("generated:reverse_list", "'generated:reverse_list' makes pairs; generated tasks are generated:arithmetic"),
        (
            "generated:arithmetic?operand=2-3",
            r"no option 'operand' \(it has n, seed, operands.*did you mean 'operands'",
        ),
        ("generated:arithmetic?n=many", "n='many' is no integer"),
        ("generated:arithmetic?conversational=maybe", "conversational='maybe' must be true or false"),
        ("generated:arithmetic?n", "write options as key=value"),
        ("generated:modular_sum?modulus=1", "'generated:modular_sum.modulus=1': modulus=1 must be an integer"),
        ("gym:chain_sun", "reasoning-gym has no data set 'chain_sun'. Did you mean 'chain_sum'"),
        ("gym:chain_sum?max_term=3", r"gym:chain_sum has no option 'max_term' \(it has .*did you mean 'max_terms'"),
        ("gym:chain_sum?min_terms=0", "does not take the options {'min_terms': 0}: min_terms must be positive"),
    ],
)
def test_generated_tasks_that_cannot_be_are_refused(source, message):
    with pytest.raises(ConfigError, match=message):
        load_demonstrations(source)


def test_gym_tasks_come_by_name_with_their_verifier_as_reward():
    rows = load_demonstrations("gym:chain_sum?n=20&seed=1&max_terms=3", conversational=False)
    assert rows.column_names == ["prompt", "demonstration", "gold", "gym_task"] and len(rows) == 20
    assert rows["demonstration"][:] == rows["gold"][:]
    held_out = load_demonstrations("gym:chain_sum?n=20&seed=1&max_terms=3", "test", conversational=False)
    assert not set(rows["prompt"]) & set(held_out["prompt"]) and len(set(rows["prompt"])) == 20

    # Its verifier raises on an answer that is no number.
    factors = gym_tasks("prime_factorization", 1, 0)
    reward = GymScore(workers=1, timeout=20)
    assert check_golds(rows, "gym_task", reward) == 20
    answer, task = rows[0]["gold"], rows[0]["gym_task"]
    texts = [answer, f"<answer>{answer}</answer>", f"<think>0</think>{answer}", f"the answer is {answer}", "x", ""]
    scores = reward(completions=texts, gym_task=[task] * len(texts))
    assert scores[:3] == [1.0, 1.0, 1.0] and 0 < scores[3] < 0.99 and scores[4:] == [0.0, 0.0]
    assert reward(completions=["x"], gym_task=factors["gym_task"]) == [0.0]
    assert reward.counters == {"scored": 7, "timeouts": 0, "exceptions": 1}
    with pytest.raises(DataError, match="row 1: the gold answer 'x' in column 'gym_task'.*make it with gym_tasks"):
        check_golds([{"gym_task": "x"}], "gym_task", reward)
    reward.close()


def test_gym_tasks_without_an_answer_or_in_too_small_a_number_are_refused():
    with pytest.raises(DataError, match="gym:rush_hour: the task .* has the answer None"):
        gym_tasks("rush_hour", 1, 0)
    with pytest.raises(DataError, match="has only .* different questions among .*; ask for fewer"):
        gym_tasks("chain_sum", 500, 0, min_terms=2, max_terms=2, min_digits=1, max_digits=1)


def test_tasks_keep_what_json_has_no_words_for():
    entry = {"a": (1, [2, {"b"}]), "c": {1: (2, 3)}, "__kind__": None, "f": frozenset({4})}
    assert decode_task(encode_task("name", entry)) == ("name", entry)


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif("POSTTRAIN_TEST_DATA" not in os.environ, reason="reads the data of POSTTRAIN_TEST_DATA")
def test_gsm8k_is_mapped_whole():
    folder = Path(os.environ["POSTTRAIN_TEST_DATA"])
    for name, count in (("train", 7473), ("test", 659)):
        rows = load_demonstrations(str(folder / f"gsm8k_{name}.jsonl.gz"))
        assert len(rows) == count
        assert all(float(gold) == int(gold) for gold in rows["gold"])
        assert not any("<<" in row[0]["content"] for row in rows["demonstration"])
        check_golds(rows, "gold", MathsAnswer(engine="numbers"))


CODE = [
    "cin >> x; cout << x; cin >> y; // 1<<3>>2",
    "List<<T>> and cat <<EOF >>out.txt",
    "a<<b=3>>c",
    "x <<= 2; y >>= 1",
    "if (1<<2==n>>1)",
]


@pytest.mark.parametrize("text", [*CODE, "1+1=<<1+1=2>>2"])
@pytest.mark.parametrize("mark", ["#### 4", r"\boxed{4}"])
def test_texts_of_other_files_than_gsm8ks_keep_all_they_have(tmp_path, text, mark, logged):
    logged.set_level("INFO", logger="posttrain")
    whole = f"{text}\n{mark}"
    for number, row in enumerate(
        [
            {"problem": "q", "solution": whole},
            {"question": "q", "solution": whole, "answer": "4"},
            {"prompt": "q", "demonstration": whole},
            {"prompt": [{"role": "user", "content": "q"}], "demonstration": [{"role": "assistant", "content": whole}]},
        ]
    ):
        (made,) = load_demonstrations(write(tmp_path / f"{number}.jsonl", [row]))
        assert made["demonstration"] == [{"role": "assistant", "content": whole}]
    assert "calculator notes" not in logged.text


@pytest.mark.parametrize("text", CODE)
def test_code_in_files_of_gsm8ks_shape_is_kept(tmp_path, text):
    row = {"question": "q", "answer": f"{text} <<2*2=4>>4\n#### 4"}
    (made,) = load_demonstrations(write(tmp_path / "a.jsonl", [row]), conversational=False)
    assert made["demonstration"] == f"{text} 4\n#### 4"
    boxed = {"question": "q", "answer": f"{text} <<2*2=4>>4 \\boxed{{4}}"}
    (made,) = load_demonstrations(write(tmp_path / "b.jsonl", [boxed]), conversational=False)
    assert made["demonstration"] == boxed["answer"]


@pytest.mark.parametrize(
    "note", ["48/2=24", "5*.20=1.00", "1,000-1=999", "(3+4)*2=14", "10*50%=5", "$5*2=$10", "7-9=-2"]
)
def test_calculator_notes_are_removed_from_gsm8ks_files_and_said_once(tmp_path, note, logged):
    logged.set_level("INFO", logger="posttrain")
    rows = [{"question": "q", "answer": f"so <<{note}>>7, <<1+1=2>>2\n#### 7"}] * 3
    source = write(tmp_path / "a.jsonl", rows)
    assert load_demonstrations(source, conversational=False)["demonstration"][:] == ["so 7, 2\n#### 7"] * 3
    assert logged.text.count("6 calculator notes (<<48/2=24>>) are removed from the answers") == 1
    logged.clear()
    kept = load_demonstrations(source, conversational=False, keep_notes=True)
    assert kept["demonstration"][:] == [row["answer"] for row in rows]
    assert "are removed" not in logged.text


@pytest.mark.parametrize(
    ("marked", "gold"),
    [
        (r"\boxed{(2,100)}", "(2,100)"),
        (r"\boxed{[10,100)}", "[10,100)"),
        (r"\boxed{\{1,200,300\}}", r"\{1,200,300\}"),
        (r"\boxed{x=1,200}", "x=1,200"),
        (r"\boxed{1,20}", "1,20"),
        (r"\boxed{1,234}", "1234"),
        ("#### 1,234", "1234"),
        ("#### -1,234,567.5", "-1234567.5"),
    ],
)
def test_commas_of_thousands_are_left_out_of_a_plain_number_only(tmp_path, marked, gold):
    row = {"question": "q", "answer": f"It is so.\n{marked}"}
    (made,) = load_demonstrations(write(tmp_path / "a.jsonl", [row]), conversational=False)
    assert made["gold"] == gold
