"""The rounds: who trains, what is told of a round, what a killed run goes on with, what a run of others is refused."""

import json
import shutil

import numpy as np
import pytest
import torch

from posttrain.errors import ConfigError, DataError, EnvironmentIssue
from posttrain.federated.loop import FederatedLoop
from posttrain.federated.methods import METHODS
from posttrain.federated.replies import Reply
from tests.federated.refused import LOOPS
from tests.federated.synthetic import HEIGHT, RANK, WIDTH, Clients, loop_of, orthonormal, run, settings


def same(made, other):
    return all(torch.equal(getattr(made, side)["l"], getattr(other, side)["l"]) for side in "AB") and (
        made.base.keys() == other.base.keys()
        and all(torch.equal(a, b) for n in made.base for a, b in zip(made.base[n], other.base[n], strict=True))
    )


def test_clients_of_a_round_follow_from_the_seed_and_the_round_alone():
    clients = Clients(6)
    run(settings(num_clients=6, clients_per_round=3, rounds=20), clients)
    asked = {round: [name for r, name in clients.asked if r == round] for round, _ in clients.asked}
    # what a client draws is its own, and another in each round
    assert len(set(clients.seeds)) == len(clients.asked) == 60
    assert all(len(set(names)) == 3 and names == sorted(names) for names in asked.values())
    assert set(sum(asked.values(), [])) == set(clients.names) and len({tuple(names) for names in asked.values()}) > 5
    again = FederatedLoop(
        clients.start, dict(reversed(clients.rows.items())), clients, settings(num_clients=6, clients_per_round=3)
    )
    assert {round: again.drawn(round) for round in asked} == asked
    other = FederatedLoop(
        clients.start, clients.rows, clients, settings(num_clients=6, clients_per_round=3, federated_seed=1)
    )
    assert {round: other.drawn(round) for round in asked} != asked


def test_the_order_in_which_clients_answer_changes_no_bit():
    class Reversed(FederatedLoop):
        def drawn(self, round):
            return super().drawn(round)[::-1]

    clients = Clients(5)
    config = settings(num_clients=5, weights="rows")
    made, other = (kind(clients.start, clients.rows, clients, config).run() for kind in (FederatedLoop, Reversed))
    assert same(made, other)
    assert [name for round, name in clients.asked if round == 1] == clients.names + clients.names[::-1]


def test_the_report_of_a_round_tells_what_was_sent_and_learned():
    clients = Clients(3)
    loop = FederatedLoop(
        clients.start, clients.rows, clients, settings(weights="rows"), evaluate=lambda shared: {"x": 1.5}
    )
    loop.run()
    assert [report["round"] for report in loop.reports] == [1, 2, 3, 4, 5, 6]
    first, last = loop.reports[0], loop.reports[-1]
    total = sum(clients.rows.values())
    losses = {name: entry["loss"] for name, entry in last["clients"].items()}
    assert last["loss"] == pytest.approx(sum(losses[n] * clients.rows[n] / total for n in losses), rel=1e-12)
    assert last["loss"] < first["loss"]
    # B alone goes up, A and B go down
    assert first["bytes_up"] == 3 * 8 * HEIGHT * RANK and first["bytes_down"] == 3 * 8 * RANK * (HEIGHT + WIDTH)
    assert first["orthonormality"] < 1e-12 and first["refactored"]
    assert last["singular_values"]["l"] == pytest.approx(torch.linalg.svdvals(loop.shared.product("l"))[:RANK].tolist())
    assert all(entry["update_norm"] > 0 for entry in last["clients"].values()) and last["left_out"] == {}
    assert last["evaluation"] == {"x": 1.5}
    ffa, both = (run(settings(method=name))[0].reports[-1] for name in ("ffa_lora", "fedavg_lora"))
    assert ffa["orthonormality"] > 0.1 and not ffa["refactored"]
    assert both["bytes_up"] == 3 * 8 * RANK * (HEIGHT + WIDTH)


def test_a_client_that_dies_or_sends_nonsense_is_left_out_and_told():
    clients = Clients(4)

    def train(task):
        if task.client == "c1" and task.round == 2:
            return Reply("c1", fault="it died")
        made = clients(task)
        return Reply("c3", made.rows, {"l": made.B["l"] * torch.nan}) if task.client == "c3" else made

    config = settings(num_clients=4, rounds=3)
    loop = FederatedLoop(clients.start, clients.rows, train, config)
    loop.run()
    assert [list(report["left_out"]) for report in loop.reports] == [["c3"], ["c1", "c3"], ["c3"]]
    # as if it had never been asked
    without = FederatedLoop(
        clients.start, {n: r for n, r in clients.rows.items() if n != "c3"}, train, settings(rounds=3)
    )
    assert same(without.run(), loop.shared)
    with pytest.raises(DataError, match="round 1: the reply of client c3 cannot be averaged: B of l has 32 of 32"):
        FederatedLoop(clients.start, clients.rows, train, settings(num_clients=4, on_bad_reply="abort")).run()


class Killed(Exception):
    """The process is gone."""


def killed(clients, config, folder, round, client="c1", resume=False):
    """Run until a client's turn in a round, in which the process is killed."""

    def train(task):
        if (task.round, task.client) == (round, client):
            raise Killed
        return clients(task)

    loop = FederatedLoop(clients.start, clients.rows, train, config, folder)
    with pytest.raises(Killed):
        loop.run(resume)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_was_killed_goes_on_to_the_same_bits(method, tmp_path):
    config = settings(method=method, rounds=6, clients_per_round=2, refactor_every_rounds=None)
    straight, _ = run(config, optimizer="adamw")
    given = dict(optimizer="adamw", trains_a=METHODS[method].trains_a)
    first = Clients(3, **given)
    killed(first, config, tmp_path, 4, straight.drawn(4)[1])
    again = Clients(3, **given)
    loop, _ = run(config, again, tmp_path, resume=True)
    assert same(loop.shared, straight.shared) and loop.reports == straight.reports
    assert min(round for round, _ in again.asked) == 4
    told = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert told == straight.reports


def test_rounds_after_the_last_checkpoint_are_run_again(tmp_path):
    config = settings(rounds=7, save_every_rounds=3)
    straight, _ = run(config)
    killed(Clients(3), config, tmp_path, 6)
    assert len((tmp_path / "rounds.jsonl").read_text().splitlines()) == 5
    loop, _ = run(config, Clients(3), tmp_path, resume=True)
    assert same(loop.shared, straight.shared) and loop.reports == straight.reports
    # the newest two, the last round's among them
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-000006", "round-000007", "rounds.jsonl"]


@pytest.mark.parametrize("lost", [[0, 1, 2], [1]])
def test_reports_that_were_lost_are_missed_and_nothing_is_written(lost, tmp_path):
    config = settings(rounds=4)
    killed(Clients(3), config, tmp_path, 4)
    path = tmp_path / "rounds.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for number, line in enumerate(lines) if number not in lost))
    before = path.read_text()
    with pytest.raises(DataError, match=rf"lacks round {lost[0] + 1}, and the newest checkpoint is of round 3"):
        run(config, Clients(3), tmp_path, resume=True)
    assert path.read_text() == before


def test_fewer_rounds_than_were_done_are_refused(tmp_path):
    run(settings(rounds=3), Clients(3), tmp_path)
    with pytest.raises(ConfigError, match="rounds is 2, and .* has gone through 3 already"):
        run(settings(rounds=2), Clients(3), tmp_path, resume=True)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    config = settings(rounds=4, save_every_rounds=3)
    killed(Clients(3), config, tmp_path, 2)
    loop, _ = run(config, Clients(3), tmp_path, resume=True)
    straight, _ = run(config)
    assert same(loop.shared, straight.shared) and loop.reports == straight.reports


def test_more_rounds_go_on_where_fewer_ended(tmp_path):
    run(settings(rounds=2), Clients(3), tmp_path)
    loop, _ = run(settings(rounds=5), Clients(3), tmp_path, resume=True)
    assert same(loop.shared, run(settings(rounds=5))[0].shared)


def test_what_is_no_checkpoint_of_this_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no round to go on from. Leave resume out"):
        run(settings(), Clients(3), tmp_path / "run", resume=True)
    run(settings(rounds=3), Clients(3), tmp_path / "run")
    with pytest.raises(ConfigError, match="has rounds of a run already. Go on from them with resume"):
        run(settings(rounds=3), Clients(3), tmp_path / "run")
    for config, clients, said in (
        (settings(rounds=5, federated_seed=1), Clients(3), "is of another run: federated_seed was 0 and is 1"),
        (settings(rounds=5), Clients(3, start=orthonormal(Clients().start.A["l"])), "is of another run: start was"),
    ):
        with pytest.raises(ConfigError, match=said):
            run(config, clients, tmp_path / "run", resume=True)
    other = Clients(3)
    other.rows["c0"] += 1
    with pytest.raises(ConfigError, match="is of another run: clients c0 was 60 and is 61"):
        run(settings(rounds=5), other, tmp_path / "run", resume=True)


DAMAGES = {
    "is damaged, or no safetensors file": lambda at: (at / "shared.safetensors").write_bytes(b"1"),
    "is not as it was written. Delete round-000003": lambda at: _flip(at / "shared.safetensors"),
    "is no valid JSON": lambda at: (at / "round.json").write_text("{"),
    "is of another form than this version": lambda at: (at / "round.json").write_text('{"format": 2, "round": 3}'),
    "round.json cannot be read": lambda at: (at / "round.json").unlink(),
}


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("said", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_there(said, tmp_path):
    run(settings(rounds=3), Clients(3), tmp_path)
    DAMAGES[said](tmp_path / "round-000003")
    with pytest.raises(DataError, match=said):
        run(settings(rounds=5), Clients(3), tmp_path, resume=True)
    shutil.rmtree(tmp_path / "round-000003")
    loop, _ = run(settings(rounds=5), Clients(3), tmp_path, resume=True)
    assert same(loop.shared, run(settings(rounds=5))[0].shared)


def test_folders_that_cannot_be_are_refused_before_a_client_trains(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "lost").symlink_to("nowhere")
    for name, kind, said in (
        ("file", ConfigError, "which is no folder"),
        ("file/below", EnvironmentIssue, "the folder .* cannot be made"),
        ("lost", ConfigError, "a link that leads nowhere"),
    ):
        clients = Clients(3)
        with pytest.raises(kind, match=said):
            run(settings(), clients, tmp_path / name)
        assert not clients.asked


@pytest.mark.parametrize("title", LOOPS)
def test_what_no_loop_can_be_given_is_refused(title):
    given, said = LOOPS[title]
    with pytest.raises((ConfigError, DataError), match=said):
        loop_of(**given).run()


def test_an_evaluation_that_is_not_finite_is_told_as_none(tmp_path):
    numbers = {"nan": torch.nan, "far": -torch.inf, "numpy": np.float32(0.5), "whole": 3, "yes": True}
    loop = loop_of(evaluate=lambda shared: numbers, folder=tmp_path)
    loop.run()
    wanted = {"nan": None, "far": None, "numpy": 0.5, "whole": 3, "yes": True}
    assert loop.reports[0]["evaluation"] == wanted
    assert json.loads((tmp_path / "rounds.jsonl").read_text())["evaluation"] == wanted


def test_settings_that_do_not_fit_the_clients_are_refused():
    clients = Clients(3)
    with pytest.raises(ConfigError, match="num_clients is 4, and there are 3 clients"):
        FederatedLoop(clients.start, clients.rows, clients, settings(num_clients=4))


def test_clients_that_drop_out_or_take_too_long_are_left_out(monkeypatch):
    config = settings(rounds=4, num_clients=5, dropout=0.5, federated_seed=1)
    (loop, _), (again, _) = run(config), run(config)
    left = [sorted(report["left_out"]) for report in loop.reports]
    assert left == [sorted(report["left_out"]) for report in again.reports] and len(set(map(tuple, left))) > 1
    assert {why for report in loop.reports for why in report["left_out"].values()} == {
        "it dropped out, which dropout simulates"
    }
    # a clock on which the second client's turns take a minute
    clients, now = Clients(3), [0.0]
    monkeypatch.setattr("posttrain.federated.loop.time.monotonic", lambda: now[0])

    def train(task):
        now[0] += 60 if task.client == "c1" else 1
        return clients(task)

    loop = FederatedLoop(clients.start, clients.rows, train, settings(rounds=2, round_timeout=59))
    loop.run()
    assert [report["left_out"] for report in loop.reports] == [
        {"c1": "its turn took longer than round_timeout, 59 s"}
    ] * 2
    assert [list(report["clients"]) for report in loop.reports] == [["c0", "c2"]] * 2
