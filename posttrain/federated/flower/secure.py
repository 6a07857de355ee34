"""FedSVD under secure aggregation: Flower's SecAgg+, which shows the server the sum of B alone.

Flower has SecAgg+ for the workflow of its older strategies only, so that this stands beside `FedSVD` and shares what a
client does and what becomes of the average.
"""

import json
from collections.abc import Callable

import numpy as np
import torch
from flwr.app import Context, Message
from flwr.client import NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import FitIns, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import Grid, ServerConfig
from flwr.server.compat.legacy_context import LegacyContext
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow

from posttrain.checks import check_integer, check_number
from posttrain.errors import ConfigError, DataError
from posttrain.federated import methods
from posttrain.federated.config import FederatedConfig
from posttrain.federated.flower import wire
from posttrain.federated.flower.client import Node, NothingToSend, guarded, train_turn, turns_of
from posttrain.federated.methods import SUM_OF_B, Shared
from posttrain.objectives.factors import is_finite

_LIMITS = "posttrain-limits"
# Flower's own, which fits what its mask holds
_QUANTISED = 2**22
# seconds
_TIMEOUT = 3600.0


class SecureFedSVD(FedAvg):
    """Leads rounds in which the server learns the weighted average of B, and no client's own.

    Values are rounded: with the ranges below by up to range / 2^21 times max_weight / the mean weight. What a client
    would send beyond a range, which SecAgg+ would cut off without a word, is an error on that client.

    Args:
        start: what clients begin the first round with.
        clients: how many take part, all in each round; three or more.
        config: `method` is fedsvd, ffa_lora or ffa_refactored_once, which need the sum of B alone.
        clipping_range: largest absolute value of an entry of B.
        max_weight: largest number of rows of a client, under `weights: rows`.
        threshold: of the clients, how many can together find out what one of them sent, and how many must stay to the
            round's end; default: two thirds of them, rounded up.
        base: digests of the base model; see `FedSVD`.

    Attributes:
        shared: what clients share after the last round.

    Raises:
        ConfigError: a method or a rule that needs every reply, or numbers out of range.
    """

    def __init__(
        self,
        start: Shared,
        clients: int,
        config: FederatedConfig,
        *,
        clipping_range: float = 8.0,
        max_weight: int = 1000,
        threshold: int | None = None,
        base: dict | None = None,
    ) -> None:
        needed = methods.needed(config.method, config.aggregation)
        if needed != SUM_OF_B:
            raise ConfigError(
                f"method {config.method} with aggregation {config.aggregation} needs {needed}, and secure aggregation "
                "shows the server the sum of B alone. Use fedsvd, ffa_lora or ffa_refactored_once with "
                "`aggregation: mean`."
            )
        self._count = check_integer("clients", clients, 3)
        config.check_clients(self._count)
        if config.clients_per_round not in (None, self._count):
            raise ConfigError(
                f"clients_per_round is {config.clients_per_round} and clients is {self._count}; under secure "
                "aggregation all train in each round. Leave clients_per_round out."
            )
        self._range = float(check_number("clipping_range", clipping_range, 0.0, above=True))
        self._most = check_integer("max_weight", max_weight, 1)
        two_thirds = -(-2 * self._count // 3)
        self._threshold = two_thirds if threshold is None else check_integer("threshold", threshold, 2, self._count - 1)
        self.shared, self.config, self._base = start, config, dict(base or {})
        # of the last round that was averaged
        self._done = 0
        super().__init__(
            fraction_fit=1.0,
            fraction_evaluate=0.0,
            min_fit_clients=self._count,
            min_available_clients=self._count,
            initial_parameters=self._parameters(),
        )

    def run(self, grid: Grid, context: Context) -> Shared:
        """Run the rounds and return what clients share after the last one.

        Each of a round's four steps waits as long as `round_timeout` says, an hour where it is None.

        Args:
            context: of the server app.

        Raises:
            DataError: a round in which too few clients stayed to the end.
        """
        workflow = SecAggPlusWorkflow(
            num_shares=self._count,
            reconstruction_threshold=self._threshold,
            max_weight=float(self._most),
            clipping_range=self._range,
            quantization_range=_QUANTISED,
            timeout=self.config.round_timeout or _TIMEOUT,
        )
        legacy = LegacyContext(context, config=ServerConfig(num_rounds=self.config.rounds), strategy=self)
        DefaultWorkflow(fit_workflow=workflow)(grid, legacy)
        self._check_done(self.config.rounds)
        return self.shared

    def configure_fit(self, server_round: int, parameters, client_manager):
        """Return what each client is sent: B, and the order with A and the ranges."""
        self._check_done(server_round - 1)
        tells_rows = self.config.weights == "rows"
        order = wire.Order(server_round, self.config.federated_seed, self.config.method, tells_rows, self._base)
        limits = json.dumps({"range": self._range, "max_weight": self._most})
        given = {**wire.entries(order, self.shared.A), _LIMITS: limits}
        found = super().configure_fit(server_round, self._parameters(), client_manager)
        return [(client, FitIns(ins.parameters, given)) for client, ins in found]

    def aggregate_fit(self, server_round: int, results, failures):
        """Refactor the average, which is all that each result holds."""
        if not results:
            return None, {}
        values = parameters_to_ndarrays(results[0][1].parameters)
        names = sorted(self.shared.B)
        B = {name: torch.from_numpy(np.array(value)).double() for name, value in zip(names, values, strict=True)}
        for name, value in B.items():
            if value.shape != self.shared.B[name].shape or not is_finite(value):
                raise DataError(f"round {server_round}: the sum of B of {name} is no finite average.")
        self.shared = methods.made_of(self.shared, self.shared.A, B, self.config, server_round)
        self._done = server_round
        return self._parameters(), {}

    def _parameters(self):
        B = self.shared.B
        return ndarrays_to_parameters([B[name].detach().cpu().numpy() for name in sorted(B)])

    def _check_done(self, round: int) -> None:
        """Raise DataError where a round before ended without an average, after which Flower goes on."""
        if self._done != round:
            raise DataError(
                f"round {round}: too few of the {self._count} clients stayed to the end of secure aggregation, which "
                f"needs {self._threshold}. What they sent cannot be read; start a new run."
            )


class _Client(NumPyClient):
    def __init__(self, context: Context, clients: Callable, held: dict) -> None:
        self._context, self._clients, self._held = context, clients, held

    def fit(self, parameters, config):
        """Train a turn; refuse what the ranges of secure aggregation would cut off."""
        order, A = wire.read(config)
        limits = json.loads(config[_LIMITS])
        B = {name: torch.from_numpy(np.array(value)) for name, value in zip(sorted(A), parameters, strict=True)}
        client, turns = turns_of(self._context, self._clients, self._held)
        reply = train_turn(client, turns, order, A, B)
        if reply.fault is not None:
            raise NothingToSend(reply.fault)
        for name, value in reply.B.items():
            if not is_finite(value) or value.abs().max() > limits["range"]:
                raise NothingToSend(f"B of {name} is beyond the clipping_range {limits['range']:g}, or not finite")
        if order.tells_rows and reply.rows > limits["max_weight"]:
            raise ConfigError(f"the client has {reply.rows} rows, and max_weight is {limits['max_weight']}")
        weight = reply.rows if order.tells_rows else limits["max_weight"]
        return [reply.B[name].numpy() for name in sorted(A)], weight, {}


def secure_client_app(clients: Callable[[Node], object]) -> ClientApp:
    """Make the client app of a run that `SecureFedSVD` leads.

    Args:
        clients: as for `client_app`.
    """
    held: dict = {}

    def quiet(message: Message, context: Context, call_next: Callable) -> Message:
        return guarded(message, lambda: call_next(message, context))

    def client_fn(context: Context):
        return _Client(context, clients, held).to_client()

    return ClientApp(client_fn, mods=[quiet, secaggplus_mod])
