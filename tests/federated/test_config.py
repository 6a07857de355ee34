"""Settings of rounds: what fits together, and what is refused by its name."""

import numpy as np
import pytest
from trl import SFTConfig

from posttrain import DPSFTConfig, NoisySFTConfig, RobustDPOConfig
from posttrain.config import parse
from posttrain.config.arguments import DataArguments, ModelArguments
from posttrain.config.setting import identity_of, meanings, told_in_card, undeclared
from posttrain.errors import ConfigError, ExcludedSetting
from posttrain.federated.config import FederatedConfig
from tests.federated.refused import EXCLUDED, NEEDED, REFUSED


def make(**given):
    return FederatedConfig(**dict(num_clients=6) | given)


def test_defaults_are_those_of_the_method():
    made = make()
    assert (made.method, made.refactor_every_rounds, made.weights, made.min_replies) == ("fedsvd", 1, "rows", 1)
    assert make(method="ffa_lora").refactor_every_rounds is None
    assert make(method="ffa_refactored_once").refactor_every_rounds == 1
    assert make(aggregation="median").weights == "uniform" and make(aggregation="median").min_replies == 3
    assert make(aggregation="trimmed_mean").trim_fraction == 0.2
    assert make(partition="dirichlet", partition_column="label").dirichlet_alpha == 0.5


@pytest.mark.parametrize("given", REFUSED, ids=lambda given: str(given)[:70])
def test_what_no_setting_can_be_is_refused_by_its_name(given):
    *_, name = given
    with pytest.raises(ConfigError, match=rf"^{name} (is|has)"):
        make(**given)


@pytest.mark.parametrize(("given", "said"), EXCLUDED)
def test_settings_without_effect_are_refused(given, said):
    with pytest.raises(ExcludedSetting, match=said):
        make(**given)


def test_what_a_rule_or_a_split_needs_is_asked_for():
    for given, said in NEEDED:
        with pytest.raises(ConfigError, match=said):
            make(**given)
    FederatedConfig(partition="given")
    make(aggregation="median", clients_per_round=3)


def test_numbers_of_numpy_become_pythons_own():
    made = make(
        num_clients=np.int64(6),
        rounds=np.int32(3),
        **dict(partition="dirichlet", partition_column="label"),
        dirichlet_alpha=np.float32(0.5),
    )
    assert type(made.num_clients) is type(made.rounds) is int and type(made.dirichlet_alpha) is float


def test_settings_are_read_beside_those_of_a_trainer(tmp_path):
    words = f"--num_clients 6 --clients_per_round 3 --rounds 4 --output_dir {tmp_path} --refactor_every_rounds 2"
    for kind in (SFTConfig, NoisySFTConfig, DPSFTConfig, RobustDPOConfig, DataArguments, ModelArguments):
        ours = {field for field in meanings(FederatedConfig)}
        assert not ours & set(kind.__dataclass_fields__)
    made, _ = parse((FederatedConfig, NoisySFTConfig), words.split())
    assert (made.clients_per_round, made.rounds, made.refactor_every_rounds) == (3, 4, 2)

    with pytest.raises(ConfigError, match="rounds: command line"):
        parse((FederatedConfig,), ["--num_clients", "6", "--rounds", "0"])


def test_every_field_says_what_it_means():
    assert undeclared(FederatedConfig) == []
    assert [name for name, meaning in meanings(FederatedConfig).items() if meaning.identity and not meaning.card] == []
    assert set(meanings(FederatedConfig)) - set(identity_of(make())) == {"rounds", "round_timeout", "save_every_rounds"}
    assert told_in_card(make()) == {
        "method": "fedsvd", "rounds": 100, "num_clients": 6, "refactor_every_rounds": 1, "weights": "rows",
        "partition": "iid", "federated_seed": 0, "min_replies": 1,
    }  # fmt: skip
