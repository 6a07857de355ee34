"""The starting model's per-token log-probabilities of tokenised answers, through the cache on disk; no second model.

The reference of offline training is the model as the run begins with it. An adapter that is new is the identity then,
so it is turned off; one that was trained before, and every other kind of weights, is forwarded as it stands, before
the first step.
"""

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset

from posttrain.errors import ConfigError
from posttrain.log import get_logger
from posttrain.mechanisms.sequence_cache import TokenCache, sequence_digest
from posttrain.paths import cache_dir
from posttrain.run.reference import (
    batches_of,
    cached,
    frozen,
    kept,
    reference_key,
    with_columns,
    zero_margin_tolerance,
)

COLUMN = "ref_logps"


def describe(trainer) -> str:
    """Say in one line which weights the reference is."""
    if trainer.adapter_is_new:
        return "the base model, with the adapter off"
    if is_peft_model(trainer.model):
        return "the model with its adapter as the run began"
    return "the model as the run began"


def check_policy_is_reference(trainer, gap: float) -> None:
    """Raise ConfigError if the policy differs from the reference before the first step by more than rounding.

    `gap`: what `gap_at_start` found, in nats per token.
    """
    tolerance, dtype = zero_margin_tolerance(trainer.model, trainer.accelerator)
    if not gap <= tolerance:
        raise ConfigError(
            f"the policy differs from its own start by {gap:.3g} nats per token before the first step (tolerance "
            f"{tolerance:g} in {dtype}). The reference is: {describe(trainer)}; it was "
            "read when the trainer was built. If the weights were changed since, build the trainer afterwards; if this "
            "is intended, set `check_reference: false`."
        )


def precompute(trainer, dataset: Dataset, name: str, batch_size: int) -> Dataset:
    """Add `ref_logps` to a tokenised dataset: a list for each row, one number for each token of its answer.

    Only rows that the cache lacks are forwarded. Rows keep their order and the global random state is left alone, so a
    run with a warm cache equals one without.
    """
    digests = [_digest(row) for row in dataset.select_columns(["input_ids", "labels"])]
    if trainer.reference_key is None:
        # the weights take seconds to read, and only the first call is sure to see those of the start
        trainer.reference_key = _reference_key(trainer)
    cache = TokenCache(trainer.args.ref_cache_dir or cache_dir() / "reference_logps", trainer.reference_key)
    known = cached(trainer, cache, digests)
    first = {digest: i for i, digest in reversed(list(enumerate(digests)))}
    missing = [i for digest, i in first.items() if digest not in known]
    lengths = [len(ids) for ids in dataset["input_ids"]]
    # like lengths together: less padding
    missing.sort(key=lambda i: (lengths[i], i), reverse=True)
    if missing:
        if trainer.has_trained and not trainer.adapter_is_new:
            raise ConfigError(
                f"{name} came after training had begun, when the reference's weights ({describe(trainer)}) are gone. "
                "Give it to the trainer's constructor as `eval_dataset`."
            )
        with kept(trainer, cache) as keep:
            known |= _forward(trainer, dataset.select(missing), [digests[i] for i in missing], name, batch_size, keep)
    get_logger().info(
        "reference log-probabilities of %s: %d of %d answers computed, the others cached",
        name, len(missing), len(dataset),
    )  # fmt: skip
    return with_columns(dataset, {COLUMN: [known[digest].tolist() for digest in digests]})


def _forward(
    trainer, rows: Dataset, digests: list[bytes], name: str, batch_size: int, keep
) -> dict[bytes, torch.Tensor]:
    """Compute the token log-probs of each row's answer, by its digest, from all ranks.

    `keep`: is handed those of each batch.
    """
    lengths = [sum(label != -100 for label in labels[1:]) for labels in rows["labels"]]
    found, left = {}, zip(digests, lengths, strict=True)
    accelerator = trainer.accelerator
    with frozen(trainer) as model:
        for batch in batches_of(trainer, rows, f"Reference log-probs ({name})", batch_size):
            logps, mask = trainer.score(model, batch)
            # answers to the front of their rows: a stable sort of what is not answer to the end
            order = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
            logps = accelerator.pad_across_processes(logps.float().gather(1, order), dim=1)
            rows_of_all = accelerator.gather_for_metrics(logps).cpu().unbind(0)
            fresh = {}
            for row in rows_of_all:
                digest, length = next(left)
                fresh[digest] = row[:length].clone()
            keep(fresh)
            found |= fresh
    return found


def _digest(row: dict) -> bytes:
    answer = next((i for i, label in enumerate(row["labels"]) if label != -100), len(row["labels"]))
    return sequence_digest(row["input_ids"][:answer], row["input_ids"][answer:], None)


def _reference_key(trainer) -> str:
    model = trainer.model
    adapters, facts = set(getattr(model, "peft_config", {})), {}
    if adapters and not trainer.adapter_is_new:
        facts["adapter"] = {name: str(value.to_dict()) for name, value in sorted(model.peft_config.items())}
    return reference_key(trainer, model, adapters if trainer.adapter_is_new else (), facts)
