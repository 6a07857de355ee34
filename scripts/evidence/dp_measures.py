"""What is measured of a model after a cell of dp.py."""

import math

import torch


def facts_of(trainer) -> dict:
    """What a private run was: its noise, what it spent, how much was clipped, and the audit's bound where it has one."""
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
    found = []
    for secret in secrets:
        losses = answer_losses(model, tokenizer, secret["prompt"], [secret["completion"], *secret["others"]], batch)
        own, others = losses[0], losses[1:]
        rank = 1 + (others < own).sum().item() + (others == own).sum().item() / 2
        found.append(round(math.log2(len(losses)) - math.log2(rank), 4))
    return found


@torch.no_grad()
def answer_losses(model, tokenizer, prompt, answers: list, batch: int) -> torch.Tensor:
    """Negative log-likelihood of each answer to one prompt, summed over its tokens and the end of it, in nats.

    The prompt is forwarded once for each batch of answers.
    """
    start, rows = _tokenised(tokenizer, prompt, answers)
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


def _tokenised(tokenizer, prompt, answers: list) -> tuple[list[int], list[list[int]]]:
    """Tokens of the prompt, and of each answer with its end, as the trainer has them."""
    from evidence.noise import first_label, tokenised

    rows = tokenised([{"prompt": prompt, "completion": answer} for answer in answers], tokenizer)
    starts = {tuple(row["input_ids"][: first_label(row)]) for row in rows}
    if len(starts) != 1:
        raise RuntimeError(f"the tokens of a prompt are {len(starts)} sequences behind different answers")
    return list(starts.pop()), [row["input_ids"][first_label(row) :] for row in rows]
