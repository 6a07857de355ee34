"""A model's shapes, read from its config without any weight: what memory and time are computed from."""

import copy
import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from posttrain.errors import ConfigError

_MOST = 1e13
_UNITS = {"": 1.0, "m": 1e6, "b": 1e9, "t": 1e12}


@dataclass(frozen=True)
class Shapes:
    """The numbers of a decoder that its memory follows from.

    Attributes:
        parameters: of the model without an adapter, shared ones once.
        embedding: parameters of the input embedding. head: of the output embedding, also where the two are one.
        layer: parameters of the largest layer. linears: how many parameters are in the layers' matrices, of experts
            those that a token meets.
        layers, hidden, heads, key_heads, head_dim, vocab: as in the config. inner: width of the MLP, of several
            experts that of those a token meets together.
        positions: the longest row that the model was made for; None where the config names none.
        norms_heads: whether queries and keys are normed a head.
        adapter: parameters of the adapter that trains; None without one.
        adapted_inputs: the inputs' widths of the adapted matrices of a layer, one after the other. ranks: their sum
            of ranks.
    """

    parameters: int
    embedding: int
    head: int
    layer: int
    linears: int
    layers: int
    hidden: int
    heads: int
    key_heads: int
    head_dim: int
    inner: int
    vocab: int
    positions: int | None
    norms_heads: bool = False
    adapter: int | None = None
    adapted_inputs: int = 0
    ranks: int = 0

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.key_heads * self.head_dim


@cache
def known_models() -> Mapping[str, Mapping]:
    """Return the shapes of public models that the package knows by name, as their configs have them."""
    return json.loads(Path(__file__).with_name("known_models.json").read_text())["models"]


def config_of(model: str, revision: str | None = None):
    """Return a model's config: of one that the package knows, of a local folder, or from the hub or its cache.

    Raises ConfigError where there is none, or it cannot be read without a connection.
    """
    from transformers import AutoConfig

    from posttrain import model_sizes

    known = known_models().get(model)
    if known is not None and revision in (None, "main") and not Path(model).exists():
        return AutoConfig.for_model(**known)
    give = "Give a local folder with its config.json as `--model_name_or_path FOLDER`, or its size as `--params 7b`"
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise ConfigError(f"model {model!r} is a folder without a config.json. {give}.")
    try:
        model_sizes.check_folder(model, revision)
        return AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    except ConfigError:
        raise
    # whatever a config of others makes of it, and errors of the connection
    except Exception as error:
        raise ConfigError(
            f"the config.json of model {model!r} cannot be read here ({type(error).__name__}). {give}."
        ) from None


def shapes_of(config, peft_config=None) -> Shapes:
    """Return the shapes of a model, with an adapter's where one is given; the model is built without memory.

    Raises ConfigError for a model whose config does not name a decoder's sizes.
    """
    import torch
    from transformers import AutoModelForCausalLM

    text = config.get_text_config()
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        hidden, heads, layers = text.hidden_size, text.num_attention_heads, text.num_hidden_layers
        head_dim = getattr(text, "head_dim", None) or hidden // heads
        experts = getattr(text, "num_experts_per_tok", None) or 0
        inner = getattr(text, "intermediate_size", None) or 4 * hidden
        if experts:
            inner = experts * (getattr(text, "moe_intermediate_size", None) or inner)
        blocks = _blocks(model, layers)
        of_blocks = [sum(p.numel() for p in block.parameters()) for block in blocks]
        key_heads = getattr(text, "num_key_value_heads", None) or heads
        head = model.get_output_embeddings().weight.numel()
        embedding = model.get_input_embeddings().weight.numel()
    # a model of any kind, built by its own code
    except Exception as error:
        raise ConfigError(
            f"the shapes of a {text.model_type} model are not known to the plan ({type(error).__name__}). Give the "
            "number of its parameters as `--params 7b`."
        ) from None
    parameters = sum(p.numel() for p in model.parameters())
    matrices = 3 * hidden * inner + 2 * hidden * head_dim * (heads + key_heads)
    linears = matrices * layers if experts else sum(of_blocks)
    found = dict(adapter=None, adapted_inputs=0, ranks=0)
    if peft_config is not None:
        found = _adapter(model, peft_config, layers)
    return Shapes(
        parameters=parameters,
        embedding=embedding,
        head=head,
        layer=max(of_blocks),
        linears=linears,
        layers=layers,
        hidden=hidden,
        heads=heads,
        key_heads=key_heads,
        head_dim=head_dim,
        inner=inner,
        vocab=text.vocab_size,
        positions=getattr(text, "max_position_embeddings", None),
        norms_heads=any(name.endswith("q_norm") for name, _ in blocks[0].named_modules()),
        **found,
    )


def _blocks(model, layers: int):
    import torch

    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == layers)


def _adapter(model, peft_config, layers: int) -> dict[str, int]:
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch import device

    try:
        with device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(model, copy.deepcopy(peft_config))
    except (ValueError, TypeError, AttributeError, RuntimeError, LookupError) as error:
        raise ConfigError(f"the adapter does not fit the model: {error}") from None
    adapted = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and getattr(m, "lora_A", None)]
    inputs = sum(getattr(m, "in_features", 0) or 0 for m in adapted)
    ranks = sum(next(iter(m.r.values()), 0) for m in adapted)
    return {
        "adapter": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "adapted_inputs": math.ceil(inputs / layers),
        "ranks": math.ceil(ranks / layers),
    }


def parameters_of(text: str) -> float:
    """Return the number that `7b`, `500m` or `7000000000` means. Raises ConfigError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d{1,2})?)\s*([mbt]?)", text.strip().lower())
    size = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not 1e6 <= size <= _MOST:
        raise ConfigError(f"params is {text!r}; it must be a number of parameters from 1m to 10t, such as 7b or 500m.")
    return size


def config_of_size(parameters: float):
    """Return the config of a llama of about so many parameters: untied, heads of 128, 128 times as wide as deep."""
    from transformers import AutoConfig

    def made(layers: int):
        hidden = 128 * layers
        inner = 256 * round(3.5 * hidden / 256)
        size = layers * (2 * hidden * hidden + hidden * hidden // 2 + 3 * hidden * inner) + 2 * 128_256 * hidden
        return size, hidden, inner

    layers = min(range(1, 400), key=lambda count: abs(made(count)[0] - parameters))
    _, hidden, inner = made(layers)
    return AutoConfig.for_model(
        "llama",
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=layers,
        num_key_value_heads=next(count for count in range(max(layers // 4, 1), layers + 1) if layers % count == 0),
        vocab_size=128_256,
        max_position_embeddings=131_072,
        tie_word_embeddings=False,
    )
