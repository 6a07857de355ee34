"""The rounds of federated training in one process: clients are drawn, train in turn, and are averaged."""

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

from posttrain.checks import plain, shorten
from posttrain.config.setting import identity_of
from posttrain.errors import ConfigError
from posttrain.federated import aggregation, methods, replies
from posttrain.federated.clients import Task
from posttrain.federated.config import FederatedConfig
from posttrain.federated.given import check_loop, numbers_of
from posttrain.federated.methods import Shared
from posttrain.federated.replies import Checked, Reply
from posttrain.federated.rounds import RoundFiles
from posttrain.federated.seeds import rng, seed_of
from posttrain.log import get_logger
from posttrain.objectives import spectrum
from posttrain.whole_files import digest_of_tensors

Combine = Callable[[Shared, Mapping[str, Reply], int], Shared]


class FederatedLoop:
    """Runs the rounds: draws clients, has each train, checks and averages their replies, reports, saves.

    Which clients train in a round, and what each draws in it, follow from the seed and the number of the round alone.
    A run that was killed goes on with the same bits, as long as `train` is a function of its task.

    Args:
        start: what clients begin the first round with; of `TrainerClients` its `start`.
        rows: how many each client has, by its id.
        train: `train(Task) -> Reply` has a client train; a `TrainerClients`.
        folder: for checkpoints and reports; None keeps nothing.
        evaluate: `evaluate(Shared) -> dict` of numbers by name, after each round, for the report, which has None for
            one that is not finite.
        identity: what else a run that goes on must share, as plain JSON; of `TrainerClients` its `identity()`.

    Attributes:
        shared: what clients share after the last round.
        reports: of the rounds, a dict each; `run` describes it.

    Raises:
        ConfigError: settings that do not fit the clients, or arguments of another kind. DataError: a start that is not
            finite.
    """

    def __init__(
        self,
        start: Shared,
        rows: Mapping[str, int],
        train: Callable[[Task], Reply],
        config: FederatedConfig,
        folder: str | Path | None = None,
        evaluate: Callable[[Shared], Mapping[str, float]] | None = None,
        identity: Mapping | None = None,
    ) -> None:
        check_loop(start, rows, train, config, folder, evaluate, identity)
        config.check_clients(len(rows))
        self.shared, self.config = start, config
        self._rows, self._train, self._evaluate = dict(sorted(rows.items())), train, evaluate
        self.reports: list[dict] = []
        self._files = None
        if folder is not None:
            began = digest_of_tensors("", {f"{side}/{n}": v for side in "AB" for n, v in getattr(start, side).items()})
            known = {"settings": identity_of(config), "clients": self._rows, "start": began, **(identity or {})}
            self._files = RoundFiles(folder, known)

    def run(self, resume: bool = False) -> Shared:
        """Run the rounds that are left and return what clients share after the last one.

        Each round's report has, by name: `round`; `loss`, weighted as the average is; `clients`, by id the `loss`,
        `rows` and `update_norm` of each, and the `epsilon` and `delta` of all turns of a private one, which tells no
        loss; `left_out`, by id why; `bytes_up` and `bytes_down`, over all clients, of what one sends and what one that
        remembers nothing is sent; `refactored`; `orthonormality`, the largest ||A A^T - I|| of a module;
        `singular_values` by module, of B A and what went into the base, without the scale; `evaluation`.

        Args:
            resume: go on from the newest checkpoint in the folder, with the reports up to it.

        Raises:
            ConfigError: no checkpoint to go on from, one of another run, or rounds in the folder of a new one.
            DataError: a damaged checkpoint, or too few good replies.
        """
        for round in range(self.begin(resume) + 1, self.config.rounds + 1):
            self._run(round)
        return self.shared

    def begin(self, resume: bool = False) -> int:
        """Open the folder, as `run` does; return the number of rounds behind `shared`, 0 for a new run."""
        if self._files is None:
            return 0
        done, found = self._files.begin(resume)
        if done > self.config.rounds:
            raise ConfigError(
                f"rounds is {self.config.rounds}, and {self._files.folder} has gone through {done} already. Set rounds "
                f"to {done} or more."
            )
        self.shared, self.reports = found or self.shared, self._files.reports()
        return done

    def drawn(self, round: int) -> list[str]:
        """Return the clients that train in a round, in the order of their ids."""
        names, count = list(self._rows), self.config.clients_per_round
        if count is None or count == len(names):
            return names
        return sorted(rng(self.config.federated_seed, "clients", round).sample(names, count))

    def _run(self, round: int) -> None:
        config, before, asked = self.config, self.shared, self.drawn(round)
        tasks = (Task(name, round, seed_of(config.federated_seed, "turn", name, round), before) for name in asked)
        self.settle(round, asked, [self._reply(task) for task in tasks])

    def settle(self, round: int, asked: list[str], answers: Iterable[Reply], combine: Combine | None = None) -> None:
        """Make one adapter of what clients sent back in a round, wherever they trained; report it and save it.

        Args:
            asked: the clients that were to train. answers: in any order, and not checked yet.
            combine: `combine(shared, good, round)` returns what clients begin the next round with, `good` being the
                replies that can be averaged, by client and in the order of their ids. Default: as the settings say.

        Raises:
            DataError: too few good replies, or a bad one under `on_bad_reply: abort`.
        """
        config, before = self.config, self.shared
        checked = replies.check(answers, asked, before, config, round, self._epsilons())
        self.shared = (combine or self._combined)(before, checked.good, round)
        report = self._report(round, asked, before, checked)
        self.reports.append(report)
        get_logger().info("round %d of %d: loss %s", round, config.rounds, report["loss"])
        if self._files is None:
            return
        self._files.report(report)
        every = config.save_every_rounds
        if every and (round % every == 0 or round == config.rounds):
            self._files.save(round, self.shared)

    def _combined(self, shared: Shared, good: Mapping[str, Reply], round: int) -> Shared:
        rows = {name: reply.rows for name, reply in good.items()}
        sent_a = {name: reply.A for name, reply in good.items() if reply.A}
        return methods.step(shared, sent_a, {n: reply.B for n, reply in good.items()}, rows, self.config, round)

    def _epsilons(self) -> dict[str, float]:
        """Return the largest epsilon that each private client has told of."""
        found: dict[str, float] = {}
        for report in self.reports:
            for name, told in report["clients"].items():
                if told.get("epsilon") is not None:
                    found[name] = max(told["epsilon"], found.get(name, 0.0))
        return found

    def _reply(self, task: Task) -> Reply:
        config, begun = self.config, time.monotonic()
        if config.dropout and rng(config.federated_seed, "dropout", task.client, task.round).random() < config.dropout:
            return Reply(task.client, fault="it dropped out, which dropout simulates")
        reply = self._train(task)
        if not isinstance(reply, Reply):
            raise ConfigError(
                f"train returned {shorten(reply)} for client {task.client}; it must return a Reply "
                "(posttrain.federated.replies)."
            )
        if config.round_timeout is not None and time.monotonic() - begun > config.round_timeout:
            return Reply(task.client, fault=f"its turn took longer than round_timeout, {config.round_timeout:g} s")
        return reply

    def _report(self, round: int, asked: list[str], before: Shared, checked: Checked) -> dict:
        good, shared = checked.good, self.shared
        shares = aggregation.shares({name: reply.rows for name, reply in good.items()}, self.config.weights)
        losses = {name: plain(reply.metrics.get("loss")) for name, reply in good.items()}
        known = [name for name, loss in losses.items() if loss is not None]
        weight = sum(shares[name] for name in known)
        base = [factor for pair in before.base.values() for factor in pair]
        down = replies.size_of([*before.A.values(), *before.B.values(), *base])
        return {
            "round": round,
            "loss": sum(shares[name] * losses[name] for name in known) / weight if known else None,
            "clients": {
                name: {
                    "loss": losses[name],
                    "rows": plain(reply.rows),
                    "update_norm": replies.norm_of(reply, before),
                    "epsilon": plain(reply.metrics.get("epsilon")),
                    "delta": plain(reply.metrics.get("delta")),
                }
                for name, reply in good.items()
            },
            "left_out": checked.faults,
            "bytes_up": sum(replies.size_of([*reply.A.values(), *reply.B.values()]) for reply in good.values()),
            "bytes_down": down * len(asked),
            "refactored": methods.refactors_after(self.config, round),
            "orthonormality": max(map(_off_orthonormal, shared.A.values())),
            "singular_values": {name: _singular_values(shared, name) for name in shared.B},
            "evaluation": numbers_of(self._evaluate(shared)) if self._evaluate is not None else {},
        }


def _singular_values(shared: Shared, name: str) -> list[float]:
    a, b = shared.A[name], shared.B[name]
    if name in shared.base:
        more_a, more_b = shared.base[name]
        a, b = torch.cat([a, more_a]), torch.cat([b, more_b], dim=1)
    return spectrum.singular_values(a, b).tolist()


def _off_orthonormal(A: torch.Tensor) -> float:
    a = A.double()
    return torch.linalg.norm(a @ a.T - torch.eye(len(a), dtype=a.dtype)).item()
