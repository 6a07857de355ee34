"""What is measured of a model after a cell of dp.py."""

import math

import torch


def facts_of(trainer) -> dict:
    """What a private run was: its noise, what it spent, how much was clipped, and the bound of an audit."""
    plan, log = trainer._private.plan, trainer.state.log_history
    found = {"steps": trainer.state.global_step, "noise_multiplier": round(plan.noise_multiplier or 0.0, 4)}
    for name in ("clipped_fraction", "gradient_norm", "units"):
        values = [entry[f"private/{name}"] for entry in log if f"private/{name}" in entry]
        found[name] = round(sum(values) / len(values), 4) if values else None
    spent = [entry["privacy/epsilon"] for entry in log if "privacy/epsilon" in entry]
    found["epsilon"] = round(spent[-1], 4) if spent else None
    canaries = trainer._private.canaries
    if canaries is not None:
        made = canaries.result(trainer.args.target_delta)
        found["audit_bound"] = round(made.lower_bound, 4)
        found |= {"audit_right": made.right, "audit_guesses": made.guesses}
    return found


@torch.no_grad()
def exposures(model, tokenizer, secrets: list[dict], batch: int = 64) -> list[float]:
    """The exposure of each secret in bits: log2 of the number of candidates less log2 of the secret's rank.

    The candidates are the secret and `others` to the same prompt, ordered by the loss of their tokens. Those that the
    model holds as likely as the secret count half: a model that knows nothing gives none of them away.
    """
    found, rows, place = [], _tokenised(tokenizer, secrets), 0
    for secret in secrets:
        answers = rows[place : place + 1 + len(secret["others"])]
        place += len(answers)
        losses = answer_losses(model, answers, batch)
        own, others = losses[0], losses[1:]
        rank = 1 + (others < own).sum().item() + (others == own).sum().item() / 2
        found.append(round(math.log2(len(losses)) - math.log2(rank), 4))
    return found


@torch.no_grad()
def answer_losses(model, rows: list[tuple[list[int], list[int]]], batch: int = 64) -> torch.Tensor:
    """Negative log-likelihood of each answer, summed over its tokens, in nats.

    rows: tokens of the prompt, the same in all, and of the answer. The prompt is forwarded once for each batch.
    """
    start, rows = rows[0][0], [answer for _, answer in rows]
    found = []
    for place in range(0, len(rows), batch):
        part = rows[place : place + batch]
        width = max(map(len, part))
        # what stands behind an answer is seen by nothing before it
        ids = torch.tensor([row + [0] * (width - len(row)) for row in part])
        real = torch.arange(width) < torch.tensor([len(row) for row in part]).unsqueeze(1)
        begun = model(input_ids=torch.tensor([start]), use_cache=True)
        cache = begun.past_key_values
        cache.batch_repeat_interleave(len(part))
        first = begun.logits[:, -1:].expand(len(part), -1, -1)
        later = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, :-1]
        logps = torch.cat([first, later], dim=1).float().log_softmax(-1)
        taken = logps.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        found.append(-torch.where(real, taken, 0.0).sum(dim=1).double())
    return torch.cat(found)


def _tokenised(tokenizer, secrets: list[dict]) -> list[tuple[list[int], list[int]]]:
    """Tokens of the prompt and of each answer with its end, as the trainer has them: the secret, then the others."""
    from evidence.noise import first_label, tokenised

    texts = [
        {"prompt": secret["prompt"], "completion": answer}
        for secret in secrets
        for answer in (secret["completion"], *secret["others"])
    ]
    found = [
        (row["input_ids"][: first_label(row)], row["input_ids"][first_label(row) :])
        for row in tokenised(texts, tokenizer)
    ]
    place = 0
    for secret in secrets:
        part = found[place : place + 1 + len(secret["others"])]
        place += len(part)
        if any(start != part[0][0] for start, _ in part):
            raise RuntimeError("the tokens of a prompt differ with the answer behind it")
    return found
