"""Clients that train privately: what each has spent over its turns, and what it tells of them."""

import math
import os

import pytest
import torch

from posttrain import DPSFTConfig, DPSFTTrainer
from posttrain.errors import ConfigError
from posttrain.federated.clients import Task, TrainerClients
from posttrain.federated.loop import FederatedLoop
from posttrain.federated.spending import folder_name
from posttrain.privacy.accounting import Steps, epsilon
from posttrain.privacy.ledger import FILE
from posttrain.privacy.step import PrivateStep
from tests.federated.refused import check, good
from tests.federated.test_clients import adapted, builder, rows_of, settings

pytest.importorskip("dp_accounting")
# each row in each step, which is the cheapest to add up
GIVEN = dict(noise_multiplier=2.0, expected_batch_size=4, target_delta=0.01, max_steps=1)


def private(folder, rows=None, ledgers=None, rounds=2, **given):
    given = dict(GIVEN) | given
    if "target_epsilon" in given:
        del given["noise_multiplier"]
    config = settings(rounds=rounds, method="ffa_lora")
    build = builder(folder, DPSFTTrainer, DPSFTConfig, **given)
    made = TrainerClients(adapted(), rows or rows_of(2, 4), build, config, ledgers)
    return made, FederatedLoop(made.start, made.rows, made, config, identity=made.identity())


def spent(steps: int, delta=0.01) -> float:
    return epsilon([Steps(2.0, 1.0, 4, 4, steps)], delta)


def test_a_client_tells_the_epsilon_of_all_its_turns_and_no_loss(tmp_path):
    made, loop = private(tmp_path, ledgers=tmp_path / "ledgers")
    shared = loop.run()
    told = [[report["clients"][name] for name in ("c0", "c1")] for report in loop.reports]
    assert [[one["epsilon"] for one in two] for two in told] == [[spent(1)] * 2, [spent(2)] * 2]
    assert {(one["delta"], one["loss"]) for two in told for one in two} == {(0.01, None)}
    assert [report["loss"] for report in loop.reports] == [None, None]
    assert sorted(os.listdir(tmp_path / "ledgers")) == ["c0", "c1"]
    assert all(value.any() for value in shared.B.values())
    # what a client has lost is told by what it told before
    (tmp_path / "ledgers" / "c1" / FILE).unlink()
    loop.config.rounds = 3
    loop._run(3)
    assert list(loop.reports[-1]["clients"]) == ["c0"]
    assert loop.reports[-1]["left_out"]["c1"].startswith(
        f"it tells of epsilon {spent(1):.6g}, and told of {spent(2):.6g}"
    )


def test_noise_of_two_clients_differs(tmp_path):
    """Of the same rows, seed and factors; without noise both learn the same."""
    rows = rows_of(1, 4)["c0"]
    replies = {}
    for name, given in {"noisy": {}, "silent": dict(target_epsilon=math.inf)}.items():
        made, _ = private(tmp_path, rows=dict(c0=rows, c1=rows), **given)
        replies[name] = [made(Task(client, 1, 5, made.start)).B for client in ("c0", "c1")]
    first, second = replies["silent"]
    assert all(torch.equal(first[path], second[path]) for path in first)
    first, second = replies["noisy"]
    gaps = torch.cat([(first[path] - second[path]).flatten() for path in first])
    # the difference of two independent noises: sigma C / L times the rate, and the root of two
    assert gaps.std().item() == pytest.approx(math.sqrt(2) * 2.0 / 4 * 0.1, rel=0.1)


@pytest.mark.slow
def test_a_kill_between_ledger_and_reply_has_spent(tmp_path, monkeypatch):
    made, _ = private(tmp_path, ledgers=tmp_path / "ledgers")
    finish = PrivateStep.finish

    def killed(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(PrivateStep, "finish", killed)
    with pytest.raises(KeyboardInterrupt):
        made(Task("c0", 1, 0, made.start))
    monkeypatch.setattr(PrivateStep, "finish", finish)
    # the run goes on in another process
    made, _ = private(tmp_path, ledgers=tmp_path / "ledgers")
    replies = [made(Task(client, 1, 0, made.start)) for client in ("c0", "c1")]
    assert [reply.metrics["epsilon"] for reply in replies] == [spent(2), spent(1)]


@pytest.mark.slow
def test_a_target_is_kept_over_all_rounds_and_a_client_without_budget_sits_out(tmp_path):
    made, loop = private(tmp_path, ledgers=tmp_path / "ledgers", target_epsilon=8, rounds=3)
    made(Task("c0", 1, 0, made.start))
    loop.run()
    told = [report["clients"].get("c0", {}).get("epsilon") for report in loop.reports]
    assert told[0] > loop.reports[0]["clients"]["c1"]["epsilon"] and told[2] is None
    assert "c0" not in loop.reports[2]["clients"]
    assert loop.reports[2]["left_out"]["c0"].startswith("its privacy is spent: 1 steps more, after 3, would come to")
    assert loop.reports[2]["clients"]["c1"]["epsilon"] == pytest.approx(8, rel=1e-5)


@pytest.mark.slow
def test_losses_are_told_where_they_are_to_be_published_and_nothing_is_promised_without_noise(tmp_path):
    made, _ = private(tmp_path, publish_private_metrics=True)
    assert made(Task("c0", 1, 0, made.start)).metrics.keys() == {"loss", "steps", "epsilon", "delta"}
    made, _ = private(tmp_path, ledgers=tmp_path / "ledgers", target_epsilon=math.inf)
    assert made(Task("c0", 1, 0, made.start)).metrics.keys() == {"loss", "steps"}
    # whose steps without noise are not forgotten
    made, _ = private(tmp_path, ledgers=tmp_path / "ledgers")
    assert made(Task("c0", 1, 0, made.start)).metrics.keys() == {"steps"}


def test_a_client_whose_rows_are_too_few_is_named(tmp_path):
    made, _ = private(tmp_path, expected_batch_size=5)
    with pytest.raises(
        ConfigError, match="trainer of client c0 cannot be made: expected_batch_size is 5, and the trai"
    ):
        made(Task("c0", 1, 0, made.start))
    made, _ = private(tmp_path, target_delta=0.5)
    with pytest.raises(ConfigError, match="trainer of client c0 cannot be made: target_delta is 0.5, and the training"):
        made(Task("c0", 1, 0, made.start))


@pytest.mark.parametrize("told", [math.nan, math.inf, -1.0, True, "8", [8], 10**400])
def test_an_epsilon_that_is_none_is_a_fault(told):
    checked = check(good("a"), good("b", metrics=dict(loss=1.0, epsilon=told, delta=1e-5)))
    assert list(checked.good) == ["a"] and "epsilon is" in checked.faults["b"]


def test_ledgers_of_clients_are_apart_whatever_they_are_called():
    names = [
        "a",
        "b",
        ".",
        "..",
        "a/b",
        "a\\b",
        "../a",
        "~",
        "%2E",
        "c" * 200,
        "c" * 199 + "d",
        "\u00e9" * 200,
        "con.",
        "a b",
    ]
    made = [folder_name(name) for name in names]
    assert len(set(made)) == len(names)
    assert all(len(name) < 200 and "/" not in name and "\\" not in name and "." not in name for name in made)
