"""Replies that cannot be averaged are told by client and tensor, and dropped or the end of the run, by choice."""

import math

import numpy as np
import pytest

from posttrain.errors import DataError
from posttrain.federated import replies
from posttrain.federated.config import FederatedConfig
from tests.federated.refused import BAD_REPLIES, GOOD, SENT, check, good

ASKED = ["a", "b", "c"]


@pytest.mark.parametrize("title", BAD_REPLIES)
def test_a_bad_reply_is_named_and_dropped_or_ends_the_run(title, logged):
    reply, said = BAD_REPLIES[title]
    given = good("c"), reply, good("a")
    checked = check(*given)
    assert list(checked.good) == ["a", "c"] and list(checked.faults) == ["b"]
    (warning,) = logged.records
    assert warning.getMessage().startswith("round 4 goes on without client b: ")
    with pytest.raises(DataError, match=f"round 4: the reply of client b cannot be averaged: {said}"):
        check(*given, on_bad_reply="abort")


def test_good_replies_are_in_the_order_of_ids_and_types_that_fit_are_taken():
    reply = good("b", B={"q": GOOD["q"].bfloat16(), "v": GOOD["v"].half()}, rows=np.int64(3), metrics={})
    checked = check(good("c"), reply, good("a"))
    assert list(checked.good) == ASKED and checked.faults == {}
    check(good("c"), reply, good("a"), on_bad_reply="abort")


def test_a_is_asked_for_where_the_method_trains_it():
    replied = [good(name, A=SENT.A) for name in ASKED]
    assert len(check(*replied, method="fedavg_lora").good) == 3
    with pytest.raises(DataError, match="A is missing of q, v"):
        check(good("a"), *replied[1:], method="fedavg_lora", on_bad_reply="abort")


def test_strangers_and_second_answers_are_no_replies():
    checked = check(good("a"), good("z\n"), good(3), good("b"), good("b"), good("b"))
    assert list(checked.good) == ["a"]
    assert checked.faults == {
        "3": "it was not asked to train in this round", "b": "it answered more than once", "c": "it did not answer",
        "z\\n": "it was not asked to train in this round",
    }  # fmt: skip


def test_a_round_needs_so_many_good_replies():
    bad, _ = BAD_REPLIES["v is missing"]
    assert len(check(good("a"), bad, min_replies=1).good) == 1
    said = "round 4 has 1 good replies of 3, and min_replies is 2. Left out were b: B is missing of v; c: it did not"
    with pytest.raises(DataError, match=said):
        check(good("a"), bad, min_replies=2)
    with pytest.raises(DataError, match="round 4 has 2 good replies of 3, and min_replies is 3"):
        check(good("a"), good("c"), aggregation="median")


def test_the_norm_of_an_update_is_over_all_tensors_that_are_sent():
    assert replies.norm_of(good("a"), SENT) == pytest.approx(math.sqrt(14))
    both = good("a", A={"q": SENT.A["q"] + 1, "v": SENT.A["v"]})
    assert replies.norm_of(both, SENT) == pytest.approx(math.sqrt(14 + 10))


def test_names_of_strangers_do_not_steer_a_console(logged):
    check(good("a"), good("b", B=GOOD | {"\x1b[2Jx": GOOD["q"]}), good("c"))
    (warning,) = logged.records
    assert "\x1b" not in warning.getMessage() and "\\x1b[2Jx" in warning.getMessage()


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (6.5, None),
        # of a ledger that was lost after the first of two turns that spend alike
        (6.0, "it tells of epsilon 6, and told of 6 in an earlier round: its ledger is not the one that it was"),
        (3.0, "it tells of epsilon 3"),
        (None, "it tells of no epsilon"),
    ],
)
def test_every_turn_of_a_private_client_has_spent(told, said):
    metrics = {} if told is None else dict(epsilon=told)
    given = [good("a"), good("b", metrics=metrics), good("c")]
    checked = replies.check(given, ASKED, SENT, FederatedConfig(num_clients=3), 4, epsilons=dict(b=6.0))
    assert list(checked.good) == (ASKED if said is None else ["a", "c"])
    assert checked.faults.get("b", "").startswith(said or "")
