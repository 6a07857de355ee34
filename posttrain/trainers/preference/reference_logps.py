"""Which weights the reference is, and its log-probabilities for a whole dataset, through the cache on disk."""

import torch
from datasets import Dataset
from trl.models import prepare_deepspeed

from posttrain.log import get_logger
from posttrain.mechanisms.sequence_cache import ReferenceCache, forwarded, sequence_digest
from posttrain.paths import cache_dir
from posttrain.run.reference import add_to_cache, batches_of, cached, reference_key, with_columns


def precompute(trainer, dataset: Dataset, name: str, batch_size: int) -> Dataset:
    """Add `ref_chosen_logps` and `ref_rejected_logps` to a tokenised dataset, forwarding only what the cache lacks.

    Rows keep their order and the global random state is left alone, so a run with a warm cache equals one without.
    """
    if trainer.reference_key is None:
        # the reference never changes within a run, and its weights take seconds to read
        trainer.reference_key = _reference_key(trainer)
    cache = ReferenceCache(trainer.args.ref_cache_dir or cache_dir() / "reference_logps", trainer.reference_key)
    digests = [
        _row_digests(row, trainer.args) for row in dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    ]
    known: dict[bytes, float] = cached(trainer, cache, [digest for pair in digests for digest in pair])
    missing = [i for i, pair in enumerate(digests) if pair[0] not in known or pair[1] not in known]
    if missing:
        if trainer._sharing.active and trainer._sharing.may_sort:
            missing.sort(key=lambda i: length_of(dataset[i]), reverse=True)
        chosen, rejected = _forward(trainer, dataset.select(missing), name, batch_size)
        fresh = {}
        for i, chosen_logp, rejected_logp in zip(missing, chosen, rejected, strict=True):
            fresh[digests[i][0]], fresh[digests[i][1]] = chosen_logp, rejected_logp
        known.update(fresh)
        add_to_cache(trainer, cache, fresh)
    get_logger().info(
        "reference log-probabilities of %s: %d of %d pairs computed, the others cached",
        name,
        len(missing),
        len(dataset),
    )
    return with_columns(
        dataset,
        {
            "ref_chosen_logps": [known[chosen] for chosen, _ in digests],
            "ref_rejected_logps": [known[rejected] for _, rejected in digests],
        },
    )


def _forward(trainer, rows: Dataset, name: str, batch_size: int) -> tuple[list[float], list[float]]:
    model = trainer.ref_model if trainer.ref_model is not None else trainer.model
    if trainer.ref_model is None and trainer.is_deepspeed_enabled:
        # The policy is not prepared yet: an inference engine places its weights, or gathers them under ZeRO-3
        if trainer._precompute_engine is None:
            trainer._precompute_engine = prepare_deepspeed(trainer.model, trainer.accelerator)
        model = trainer._precompute_engine
    gathered = []
    for batch in batches_of(trainer, rows, f"Reference log-probs ({name})", batch_size):
        logps = torch.stack(trainer.compute_ref_log_probs(model, batch), dim=1)
        gathered.append(trainer.accelerator.gather_for_metrics(logps).float().cpu())
    chosen, rejected = torch.cat(gathered).unbind(dim=1)
    return chosen.tolist(), rejected.tolist()


def length_of(row: dict) -> int:
    return len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])


def _row_digests(row: dict, args) -> tuple[bytes, bytes]:
    prompt, sides = row["prompt_ids"], (row["chosen_ids"], row["rejected_ids"])
    keep_end, extra = args.truncation_mode == "keep_end", ""
    if args.ld_alpha is not None:
        # a side's value depends on how many tokens of the other are scored; the first of a sequence never is
        cut = [forwarded(prompt, side, args.max_length, keep_end) for side in sides]
        extra = str(min(len(ids) - max(before, 1) for ids, before in cut))
    return tuple(sequence_digest(prompt, side, args.max_length, extra, keep_end) for side in sides)


def _reference_key(trainer) -> str:
    model = trainer.ref_model if trainer.ref_model is not None else trainer.model
    adapters = set(getattr(model, "peft_config", {})) - {"ref"}
    facts = {"ld_alpha": trainer.args.ld_alpha, "truncation_mode": trainer.args.truncation_mode}
    if adapters and "ref" in model.peft_config:
        facts["adapter"] = str(model.peft_config["ref"].to_dict())
    return reference_key(trainer, model, adapters, facts)
