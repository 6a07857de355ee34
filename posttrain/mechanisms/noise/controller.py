"""Noise on the input embeddings, for as long as a policy's forward lasts, and in no other forward."""

import contextlib

import torch
from peft import PeftModel
from torch import Tensor, nn

from posttrain.errors import ConfigError
from posttrain.mechanisms.noise import draws


def innermost(model: nn.Module) -> nn.Module:
    """Return the causal language model within its adapter; every forward goes through it, also that of `generate`."""
    # not by accelerate, which walks all modules
    return model.get_base_model() if isinstance(model, PeftModel) else model


def input_embedding(model: nn.Module) -> nn.Module:
    """Return the module that makes vectors of tokens, with its adapter where it has one; ConfigError without one."""
    try:
        embedding = innermost(model).get_input_embeddings()
    except (AttributeError, NotImplementedError):
        embedding = None
    if embedding is None:
        raise ConfigError(
            f"{type(innermost(model)).__name__} has no input embedding to add noise to. Set `embedding_noise: none`."
        )
    return embedding


class EmbeddingNoise:
    """Adds noise to the input embeddings within `added_to`; outside, and in forwards without gradient, there is none.

    Whether a forward gets noise is decided where the innermost model is entered. The hooks are there within the context
    only: a model that is saved, copied or generates from holds none.

    Args:
        kind: a name in `draws.KINDS`. Of `symnoise` a batch holds its rows twice, one behind the other
            (`branches.repeated`): the noise is added to the first, and taken from the second.
        alpha: its strength, 0 or more. seed: the run's.
        by_tensor: as transformers' NEFTune, by the width of the batch, from the global generator; for `neftune`.
    """

    def __init__(self, kind: str, alpha: float, seed: int, by_tensor: bool = False) -> None:
        self.kind, self.alpha, self.seed, self.by_tensor = kind, alpha, seed, by_tensor
        self.copies = 2 if kind == "symnoise" else 1
        self._batch: tuple[Tensor, draws.Sequences] | None = None
        self._entered, self._added = False, False
        # sums of squares of noise and of embeddings, of real tokens that count
        self.squares: Tensor | None = None

    @contextlib.contextmanager
    def added_to(self, model: nn.Module, step: int, counted: Tensor | None = None):
        """Add the noise of an optimiser step to forwards of a model that have a gradient.

        Args:
            model: a causal language model, or a PeftModel of one.
            step: optimiser steps taken so far.
            counted: bool, (B, T) or what broadcasts to it: the tokens that count in `squares`; None for all.

        Raises ConfigError for a batch whose sequences cannot be told apart, and for a model that does not call its
        input embedding.
        """
        embedding, self._step, self._counted = input_embedding(model), step, counted
        self._entered = self._added = False
        hooks = [
            innermost(model).register_forward_pre_hook(self._enter, with_kwargs=True),
            embedding.register_forward_hook(self._add),
        ]
        try:
            yield
            if self._entered and not self._added:
                raise ConfigError(
                    f"{type(innermost(model)).__name__} makes its embeddings without calling its input embedding, so "
                    "no noise was added. Set `embedding_noise: none`."
                )
        finally:
            self._batch = None
            for hook in hooks:
                hook.remove()

    def take_squares(self) -> Tensor:
        """Return the sums of squares of noise and of embeddings (2,) since the last call, and begin anew."""
        found, self.squares = self.squares, None
        return torch.zeros(2) if found is None else found

    def _enter(self, model, args, kwargs) -> None:
        self._batch = None
        if not torch.is_grad_enabled():
            return
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if input_ids is None or input_ids.dim() != 2:
            raise ConfigError(
                "the batch has no input_ids of two dimensions, by whose sequences noise is drawn. Use TRL's collator, "
                "or set `embedding_noise: none`."
            )
        for name, value in (("attention_mask", mask), ("position_ids", positions)):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            if value is not None and shape not in (tuple(input_ids.shape), (1, input_ids.size(1))):
                raise ConfigError(
                    f"the batch's {name} is {shape}, of which the lengths of sequences cannot be read; noise needs one "
                    "number for each token. Use TRL's collator, or set `embedding_noise: none`."
                )
        self._entered = True
        rows = len(input_ids) // self.copies
        # copies are equal but for the sign of their noise
        parts = (value if value is None or len(value) == 1 else value[:rows] for value in (mask, positions))
        self._batch = input_ids[:rows], draws.sequences(input_ids[:rows], *parts)

    def _add(self, module, args, output: Tensor) -> Tensor:
        if self._batch is None:
            return output
        input_ids, found = self._batch
        size = output.size(-1)
        rows, width = input_ids.shape
        if output.shape != (rows * self.copies, width, size):
            raise ConfigError(
                f"the input embedding returns {tuple(output.shape)} for tokens {(rows * self.copies, width)}; noise is "
                "for models with one vector a token. Set `embedding_noise: none`."
            )
        made = self._by_tensor(output) if self.by_tensor else self._by_sequence(input_ids, found, output)
        self._added = True
        with torch.no_grad():
            real = found.real.view(input_ids.shape)
            real = (real if self._counted is None else real & self._counted).unsqueeze(-1)
            both = (made, output[:rows].detach())
            squares = torch.stack([(values.float() * real).square().sum() for values in both])
            self.squares = squares if self.squares is None else self.squares + squares
        return output + (made if self.copies == 1 else torch.cat([made, -made]))

    def _by_sequence(self, input_ids: Tensor, found: draws.Sequences, output: Tensor) -> Tensor:
        size = output.size(-1)
        keys = draws.token_keys(input_ids, found, self.seed, self._step)
        scales = draws.scales(self.kind, self.alpha, found, size)
        return draws.noise(self.kind, keys, scales, size, output.dtype).view(*input_ids.shape, size)

    def _by_tensor(self, output: Tensor) -> Tensor:
        reach = self.alpha / torch.sqrt(torch.tensor(output.size(1) * output.size(2)))
        return torch.zeros_like(output).uniform_(-reach, reach)
