"""A clean pass and noisy ones as rows of one forward: below the first noisy layer they are the same, and computed once.

From there on each row comes as often as there are passes. What the layers above are given beside states is repeated by
name; of a model that gives them anything else, the rows are repeated before the first layer.
"""

import contextlib
import functools
import math
import weakref

import torch
from torch import Tensor, nn

from posttrain.errors import ConfigError
from posttrain.mechanisms.noise import draws, hidden
from posttrain.mechanisms.noise.branches import repeated
from posttrain.mechanisms.noise.controller import innermost
from posttrain.mechanisms.noise.head import Scored, give_scoring, output_of
from posttrain.objectives.consistency import Mode, loss, terms_of

# What a decoder layer is given beside states: of a row each or one for all; bounds of sequences; nothing of rows
_OF_ROWS = ("attention_mask", "position_ids", "position_embeddings", "cos", "sin", "token_type_ids", "seq_idx")
_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k")
# gradients of rounding, as a share of the loss
_TOLERANCE = 1e-4


class _Resists(Exception):
    """A layer is given something of which it is not known how rows would share it."""


class NoisyPasses:
    """Adds noise to hidden states in passes of their own, within `added_to` and in forwards with gradient alone.

    Args:
        layers: numbers of the decoder layers behind which noise is added.
        base: scale of the noise, see `hidden.scales`; `by_std` likewise.
        weights: of the loss, see `consistency.mode`.
        temperature: of its divergences.
        seed: the run's.
    """

    def __init__(
        self, layers: list[int], base: float, weights: Mode, temperature: float, seed: int, by_std: bool = False
    ) -> None:
        self.layers, self.base, self.by_std = sorted(layers), base, by_std
        # of each of the layers, where they differ
        self.bases: list[float] | None = None
        self.weights, self.temperature, self.seed = weights, temperature, seed
        self.copies = 1 + weights.passes
        # whether the rows are repeated before the first layer
        self.from_start = False
        self._step: int | None = None
        self._counted: Tensor | None = None
        self._found: tuple | None = None
        # sums of squares of noise and of states behind each noisy layer, (layers, 2)
        self.squares: Tensor | None = None
        # what the last forward came to
        self.scored: Scored | None = None

    @contextlib.contextmanager
    def added_to(self, step: int, counted: Tensor | None = None):
        """Forward passes with the noise of an optimiser step inside.

        Args:
            step: optimiser steps taken so far.
            counted: bool, (B, T) or what broadcasts to it: the tokens that count in `squares`; None for all.
        """
        self._step, self._counted = step, counted
        try:
            yield
        finally:
            self._step = self._counted = None

    def base_of(self, number: int) -> float:
        """Return the scale of the noise behind `layers[number]`."""
        return self.base if self.bases is None else self.bases[number]

    def take_squares(self) -> Tensor | None:
        """Return the sums of squares since the last call, and begin anew."""
        found, self.squares = self.squares, None
        return found

    def give(self, model: nn.Module) -> None:
        """Give the innermost model a forward that makes these passes within `added_to`; any other call is as before."""
        give_scoring(innermost(model), lambda: self._step is not None, self._forward)

    def _forward(self, model, input_ids=None, labels=None, fused_lm_head=True, **kwargs):
        if input_ids is None or input_ids.dim() != 2 or labels is None:
            raise ConfigError(
                "the batch has no input_ids and labels of two dimensions, by whose sequences noise is drawn. Use TRL's "
                "collator, or set `hidden_noise: none`."
            )
        kwargs["use_cache"] = False
        found = draws.sequences(input_ids, kwargs.get("attention_mask"), kwargs.get("position_ids"))
        states = self._states(model, input_ids, found, kwargs)
        self.scored, output = output_of(model, states.chunk(self.copies), labels, self.weights, self.temperature)
        return output

    def _states(self, model, input_ids: Tensor, found: draws.Sequences, kwargs: dict) -> Tensor:
        """Return the last hidden states (copies * B, T, H): of the clean pass, then of the noisy ones."""
        layers, rows = self._layers_of(model), len(input_ids)
        keys = [
            [
                draws.token_keys(input_ids, found, self.seed, self._step, 1 + 2 * layer + copy)
                for copy in range(self.weights.passes)
            ]
            for layer in self.layers
        ]
        squares = []

        def add(number: int, module, args, output):
            states = output[0] if isinstance(output, tuple) else output
            if number == 0 and not self.from_start:
                states = states.repeat(self.copies, 1, 1)
            clean, *noisy = states.chunk(self.copies)
            made = []
            for copy, one in enumerate(noisy):
                spread = hidden.scales(one.flatten(0, 1), found, self.base_of(number), self.by_std)
                spread = spread * found.real[:, None]
                noise = draws.normal(keys[number][copy], one.size(-1)) * spread
                made.append(one + noise.view_as(one).to(one.dtype))
                if copy == 0:
                    squares.append(self._squares(noise, one.detach().flatten(0, 1), found, input_ids.shape))
            states = torch.cat([clean, *made])
            return (states, *output[1:]) if isinstance(output, tuple) else states

        handles = [
            layers[layer].register_forward_hook(functools.partial(add, number))
            for number, layer in enumerate(self.layers)
        ]
        if not self.from_start:
            repeat = functools.partial(_repeat_keywords, rows, input_ids.size(1), self.copies)
            handles += [
                layer.register_forward_pre_hook(repeat, with_kwargs=True) for layer in layers[self.layers[0] + 1 :]
            ]
        resists = False
        try:
            given = dict(kwargs, input_ids=input_ids)
            outputs = model.base_model(**(repeated(given, self.copies) if self.from_start else given))
        except _Resists:
            resists = True
        finally:
            for handle in handles:
                handle.remove()
        if resists:
            # a batch that has what the made-up one had not
            self.from_start = True
            return self._states(model, input_ids, found, kwargs)
        with torch.no_grad():
            found_squares = torch.stack(squares)
            self.squares = found_squares if self.squares is None else self.squares + found_squares
        return outputs.last_hidden_state

    def _layers_of(self, model) -> nn.ModuleList:
        """Return the decoder layers of a model, which are looked for once."""
        if self._found is None or self._found[0]() is not model:
            self._found = weakref.ref(model), hidden.decoder_layers(model)
        return self._found[1]

    def _squares(self, noise: Tensor, states: Tensor, found: draws.Sequences, shape) -> Tensor:
        with torch.no_grad():
            real = found.real.view(shape)
            real = (real if self._counted is None else real & self._counted).flatten()[:, None]
            return torch.stack([(values.float() * real).square().sum() for values in (noise, states)])


def _repeat_keywords(rows: int, width: int, copies: int, module, args, kwargs):
    """Repeat what a layer above the first noisy one is given beside its states."""
    if len(args) > 1:
        raise _Resists
    made = {}
    for name, value in kwargs.items():
        if name in _OF_ROWS:
            made[name] = _repeated(value, rows, copies)
        elif name in _BOUNDS and isinstance(value, Tensor):
            made[name] = torch.cat([value] + [value[1:] + rows * width * copy for copy in range(1, copies)])
        elif isinstance(value, Tensor) and value.dim() > 0 and name != "cache_position":
            raise _Resists
        else:
            made[name] = value
    return args, made


def _repeated(value, rows: int, copies: int):
    if isinstance(value, tuple | list):
        return type(value)(_repeated(one, rows, copies) for one in value)
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.dim() < 2 or len(value) not in (1, rows):
        raise _Resists
    # one for all rows stays one, but where kernels count rows by it
    if len(value) == 1 and value.dim() > 2:
        return value
    return value.expand(rows, *value.shape[1:]).repeat(copies, *[1] * (value.dim() - 1))


def settle(passes: NoisyPasses, model: nn.Module) -> None:
    """Compare the passes of one forward to separate forwards on made-up tokens; from the start where they differ.

    Raises ConfigError for a model that differs in either way.
    """
    for passes.from_start in (False, True):
        with contextlib.suppress(_Resists):
            if _gap(passes, model) <= _TOLERANCE:
                return
    raise ConfigError(
        f"{type(innermost(model)).__name__} makes other numbers of several rows in one forward than of each alone, or "
        "of its last states than its own head. Set `hidden_noise: none`."
    )


def separate(passes: NoisyPasses, model: nn.Module, batch: dict, step: int) -> Tensor:
    """Return the loss of a batch from a forward for each pass and whole logits, summed: what `passes` must come to.

    `batch`: input_ids, labels and what else the model is given.
    """
    given = {name: value for name, value in batch.items() if name != "labels"}
    ids = given["input_ids"]
    found = draws.sequences(ids, given.get("attention_mask"), given.get("position_ids"))
    layers = hidden.decoder_layers(model)

    def add(layer, copy, module, args, output):
        keys = draws.token_keys(ids, found, passes.seed, step, 1 + 2 * layer + copy)
        return hidden.with_noise(output, keys, found, passes.base_of(passes.layers.index(layer)), passes.by_std)

    logits = []
    for copy in (None, *range(passes.weights.passes)):
        chosen = [] if copy is None else passes.layers
        hooks = [layers[layer].register_forward_hook(functools.partial(add, layer, copy)) for layer in chosen]
        try:
            logits.append(model(**given, use_cache=False).logits)
        finally:
            for hook in hooks:
                hook.remove()
    return loss(terms_of(logits[0], logits[1:], batch["labels"], passes.temperature), passes.weights).sum()


def _gap(passes: NoisyPasses, model: nn.Module) -> float:
    """Return how far the loss of one forward is from that of separate ones, as a share of it."""
    inner = innermost(model)
    device = inner.get_input_embeddings().weight.device
    ids = torch.randint(inner.config.get_text_config().vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    batch = dict(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    batch = {name: value.to(device) for name, value in batch.items()}
    was_training, squares = inner.training, passes.squares
    model.eval()
    devices = [] if device.type == "cpu" else [device]
    try:
        with torch.random.fork_rng(devices=devices):
            with passes.added_to(0), torch.enable_grad():
                # the whole model is called, as FSDP gathers weights in its forward
                ours = model(**batch, fused_lm_head=True).loss.item()
            with torch.no_grad():
                theirs = separate(passes, model, batch, 0).item()
    finally:
        model.train(was_training)
        passes.squares = squares
    gap = abs(ours - theirs) / max(abs(theirs), 1e-12)
    return gap if math.isfinite(gap) else math.inf
