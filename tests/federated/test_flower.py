"""What of a Flower run needs no Flower: messages, nodes, settings, which strategies can be inside, the app's files."""

import io
import json
import tomllib

import numpy as np
import pytest
import torch
from safetensors.torch import save

from posttrain.cli import main
from posttrain.errors import ConfigError, DataError, EnvironmentIssue
from posttrain.federated.flower import nodes, settings, strategies, wire
from posttrain.federated.methods import Shared
from tests.federated import refused
from tests.federated.synthetic import draw


def npy(values, **given):
    file = io.BytesIO()
    np.save(file, values, **given)
    return file.getvalue()


ORDER = wire.Order(3, 7, "fedsvd", True, {"base": "ab", "base_weights": "cd"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_order_and_a_come_as_they_were_sent(dtype):
    A = {"layers.0.q": draw(4, 6).to(dtype), "layers.0.v": draw(2, 5, seed=1).T.contiguous().T.to(dtype)}
    order, found = wire.read(wire.entries(ORDER, A))
    assert order == ORDER and found.keys() == A.keys()
    assert all(torch.equal(found[name], value) and found[name].dtype is dtype for name, value in A.items())


@pytest.mark.parametrize("values", [
    draw(3, 4).float().numpy(), draw(3, 4).numpy().T, np.zeros((0, 4), np.float32), np.float64(3.0), np.arange(5),
])  # fmt: skip
def test_arrays_come_as_they_were_sent(values):
    found = wire.tensors_of([("x", npy(values))])["x"].numpy()
    assert found.dtype == values.dtype and np.array_equal(found, values)


def _header(text):
    """A .npy file of eight bytes whose header says this."""
    head = text.encode() + b" " * (118 - len(text)) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + bytes(8)


BYTES = {
    "nothing": b"", "no array": b"PK\x03\x04" + bytes(30), "one byte short": npy(np.ones(3))[:-1],
    "one byte long": npy(np.ones(3)) + b"\0", "objects": npy(np.array([{}], object), allow_pickle=True),
    "texts": npy(np.array(["a"])), "times": npy(np.array([1], "M8[s]")), "complex": npy(np.ones(2, complex)),
    "a shape of more than there is": _header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}"),
    "a shape that wraps round": _header("{'descr': '<f8', 'fortran_order': False, 'shape': (4294967296, 4294967297)}"),
    "a shape below zero": _header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -2)}"),
    "code": _header("{'descr': __import__('os').getcwd(), 'fortran_order': False, 'shape': (2,)}"),
}  # fmt: skip


@pytest.mark.parametrize("title", BYTES)
def test_bytes_that_are_no_array_of_numbers_are_refused(title):
    with pytest.raises(ValueError):
        wire.array_of(BYTES[title])


def _told(**changed):
    return {
        **wire.entries(ORDER, {"l": draw(2, 3)}),
        wire.ORDER: json.dumps({"format": 1, **ORDER._asdict(), **changed}),
    }


MESSAGES = {
    "nothing": {}, "another format": _told(format=2), "a setting more": _told(epsilon=1), "a round that is a text":
    _told(round="3"), "a seed that is true": _told(seed=True), "no json": _told() | {wire.ORDER: "{"},
    "a list": _told() | {wire.ORDER: "[]"}, "no factors": _told() | {wire.FACTORS: b"x"},
    "factors that are a text": _told() | {wire.FACTORS: "x"},
    "factors that are cut off": _told() | {wire.FACTORS: save({"l": draw(2, 3)})[:-1]},
}  # fmt: skip


@pytest.mark.parametrize("title", MESSAGES)
def test_a_message_of_another_form_is_refused(title):
    with pytest.raises(DataError, match="the server's message"):
        wire.read(MESSAGES[title])


@pytest.mark.parametrize("title", refused.FLOWER)
def test_what_does_not_go_with_flower_is_refused(title):
    build, told = refused.FLOWER[title]
    with pytest.raises(ConfigError, match=told):
        build()


def test_what_goes_with_flower_is_taken():
    average = refused.strategy("FedAvg")
    found = strategies.check(average, refused.config(), 5)
    assert found == (["FedAvg"], False, False, frozenset(), None)
    private = refused.strategy("DifferentialPrivacyServerSideFixedClipping", strategy=average, num_sampled_clients=5)
    assert strategies.check(private, refused.config(weights="uniform"), 5)[1:3] == (True, True)
    trusting = refused.strategy(
        "DifferentialPrivacyClientSideAdaptiveClipping", strategy=average, num_sampled_clients=5
    )
    found = strategies.check(trusting, refused.config(weights="uniform"), 5)
    assert found.trusts is trusting and found.reads == {"norm_bit"} and not found.clips_on_server
    # a basis that nothing turns
    adam = refused.strategy("FedAdam", "FedOpt", "FedAvg")
    assert strategies.check(adam, refused.config(method="ffa_lora"), 5).names == ["FedAdam"]
    assert strategies.check(adam, refused.config(refactor_every_rounds=0), 5).names == ["FedAdam"]
    assert strategies.check(refused.strategy("QFedAvg", train_loss_key="loss"), refused.config(), 5).reads == {"loss"}


def test_a_node_names_its_client():
    assert nodes.client_of({"client": "Nord"}) == "Nord"
    assert nodes.client_of({"partition-id": 3, "num-partitions": 12}) == "client-03"


def test_a_node_speaks_for_a_client_as_long_as_it_is_there(logged):
    roster = nodes.Roster(["b", "a"])
    assert roster.unknown([11, 12, 13]) == [11, 12, 13]
    for node, name in ((11, "a"), (12, "a"), (13, "c")):
        roster.hear(node, name)
    assert roster.nodes() == {"a": 11} and roster.client(11) == "a" and roster.client(12) is None
    assert "node 12 is not asked to train: it says that it is a, for which another node speaks" in logged.text
    assert "node 13 is not asked to train: it says that it is 'c', which is none of a, b" in logged.text
    # nodes that were heard are not asked again; one that has gone is forgotten
    assert roster.unknown([11, 12, 13]) == [] and roster.unknown([12, 14]) == [14]
    roster.hear(14, "a")
    assert roster.nodes() == {"a": 14}


@pytest.mark.parametrize("name", [None, 3, ["a"], {"a": 1}, "a\nb"])
def test_what_a_hostile_node_says_is_no_client(name):
    roster = nodes.Roster(["a"])
    roster.hear(1, name)
    assert roster.nodes() == {} and roster.unknown([1]) == []


def test_factors_of_another_model_are_named():
    own = Shared({"q": draw(2, 5), "v": draw(2, 5)}, {"q": draw(4, 2), "v": draw(3, 2)}, {})
    wire.check_fits(own, own)
    for side, name, value in (("A", "q", draw(2, 6)), ("B", "v", draw(3, 3))):
        other = own._replace(**{side: {**getattr(own, side), name: value}})
        with pytest.raises(ConfigError, match=f"the server's {side} of {name} has the shape"):
            wire.check_fits(other, own)
    with pytest.raises(ConfigError, match="have A of other modules: v"):
        wire.check_fits(own._replace(A={"q": own.A["q"]}), own)


def test_another_base_is_refused():
    told = {"base": "1", "base_weights": "2"}
    wire.check_base(told, told, False)
    wire.check_base({}, told, False)
    with pytest.raises(ConfigError, match="its weights differ"):
        wire.check_base(told, told | {"base_weights": "3"}, False)
    with pytest.raises(ConfigError, match="its shape differ"):
        wire.check_base(told, told | {"base": "3"}, True)
    # rounded weights have other digests
    wire.check_base(told, told | {"base_weights": "3"}, True)


def test_settings_of_a_run_are_those_of_its_table():
    config = settings.federated_config(
        {"model": "m", "federated.method": "ffa_lora", "federated.rounds": 7, "federated.min-replies": 2}
    )
    assert (config.method, config.rounds, config.min_replies, config.partition) == ("ffa_lora", 7, 2, "given")
    assert settings.listed_in({"clients": "a, b,"}, "clients") == ["a", "b"]


def test_without_flower_its_extra_is_named(monkeypatch):
    import posttrain.federated.flower as flower

    monkeypatch.setattr("posttrain.errors.find_spec", lambda name: None)
    with pytest.raises(EnvironmentIssue, match=r'federated training on Flower needs .* "posttrain\[flower\]"'):
        _ = flower.FedSVD
    assert "FedSVD" in dir(flower)
    with pytest.raises(AttributeError, match="has no attribute 'FedSvd'"):
        _ = flower.FedSvd
    monkeypatch.setattr("posttrain.errors.find_spec", lambda name: name)
    for found in ("1.41.0", "1.43.0", "2.0.0"):
        monkeypatch.setattr(flower, "version", lambda name, found=found: found)
        with pytest.raises(EnvironmentIssue, match=f"flwr is {found}; federated training on Flower was made for 1.42"):
            flower.check_flower()
    monkeypatch.setattr(flower, "version", lambda name: "1.42.7")
    flower.check_flower()


def test_an_app_is_written_into_a_new_folder(tmp_path, capsys):
    folder = tmp_path / "My App"
    assert main(["federated", "init", str(folder), "--clients", "nord,süd", "--model", "embedded:tiny"]) == 0
    said = capsys.readouterr().out
    names = ["federated_app/__init__.py", "federated_app/client_app.py", "federated_app/server_app.py",
             "federated_app/task.py", "pyproject.toml"]  # fmt: skip
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == names
    assert all(f"{folder / name}\n" in said for name in names)
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    assert project["project"]["name"] == "my-app"
    values = project["tool"]["flwr"]["app"]["config"]
    assert values["clients"] == "nord,süd" and values["model"] == "embedded:tiny"
    flat = {f"federated.{name}": value for name, value in values["federated"].items()}
    assert settings.federated_config(flat).rounds == 20
    for path in folder.rglob("*.py"):
        compile(path.read_text(), str(path), "exec")


@pytest.mark.parametrize("title", refused.APPS)
def test_an_app_is_not_written_where_it_cannot_be(title, tmp_path, capsys):
    before, arguments, code, told = refused.APPS[title]
    before(tmp_path)
    found = sorted(tmp_path.rglob("*"))
    assert main(["federated", "init", *(part.replace("FOLDER", str(tmp_path)) for part in arguments)]) == code
    assert told in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == found
