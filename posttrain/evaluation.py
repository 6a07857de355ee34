"""Scoring preference pairs with a model, outside training."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from posttrain.errors import ConfigError

if TYPE_CHECKING:
    import torch


class PairScores(NamedTuple):
    """Summed log-probabilities in nats of both sides of each pair, (N,) fp32, in the data set's order."""

    chosen: torch.Tensor
    rejected: torch.Tensor

    @property
    def margins(self) -> torch.Tensor:
        """(N,) how much likelier the chosen side is, in nats."""
        return self.chosen - self.rejected


def score_pairs(model, tokenizer, dataset, batch_size: int = 16, progress=None) -> PairScores:
    """Return the log-probability of the chosen and rejected answer of each pair, given its prompt, summed over its
    tokens.

    Tokens are TRL's own for DPO: the chat template and the end-of-turn token included. Pairs are sorted
    by length before batching, and both sides of one share their prompt where the model allows; the logits of a
    whole sequence are never held. The result does not depend on `batch_size`, but for rounding. Runs in eval
    mode, without gradient, and leaves the model's mode as it was.

    `model`: a causal language model or a PeftModel. `dataset`: preference rows, or the rows TRL makes of them (with
    prompt_ids, chosen_ids and rejected_ids), as a `datasets.Dataset` or a list of dicts. `batch_size`: sequences a
    batch. `progress`: called with the number of sequences done after each batch.
    """
    import torch
    from datasets import Dataset
    from trl.trainer.utils import add_fused_lm_head

    from posttrain.data.tokens import tokenized_pairs
    from posttrain.mechanisms import prefix_sharing
    from posttrain.mechanisms.own_head import Head, is_adapted

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if isinstance(dataset, list):
        dataset = Dataset.from_list(dataset)
    rows = list(tokenized_pairs(dataset, tokenizer))
    sides = ("chosen_ids", "rejected_ids")
    order = sorted(range(len(rows)), key=lambda i: -sum(len(rows[i][side]) for side in ("prompt_ids", *sides)))
    scores, size = torch.empty(2, len(rows)), max(batch_size // 2, 1)

    if base.config.is_encoder_decoder:
        raise ConfigError(
            f"the model is a {type(base).__name__}, an encoder-decoder; a causal language model is needed."
        )
    training, own_forward = model.training, vars(base).get("forward")
    model.eval()
    add_fused_lm_head(base)
    Head(base).choose(model, base.config.get_text_config().vocab_size, model.device, is_adapted(base))
    shares = (
        prefix_sharing.unsupported_reason(base.config, base, peft_config=getattr(model, "active_peft_config", None))
        is None
    )
    if shares:
        prefix_sharing.share_prefixes(base)
        *gaps, trouble = prefix_sharing.compare_padded_and_packed(model, base.config, model.device)
        half = {parameter.dtype for parameter in model.parameters()} != {torch.float32}
        shares = trouble is None and prefix_sharing.mismatch_reason(*gaps, half) is None
        window = prefix_sharing.sliding_window(base.config)
    try:
        with torch.no_grad():
            for start in range(0, len(order), size):
                own = order[start : start + size]
                batch = _padded([(rows[i]["prompt_ids"], rows[i][side]) for side in sides for i in own], model.device)
                if shares and not (window and batch["input_ids"].size(1) > window):
                    batch["packed"] = prefix_sharing.pack_padded(
                        batch["input_ids"],
                        batch["attention_mask"],
                        batch["labels"],
                        attention_cost=prefix_sharing.attention_cost(base.config),
                    )
                log_probs = model(**batch, fused_lm_head=True).log_probs
                scores[:, own] = log_probs.float().sum(dim=1).view(2, -1).cpu()
                if progress is not None:
                    progress(2 * len(own))
    finally:
        model.train(training)
        if own_forward is None:
            del base.forward
        else:
            base.forward = own_forward
    return PairScores(*scores)


def _padded(sequences: list[tuple[list[int], list[int]]], device) -> dict:
    import torch

    width = max(len(prompt) + len(answer) for prompt, answer in sequences)
    input_ids = torch.zeros(len(sequences), width, dtype=torch.long)
    attention_mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, -100)
    for row, (prompt, answer) in enumerate(sequences):
        length = len(prompt) + len(answer)
        input_ids[row, :length] = torch.tensor(prompt + answer)
        attention_mask[row, :length] = 1
        labels[row, len(prompt) : length] = input_ids[row, len(prompt) : length]
    return {
        "input_ids": input_ids.to(device),
        "attention_mask": attention_mask.to(device),
        "labels": labels.to(device),
    }
