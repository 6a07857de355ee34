"""An update is that of its rows: how a step is split into micro-batches, whether the last one is short, and how rows
are padded plays no part. A variant that is known to be wrong is told apart."""

import json

import pytest

from tests.contract.conftest import cases
from tests.families import METHODS
from tests.runs import distance, entries, fit, losses, same_metrics


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    """The change of a case whose steps are one batch each, and what was logged; trained once for all tests."""
    known = {}

    def trained(method, case):
        key = json.dumps([method.name, case], sort_keys=True, default=str)
        if key not in known:
            settings = case | method.split(method.step)
            change, trainer = method.train(tiny_folder, tmp_path_factory.mktemp("whole"), **settings)
            known[key] = change, entries(trainer)
        return known[key]

    return trained


@pytest.mark.parametrize(("method", "name"), cases("cases"))
def test_the_update_does_not_depend_on_the_batch_split(method, name, whole, tiny_folder, tmp_path):
    case = method.cases[name]
    reference, steps = whole(method, case)
    change, trainer = method.train(tiny_folder, tmp_path, **case, **method.split(2))
    assert distance(change, reference) <= method.tolerance
    same_metrics(entries(trainer), steps, method.compared, **method.metrics)


@pytest.mark.slow
@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_nor_on_any_other_split(method, micro, whole, tiny_folder, tmp_path):
    case = next(iter(method.cases.values()))
    reference, steps = whole(method, case)
    change, trainer = method.train(tiny_folder, tmp_path, **case, **method.split(micro))
    assert distance(change, reference) <= method.tolerance
    if not method.compared:
        assert losses(trainer) == pytest.approx([step["loss"] for step in steps], rel=1e-4)


@pytest.mark.core(*(name for name in METHODS if name not in ("gift_sw", "allora")))
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_a_variant_that_is_known_to_be_wrong_is_told_apart(method, whole, tiny_folder, tmp_path, monkeypatch):
    wrong = {} if callable(method.wrong) else method.wrong
    case = wrong or next(iter(method.cases.values()))
    reference, _ = whole(method, case)
    if callable(method.wrong):
        case = case | method.wrong(monkeypatch)
    change, _ = method.train(tiny_folder, tmp_path, **case, **method.split(4))
    assert distance(change, reference) > 10 * method.tolerance


@pytest.mark.core("robust_dpo", "a_lol")
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_padding_changes_nothing(method, tiny_folder, tmp_path):
    case = next(iter(method.cases.values()))
    runs = []
    for name, padding in (("a", {}), ("b", dict(pad_to_multiple_of=128))):
        trainer, widths = method.build(tiny_folder, tmp_path / name, **case, **method.padded, **padding), []
        embeddings = trainer.model.get_input_embeddings()
        embeddings.register_forward_pre_hook(lambda _, given, widths=widths: widths.append(given[0].shape[-1]))
        runs.append((*fit(trainer), widths))
    (reference, whole, narrow), (change, padded, wide) = runs
    assert distance(change, reference) <= method.tolerance
    same_metrics(entries(padded), entries(whole), method.compared, **method.metrics)
    assert max(narrow) < 128 <= max(wide)
