"""Clients whose whole training is a few lines of fp64: linear regressions of one layer with a shared A."""

import math

import torch

from posttrain.federated.config import FederatedConfig
from posttrain.federated.loop import FederatedLoop
from posttrain.federated.methods import METHODS, Shared
from posttrain.federated.replies import Reply

WIDTH, HEIGHT, RANK, STEPS, BATCH, EACH = 12, 8, 4, 4, 6, 60


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(a):
    return torch.linalg.qr(a.T).Q.T.contiguous()


class Clients:
    """Each fits W0 + B A to a target of its own, on rows of its own.

    `poisoned`: ids of clients that send the opposite of what they learned, a hundred times as large.
    """

    def __init__(self, count=3, optimizer="sgd", trains_a=False, seed=0, clip=None, poisoned=(), start=None):
        self.optimizer, self.trains_a, self.clip, self.poisoned = optimizer, trains_a, clip, poisoned
        self.names = [f"c{number}" for number in range(count)]
        self.rows = {name: EACH + 10 * number for number, name in enumerate(self.names)}
        self.base = 0.1 * draw(HEIGHT, WIDTH, seed=seed + 1)
        uniform = torch.rand(RANK, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        a = (2 * uniform - 1) / math.sqrt(WIDTH) if start is None else start
        self.start = Shared({"l": a}, {"l": torch.zeros(HEIGHT, RANK, dtype=torch.float64)}, {})
        self.data = {}
        # what clients have in common, and what each has beside it
        common = draw(HEIGHT, WIDTH, seed=seed + 99)
        for number, name in enumerate(self.names):
            x = draw(self.rows[name], WIDTH, seed=seed + 10 + number)
            own = 0.7 * common + 0.7 * draw(HEIGHT, WIDTH, seed=seed + 100 + number)
            self.data[name] = x, x @ (self.base + 0.3 * own).T
        self.asked, self.seeds = [], []

    def __call__(self, task):
        self.asked.append((task.round, task.client))
        self.seeds.append(task.seed)
        base = self.base
        if "l" in task.shared.base:
            base = base + task.shared.base["l"][1] @ task.shared.base["l"][0]
        factors = [task.shared.A["l"].clone(), task.shared.B["l"].clone()]
        trained = [0, 1] if self.trains_a else [1]
        means, squares = [0.0, 0.0], [0.0, 0.0]
        for step in range(1, STEPS + 1):
            x, y = self.batch(task.client, (task.round - 1) * STEPS + step)
            gradients = self.gradients(base, *factors, x, y)
            for side in trained:
                g = gradients[side]
                if self.optimizer == "sgd":
                    factors[side] = factors[side] - 0.05 * g
                    continue
                means[side] = 0.9 * means[side] + 0.1 * g
                squares[side] = 0.999 * squares[side] + 0.001 * g.square()
                scale = (squares[side] / (1 - 0.999**step)).sqrt() + 1e-8
                factors[side] = factors[side] - 0.01 * means[side] / (1 - 0.9**step) / scale
        x, y = self.data[task.client]
        loss = (x @ (base + factors[1] @ factors[0]).T - y).square().mean().item()
        if task.client in self.poisoned:
            factors[1] = task.shared.B["l"] - 100 * (factors[1] - task.shared.B["l"])
        A = {"l": factors[0]} if self.trains_a else {}
        return Reply(task.client, self.rows[task.client], {"l": factors[1]}, A, {"loss": loss})

    def batch(self, client, step):
        x, y = self.data[client]
        first = step * BATCH % (len(x) - BATCH)
        return x[first : first + BATCH], y[first : first + BATCH]

    def gradients(self, base, a, b, x, y):
        """Of half the mean squared error, each row's clipped to a Frobenius norm."""
        hidden = x @ a.T
        gap = x @ base.T + hidden @ b.T - y
        of_b = gap[:, :, None] * hidden[:, None, :]
        if self.clip:
            of_b = of_b * (self.clip / of_b.flatten(1).norm(dim=1)).clamp(max=1)[:, None, None]
        return (gap @ b).T @ x / len(x), of_b.mean(dim=0)


def settings(**given):
    return FederatedConfig(**dict(method="fedsvd", rounds=6, num_clients=3, weights="uniform") | given)


def run(config, clients=None, folder=None, resume=False, **given):
    """(the loop after its rounds, the change of the weight)."""
    if clients is None:
        given = dict(trains_a=METHODS[config.method].trains_a) | given
        clients = Clients(config.num_clients, **given)
    loop = FederatedLoop(clients.start, clients.rows, clients, config, folder)
    return loop, loop.run(resume).product("l")


def loop_of(**given):
    """Make a loop of one round of three clients, with some of its arguments replaced."""
    clients = Clients(3)
    given = dict(start=clients.start, rows=clients.rows, train=clients, config=settings(rounds=1)) | given
    return FederatedLoop(**given)


def gap(made, reference):
    return (torch.linalg.norm(made - reference) / torch.linalg.norm(reference)).item()
