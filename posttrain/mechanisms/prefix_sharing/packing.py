"""Packing: answers to one prompt in one row, several prompts in one row, and the way back.

A row of the packed batch holds one or more blocks, a block being `prompt | answer 1 | answer 2 | ...`. Each answer's
positions continue those of the prompt. A token sees the tokens of its own block that come before it and belong to the
prompt or to its own answer, nothing else; so every answer sees what it would see in a row of its own.

The token after a prompt is predicted by the prompt's last token, whatever the answer. That state is read once per
answer, so no token has to be repeated in front of an answer and none can be seen twice.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

_TRUNK, _PADDING = 0, -1
# of a model with 135M parameters; larger ones have less
ATTENTION_COST = 3e-4
# more padding than this only where there is no other way
_PADDING_SHARE = 0.1


@dataclass
class PackedBatch:
    """Holds a batch in packed form, and how its results map back to the padded one.

    R packed rows of W tokens hold N tokens that are predicted and scored. The caller's batch has B rows of L tokens.

    Attributes:
        input_ids, position_ids: (R, W).
        blocks: (R, W) number of the block that a token belongs to, -1 for padding.
        branches: (R, W) 0 for a token of the prompt, k for one of its block's k-th answer.
        sources: (N,) index into R * W of the token whose state predicts each scored token.
        labels: (N,) the scored tokens.
        targets: (N,) index into B * (L - 1), the place of each score in the caller's batch.
        shape: (B, L - 1).
        tokens: packed tokens that are not padding.
        unshared: groups whose prompts differ, so that their answers stand alone.
        longest: tokens of the longest prompt with one of its answers.
    """

    input_ids: Tensor
    position_ids: Tensor
    blocks: Tensor
    branches: Tensor
    sources: Tensor
    labels: Tensor
    targets: Tensor
    shape: tuple[int, int]
    tokens: int
    unshared: int
    longest: int
    _masks: dict = field(default_factory=dict, repr=False)

    @property
    def forwarded(self) -> int:
        """Count the tokens that the model computes, padding included."""
        return self.input_ids.numel()

    def to(self, device, **kwargs) -> "PackedBatch":
        """Copy the batch to another device."""
        names = ("input_ids", "position_ids", "blocks", "branches", "sources", "labels", "targets")
        moved = {name: getattr(self, name).to(device, **kwargs) for name in names}
        return PackedBatch(**moved, **{n: getattr(self, n) for n in ("shape", "tokens", "unshared", "longest")})

    def visible(self) -> Tensor:
        """Return (R, 1, W, W) bool: whether the token of the row (third dimension) sees that of the column."""
        if "bool" not in self._masks:
            blocks, branches = self.blocks, self.branches
            mask = blocks[:, :, None] == blocks[:, None, :]
            mask &= (branches[:, None, :] == _TRUNK) | (branches[:, :, None] == branches[:, None, :])
            self._masks["bool"] = mask.tril_().unsqueeze(1)
        return self._masks["bool"]

    def attention_mask(self, implementation: str, dtype: torch.dtype):
        """Return the mask in the form that an attention implementation takes; built once and kept.

        Args:
            implementation: sdpa (bool), eager (`dtype`, added to the scores: there a bool mask would be silently wrong)
                or flex_attention (a block mask).
        """
        if implementation == "sdpa":
            return self.visible()
        key = (implementation, dtype)
        if key not in self._masks:
            if implementation == "eager":
                mask = torch.zeros(self.visible().shape, dtype=dtype, device=self.blocks.device)
                self._masks[key] = mask.masked_fill_(~self.visible(), torch.finfo(dtype).min)
            elif implementation == "flex_attention":
                self._masks[key] = self._block_mask()
            else:
                raise ValueError(f"attention implementation {implementation!r} takes no mask of this kind")
        return self._masks[key]

    def _block_mask(self):
        from torch.nn.attention.flex_attention import create_block_mask

        blocks, branches = self.blocks, self.branches

        def sees(row, head, query, key):
            same_answer = (branches[row, key] == _TRUNK) | (branches[row, query] == branches[row, key])
            return (blocks[row, query] == blocks[row, key]) & same_answer & (query >= key)

        rows, width = blocks.shape
        return create_block_mask(sees, rows, None, width, width, device=blocks.device)

    def unpack(self, values: Tensor) -> Tensor:
        """Scatter (N,) values of the scored tokens to (B, L - 1), each at its predictor's place; zero elsewhere."""
        rows, columns = self.shape
        return values.new_zeros(rows * columns).index_put((self.targets,), values).view(rows, columns)

    def per_answer(self, values: Tensor) -> list[Tensor]:
        """Split (N,) values of the scored tokens into one tensor per row of the padded batch, in its order."""
        order = torch.argsort(self.targets)
        counts = torch.bincount(self.targets // self.shape[1], minlength=self.shape[0])
        return list(values[order].split(counts.tolist()))


def pack(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[Sequence[int]]],
    attention_cost: float = ATTENTION_COST,
    multiple: int = 1,
) -> PackedBatch:
    """Pack prompts, each with any number of answers (at least one token each).

    The caller's batch is then that of the answers in the order given, each with its prompt in front, padded on the
    right; every token of the answers is scored.

    Args:
        prompts: token ids, at least one per prompt.
        answers: per prompt, the token ids of its answers.
        attention_cost: see `pack_rows`.
        multiple: round the width up to a multiple of this.

    Raises:
        ValueError: nothing to pack, a prompt or answer without tokens, a prompt without answers, ids that are not whole
            numbers.
    """
    rows, prompt_lengths, groups = [], [], []
    if not len(prompts):
        raise ValueError("there is no prompt to pack")
    for number, (prompt, several) in enumerate(zip(prompts, answers, strict=True)):
        if not len(several):
            raise ValueError(f"prompt {number} has no answer")
        if not len(prompt) or not all(len(answer) for answer in several):
            raise ValueError(f"prompt {number} or one of its answers has no token")
        for answer in several:
            row = np.asarray([*prompt, *answer])
            if row.dtype.kind not in "iu":
                raise ValueError(f"the token ids of prompt {number} are not whole numbers")
            rows.append(row.astype(np.int64))
            prompt_lengths.append(len(prompt))
            groups.append(number)
    scored = [np.arange(len(row)) >= length for row, length in zip(rows, prompt_lengths, strict=True)]
    width = max(len(row) for row in rows)
    return pack_rows(rows, scored, [0] * len(rows), prompt_lengths, groups, width, attention_cost, multiple)


def pack_padded(
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    groups: Sequence[int] | None = None,
    attention_cost: float = ATTENTION_COST,
    multiple: int = 1,
) -> PackedBatch | None:
    """Pack a padded batch.

    A row's prompt is what comes before its first label; rows of one group whose prompts are the same tokens share them.

    Args:
        input_ids, attention_mask: (B, L), padded on either side.
        labels: (B, L), -100 where a token is not scored.
        groups: B numbers; rows of one number may share their prompt. Default: rows of equal prompts.
        attention_cost: see `pack_rows`.
        multiple: round the width up to a multiple of this.

    Returns:
        The packed batch, on the device of `input_ids`; None where there is nothing to score or a row has padding
        between its tokens.

    Raises:
        ValueError: not as many groups as rows, ids that are not whole numbers.
    """
    device = input_ids.device
    if groups is not None and len(groups) != len(input_ids):
        raise ValueError(f"there are {len(groups)} groups for {len(input_ids)} rows")
    if input_ids.is_floating_point():
        raise ValueError(f"input_ids are {input_ids.dtype}; token ids are whole numbers")
    # one transfer; a mask of halves would round the ids
    parts = [input_ids, attention_mask.to(input_ids.dtype), labels.to(input_ids.dtype)]
    ids, mask, targets = torch.stack(parts).cpu().numpy()
    valid, is_scored = mask.astype(bool), targets != -100
    lengths, starts = valid.sum(axis=1), valid.argmax(axis=1)
    ends = valid.shape[1] - valid[:, ::-1].argmax(axis=1)
    if not lengths.all() or (ends - starts != lengths).any():
        return None
    # nothing predicts a row's first token
    is_scored &= valid
    is_scored[np.arange(len(ids)), starts] = False
    if not is_scored.any():
        return None
    prompt_lengths = np.where(is_scored.any(axis=1), is_scored.argmax(axis=1) - starts, lengths).tolist()
    starts, spans = starts.tolist(), list(map(slice, starts, ends))
    rows = [row[span] for row, span in zip(ids, spans, strict=True)]
    scored = [row[span] for row, span in zip(is_scored, spans, strict=True)]
    if groups is None:
        first: dict[bytes, int] = {}
        prompts = [row[:length].tobytes() for row, length in zip(rows, prompt_lengths, strict=True)]
        groups = [first.setdefault(prompt, number) for number, prompt in enumerate(prompts)]
    width = input_ids.shape[1]
    return pack_rows(rows, scored, starts, prompt_lengths, groups, width, attention_cost, multiple).to(device)


def pack_rows(
    rows: Sequence[np.ndarray],
    scored: Sequence[np.ndarray],
    starts: Sequence[int],
    prompt_lengths: Sequence[int],
    groups: Sequence[int],
    width: int,
    attention_cost: float = ATTENTION_COST,
    multiple: int = 1,
) -> PackedBatch:
    """Pack rows of tokens.

    Args:
        rows: the tokens of each of the caller's rows, without padding.
        scored: per row, which of its tokens are scored (never the first).
        starts: the column of each row's first token in the caller's batch.
        prompt_lengths: how many tokens of each row are its prompt, 1 or more.
        groups: rows of one number may share their prompt.
        width: L of the caller's batch.
        attention_cost: what one attended position costs a token, as a share of all its other work; decides how much
            goes into one row, and whether sharing a prompt is worth the longer row.
        multiple: round the packed width up to a multiple of this.
    """
    if multiple < 1:
        raise ValueError(f"multiple is {multiple}; it must be 1 or more")
    blocks, unshared = [], 0
    for members in _by_group(groups):
        first, *others = (rows[i][: prompt_lengths[i]] for i in members)
        if not all(np.array_equal(first, other) for other in others):
            unshared += 1
            blocks += [[i] for i in members]
        else:
            blocks += _split(members, rows, prompt_lengths, attention_cost)
    sizes = [_size(block, rows, prompt_lengths) for block in blocks]
    bins, packed_width = _bins(sizes, attention_cost, multiple)
    shape = (len(bins), packed_width)
    input_ids, position_ids = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    block_of, branches = np.full(shape, _PADDING, np.int32), np.full(shape, _TRUNK, np.int32)
    sources, labels, targets = [], [], []
    for number, members in enumerate(bins):
        at = 0
        for block in members:
            rows_of_block = blocks[block]
            shared = prompt_lengths[rows_of_block[0]]
            end = at + sizes[block]
            block_of[number, at:end] = block
            input_ids[number, at : at + shared] = rows[rows_of_block[0]][:shared]
            position_ids[number, at : at + shared] = np.arange(shared)
            last_of_prompt, at = at + shared - 1, at + shared
            for branch, i in enumerate(rows_of_block, 1):
                answer = rows[i][shared:]
                span = slice(at, at + len(answer))
                input_ids[number, span] = answer
                position_ids[number, span] = np.arange(shared, shared + len(answer))
                branches[number, span] = branch
                kept = np.flatnonzero(scored[i][shared:])
                sources.append(number * packed_width + np.where(kept == 0, last_of_prompt, at + kept - 1))
                labels.append(answer[kept])
                targets.append(i * (width - 1) + starts[i] + shared + kept - 1)
                at += len(answer)
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        blocks=torch.from_numpy(block_of),
        branches=torch.from_numpy(branches),
        sources=torch.from_numpy(np.concatenate(sources)),
        labels=torch.from_numpy(np.concatenate(labels).astype(np.int64)),
        targets=torch.from_numpy(np.concatenate(targets)),
        shape=(len(rows), width - 1),
        tokens=sum(sizes),
        unshared=unshared,
        longest=max(len(row) for row in rows),
    )


def _by_group(groups: Sequence[int]) -> list[list[int]]:
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(int(group), []).append(i)
    return list(members.values())


def _size(block: list[int], rows, prompt_lengths) -> int:
    shared = prompt_lengths[block[0]]
    return shared + sum(len(rows[i]) - shared for i in block)


def _cost(tokens: int, attention_cost: float) -> float:
    return tokens * (1.0 + attention_cost * tokens)


def _split(members: list[int], rows, prompt_lengths, attention_cost: float) -> list[list[int]]:
    """Split a group into blocks at the least cost: repeating a prompt pays where sharing it makes a row too long."""
    if len(members) == 1:
        return [members]
    shared = prompt_lengths[members[0]]
    # of the first k answers together
    ends = np.cumsum([0, *(len(rows[i]) - shared for i in members)])
    best, best_cost = np.array([0, len(members)]), math.inf
    for count in range(1, len(members) + 1):
        tokens = count * shared + int(ends[-1])
        # no split into so many rows costs less, nor into more of them
        if tokens > best_cost:
            break
        bounds = np.rint(np.arange(count + 1) * len(members) / count).astype(np.int64)
        cost = sum(_cost(shared + np.diff(ends[bounds]), attention_cost).tolist())
        if cost < best_cost:
            best, best_cost = bounds, cost
    return [members[low:high] for low, high in zip(best, best[1:], strict=False)]


def _bins(sizes: list[int], attention_cost: float, multiple: int) -> tuple[list[list[int]], int]:
    """Distribute blocks over the number of rows that costs least: few long rows attend more, many pad more.

    Of the ways that pad little, if there are any. Numbers of rows are tried from the least cost that they could have,
    until no other could be better.
    """
    order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    descending, total = [sizes[i] for i in order], sum(sizes)

    def cost(count: int, width: int) -> tuple[bool, float, int]:
        width = -(-width // multiple) * multiple
        # of ways that cost the same, that with the fewest rows
        return 1 - total / (count * width) > _PADDING_SHARE, count * _cost(width, attention_cost), count

    least = [cost(count, width) for count, width in enumerate(_least_widths(descending), 1)]
    best, best_cost = 1, (True, math.inf, 0)
    for bound in sorted(least):
        if bound >= best_cost:
            break
        count = bound[-1]
        own = cost(count, _longest(descending, count))
        if own < best_cost:
            best, best_cost = count, own
    width, rows = _distribute(descending, best)
    bins = [[] for _ in range(best)]
    for block, row in zip(order, rows, strict=True):
        bins[row].append(block)
    return bins, -(-width // multiple) * multiple


def _distribute(descending: list[int], count: int) -> tuple[int, list[int]]:
    """Put each block into the emptiest of `count` rows, the first of equals.

    Args:
        descending: tokens of the blocks, the largest first.

    Returns:
        The tokens of the longest row, and the row of each block.
    """
    # tokens and number of a row in one whole number, whose order is that of the pair
    heap = [size * count + row for row, size in enumerate(descending[:count])]
    heapq.heapify(heap)
    rows, replace = [*range(count)], heapq.heapreplace
    for size in descending[count:]:
        rows.append(heap[0] % count)
        replace(heap, heap[0] + size * count)
    return max(heap) // count, rows


def _longest(descending: list[int], count: int) -> int:
    """Return the tokens of the longest row of `_distribute`, without saying which block is in which."""
    second = np.array(descending[count:])
    if 0 < len(second) <= count:
        first = np.array(descending[count - len(second) : count])[::-1]
        pairs = first + second
        # no row gets a third block while the emptiest is one with a single block
        if (np.minimum.accumulate(pairs)[:-1] >= first[1:]).all():
            return max(descending[0], int(pairs.max()))
    loads, replace = descending[:count], heapq.heapreplace
    heapq.heapify(loads)
    for size in descending[count:]:
        replace(loads, loads[0] + size)
    return max(loads)


def _least_widths(descending: list[int]) -> list[int]:
    """Return how long the longest of 1, 2, ... rows is at least, however the blocks are distributed.

    Of the k * rows + 1 largest blocks, k + 1 share a row.
    """
    n = len(descending)
    ends = np.cumsum([0, *descending])
    widths = np.maximum(descending[0], -(-ends[-1] // np.arange(1, n + 1)))

    def raise_to(counts, k):
        last = counts * k + 1
        np.maximum.at(widths, counts - 1, ends[last] - ends[last - k - 1])

    # all products of a number of rows and k below n: by k where that is small, and by rows for the rest
    small = math.isqrt(n)
    for k in range(1, small + 1):
        raise_to(np.arange(1, (n - 1) // k + 1), k)
    for count in range(1, (n - 1) // (small + 1) + 1):
        k = np.arange(small + 1, (n - 1) // count + 1)
        raise_to(np.full_like(k, count), k)
    return widths.tolist()
