"""Off means off: at its neutral setting a method is TRL's trainer, bit for bit."""

import json

import pytest

from tests.contract.conftest import cases
from tests.runs import identical


@pytest.fixture(scope="module")
def parents(tiny_folder, tmp_path_factory):
    """The change that TRL's own trainer makes with some settings, trained once for all neutral ones."""
    known = {}

    def trained(method, settings):
        key = json.dumps([method.name, settings], sort_keys=True, default=str)
        if key not in known:
            known[key], _ = method.train(tiny_folder, tmp_path_factory.mktemp("trl"), **method.parent, **settings)
        return known[key]

    return trained


@pytest.mark.parametrize(("method", "name"), cases("neutral", core=2))
def test_neutral_settings_are_the_parent_bit_for_bit(method, name, parents, tiny_folder, tmp_path):
    ours, parent = method.neutral[name]
    change, _ = method.train(tiny_folder, tmp_path, **ours)
    assert identical(change, parents(method, parent))
