"""The least time a CUDA card could take for a training step: by its arithmetic, and by reading the weights."""

# bf16 operations (dense) and bytes a second that the makers state, by a part of the card's name
_CARDS = {
    "H200": (989e12, 4.8e12),
    "H100": (989e12, 3.35e12),
    "A100": (312e12, 2.0e12),
    "L40S": (362e12, 0.864e12),
    "L4": (121e12, 0.3e12),
}


def weights(model) -> tuple[int, int]:
    """Weights of the backbone's linear layers, and of the LM head."""
    layers = sum(p.numel() for name, p in model.base_model.named_parameters() if p.dim() == 2 and "embed" not in name)
    return layers, model.get_output_embeddings().weight.numel()


def operations(layers: int, head: int, tokens: float, scored: float, live: bool) -> float:
    """Operations of a step with LoRA, attention and the adapter left out.

    Base weights get no gradient, so the backward costs what the forward does, the head's once more as much, for it
    computes its logits again. `tokens` and `scored` count all forwards: half are the reference's where that is live.
    """
    policy = 0.5 if live else 1.0
    forward = 2 * (layers * tokens + head * scored)
    return forward + policy * (2 * layers * tokens + 4 * head * scored)


def add_floors(rows: list[dict], card: str) -> None:
    """Add to each row the share of both floors that its median step reaches; the least tokens of all rows count.

    Nothing is added for a card whose figures are not known here.
    """
    import torch
    from bench.pairs import load_model

    known = [figures for name, figures in _CARDS.items() if name in card]
    if not known:
        return
    rate, bandwidth = known[0]
    layers, head = weights(load_model(rows[0]["model"], "sdpa", torch.bfloat16))
    live = rows[0]["reference"] == "live"
    tokens, scored = (min(row[name] for row in rows) for name in ("tokens_forwarded", "tokens_scored"))
    arithmetic = operations(layers, head, tokens, scored, live) / rate
    reads = rows[0]["accumulation"] * (3 if live else 2)
    reading = 2 * (layers + head) * reads / bandwidth
    for row in rows:
        row["share_of_arithmetic_floor"] = round(arithmetic / row["seconds"][0], 4)
        row["share_of_bandwidth_floor"] = round(reading / row["seconds"][0], 4)
