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

    from posttrain import RobustDPOConfig, RobustDPOTrainer
    from tests.conftest import make_pairs

    trainer = RobustDPOTrainer(tiny_folder, args=RobustDPOConfig(str(tmp_path)), train_dataset=make_pairs(4))
    objects = {
        "trl.DPOTrainer": trainer,
        "transformers.Trainer": trainer,
        "bitsandbytes.nn.Linear4bit": bitsandbytes.nn.Linear4bit(4, 4),
    }
    assert objects.keys() == compat.INSTANCE_ATTRIBUTES.keys()
    for owner, names in compat.INSTANCE_ATTRIBUTES.items():
        assert [name for name in names if not hasattr(objects[owner], name)] == [], owner
