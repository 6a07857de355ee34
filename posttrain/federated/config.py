"""Settings of federated training: who trains in a round, and what becomes of what clients send back."""

import math
from dataclasses import dataclass
from typing import ClassVar

from posttrain.checks import check_choice, check_holdable, plain
from posttrain.config.setting import setting
from posttrain.errors import ConfigError, ExcludedSetting
from posttrain.federated.methods import METHODS, RULES

_WEIGHTS = ("rows", "uniform")
_STARTS = ("given", "orthonormal")
_PARTITIONS = ("iid", "dirichlet", "given")
_ON_BAD = ("drop", "abort")
# published values
_ALPHA, _TRIM = 0.5, 0.2


@dataclass
class FederatedConfig:
    """Settings of the rounds of federated training, parsed beside those of the clients' trainer.

    What a client does in a round are the trainer's own settings: its `max_steps` are the local steps.

    Raises:
        ConfigError: (a ValueError) a value out of range, or settings that exclude each other.

    Source: arXiv 2505.12805 (FedSVD); arXiv 2403.12313 (FFA-LoRA), 2409.05976 (FLoRA), 2410.09432 (FedEx-LoRA).
    """

    method: str = setting(
        "fedsvd",
        "fedsvd: clients train B, the server averages it and makes A orthonormal again; ffa_lora: A stays as it began; "
        "ffa_refactored_once: A is made orthonormal after one round and stays. These send B alone. fedavg_lora: A and "
        "B are averaged, each for itself; flora, fedex_lora: exact averages of the products, which move the base.",
        identity=True,
        card=lambda args: True,
    )
    rounds: int = setting(100, "Rounds to train.", identity=False, card=lambda args: True)
    num_clients: int | None = setting(
        None,
        "Clients that the rows are split over; for partition: given they are the data sets, or values, themselves.",
        identity=True,
        card=True,
    )
    clients_per_round: int | None = setting(
        None, "Clients that are drawn for a round. Default: all.", identity=True, card=True
    )
    refactor_every_rounds: int | None = setting(
        None,
        "fedsvd: rounds from one refactorisation to the next, 1 by default, 0 for never, which is ffa_lora. "
        "ffa_refactored_once: the round after which it is done, 1 by default.",
        identity=True,
        card=True,
    )
    initial_a: str = setting(
        "given",
        "A before the first round, where clients do not train it: given, as PEFT drew it; or orthonormal, drawn by "
        "federated_seed.",
        identity=True,
        card=True,
    )
    weights: str | None = setting(
        None,
        "Weight of a client in the average: rows, by the rows that it trained on; or uniform. Default: rows; uniform "
        "under median and trimmed_mean, which have no weights.",
        identity=True,
        card=True,
    )
    aggregation: str = setting(
        "mean",
        "How replies become one: mean; norm_bound, the mean of updates no longer than update_norm_bound; median or "
        "trimmed_mean of each entry, which a few clients cannot move far.",
        identity=True,
        card=True,
    )
    update_norm_bound: float | None = setting(
        None, "norm_bound: largest norm of a client's update, over all tensors that it sends.", identity=True, card=True
    )
    trim_fraction: float | None = setting(
        None,
        "trimmed_mean: share of the clients that is left out at each end of every entry, below 0.5; 0.2 by default. "
        "The number of clients is rounded up.",
        identity=True,
        card=True,
    )
    partition: str = setting(
        "iid",
        "How rows are split over clients: iid, at random in equal parts; dirichlet, each value of partition_column "
        "over the clients by shares drawn from Dirichlet(dirichlet_alpha); given, as they are: data sets by the name "
        "of the client, or a client for each value of partition_column.",
        identity=True,
        card=lambda args: True,
    )
    partition_column: str | None = setting(
        None, "Column that partition: dirichlet splits by, or that names the client.", identity=True, card=True
    )
    dirichlet_alpha: float | None = setting(
        None,
        "dirichlet: how alike clients are, 0.5 by default; 0.1 gives most of a value's rows to one or two of them, "
        "100 nearly equal shares.",
        identity=True,
        card=True,
    )
    min_client_rows: int = setting(
        1,
        "Fewest rows that a client may have; a split that leaves one with fewer is refused.",
        identity=True,
        card=True,
    )
    federated_seed: int = setting(
        0,
        "Seed of the split, of the clients drawn for each round and of what each of them draws in it.",
        identity=True,
        card=lambda args: True,
    )
    on_bad_reply: str = setting(
        "drop",
        "What becomes of a reply with other tensors than were asked for, or numbers that are not finite: drop, go on "
        "without it, naming the client; abort, end the run.",
        identity=True,
        card=True,
    )
    min_replies: int | None = setting(
        None,
        "Fewest good replies that a round needs; with fewer the run ends. Default: 1; 3 under median and trimmed_mean.",
        identity=True,
        card=True,
    )
    dropout: float = setting(
        0.0,
        "Probability that a client that was drawn does not answer, drawn by federated_seed; to try a run with it.",
        identity=True,
        card=True,
    )
    round_timeout: float | None = setting(
        None,
        "Seconds after which a client's answer is not waited for any more. Default: no end.",
        identity=False,
        card=True,
    )
    save_every_rounds: int = setting(1, "Rounds from one checkpoint to the next; 0: none.", identity=False, card=False)

    # what null of a setting means, for the card
    nulls: ClassVar[dict[str, str]] = {"clients_per_round": "all"}

    def __post_init__(self):
        check_choice("method", self.method, tuple(METHODS))
        check_choice("aggregation", self.aggregation, tuple(RULES))
        check_choice("initial_a", self.initial_a, _STARTS)
        check_choice("partition", self.partition, _PARTITIONS)
        check_choice("on_bad_reply", self.on_bad_reply, _ON_BAD)
        for name, low in (
            ("rounds", 1), ("min_client_rows", 1), ("federated_seed", 0), ("save_every_rounds", 0), ("num_clients", 1),
            ("clients_per_round", 1), ("min_replies", 1), ("refactor_every_rounds", 0),
        ):  # fmt: skip
            if getattr(self, name) is not None or type(self).__dataclass_fields__[name].default is not None:
                self._whole(name, low)
        self._read_absences()
        self._read_method()
        self._read_rule()
        self._read_partition()
        if self.num_clients is not None:
            self.check_clients(self.num_clients)

    def _read_absences(self) -> None:
        dropout, timeout = self._number("dropout"), self._number("round_timeout")
        if dropout is None or not 0 <= dropout < 1:
            raise ConfigError(f"dropout is {dropout!r}; it must be a number of 0 or more and below 1.")
        if timeout is not None and not 0 < timeout < math.inf:
            raise ConfigError(f"round_timeout is {timeout!r}; it must be a finite number of seconds above 0.")

    def _read_method(self) -> None:
        method = METHODS[self.method]
        if method.refactors == "never" and self.refactor_every_rounds is not None:
            self._exclude(
                "refactor_every_rounds", "method", "which never refactors. Use `method: fedsvd`, or leave it out."
            )
        if method.refactors != "never" and self.refactor_every_rounds is None:
            self.refactor_every_rounds = 1
        if method.refactors == "once" and not 1 <= self.refactor_every_rounds <= self.rounds:
            raise ConfigError(
                f"refactor_every_rounds is {self.refactor_every_rounds} and rounds is {self.rounds}; for "
                "ffa_refactored_once it must be the number of one of the rounds. `method: ffa_lora` never refactors."
            )
        if method.trains_a and self.initial_a != "given":
            self._exclude("initial_a", "method", "whose clients train A. Leave initial_a out.")
        if method.moves_base and self.aggregation != "mean":
            self._exclude(
                "aggregation", "method", "whose products are added up exactly. Use `aggregation: mean`, or a method "
                "that averages factors, such as fedsvd.",
            )  # fmt: skip

    def _read_rule(self) -> None:
        rule = RULES[self.aggregation]
        if self.weights is None:
            self.weights = "rows" if rule.weighs else "uniform"
        check_choice("weights", self.weights, _WEIGHTS)
        if self.weights == "rows" and not rule.weighs:
            self._exclude("weights", "aggregation", "which counts every client once. Leave weights out.")
        for name, owner, low, high in (
            ("update_norm_bound", "norm_bound", 0.0, math.inf), ("trim_fraction", "trimmed_mean", 0.0, 0.5),
        ):  # fmt: skip
            value = self._number(name)
            if value is not None and self.aggregation != owner:
                self._exclude(
                    name, "aggregation", f"which does not read it. Use `aggregation: {owner}`, or leave it out."
                )
            if value is not None and not low < value < high:
                span = "a finite number above 0" if high == math.inf else f"above {low:g} and below {high:g}"
                raise ConfigError(f"{name} is {value!r}; it must be {span}.")
        if self.aggregation == "trimmed_mean" and self.trim_fraction is None:
            self.trim_fraction = _TRIM
        if self.aggregation == "norm_bound" and self.update_norm_bound is None:
            raise ConfigError(
                "aggregation is norm_bound and update_norm_bound is null; give the largest norm that a client's update "
                "may have. The report of a round has the norms of all, of a run with `aggregation: mean`."
            )
        if self.min_replies is None:
            self.min_replies = rule.least
        if self.min_replies < rule.least:
            raise ConfigError(
                f"min_replies is {self.min_replies} and aggregation is {self.aggregation}, which protects nobody with "
                f"fewer than {rule.least} replies. Give {rule.least} or more."
            )

    def _read_partition(self) -> None:
        column = self.partition_column
        if column is not None and not (isinstance(column, str) and column.strip()):
            raise ConfigError(f"partition_column is {column!r}; it must be the name of a column, or be left out.")
        if self.partition == "iid" and column is not None:
            self._exclude(
                "partition_column", "partition", "which splits at random. Use `partition: dirichlet`, or leave it out."
            )
        if self.partition == "dirichlet" and column is None:
            raise ConfigError(
                "partition is dirichlet and partition_column is null; give the column whose values are spread unevenly "
                "over the clients, such as a label."
            )
        alpha = self._number("dirichlet_alpha")
        if alpha is not None and self.partition != "dirichlet":
            self._exclude(
                "dirichlet_alpha", "partition", "which does not read it. Use `partition: dirichlet`, or leave it out."
            )
        if self.partition == "dirichlet":
            self.dirichlet_alpha = _ALPHA if alpha is None else alpha
            if not 0.001 <= self.dirichlet_alpha < math.inf:
                raise ConfigError(f"dirichlet_alpha is {alpha!r}; it must be a finite number of 0.001 or more.")
        if self.partition != "given" and self.num_clients is None:
            raise ConfigError(
                f"num_clients is null; `partition: {self.partition}` needs the number of clients that the rows are "
                "split over, such as 6."
            )

    def check_clients(self, count: int) -> None:
        """Raise ConfigError where a run of so many clients cannot be as the settings say."""
        if self.num_clients is not None and self.num_clients != count:
            raise ConfigError(
                f"num_clients is {self.num_clients}, and there are {count} clients. Give their number, or leave it out "
                "with `partition: given`."
            )
        drawn = count if self.clients_per_round is None else self.clients_per_round
        if drawn > count:
            raise ConfigError(
                f"clients_per_round is {drawn}, and there are {count} clients. Give {count} or fewer, or leave it out: "
                "all train in each round."
            )
        if self.min_replies > drawn:
            raise ConfigError(
                f"min_replies is {self.min_replies}, and {drawn} clients train in a round. "
                + (
                    f"aggregation: {self.aggregation} needs {RULES[self.aggregation].least} or more of them."
                    if self.min_replies == RULES[self.aggregation].least
                    else f"Give {drawn} or fewer."
                )
            )

    def _exclude(self, name: str, other: str, why: str) -> None:
        raise ExcludedSetting(
            f"{name} is {getattr(self, name)!r} and {other} is {getattr(self, other)}, {why}",
            {name: (other,), other: (name,)},
        )

    def _whole(self, name: str, low: int) -> None:
        value = plain(getattr(self, name))
        check_holdable(name, value)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ConfigError(f"{name} is {value!r}; it must be a whole number of {low} or more.")
        setattr(self, name, value)

    def _number(self, name: str) -> float | None:
        value = plain(getattr(self, name))
        check_holdable(name, value)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value)):
            raise ConfigError(f"{name} is {value!r}; it takes a number.")
        setattr(self, name, value)
        return value
