import gzip
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from posttrain.errors import ConfigError, DataError, EnvironmentIssue
from posttrain.rewards import ExactMatch, MathsAnswer, check_golds, maths


@pytest.fixture(scope="module")
def verified():
    reward = MathsAnswer(engine="math_verify", timeout=20)
    reward.start()
    yield reward
    reward.close()


@pytest.fixture
def numbers():
    return MathsAnswer(engine="numbers")


def say(text):
    return [{"role": "assistant", "content": text}]


BOTH = [
    (r"\boxed{72}", "72", 1.0),
    (r"\boxed{72}", "27", 0.0),
    ("#### 1,234", "1234", 1.0),
    ("I get 72 apples.", "72", 1.0),
    ("the answer is 1/2", "0.5", 1.0),
    (r"\boxed{-\frac{1}{2}}", "-1/2", 1.0),
    (r"\boxed{\$1,250.50}", "1250.5", 1.0),
    ("It is 50%", "50", 1.0),
    ("<think>72</think>71", "72", 0.0),
    ("<think>it is 72", "72", 0.0),
    ("", "72", 0.0),
    ("no idea", "72", 0.0),
    ("<answer>72</answer>", "Half of 144.\n#### 72", 1.0),
]


def test_both_engines_judge_numbers_alike(verified, numbers):
    completions, golds, expected = map(list, zip(*BOTH, strict=True))
    assert numbers(completions=completions, gold=golds) == expected
    assert verified(completions=completions, gold=golds) == expected
    assert verified(prompts=None, completions=[say(text) for text in completions], gold=golds) == expected


@pytest.mark.parametrize(
    "completion, gold, score",
    [
        (r"\boxed{2\sqrt3}", r"$\sqrt{12}$", 1.0),
        (r"\boxed{2\sqrt3}", r"2\sqrt{2}", 0.0),
        (r"\boxed{1+3x^2}", "3x^2+1", 1.0),
        (r"\boxed{3}", "3x^2+1", 0.0),
        (r"<answer>(1, 2)</answer>", "(1,2)", 1.0),
        (r"<answer>(1, 3)</answer>", "(1,2)", 0.0),
        (r"\boxed{x = 5}", "5", 1.0),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", 1.0),
        (r"So $\frac{\pi}{2}$", r"\frac{\pi}{2}", 1.0),
    ],
)
def test_math_verify_compares_expressions(verified, completion, gold, score):
    assert verified(completions=[completion], gold=[gold]) == [score]


def test_expressions_are_compared_from_any_thread(verified):
    # math-verify itself raises off the main thread
    with ThreadPoolExecutor(2) as threads:
        columns = {"completions": [r"\boxed{x+1}"], "gold": ["$1+x$"]}
        scores = [threads.submit(verified, **columns) for _ in range(4)]
        assert [score.result() for score in scores] == [[1.0]] * 4


@pytest.mark.slow
def test_an_endless_answer_is_unscorable_and_counted():
    reward = MathsAnswer(engine="math_verify", timeout=0.5, workers=1)
    scores = reward(completions=[r"\boxed{9^{9^{9^9}}}", r"\boxed{2}", r"\boxed{9^{9^{9^9}}}"], gold=["2"] * 3)
    assert scores == [None, 1.0, None]
    assert reward.counters == {"scored": 1, "timeouts": 2, "exceptions": 0}
    reward.close()


def test_an_exception_on_an_answer_is_counted_shown_and_scored_zero(verified, logged):
    before = verified.counters["exceptions"]
    assert verified(completions=["1" * 5000], gold=["2"]) == [0.0]
    assert verified.counters["exceptions"] == before + 1
    assert verified.last_exception.startswith("SympifyError")
    assert "reward maths_answer: 1 exceptions so far; the last: SympifyError" in logged.text


def test_an_unparsable_gold_is_unscorable_never_right_or_wrong(verified, numbers):
    golds = ["", "hello", None]
    assert verified(completions=[""] * 3, gold=golds) == [0.0] * 3
    # an empty gold answer must not make an empty answer right, nor any answer wrong
    assert verified(completions=["hello", "hello", "None"], gold=golds) == [None] * 3
    assert numbers(completions=["", "hello", "None"], gold=golds) == [None] * 3


@pytest.mark.parametrize("engine", ["math_verify", "numbers"])
def test_gold_answers_are_checked_with_row_and_value(engine, verified, numbers):
    from datasets import Dataset

    reward = verified if engine == "math_verify" else numbers
    assert check_golds(Dataset.from_dict({"gold": ["72", "3/4", "72", "#### 1,000"]}), "gold", reward) == 3
    rows = [{"gold": gold} for gold in ("72", "hello", "", "see pi/2")]
    with pytest.raises(DataError) as caught:
        check_golds(rows, "gold", reward, "eval_dataset")
    message = str(caught.value)
    assert message.startswith("eval_dataset, row 2: the gold answer 'hello' in column 'gold' cannot be used by maths")
    assert "So are 2 other rows of 4: 3, 4. Mend these rows or leave them out." in message
    assert caught.value.exit_code == 3
    with pytest.raises(DataError, match=r"row 1: the gold answer None in column 'gold'.*it is empty"):
        check_golds([{"gold": None}], "gold", reward)
    with pytest.raises(DataError, match=r"column 'gold' with the gold answers is missing; found \['answer'\]"):
        check_golds([{"answer": "1"}], "gold", reward)
    with pytest.raises(DataError, match="is a stream"):
        check_golds(iter([{"gold": "1"}]), "gold", reward)


def test_expressions_are_golds_for_math_verify_and_not_for_numbers(verified, numbers):
    golds = ["(1,2)", "$x^2+1$", r"\frac{\pi}{2}", "A"]
    assert verified.gold_errors(golds) == [None] * 4
    assert all('pip install "posttrain[maths]"' in error for error in numbers.gold_errors(golds))
    assert all("cannot" not in (error or "") for error in verified.gold_errors([7, 2.5]))
    assert "LaTeX between $ signs" in verified.gold_errors(["1/0"])[0]


def test_a_missing_gold_column_is_a_data_error(numbers):
    with pytest.raises(DataError, match=r"no column 'gold' \(found \['answer'\]\); rename.*set `gold`"):
        numbers(completions=["1"], answer=["1"], trainer_state=None)
    assert MathsAnswer(engine="numbers", gold="answer")(completions=["1"], answer=["1"]) == [1.0]


def test_where_the_answer_is_looked_for_can_be_narrowed():
    strict = MathsAnswer(engine="numbers", answer_in="boxed")
    assert strict(completions=["72", r"\boxed{72}"], gold=["72"] * 2) == [0.0, 1.0]


def test_without_math_verify_numbers_are_compared_and_asking_for_it_names_the_extra(monkeypatch):
    monkeypatch.setattr(maths, "find_spec", lambda name: None)
    monkeypatch.setattr("posttrain.errors.find_spec", lambda name: None)
    reward = MathsAnswer()
    reward.start()
    assert reward(completions=[r"\boxed{1/2}"], gold=["0.5"]) == [1.0] and reward._pool.pids == []
    with pytest.raises(EnvironmentIssue, match=r'needs the package math_verify: pip install "posttrain\[maths\]"'):
        MathsAnswer(engine="math_verify")


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"engine": "math-verify"}, "engine is 'math-verify'; it must be one of auto, .*Did you mean math_verify"),
        ({"answer_in": "box"}, "answer_in is 'box'; it must be one of .*Did you mean boxed"),
        ({"timeout": 0}, "timeout=0 must be a number above 0"),
        ({"timeout": float("inf")}, "timeout=inf must be a number above 0"),
        ({"workers": 0}, "workers=0 must be an integer between 1 and"),
        ({"workers": 5000}, "workers=5000 must be an integer between 1 and"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        MathsAnswer(**settings)


def test_a_pickled_reward_carries_its_settings_and_no_processes(verified):
    copy = pickle.loads(pickle.dumps(verified))
    assert (copy.engine, copy.timeout, copy.__name__) == ("math_verify", 20, "maths_answer")
    assert copy._pool.pids == [] and copy.counters == {"scored": 0, "timeouts": 0, "exceptions": 0}


def test_exact_match_compares_texts_but_for_spaces():
    reward = ExactMatch()
    assert reward(completions=[" 7 2\n1 ", "7 2 2", say("7 2 1")], gold=["7 2 1"] * 3) == [1.0, 0.0, 1.0]
    assert reward(completions=["", ""], gold=["", None]) == [None, None]
    assert ExactMatch(answer_in="tag")(completions=["so <answer>B</answer>", "B"], gold=["B", "B"]) == [1.0, 0.0]
    assert reward.gold_errors(["a", " ", None]) == [None, "it is empty.", "it is empty."]
    with pytest.raises(ConfigError, match="use the reward maths_answer"):
        ExactMatch(answer_in="last")


@pytest.mark.data
@pytest.mark.skipif("POSTTRAIN_TEST_DATA" not in os.environ, reason="reads the data of POSTTRAIN_TEST_DATA")
@pytest.mark.slow
def test_every_worked_solution_of_gsm8k_is_right_and_another_rows_is_not(verified, numbers):
    with gzip.open(Path(os.environ["POSTTRAIN_TEST_DATA"]) / "gsm8k_test.jsonl.gz", "rt") as file:
        solutions = [json.loads(line)["answer"] for line in file]
    golds = [solution.rpartition("#### ")[2] for solution in solutions]
    assert check_golds([{"gold": gold} for gold in golds], "gold", verified) == len(set(golds))
    shifted = golds[1:] + golds[:1]
    same = [float(a.replace(",", "") == b.replace(",", "")) for a, b in zip(golds, shifted, strict=True)]
    for reward in (verified, numbers):
        assert reward(completions=solutions, gold=golds) == [1.0] * len(golds)
        assert reward(completions=solutions, gold=shifted) == same
