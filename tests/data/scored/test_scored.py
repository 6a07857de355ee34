import gzip
import json
import math
import random
import re
from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict

from posttrain import tables
from posttrain.data.scored import answer_tokens, baselines
from posttrain.data.scored.loading import as_scored, load_scored
from posttrain.data.scored.scales import check_range, check_scales
from posttrain.data.scored.scoring import reward_key, score
from posttrain.errors import ConfigError, DataError, EnvironmentIssue
from posttrain.mechanisms.sequence_cache import ReferenceCache

ONE = {"prompt": "1 + 1 =", "completion": " 2", "reward": 0.9}
TWO = {"prompt": "1 + 2 =", "completion": " 4", "reward": 0.1}
USER, SAYS = [{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "Hello"}]
SHRUGS = [{"role": "assistant", "content": "Eh"}]
PAIR = {"prompt": USER, "chosen": SAYS, "rejected": SHRUGS, "chosen_reward": 1.5, "rejected_reward": -0.5}


def write(path, rows):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


def rows_of(*rows):
    return Dataset.from_list(list(rows))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_file_of_scored_answers(tmp_path, name):
    found = load_scored(write(tmp_path / name, [ONE | {"other": 1}, TWO | {"baseline": 0.5}]))
    assert found.column_names == ["prompt", "completion", "reward"]
    assert found.to_list() == [ONE, TWO]
    assert load_scored(write(tmp_path / name, [ONE | {"baseline": 0.5}, TWO | {"baseline": 0.4}]))["baseline"][:] == [
        0.5,
        0.4,
    ]


@pytest.mark.parametrize("names", [("chosen_reward", "rejected_reward"), ("score_chosen", "score_rejected")])
def test_pairs_with_two_rewards_become_two_rows(tmp_path, names):
    chosen, rejected = names
    pair = {"prompt": USER, "chosen": SAYS, "rejected": SHRUGS, chosen: 1.5, rejected: -0.5}
    found = load_scored(write(tmp_path / "pairs.jsonl", [pair, pair]), limit=1)
    expected = [
        {"prompt": USER, "completion": SAYS, "reward": 1.5},
        {"prompt": USER, "completion": SHRUGS, "reward": -0.5},
    ]
    assert found.to_list() == expected
    assert as_scored(rows_of(pair), "train_dataset").to_list() == expected


def test_columns_are_renamed_thumbs_are_rewards_and_kept_columns_stay():
    thumbs = rows_of(
        {"prompt": "p", "completion": "a", "label": True}, {"prompt": "p", "completion": "b", "label": False}
    )
    assert as_scored(thumbs, "x")["reward"][:] == [1.0, 0.0]
    pair = rows_of(PAIR | {"baseline": 0.25, "other": 1})
    assert as_scored(pair, "x", keep=("baseline",)).column_names == ["prompt", "completion", "reward", "baseline"]
    assert as_scored(pair, "x", keep=("baseline",))["baseline"][:] == [0.25, 0.25]
    assert as_scored(pair.remove_columns(["chosen_reward"]), "x", needs_reward=False).column_names == [
        "prompt",
        "completion",
    ]


def test_columns_by_other_names_are_read_from_a_file(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"question": "1?", "answer": "2", "stars": 3}])
    found = load_scored(source, columns={"question": "prompt", "answer": "completion", "stars": "reward"})
    assert found.to_list() == [{"prompt": "1?", "completion": "2", "reward": 3.0}]
    with pytest.raises(DataError, match="column 'score' of columns=.* is missing; found"):
        load_scored(source, columns={"score": "reward"})


def test_alpaca_rows_are_converted(tmp_path):
    found = load_scored(
        write(tmp_path / "a.jsonl", [{"instruction": "Say", "input": "hi", "output": "hi", "reward": 1}])
    )
    assert found[0]["prompt"] == [{"role": "user", "content": "Say\nhi"}]
    assert found[0]["completion"] == [{"role": "assistant", "content": "hi"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"reward": None}, "row 2: reward is missing; every answer needs a number. Fill it in, or leave the row out."),
        ({"reward": float("nan")}, "row 2: reward is nan; it must be a finite number."),
        ({"reward": float("inf")}, "row 2: reward is inf; it must be a finite number."),
        ({"reward": 1e39}, "row 2: reward is 1e+39; numbers beyond 1e+18 cannot be trained with: gradients"),
        ({"reward": -1e308}, "row 2: reward is -1e+308; numbers beyond 1e+18 cannot be trained with"),
        ({"completion": None}, "row 2: completion is null. It must be a text, or a list of messages"),
    ],
)
def test_a_bad_value_is_named_with_its_row(row, message):
    with pytest.raises(DataError) as error:
        as_scored(rows_of(ONE, TWO | row), "train_dataset")
    assert f"train_dataset, {message}" in str(error.value)


def test_a_bad_value_in_a_file_is_named_with_its_line(tmp_path):
    for bad, message in (
        (TWO | {"reward": "good"}, "line 2: reward is a text ('good'); it must be a number."),
        (
            {"prompt": "x", "completion": "y"},
            "line 2 lacks reward. Found: prompt, completion. Needed: prompt, completion",
        ),
        (TWO | {"completion": SAYS}, "line 2: completion is a list of messages, and in"),
        (PAIR | {"prompt": "p", "chosen": "a", "rejected": "b", "rejected_reward": None}, "rejected_reward is missing"),
    ):
        with pytest.raises(DataError) as error:
            load_scored(write(tmp_path / "bad.jsonl", [ONE, bad]))
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "p", "completion": "c"}], "x has no column reward. Found: prompt, completion. Needed: prompt,"),
        (
            [{"prompt": "p", "completion": "c", "score": 1.0}],
            "Rename yours:\n  dataset = dataset.rename_columns({'score': 'reward'})",
        ),
        (
            [{"question": "p", "response": "c", "rating": 1.0}],
            "rename_columns({'rating': 'reward', 'response': 'completion', 'question': 'prompt'})",
        ),
        ([{"prompt": "p", "chosen": "c", "rejected": "d"}], "x has no column chosen_reward and rejected_reward."),
        ([{"text": "p"}], "x has no column prompt. Found: text."),
    ],
)
def test_missing_columns_are_named_with_a_fix(rows, message):
    with pytest.raises(DataError) as error:
        as_scored(rows_of(*rows), "x")
    assert message in str(error.value)


def test_streams_empty_data_and_empty_answers(logged):
    with pytest.raises(ConfigError, match="x is a stream. Values, the rows to keep and reference log-probabilities"):
        as_scored(rows_of(ONE).to_iterable_dataset(), "x")
    with pytest.raises(ConfigError, match=r"x is a list, no data set. Make one of its rows: `datasets.Dataset.from_l"):
        as_scored([ONE], "x")
    with pytest.raises(ConfigError, match=r"x is a DatasetDict of dev, train. Choose a split by its name, `x=data\['d"):
        as_scored(DatasetDict(dev=rows_of(ONE), train=rows_of(TWO)), "x")
    with pytest.raises(DataError, match="x holds no rows."):
        as_scored(rows_of(ONE).select([]), "x")
    with pytest.raises(DataError, match="x: all 1 answers are empty"):
        as_scored(rows_of(ONE | {"completion": " "}), "x")
    as_scored(rows_of(ONE, ONE | {"completion": ""}), "x")
    assert "x: 1 of 2 answers are empty; they teach to say nothing." in logged.text
    with pytest.raises(
        DataError, match="x has no column 'baseline'. Found: prompt, completion, reward. Rename or add it."
    ):
        as_scored(rows_of(ONE), "x", keep=("baseline",))


def test_files_on_different_scales_are_refused(tmp_path):
    first = write(tmp_path / "unit.jsonl", [ONE, TWO])
    stars = write(tmp_path / "stars.jsonl", [TWO | {"reward": 5}, TWO | {"reward": 1}])
    with pytest.raises(DataError, match=r"on different scales \(.*unit.jsonl: 0.1 to 0.9; .*stars.jsonl: 1 to 5\)"):
        load_scored([first, stars])
    assert load_scored([first, stars], same_scale=True)["reward"][:] == [0.9, 0.1, 5.0, 1.0]
    low = write(tmp_path / "low.jsonl", [TWO | {"reward": 0.35}])
    assert len(load_scored([first, low])) == 3
    check_scales({"a": [0.0, 0.0], "b": [0.0, 7.0]})


def drawn(n, draw, seed=0):
    rng = random.Random(seed)
    return [draw(rng) for _ in range(n)]


def raw(rng):
    """As a reward model scores, on both sides of 0."""
    return rng.gauss(-0.1, 1.0)


def sigmoid(rng):
    return 1 / (1 + math.exp(-raw(rng)))


def stars(rng):
    return float(rng.randint(1, 5))


def unit(rng):
    return rng.random()


def thumbs(share):
    return lambda rng: float(rng.random() < share)


APART = {
    "raw scores beside their sigmoid": (drawn(100, raw), drawn(100, sigmoid)),
    "in few rows": (drawn(12, raw), drawn(50, sigmoid)),
    "negative beside positive": (drawn(50, lambda rng: -rng.random()), drawn(50, unit)),
    "minus or plus one beside 0 or 1": (drawn(50, lambda rng: rng.choice([-1.0, 1.0])), drawn(50, thumbs(0.5))),
    "stars": (drawn(50, unit), drawn(50, stars)),
    "a few stars": (drawn(50, unit), drawn(4, stars)),
    "percent": (drawn(30, unit), drawn(30, lambda rng: 100 * rng.random())),
    "half the width": (drawn(200, unit), drawn(200, lambda rng: 0.3 + 0.3 * rng.random())),
    "moved": (drawn(50, unit), drawn(50, lambda rng: 2 + rng.random())),
    "all the same, elsewhere": (drawn(16, thumbs(0.5)), [4.0] * 16),
}


@pytest.mark.parametrize("case", APART)
def test_scales_that_differ_are_told_apart(case):
    first, second = APART[case]
    for rewards in ({"a": first, "b": second}, {"a": second, "c": first, "b": second}):
        with pytest.raises(DataError, match=r"of these data sets are on different scales \(a: .* to .*; [bc]: "):
            check_scales(rewards, "data sets")


ALIKE = {
    "raw": (raw, raw),
    "sigmoid": (sigmoid, sigmoid),
    "thumbs": (thumbs(0.1), thumbs(0.9)),
    "hardly any thumbs": (thumbs(0.02), thumbs(0.5)),
    "all thumbs": (lambda rng: 1.0, thumbs(0.5)),
    "stars": (stars, lambda rng: float(rng.choice([2, 3, 3, 4, 4, 5]))),
    "seldom negative": (lambda rng: rng.gauss(2.2, 1.0), lambda rng: rng.gauss(2.2, 1.0)),
    "a little better": (raw, lambda rng: raw(rng) + 0.7),
}


@pytest.mark.parametrize("sizes", [(50, 50), (50, 2000), (200, 20), (50, 3), (30, 1)], ids=str)
@pytest.mark.parametrize("case", ALIKE)
def test_honest_samples_of_one_scale_pass(case, sizes):
    for seed in range(0, 100, 2):
        pair = [drawn(n, draw, seed + i) for i, (n, draw) in enumerate(zip(sizes, ALIKE[case], strict=True))]
        check_scales({"a": pair[0], "b": pair[1]})
        check_scales({"a": pair[1], "b": pair[0]})


def test_rewards_out_of_range_are_named():
    with pytest.raises(DataError) as error:
        check_range([0.5, 1.2], "train_dataset", 0.0, 1.0, "the head cannot reach it", "Scale.")
    assert (
        str(error.value) == "train_dataset, answer 2: reward is 1.2, outside [0, 1]; the head cannot reach it. Scale."
    )
    with pytest.raises(DataError, match="answer 1: reward is -0.1, below 0; why. fix"):
        check_range([-0.1], "x", 0.0, math.inf, "why", "fix")
    check_range([0.0, 1.0], "x", 0.0, 1.0, "", "")


def huge(completions, **columns):
    return [1e39] * len(completions)


def test_a_reward_function_scores_each_answer_once(tmp_path):
    calls = []

    def by_length(prompts, completions, source, **columns):
        calls.extend(completions)
        return [len(text) / 10 if mark == "a" else None for text, mark in zip(completions, source, strict=True)]

    rows = [{"prompt": "p", "completion": "x" * n, "source": "a"} for n in range(1, 4)]
    cache = ReferenceCache(tmp_path, "key")
    found = as_scored(rows_of(*rows), "x", scorer=lambda rows: score(rows, by_length, "x", cache))
    assert found["reward"][:] == pytest.approx([0.1, 0.2, 0.3], rel=1e-6) and len(calls) == 3
    assert found.column_names == ["prompt", "completion", "reward"]
    again = as_scored(
        rows_of(*rows, rows[0] | {"completion": "xxxx"}), "x", scorer=lambda rows: score(rows, by_length, "x", cache)
    )
    assert again["reward"][:3] == found["reward"][:] and calls[3:] == ["xxxx"], "the cache knows the first three"
    with pytest.raises(
        DataError, match="x, answer 2: reward function by_length gave None; every answer needs a number"
    ):
        score([rows[0], rows[1] | {"source": "b"}], by_length, "x")
    with pytest.raises(DataError, match=r"x, answer 1: the score by huge is 1e\+39; numbers beyond 1e\+18"):
        score([rows[0]], huge, "x")


@pytest.mark.parametrize("bad", [None, float("nan"), 1e39, ConnectionError, KeyboardInterrupt])
def test_scores_are_kept_whatever_ends_the_scoring(tmp_path, bad):
    calls = []

    def judge(completions, **columns):
        calls.extend(completions)
        if isinstance(bad, type) and "a9" in completions:
            raise bad
        return [bad if text in ("a5", "a9") else 1.0 for text in completions]

    rows = [{"prompt": "q", "completion": f"a{i}"} for i in range(10) if i != 5 or not isinstance(bad, type)]
    # what the function raises is no score; what ends the process is not its own
    with pytest.raises(KeyboardInterrupt if bad is KeyboardInterrupt else DataError):
        score(rows, judge, "x", ReferenceCache(tmp_path, "key"), batch_size=4)
    kept = ReferenceCache(tmp_path, "key").load()
    # in batches of four: a5 is in the second, whose others are kept, and a9 in the third
    assert len(kept) == (8 if isinstance(bad, type) else 7)
    rows = [row for row in rows if row["completion"] not in ("a5", "a9")]
    assert score(rows, judge, "x", ReferenceCache(tmp_path, "key")) == [1.0] * len(rows)
    assert len(set(calls)) == len(calls), "none is paid for twice"


def test_a_cache_of_scores_that_cannot_be_written_is_an_answer_before_the_judge_is_asked(tmp_path):
    def judge(completions, **columns):
        raise AssertionError("asked")

    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentIssue, match="the cache .* cannot be written"):
        score([{"prompt": "q", "completion": "a"}], judge, "x", ReferenceCache(tmp_path / "file", "key"))


def test_a_reward_functions_key_follows_our_version(monkeypatch):
    before = reward_key(huge)
    monkeypatch.setattr("posttrain.__version__", "0.0.1")
    assert reward_key(huge) != before


def test_a_coroutine_scores_too_and_an_exception_is_shown():
    async def later(prompts, completions, **columns):
        return [0.5] * len(completions)

    def broken(**columns):
        raise RuntimeError("no server")

    assert score([{"prompt": "p", "completion": "c"}], later, "x") == [0.5]
    with pytest.raises(DataError, match="gave None.*The last exception: RuntimeError: no server"):
        score([{"prompt": "p", "completion": "c"}], broken, "x")


def test_a_reward_functions_key_follows_its_code():
    def make(scale):
        return lambda completions, **columns: [scale * len(text) for text in completions]

    assert reward_key(make(1.0)) == reward_key(make(1.0)) != reward_key(make(2.0))


def test_baselines_and_what_they_say():
    dataset = rows_of({"prompt": USER, "v": 0.5}, {"prompt": SAYS, "v": 0.1}, {"prompt": USER, "v": 0.2})
    keys = baselines.prompt_keys(dataset)
    assert keys[0] == keys[2] != keys[1]
    assert baselines.mean_per_prompt(keys, [0.2, 0.9, 0.6]) == pytest.approx([0.4, 0.9, 0.4])
    assert {baselines.mean([value / 10] * n) for value in range(10) for n in (3, 7)} == {v / 10 for v in range(10)}
    assert baselines.column_of_values(dataset, "v", "x") == [0.5, 0.1, 0.2]
    with pytest.raises(DataError, match="x, answer 2: v, the value, is null; it must be a finite number."):
        baselines.column_of_values(rows_of({"v": 1.0}, {"v": None}), "v", "x")
    with pytest.raises(DataError, match=r"x, answer 2: theirs, the value, is 1e\+30; numbers beyond 1e\+18"):
        baselines.column_of_values(rows_of({"v": 1.0}, {"v": 1e30}), "v", "x", "theirs")
    found = baselines.summarise([0.3, 0.15, -0.2, 0.0], [0.3, 0.15, 0.0, 0.0])
    assert (found.rows, found.kept, found.positive) == (4, 2, 0.5)
    # (.45)^2 / (.09 + .0225)
    assert found.effective == pytest.approx(1.8) and found.quantiles == [-0.2, 0.0, 0.15, 0.15, 0.3]
    assert "2 of 4 answers have a gradient; 50.0% beat their value" in found.summary()


def test_no_positive_advantage_shows_the_histogram():
    with pytest.raises(DataError) as error:
        baselines.check_positive([-0.4, -0.3, 0.0, 0.0], "column", "train_dataset")
    lines = str(error.value).splitlines()
    assert lines[0].startswith("train_dataset: none of 4 answers has a reward above its value (value: column)")
    assert len(lines) == 9 and lines[1].split()[:4] == ["-0.4", "to", "-0.35", "1"]
    assert lines[8].split()[3:] == ["2", "#" * 40]
    assert tables.histogram([0.5, 0.5]).split()[:2] == ["0.5", "2"]
    baselines.check_positive([-1.0, 0.1], "mean", "x")


def test_what_only_rounding_tells_apart_is_equal():
    rewards = [0.1, 0.1 + 1e-16] * 4
    advantages = baselines.advantages_of(rewards, [baselines.mean(rewards)] * 8)
    assert advantages == [0.0] * 8
    with pytest.raises(DataError, match="All rewards are equal, up to rounding, so there is nothing to tell answers"):
        baselines.check_positive(advantages, "mean", "x")
    with pytest.raises(DataError, match=r"x: all 8 rewards are equal, up to rounding.* \(value: head\).*lost\. The"):
        baselines.check_unequal(rewards, "head", "x", " 3 lost.")
    baselines.check_unequal([0.1, 0.101], "head", "x")
    assert baselines.advantages_of([1000.01, 0.5, -2.0], [1000.0, 0.5, -1.0]) == pytest.approx([0.01, 0.0, -1.0])
    assert tables.histogram([0.0, 5e-324]).split()[1] == "2"


def test_weights_that_vanish_in_fp32_are_refused():
    with pytest.raises(DataError, match="x: the largest weight of an answer is 5e-31; below 1e-12, gradients vanish"):
        baselines.check_weights([0.0, -5e-31], "x")
    baselines.check_weights([0.0, 1e-6], "x")


def limit(max_length, truncation_mode="keep_start"):
    return SimpleNamespace(
        max_length=max_length, truncation_mode=truncation_mode, dataset_num_proc=None, dataset_text_field="text"
    )


def test_answers_that_max_length_leaves_nothing_of_are_left_out_and_counted(tokenizer, logged):
    rows = rows_of(*({"prompt": "a" * n, "completion": "b" * 5, "reward": float(n)} for n in (3, 30, 18)))
    found, lost = answer_tokens.drop_overlong(rows, tokenizer, limit(100), "x")
    assert len(found) == 3 and not lost and "max_length" not in logged.text
    assert [len(ids) for ids in found["input_ids"]] == [9, 36, 24]
    assert [sum(label != -100 for label in labels) for labels in found["labels"]] == [6, 6, 6]
    found, lost = answer_tokens.drop_overlong(rows, tokenizer, limit(20), "x")
    assert found["reward"][:] == [3.0, 18.0]
    assert "x: of 3 rows, max_length 20 leaves nothing of 1 answers, which are left out and count n" in logged.text
    assert "and cuts 1; max_length 31 keeps 99% of the rows, 36 keeps 99% of them whole" in logged.text
    assert lost == (
        " max_length 20 leaves nothing of 1 further answers, whose prompts alone are that long; max_length 31 keeps a "
        "token of each, 36 all of them whole."
    )
    assert len(answer_tokens.drop_overlong(rows, tokenizer, limit(31), "x")[0]) == 3
    assert len(answer_tokens.drop_overlong(rows, tokenizer, limit(20, "keep_end"), "x")[0]) == 3
    with pytest.raises(DataError, match=r"x: max_length is 3, and every prompt is that long \(3 to 30 tokens\)"):
        answer_tokens.drop_overlong(rows, tokenizer, limit(3), "x")


def test_messages_without_a_template_are_told_of_this_datas_columns(tokenizer):
    talk = rows_of({"prompt": USER, "completion": SAYS, "reward": 1.0})
    plain = SimpleNamespace(chat_template=None)
    with pytest.raises(ConfigError, match="has no chat template to render them with.* or give prompt and completion"):
        answer_tokens.drop_overlong(talk, plain, limit(100), "x")


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ([1.0, -1.0] * 20, [1.0] * 30, True),
        ([5.0] * 48 + [1.0, 4.0], [5.0] * 49 + [4.0], True),
        ([0.5] * 48 + [-2.0, 1.5], [0.5] * 49 + [0.1], True),
        ([0.0, 1.0] * 20, [0.0, 100.0] * 20, False),
        ([100.0] * 38 + [0.0, 50.0], [0.0] + [1.0] * 39, False),
    ],
)
def test_sources_that_mostly_repeat_a_number_are_told_by_size_alone(one, other, alike):
    for first, second in ((one, other), (other, one)):
        if alike:
            check_scales({"a": first, "b": second})
        else:
            with pytest.raises(DataError, match="on different scales"):
                check_scales({"a": first, "b": second})


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_scored_conversations_are_told_how_to_be_parted(column):
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    dataset = Dataset.from_list([{column: talk, "score": 1.0}] * 2)
    with pytest.raises(DataError, match="Part the conversations before their last turn") as refused:
        as_scored(dataset, "data")
    for line in re.findall(r"^  dataset = (.*)$", str(refused.value), re.MULTILINE):
        dataset = eval(line, {"dataset": dataset})
    assert as_scored(dataset, "data").to_list() == [{"prompt": talk[:1], "completion": talk[1:], "reward": 1.0}] * 2
