"""What federated training refuses, for its tests and for the approved texts: settings, splits, clients' replies."""

import math
from functools import partial

import numpy as np
import torch
from datasets import Dataset, DatasetDict

from posttrain.federated import replies
from posttrain.federated.config import FederatedConfig
from posttrain.federated.flower import nodes, settings, strategies, wire
from posttrain.federated.methods import Shared
from posttrain.federated.replies import Reply

DIRICHLET = dict(partition="dirichlet", partition_column="label")
REFUSED = [
    *(dict(method=value) for value in ("fedsvdd", "dora", None, 3, [])),
    *(dict(rounds=value) for value in (0, -1, 1.5, True, None, "x", math.nan, 10**400)),
    *(dict(num_clients=value) for value in (0, -1, 1.5, True, "6", 10**400)),
    *(dict(clients_per_round=value) for value in (0, 7, 1.5, True)),
    *(dict(refactor_every_rounds=value) for value in (-1, 0.5, True, "1")),
    *(dict(method="ffa_refactored_once", rounds=5, refactor_every_rounds=value) for value in (0, 6)),
    *(dict(initial_a=value) for value in ("kaiming", None)),
    *(dict(weights=value) for value in ("samples", 1)),
    *(dict(aggregation=value) for value in ("krum", None)),
    *(dict(aggregation="norm_bound", update_norm_bound=value) for value in (0, -1, math.inf, math.nan, True, "1")),
    *(dict(aggregation="trimmed_mean", trim_fraction=value) for value in (0, 0.5, -0.1, math.nan, True)),
    *(dict(partition=value) for value in ("random", None)),
    *(DIRICHLET | dict(partition_column=value) for value in ("", " ", 3, ["label"])),
    *(DIRICHLET | dict(dirichlet_alpha=value) for value in (0, -1, 0.0001, math.inf, math.nan, True, "x")),
    *(dict(min_client_rows=value) for value in (0, 1.5, None)),
    *(dict(federated_seed=value) for value in (-1, 1.5, None, True)),
    *(dict(on_bad_reply=value) for value in ("ignore", None)),
    *(dict(min_replies=value) for value in (0, 7, 1.5)),
    *(dict(save_every_rounds=value) for value in (-1, 0.5, None)),
    *(dict(dropout=value) for value in (-0.1, 1, math.nan, None, True, "x")),
    *(dict(round_timeout=value) for value in (0, -1, math.inf, math.nan, True, "60")),
    *(
        {name: np.array(["mean", "rows"])}
        for name in ("method", "initial_a", "weights", "aggregation", "partition", "on_bad_reply", "rounds")
    ),
]

# settings that exclude each other, and what is said
EXCLUDED = [
    (dict(method="ffa_lora", refactor_every_rounds=2), "refactor_every_rounds is 2 and method is ffa_lora, which"),
    (dict(method="fedavg_lora", initial_a="orthonormal"), "initial_a is 'orthonormal' and method is fedavg_lora"),
    (dict(method="flora", aggregation="median"), "aggregation is 'median' and method is flora, whose products"),
    (dict(method="fedex_lora", aggregation="norm_bound", update_norm_bound=1.0), "method is fedex_lora"),
    (dict(aggregation="median", weights="rows"), "weights is 'rows' and aggregation is median, which counts every"),
    (dict(update_norm_bound=1.0), "update_norm_bound is 1.0 and aggregation is mean, which does not read it"),
    (dict(trim_fraction=0.1), "trim_fraction is 0.1 and aggregation is mean, which does not read it"),
    (dict(partition_column="label"), "partition_column is 'label' and partition is iid, which splits at random"),
    (dict(dirichlet_alpha=0.1), "dirichlet_alpha is 0.1 and partition is iid, which does not read it"),
]

# what a rule or a split needs beside itself
NEEDED = [
    (dict(aggregation="norm_bound"), "aggregation is norm_bound and update_norm_bound is null"),
    (dict(partition="dirichlet"), "partition is dirichlet and partition_column is null"),
    (dict(num_clients=None), "num_clients is null; `partition: iid` needs"),
    (dict(aggregation="median", min_replies=2), "min_replies is 2 and aggregation is median, which protects nobody"),
    (dict(aggregation="median", clients_per_round=2), "min_replies is 3, and 2 clients train in a round. aggregat"),
    (dict(clients_per_round=2, min_replies=3), "min_replies is 3, and 2 clients train in a round. Give 2 or fewer"),
]


# what a loop is given, each with what is said; of a run of one round of the synthetic clients

_EYE = torch.eye(4)
LOOPS = {
    "no config": (dict(config={"rounds": 1}), "config is {'rounds': 1}; it must be a FederatedConfig"),
    "a start that is a dict": (dict(start={"A": _EYE}), "start is a dict; it must be a Shared, such as"),
    "a start without modules": (dict(start=Shared({}, {}, {})), r"start has A of \[\], B of \[\] and a"),
    "a start of two modules": (dict(start=Shared({"l": _EYE}, {"m": _EYE}, {})), r"A of \['l'\], B of \['m'\] and a"),
    "ranks of a start": (dict(start=Shared({"l": _EYE[:3]}, {"l": _EYE}, {})), r"start, l: A is \[3, 4\]"),
    "a start of whole numbers": (
        dict(start=Shared({"l": _EYE.long()}, {"l": _EYE}, {})), "start, l: A is torch.int64 of",
    ),
    "a start is nan": (dict(start=Shared({"l": _EYE}, {"l": _EYE * math.nan}, {})), "start, l: B holds numbers that"),
    **{f"rows are {rows!r}": (dict(rows=rows), "rows is .*; it must be numbers of rows by the client's id, a text")
       for rows in (None, 3, [7, 7, 7], {3: 7}, {"": 7})},
    **{f"rows of a client are {rows!r:.9}": (dict(rows=dict(c0=rows, c1=7, c2=7)), "rows of client c0 is .* a whole")
       for rows in (0, -1, 1.5, True, None, math.nan, 10**400)},
    "a client that is no function": (dict(train=3), "train is 3; it must be a function"),
    "an evaluation that is no function": (dict(evaluate="loss"), "evaluate is 'loss'; it must be a function"),
    "a client without a reply": (dict(train=lambda task: None), "train returned None for client c0; it must return"),
    "an evaluation without names": (dict(evaluate=lambda shared: 0.5), "evaluate returned 0.5; it must return numbers"),
    "an evaluation of texts": (dict(evaluate=lambda shared: {"x": "0.5"}), "evaluate returned '0.5' for 'x'; it must"),
    "a folder that is a number": (dict(folder=3), "folder is 3; it must be a path, or None"),
    "a folder without a name": (dict(folder=""), "folder is ''; it must be a path, or None"),
    **{f"an identity {given!r:.20}": (dict(identity=given), "identity is .*; it must be plain JSON by name")
       for given in (3, [1], {"x": {1, 2}}, {"x": math.nan}, {1: 2})},
}  # fmt: skip


# splits


def rows(**columns) -> Dataset:
    """Give 100 numbered rows of three labels, or of other columns."""
    columns = columns or dict(label=["a"] * 50 + ["b"] * 30 + ["c"] * 20)
    return Dataset.from_dict(dict(number=list(range(len(next(iter(columns.values()))))), **columns))


OF_NAMES = dict(partition="given", num_clients=None)
# rows, settings, and what is said
SPLITS = {
    "more clients than rows": (rows(), dict(num_clients=101), "num_clients is 101, and there are 100 rows"),
    "more clients than rows, dirichlet": (
        rows(), DIRICHLET | dict(num_clients=101), "num_clients is 101, and there are 100 rows",
    ),
    "clients without rows": (
        rows(), DIRICHLET | dict(num_clients=20, dirichlet_alpha=0.01),
        r"of 20 clients \d+ have too few rows: client-\d\d has 0.* and \d+ others, and min_client_rows is 1. A larger",
    ),
    "clients with few rows": (
        rows(), dict(num_clients=4, min_client_rows=26), "client-0 has 25, .*min_client_rows is 26. Give fewer",
    ),
    "an empty data set": (
        {"east": rows(), "west": rows().select([])}, OF_NAMES, "of 2 clients 1 have too few rows: west has 0, and",
    ),
    "a value is null": (rows(label=["a", None, "b"]), DIRICHLET, "row 2: label is None; partition_column takes"),
    "values are fractions": (rows(label=[0.5, 1.0, 2.0]), DIRICHLET, "row 1: label is 0.5"),
    "values are lists": (rows(label=[["a"], ["b"], ["c"]]), DIRICHLET, r"row 1: label is \['a'\]"),
    "no such column": (
        rows(), DIRICHLET | dict(partition_column="lable"),
        "no column lable, which partition_column names. Found: number, label. Did you mean label",
    ),
    "several splits": (
        DatasetDict(a=rows(), b=rows()), {}, r"several data sets by name \(a, b\), and partition is iid. Give one of",
    ),
    "one data set of given ones": (rows(), OF_NAMES, "train_dataset is a Dataset, and `partition: given` takes data"),
    "a stream": (rows().to_iterable_dataset(), {}, "train_dataset is IterableDataset; give a datasets.Dataset"),
    "a client's list": ({"a": [1]}, OF_NAMES, "the data set of client a is list"),
    "no client": ({}, OF_NAMES, "there is no client"),
    "another number of clients": (
        {"a": rows(), "b": rows()}, OF_NAMES | dict(num_clients=3),
        "num_clients is 3, and there are 2 clients.* The clients are a, b.",
    ),
    "fewer clients than a round has": (
        {"a": rows(), "b": rows()}, OF_NAMES | dict(clients_per_round=3), "clients_per_round is 3, and there are 2",
    ),
    **{
        f"a client named {name[:10]!r}": ({name: rows()}, OF_NAMES, "a client's name is .*; it must be a text of one")
        for name in ("", " ", "a\nb", "\x1b[2J", "x" * 300)
    },
}  # fmt: skip


# replies of the client b, one of three

SENT = Shared({"q": torch.ones(2, 5), "v": torch.ones(2, 5)}, {"q": torch.zeros(4, 2), "v": torch.zeros(3, 2)}, {})
GOOD = {"q": torch.ones(4, 2), "v": torch.ones(3, 2)}


def good(client: str, **given) -> Reply:
    return Reply(**dict(client=client, rows=10, B=GOOD, metrics={"loss": 1.0}) | given)


def check(*given, **fields) -> replies.Checked:
    """Check replies of the fourth round."""
    config = FederatedConfig(**dict(num_clients=3) | fields)
    return replies.check(given, ["a", "b", "c"], SENT, config, 4)


def _b(**changed) -> Reply:
    return good("b", B=GOOD | changed)


# each with what is said
BAD_REPLIES = {
    "v is missing": (good("b", B={"q": GOOD["q"]}), "B is missing of v"),
    "all are missing": (good("b", B={}), "B is missing of q, v"),
    "k is not asked for": (_b(k=GOOD["q"]), "it sent B of k, which it was not asked for"),
    "k in the place of v": (
        good("b", B={"q": GOOD["q"], "k": GOOD["v"]}), "B is missing of v and it sent B of k, which",
    ),
    "A is not asked for": (good("b", A=SENT.A), "it sent A of q, v, which it was not asked for"),
    "transposed": (_b(q=GOOD["q"].T), r"B of q has the shape \[2, 4\]; it must be \[4, 2\]"),
    "whole numbers": (_b(q=GOOD["q"].long()), "B of q is of torch.int64; it must be of torch.float32"),
    "fp64 in the place of fp32": (_b(q=GOOD["q"].double()), "B of q is of torch.float64; it must be of torch.float32"),
    "a number is nan": (
        _b(v=torch.tensor([[1.0, math.nan], [1, 1], [1, 1]])), "B of v has 1 of 6 numbers that are not finite; its",
    ),
    "all are infinite": (_b(v=GOOD["v"] * math.inf), "B of v has 6 of 6 numbers that are not finite"),
    "a list of numbers": (_b(q=[[1.0]]), "B of q is list; it must be a dense tensor"),
    "a tensor without numbers": (_b(q=torch.empty(4, 2, device="meta")), "B of q is Tensor; it must be a dense tensor"),
    "a sparse tensor": (_b(q=GOOD["q"].to_sparse()), "B of q is Tensor; it must be a dense tensor"),
    "a list of tensors": (good("b", B=[GOOD["q"]]), "its B is a list; it must be tensors by the path"),
    **{
        f"{rows!r} rows": (good("b", rows=rows), f"it says that it trained on {rows!r} rows, and that is no number")
        for rows in (0, -3, 1.5, math.nan, math.inf, True, None, "7")
    },
    "a loss is nan": (good("b", metrics={"loss": math.nan}), "its loss is nan, which is no finite number"),
    "a loss is a text": (good("b", metrics={"loss": "low"}), "its loss is 'low', which is no finite number"),
    "an epsilon is nan": (good("b", metrics={"epsilon": math.nan}), "its epsilon is nan, which is no finite number"),
    "an epsilon is below 0": (good("b", metrics={"epsilon": -1.0}), "its epsilon is -1, which is below 0"),
    "a delta is a text": (good("b", metrics={"delta": "1e-5"}), "its delta is '1e-5', which is no finite number"),
    "metrics are a list": (good("b", metrics=[1.0]), "its metrics are a list; they must be numbers by name"),
    "it diverged": (Reply("b", fault="its training diverged: at step 3"), "its training diverged: at step 3"),
}  # fmt: skip


# on Flower, by classes that have the names of Flower's


def config(**given) -> FederatedConfig:
    return FederatedConfig(**dict(num_clients=5, method="fedsvd") | given)


def strategy(*names, **fields):
    """Make an object of a class with these names of Flower's, the first its own; FedAvg's settings."""
    fields = dict(fraction_train=1.0, min_train_nodes=2, min_available_nodes=2, weighted_by_key="num-examples") | fields
    if "strategy" in fields:
        fields = {name: fields[name] for name in fields if name in ("strategy", "num_sampled_clients", "clipping_norm")}
    made = type("Strategy", (), {"__module__": "flwr.serverapp.strategy.strategy"})
    for name in reversed(names):
        made = type(name, (made,), {"__module__": f"flwr.serverapp.strategy.{name.lower()}"})
    found = made()
    vars(found).update(fields)
    return found


def _check(*names, drawn=5, inside=None, settings=None, **fields):
    one = strategy(*names, **fields) if inside is None else strategy(*names, strategy=inside, **fields)
    return lambda: strategies.check(one, config(**settings or {}), drawn)


_DP = "DifferentialPrivacyClientSideFixedClipping"
_FEDSVD = type("FedSVD", (type(strategy("FedAvg")),), {"__module__": "posttrain.federated.flower.strategy"})()
FLOWER = {
    "a strategy that is none": (lambda: strategies.check(3, config(), 5), "strategy is int of builtins; it must be a"),
    "a strategy of the legacy kind": (
        lambda: strategies.check(type("FedAvg", (), {"__module__": "flwr.server.strategy"})(), config(), 5),
        "strategy is FedAvg of flwr.server.strategy; it must be a strategy of flwr.serverapp",
    ),
    "nothing in a wrapper": (_check(_DP, inside=3), "strategy is int of builtins; it must be a"),
    "FedSVD in FedSVD": (lambda: strategies.check(_FEDSVD, config(), 5), "FedSVD is inside FedSVD"),
    **{f"{name} under fedsvd": (_check(name, *others), f"strategy is {name}, which keeps moments of B")
       for name, *others in (["FedAdam", "FedOpt"], ["FedYogi", "FedOpt"], ["FedAvgM"], ["FedMom"])},
    "FedAvgM in a wrapper": (
        _check(_DP, inside=strategy("FedAvgM", "FedAvg"), num_sampled_clients=5, settings=dict(weights="uniform")),
        "strategy is FedAvgM, which keeps moments",
    ),
    "FedAdam under ffa_refactored_once": (
        _check("FedAdam", "FedOpt", settings=dict(method="ffa_refactored_once")), "is FedAdam, which keeps moments",
    ),
    "FedProx": (_check("FedProx", "FedAvg"), "strategy is FedProx, whose clients add a proximal term"),
    "trees": (_check("FedXgbBagging"), "strategy is FedXgbBagging, which grows trees"),
    "a method that trains A": (_check("FedAvg", settings=dict(method="flora")), "method is flora, whose clients send"),
    "a rule of the loop's": (_check("FedAvg", settings=dict(aggregation="median")), "aggregation is 'median', and on"),
    "rows as weights under noise": (
        _check(_DP, inside=strategy("FedAvg"), num_sampled_clients=5), f"weights is 'rows' and strategy is {_DP},",
    ),
    **{f"noise around {name}": (
        _check(_DP, inside=strategy(name, "FedAvg"), num_sampled_clients=5, settings=dict(weights="uniform")),
        f"strategy is {_DP} around {name}, and its noise is for a mean",
    ) for name in ("FedMedian", "Krum")},
    "noise for another number of clients": (
        _check(_DP, inside=strategy("FedAvg"), num_sampled_clients=3, settings=dict(weights="uniform")),
        f"num_sampled_clients of {_DP} is 3, and 5 clients train",
    ),
    "a fraction of the nodes": (_check("FedAvg", fraction_train=0.5), "fraction_train of FedAvg is 0.5; which clients"),
    "more nodes than are drawn": (_check("FedAvg", min_train_nodes=6), "min_train_nodes of FedAvg is 6, and 5 clients"),
    "more nodes than there are": (_check("FedAvg", min_available_nodes=6), "min_available_nodes of FedAvg is 6, and 5"),
    "another weight": (_check("FedAvg", weighted_by_key="n"), "weighted_by_key of FedAvg is 'n'; clients tell their"),
    **{f"clients are {given!r:.20}": (partial(nodes.Roster, given), "clients is .*; it must be the names of all")
       for given in ([], ["a", "a"], ["a", 3], [""], ["a\nb"], ["x" * 300])},
    **{f"a node's config is {given!r:.40}": (partial(nodes.client_of, given), "the node's config has client")
       for given in ({}, {"client": 3}, {"client": " "}, {"client": "a\nb"}, {"partition-id": 0},
                     {"partition-id": 2, "num-partitions": 2}, {"partition-id": True, "num-partitions": 2})},
    "a setting that is none": (
        lambda: settings.federated_config({"federated.round": 3}), "no setting federated.round. Did you mean federated",
    ),
    "a setting of splits": (
        lambda: settings.federated_config({"federated.partition": "iid"}), "federated.partition is set, and is of runs",
    ),
    "a setting out of range": (lambda: settings.federated_config({"federated.rounds": 0}), "rounds is 0; it must be"),
    **{f"a list is {given!r}": (partial(settings.listed_in, {"clients": given}, "clients"), "clients is .*; it must be")
       for given in (None, "", " , ", 3)},
    "another method on a node": (lambda: wire.check_method("flora", False), "the server's method is 'flora', and this"),
}  # fmt: skip


def _file(folder):
    (folder / "app").write_text("x")


def _full(folder):
    (folder / "app").mkdir()
    (folder / "app" / "notes.txt").write_text("x")


def _link(folder):
    (folder / "app").symlink_to(folder / "nowhere")


# what is there, the arguments, the exit code, and what is said
APPS = {
    "a folder that holds something": (_full, ["FOLDER/app"], 2, "which holds something already; choose a new one"),
    "a file": (_file, ["FOLDER/app"], 2, "which holds something already"),
    "below a file": (_file, ["FOLDER/app/new"], 4, "cannot be written"),
    "a link that leads nowhere": (_link, ["FOLDER/app"], 2, "is a link that leads nowhere"),
    "a name of signs": (lambda folder: None, ["FOLDER/___"], 2, "whose name has no letter or digit"),
    "no clients": (lambda folder: None, ["FOLDER/app", "--clients", ""], 2, "--clients is ''; it must be names"),
    "a client twice": (
        lambda folder: None,
        ["FOLDER/app", "--clients", "a,a"],
        2,
        "--clients is 'a,a'; it must be names",
    ),
    "a client with quotes": (lambda folder: None, ["FOLDER/app", "--clients", 'a"b'], 2, "leave out quotes"),
    "a model of two lines": (lambda folder: None, ["FOLDER/app", "--model", "a\nb"], 2, "leave out quotes"),
}
