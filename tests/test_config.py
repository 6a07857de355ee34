import os
from dataclasses import dataclass, field, fields
from pathlib import Path

import pytest

from posttrain import NoisySFTConfig, PolicyGradientConfig
from posttrain.config import (
    REMOVED,
    DataArguments,
    ModelArguments,
    PosttrainParser,
    get_peft_config,
    parse,
)
from posttrain.errors import ConfigError
from posttrain.paths import configs_dir
from posttrain.privacy.config import PrivacyConfig
from posttrain.trainers.preference.robust_dpo import RobustDPOConfig
from tests.families import CONFIGS as FAMILIES

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = (DataArguments, ModelArguments, RobustDPOConfig)
CONFIGS = sorted((configs_dir() / "robust_dpo").glob("*.yaml"))


@dataclass
class Toy:
    """A section of one's own."""

    steps: int = 10
    rate: float = 0.5
    ratio: float | None = None
    share: bool = False
    keep: bool = True
    mode: str = "slow"
    kind: str = field(default="a", metadata={"choices": ["a", "b"]})
    names: list[str] | None = None
    extra: dict | str | None = None
    warmup_steps: float = 0.0

    def __post_init__(self):
        if self.rate > 1:
            raise ValueError(f"rate is {self.rate}; it must be at most 1.")


def write(folder, text):
    path = folder / "run.yaml"
    path.write_text(text)
    return str(path)


def toy(folder, text="", *arguments):
    return parse((Toy,), ["--config", write(folder, text), *arguments])[0]


def test_values_take_the_type_of_their_field(tmp_path):
    text = "steps: 1e3\nrate: 1e-4\nratio: 2\nshare: 'yes'\nnames: all\nextra: {a: 1}\nmode: 3\n"
    assert toy(tmp_path, text) == Toy(
        steps=1000, rate=1e-4, ratio=2.0, share=True, names=["all"], extra={"a": 1}, mode="3"
    )
    assert toy(tmp_path, "names: [a, 1]\nratio: null\nkeep: false") == Toy(names=["a", "1"], keep=False)


def test_the_command_line_takes_the_same_values_and_wins(tmp_path):
    got = toy(tmp_path, "steps: 1\nkeep: true\nratio: 0.5", "--steps=1e3", "--no_keep", "--ratio", "none", "--share")
    assert got == Toy(steps=1000, keep=False, ratio=None, share=True)


ALIKE = [
    (PolicyGradientConfig, "estimator", "{preset: dapo, ratio_max: 1.9}"),
    (PolicyGradientConfig, "estimator", '{"preset": "dapo"}'),
    (PolicyGradientConfig, "reward_weights", "[0.5, 1]"),
    (PolicyGradientConfig, "soft_gate", "[[1, 0, 0]]"),
    (RobustDPOConfig, "gradient_checkpointing_kwargs", "{use_reentrant: false}"),
    (NoisySFTConfig, "noise_layers", "[0, 1]"),
    (NoisySFTConfig, "noise_layers", "[0]"),
]


@pytest.mark.parametrize(("kind", "name", "text"), ALIKE)
def test_a_word_of_the_command_line_is_what_a_file_reads(kind, name, text, tmp_path, monkeypatch):
    # as it is read, whatever the config makes of it
    monkeypatch.setattr(kind, "__post_init__", lambda self: None)
    ways = [f"--{name}", text], ["--config", write(tmp_path, f"{name}: {text}")]
    word, line = (getattr(parse((kind,), way)[0], name) for way in ways)
    assert word == line and isinstance(word, list | dict)


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_setting_that_is_a_mapping_is_read_from_one_word(kind):
    types = PosttrainParser((kind,))._types
    mappings = [name for name, known in types.items() if known.mapping]
    assert "lr_scheduler_kwargs" in mappings
    for name in mappings:
        assert types[name].from_word("{a: 1}") == {"a": 1} == types[name].from_word('{"a": 1}'), name


def test_a_text_of_a_file_is_not_read_as_a_mapping(tmp_path):
    # what a file may not set is looked for in its mappings, before
    path = write(tmp_path, 'model_init_kwargs: "{trust_remote_code: true}"')
    with pytest.raises(ConfigError, match="model_init_kwargs is '{trust_remote_code: true}'; it takes a mapping"):
        parse((RobustDPOConfig,), ["--output_dir", str(tmp_path), "--config", path])


def test_merged_keys_are_settings_that_the_files_own_override(tmp_path):
    got = toy(tmp_path, "rate: 0.25\n<<: {rate: 1, steps: 3}\nextra: {<<: {a: 1}, a: 2}")
    assert got == Toy(rate=0.25, steps=3, extra={"a": 2})


def test_an_empty_file_leaves_the_defaults(tmp_path):
    assert toy(tmp_path, "# nothing yet\n") == Toy()


def test_env_sets_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_NAME", "before")
    toy(tmp_path, "env:\n  WANDB_NAME: 3\n")
    assert os.environ["WANDB_NAME"] == "3"


def test_a_config_file_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "none.yaml"
    with pytest.raises(ConfigError) as caught:
        parse((Toy,), ["--config", str(path)])
    assert str(caught.value) == f"the config file {path} cannot be read: No such file or directory."


def test_a_config_file_that_is_empty_or_no_utf8_says_so(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(" \n")
    with pytest.raises(ConfigError) as caught:
        parse((Toy,), ["--config", str(path)])
    assert str(caught.value) == (
        f"the config file {path} is empty; write lines of `key: value`, or leave --config out."
    )
    path.write_bytes("steps: 3\n# été\n".encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        parse((Toy,), ["--config", str(path)])
    assert str(caught.value) == f"{path}:2: not UTF-8 text (byte 0xe9); save the file as UTF-8."
    path.write_bytes("\ufeffsteps: 3\n".encode())
    assert parse((Toy,), ["--config", str(path)])[0].steps == 3


def test_a_number_of_rows_below_one_is_refused_at_its_place(tmp_path):
    with pytest.raises(ConfigError, match=r"^max_train_rows is 0; it must be 1 or more.*: command line\)$"):
        parse(SECTIONS, ["--max_train_rows", "0"])
    path = write(tmp_path, "max_eval_rows: -1")
    with pytest.raises(ConfigError, match=rf"^max_eval_rows is -1; .*\(max_eval_rows: {path}:1\)$"):
        parse(SECTIONS, ["--config", path])


def test_what_a_section_refuses_names_the_place_that_set_it(tmp_path):
    path = write(tmp_path, "steps: 3\nrate: 2")
    with pytest.raises(ConfigError) as caught:
        parse((Toy,), ["--config", path])
    assert str(caught.value) == f"rate is 2.0; it must be at most 1. (rate: {path}:2)"
    with pytest.raises(ConfigError) as caught:
        parse((Toy,), ["--config", path, "--rate", "3"])
    assert str(caught.value) == "rate is 3.0; it must be at most 1. (rate: command line)"


def test_settings_of_the_method_are_refused_at_their_line(tmp_path):
    path = write(tmp_path, "pair_loss: rdpo\nflip_rate: 0.5\n")
    with pytest.raises(ConfigError, match=rf"^flip_rate is 0.5; it must lie in \[0, 0.5\).*{path}:2\)$"):
        parse(SECTIONS, ["--config", path])


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("q_proj", {"q_proj"}),
        ("[q_proj, v_proj]", {"q_proj", "v_proj"}),
        ("all-linear", "all-linear"),
        (r"'.*\.q_proj'", r".*\.q_proj"),
    ],
)
def test_one_target_module_is_a_name_as_two_are(tmp_path, text, targets):
    path = write(tmp_path, f"use_peft: true\nlora_target_modules: {text}")
    (model_args,) = parse((ModelArguments,), ["--config", path])
    assert get_peft_config(model_args).target_modules == targets


def test_removed_settings_name_something_that_exists():
    known = {f.name for section in SECTIONS for f in fields(section)}
    assert not known & set(REMOVED)
    for advice in REMOVED.values():
        if advice.startswith("write `"):
            assert advice.removeprefix("write `").partition(":")[0] in known


def test_every_field_of_the_recipe_has_a_known_type():
    parser = PosttrainParser((*SECTIONS, PrivacyConfig | None))
    # A default that its own field would refuse shows an annotation that is read wrongly.
    for name, kind in parser._types.items():
        default = parser.get_default(name)
        if isinstance(default, (bool, int, float, str)) and default != "":
            assert kind.from_yaml(default) in (default, [default]), name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_parse(path, monkeypatch):
    # What the GPU configs ask for is checked by transformers against this machine.
    sections = (*SECTIONS, PrivacyConfig | None)
    data_args, model_args, training_args, privacy = parse(sections, ["--config", str(path), "--bf16", "false"])
    assert data_args.dataset_name and model_args.model_name_or_path
    assert training_args.output_dir == f"runs/robust_dpo-{path.stem}"
    assert (privacy is not None) == (path.stem == "private")


def test_all_three_machines_have_a_config():
    assert {path.stem for path in CONFIGS} >= {"cpu", "single_gpu", "zero3"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--clip_norm", "2"], r"target_epsilon and noise_multiplier are both null; a private run needs one of them"),
        (["--target_epsilon", "null"], r"target_epsilon and noise_multiplier are both null"),
        (["--target_epsilon", "3"], r"expected_batch_size is null.*"),
        (["--publish_private_metrics", "false"], r"target_epsilon and noise_multiplier are both null"),
        (["--target_epsilon", "three"], r"command line: .*target_epsilon.*three"),
        (["--target_epsilon", "3", "--expected_batch_size", "0"], r"expected_batch_size is 0.*command line"),
    ],
)
def test_settings_beside_others_are_checked_where_any_is_given(words, said, tmp_path):
    sections = (RobustDPOConfig, PrivacyConfig | None)
    given = ["--output_dir", str(tmp_path)]
    assert parse(sections, given)[1] is None
    taken = parse(sections, [*given, "--target_epsilon", "inf", "--expected_batch_size", "4"])[1]
    assert (taken.target_epsilon, taken.expected_batch_size, taken.clip_norm) == (float("inf"), 4, 1.0)
    with pytest.raises(ConfigError, match=said):
        parse(sections, [*given, *words])


def test_settings_beside_others_are_read_from_the_file_and_told_by_help(tmp_path, capsys):
    sections = (RobustDPOConfig, PrivacyConfig | None)
    path = write(tmp_path, f"output_dir: {tmp_path}\ntarget_epsilon: 3\nexpected_batch_size: 8\n")
    args, privacy = parse(sections, ["--config", path, "--privacy_unit_column", "user"])
    assert (privacy.target_epsilon, privacy.privacy_unit_column, args.privacy) == (3.0, "user", None)
    # a word of the command line stands in the place of the file's
    _, privacy = parse(sections, ["--config", path, "--noise_multiplier", "1"])
    assert (privacy.target_epsilon, privacy.noise_multiplier) == (None, 1.0)
    with pytest.raises(SystemExit):
        parse(sections, ["--help"])
    told = capsys.readouterr().out
    assert all(f"--{entry.name}" in told for entry in fields(PrivacyConfig))
