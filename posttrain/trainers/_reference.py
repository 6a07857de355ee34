"""Which weights the reference is, and its log-probabilities for a whole dataset, through the cache on disk."""

import json
from collections.abc import Iterable

import torch
import transformers
import xxhash
from accelerate.utils import broadcast_object_list, gather_object, is_peft_model
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from trl.models import prepare_deepspeed

from posttrain.log import get_logger
from posttrain.mechanisms.reference_cache import ReferenceCache, forwarded, sequence_digest, weights_digest
from posttrain.paths import cache_dir


def describe(trainer) -> str:
    """One line that says which weights the reference is."""
    if trainer._reference_is_given:
        return "the given ref_model"
    if is_peft_model(trainer.model):
        if "ref" in trainer.model.peft_config:
            return "a frozen copy of the adapter as it began (`ref`)"
        return "the base model, with the adapter off"
    if trainer.ref_model is not None:
        return f"the model as loaded from {trainer.model.config._name_or_path}"
    return "the model before its first step (log-probabilities precomputed)"


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
    # Ranks may not share a disk, and may see it at different moments: rank 0 looks, all follow
    shared = [cache.load() if trainer.accelerator.is_main_process else None]
    broadcast_object_list(shared, from_process=0)
    known: dict[bytes, float] = shared[0]
    missing = [i for i, pair in enumerate(digests) if pair[0] not in known or pair[1] not in known]
    if missing:
        if trainer._sharing.active and trainer._sharing.may_sort:
            missing.sort(key=lambda i: length_of(dataset[i]), reverse=True)
        chosen, rejected = _forward(trainer, dataset.select(missing), name, batch_size)
        fresh = {}
        for i, chosen_logp, rejected_logp in zip(missing, chosen, rejected, strict=True):
            fresh[digests[i][0]], fresh[digests[i][1]] = chosen_logp, rejected_logp
        known.update(fresh)
        if trainer.accelerator.is_main_process:
            try:
                cache.add(fresh)
            except OSError as error:
                get_logger().warning("reference log-probabilities were not cached: %s", error)
    get_logger().info(
        "reference log-probabilities of %s: %d of %d pairs computed, the others cached",
        name,
        len(missing),
        len(dataset),
    )
    for column in ("ref_chosen_logps", "ref_rejected_logps"):
        if column in dataset.column_names:
            dataset = dataset.remove_columns(column)
    dataset = dataset.add_column("ref_chosen_logps", [known[chosen] for chosen, _ in digests])
    return dataset.add_column("ref_rejected_logps", [known[rejected] for _, rejected in digests])


def _forward(trainer, rows: Dataset, name: str, batch_size: int) -> tuple[list[float], list[float]]:
    # An own generator: a DataLoader otherwise draws from the global one
    loader = DataLoader(rows, batch_size, collate_fn=trainer.data_collator, generator=torch.Generator())
    loader = trainer.accelerator.prepare_data_loader(loader)
    model = trainer.ref_model if trainer.ref_model is not None else trainer.model
    if trainer.ref_model is None and trainer.is_deepspeed_enabled:
        # The policy is not prepared yet: an inference engine places its weights, or gathers them under ZeRO-3
        if trainer._precompute_engine is None:
            trainer._precompute_engine = prepare_deepspeed(trainer.model, trainer.accelerator)
        model = trainer._precompute_engine
    gathered = []
    hidden = trainer.args.disable_tqdm or not trainer.accelerator.is_main_process
    for batch in tqdm(loader, desc=f"Reference log-probs ({name})", disable=hidden):
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


def reference_key(trainer, model, skip_adapters: Iterable[str], facts: dict) -> str:
    """A digest of everything but the rows that affects a reference log-probability; all ranks call it.

    Args:
        model: the one that is forwarded, without the adapters of `skip_adapters`.
        facts: what else the values depend on, by name.
    """
    weights = gather_object([weights_digest(model, skip_adapters=skip_adapters)])
    config = json.loads(model.config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "transformers_version", "pad_token_id"):
        config.pop(name, None)
    facts = facts | {
        "weights": weights,
        "config": config,
        "attention": model.config._attn_implementation,
        "precision": [trainer.accelerator.mixed_precision, str(model.dtype)],
        "device": trainer.accelerator.device.type,
        # equal to rounding only, and `never` is to equal TRL's numbers bit for bit
        "prefix_sharing": trainer._sharing.active,
        "versions": [torch.__version__, transformers.__version__],
    }
    return xxhash.xxh3_128_hexdigest(json.dumps(facts, sort_keys=True, default=str).encode())
