"""A file's setting that the command line made pointless is left out with a line; both in one place are refused."""

import pytest

from posttrain import ALoLConfig, HPTConfig, PolicyGradientConfig, QAEConfig, RobustDPOConfig
from posttrain.config import parse
from posttrain.errors import ConfigError
from tests.recipe.in_process import settings_of, shipped, words

BATCH = "num_generations: 4\nper_device_train_batch_size: 4\n"


def lines(settings: dict) -> str:
    return "".join(f"{name}: {value}\n" for name, value in settings.items())


# config, what the file says, what the command line says, what then holds, what is left out
CASES = [
    (RobustDPOConfig, dict(flip_rate=0.1), dict(pair_loss="dpo"), dict(flip_rate=0.0), "flip_rate"),
    (RobustDPOConfig, dict(flip_rate=0.1), dict(pair_loss="hinge"), dict(pair_loss="hinge"), "flip_rate"),
    (RobustDPOConfig, dict(flip_rate=0.1), dict(loss_type="sigmoid"), dict(pair_loss="dpo"), "flip_rate"),
    (RobustDPOConfig, dict(pair_loss="rdpo"), dict(loss_type="ipo"), dict(pair_loss="ipo"), "pair_loss"),
    (RobustDPOConfig, dict(pair_loss="rdpo"), dict(loss_type="sigmoid"), dict(pair_loss="dpo"), "pair_loss"),
    (RobustDPOConfig, dict(loss_type="hinge"), dict(pair_loss="rdpo"), dict(pair_loss="rdpo"), "loss_type"),
    (RobustDPOConfig, dict(pair_loss="rdpo"), dict(reduction="dr_dpo"), dict(pair_loss="dpo"), "pair_loss"),
    (RobustDPOConfig, dict(flip_rate=0.1), dict(label_smoothing="0.2", loss_type="robust"),
     dict(pair_loss="rdpo", flip_rate=0.2), "flip_rate"),
    (RobustDPOConfig, dict(reduction="dr_dpo"), dict(pair_loss="rdpo"), dict(reduction="mean"), "reduction"),
    (RobustDPOConfig, dict(bf16="true", use_cpu="true"), dict(bf16="false"), dict(bf16=False), None),
    (RobustDPOConfig, dict(load_best_model_at_end="true", eval_strategy="steps"), dict(eval_strategy="no"),
     dict(load_best_model_at_end=False), "load_best_model_at_end"),
    (ALoLConfig, dict(kl_beta=0.1, variant="a_lol_kl"), dict(variant="a_lol"), dict(kl_beta=0.0), "kl_beta"),
    (ALoLConfig, dict(value="column", value_column="v"), dict(value="mean"), dict(value_column=None), "value_column"),
    (ALoLConfig, dict(value="head"), dict(variant="nll"), dict(value="mean"), "value"),
    (ALoLConfig, dict(value="head", value_targets="generations"), dict(value="per_prompt"),
     dict(value_targets="answers"), "value_targets"),
    (ALoLConfig, dict(advantage_weighting="sample"), dict(variant="nll"), dict(advantage_weighting="weight"),
     "advantage_weighting"),
    (ALoLConfig, dict(keep_negative_advantages="true"), dict(variant="wbc"), dict(keep_negative_advantages=False),
     "keep_negative_advantages"),
    (ALoLConfig, dict(train_sampling_strategy="group_by_length"), dict(advantage_weighting="sample"),
     dict(train_sampling_strategy="random"), "train_sampling_strategy"),
    (QAEConfig, dict(quantile=0.3), dict(advantage="group_mean"), dict(quantile=None), "quantile"),
    (PolicyGradientConfig, dict(loss_type="grpo"), dict(estimator="dapo"), dict(loss_type="dapo"), "loss_type"),
    (PolicyGradientConfig, dict(steps_per_generation=4), dict(generation_batch_size="8"), dict(steps_per_generation=2),
     "steps_per_generation"),
    (PolicyGradientConfig, dict(skip_grad_norm=5), dict(max_grad_norm="0"), dict(skip_grad_norm=None),
     "skip_grad_norm"),
    (PolicyGradientConfig, dict(eval_greedy="true"), dict(use_vllm="true"), dict(eval_greedy=None), "eval_greedy"),
    (HPTConfig, dict(gamma=0.0), dict(soft_gate="[[0,0,1],[1,0,0],[1,0,0],[1,0,0],[1,0,0]]"), dict(gamma=None),
     "gamma"),
    (HPTConfig, dict(sft_normalization="prompt"), dict(loss_type="bnpo"), dict(sft_normalization="unified"),
     "sft_normalization"),
]  # fmt: skip


def base(kind) -> str:
    return BATCH if issubclass(kind, PolicyGradientConfig) else ""


@pytest.mark.parametrize(("kind", "file", "given", "holds", "left_out"), CASES)
def test_the_command_line_makes_a_files_setting_pointless(tmp_path, logged, kind, file, given, holds, left_out):
    logged.set_level("INFO", "posttrain")
    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: {tmp_path}/out\n" + base(kind) + lines(file))
    (args,) = parse((kind,), ["--config", str(path), *words(given)])
    assert {name: getattr(args, name) for name in holds} == holds
    said = [
        record.getMessage()
        for record in logged.records
        if "is left out, as the command line has" in record.getMessage()
    ]
    assert len(said) == (left_out is not None)
    if left_out:
        winner, value = next(iter(given.items()))
        assert f"`{left_out}: " in said[0] and f"{path}:" in said[0] and f"--{winner} {value[:3]}" in said[0]


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (RobustDPOConfig, dict(flip_rate="0.1", pair_loss="dpo"), "flip_rate is 0.1, which has no effect"),
        (RobustDPOConfig, dict(reduction="dr_dpo", pair_loss="rdpo"), "pair_loss is rdpo and reduction is dr_dpo"),
        (RobustDPOConfig, dict(loss_type="ipo", pair_loss="rdpo"), "loss_type is ipo and pair_loss is rdpo"),
        (ALoLConfig, dict(kl_beta="0.1", variant="a_lol"), "kl_beta is 0.1 with variant a_lol"),
        (ALoLConfig, dict(value="head", variant="nll"), "value is head, which variant nll has no use for"),
        (QAEConfig, dict(quantile="0.4", advantage="group_mean"), "quantile is 0.4, which has no effect"),
        (PolicyGradientConfig, dict(steps_per_generation="4", generation_batch_size="8"), "follows from the other"),
        (HPTConfig, dict(gamma="0.0", soft_gate="[[0,0,1],[1,0,0],[1,0,0],[1,0,0],[1,0,0]]"), "are both set"),
    ],
)
def test_both_in_one_place_are_refused(tmp_path, kind, settings, message):
    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: {tmp_path}/out\n" + base(kind) + lines(settings))
    with pytest.raises(ConfigError, match=message) as both_in_the_file:
        parse((kind,), ["--config", str(path)])
    assert f"{path}:" in str(both_in_the_file.value)
    path.write_text(f"output_dir: {tmp_path}/out\n" + base(kind))
    with pytest.raises(ConfigError, match=message):
        parse((kind,), ["--config", str(path), *words(settings)])


def test_what_the_command_line_says_is_never_left_out(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"output_dir: {tmp_path}/out\npair_loss: dpo\n")
    with pytest.raises(ConfigError, match=r"flip_rate is 0.2, which has no effect on pair_loss: dpo.*command line"):
        parse((RobustDPOConfig,), ["--config", str(path), "--flip_rate", "0.2"])


@pytest.mark.parametrize(
    ("method", "given", "holds"),
    [
        ("robust_dpo", dict(pair_loss="dpo"), dict(pair_loss="dpo", flip_rate=0.0)),
        ("robust_dpo", dict(reduction="dr_dpo"), dict(pair_loss="dpo", flip_rate=0.0)),
        ("robust_dpo", dict(loss_type="ipo"), dict(pair_loss="ipo", flip_rate=0.0)),
        ("robust_dpo", dict(pair_loss="cdpo"), dict(pair_loss="cdpo", flip_rate=0.1)),
        ("robust_dpo", dict(flip_rate="0.2"), dict(pair_loss="rdpo", flip_rate=0.2)),
        ("a_lol", dict(variant="nll"), dict(variant="nll")),
        ("qae", dict(advantage="group_mean"), dict(advantage="group_mean", quantile=None)),
        ("qae", dict(estimator="dapo"), dict(advantage="group_mean", quantile=None)),
        ("hpt", dict(gamma="null"), dict(gamma=None)),
    ],
)
def test_a_shipped_file_gives_way_to_one_word_of_the_command_line(tmp_path, method, given, holds):
    argv = ["--config", str(shipped(method)), "--output_dir", str(tmp_path), *words(given)]
    *_, args = settings_of(method, *argv)
    assert {name: getattr(args, name) for name in holds} == holds


def test_a_presets_own_default_gives_way_in_python(tmp_path):
    batch = dict(num_generations=4, per_device_train_batch_size=4)
    assert QAEConfig(str(tmp_path), advantage="group_mean", **batch).quantile is None
    gate = [[0, 0, 1], *[[1, 0, 0]] * 4]
    assert HPTConfig(str(tmp_path), soft_gate=gate, **batch).gamma is None
    with pytest.raises(ConfigError, match="quantile is 0.4, which has no effect"):
        QAEConfig(str(tmp_path), advantage="group_mean", quantile=0.4, **batch)
