"""Off means off: at its neutral setting a method is TRL's trainer, bit for bit."""

import pytest

from tests.contract.conftest import cases
from tests.runs import identical


@pytest.mark.parametrize(("method", "name"), cases("neutral", core=2))
def test_neutral_settings_are_the_parent_bit_for_bit(method, name, tiny_folder, tmp_path):
    ours, parent = method.neutral[name]
    reference, _ = method.train(tiny_folder, tmp_path / "trl", **method.parent, **parent)
    change, _ = method.train(tiny_folder, tmp_path / "ours", **ours)
    assert identical(change, reference)
