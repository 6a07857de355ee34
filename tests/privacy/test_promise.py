"""What a run promises beside its weights: what card and push tell of it, and what they keep back."""

import importlib.metadata
import json
import math
import re
import types

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from posttrain.errors import DataError
from posttrain.hub import Destination, push, write_model_card
from posttrain.hub.files import files_to_push
from posttrain.privacy import accounting
from posttrain.privacy import promise as promises
from posttrain.privacy.accounting import Steps
from posttrain.privacy.audit import Audit
from posttrain.privacy.config import PrivacyConfig
from posttrain.privacy.ledger import Ledger
from posttrain.privacy.promise import FIGURES, FILE, Promise
from posttrain.run.saving import SavingMixin
from tests import runs
from tests.trainers.sft.test_dp_sft import build, rows

KIND = Steps(1.5, 0.2, 40, 100, 0)


def made(found=None, steps=0, **given) -> Promise:
    privacy = PrivacyConfig(**dict(noise_multiplier=1.5, expected_batch_size=20) | given)
    kind = KIND if privacy.is_private else KIND._replace(noise_multiplier=0.0)
    ledger = Ledger(kind, target_epsilon=privacy.target_epsilon)
    ledger.begin(None, 10)
    for _ in range(steps):
        ledger.take()
    return Promise.of(privacy, ledger, found)


def test_a_promise_is_read_as_it_was_written(tmp_path):
    assert promises.read(tmp_path) is None
    for given in (
        dict(steps=3), dict(target_epsilon=math.inf, noise_multiplier=None, clip_norm=math.inf),
        dict(found=Audit(0.3, 60, 100, 2000, 0.95)),
        dict(privacy_unit_column="user", rows_per_unit=3, publish_private_metrics=True),
    ):  # fmt: skip
        promise = made(**given)
        promises.write(tmp_path, promise)
        assert promises.read(tmp_path) == promise


def test_the_card_names_the_version_that_added_up_when_the_run_was_trained(tmp_path, monkeypatch):
    own = accounting.version()
    assert own == importlib.metadata.version("dp-accounting")
    assert f"privacy loss distributions (dp-accounting {own})" in made(steps=2).passage()
    monkeypatch.setattr(accounting, "version", lambda: "0.1.2")
    promises.write(tmp_path, made(steps=2))
    monkeypatch.undo()
    assert "(dp-accounting 0.1.2)" in promises.read(tmp_path).passage()
    assert made(target_epsilon=math.inf, noise_multiplier=None).accountant_version is None


def test_a_promise_of_a_version_that_did_not_note_the_accountants_is_read(tmp_path):
    content = made(steps=2)._asdict()
    del content["accountant_version"]
    (tmp_path / FILE).write_text(json.dumps(content))
    told = promises.read(tmp_path)
    assert told.accountant_version is None and "privacy loss distributions (dp-accounting) |" in told.passage()
    for bad in (3, ["0.6"], {}):
        (tmp_path / FILE).write_text(json.dumps(content | {"accountant_version": bad}))
        with pytest.raises(DataError, match="is damaged"):
            promises.read(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"is_private": true}', "x"])
def test_a_damaged_promise_lets_nothing_leave(content, tmp_path):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(DataError):
        promises.read(tmp_path)
    content = made()._asdict() | {"publish_metrics": "yes"}
    (tmp_path / FILE).write_text(json.dumps(content))
    with pytest.raises(DataError, match="nothing says whether figures of private rows may be published"):
        promises.read(tmp_path)


def test_a_card_tells_to_whom_what_is_promised():
    text = made(steps=5, found=Audit(0.3, 60, 100, 2000, 0.95)).passage()
    assert "differentially private** for each unit of privacy, which is a row." in text
    for part in ("add_remove", "0.2 (20 on average, 40 at most)", "1e-05", "at least 0.3 (95% sure, 2,000 canaries)"):
        assert part in text
    assert "are not published" in text
    person = made(privacy_unit_column="user", rows_per_unit=3, publish_private_metrics=True).passage()
    assert "all rows with the same user, of which a step takes 3 at most" in person
    assert "published all the same" in person
    nothing = made(target_epsilon=math.inf, noise_multiplier=None).passage()
    assert "**nothing is promised**" in nothing and "epsilon" not in nothing


def test_a_card_tells_steps_that_were_thrown_away(tmp_path):
    privacy = PrivacyConfig(noise_multiplier=1.5, expected_batch_size=20)
    for steps in (3, 2):
        ledger = Ledger(KIND, data="rows")
        ledger.begin(tmp_path, 10)
        for _ in range(steps):
            ledger.take()
    promise = Promise.of(privacy, ledger)
    assert promise.thrown_away == 3 and promise.epsilon > promise.epsilon_of_weights
    assert f"({promise.epsilon:.4g}, 1e-05)" in promise.passage()
    assert f"3; without them epsilon {promise.epsilon_of_weights:.4g}" in promise.passage()


def test_an_audit_above_the_promise_is_told_on_the_card_and_as_the_run_goes_on(tmp_path, capsys):
    for bound, refuted in ((9.0, True), (0.3, False)):
        promise = made(steps=5, found=Audit(bound, 60, 60, 2000, 0.95))
        assert 0.3 < promise.epsilon_of_weights < 9 and promise.is_refuted == refuted
        assert ("**Its audit found otherwise**: epsilon is at least 9, where" in promise.passage()) == refuted
        args = types.SimpleNamespace(output_dir=str(tmp_path), report_to=[])
        SavingMixin._tell_promise(types.SimpleNamespace(promise=lambda promise=promise: promise, args=args))
        assert ("canaries tell that epsilon is at least 9 (95% sure)" in capsys.readouterr().err) == refuted
        assert promises.read(tmp_path) == promise


def folder_of(path, promise):
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")
    save_file({"a": torch.zeros(1)}, path / "adapter_model.safetensors")
    for name in FIGURES:
        (path / name).write_text("")
    if promise is not None:
        promises.write(path, promise)
    return path


@pytest.mark.parametrize(
    ("promise", "leaves"),
    [
        (None, True), (made(), False), (made(publish_private_metrics=True), True),
        (made(target_epsilon=math.inf, noise_multiplier=None), True),
    ],
    ids=["not private", "private", "published", "without noise"],
)  # fmt: skip
def test_figures_of_private_rows_are_not_pushed(promise, leaves, tmp_path):
    folder = folder_of(tmp_path / "run", promise)
    pushed = set(files_to_push(folder, folder, Destination("me/run", "org/base", {})))
    assert set(FIGURES) & pushed == (set(FIGURES) if leaves else set())
    assert {"adapter_model.safetensors", "README.md"} <= pushed and (FILE in pushed) == (promise is not None)


@pytest.mark.parametrize(
    ("promise", "said"), [(None, True), (made(), False), (made(target_epsilon=math.inf, noise_multiplier=None), True)]
)
def test_a_push_says_that_weights_may_give_rows_back_where_they_were_not_private(promise, said, tmp_path, capsys):
    push.say_what_weights_tell(folder_of(tmp_path / "run", promise))
    assert ("rows that it was trained on may be read back from the weights" in capsys.readouterr().err) == said


def evaluated(folder, output_dir, **given):
    """A private run of two steps with an evaluation, and its card."""
    settings = dict(noise_multiplier=1.0, target_epsilon=None, target_delta=0.01, expected_batch_size=4)
    trainer = build(folder, output_dir, **settings | given)
    trainer.eval_dataset = trainer.train_dataset
    runs.fit(trainer)
    trainer.evaluate()
    trainer.save_model()
    (output_dir / "curves.png").touch()
    return trainer, ModelCard.load(write_model_card(trainer))


def test_a_private_runs_card_has_its_promise_and_no_figures_of_its_rows(tiny_folder, tmp_path):
    trainer, card = evaluated(tiny_folder, tmp_path / "a", audit_canaries=100)
    assert "## Privacy" in card.text
    assert re.search(rf"^\| epsilon +\| +{trainer.promise().epsilon:.4g} \|$", card.text, re.MULTILINE)
    assert "at least" in card.text and "100 canaries" in card.text
    assert "## Evaluation" not in card.text and "## Curves" not in card.text and "eval_loss" not in card.content
    assert "units an optimiser step" in card.text and "4 on average, 8 at most" in card.text
    written = promises.read(tmp_path / "a")
    assert written == trainer.promise() and written.steps == 2 and written.units == len(rows())
    assert 0 <= written.audit["lower_bound"] < written.epsilon


def test_figures_are_in_the_card_where_they_may_be_published(tiny_folder, tmp_path):
    _, card = evaluated(tiny_folder, tmp_path / "a", publish_private_metrics=True)
    assert "## Evaluation" in card.text and "## Curves" in card.text and "published all the same" in card.text
