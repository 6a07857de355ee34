"""Settings that are refused before any weight is read."""

from decimal import Decimal

import pytest
from datasets import Dataset, IterableDataset, Value
from peft import IA3Config, LoraConfig

from posttrain import PolicyGradientConfig, PolicyGradientTrainer, RobustDPOConfig, RobustDPOTrainer
from posttrain.adapters.gift_sw import GiftSWConfig
from posttrain.errors import ConfigError, DataError, EnvironmentIssue
from posttrain.run import adapter_checks, checks
from posttrain.trainers.preference import prepare
from tests import rollouts
from tests.conftest import make_pairs
from tests.contract.refusals import ASKED, OTHER, SAID, turn
from tests.training import settings


@pytest.fixture
def weightless(tiny_folder, tmp_path):
    """A model folder of which loading would fail: what is refused with it was refused before."""
    import shutil

    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    return str(tmp_path / "model")


@pytest.mark.parametrize("name", ["eager", "sdpa", "kernels-community/flash-attn2", None])
def test_attention_that_transformers_knows_passes(name):
    checks.check_loading({"attn_implementation": name, "dtype": "float32"})


def test_a_neutral_infinity_is_taken(tmp_path):
    assert RobustDPOConfig(str(tmp_path), reduction="dr_dpo", beta_prime=float("inf")).beta_prime == float("inf")


def test_a_schedule_with_the_settings_that_it_needs_passes(tmp_path):
    settings = dict(lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": 3})
    assert RobustDPOConfig(str(tmp_path), **settings, optim="adamw_8bit").optim == "adamw_8bit"


def test_a_reporter_that_is_not_installed_is_an_issue_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(EnvironmentIssue, match="report_to names wandb, which is not installed here"):
        RobustDPOConfig(str(tmp_path), report_to="wandb")
    assert RobustDPOConfig(str(tmp_path), report_to="tensorboard").report_to == ["tensorboard"]


def test_a_missing_package_is_an_issue_of_the_environment():
    with pytest.raises(EnvironmentIssue, match="these settings need a package that is missing: no flash_attn"):
        with checks.upstream_refusals():
            raise ImportError("no flash_attn")


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


@pytest.mark.parametrize("rates", [["0.2", "0.1"], [Decimal("0.2"), Decimal("0.1")]], ids=["text", "decimal"])
def test_flip_rates_of_another_type_pass_as_the_refusal_mends_them(tmp_path, rates):
    rows = make_pairs(2, flip_rate=rates)
    args = RobustDPOConfig(str(tmp_path / "out"), pair_loss="rdpo", flip_rate=0.1)
    with pytest.raises(DataError, match="cast_column"):
        prepare.check_flip_rates(args, rows, None)
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


@pytest.mark.parametrize("config", [LoraConfig, GiftSWConfig, IA3Config], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "name", ["target_modules", "exclude_modules", "feedforward_modules", "modules_to_save", "target_parameters"]
)
def test_what_names_no_modules_in_an_adapter_is_refused_by_name(config, name):
    for value in (5, True, 0.5, float("nan"), [1], ["q_proj", None], {"q_proj": 1}):
        adapter = config()
        # a constructor of its own may ask first
        setattr(adapter, name, value)
        with pytest.raises(ConfigError, match=f"{name} of the adapter is .*; it must be a"):
            adapter_checks.check_lora(adapter)
    texts = ["k_proj", r".*\.k_proj"] if name in ("target_modules", "exclude_modules", "feedforward_modules") else []
    for value in (None, ["q_proj"], {"q_proj"}, ("q_proj",), *texts):
        adapter = config()
        setattr(adapter, name, value)
        adapter_checks.check_lora(adapter)


def test_an_adapter_that_names_a_number_is_refused_by_a_trainer(weightless, tmp_path):
    args = RobustDPOConfig(**settings(tmp_path))
    for adapter in (LoraConfig(target_modules=5), GiftSWConfig(r=4, target_modules=True)):
        with pytest.raises(ConfigError, match="target_modules of the adapter is (5|True); it must be a name"):
            RobustDPOTrainer(weightless, args=args, train_dataset=make_pairs(8), peft_config=adapter)
