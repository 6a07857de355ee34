import time

import pytest

from posttrain.errors import ConfigError
from posttrain.rewards import Format, OverlongPenalty

WHOLE = "<think>a < b</think>\n<answer>7</answer>"


def score(reward, *texts):
    return reward(completions=list(texts))


@pytest.mark.parametrize(
    "template, right, wrong",
    [
        (
            "think_answer",
            [WHOLE, f"\n{WHOLE}\n", "<think>\n1\n2</think><answer>x</answer>"],
            ["", "7", f"so {WHOLE}", f"{WHOLE} bye", WHOLE + WHOLE, "<think></think><answer>7</answer>"]
            + ["<think>1</think><answer> </answer>", "<think>1<think>2</think><answer>7</answer>", WHOLE[:-3]]
            + ["<answer>7</answer><think>1</think>", "<think>1</think> so <answer>7</answer>"],
        ),
        (
            "think",
            ["<think>1</think>7", "<think>1</think>\n\nIt is <b>7</b>"],
            ["7", "<think>1</think>", "<think>1", "1</think>7", "<think></think>7", "<think>1</think>2</think>7"],
        ),
        (
            "answer",
            ["<answer>7</answer>", "so <answer>7</answer>\n"],
            ["7", "<answer></answer>", "<answer>7</answer>."],
        ),
        ("hash", ["#### 7", "1+6=7\n#### 7\n"], ["7", "####", "#### \n", "#### 7\n#### 8", "#### 7\nbye"]),
        ("boxed", [r"\boxed{7}", r"so \boxed{\frac{1}{2}}."], ["7", r"\boxed{}", r"\boxed{7", r"<think>\boxed{7}"]),
    ],
)
def test_templates_ask_for_the_whole_form(template, right, wrong):
    reward = Format(template)
    assert score(reward, *right) == [1.0] * len(right)
    assert score(reward, *wrong) == [0.0] * len(wrong)


def test_messages_a_prefix_and_a_pattern():
    assert Format()(completions=[[{"role": "assistant", "content": WHOLE}]]) == [1.0]
    rest = WHOLE.removeprefix("<think>")
    assert score(Format(prefix="<think>"), rest) == [1.0] and score(Format(), rest) == [0.0]
    assert score(Format(pattern=r"Answer: \d+"), "Answer: 12", "Answer: 12!", "An answer: 12") == [1.0, 0.0, 0.0]


def test_long_completions_take_no_long_time():
    texts = ["<think>" * 20000, "<think>" + "< " * 50000, "#" * 100000, "<answer>" * 20000, "\\boxed{" * 3000]
    start = time.process_time()
    for template in ("think_answer", "think", "answer", "hash", "boxed"):
        assert score(Format(template), *texts) == [0.0] * len(texts)
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"template": "think_anwser"}, "template is 'think_anwser'; it must be one of.*Did you mean think_answer"),
        ({"pattern": "("}, r"pattern='\(' is no regular expression: missing \)"),
        ({"pattern": r"((.|\s)*)*Z"}, "can take for ever to match"),
        ({"template": "hash", "pattern": "a"}, "exclude each other"),
    ],
)
def test_formats_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Format(**settings)


def test_a_completion_that_a_pattern_takes_long_to_match_is_not_scored(monkeypatch):
    monkeypatch.setattr("posttrain.rewards.format.SECONDS", 0.1)
    reward = Format(pattern=".*" * 10 + "X")
    assert reward(completions=["a" * 1000, "X"]) == [None, 1.0]
    assert reward.counters["timeouts"] == 1


def test_the_overlong_penalty_equals_dapos_for_every_length():
    from trl.rewards import get_soft_overlong_punishment

    lengths = range(0, 140)
    ids = [[0] * length for length in lengths]
    scores = OverlongPenalty(max_length=100, cache=20)(completions=[""] * len(ids), completion_ids=ids)
    assert scores == get_soft_overlong_punishment(100, 20)(completion_ids=ids)
    assert [scores[length] for length in (0, 80, 81, 90, 100, 101)] == [0.0, 0.0, -0.05, -0.5, -1.0, -1.0]


def test_the_penalty_refuses_what_it_cannot_count():
    with pytest.raises(ConfigError, match="cache=101 must be an integer between 1 and 100"):
        OverlongPenalty(max_length=100, cache=101)
    with pytest.raises(ConfigError, match="reward length counts tokens"):
        OverlongPenalty(100, 20)(completions=["a"])
