"""Activations that a forward keeps for its backward, of decoders as transformers writes them.

A layer keeps, of each token: the inputs of its norms in fp32 and, where the norms train, what they scaled; the inputs
of its matrices; queries, keys and values; what attention gives; and of the MLP its gate, the gate after its function,
the other half and their product. With checkpointing only the input of each layer stays, and one layer is whole again.
"""

from posttrain.planning.job import Job, Launch

# attention that is given no mask of rows times columns
_MASKLESS = ("flash_attention_2", "flash_attention_3")


def compute_bytes(job: Job, launch: Launch) -> float:
    """Return the bytes of a number that matrices are multiplied in."""
    return 2.0 if launch.mixed or job.weight_bytes <= 2 else 4.0


def _residual_bytes(job: Job, launch: Launch) -> float:
    """Return the bytes of a number between layers: under autocast that of the embedding."""
    if launch.kind in ("zero2", "zero3", "fsdp2") and launch.mixed:
        return 2.0
    return 2.0 if job.weight_bytes <= 2 else 4.0


def of_layer(job: Job, launch: Launch) -> float:
    """Return the bytes that a layer keeps of a micro-batch without checkpointing."""
    shapes = job.shapes
    compute, residual = compute_bytes(job, launch), _residual_bytes(job, launch)
    full, casts = shapes.adapter is None, compute != residual
    hidden, query, key = shapes.hidden, shapes.query_width, shapes.key_width
    norms = 2 * hidden * (4.0 + (residual if full else 0.0))
    if shapes.norms_heads:
        norms += (query + key) * ((4.0 if compute < 4 else compute) + (compute if full else 0.0))
    inputs = (5 * hidden * compute) if casts else 2 * hidden * residual
    # what adapters take in is a copy of their own, in fp32 unless autocast makes it smaller, or dropout another
    own = compute if launch.mixed else 4.0
    if not full and (job.dropout or residual < 4):
        inputs = shapes.adapted_inputs * (own + job.dropout * (1 + own))
    adapter = shapes.ranks * own
    repeated = _has_mask(job) or job.attention == "eager"
    keys = 2 * (query if repeated else key)
    attention = (2 * query + keys) * compute + shapes.heads * 4.0
    gates = 4 * shapes.inner * compute
    return job.tokens * (norms + inputs + adapter + attention + gates) + _scores(job, compute)


def _has_mask(job: Job) -> bool:
    return job.masked and job.attention not in _MASKLESS


def _scores(job: Job, compute: float) -> float:
    """Return the bytes of attention weights that a layer keeps where no kernel is fused."""
    if job.attention != "eager":
        return 0.0
    return job.rows * job.shapes.heads * job.length**2 * (compute + 4.0)


def masks(job: Job, launch: Launch) -> float:
    """Return the bytes of a batch's mask as booleans and as what is added to scores."""
    if not _has_mask(job) or job.attention == "flex_attention":
        return 0.0
    return job.rows * job.length**2 * (1.0 + compute_bytes(job, launch))


def stored(job: Job, launch: Launch) -> float:
    """Return the bytes of a micro-batch's activations at the end of its forward."""
    shapes, between = job.shapes, _residual_bytes(job, launch)
    ends = 2 * job.tokens * shapes.hidden * max(between, 4.0) + masks(job, launch)
    if job.checkpointing:
        return shapes.layers * job.tokens * shapes.hidden * between + ends
    return shapes.layers * of_layer(job, launch) + ends


def in_backward(job: Job, launch: Launch) -> float:
    """Return the bytes that the backward of a layer has beside what was stored."""
    gradient = job.tokens * 2 * job.shapes.inner * compute_bytes(job, launch)
    return gradient + (of_layer(job, launch) if job.checkpointing else 0.0)


def without_gradient(job: Job, launch: Launch) -> float:
    """Return the bytes of activations of a micro-batch that nothing is backpropagated through."""
    shapes, compute = job.shapes, compute_bytes(job, launch)
    width = 4 * shapes.hidden + max(3 * shapes.inner, 2 * shapes.query_width + 2 * shapes.key_width)
    return job.tokens * width * compute + masks(job, launch)
