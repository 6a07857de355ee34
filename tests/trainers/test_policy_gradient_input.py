"""What a user can get wrong in settings, rewards, advantages, prompts and demonstrations, and how it is answered."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from datasets import Dataset

from posttrain import HPTConfig, HPTTrainer, PolicyGradientConfig, QAEConfig
from posttrain.config import parse
from posttrain.errors import ConfigError, DataError, PosttrainError
from posttrain.log import get_logger
from posttrain.rewards import UserReward, get_rewards
from posttrain.rewards.base import PooledReward
from posttrain.trainers.policy_gradient import reward_setup
from tests.rollouts import entries, prompts, settings, success, train
from tests.training import distance

HPT = dict(trainer_class=HPTTrainer, config_class=HPTConfig, num_generations=4, max_steps=1)
WHOLE = dict(gradient_accumulation_steps=8)
OFF_POLICY = [[0, 1, 0]] * 5


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(get_logger(), "propagate", True)
    return lambda: caplog.text


NAN, INF = float("nan"), float("inf")


def test_an_advantage_that_cannot_be_imported_is_refused(tiny_folder, tmp_path):
    with pytest.raises(ConfigError, match="advantage: ':' must be module:function, such as my_rewards:shortness"):
        train(tiny_folder, tmp_path, advantage=":")


def test_a_quantile_of_null_is_the_mean_where_the_preset_has_one(tmp_path):
    assert QAEConfig(str(tmp_path), per_device_train_batch_size=16, quantile=None).quantile is None


def test_a_soft_gate_is_read_from_a_command_line(tmp_path):
    table = "[[0, 0, 1], [0.5, 0, 0.5], [1, 0, 0]]"
    flags = ["--output_dir", str(tmp_path), "--num_generations", "2", "--soft_gate", table]
    (args,) = parse((PolicyGradientConfig,), flags)
    assert args.soft_gate == [[0, 0, 1], [0.5, 0, 0.5], [1, 0, 0]]
    with pytest.raises(ConfigError, match=r"soft_gate must have 3 rows.*It is '\[\[0, 0, 1'"):
        parse((PolicyGradientConfig,), [*flags[:-1], "[[0, 0, 1"])


def raises(completions, **columns):
    raise RuntimeError("boom")


def returns(scores):
    def function(completions, **columns):
        return scores(len(completions))

    return function


REWARDS = [
    (raises, DataError, "so there is nothing to learn from. The last exception of raises: RuntimeError: boom ("),
    (returns(lambda n: None), ConfigError, "reward function function returned None; it must return a list"),
    (returns(lambda n: ["good"] * n), ConfigError, "returned the score 'good'; a score is a number or None"),
    (
        returns(lambda n: [INF] + [0.0] * (n - 1)),
        DataError,
        "reward function function gave inf for 1 of 16 completions",
    ),
    (returns(lambda n: [-INF] * n), DataError, "gave -inf for 16 of 16 completions of step 1; a reward is a finite"),
    ("maths_anser", PosttrainError, "reward_funcs: 'maths_anser' is no reward's name (maths_answer, exact_match"),
    ("exact_match?nothing=1", ConfigError, "exact_match has no setting 'nothing'"),
    (3, ConfigError, "reward_funcs: 3 is neither a reward's name nor a function"),
]


@pytest.mark.core("hpt-")
@pytest.mark.parametrize(("reward", "kind", "message"), REWARDS, ids=range(len(REWARDS)))
@pytest.mark.parametrize("preset", ["qae", "hpt"])
def test_what_is_wrong_with_a_reward_is_said(tiny_folder, tmp_path, monkeypatch, preset, reward, kind, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(kind) as error:
        train(tiny_folder, tmp_path, preset=preset, reward=reward, num_generations=4)
    assert message in str(error.value)


def test_a_reward_that_only_raises_ends_the_run_in_its_first_generation(tiny_folder, tmp_path):
    with pytest.raises(ConfigError, match="raises raised for all 16 completions.*in step 1.*RuntimeError: boom"):
        train(tiny_folder, tmp_path / "a", reward=[success, raises], max_steps=4)

    async def waits(completions, **columns):
        raise TimeoutError("no judge")

    with pytest.raises(ConfigError, match="waits raised for all 16 completions.*in step 1.*TimeoutError: no judge"):
        train(tiny_folder, tmp_path / "b", reward=[waits, success], max_steps=4)

    def none_then_raises(completions, **columns):
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("once")
        return [None] * len(completions)

    calls = []
    _, trainer = train(tiny_folder, tmp_path / "c", reward=[success, none_then_raises], max_steps=3)
    assert trainer.state.global_step == 3, "it has not always raised"


def test_a_verifier_that_fails_on_every_answer_ends_the_run_too(tiny_folder, tmp_path):
    @dataclass(eq=False)
    class Broken(PooledReward):
        timeout: float = 5.0
        workers: int = 1

        __name__ = "broken"
        verifier = "tests.rewards.misbehaving"

        def __call__(self, completions, **columns):
            return self._scored(self._score_in_pool([{"answer": "raise", "gold": "bad"}] * len(completions)))

    with pytest.raises(ConfigError, match="broken raised for all 16 completions.*RuntimeError: cannot read raise"):
        train(tiny_folder, tmp_path, reward=[success, Broken()], max_steps=4)


@pytest.mark.slow
def test_a_reward_that_raises_after_it_worked_is_given_three_calls(tiny_folder, tmp_path):
    def breaks(completions, **columns):
        calls.append(None)
        if len(calls) > 1:
            raise RuntimeError("boom")
        return [0.0] * len(completions)

    calls = []
    with pytest.raises(ConfigError, match="reward function breaks raised in 3 calls in a row.*RuntimeError: boom"):
        train(tiny_folder, tmp_path, reward=[success, breaks], max_steps=6)
    assert len(calls) == 4


@pytest.mark.parametrize("weights", [[NAN, 1.0], [1.0, INF], [1.0, "a"], 1.0, [True, 1.0]])
def test_reward_weights_that_are_no_numbers_are_refused_in_the_settings(tmp_path, weights):
    with pytest.raises(
        ConfigError, match="reward_weights is .*; it (must be a list of finite|takes a list of) numbers"
    ):
        PolicyGradientConfig(**settings(tmp_path, reward_weights=weights))


@pytest.mark.slow
def test_reward_weights_are_as_many_as_the_functions(tiny_folder, tmp_path):
    with pytest.raises(ConfigError, match="reward_weights has 1 weights for 2 reward functions"):
        train(tiny_folder, tmp_path, reward=[success, raises], reward_weights=[1.0])
    _, trainer = train(tiny_folder, tmp_path, reward=[success, success], reward_weights=[1, -0.5], max_steps=1)
    row = entries(trainer)[0]
    assert row["reward"] == pytest.approx(0.5 * row["rewards/success/mean"])


def test_rewards_may_be_named_and_need_not_take_every_column(tiny_folder, tmp_path):
    def plain(prompts, completions):
        return [float(len(prompts) == len(completions))] * len(completions)

    _, trainer = train(tiny_folder, tmp_path, reward=["exact_match?gold=demonstration", plain], max_steps=1)
    assert trainer.reward_func_names == ["exact_match", "plain"]
    log = entries(trainer)[0]
    assert log["rewards/plain/mean"] == 1.0 and log["rewards/exact_match/mean"] == 0.0


def test_a_reward_model_stays_one(tiny_folder, tmp_path):
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    judge = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(tiny_folder, num_labels=1))
    judge.save_pretrained(tmp_path / "judge")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "judge")
    _, trainer = train(tiny_folder, tmp_path / "run", reward=str(tmp_path / "judge"), max_steps=1)
    assert isinstance(trainer.reward_funcs[0], torch.nn.Module)
    assert entries(trainer)[0]["reward_std"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("value", [0.5, -1.0, 2.0])
def test_success_is_not_guessed_from_rewards_of_other_values(tiny_folder, tmp_path, value):
    def graded(completion_ids, **columns):
        return [value] * len(completion_ids)

    with pytest.raises(ConfigError) as error:
        train(tiny_folder, tmp_path / "a", **HPT, reward=graded)
    assert f"success is read from a reward of {value:g}, which is neither 0 nor 1, and success_threshold" in str(
        error.value
    )
    _, trainer = train(tiny_folder, tmp_path / "b", **HPT, reward=graded, success_threshold=value)
    assert entries(trainer)[0]["hpt/solve_all"] == 1
    _, trainer = train(tiny_folder, tmp_path / "c", **HPT, reward=[graded, success], success_reward="success")
    assert 0 < entries(trainer)[0]["hpt/success_rate"] < 1
    train(tiny_folder, tmp_path / "d", **HPT, reward=graded, gamma=None)


def in_place(rewards):
    return rewards.sub_(rewards.mean(dim=1, keepdim=True))


def out_of_place(rewards):
    return rewards - rewards.mean(dim=1, keepdim=True)


@pytest.mark.slow
def test_an_advantage_that_works_in_place_leaves_the_gate_as_it_is(tiny_folder, tmp_path):
    logs, changes = [], []
    for name in ("in_place", "out_of_place"):
        change, trainer = train(tiny_folder, tmp_path / name, **HPT, **WHOLE, advantage=f"{__name__}:{name}")
        changes.append(change)
        logs.append({key: entries(trainer)[0][key] for key in ("hpt/frac_sft_prompts", "hpt/success_rate")})
    assert logs[0] == logs[1] == {"hpt/frac_sft_prompts": pytest.approx(3 / 8), "hpt/success_rate": 11 / 32}
    assert distance(*changes) == 0


def breaks(rewards):
    raise KeyError("x")


def one_a_prompt(rewards):
    return rewards.mean(dim=1)


def nowhere(rewards):
    return rewards * NAN


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("breaks", "breaks raised KeyError: 'x', for rewards of shape (4, 4)"),
        ("one_a_prompt", "one_a_prompt returned (4,) for rewards of shape (4, 4)"),
        ("nowhere", "nowhere returned NaN or infinity for a reward that is a number"),
    ],
)
def test_what_is_wrong_with_an_advantage_is_said(tiny_folder, tmp_path, name, message):
    with pytest.raises(ConfigError) as error:
        train(tiny_folder, tmp_path, advantage=f"{__name__}:{name}")
    assert f"advantage {__name__}:{message}" in str(error.value)


@pytest.mark.parametrize("prompt", [None, "", 3, [], [{"content": "a"}]], ids=repr)
def test_a_prompt_that_is_none_is_refused_with_its_row(tiny_folder, tmp_path, prompt):
    kind = {str: "a", list: [{"role": "user", "content": "a"}], int: 3, type(None): "a"}[type(prompt)]
    rows = [{"prompt": kind}, {"prompt": prompt}] + [{"prompt": kind}] * 6
    with pytest.raises(DataError, match=rf"train_dataset, row {1 if prompt == 3 else 2}: the prompt is .*; it must be"):
        train(tiny_folder, tmp_path, data=Dataset.from_list(rows))


def assistant(content):
    return {"role": "assistant", "content": content}


BLOCKS = [{"type": "image", "text": None}, {"type": "text", "text": "A"}]
ONE = "it must be a text, or a list of one message of the assistant"


@pytest.mark.parametrize(
    ("demonstration", "message"),
    [
        ([assistant(BLOCKS)], ONE),
        ([{"content": "A"}], ONE),
        ([{"role": "user", "content": "A"}], ONE),
        (["A", "b"], ONE),
        (3, ONE),
        ([assistant("A"), {"role": "user", "content": "more"}, assistant("B")], ONE),
        ([assistant(" \n")], "8 of 8 demonstrations of train_dataset are empty"),
        ("   ", "8 of 8 demonstrations of train_dataset are empty"),
    ],
    ids=["blocks", "no-role", "user", "texts", "number", "several-turns", "blank-message", "blank"],
)
@pytest.mark.parametrize("prompt", ["q", [{"role": "user", "content": "q"}]], ids=["text", "messages"])
def test_a_demonstration_is_one_answer(tiny_folder, tmp_path, prompt, demonstration, message):
    data = Dataset.from_list([{"prompt": prompt, "demonstration": demonstration}] * 8)
    with pytest.raises(DataError) as error:
        train(tiny_folder, tmp_path, **HPT, data=data)
    assert message in str(error.value)
    if message == ONE:
        assert "train_dataset, row 1: the demonstration is " in str(error.value)


@pytest.mark.parametrize(
    ("given", "kind"),
    [(lambda data: data.to_iterable_dataset(), "IterableDataset"), (lambda data: data.to_list(), "list")],
    ids=["stream", "list"],
)
def test_demonstrations_come_from_a_data_set(tiny_folder, tmp_path, given, kind):
    with pytest.raises(DataError, match=f"train_dataset is of type {kind}; with a gate its demonstrations are read"):
        train(tiny_folder, tmp_path, **HPT, data=given(prompts([0] * 8)))


def test_fallbacks_for_demonstrations_are_counted(tiny_folder, tmp_path, said):
    rows = prompts([0] * 8).to_list()
    rows[0]["demonstration"], rows[1]["demonstration"], rows[2]["demonstration"] = "", " ", "y" * 20
    choices = dict(empty_demonstrations="rollouts", long_demonstrations="truncate")
    train(tiny_folder, tmp_path, **HPT, **WHOLE, **choices, data=Dataset.from_list(rows))
    assert "2 of 8 demonstrations of train_dataset are empty; these prompts keep their rollouts" in said()
    assert "1 of 8 demonstrations of train_dataset are cut to 12 tokens, without their end" in said()


def named_twice():
    def graded(completions, points=1.0, **columns):
        return [points] * len(completions)

    return {
        "lambdas": ([lambda completions, x=x, **_: [x] * len(completions) for x in (1.0, 3.0)],
                    ["<lambda>", "<lambda>_2"], [1.0, 3.0]),
        "partials": ([partial(graded, points=1.0), partial(graded, points=-5.0)], ["graded", "graded_2"], [1.0, -5.0]),
        "one function twice": ([graded, graded, graded], ["graded", "graded_2", "graded_3"], [1.0, 1.0, 1.0]),
        "one reward twice": ([*[UserReward(graded)] * 2], ["graded", "graded_2"], [1.0, 1.0]),
    }  # fmt: skip


@pytest.mark.core("partials")
@pytest.mark.parametrize("which", named_twice())
def test_rewards_of_one_name_are_numbered_and_logged_apart(tiny_folder, tmp_path, which):
    functions, names, means = named_twice()[which]
    success_reward = dict(success_reward=names[-1], success_threshold=0.5)
    _, trainer = train(tiny_folder, tmp_path, preset="qae", reward=functions, max_steps=1, **success_reward)
    assert trainer.reward_func_names == names
    logs = next(entry for entry in trainer.state.log_history if f"rewards/{names[0]}/mean" in entry)
    assert [logs[f"rewards/{name}/mean"] for name in names] == means


def test_a_number_that_is_a_name_already_is_left_out():
    def graded(completions, **_):
        return [0.0]

    def graded_2(completions, **_):
        return [0.0]

    functions = reward_setup.numbered(get_rewards([graded, graded_2, graded, "length?max_length=8&cache=4", graded]))
    assert [one.__name__ for one in functions] == ["graded", "graded_2", "graded_3", "length", "graded_4"]
    apart = get_rewards([graded, graded_2])
    assert reward_setup.numbered(apart) == apart and [one.__name__ for one in apart] == ["graded", "graded_2"]
