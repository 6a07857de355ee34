from posttrain import compat


def test_every_private_upstream_name_in_use_is_still_there():
    assert compat.missing_names() == []


def test_a_renamed_private_name_is_reported(monkeypatch):
    monkeypatch.setattr(compat, "PRIVATE_NAMES", (("trl", "DPOTrainer._gone", ()), ("trl", "DPOTrainer.log", ("x",))))
    assert compat.missing_names() == [
        "trl.DPOTrainer._gone is gone",
        "trl.DPOTrainer.log no longer takes `x`",
    ]


def test_every_instance_attribute_in_use_is_still_there(tiny_folder, tmp_path):
    import bitsandbytes

    from posttrain import (
        ALoLConfig,
        ALoLTrainer,
        PolicyGradientConfig,
        PolicyGradientTrainer,
        RobustDPOConfig,
        RobustDPOTrainer,
    )
    from tests import rollouts
    from tests.conftest import make_pairs
    from tests.scored import make_scored

    trainer = RobustDPOTrainer(tiny_folder, args=RobustDPOConfig(str(tmp_path)), train_dataset=make_pairs(4))
    args = PolicyGradientConfig(**rollouts.settings(tmp_path / "grpo"))
    objects = {
        "trl.GRPOTrainer": PolicyGradientTrainer(tiny_folder, rollouts.success, args, rollouts.prompts([1] * 4)),
        "trl.DPOTrainer": trainer,
        "trl.SFTTrainer": ALoLTrainer(tiny_folder, ALoLConfig(str(tmp_path / "a_lol")), train_dataset=make_scored(8)),
        "transformers.Trainer": trainer,
        "bitsandbytes.nn.Linear4bit": bitsandbytes.nn.Linear4bit(4, 4),
    }
    assert objects.keys() == compat.INSTANCE_ATTRIBUTES.keys()
    for owner, names in compat.INSTANCE_ATTRIBUTES.items():
        assert [name for name in names if not hasattr(objects[owner], name)] == [], owner
