"""Flower apps in one process, run by test_flower_env.py in the environment that has Flower."""

import json
import logging
import random
import tempfile
import tomllib

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp import ServerApp
from flwr.serverapp import strategy as flower
from flwr.supercore.differential_privacy import KEY_NORM_BIT
from safetensors.torch import load_file

from posttrain import DPSFTConfig, DPSFTTrainer, compat
from posttrain.cli import main as posttrain_main
from posttrain.errors import ConfigError, DataError
from posttrain.federated.adapter import SharedAdapter
from posttrain.federated.clients import Task, TrainerClients
from posttrain.federated.flower import (
    FedSVD,
    InProcessGrid,
    Node,
    SecureFedSVD,
    records,
    run_in_process,
    secure_client_app,
    wire,
)
from posttrain.federated.flower import client_app as flower_client_app
from posttrain.federated.flower.app import client_app, server_app, task
from posttrain.federated.flower.client import guarded
from posttrain.federated.flower.nodes import CLIENT, client_of
from posttrain.federated.flower.settings import federated_config
from posttrain.federated.flower.strategy import fresh_noise
from posttrain.federated.loop import FederatedLoop
from posttrain.federated.methods import Shared
from posttrain.federated.seeds import seed_of
from posttrain.models import byte_tokenizer
from tests.federated.synthetic import Clients, gap, run, settings

KEYS = dict(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)


def average(**given):
    return flower.FedAvg(**KEYS | given)


def app_of(clients, mods=(), spoil=None):
    """The client app of synthetic clients. `spoil(client, message)` changes what one sends."""
    app = ClientApp()

    @app.query()
    def roll(message: Message, context: Context) -> Message:
        name = client_of(context.node_config)
        return Message(RecordDict({"config": ConfigRecord({CLIENT: name})}), reply_to=message)

    def turn(message, context):
        name = client_of(context.node_config)
        order, A = wire.read(records.only(message.content.config_records, "config"))
        B = records.tensors(records.only(message.content.array_records, "arrays"))
        seed = seed_of(order.seed, "turn", name, order.round)
        reply = clients(Task(name, order.round, seed, Shared(A, B, {})))
        made = records.answer(message, reply, list(B), order.tells_rows)
        return spoil(name, order.round, made) if spoil else made

    @app.train(mods=list(mods))
    def train(message: Message, context: Context) -> Message:
        return guarded(message, lambda: turn(message, context))

    return app


def led(strategy, config, clients=None, mods=(), spoil=None, folder=None, resume=False, nodes=None, change=None):
    """(the strategy after its rounds, the change of the weight); `change(grid)` before it begins."""
    clients = clients or Clients(config.num_clients)
    nodes = nodes or [{"client": name} for name in clients.names]
    made, app = [], ServerApp()

    @app.main()
    def main(grid, context: Context) -> None:
        if change:
            change(grid)
        made.append(FedSVD(strategy, clients.start, clients.names, config, folder=folder))
        made[0].run(grid, wait=0, resume=resume)

    run_in_process(app, app_of(clients, mods, spoil), nodes, {})
    return made[0], made[0].shared.product("l")


def same_bits(first, second):
    return all(
        torch.equal(first.shared.A[name], second.shared.A[name]) and torch.equal(first.shared.B[name], value)
        for name, value in second.shared.B.items()
    )


FIVE = dict(num_clients=5, weights="uniform")


@pytest.mark.parametrize("method", ["fedsvd", "ffa_lora", "ffa_refactored_once"])
@pytest.mark.parametrize("weights", ["rows", "uniform"])
@pytest.mark.parametrize("drawn", [None, 2])
def test_the_adapter_has_the_bits_of_the_loop(method, weights, drawn):
    config = settings(method=method, weights=weights, clients_per_round=drawn)
    loop, product = run(config)
    made, other = led(average(), config)
    assert same_bits(made, loop) and torch.equal(product, other) and product.norm() > 0.1
    assert [report["clients"].keys() for report in made.reports] == [one["clients"].keys() for one in loop.reports]
    assert [report["loss"] for report in made.reports] == [one["loss"] for one in loop.reports]


def test_the_median_has_the_bits_of_the_loop_and_the_trimmed_mean_its_numbers():
    for rule, strategy, closeness in (
        ("median", flower.FedMedian(**KEYS), 0.0), ("trimmed_mean", flower.FedTrimmedAvg(beta=0.2, **KEYS), 1e-12),
    ):  # fmt: skip
        product = run(settings(**FIVE, aggregation=rule))[1]
        assert gap(led(strategy, settings(**FIVE))[1], product) <= closeness
        # the mean is another one
        assert gap(led(average(), settings(**FIVE))[1], product) > 1e-3


def test_the_order_of_nodes_and_replies_changes_no_bit():
    def shuffled(grid):
        send, draw = grid.send_and_receive, random.Random(3)
        grid.send_and_receive = lambda messages, timeout: draw.sample(
            found := send(messages, timeout=timeout), len(found)
        )

    for strategy in (average(), flower.FedMedian(**KEYS), flower.Krum(num_malicious_nodes=1, **KEYS)):
        straight = led(strategy, settings(**FIVE))[0]
        nodes = [{"client": f"c{number}"} for number in (3, 1, 4, 0, 2)]
        assert same_bits(led(strategy, settings(**FIVE), nodes=nodes, change=shuffled)[0], straight)


ROBUST = {
    "median": lambda: flower.FedMedian(**KEYS), "trimmed mean": lambda: flower.FedTrimmedAvg(beta=0.2, **KEYS),
    "Krum": lambda: flower.Krum(num_malicious_nodes=1, **KEYS),
    "MultiKrum": lambda: flower.MultiKrum(num_malicious_nodes=1, num_nodes_to_select=3, **KEYS),
}  # fmt: skip


@pytest.mark.parametrize("name", ROBUST)
def test_one_poisoned_client_of_five_moves_a_robust_rule_little(name):
    poisoned = Clients(5, poisoned=["c2"])
    clean = led(average(), settings(**FIVE))[1].norm()
    assert led(average(), settings(**FIVE), poisoned)[1].norm() > 10 * clean
    assert led(ROBUST[name](), settings(**FIVE), poisoned)[1].norm() < 3 * clean


def private(kind, noise, clip=1.0, inside=None, clients=5):
    made = getattr(flower, f"DifferentialPrivacy{kind}Clipping")
    given = dict(noise_multiplier=noise, num_sampled_clients=clients)
    if "Fixed" in kind:
        return made(inside or average(), clipping_norm=clip, **given)
    return made(inside or average(), initial_clipping_norm=clip, clipped_count_stddev=1.0, **given)


MODS = {"ServerSideFixed": [], "ClientSideFixed": [fixedclipping_mod], "ServerSideAdaptive": [],
        "ClientSideAdaptive": [adaptiveclipping_mod]}  # fmt: skip


@pytest.mark.parametrize("kind", MODS)
def test_noise_for_privacy_falls_on_b_before_it_is_refactored(kind):
    config = settings(**FIVE, rounds=3)
    plain = led(average(), config)[1]
    quiet = led(private(kind, 1e-9, clip=100.0), config, mods=MODS[kind])[1]
    assert gap(quiet, plain) < 1e-5
    noisy, product = led(private(kind, 0.5, clip=1.0), config, mods=MODS[kind])
    assert gap(product, plain) > 1e-2
    a = noisy.shared.A["l"]
    assert torch.linalg.norm(a @ a.T - torch.eye(len(a), dtype=a.dtype)) < 1e-12


def test_a_seed_does_not_tell_the_noise():
    made = []
    for _ in range(2):
        np.random.seed(0)
        expected = np.random.RandomState(0).normal(size=3)
        made.append(led(private("ServerSideFixed", 0.5), settings(**FIVE, rounds=1))[1])
        # and what comes after is as it was seeded
        assert np.array_equal(np.random.normal(size=3), expected)
    assert gap(*made) > 1e-3
    with fresh_noise():
        first = np.random.normal(size=4)
    with fresh_noise():
        assert not np.array_equal(first, np.random.normal(size=4))


def test_a_client_that_does_not_clip_is_left_out():
    strategy = private("ClientSideFixed", 1e-9, clip=1e-3)
    with pytest.raises(DataError, match=r"round 1 has 0 good replies.*its update has the norm .*clipping mod"):
        led(strategy, settings(**FIVE, rounds=1))
    with pytest.raises(DataError, match="round 1 has 0 good replies of 5.*its metrics have no norm_bit"):
        led(private("ClientSideAdaptive", 1e-9), settings(**FIVE, rounds=1))


def still(name, round, message):
    """The client c1 learned nothing."""
    if name == "c1":
        message.content["arrays"] = ArrayRecord({"l": Array(np.zeros((8, 4)))})
    return message


def test_noise_is_for_all_that_were_drawn():
    with pytest.raises(DataError, match="round 1 has 4 good replies, and the noise of .* is for an average of 5"):
        led(private("ServerSideFixed", 1.0), settings(**FIVE, rounds=1), spoil=still)


def test_a_strategy_around_it_is_refused():
    config, clients = settings(**FIVE), Clients(5)
    inside = FedSVD(average(), clients.start, clients.names, config)
    outside = private("ServerSideFixed", 1.0, inside=inside)
    grid = InProcessGrid(app_of(clients), [{"client": name} for name in clients.names])
    with pytest.raises(ConfigError, match="FedSVD is inside another strategy, which would change A and B after"):
        outside.start(grid, records.arrays(clients.start.B), num_rounds=1, timeout=1)
    assert clients.asked == []
    with pytest.raises(ConfigError, match="call `run"):
        inside.start(grid, records.arrays(clients.start.B))


@pytest.mark.parametrize("name", ["FedAdam", "FedAdagrad", "FedYogi", "FedAvgM"])
def test_moments_of_a_basis_that_turns_are_refused(name):
    clients, strategy = Clients(3), getattr(flower, name)(**KEYS)
    with pytest.raises(ConfigError, match=f"strategy is {name}, which keeps moments of B"):
        FedSVD(strategy, clients.start, clients.names, settings())
    # and where it does not turn they are not
    assert led(strategy, settings(method="ffa_lora", rounds=2))[1].norm() > 0


def test_every_private_name_of_flower_in_use_is_still_there():
    assert compat.missing_names(compat.OF_FLOWER) == []
    # what strategies.py tells kinds by
    assert all(hasattr(private(kind, 1.0), "num_sampled_clients") for kind in MODS)
    assert "norm_bit" == KEY_NORM_BIT and hasattr(average(), "weighted_by_key")


def test_all_strategies_of_this_release_are_looked_at():
    """A new one of the next release is to be tried before it is let through."""
    assert {name for name in flower.__all__ if not name.startswith("DifferentialPrivacy")} - {
        "Result",
        "Strategy",
    } == KNOWN


KNOWN = {
    "Bulyan", "FedAdagrad", "FedAdam", "FedAvg", "FedAvgM", "FedMedian", "FedProx", "FedTrimmedAvg", "FedXgbBagging",
    "FedXgbCyclic", "FedYogi", "Krum", "MultiKrum", "QFedAvg",
}  # fmt: skip


def test_others_that_average_are_taken():
    strategy = flower.QFedAvg(client_learning_rate=0.1, train_loss_key="loss", **KEYS)
    assert led(strategy, settings(rounds=2))[1].norm() > 0
    strategy = flower.Bulyan(num_malicious_nodes=0, **KEYS)
    assert led(strategy, settings(rounds=2))[1].norm() > 0


# replies


def _arrays(**values):
    return lambda message: message.content.__setitem__("arrays", ArrayRecord({n: Array(v) for n, v in values.items()}))


def _bytes(data, kind="numpy.ndarray"):
    return lambda message: message.content.__setitem__(
        "arrays", ArrayRecord({"l": Array("float64", (8, 4), kind, data)})
    )


def _metrics(**values):
    return lambda message: message.content.__setitem__("metrics", MetricRecord(
        {name.replace("_", "-"): value for name, value in values.items()}))  # fmt: skip


def _second(message):
    message.content["more"] = ArrayRecord({"x": Array(np.zeros(3))})


def _none(message):
    del message.content["arrays"]


GOOD = np.zeros((8, 4))
BAD = {
    "another array": (_arrays(k=GOOD), "B is missing of l and it sent B of k"),
    "an array more": (_arrays(l=GOOD, k=GOOD), "it sent B of k, which it was not asked for"),
    "another shape": (_arrays(l=np.zeros((8, 5))), r"the shape \[8, 5\]; it must be \[8, 4\]"),
    "not finite": (_arrays(l=np.full((8, 4), np.nan)), "32 of 32 numbers that are not finite"),
    "whole numbers": (_arrays(l=np.zeros((8, 4), np.int64)), "B of l is of torch.int64"),
    "no bytes of an array": (_bytes(b"junk"), "its reply cannot be read"),
    "bytes of another library": (_bytes(b"junk", "pickle"), "its reply cannot be read .*arrays of another library"),
    "two records of arrays": (_second, "its reply cannot be read .*2 records of arrays"),
    "no record of arrays": (_none, "its reply cannot be read .*0 records of arrays"),
    "no rows": (_metrics(loss=1.0), "it says that it trained on 0 rows"),
    "rows of a fraction": (_metrics(num_examples=1.5, loss=1.0), "it says that it trained on 1.5 rows"),
    "rows that are a list": (_metrics(num_examples=[3], loss=1.0), r"it says that it trained on \[3\] rows"),
    "a loss that is not finite": (_metrics(num_examples=3, loss=float("nan")), "its loss is nan"),
}


@pytest.mark.parametrize("title", BAD)
def test_a_bad_reply_is_dropped_or_ends_the_run(title):
    change, told = BAD[title]

    def spoil(name, round, message):
        if name == "c1" and round == 2:
            change(message)
        return message

    made, product = led(average(), settings(rounds=3), spoil=spoil)
    assert made.reports[1]["left_out"].keys() == {"c1"} and product.norm() > 0
    assert not made.reports[0]["left_out"] and not made.reports[2]["left_out"]
    with pytest.raises(DataError, match=f"round 2: the reply of client c1 cannot be averaged: .*{told}"):
        led(average(), settings(rounds=3, on_bad_reply="abort"), spoil=spoil)


def test_metrics_of_one_client_do_not_end_a_run():
    def spoil(name, round, message):
        if name == "c1":
            message.content["metrics"]["mine"] = [1.0, 2.0]
            message.content["metrics"]["huge"] = float("inf")
        return message

    plain = led(average(), settings(rounds=2))[0]
    assert same_bits(led(average(), settings(rounds=2), spoil=spoil)[0], plain)


def test_a_client_that_raises_tells_the_server_no_text(caplog):
    class Raising(Clients):
        def __call__(self, task):
            if task.client == "c1":
                raise ValueError("row 7 says: the patient has the flu")
            return super().__call__(task)

    with caplog.at_level(logging.ERROR, "posttrain"):
        made, _ = led(average(), settings(rounds=1), Raising(3))
    told = made.reports[0]["left_out"]["c1"]
    assert told == "its node could not train: ValueError; the node's own log says more"


def test_nodes_that_go_are_done_without_and_come_back():
    def going(grid):
        send = grid.send_and_receive

        def answer(messages, timeout):
            messages = list(messages)
            if messages and messages[0].metadata.message_type == "train":
                asked.append(len(messages))
                # it goes while the first round runs, and is back in the third
                grid.gone = [2] if len(asked) < 3 else []
            return send(messages, timeout=timeout)

        grid.send_and_receive = answer

    asked = []
    made, _ = led(average(), settings(rounds=4), change=going)
    assert [sorted(report["left_out"]) for report in made.reports] == [["c1"], ["c1"], ["c1"], []]
    assert made.reports[0]["left_out"]["c1"] == "it did not answer" and asked == [3, 2, 2, 3]
    with pytest.raises(DataError, match="round 1: 2 of the 3 clients that are drawn are connected, and it needs 3"):
        led(average(), settings(min_replies=3), nodes=[{"client": "c0"}, {"client": "c2"}])


def test_a_node_cannot_speak_for_another_client():
    nodes = [{"client": name} for name in ("c0", "c1", "c2", "c0", "c9")]
    clients = Clients(3)
    assert same_bits(led(average(), settings(), clients, nodes=nodes)[0], led(average(), settings())[0])
    assert {name for _, name in clients.asked} == {"c0", "c1", "c2"} and len(clients.asked) == 3 * 6


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    straight = led(average(), settings(clients_per_round=2))[0]

    class Killed(Clients):
        def __call__(self, task):
            if task.round == 4:
                raise SystemExit(3)
            return super().__call__(task)

    with pytest.raises(SystemExit):
        led(average(), settings(clients_per_round=2), Killed(3), folder=tmp_path / "run")
    made, _ = led(average(), settings(clients_per_round=2), folder=tmp_path / "run", resume=True)
    assert same_bits(made, straight) and [report["round"] for report in made.reports] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ConfigError, match="resume is set and strategy is DifferentialPrivacyServerSideFixedClipping"):
        led(private("ServerSideFixed", 1.0), settings(**FIVE), folder=tmp_path / "run", resume=True)


def test_messages_have_b_alone_as_arrays_and_one_record_of_each_kind():
    seen = []

    def watched(grid):
        send = grid.send_and_receive

        def answer(messages, timeout):
            messages = list(messages)
            seen.extend(message for message in messages if message.metadata.message_type == "train")
            return send(messages, timeout=timeout)

        grid.send_and_receive = answer

    led(average(), settings(rounds=1), change=watched)
    for message in seen:
        (arrays,) = message.content.array_records.values()
        (config,) = message.content.config_records.values()
        assert list(arrays) == ["l"] and arrays["l"].numpy().shape == (8, 4) and wire.FACTORS in config
    assert len(seen) == 3


# the app that `posttrain federated init` writes


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Settings of the app and the node configs of two clients, with rows in files."""
    folder = tmp_path_factory.mktemp("app")
    assert posttrain_main(["federated", "init", str(folder / "app"), "--model", "embedded:tiny"]) == 0
    values = tomllib.loads((folder / "app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    flat = {name: value for name, value in values.items() if name != "federated"}
    flat |= {f"federated.{name}": value for name, value in values["federated"].items()}
    flat |= {"federated.rounds": 2, "local-steps": 3, "batch-size": 2, "max-length": 64, "rank": 4}
    nodes = []
    for number, name in enumerate(values["clients"].split(",")):
        path = folder / f"{name}.jsonl"
        texts = [f"client {number} has row {row}: {'abc' * (row + number)}" for row in range(8 + 4 * number)]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        nodes.append({"client": name, "data": str(path)})
    return flat, nodes


def looped(flat, nodes):
    config = federated_config(flat)
    rows = {config["client"]: task.rows(Node(config["client"], config, flat)) for config in nodes}
    clients = TrainerClients(task.adapted(flat), rows, task.builder(flat), config)
    loop = FederatedLoop(clients.start, clients.rows, clients, config)
    loop.run()
    return loop


def read_adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_the_app_as_it_is_written_has_the_bits_of_the_loop(written, tmp_path):
    flat, nodes = written
    run_in_process(server_app.app, client_app.app, nodes[::-1], flat | {"output": str(tmp_path / "run")})
    loop = looped(flat, nodes)
    saved = read_adapter(tmp_path / "run" / "adapter")
    for path, value in loop.shared.B.items():
        for side, own in (("B", value), ("A", loop.shared.A[path])):
            assert torch.equal(saved[f"base_model.model.{path}.lora_{side}.weight"], own) and own.any()
    lines = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [report["loss"] for report in loop.reports]
    # and it does not begin where an adapter is, to find that out in the end
    with pytest.raises(ConfigError):
        run_in_process(server_app.app, client_app.app, nodes, flat | {"output": str(tmp_path / "run")})


def test_a_node_with_another_model_or_base_is_left_out(written, tmp_path):
    flat, nodes = written
    bad = {"rank": 8, "targets": "q_proj", "federated.method": "fedavg_lora"}
    for number, (name, value) in enumerate(bad.items()):
        spoiled = app_with(flat, {"client-1": {name: value}})
        run_in_process(server_app.app, spoiled, nodes, flat | {"output": str(tmp_path / str(number))})
        lines = (tmp_path / str(number) / "rounds.jsonl").read_text().splitlines()
        assert all(json.loads(line)["left_out"].keys() == {"client-1"} for line in lines)


def app_with(flat, changed):
    def clients(node):
        return client_app.clients(node._replace(settings=dict(node.settings) | changed.get(node.client, {})))

    return flower_client_app(clients)


def test_a_base_with_other_weights_is_left_out(written, tmp_path):
    flat, nodes = written

    def clients(node):
        model = task.adapted(node.settings)
        if node.client == "client-1":
            with torch.no_grad():
                model.get_input_embeddings().weight.mul_(1.5)
        config = federated_config(node.settings)
        return TrainerClients(model, {node.client: task.rows(node)}, task.builder(node.settings), config)

    run_in_process(server_app.app, flower_client_app(clients), nodes, flat | {"output": str(tmp_path / "run")})
    lines = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    assert all(json.loads(line)["left_out"].keys() == {"client-1"} for line in lines)


def private_app(ledgers):
    def build(model, rows, seed):
        given = dict(max_steps=2, noise_multiplier=1.0, expected_batch_size=4, target_delta=1e-3, clip_norm=1.0)
        args = DPSFTConfig(
            tempfile.gettempdir(), seed=seed, save_strategy="no", report_to="none", bf16=False, use_cpu=True, **given,
            per_device_train_batch_size=4, max_length=32, gradient_checkpointing=False, train_lora_a=False,
        )  # fmt: skip
        return DPSFTTrainer(model, args=args, train_dataset=rows, processing_class=byte_tokenizer())

    def clients(node):
        model, config = task.adapted(node.settings), federated_config(node.settings)
        folder = ledgers and ledgers / node.client
        return TrainerClients(model, {node.client: task.rows(node)}, build, config, ledgers=folder)

    return flower_client_app(clients)


def test_a_private_client_tells_its_epsilon_and_no_loss_and_needs_a_ledger_that_stays(written, tmp_path):
    flat, nodes = written
    nodes = [node | {"client": name} for node, name in zip(nodes, ("client-0", "client-1"), strict=True)]
    run_in_process(server_app.app, private_app(tmp_path / "disk"), nodes, flat | {"output": str(tmp_path / "run")})
    reports = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    told = [report["clients"]["client-0"] for report in reports]
    assert all(one["loss"] is None for one in told) and 0 < told[0]["epsilon"] < told[1]["epsilon"]
    assert len(list((tmp_path / "disk").rglob("privacy_ledger.jsonl"))) == 2
    with pytest.raises(DataError, match="round 1 has 0 good replies of 2"):
        run_in_process(server_app.app, private_app(None), nodes, flat | {"output": str(tmp_path / "other")})


# secure aggregation


THREE = [f"client-{number}" for number in range(3)]


@pytest.fixture
def secured(written, tmp_path):
    flat, nodes = written
    return flat | {"clients": ",".join(THREE)}, [
        {"client": name, "data": nodes[n % 2]["data"]} for n, name in enumerate(THREE)
    ]


def lead_securely(flat, nodes, seen=None, **given):
    config = federated_config(flat)
    start = SharedAdapter(task.adapted(flat), config).start
    strategy = SecureFedSVD(start, len(nodes), config, **given)
    app = ServerApp()

    @app.main()
    def main(grid, context: Context) -> None:
        if seen is not None:
            watch(grid, seen)
        strategy.run(grid, context)

    run_in_process(app, secure_client_app(client_app.clients), nodes, flat)
    return strategy


def watch(grid, seen):
    send = grid.send_and_receive

    def answer(messages, timeout=None):
        found = list(send(messages, timeout=timeout))
        seen.extend(found)
        return found

    grid.send_and_receive = answer


@pytest.mark.parametrize("method", ["fedsvd", "ffa_lora"])
@pytest.mark.parametrize("weights", ["rows", "uniform"])
def test_secure_aggregation_has_the_numbers_of_the_loop_and_shows_no_clients(secured, method, weights):
    flat, nodes = secured
    flat = flat | {"federated.method": method, "federated.weights": weights}
    seen = []
    made = lead_securely(flat, nodes, seen, clipping_range=1.0, max_weight=16)
    loop = looped(flat, nodes)
    for path in loop.shared.B:
        product = loop.shared.product(path)
        assert product.norm() > 0 and gap(made.shared.product(path), product) < 1e-2
        assert not torch.equal(made.shared.product(path), product)
    # what clients sent has no array of B, and the masked sums are none of theirs
    arrays = [array for message in seen for record in message.content.array_records.values() for array in record]
    assert len(seen) == 2 * 4 * 3 and not arrays


def test_what_needs_every_reply_is_refused_under_secure_aggregation(secured):
    flat, nodes = secured
    start = Clients(3).start
    for fields, needed in (
        (dict(method="flora"), "every reply"), (dict(method="fedex_lora"), "every reply"),
        (dict(method="fedavg_lora"), "the sums of A and B"), (dict(aggregation="median"), "every reply"),
        (dict(aggregation="trimmed_mean"), "every reply"),
        (dict(aggregation="norm_bound", update_norm_bound=1.0), "every reply"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"needs {needed}, and secure aggregation shows"):
            SecureFedSVD(start, 3, settings(**fields | dict(weights=None)))
    for given, told in (
        (dict(clients=2), "clients=2 must be an integer of at least 3"),
        (dict(clipping_range=0), "clipping_range=0 must"),
        (dict(clipping_range=float("nan")), "clipping_range=nan must"), (dict(max_weight=0), "max_weight=0 must"),
        (dict(threshold=3), "threshold=3 must be an integer between 2 and 2"), (dict(threshold=1), "threshold=1 must"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=told):
            SecureFedSVD(start, **dict(clients=3, config=settings(num_clients=None, partition="given")) | given)
    with pytest.raises(ConfigError, match="clients_per_round is 2 and clients is 3; under secure"):
        SecureFedSVD(start, 3, settings(clients_per_round=2))


def test_what_secure_aggregation_would_cut_off_ends_the_run(secured):
    flat, nodes = secured
    for given in (dict(clipping_range=1e-6), dict(max_weight=2)):
        with pytest.raises(DataError, match="round 1: too few of the 3 clients stayed to the end"):
            lead_securely(flat, nodes, **given)
