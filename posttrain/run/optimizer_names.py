"""What is known of optimizers by name: which work on a part of a matrix, and which a trainer cannot call as they ask.

`SHARDABLE` is an allow-list: an optimizer is on it where its rule treats each number by itself, so that a flat part of
a matrix is moved as the whole one would be. `tests/run/test_optimizers.py` holds every name of it to that.
"""

from collections.abc import Mapping
from inspect import Parameter

# transformers' names whose rule is elementwise. bitsandbytes' 8-bit states have a scale for so many numbers of the flat
# tensor, whatever its shape.
_UPSTREAM = """
    adamw_torch adamw_torch_fused adamw_torch_xla adamw_torch_npu_fused adamw_apex_fused adamw_anyprecision
    adamw_torch_4bit adamw_torch_8bit ademamix ademamix_8bit sgd adagrad adamw_bnb_8bit adamw_8bit lion_8bit lion_32bit
    lion paged_adamw_32bit paged_adamw_8bit paged_ademamix_32bit paged_ademamix_8bit paged_lion_32bit paged_lion_8bit
    paged_adamw paged_lion rmsprop rmsprop_bnb rmsprop_bnb_8bit rmsprop_bnb_32bit
"""
_TORCH = "ASGD Adadelta Adagrad Adam AdamW Adamax NAdam RAdam RMSprop Rprop SGD"
_PYTORCH_OPTIMIZER = """
    adabelief adabound adadelta adam adamax adamod adamw adan adapnm ademamix adopt aggmo ano diffgrad exadam ftrl
    grams laprop lion madgrad nadam padam pid pnm qhadam qhm radam rmsprop sgd sgdw signsgd simplifiedademamix tiger
    yogi
"""
SHARDABLE = frozenset(
    [
        *_UPSTREAM.split(),
        *(f"torch.optim:{name}" for name in _TORCH.split()),
        *(f"pytorch_optimizer:{name}" for name in _PYTORCH_OPTIMIZER.split()),
    ]
)

# Types of an `optimizer` block that DeepSpeed builds by itself, of any case, beside classes of torch.optim
DEEPSPEED_ELEMENTWISE = ("Adam", "AdamW", "Adagrad", "Lion")

_MATRIX = "uses statistics or factors of a whole matrix"
_TENSOR = "uses a norm or a mean of each tensor"
_SHAPES = "has a rate by the shape of each matrix"
_GLOBAL = "uses norms over all parameters"
# Why an optimizer that is not on the list cannot have parts of matrices, where that is known
NOT_SHARDABLE = {
    "sgdsai": "uses whole-matrix statistics",
    "adafactor": _MATRIX, "torch.optim:Adafactor": _MATRIX, "torch.optim:Muon": _MATRIX, "came": _MATRIX,
    "shampoo": _MATRIX, "scalableshampoo": _MATRIX, "soap": _MATRIX, "sm3": _MATRIX, "kron": _MATRIX, "conda": _MATRIX,
    "splus": _MATRIX, "racs": _MATRIX, "alice": _MATRIX,
    "galore_adamw": _MATRIX, "galore_adamw_8bit": _MATRIX, "galore_adafactor": _MATRIX,
    "galore_adamw_layerwise": _MATRIX, "galore_adamw_8bit_layerwise": _MATRIX, "galore_adafactor_layerwise": _MATRIX,
    "apollo_adamw": _MATRIX, "apollo_adamw_layerwise": _MATRIX, "scion": _MATRIX, "scionlight": _MATRIX,
    "muon": _MATRIX, "muadam": _SHAPES, "muadamw": _SHAPES, "musgd": _SHAPES,
    "lamb": _TENSOR, "lars": _TENSOR, "stable_adamw": _TENSOR, "stableadamw": _TENSOR, "novograd": _TENSOR,
    "adamp": _TENSOR, "sgdp": _TENSOR, "nero": _TENSOR, "fromage": _TENSOR, "adai": _TENSOR, "adalite": _TENSOR,
    "grokadamw": "treats each tensor by its place among the others",
    "prodigy": _GLOBAL, "dadaptadam": _GLOBAL, "dadaptadan": _GLOBAL, "dadaptadagrad": _GLOBAL, "dadaptlion": _GLOBAL,
    "dadaptsgd": _GLOBAL,
    "schedule_free_adamw": "must be told when training pauses, which the engine does not pass on",
    "schedule_free_radam": "must be told when training pauses, which the engine does not pass on",
    "schedule_free_sgd": "must be told when training pauses, which the engine does not pass on",
    "lomo": "moves weights within the backward pass", "adalomo": "moves weights within the backward pass",
}  # fmt: skip

_CLOSURE = (
    "takes its steps at perturbed weights, for which it must run the loss again by itself. Set sam_rho, this library's "
    "own sharpness-aware minimisation, which keeps the optimizer that optim names"
)
_WRAPPER = "wraps another optimizer, which a name alone does not say"
_HESSIAN = "needs the graph of the gradients for second derivatives, and trainers keep none"
_MODEL = "needs the model's modules, and not its parameters alone"
_GROUPS = "needs groups of parameters made for it"
# Of pytorch_optimizer what a trainer cannot call as it asks
NOT_CALLABLE = {
    "sam": _CLOSURE, "gsam": _CLOSURE, "wsam": _CLOSURE, "looksam": _CLOSURE, "friendlysam": _CLOSURE,
    "gcsam": _CLOSURE, "bsam": _CLOSURE,
    "lookahead": _WRAPPER, "orthograd": _WRAPPER, "trac": _WRAPPER, "pcgrad": _WRAPPER, "rotograd": _WRAPPER,
    "schedulefreewrapper": _WRAPPER, "safefp16optimizer": _WRAPPER, "magma": _WRAPPER,
    "adahessian": _HESSIAN, "sophiah": _HESSIAN,
    "lomo": _MODEL, "adalomo": _MODEL, "adammini": _MODEL,
    "muon": _GROUPS, "adamuon": _GROUPS, "adago": _GROUPS, "distributedmuon": _GROUPS, "spectralsphere": _GROUPS,
    "muonclip": _GROUPS, "normuon": _GROUPS, "galore": _GROUPS, "apollo": _GROUPS, "fira": _GROUPS,
    "lbfgs": "must run the loss again by itself within a step, which trainers do not offer",
    "alig": "reads the loss of the step, which trainers do not hand to an optimizer",
    "demo": "exchanges gradients between ranks by itself, in the place of DDP",
    "ranger21": "is given its own schedule of all steps. Name ranger or ranger25",
}  # fmt: skip
# Of torch's
NOT_CALLABLE_TORCH = {
    "LBFGS": NOT_CALLABLE["lbfgs"],
    "SparseAdam": "takes sparse gradients alone, and a language model's are dense",
    "Muon": "takes matrices alone, and a model has vectors too",
}

# Arguments by which a weight is shrunk by itself, as AdamW does, and not through its gradient
_DECOUPLING = ("weight_decouple", "decoupled_weight_decay")

# What estimates its own step size, or averages weights in the place of a schedule, by the beginning of its name
_OWN_SIZE = ("prodigy", "dadapt", "dog", "ldog", "schedulefree")
_STEP_SIZE = ("prodigy", "dadapt", "dog", "ldog")
# What moves weights within the backward pass, so that no gradient is there afterwards
_WITHIN_BACKWARD = ("lomo", "adalomo")


def short(name: str) -> str:
    """Return the last part of a name in small letters, without the marks within: `dog:L_DoG` is ldog."""
    return name.rpartition(":")[2].lower().replace("_", "").replace("-", "")


def decoupling(name: str, arguments: Mapping[str, Parameter]) -> dict[str, bool]:
    """Return the argument that takes an optimizer's weight decay out of the gradient; empty where it is so by default.

    Args:
        name: of the optimizer. arguments: of its constructor, by name.
    """
    # Adan's own decay divides the weight by 1 + lr * weight_decay after the update, as its paper has it
    if short(name) == "adan":
        return {}
    return {one: True for one in _DECOUPLING if one in arguments and arguments[one].default is False}


def wants_constant_rate(name: str) -> bool:
    """Tell whether an optimizer does what a schedule would do, so that the rate is to stay constant."""
    return short(name).startswith(_OWN_SIZE)


def finds_step_size(name: str) -> bool:
    """Tell whether an optimizer estimates its step size, of which learning_rate is a factor."""
    return short(name).startswith(_STEP_SIZE)


def steps_within_backward(name: str) -> bool:
    """Tell whether an optimizer moves weights before all gradients of a step are there."""
    return name in _WITHIN_BACKWARD or name.endswith("_layerwise")


def makes_groups_of_the_model(name: str) -> bool:
    """Tell whether transformers makes an optimizer's groups from the model's layers, with settings of their own."""
    return name.startswith(("galore", "apollo", "lomo", "adalomo"))


def is_elementwise_in_deepspeed(kind: str) -> bool:
    """Tell whether the type of an `optimizer` block in a DeepSpeed config is known to treat each number by itself."""
    own = {name.lower() for name in DEEPSPEED_ELEMENTWISE}
    return kind.lower() in own or f"torch.optim:{kind}" in SHARDABLE


def why_not_sharded(name: str) -> str:
    """Say why an optimizer that is not in `SHARDABLE` is refused parts of matrices."""
    known = NOT_SHARDABLE.get(name) or NOT_SHARDABLE.get(name.removeprefix("pytorch_optimizer:"))
    return known or "is not known to treat each number by itself"
