"""FedSVD around a strategy of Flower: B is averaged by the strategy, and refactored after its rule and its noise."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from posttrain.errors import ConfigError, DataError
from posttrain.federated import methods
from posttrain.federated.clients import Task
from posttrain.federated.config import FederatedConfig
from posttrain.federated.flower import records, strategies, wire
from posttrain.federated.flower.nodes import CLIENT, Roster
from posttrain.federated.flower.view import NodesOf
from posttrain.federated.loop import FederatedLoop
from posttrain.federated.methods import Shared
from posttrain.federated.replies import Reply, norm_of
from posttrain.log import get_logger
from posttrain.objectives.factors import is_finite
from posttrain.visible import listed

# seconds that a roll call waits for answers, and between two of them
_ROLL, _PAUSE = 120.0, 1.0
# of a round, where the settings say nothing
_TIMEOUT = 3600.0
# of a norm in fp32 that was clipped
_ROUNDING = 1e-4


class FedSVD(Strategy):
    """Runs federated LoRA on Flower: clients send B, a strategy averages it, the server refactors what comes out.

    The strategy may be any of Flower's that averages arrays: FedAvg, FedMedian, FedTrimmedAvg, Krum, and the wrappers
    for central privacy around one of them. It is given B in fp64 and in the order of the clients' names, so that under
    FedAvg and FedMedian the adapter has the bits that `FederatedLoop` gives it. It averages replies that were checked.
    A is not averaged: clients are sent it, as bytes, with each round. Clients do not evaluate; `evaluate` does.

    Clients are drawn for a round by `federated_seed`, as the loop draws them.

    Args:
        strategy: that averages B. Not the other way round: a strategy around FedSVD would add its noise to A and B
            after the refactorisation, with a sensitivity that is another one there.
        start: what clients begin the first round with; of `SharedAdapter` its `start`.
        clients: the names of all that take part.
        config: `method` is fedsvd, ffa_lora or ffa_refactored_once; `aggregation` is left to the strategy.
        folder: for checkpoints and reports; None keeps nothing.
        evaluate: `evaluate(Shared) -> dict` of numbers by name, after each round, for its report.
        base: digests of the base model, which nodes compare with theirs; of `TrainerClients` its `identity()`.

    Attributes:
        shared: what clients share after the last round. reports: of the rounds; see `FederatedLoop.run`.

    Raises:
        ConfigError: a strategy or settings that cannot be together, with the reason.
    """

    def __init__(
        self,
        strategy: Strategy,
        start: Shared,
        clients: Sequence[str],
        config: FederatedConfig,
        *,
        folder: str | Path | None = None,
        evaluate: Callable[[Shared], Mapping[str, float]] | None = None,
        base: Mapping[str, str] | None = None,
    ) -> None:
        self._roster = Roster(clients)
        names = self._roster.clients
        base = dict(base or {})
        # who has how many rows is told by replies alone
        self._loop = FederatedLoop(start, dict.fromkeys(names, 1), _elsewhere, config, folder, evaluate, base)
        drawn = config.clients_per_round or len(names)
        self._found = strategies.check(strategy, config, drawn)
        self.strategy, self.config = strategy, config
        self._base, self._drawn = base, drawn
        self._done, self._wait, self._is_run = 0, 0.0, False
        # of the round that runs
        self._asked: list[str] = []

    @property
    def shared(self) -> Shared:
        """What clients share after the last round."""
        return self._loop.shared

    @property
    def reports(self) -> list[dict]:
        """The reports of the rounds."""
        return self._loop.reports

    def run(self, grid: Grid, *, wait: float = 600.0, resume: bool = False) -> Shared:
        """Run the rounds that are left and return what clients share after the last one.

        A round waits for replies as long as `round_timeout` says, an hour where it is None; a client that is late
        counts as one that did not answer.

        Args:
            wait: seconds that the first round waits for all clients to connect, and each round for as many as
                min_replies asks for.
            resume: go on from the newest checkpoint in the folder.

        Raises:
            ConfigError: as `FederatedLoop.run`; resume where a strategy adds noise.
            DataError: too few good replies; a strategy that made no average.
        """
        if resume and self._found.is_private:
            raise ConfigError(
                f"resume is set and strategy is {self._found.names[0]}: a round that was lost has drawn its noise and "
                "has been seen, and nothing counts it. Start a new run in another folder."
            )
        self._done, self._wait, self._is_run = self._loop.begin(resume), wait, True
        try:
            if left := self.config.rounds - self._done:
                super().start(
                    grid=grid,
                    initial_arrays=records.arrays(self.shared.B),
                    num_rounds=left,
                    timeout=self.config.round_timeout or _TIMEOUT,
                )
        finally:
            self._is_run = False
        return self.shared

    def start(self, *args, **kwargs):
        """Refuse Flower's own way to begin, whose arguments the settings have; `run` begins."""
        raise ConfigError("FedSVD has its rounds, start and clients from its settings: call `run(grid)`, not start.")

    def summary(self) -> None:
        """Log the settings of the strategy inside."""
        self.strategy.summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the round's messages: B, and the order with A, to the nodes of the clients that are drawn."""
        if not self._is_run:
            raise ConfigError(
                "FedSVD is inside another strategy, which would change A and B after they were refactored: noise for "
                "privacy would fall on A, whose sensitivity nobody knows, and a robust rule would come too late. Put "
                "FedSVD outside, FedSVD(strategy, ...), and call its `run`."
            )
        round = self._done + server_round
        self._asked = self._loop.drawn(round)
        there = self._connected(grid, self._asked, is_first=server_round == 1)
        self._check_enough(round, there)
        shared, settings = self.shared, self.config
        order = wire.Order(round, settings.federated_seed, settings.method, settings.weights == "rows", self._base)
        given = records.config({**config, **wire.entries(order, shared.A)})
        view = NodesOf(grid, sorted(there.values()))
        return list(self.strategy.configure_train(round, records.arrays(shared.B), given, view))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check the replies, have the strategy average the good ones, refactor, report and save."""
        round, messages, answers, metrics = self._done + server_round, {}, [], []
        for message in replies:
            node = message.metadata.src_node_id
            client = self._roster.client(node) or f"node {node}"
            messages[client] = message
            answers.append(self._looked_at(records.reply_of(message, client)))

        def combine(before: Shared, good: Mapping[str, Reply], round: int) -> Shared:
            B, told = self._averaged(before, good, messages, round)
            metrics.append(told)
            return methods.made_of(before, before.A, B, self.config, round)

        self._loop.settle(round, self._asked, answers, combine)
        return records.arrays(self.shared.B), metrics[0]

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return nothing: clients do not evaluate."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return nothing: clients do not evaluate."""
        return None

    def _averaged(self, before: Shared, good: Mapping[str, Reply], messages: Mapping[str, Message], round: int):
        """Return the strategy's average of checked replies by module, in fp64, and its metrics."""
        called = self._found.names[0]
        if self._found.is_private and len(good) < self._drawn:
            raise DataError(
                f"round {round} has {len(good)} good replies, and the noise of {called} is for an average of "
                f"{self._drawn}: with fewer each client would have a larger share than it is protected for. Start a "
                "new run once all clients answer."
            )
        told = [{name for name, value in reply.metrics.items() if _is_number(value)} for reply in good.values()]
        uniform, names = self.config.weights == "uniform", list(before.B)
        given = [
            records.give_on(messages[name], reply, names, 1 if uniform else reply.rows, set.intersection(*told))
            for name, reply in good.items()
        ]
        with fresh_noise():
            averaged, metrics = self.strategy.aggregate_train(round, given)
        if averaged is None:
            raise DataError(
                f"{called} made no average of the {len(good)} good replies of round {round}; Flower's log says why. "
                "Give min_replies as many as it needs, so that a round with fewer is named."
            )
        B = records.tensors(averaged)
        for name, value in before.B.items():
            if name not in B or B[name].shape != value.shape or not is_finite(B[name]):
                raise DataError(f"{called} returned no finite average for B of {name} in round {round}.")
        return {name: B[name].double() for name in names}, metrics

    def _looked_at(self, reply: Reply) -> Reply:
        """Return a reply, or one with a fault where the strategy could not take it; others are checked later."""
        found = self._found
        if missing := sorted(name for name in found.reads if not _is_number(reply.metrics.get(name))):
            return Reply(
                reply.client, fault=reply.fault or f"its metrics have no {missing[0]}, which the strategy reads"
            )
        fits = reply.B.keys() == self.shared.B.keys() and all(
            value.shape == self.shared.B[name].shape and value.is_floating_point() for name, value in reply.B.items()
        )
        if reply.fault or not fits or not (found.clips_on_server or found.trusts):
            return reply
        norm = norm_of(reply, self.shared)
        if found.clips_on_server and norm == 0:
            return Reply(reply.client, fault="it sent B as it was, and clipping divides by the norm of the change")
        if found.trusts is not None and norm > found.trusts.clipping_norm * (1 + _ROUNDING):
            return Reply(
                reply.client,
                fault=f"its update has the norm {norm:.4g}, and clients are to clip to "
                f"{found.trusts.clipping_norm:.4g}: give client_app Flower's clipping mod",
            )
        return reply

    def _connected(self, grid: Grid, asked: list[str], is_first: bool) -> dict[str, int]:
        """Return the nodes of the clients that are drawn and connected, once those are there that are waited for."""
        until, wanted = time.monotonic() + self._wait, self._roster.clients if is_first else asked
        while True:
            self._call_roll(grid)
            nodes = self._roster.nodes()
            there = {name: nodes[name] for name in asked if name in nodes}
            enough = all(name in nodes for name in wanted) if is_first else len(there) >= self.config.min_replies
            if enough or time.monotonic() >= until:
                break
            time.sleep(_PAUSE)
        if missing := sorted(set(wanted) - nodes.keys()):
            get_logger().warning("no node is connected for %s", listed(missing))
        return there

    def _call_roll(self, grid: Grid) -> None:
        """Ask nodes that are new whose rows they have."""
        unknown = self._roster.unknown(grid.get_node_ids())
        if not unknown:
            return
        asked = [Message(RecordDict({}), dst_node_id=node, message_type=MessageType.QUERY) for node in unknown]
        for reply in grid.send_and_receive(asked, timeout=_ROLL):
            found = {} if reply.has_error() else dict(next(iter(reply.content.config_records.values()), {}))
            self._roster.hear(reply.metadata.src_node_id, found.get(CLIENT))

    def _check_enough(self, round: int, there: Mapping[str, int]) -> None:
        """Raise DataError before messages are sent to fewer clients than can make a round, or than are waited for."""
        inside = self.strategy
        while hasattr(inside, "strategy"):
            inside = inside.strategy
        asks = [getattr(inside, name, 1) for name in ("min_train_nodes", "min_available_nodes")]
        least = max(self.config.min_replies, self._drawn if self._found.is_private else 1, *asks)
        if len(there) < least:
            raise DataError(
                f"round {round}: {len(there)} of the {len(self._asked)} clients that are drawn are connected, and it "
                f"needs {least} (min_replies, or the strategy's min_train_nodes and min_available_nodes)."
            )


@contextlib.contextmanager
def fresh_noise():
    """Have numpy's global generator begin inside with entropy of the system, and leave it as it was.

    Flower draws its noise for privacy from it; what seeds a run, as `set_seed` does, would tell that noise.
    """
    before = np.random.get_state()
    np.random.seed()
    try:
        yield
    finally:
        np.random.set_state(before)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _elsewhere(task: Task) -> Reply:
    raise ConfigError(f"client {task.client} trains on its node; `FedSVD.run` has its rounds.")
