import asyncio
import inspect
import pickle
from functools import partial

import pytest

from posttrain.errors import ConfigError
from posttrain.rewards import Format, GymScore, MathsAnswer, OverlongPenalty, UserReward, get_reward, get_rewards


def shortness(prompts, completions, completion_ids=None, scale=1.0, **columns):
    return [-scale * len(completion) for completion in completions]


class Constant:
    def __init__(self, value=1.0):
        self.value = value

    def __call__(self, completions, **columns):
        return [self.value] * len(completions)


async def slowly(completions, **columns):
    await asyncio.sleep(0)
    return [1.0] * len(completions)


def test_names_settings_and_functions_of_a_config_become_rewards():
    rewards = get_rewards(
        [
            "maths_answer?engine=numbers&answer_in=boxed",
            {"length": {"max_length": 10, "cache": 4}},
            "format",
            f"{__name__}:shortness",
            shortness,
            OverlongPenalty(5, 5),
        ]
    )
    kinds = [MathsAnswer, OverlongPenalty, Format, UserReward, UserReward, OverlongPenalty]
    assert [type(reward) for reward in rewards] == kinds
    names = ["maths_answer", "length", "format", "shortness", "shortness", "length"]
    assert [reward.__name__ for reward in rewards] == names
    assert (rewards[0].answer_in, rewards[1].cache, rewards[2].template) == ("boxed", 4, "think_answer")
    assert rewards[3](prompts=["p"], completions=["abc"]) == [-3.0]
    for reward in rewards:
        reward.start()
        assert type(pickle.loads(pickle.dumps(reward))) is type(reward)
        reward.close()


def test_functions_of_ones_own_take_settings_and_classes_are_built():
    assert get_reward(f"{__name__}:shortness?scale=2")(prompts=None, completions=["abc"]) == [-6.0]
    assert get_reward(f"{__name__}:shortness", scale=0.5).__name__ == "shortness"
    constant = get_reward(f"{__name__}:Constant", value=3.0)
    assert constant(completions=["a"]) == [3.0] and constant.__name__ == "Constant"


def test_a_module_in_the_working_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "rewards_of_mine.py").write_text("def one(completions, **columns): return [1] * len(completions)\n")
    (tmp_path / "broken_rewards.py").write_text("import nothing_of_the_kind\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["/elsewhere"])
    assert get_reward("rewards_of_mine:one")(completions=["a", "b"]) == [1.0, 1.0]
    with pytest.raises(ConfigError, match="'rewards_of_mine:won'.*has no 'won'. Did you mean 'one'"):
        get_reward("rewards_of_mine:won")
    with pytest.raises(ConfigError, match="cannot be imported: ModuleNotFoundError: No module named 'nothing_of"):
        get_reward("broken_rewards:one")


@pytest.mark.parametrize(
    "spec, message",
    [
        ("math_answer", "'math_answer' is not known. Did you mean 'maths_answer'"),
        ("sentiment", "'sentiment' is not known. There are maths_answer, .*module:function"),
        ("length?max_lenght=3", "length has no setting 'max_lenght'.*did you mean 'max_length'"),
        ("length?max_length", "write settings as key=value"),
        ("length", "reward_funcs: length: max_length and cache must be given, in tokens"),
        ("a b:c", "'a b:c' must be module:function"),
        ({"length": 3}, "must map one reward's name to its settings"),
        (3, "3 is neither a reward's name nor a function"),
        ("posttrain.rewards.base:COUNTERS", "is tuple, not a function"),
    ],
)
def test_what_is_not_there_is_refused_with_the_nearest_name(spec, message):
    with pytest.raises(ConfigError, match=message):
        get_rewards([spec])


def test_no_rewards_are_refused():
    with pytest.raises(ConfigError, match="reward_funcs is empty"):
        get_rewards([])


def test_exceptions_of_a_users_function_are_counted_shown_and_end_the_run_when_they_go_on(logged):
    failing = True

    def fragile(completions, **columns):
        if failing:
            raise KeyError("solution")
        return [1.0] * len(completions)

    reward = UserReward(fragile)
    assert reward(completions=["a", "b"]) == [None, None]
    assert reward.counters == {"scored": 0, "timeouts": 0, "exceptions": 2}
    assert "reward fragile: 2 exceptions so far; the last: KeyError: 'solution' (" in logged.text
    assert __file__ in reward.last_exception
    failing = False
    assert reward(completions=["a", "b"]) == [1.0, 1.0]
    failing = True
    assert reward(completions=["a"]) == reward(completions=["a"]) == [None]
    with pytest.raises(ConfigError, match="reward function fragile raised in 3 calls in a row; mend it.*KeyError"):
        reward(completions=["a"])


@pytest.mark.parametrize(
    "returned, message",
    [
        ([1.0], "returned 1 scores for 2 completions"),
        (None, "returned None; it must return a list"),
        ([1.0, "good"], "returned the score 'good'; a score is a number or None"),
        ([1.0, 10**400], "returned the score 1000.*; a score is a number or None"),
    ],
)
def test_wrong_returns_of_a_users_function_are_refused(returned, message):
    with pytest.raises(ConfigError, match=message):
        UserReward(lambda **columns: returned)(completions=["a", "b"])


def test_scores_become_floats_and_nan_becomes_none():
    reward = UserReward(lambda **columns: [True, 2, float("nan"), None])
    assert reward(completions=["a"] * 4) == [1.0, 2.0, None, None]
    assert reward.counters["scored"] == 2


def test_coroutine_functions_stay_so():
    reward = UserReward(partial(slowly))
    # how TRL tells them, for objects
    assert inspect.iscoroutinefunction(reward.__call__)
    assert not inspect.iscoroutinefunction(UserReward(shortness).__call__)
    assert asyncio.run(reward(completions=["a", "b"])) == [1.0, 1.0]
    assert reward.__name__ == "slowly" and reward.counters["scored"] == 2


def test_gym_needs_its_extra(monkeypatch):
    monkeypatch.setattr("posttrain.errors.find_spec", lambda name: None)
    with pytest.raises(Exception, match=r'pip install "posttrain\[gym\]"'):
        GymScore()
