"""Settings that are refused before any weight is read."""

from decimal import Decimal

import pytest
from datasets import Dataset, DatasetDict, IterableDataset, Value

from posttrain import PolicyGradientConfig, PolicyGradientTrainer, RobustDPOConfig, RobustDPOTrainer
from posttrain.errors import ConfigError, DataError, EnvironmentIssue
from posttrain.run import checks
from posttrain.trainers.preference import prepare
from tests import rollouts
from tests.conftest import make_pairs
from tests.training import settings


@pytest.fixture
def weightless(tiny_folder, tmp_path):
    """A model folder of which loading would fail: what is refused with it was refused before."""
    import shutil

    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    return str(tmp_path / "model")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"attn_implementation": "spda"},
            "attn_implementation is 'spda'; it must be one of eager, .* Did you mean sdpa",
        ),
        (
            {"attn_implementation": "flash"},
            "attn_implementation is 'flash'; it must be one of eager, .*flash_attention_2",
        ),
        ({"dtype": "bfloat"}, "dtype is 'bfloat'; it must be one of auto, bfloat16, .*Did you mean bfloat16"),
    ],
)
def test_loading_settings_are_refused_before_the_model_loads(weightless, tmp_path, kwargs, message):
    args = RobustDPOConfig(str(tmp_path / "out"), model_init_kwargs=kwargs)
    with pytest.raises(ConfigError, match=message):
        RobustDPOTrainer(weightless, args=args, train_dataset=make_pairs(4))


@pytest.mark.parametrize("name", ["eager", "sdpa", "kernels-community/flash-attn2", None])
def test_attention_that_transformers_knows_passes(name):
    checks.check_loading({"attn_implementation": name, "dtype": "float32"})


@pytest.mark.parametrize("name", ["beta", "beta_prime", "learning_rate"])
def test_none_in_the_place_of_a_number_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=f"^{name} is None; it takes a number.$"):
        RobustDPOConfig(str(tmp_path), **{name: None})


def test_only_a_neutral_infinity_is_taken(tmp_path):
    assert RobustDPOConfig(str(tmp_path), reduction="dr_dpo", beta_prime=float("inf")).beta_prime == float("inf")
    with pytest.raises(ConfigError, match="^num_train_epochs is inf; it must be a finite number.$"):
        RobustDPOConfig(str(tmp_path), num_train_epochs=float("inf"))


def test_a_schedule_with_the_settings_that_it_needs_passes(tmp_path):
    settings = dict(lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": 3})
    assert RobustDPOConfig(str(tmp_path), **settings, optim="adamw_8bit").optim == "adamw_8bit"


def test_a_model_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="^model is None; give a hub id, a folder's path as text, or a loaded model"):
        RobustDPOTrainer(None, args=RobustDPOConfig(str(tmp_path / "out")), train_dataset=make_pairs(4))


def test_several_splits_in_the_place_of_one_are_refused(tiny_folder, tmp_path):
    splits = DatasetDict(train=make_pairs(4), test=make_pairs(4))
    with pytest.raises(DataError, match=r"^train_dataset is a DatasetDict; give one of its splits: train, test\.$"):
        RobustDPOTrainer(tiny_folder, args=RobustDPOConfig(str(tmp_path / "out")), train_dataset=splits)
    args = PolicyGradientConfig(str(tmp_path / "out"), num_generations=2)
    with pytest.raises(DataError, match=r"^train_dataset is a DatasetDict; give one of its splits: train, test\.$"):
        PolicyGradientTrainer(tiny_folder, str.isdigit, args, train_dataset=splits)


def test_reporters_are_refused_with_the_nearest_name(tmp_path):
    for value in ("wandbb", ["tensorboard", "wandbb"]):
        with pytest.raises(ConfigError, match="report_to is 'wandbb'; it must be one of .*, none. Did you mean wandb?"):
            RobustDPOConfig(str(tmp_path), report_to=value)
    assert RobustDPOConfig(str(tmp_path), report_to="none").report_to == []


def test_a_reporter_that_is_not_installed_is_an_issue_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(EnvironmentIssue, match="report_to names wandb, which is not installed here"):
        RobustDPOConfig(str(tmp_path), report_to="wandb")
    assert RobustDPOConfig(str(tmp_path), report_to="tensorboard").report_to == ["tensorboard"]


def test_a_missing_package_is_an_issue_of_the_environment():
    with pytest.raises(EnvironmentIssue, match="these settings need a package that is missing: no flash_attn"):
        with checks.upstream_refusals():
            raise ImportError("no flash_attn")


def test_an_unreachable_model_and_an_unreachable_data_set_end_alike(tmp_path):
    from posttrain.data.pairs.loading import load_preferences

    with pytest.raises(EnvironmentIssue, match="model 'org/gone' is no folder here .* the hub cannot be reached"):
        RobustDPOTrainer("org/gone", args=RobustDPOConfig(str(tmp_path)), train_dataset=make_pairs(4))
    with pytest.raises(EnvironmentIssue, match="data set 'org/gone' is no file or folder here, and the hub cannot"):
        load_preferences("org/gone")


def test_a_model_folder_that_is_missing_is_a_setting_to_mend(tmp_path):
    with pytest.raises(ConfigError, match="model './no-such-model' is a folder that does not exist"):
        RobustDPOTrainer("./no-such-model", args=RobustDPOConfig(str(tmp_path)), train_dataset=make_pairs(4))


@pytest.mark.parametrize("family", ["preference", "policy_gradient"])
def test_what_this_machine_cannot_carry_out_is_refused_before_the_model_loads(
    weightless, family, tmp_path, monkeypatch
):
    monkeypatch.setattr(checks, "is_liger_kernel_available", lambda: False)
    kind, config = {
        "preference": (RobustDPOTrainer, RobustDPOConfig),
        "policy_gradient": (PolicyGradientTrainer, PolicyGradientConfig),
    }[family]
    plain = dict(use_cpu=True, bf16=False)
    given = {"train_dataset": make_pairs(4)}
    if family == "policy_gradient":
        given = {"reward_funcs": "exact_match", **given}
    with pytest.raises(EnvironmentIssue, match="use_liger_kernel is true, which needs the package liger-kernel"):
        kind(weightless, args=config(str(tmp_path / "1"), use_liger_kernel=True, **plain), **given)
    if family == "preference":
        with pytest.raises(ConfigError, match="activation_offloading is true, and there is no accelerator"):
            kind(weightless, args=config(str(tmp_path / "2"), activation_offloading=True, **plain), **given)


def turn(role, text):
    return {"role": role, "content": text}


ASKED, SAID, OTHER = turn("user", "q"), turn("assistant", "a"), turn("assistant", "b")


@pytest.mark.parametrize(
    ("chosen", "rejected", "problem"),
    [
        ([ASKED, SAID], [ASKED], "rejected has no answer, but the prompt alone"),
        ([ASKED], [ASKED, SAID], "chosen has no answer"),
        ([ASKED, SAID, ASKED, OTHER], [ASKED, SAID, ASKED], "rejected has no answer"),
        ([turn("system", "s"), ASKED, SAID], [turn("system", "s"), ASKED], "rejected has no answer"),
        ([turn("system", "s"), ASKED, SAID], [turn("system", "s")], "rejected has no answer"),
        ([ASKED], [ASKED], "chosen and rejected have no answer"),
    ],
)
def test_a_side_that_is_the_prompt_alone_is_refused_with_its_row(weightless, tmp_path, chosen, rejected, problem):
    good = {"chosen": [ASKED, SAID], "rejected": [ASKED, OTHER]}
    rows = Dataset.from_list([good, good, {"chosen": chosen, "rejected": rejected}])
    with pytest.raises(DataError, match=f"train_dataset, row 3: {problem}"):
        RobustDPOTrainer(weightless, args=RobustDPOConfig(str(tmp_path / "out")), train_dataset=rows)


def test_conversations_of_which_one_goes_on_longer_are_pairs():
    from posttrain.data.pairs.faults import faults

    assert faults({"chosen": [ASKED, SAID, ASKED, OTHER], "rejected": [ASKED, SAID]}, "row 1") == []
    assert faults({"chosen": [ASKED, SAID, ASKED, OTHER], "rejected": [ASKED, SAID, ASKED, SAID]}, "row 1") == []
    assert faults({"chosen": [ASKED, SAID], "rejected": [ASKED, SAID]}, "row 1") == ["identical"]


@pytest.mark.parametrize(
    ("chosen", "rejected", "said"),
    [("2 + 2 = 4", "2 + 2 =", True), ("ab", "abc", True), ("2 + 2 = 4", "2 + 2 = 5", False)],
)
def test_a_text_that_the_other_begins_with_is_said_where_there_is_no_prompt(chosen, rejected, said):
    from posttrain.data.pairs.faults import scan_pairs

    pair = {"chosen": chosen, "rejected": rejected}
    counts, warnings = scan_pairs([("row 1", pair)], "d")
    assert counts["prefix"] == said
    expected = ["d: 1 of 1 pairs have a side that is the beginning of the other, and no column for the prompt"] * said
    assert [warning.split(" (first")[0] for warning in warnings] == expected
    assert scan_pairs([("row 1", {"prompt": "q", **pair})], "d")[1] == []


@pytest.mark.parametrize(
    ("rate", "what"),
    [
        ("0.1", "'0.1', of type str in row 2; every row's flip_rate must be a number in"),
        (Decimal("0.1"), r"Decimal\('0.1'\), of type Decimal in row 2; every row's flip_rate must be a number"),
        (None, "null in row 2; every row's flip_rate must be a number"),
        (0.7, "0.7 in row 2; every row's flip_rate must lie in"),
        (float("nan"), "nan in row 2; every row's flip_rate must lie in"),
    ],
)
def test_a_flip_rate_is_called_what_it_is(weightless, tmp_path, rate, what):
    first = rate if isinstance(rate, str | Decimal) else 0.1
    rows = make_pairs(2, flip_rate=[type(first)("0.2"), rate])
    if not isinstance(rate, float | None):
        # of the first row already
        what = what.replace("0.1", "0.2").replace("row 2", "row 1")
    args = RobustDPOConfig(str(tmp_path / "out"), pair_loss="rdpo", flip_rate=0.1)
    with pytest.raises(DataError, match=f"train_dataset has a flip_rate of {what}") as raised:
        RobustDPOTrainer(weightless, args=args, train_dataset=rows)
    if isinstance(rate, str | Decimal):
        assert 'dataset.cast_column("flip_rate", Value("float64"))' in str(raised.value)
        mended = rows.cast_column("flip_rate", Value("float64"))
        assert mended["flip_rate"][0] == 0.2
        prepare.check_flip_rates(args, mended, None)


@pytest.mark.core("system")
@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_streams_without_column_names_train_on_their_system_messages(tiny_folder, tmp_path, column):
    row = {column: "Be short.", "prompt": [ASKED], "chosen": [SAID], "rejected": [OTHER], "gold": "1"}

    def rows():
        yield from [row] * 4

    stream, known = IterableDataset.from_generator(rows), Dataset.from_list([row] * 4)
    made = [
        RobustDPOTrainer(tiny_folder, args=RobustDPOConfig(**settings(tmp_path / name)), train_dataset=data)
        for name, data in (("a", stream), ("b", known))
    ]
    ids = [next(iter(trainer.train_dataset))["prompt_ids"] for trainer in made]
    assert ids[0] == ids[1] and "Be short." in made[0].processing_class.decode(ids[0])
    args = PolicyGradientConfig(**rollouts.settings(tmp_path / "c"))
    trainer = PolicyGradientTrainer(tiny_folder, rollouts.success, args, IterableDataset.from_generator(rows))
    assert next(iter(trainer.train_dataset))["prompt"] == [turn("system", "Be short."), ASKED]
