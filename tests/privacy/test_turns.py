"""The ledger of a client adds up all of its turns, and no turn goes beyond what is promised."""

import json

import pytest

from posttrain.errors import ConfigError, EnvironmentIssue
from posttrain.privacy import turns
from posttrain.privacy.accounting import Steps, epsilon, solve_noise
from posttrain.privacy.config import PrivacyConfig
from posttrain.privacy.ledger import FILE, Ledger
from posttrain.privacy.plan import plan
from tests.privacy.test_ledger import taken

pytest.importorskip("dp_accounting")
KIND = Steps(noise_multiplier=1.5, rate=0.2, cap=None, units=100, steps=0)


def turn(folder, steps=2, took=None, kind=KIND, data="rows", **given):
    """Take the steps of a turn, or as many of them as were taken when it was killed."""
    with turns.of_client(folder):
        ledger = turns.ledger_of(kind, data=data, **given)
    ledger.begin(None, steps)
    return taken(ledger, steps if took is None else took)


def spent(steps: int) -> float:
    return epsilon([KIND._replace(steps=steps)], 1e-5)


def test_turns_add_up_on_whatever_rows_and_each_client_has_its_own(tmp_path):
    found = [turn(tmp_path / "a", data=data).spent() for data in ("rows", "rows", "rows and one more", None)]
    assert found == [spent(2), spent(4), spent(6), spent(8)]
    assert turn(tmp_path / "b").spent() == spent(2)
    # of steps of another noise as well
    mixed = turn(tmp_path / "b", kind=KIND._replace(noise_multiplier=3.0))
    assert mixed.spent() == epsilon([KIND._replace(steps=2), KIND._replace(noise_multiplier=3.0, steps=2)], 1e-5)
    assert mixed.of_weights() == mixed.spent() and mixed.thrown_away() == 0


def test_a_turn_that_was_killed_has_spent(tmp_path, capsys):
    """Its answer was never given, and whoever saw the process saw its steps."""
    turn(tmp_path, took=1)
    assert turn(tmp_path).spent() == spent(3)
    # killed while a step was written down
    with (tmp_path / FILE).open("a") as file:
        file.write('{"st')
    assert turn(tmp_path).spent() == spent(6)
    assert turn(tmp_path, took=0).spent() == spent(6)
    assert "thrown away" not in capsys.readouterr().err


def test_a_file_does_not_grow_by_the_turns_before(tmp_path):
    sizes = []
    for _ in range(5):
        turn(tmp_path)
        sizes.append(len((tmp_path / FILE).read_text().splitlines()))
    assert sizes == [3, 7, 11, 15, 19]


def test_a_turn_beyond_the_promise_takes_no_step(tmp_path):
    noise = solve_noise(3.0, 1e-5, rate=0.2, cap=None, units=100, steps=6)
    given = dict(kind=KIND._replace(noise_multiplier=noise), target_epsilon=3.0)
    turn(tmp_path, took=1, **given)
    assert [turn(tmp_path, **given).spent() < 3 for _ in range(2)] == [True, True]
    before = (tmp_path / FILE).read_text()
    with pytest.raises(turns.SpentError, match="its privacy is spent: 2 steps more, after 5, would come to epsilon 3"):
        turn(tmp_path, **given)
    assert (tmp_path / FILE).read_text() == before
    # the one that is left is a turn
    assert turn(tmp_path, steps=1, **given).spent() == pytest.approx(3.0, rel=1e-5)
    # without the step of the killed turn all three fit
    assert [turn(tmp_path / "other", **given).spent() <= 3 * (1 + 1e-9) for _ in range(3)] == [True] * 3


def test_noise_of_a_target_is_solved_for_all_turns(tmp_path):
    settings = PrivacyConfig(target_epsilon=3.0, target_delta=1e-3, expected_batch_size=8)
    fields = dict(rows=4, ranks=1, accumulation=None, max_steps=2, epochs=1.0)
    one, five = plan(settings, 16, **fields), plan(settings, 16, turns=5, **fields)
    assert five.steps == one.steps == 2 and five.noise_multiplier > 1.2 * one.noise_multiplier
    given = dict(delta=1e-3)
    assert epsilon([five.kind._replace(steps=10)], **given) == five.epsilon == pytest.approx(3, rel=1e-5)
    assert five.epsilon <= 3 < epsilon([one.kind._replace(steps=10)], **given)
    assert turns.most() == 1
    with turns.of_client(tmp_path, 5):
        assert turns.most() == 5
    assert turns.most() == 1 and type(turns.ledger_of(KIND)) is Ledger


def test_a_ledger_that_cannot_be_is_refused_before_a_step(tmp_path):
    turn(tmp_path / "a")
    (tmp_path / "a" / FILE).write_text('{"session": 3}\n')
    with pytest.raises(ConfigError, match="the ledger is damaged there"):
        turn(tmp_path / "a")
    (tmp_path / "b").write_text("")
    with pytest.raises(EnvironmentIssue, match="b/privacy_ledger.jsonl cannot be"):
        turn(tmp_path / "b")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EnvironmentIssue, match="cannot be written to"):
        turn(tmp_path / "c")
    # a session that another version wrote with less in it
    head = json.dumps({"session": "x", **KIND._asdict(), "steps": -1, "data": None, "from_step": 0, "planned": 2})
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / FILE).write_text(f"{head}\n")
    with pytest.raises(ConfigError, match=":1: the ledger is damaged"):
        turn(tmp_path / "d")
