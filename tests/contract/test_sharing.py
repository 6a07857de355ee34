"""Rows that share their prefix train as padded ones do."""

import pytest

from tests.contract.conftest import cases
from tests.runs import distance, losses


@pytest.mark.core("robust_dpo-dr_dpo")
@pytest.mark.parametrize(("method", "name"), cases("shared"))
def test_shared_prefixes_end_where_padded_rows_end(method, name, tiny_folder, tmp_path):
    run = method.shared[name]
    padded, first = method.train(tiny_folder, tmp_path / "padded", **run, prefix_sharing="never")
    shared, second = method.train(tiny_folder, tmp_path / "shared", **run, prefix_sharing="always")
    assert second._sharing.active and distance(shared, padded) <= 1e-4
    if not method.compared:
        assert losses(second) == pytest.approx(losses(first), rel=1e-4)
    if name == next(iter(method.shared)):
        rate = second.args.learning_rate * 1.01
        other, _ = method.train(
            tiny_folder, tmp_path / "other", **run | dict(learning_rate=rate, prefix_sharing="never")
        )
        assert distance(other, padded) > 1e-3, "the tolerance tells runs apart"
