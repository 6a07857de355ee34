"""Which weights the reference is, and its log-probabilities for a whole dataset, through the cache on disk."""

from itertools import chain

import torch
from datasets import Dataset
from trl.models import prepare_deepspeed

from posttrain.log import get_logger
from posttrain.mechanisms.row_groups import CHOSEN, REJECTED
from posttrain.mechanisms.sequence_cache import ReferenceCache, forwarded, sequence_digest
from posttrain.paths import cache_dir
from posttrain.run.reference import batches_of, cached, kept, reference_key, with_columns


def precompute(trainer, dataset: Dataset, name: str, batch_size: int) -> Dataset:
    """Add `ref_chosen_logps` and `ref_rejected_logps` to a tokenised dataset, forwarding only what the cache lacks.

    A row has one answer on each side, its token ids, and a number for each; or lists of answers, and lists of numbers.
    Rows keep their order and the global random state is left alone, so a run with a warm cache equals one without.
    """
    if trainer.reference_key is None:
        # the reference never changes within a run, and its weights take seconds to read
        trainer.reference_key = _reference_key(trainer)
    cache = ReferenceCache(trainer.args.ref_cache_dir or cache_dir() / "reference_logps", trainer.reference_key)
    digests = [
        _row_digests(row, trainer.args) for row in dataset.select_columns(["prompt_ids", "chosen_ids", "rejected_ids"])
    ]
    known: dict[bytes, float] = cached(trainer, cache, [*chain(*digests)])
    missing = [i for i, row in enumerate(digests) if not known.keys() >= set(row)]
    if missing:
        if trainer._sharing.active and trainer._sharing.may_sort:
            missing.sort(key=lambda i: length_of(dataset[i]), reverse=True)
        with kept(trainer, cache) as keep:
            known |= _forward(trainer, dataset.select(missing), [digests[i] for i in missing], name, batch_size, keep)
    get_logger().info(
        "reference log-probabilities of %s: %d of %d pairs computed, the others cached",
        name,
        len(missing),
        len(dataset),
    )
    if len(dataset) and _are_several(dataset[0]["chosen_ids"]):
        cuts = [len(answers) for answers in dataset["chosen_ids"]]
        logps = [[known[digest] for digest in row] for row in digests]
        chosen = [row[:cut] for row, cut in zip(logps, cuts, strict=True)]
        rejected = [row[cut:] for row, cut in zip(logps, cuts, strict=True)]
    else:
        chosen, rejected = [known[chosen] for chosen, _ in digests], [known[rejected] for _, rejected in digests]
    return with_columns(dataset, {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected})


def _forward(
    trainer, rows: Dataset, digests: list[tuple[bytes, ...]], name: str, batch_size: int, keep
) -> dict[bytes, float]:
    """Compute the log-probs of each row's chosen answers, then of its rejected ones, by their digests; from all ranks.

    `keep`: is handed those of each batch.
    """
    model = trainer.ref_model if trainer.ref_model is not None else trainer.model
    if trainer.ref_model is None and trainer.is_deepspeed_enabled:
        # The policy is not prepared yet: an inference engine places its weights, or gathers them under ZeRO-3
        if trainer._precompute_engine is None:
            trainer._precompute_engine = prepare_deepspeed(trainer.model, trainer.accelerator)
        model = trainer._precompute_engine
    found, left, accelerator = {}, iter(digests), trainer.accelerator
    for batch in batches_of(trainer, rows, f"Reference log-probs ({name})", batch_size):
        sides = trainer.compute_ref_log_probs(model, batch)
        if "row_groups" in batch:
            groups = trainer.groups_of(batch)
            listed = [groups.lists(logps, sign) for logps, sign in zip(sides, (CHOSEN, REJECTED), strict=True)]
            own = [chosen + rejected for chosen, rejected in zip(*listed, strict=True)]
            gathered = accelerator.gather_for_metrics(own, use_gather_object=True)
        else:
            gathered = accelerator.gather_for_metrics(torch.stack(sides, dim=1)).float().tolist()
        fresh = {}
        for logps in gathered:
            fresh.update(zip(next(left), logps, strict=True))
        keep(fresh)
        found |= fresh
    return found


def length_of(row: dict) -> int:
    """Count the tokens of a tokenised row: those of its prompt, once, and of its answers."""
    return len(row["prompt_ids"]) + sum(map(len, _answer_ids(row)))


def _answer_ids(row: dict) -> list[list]:
    """Return the token ids of a row's answers: the chosen ones, then the rejected ones."""
    sides = row["chosen_ids"], row["rejected_ids"]
    return [answer for ids in sides for answer in (ids if _are_several(ids) else [ids])]


def _are_several(ids: list) -> bool:
    return bool(ids) and isinstance(ids[0], list)


def _row_digests(row: dict, args) -> tuple[bytes, ...]:
    prompt, answers = row["prompt_ids"], _answer_ids(row)
    keep_end, extra = args.truncation_mode == "keep_end", ""
    if args.ld_alpha is not None:
        # an answer's value depends on how many tokens of the others are scored; the first of a sequence never is
        cut = [forwarded(prompt, answer, args.max_length, keep_end) for answer in answers]
        extra = str(min(len(ids) - max(before, 1) for ids, before in cut))
    return tuple(sequence_digest(prompt, answer, args.max_length, extra, keep_end) for answer in answers)


def _reference_key(trainer) -> str:
    model = trainer.ref_model if trainer.ref_model is not None else trainer.model
    adapters = set(getattr(model, "peft_config", {})) - {"ref"}
    facts = {"ld_alpha": trainer.args.ld_alpha, "truncation_mode": trainer.args.truncation_mode}
    if adapters and "ref" in model.peft_config:
        facts["adapter"] = str(model.peft_config["ref"].to_dict())
    return reference_key(trainer, model, adapters, facts)
