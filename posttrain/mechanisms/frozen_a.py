"""A LoRA of which B alone is trained, on an A with orthonormal rows."""

import torch
from peft.tuners.lora import LoraLayer
from torch import nn


@torch.no_grad()
def freeze_a(model: nn.Module, seed: int) -> None:
    """Freeze A of a LoRA; where B is still zero, give it orthonormal rows first, which leaves the model as it is.

    A is the same on every rank and every machine of one kind: it is drawn by `seed` on the CPU.

    Source: arXiv 2403.12313 (a frozen A, for private and federated training).
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        for adapter, down in module.lora_A.items():
            if not down.weight.requires_grad:
                continue
            if not module.lora_B[adapter].weight.any():
                drawn = torch.randn(*down.weight.shape, generator=generator, dtype=torch.float64)
                # of a rank above the width the columns are orthonormal
                wide = drawn.size(1) >= drawn.size(0)
                made = torch.linalg.qr(drawn.T if wide else drawn).Q
                down.weight.copy_(made.T if wide else made)
            down.weight.requires_grad_(False)
