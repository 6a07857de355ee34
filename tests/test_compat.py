import pydoc

from posttrain import compat


def test_every_private_upstream_name_in_use_is_still_there():
    assert compat.missing_names() == []


def test_a_renamed_private_name_is_reported(monkeypatch):
    monkeypatch.setattr(compat, "PRIVATE_NAMES", (("trl", "DPOTrainer._gone", ()), ("trl", "DPOTrainer.log", ("x",))))
    assert compat.missing_names() == [
        "trl.DPOTrainer._gone is gone",
        "trl.DPOTrainer.log no longer takes `x`",
    ]


def test_every_instance_attribute_in_use_is_still_there(tiny_folder, tmp_path, monkeypatch):
    import bitsandbytes

    from tests.families import METHODS

    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    made = [method.build(tiny_folder, tmp_path / method.name) for method in METHODS.values()]
    made += made[0].model.modules()
    made.append(bitsandbytes.nn.Linear4bit(4, 4))
    for owner, names in compat.INSTANCE_ATTRIBUTES.items():
        instances = [one for one in made if isinstance(one, pydoc.locate(owner))]
        assert instances and {name for name in names for one in instances if not hasattr(one, name)} == set(), owner
