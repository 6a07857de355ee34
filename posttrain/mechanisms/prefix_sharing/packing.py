"""Packing: answers to one prompt in one row, several prompts in one row, and the way back.

A row of the packed batch holds one or more blocks, a block being `prompt | answer 1 | answer 2 | ...`. Each answer's
positions continue those of the prompt. A token sees the tokens of its own block that come before it and belong to the
prompt or to its own answer, nothing else; so every answer sees what it would see in a row of its own.

The token after a prompt is predicted by the prompt's last token, whatever the answer. That state is read once per
answer, so no token has to be repeated in front of an answer and none can be seen twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from posttrain.mechanisms.prefix_sharing import distribution

_TRUNK, _PADDING = 0, -1
# of a model with 135M parameters; larger ones have less
ATTENTION_COST = 3e-4


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

    def to(self, device) -> "PackedBatch":
        """Copy the batch to another device, in one transfer that nothing waits for."""
        names = ("input_ids", "position_ids", "blocks", "branches", "sources", "labels", "targets")
        parts = [getattr(self, name) for name in names]
        if torch.device(device) != self.input_ids.device:
            sent = torch.cat([part.flatten().long() for part in parts]).to(device, non_blocking=True)
            pieces = sent.split([part.numel() for part in parts])
            parts = [piece.view(part.shape).to(part.dtype) for piece, part in zip(pieces, parts, strict=True)]
        others = {name: getattr(self, name) for name in ("shape", "tokens", "unshared", "longest")}
        return PackedBatch(**dict(zip(names, parts, strict=True)), **others)

    def drop_masks(self) -> None:
        """Forget the masks built so far; the next forward builds its own."""
        self._masks.clear()

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
            implementation: sdpa (bool on the CPU; elsewhere added to the scores, as every layer would make of a bool
                mask, forward and backward, and keep), eager (added to the scores: there a bool mask would be silently
                wrong) or flex_attention (a block mask).
            dtype: of a mask that is added to the scores; sdpa takes that of its queries.
        """
        if implementation == "sdpa" and self.blocks.device.type == "cpu":
            return self.visible()
        key = (implementation, dtype)
        if key not in self._masks:
            if implementation == "eager":
                self._masks[key] = self._added(dtype, torch.finfo(dtype).min)
            elif implementation == "sdpa":
                # torch's own value; no row of the mask is empty
                self._masks[key] = self._added(dtype, -torch.inf)
            elif implementation == "flex_attention":
                self._masks[key] = self._block_mask()
            else:
                raise ValueError(f"attention implementation {implementation!r} takes no mask of this kind")
        return self._masks[key]

    def _added(self, dtype: torch.dtype, hidden: float) -> Tensor:
        """Return (R, 1, W, W) to be added to the scores: 0 where a token sees another, `hidden` elsewhere."""
        mask = torch.zeros(self.visible().shape, dtype=dtype, device=self.blocks.device)
        return mask.masked_fill_(~self.visible(), hidden)

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
    few_shapes: bool = False,
    least_rows: int = 1,
    device=None,
) -> PackedBatch | None:
    """Pack a padded batch.

    A row's prompt is what comes before its first label; rows of one group whose prompts are the same tokens share them.

    Args:
        input_ids, attention_mask: (B, L), padded on either side.
        labels: (B, L), -100 where a token is not scored.
        groups: B numbers; rows of one number may share their prompt. Default: rows of equal prompts.
        attention_cost: see `pack_rows`.
        multiple: round the width up to a multiple of this.
        few_shapes, least_rows: see `pack_rows`.
        device: where the packed batch goes; default: where `input_ids` are.

    Returns:
        The packed batch; None where there is nothing to score or a row has padding
        between its tokens.

    Raises:
        ValueError: not as many groups as rows, ids that are not whole numbers.
    """
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
    shape = (attention_cost, multiple, few_shapes, least_rows)
    packed = pack_rows(rows, scored, starts, prompt_lengths, groups, width, *shape)
    return packed.to(input_ids.device if device is None else device)


def pack_rows(
    rows: Sequence[np.ndarray],
    scored: Sequence[np.ndarray],
    starts: Sequence[int],
    prompt_lengths: Sequence[int],
    groups: Sequence[int],
    width: int,
    attention_cost: float = ATTENTION_COST,
    multiple: int = 1,
    few_shapes: bool = False,
    least_rows: int = 1,
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
        few_shapes: take few different numbers of packed rows, for kernels that plan for each shape.
        least_rows: have so many packed rows at least, the last ones of padding alone.
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
            shared = prompt_lengths[members[0]]
            answers = [len(rows[i]) - shared for i in members]
            blocks += distribution.split(members, shared, answers, attention_cost)
    sizes = [_size(block, rows, prompt_lengths) for block in blocks]
    bins, packed_width = distribution.distribute(sizes, attention_cost, multiple, few_shapes)
    bins += [[]] * (least_rows - len(bins))
    shape = (len(bins), packed_width)
    # prompts and answers in the order in which they lie in the packed rows: where each begins, there and in its own
    # row, its block, its branch, the caller's row, and the place of its prompt's last token
    parts, tokens, is_scored = [], [], []
    for number, members in enumerate(bins):
        at = number * packed_width
        for block in members:
            rows_of_block = blocks[block]
            shared = prompt_lengths[rows_of_block[0]]
            parts.append((at, 0, block, _TRUNK, 0, 0))
            tokens.append(rows[rows_of_block[0]][:shared])
            is_scored.append(np.zeros(shared, bool))
            at += shared
            last_of_prompt = at - 1
            for branch, i in enumerate(rows_of_block, 1):
                parts.append((at, shared, block, branch, i, last_of_prompt))
                tokens.append(rows[i][shared:])
                is_scored.append(scored[i][shared:])
                at += len(tokens[-1])
    lengths = np.array([len(part) for part in tokens])
    # half the memory to go through, where the places are small enough
    place_type = np.int32 if max(len(bins) * packed_width, len(rows) * width) < 2**31 else np.int64
    begins, first_positions, *facts = np.repeat(np.array(parts, place_type).T, lengths, axis=1)
    within = np.arange(lengths.sum(), dtype=place_type)
    within -= np.repeat((lengths.cumsum() - lengths).astype(place_type), lengths)
    own_block, own_branch, own_row, last_of_prompt = facts
    tokens, positions, places = np.concatenate(tokens), first_positions + within, begins + within
    input_ids, position_ids = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    block_of, branches = np.full(shape, _PADDING, np.int32), np.full(shape, _TRUNK, np.int32)
    tables, values = (input_ids, position_ids, block_of, branches), (tokens, positions, own_block, own_branch)
    for table, value in zip(tables, values, strict=True):
        table.reshape(-1)[places] = value
    kept = np.flatnonzero(np.concatenate(is_scored))
    sources = np.where(within[kept] == 0, last_of_prompt[kept], places[kept] - 1).astype(np.int64)
    row_of_kept = own_row[kept].astype(np.int64)
    targets = row_of_kept * (width - 1) + np.asarray(starts, np.int64)[row_of_kept] + positions[kept] - 1
    return PackedBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        blocks=torch.from_numpy(block_of),
        branches=torch.from_numpy(branches),
        sources=torch.from_numpy(sources),
        labels=torch.from_numpy(tokens[kept].astype(np.int64)),
        targets=torch.from_numpy(targets),
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
