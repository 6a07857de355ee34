"""A model's own head in the place of TRL's fused one, for models that have more between backbone and logits than that.

TRL's fused head multiplies the backbone's states by the output embedding and knows a few scales and caps. A model with
a dense layer, a norm, a cap of another name or an adapter there has other logits. Here the model's own forward makes
them, of the scored positions only and a tile at a time, so that no logits of a whole batch are held.
"""

import contextlib
import copy
import functools
import types
from typing import NamedTuple

import torch
from accelerate.utils import is_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from trl.trainer.utils import FusedCausalLMOutput

# Scored positions whose logits are held at a time.
TILE = 2048
_FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


class Comparison(NamedTuple):
    """Compares a fused head to the model's own logits on a few made-up tokens.

    Attributes:
        gap: mean |log p| difference to the model's own logits, in nats; infinite where one is no number.
        allowed: how much rounding may make of it.
        fields: the per-token fields that the fused head returns.
    """

    gap: float
    allowed: float
    fields: tuple[str, ...]

    @property
    def differs(self) -> bool:
        return not self.gap <= self.allowed


def is_adapted(model) -> bool:
    """Return whether an adapter sits on the output embedding, whose weight the fused head reads past it."""
    # a trained copy (modules_to_save) hands over the weight that is active
    return isinstance(model.get_output_embeddings(), BaseTunerLayer | TrainableTokensWrapper)


@torch.no_grad()
def compare(model, vocab_size: int, device, temperature: float = 1.0) -> Comparison:
    """Compare the fused head's log-probabilities of made-up tokens to those of the model's own logits.

    `model` has a fused head or is one around it, and should be in eval mode. The global random state is left alone.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (2, 17), generator=generator).to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    with torch.random.fork_rng(devices=_devices(device)):
        fused = model(**inputs, labels=ids, fused_lm_head=True)
        logits = model(**inputs).logits[:, -ids.size(1) : -1]
    eps, values = torch.finfo(logits.dtype).eps, logits.float()
    own = torch.log_softmax(values / temperature, -1).gather(-1, ids[:, 1:, None])[..., 0]
    gap = (fused.log_probs[:, -own.size(1) :].float() - own).abs().mean().item()
    fields = tuple(name for name in _FIELDS if getattr(fused, name) is not None)
    # logits in half precision are rounded, the fused head's are not
    allowed = 1e-4 + eps * values.abs().max().item() / temperature
    return Comparison(gap, allowed, fields)


class Head:
    """Computes per-token log-probabilities by TRL's fused head, or by the model's own where the two differ.

    Wraps `model.forward`; any other call is as before. The model is the causal language model itself, to which
    `trl.trainer.utils.add_fused_lm_head` was applied.

    Attributes:
        mode: fused; tiles, the model's own head on a tile of scored positions at a time; or whole, all its logits at
            once, where its head cannot be run alone.
        fields: the per-token fields that the model's own head returns; the others are None.
        temperature: its logits are divided by it.
    """

    def __init__(self, model, temperature: float = 1.0) -> None:
        self.mode, self.temperature = "fused", temperature
        self.fields: tuple[str, ...] = ("log_probs", "entropy", "mean_logits", "is_top1")
        _wrap(model, self)

    def choose(self, model, vocab_size: int, device, adapted: bool = False) -> str | None:
        """Compare `model`'s fused head with its own logits and take its own where they differ.

        Args:
            model: the one with this head, or one around it, in eval mode.
            adapted: take its own in any case.

        Returns:
            Why its own is taken; None where the fused one stays.
        """
        reason = "an adapter sits on it" if adapted else None
        try:
            found = compare(model, vocab_size, device, self.temperature)
            self.fields = found.fields
            if not found.differs:
                with _stirred(self._head_parameters(model)) as stirred:
                    found = compare(model, vocab_size, device, self.temperature) if stirred else found
            if found.differs:
                reason = f"the fused one is {found.gap:.3g} nats a token off on made-up tokens"
            if reason is None:
                return None
        except Exception as error:
            # in code that is not ours: its own head may do where the fused one trips
            reason = f"the fused one trips over it ({type(error).__name__}: {error})"
        for self.mode in ("tiles", "whole"):
            with contextlib.suppress(Exception):
                if not compare(model, vocab_size, device, self.temperature).differs:
                    return reason
        self.mode = "fused"
        return None

    @staticmethod
    def _head_parameters(model) -> list[Tensor]:
        """Return the parameters between backbone and logits, the output embedding's weight apart."""
        model = model.get_base_model() if is_peft_model(model) else model
        known = {id(parameter) for parameter in model.base_model.parameters()}
        known.add(id(getattr(model.get_output_embeddings(), "weight", None)))
        return [parameter for parameter in model.parameters() if id(parameter) not in known]


@contextlib.contextmanager
def _stirred(parameters: list[Tensor]):
    """Perturb parameters at random while the context lasts, so that two heads which differ give different logits.

    Yields whether any could be moved; quantised ones and those that are spread over ranks cannot.
    """
    plain = [
        parameter
        for parameter in parameters
        if type(parameter) in (nn.Parameter, Tensor) and parameter.is_floating_point() and parameter.numel()
        and not hasattr(parameter, "ds_id")
    ]  # fmt: skip
    before = [parameter.detach().clone() for parameter in plain]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in plain:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))
        yield bool(plain)
    finally:
        with torch.no_grad():
            for parameter, values in zip(plain, before, strict=True):
                parameter.copy_(values)


def _wrap(model, head: Head) -> None:
    before = model.forward
    # unbound where it can be: a deep copy's forward must run the copy
    inner = getattr(before, "__func__", None) or (lambda self, *args, **kwargs: before(*args, **kwargs))

    # generate() checks its arguments against the signature
    @functools.wraps(type(model).forward)
    def forward(self, *args, **kwargs):
        if head.mode == "fused" or not kwargs.get("fused_lm_head"):
            return inner(self, *args, **kwargs)
        del kwargs["fused_lm_head"]
        return _own(self, inner, head, *args, **kwargs)

    model.forward = types.MethodType(forward, model)


def _own(model, inner, head: Head, *args, labels=None, shift_labels=None, num_items_in_batch=None, **kwargs):
    """Compute the fused head's output from the model's own logits."""
    kwargs["use_cache"] = False
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    routed, aux_loss = bool(kwargs.get("output_router_logits")), None
    if head.mode == "whole":
        outputs = inner(model, *args, **kwargs)
        states, logits_of = outputs.logits, lambda part: part
        aux_loss = outputs.aux_loss if routed else None
    else:
        outputs = model.base_model(*args, **kwargs)
        states, logits_of = outputs.last_hidden_state, functools.partial(_logits, model, inner, outputs)
        aux_loss = _aux_loss(model, inner, outputs, kwargs.get("attention_mask")) if routed else None
    if shift_labels is None:
        states, shift_labels = states[:, :-1], labels[:, 1:]
    targets = shift_labels.to(states.device)
    mask = targets != -100
    tile = max(int(mask.sum()), 1) if _is_partitioned(model) else TILE
    parts = _in_tiles(logits_of, states[mask], targets[mask], head, tile)
    found = {
        name: values.new_zeros(mask.shape).masked_scatter(mask, values)
        for name, values in zip(head.fields, parts, strict=True)
    }
    loss = -found["log_probs"].sum() / (mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
    if aux_loss is not None:
        loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * aux_loss
    return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=aux_loss, **found)


def _is_partitioned(model) -> bool:
    """Return whether ZeRO-3 spreads the weights, which a recomputed tile would find gone."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _in_tiles(logits_of, states: Tensor, targets: Tensor, head: Head, tile: int) -> list[Tensor]:
    """Compute the fields (N,) of N scored positions; many have their logits recomputed in the backward."""

    def scored(states, targets):
        return _fields(logits_of(states), targets, head.fields, head.temperature)

    found = []
    for start in range(0, max(len(targets), 1), tile):
        part = (states[start : start + tile], targets[start : start + tile])
        recomputes = torch.is_grad_enabled() and len(targets) > tile
        found.append(checkpoint(scored, *part, use_reentrant=False) if recomputes else scored(*part))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def _fields(logits: Tensor, targets: Tensor, fields, temperature: float) -> tuple[Tensor, ...]:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    logps = torch.log_softmax(logits, -1)
    found = {"log_probs": logps.gather(-1, targets[:, None])[:, 0]}
    if "entropy" in fields:
        found["entropy"] = -(logps.exp() * logps).sum(-1)
    with torch.no_grad():
        if "log_sum_sq_probs" in fields:
            found["log_sum_sq_probs"] = torch.logsumexp(2 * logps, -1)
        if "mean_logits" in fields:
            found["mean_logits"] = logits.mean(-1)
        if "is_top1" in fields:
            found["is_top1"] = logits.argmax(-1) == targets
    return tuple(found[name] for name in fields)


class _Known(nn.Module):
    """Replaces the backbone, whose outputs are known; other attributes are the backbone's."""

    def __init__(self, backbone, outputs) -> None:
        super().__init__()
        object.__setattr__(self, "_backbone", backbone)
        object.__setattr__(self, "_outputs", outputs)

    def forward(self, *args, **kwargs):
        return self._outputs

    def __getattr__(self, name):
        return getattr(object.__getattribute__(self, "_backbone"), name)


@contextlib.contextmanager
def _backbone_known(model, outputs):
    name, backbone = model.base_model_prefix, model.base_model
    if name not in model._modules:
        raise RuntimeError(f"{type(model).__name__} has no backbone of its own")
    model._modules[name] = _Known(backbone, outputs)
    try:
        yield
    finally:
        model._modules[name] = backbone


def _logits(model, inner, outputs, states: Tensor) -> Tensor:
    """Compute the model's own logits (N, V) of N states of its backbone."""
    known = copy.copy(outputs)
    known["last_hidden_state"] = states.unsqueeze(0)
    ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
    with _backbone_known(model, known):
        return inner(model, input_ids=ids, use_cache=False).logits[0]


def _aux_loss(model, inner, outputs, attention_mask):
    """Compute the load-balancing loss of the router's logits by the model itself; its head sees one position."""
    known = copy.copy(outputs)
    known["last_hidden_state"] = outputs.last_hidden_state[:1, :1]
    ids = torch.zeros(1, 1, dtype=torch.long, device=outputs.last_hidden_state.device)
    with _backbone_known(model, known):
        return inner(
            model, input_ids=ids, attention_mask=attention_mask, use_cache=False, output_router_logits=True
        ).aux_loss


def _devices(device) -> list:
    device = torch.device(device)
    return [] if device.type == "cpu" else [device]
