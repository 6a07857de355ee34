"""What GRPO-style trainers are given here: advantages by any function of a group, steps without zero-advantage rows.

TRL computes advantages inline. The trainers keep the gathered reward matrix as TRL returns it, and replace the
advantages afterwards; the functions here are the arithmetic in between.

A row whose advantage is zero has no gradient, as long as the loss has no KL, entropy or auxiliary term.
`pack_kept_rows` moves the others of an optimiser step into the fewest micro-batches. What is left of the
step's micro-batches is a single row of a few tokens, so that all ranks run the same number of forwards, and TRL's
division by rows or tokens is undone in the advantages, so that the gradient is what it was.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from posttrain.errors import ConfigError

# Tensors of a rollout batch by the place that pads: prompts on the left, completions on the right
_PROMPT = ("prompt_ids", "prompt_mask")
# Loss types that divide a micro-batch by its rows, and by its tokens; the others divide by a count of the whole step
_BY_ROWS = {"grpo", "sapo", "dr_grpo", "luspo"}
_BY_TOKENS = {"bnpo"}
LOSS_TYPES = _BY_ROWS | _BY_TOKENS | {"dapo", "cispo", "vespo"}


def weighted_rewards(per_function: Tensor, weights: Tensor) -> Tensor:
    """Sum the (N, F) rewards of F functions, NaN where one gave none, by weight to (N,); NaN where all gave none."""
    rewards = (per_function * weights.to(per_function.device).unsqueeze(0)).nansum(dim=1)
    rewards[torch.isnan(per_function).all(dim=1)] = torch.nan
    return rewards


def group_advantages(
    rewards: Tensor,
    group_size: int,
    advantage: Callable[[Tensor], Tensor],
    name: str = "the advantage function",
) -> Tensor:
    """Compute (N,) advantages of (N,) rewards whose rows are in groups of `group_size`.

    Args:
        advantage: (prompts, group_size) -> (prompts, group_size); NaN rewards are unscorable, their advantage is 0.
        name: of the function, for messages.

    Raises:
        ConfigError: (a ValueError) the function raised, or returned another shape, or a value that is not finite for a
            scorable reward.
    """
    grouped = rewards.view(-1, group_size)
    try:
        # a copy: a function that works in place leaves the rewards as they are
        values = advantage(grouped.clone())
    except Exception as error:
        raise ConfigError(
            f"{name} raised {type(error).__name__}: {error}, for rewards of shape {tuple(grouped.shape)}"
        ) from error
    if not isinstance(values, Tensor) or values.shape != grouped.shape:
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ConfigError(
            f"{name} returned {shape} for rewards of shape {tuple(grouped.shape)}; it must return as many advantages"
        )
    values = values.detach().to(rewards.dtype)
    scorable = ~torch.isnan(grouped)
    if not torch.isfinite(values[scorable]).all():
        raise ConfigError(f"{name} returned NaN or infinity for a reward that is a number")
    return values.masked_fill(~scorable, 0.0).view(-1)


def rows_with_gradient(batch: dict) -> Tensor:
    """Return which rows (B,) of a rollout batch have a gradient."""
    advantages, mask = batch["advantages"], batch["completion_mask"]
    if "tool_mask" in batch:
        mask = mask * batch["tool_mask"]
    if advantages.dim() == 1:
        return (advantages != 0) & mask.bool().any(dim=1)
    return ((advantages != 0) & mask.bool()).any(dim=1)


def loss_tokens(batch: dict) -> Tensor:
    """Count the tokens of each row (B,) of a rollout batch that are in the loss."""
    mask = batch["completion_mask"]
    return (mask * batch["tool_mask"] if "tool_mask" in batch else mask).sum(dim=1)


def pack_kept_rows(
    batches: list[dict], loss_type: str, max_over_ranks: Callable[[int], int] = int, by_prompt: bool = False
) -> list[dict]:
    """Pack an optimiser step's rows that have a gradient into as few of its micro-batches as they fit.

    Args:
        batches: rollout micro-batches of equal size, tensors (B, P) left-padded for prompts and (B, T) right-padded for
            completions, (B,) or (B, T) advantages, and scalars that are the same in all of them.
        loss_type: TRL's; says what the micro-batch is divided by.
        max_over_ranks: all-reduce max, so that every rank builds equally large micro-batches, some of them empty.
        by_prompt: put rows of one prompt beside each other, so that a micro-batch computes few prompts; TRL deals the
            rows of a generation at random.

    Returns:
        As many micro-batches. Rows that only fill up have an empty completion mask and no weight.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type {loss_type!r} is not one of {', '.join(sorted(LOSS_TYPES))}")
    size = batches[0]["completion_ids"].size(0)
    rows = _stack(batches)
    kept = rows_with_gradient(rows).nonzero().squeeze(1)
    if by_prompt:
        kept = kept[_order_by_prompt(rows, kept)]
    counts = _counts(max_over_ranks(len(kept)), size, len(batches))
    tokens = loss_tokens(rows)
    # what a row's loss was divided by, beside the number of micro-batches
    before = torch.cat([loss_tokens(batch).sum().clamp(min=1).expand(size) for batch in batches])
    packed, start = [], 0
    for number, count in enumerate(counts):
        own = kept[start : start + count]
        start += len(own)
        batch = _take(rows, own, count)
        scale = torch.ones(count, dtype=rows["advantages"].dtype, device=tokens.device)
        if loss_type in _BY_ROWS:
            scale[: len(own)] = count / size
        elif loss_type in _BY_TOKENS:
            scale[: len(own)] = tokens[own].sum().clamp(min=1) / before[own]
        batch["advantages"] *= scale if batch["advantages"].dim() == 1 else scale.unsqueeze(1)
        packed.append(batches[number] | batch)
    return packed


def _order_by_prompt(rows: dict, kept: Tensor) -> Tensor:
    """Return the order of `kept` in which rows of one prompt follow each other, prompts in that of their first row."""
    prompts = (rows["prompt_ids"] * rows["prompt_mask"])[kept].cpu().numpy()
    first: dict[bytes, int] = {}
    numbers = [first.setdefault(prompt.tobytes(), place) for place, prompt in enumerate(prompts)]
    return torch.tensor(sorted(range(len(numbers)), key=numbers.__getitem__), dtype=torch.long, device=kept.device)


def _counts(kept: int, size: int, batches: int) -> list[int]:
    """Return the rows of each micro-batch: full ones, the rest, then single rows that only keep ranks in step."""
    counts = [min(size, kept - size * i) for i in range(batches) if kept > size * i]
    return counts + [1] * (batches - len(counts))


def _is_per_row(key: str, value, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.size(0) == rows and key != "num_items_in_batch"


def _stack(batches: list[dict]) -> dict:
    size, stacked = batches[0]["completion_ids"].size(0), {}
    for key, value in batches[0].items():
        if not _is_per_row(key, value, size):
            continue
        parts = [batch[key] for batch in batches]
        if value.dim() == 2:
            widest = max(part.size(1) for part in parts)
            gaps = [widest - part.size(1) for part in parts]
            sides = [(gap, 0) if key in _PROMPT else (0, gap) for gap in gaps]
            parts = [torch.nn.functional.pad(part, side) for part, side in zip(parts, sides, strict=True)]
        stacked[key] = torch.cat(parts)
    return stacked


def _take(rows: dict, own: Tensor, count: int) -> dict:
    """Take rows `own`, and fill up to `count` with copies without completion and all but a prompt token; trimmed."""
    index = torch.cat([own, own.new_zeros(count - len(own))])
    filled = torch.arange(count, device=index.device) < len(own)
    batch = {key: value[index].clone() for key, value in rows.items()}
    batch["completion_mask"][~filled] = 0
    batch["prompt_mask"][~filled, :-1] = 0
    batch["prompt_mask"][~filled, -1] = 1
    batch["advantages"][~filled] = 0
    if "importance_sampling_ratio" in batch:
        batch["importance_sampling_ratio"][~filled] = 1
    prompt_width = max(1, int(batch["prompt_mask"].sum(dim=1).max()))
    # not 1, which TRL's metrics take for a value a row, whatever the mask
    completion_width = max(2, int(batch["completion_mask"].sum(dim=1).max()))
    for key, value in batch.items():
        if value.dim() == 2:
            batch[key] = value[:, -prompt_width:] if key in _PROMPT else value[:, :completion_width]
    return batch
