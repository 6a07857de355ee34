"""What of a run's settings and its launch a plan reads, as plain numbers."""

from dataclasses import dataclass

from posttrain.planning.shapes import Shapes

KINDS = ("single", "ddp", "zero2", "zero3", "fsdp2")
ENGINES = ("zero2", "zero3")


@dataclass(frozen=True)
class Launch:
    """How a run is spread over cards.

    Attributes:
        kind: one of `KINDS`.
        processes: cards of all machines together. machines: how many there are.
        mixed: whether forwards run under bf16 autocast, or an engine's own bf16.
        offloads_states, offloads_weights: whether optimizer states, and weights, lie in the machine's own memory.
    """

    kind: str = "single"
    processes: int = 1
    machines: int = 1
    mixed: bool = True
    offloads_states: bool = False
    offloads_weights: bool = False

    @property
    def weight_shards(self) -> int:
        return self.processes if self.kind in ("zero3", "fsdp2") else 1

    @property
    def state_shards(self) -> int:
        return self.processes if self.kind in ("zero2", "zero3", "fsdp2") else 1


@dataclass(frozen=True)
class Job:
    """What a run does on each card.

    Attributes:
        shapes: of the model, with the adapter's numbers where one trains.
        family: preference, policy_gradient, offline or instructions.
        rows: sequences of a micro-batch, both answers of a pair counted. length: tokens of the longest.
        prompt: tokens of it that are not scored. accumulation: micro-batches a step.
        weight_bytes: a weight of the base as it is loaded: 4, 2, 1 or about 0.5.
        optimizer: as `optim` names it.
        checkpointing: whether activations are computed twice. dropout: whether the adapter drops inputs out.
        attention: the implementation, or None for the model's choice, sdpa. masked: whether it is given a mask.
        reference: none, live (beside the policy) or precomputed. own_reference: whether it is a model of its own.
        scoring_rows: sequences of a batch of the reference before training; 0 for `rows`.
        answers: rollouts of a generation on this card; 0 where nothing is generated.
        vllm: the share of the card that vLLM has in the same process, or None. sleeps: whether it leaves the card
            while the policy trains.
        value_prompts: prompts whose states a value head learns from at a time; 0 without one.
        more_forwards: further forwards of each trained row, without gradient: log-probabilities of rollouts before the
            update, or losses that weigh rows by the whole step. twice: whether a step goes through its rows again.
        drawn: sequences that a step of a private run draws on average, at most, whatever its micro-batches hold; the
            gradients of rows are kept then. None where a step is its micro-batches.
        on_cpu: whether the run is one on the CPU, without kernels of a card.
    """

    shapes: Shapes
    family: str
    rows: int
    length: int
    prompt: int = 0
    accumulation: int = 1
    weight_bytes: float = 4.0
    optimizer: str = "adamw_torch_fused"
    checkpointing: bool = True
    dropout: bool = False
    attention: str | None = None
    masked: bool = True
    reference: str = "none"
    own_reference: bool = False
    scoring_rows: int = 0
    answers: int = 0
    vllm: float | None = None
    sleeps: bool = False
    value_prompts: int = 0
    more_forwards: float = 0.0
    twice: bool = False
    drawn: int | None = None
    on_cpu: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch at most."""
        return self.rows * self.length

    @property
    def scored(self) -> int:
        """Tokens of a micro-batch that the head scores, at most."""
        # without kernels of a card the fused head scores every position
        return self.tokens if self.on_cpu else self.rows * max(self.length - self.prompt, 1)

    @property
    def trainable(self) -> int:
        return self.shapes.parameters if self.shapes.adapter is None else self.shapes.adapter
