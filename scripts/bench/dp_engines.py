"""The steps that dp.py times: plain, ours and other engines' of private training, on one model and the same rows."""

import sys
from collections.abc import Callable
from typing import NamedTuple

RATE = 1e-4


class Shape(NamedTuple):
    """Of the model and of a step's rows."""

    hidden: int = 512
    inner: int = 1408
    layers: int = 4
    heads: int = 8
    vocabulary: int = 2048
    rows: int = 4
    tokens: int = 256
    rank: int = 16


class Engine(NamedTuple):
    """A step in parts.

    Attributes:
        parameters: the trained ones, in the model's order.
        gradient: forward, backward and what makes the gradient private; leaves it in `grad` of each parameter.
        update: the optimizer's step, and what clears the gradients.
    """

    parameters: list
    gradient: Callable[[], None]
    update: Callable[[], None]

    def step(self) -> None:
        self.gradient()
        self.update()


class Missing(Exception):
    """An engine that is not installed, or that does not run here, and how to get it."""


def make_model(shape: Shape, train_a: bool):
    """A llama with a LoRA on all linear layers, whose B is not zero: a gradient of A would be."""
    import torch
    from bench.arms import lora
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.inner,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.heads // 2,
        max_position_embeddings=shape.tokens,
    )  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(config), lora(r=shape.rank, lora_alpha=2 * shape.rank))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
        elif "lora_A" in name:
            parameter.requires_grad_(train_a)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").train()


def make_rows(shape: Shape):
    """Token ids (rows, tokens)."""
    import torch

    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(shape.vocabulary, (shape.rows, shape.tokens), generator=generator)
    return ids.to("cuda" if torch.cuda.is_available() else "cpu")


def row_losses(model, ids):
    """Mean negative log-likelihood of each row, (rows,)."""
    import torch.nn.functional as F

    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(dim=1)


def trained(model) -> list:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _adamw(parameters):
    import torch

    return torch.optim.AdamW(parameters, RATE)


def plain(model, ids, clip_norm: float, noise: float) -> Engine:
    """The step without privacy: no clipping and no noise, whatever is given."""
    parameters = trained(model)
    optimizer = _adamw(parameters)

    def update():
        optimizer.step()
        optimizer.zero_grad()

    return Engine(parameters, lambda: row_losses(model, ids).mean().backward(), update)


def ours(model, ids, clip_norm: float, noise: float) -> Engine:
    from posttrain.mechanisms.row_gradients import RowGradients
    from posttrain.privacy.step import PrivateStep, RowUnits

    rows = RowGradients(model)
    made = PrivateStep(rows.parameters, clip_norm=clip_norm, noise_std=noise * clip_norm, expected=len(ids))
    optimizer, units = _adamw(list(rows.parameters.values())), RowUnits.of(range(len(ids)))

    def gradient():
        with rows.collected(len(ids)):
            row_losses(model, ids).sum().backward()
        made.collect(rows.take_together(), units)
        made.finish()

    def update():
        optimizer.step()
        optimizer.zero_grad()

    return Engine(list(rows.parameters.values()), gradient, update)


def opacus_hooks(model, ids, clip_norm: float, noise: float) -> Engine:
    _need_opacus()
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer

    hooked = GradSampleModule(model, loss_reduction="sum")
    parameters = trained(hooked)
    optimizer = DPOptimizer(
        _adamw(parameters), noise_multiplier=noise, max_grad_norm=clip_norm, expected_batch_size=len(ids)
    )

    def gradient():
        row_losses(hooked, ids).sum().backward()
        optimizer.pre_step()

    return Engine(parameters, gradient, _update_of(optimizer))


def opacus_ghost(model, ids, clip_norm: float, noise: float) -> Engine:
    _need_opacus()
    import torch
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    hooked = GradSampleModuleFastGradientClipping(
        model, max_grad_norm=clip_norm, use_ghost_clipping=True, loss_reduction="mean"
    )
    parameters = trained(hooked)
    optimizer = DPOptimizerFastGradientClipping(
        _adamw(parameters), noise_multiplier=noise, max_grad_norm=clip_norm, expected_batch_size=len(ids)
    )
    loss_of = DPLossFastGradientClipping(hooked, optimizer, torch.nn.CrossEntropyLoss(reduction="mean"), "mean")

    def gradient():
        logits = hooked(input_ids=ids, use_cache=False).logits[:, :-1]
        # the shape says which tokens are of one row
        flat = logits.reshape(-1, logits.size(-1)), ids[:, 1:].reshape(-1)
        loss_of(*flat, shape=(len(ids), ids.size(1) - 1)).backward()
        optimizer.pre_step()

    return Engine(parameters, gradient, _update_of(optimizer))


def _need_opacus() -> None:
    try:
        import opacus  # noqa: F401
    except ImportError as error:
        raise Missing(f"{error}; pip install 'opacus>=1.6,<1.7'") from None


def _update_of(optimizer) -> Callable[[], None]:
    def update():
        optimizer.original_optimizer.step()
        optimizer.zero_grad()

    return update


def opake(model, ids, clip_norm: float, noise: float) -> Engine:
    try:
        from opake.dpsgd.clipping import clipped_grad
        from opake.dpsgd.noise import gaussian_noise
        from opake.patches import apply_model_patches
        from opake.random import key
    # it has stopped with other errors than ImportError while it was imported
    except Exception as error:
        version = ".".join(map(str, sys.version_info[:3]))
        raise Missing(
            f"{type(error).__name__} on Python {version}: {error}; pip install 'opake[transformers]'"
        ) from None
    from torch.func import functional_call

    apply_model_patches(model)
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = _adamw(list(named.values()))

    def loss_of(values, row):
        return row_losses(lambda **inputs: functional_call(model, values, (), inputs), row.unsqueeze(0))[0]

    gradient_of, clip_state = clipped_grad(loss_of, clipping_norm=clip_norm, normalize_by=len(ids))
    noise_of, noise_state = gaussian_noise(noise_multiplier=noise, key=key(0)) if noise else (None, None)
    states = [clip_state, noise_state]

    def gradient():
        values = {name: parameter.detach() for name, parameter in named.items()}
        found, states[0] = gradient_of(values, ids, state=states[0])
        if noise_of is not None:
            found, states[1] = noise_of(found, states[1])
        for name, parameter in named.items():
            parameter.grad = found.pytree[name]

    def update():
        optimizer.step()
        optimizer.zero_grad()

    return Engine(list(named.values()), gradient, update)


ENGINES = {
    "plain": plain, "ours": ours, "opacus_hooks": opacus_hooks, "opacus_ghost": opacus_ghost, "opake": opake,
}  # fmt: skip


def by_hand(model, ids) -> tuple[list, list[float]]:
    """Gradients (rows, ...) of each trained parameter, each row forwarded alone, and the rows' norms."""
    import torch

    parameters, found = trained(model), []
    for row in ids:
        found.append(torch.autograd.grad(row_losses(model, row.unsqueeze(0)).sum(), parameters))
    norms = [torch.cat([part.flatten() for part in parts]).norm().item() for parts in found]
    return [torch.stack(parts) for parts in zip(*found, strict=True)], norms


def distance(engine: str, shape: Shape, train_a: bool) -> float:
    """How far an engine's gradient without noise is from sums of rows' gradients, clipped, over their number.

    Relative, over all tensors. The clipping norm lies between the rows' norms.
    """
    import torch

    ids = make_rows(shape)
    rows, norms = by_hand(make_model(shape, train_a), ids)
    clip_norm = sum(sorted(norms)[len(norms) // 2 - 1 : len(norms) // 2 + 1]) / 2
    weights = [1.0] * len(norms) if engine == "plain" else [min(1.0, clip_norm / norm) for norm in norms]
    weights = torch.tensor(weights, device=ids.device)
    made = ENGINES[engine](make_model(shape, train_a), ids, clip_norm, 0.0)
    made.gradient()
    gap = size = 0.0
    for parameter, parts in zip(made.parameters, rows, strict=True):
        wanted = torch.tensordot(weights, parts, 1) / len(ids)
        gap += (parameter.grad - wanted).square().sum().item()
        size += wanted.square().sum().item()
    return (gap / size) ** 0.5
