"""Greedy generation that checks several guessed tokens in each forward: Jacobi decoding, of a line or a tree.

The guesses are the model's own predictions from the forward before, which stood behind a token that was wrong; missing
ones are drawn from the text so far. A guess is accepted where it is what the model says: the tokens are those of
ordinary greedy generation, whatever is guessed, and a good guess saves a forward. Models trained with
`token_noise: msn` (arXiv 2406.17404) guess better.
"""

import operator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from posttrain.errors import ConfigError
from posttrain.generation import support, tree

_MOST_NODES = 1024


class Generated(NamedTuple):
    """Rows with what was generated.

    Attributes:
        sequences: (B, T + N), the rows given and the new tokens, filled up on the right with `pad_token_id`.
        new_tokens: (B,), how many are new.
        forwards: (B,), forwards that a row took.
    """

    sequences: Tensor
    new_tokens: Tensor
    forwards: Tensor

    @property
    def accepted_tokens(self) -> float:
        """New tokens a forward: 1 for ordinary generation."""
        return self.new_tokens.sum().item() / max(self.forwards.sum().item(), 1)


@torch.no_grad()
def generate(
    model: nn.Module,
    input_ids: Tensor | list[list[int]],
    attention_mask: Tensor | list[list[int]] | None = None,
    *,
    max_new_tokens: int,
    draft_tokens: int = 5,
    eos_token_id: int | list[int] | Tensor | None = None,
    pad_token_id: int | None = None,
    tree_nodes: int = 0,
    retrieval: int = 0,
    seed: int = 0,
) -> Generated:
    """Generate greedily, and check `draft_tokens` guessed tokens in each forward.

    Rows are gone through one by one, each with a cache of its own. The tokens are those of `model.generate(...,
    do_sample=False)` but where two logits are equal up to rounding. Runs in eval mode and leaves the mode as it was.

    Args:
        model: a causal language model or a PeftModel.
        input_ids: (B, T), prompts of at least one token each.
        attention_mask: (B, T), 0 for padding on either side; None where no token is padding.
        max_new_tokens: 1 or more, for each row.
        draft_tokens: guesses a forward, one behind the other; 0 for ordinary greedy generation.
        tree_nodes: guesses a forward beside that line, which branch off it: less likely ones for the same places.
        retrieval: how many of the text's last tokens are looked for in what stands before them; what followed there is
            a branch as well. 0 for none; published is 3, beside 62 other guesses.
        eos_token_id: what ends a row, one id or several, none of them for an empty list; the generation config's where
            None.
        pad_token_id: what fills rows up; the generation config's, or else what ends a row, or 0.
        seed: of the guesses drawn from the text, a whole number of 0 or more.

    Raises:
        ConfigError: for an argument out of range, a row without a token, ids that the model has no embedding for, more
            tokens than it has learned positions, a tree for a model with windows of attention or without masks of its
            own, and what `posttrain.generation.support.check_model` refuses: a generation config by which greedy search
            would take other tokens, virtual tokens of an adapter, an encoder-decoder, and a model whose cache cannot
            give tokens back.
    """
    support.check_model(model)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = getattr(model, "generation_config", None)
    named = {"draft_tokens": draft_tokens, "tree_nodes": tree_nodes, "retrieval": retrieval, "seed": seed}
    _check_numbers(("max_new_tokens", max_new_tokens, 1), *((name, value, 0) for name, value in named.items()))
    input_ids = _table("input_ids", input_ids, next(model.parameters()).device)
    mask = torch.ones_like(input_ids)
    if attention_mask is not None:
        mask = _table("attention_mask", attention_mask, input_ids.device)
    _check(model, input_ids, mask, max_new_tokens)
    search = _search(draft_tokens, tree_nodes, retrieval)
    ends = _ids("eos_token_id", getattr(config, "eos_token_id", None) if eos_token_id is None else eos_token_id)
    fills = _ids("pad_token_id", getattr(config, "pad_token_id", None) if pad_token_id is None else pad_token_id)
    fill = (fills or ends or [0])[0]
    rows, forwards, was_training = [], [], model.training
    model.eval()
    try:
        if search.branches:
            tree.check(model, inner)
        for ids, real in zip(input_ids, mask.bool(), strict=True):
            random = torch.Generator().manual_seed(seed)
            made, count = _row(model, inner, ids[real], max_new_tokens, search, set(ends), random)
            rows.append(made)
            forwards.append(count)
    finally:
        model.train(was_training)
    filled = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
    counts = torch.tensor([len(row) for row in rows], device=input_ids.device)
    forwards = torch.tensor(forwards, device=input_ids.device)
    return Generated(torch.cat([input_ids, filled], dim=1), counts, forwards)


def _check_numbers(*named: tuple[str, int, int]) -> None:
    for name, value, least in named:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 63:
            raise ConfigError(f"{name} is {value!r}; it must be a whole number of {least} or more.")


def _table(name: str, given, device) -> Tensor:
    """Return ids or a mask (B, T) as a tensor: its own device's, or `device`'s where it is a list."""
    try:
        found = given if isinstance(given, Tensor) else torch.as_tensor(given, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise ConfigError(f"{name} is no tensor, and no list of rows that are equally long. Pad them.") from None
    if found.dim() != 2:
        raise ConfigError(f"{name} is {tuple(found.shape)}; it must be of two dimensions, (rows, tokens).")
    if name == "input_ids" and (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool):
        raise ConfigError(f"{name} is of {found.dtype}; token ids are whole numbers (torch.long).")
    return found.long() if name == "input_ids" else found


def _ids(name: str, given) -> list[int]:
    """Return the token ids that are given as one number, several, or None."""
    values = given.tolist() if hasattr(given, "tolist") else given
    values = [] if values is None else list(values) if isinstance(values, list | tuple | set) else [values]
    try:
        if any(isinstance(value, bool) for value in values):
            raise TypeError
        found = [operator.index(value) for value in values]
        if any(not -(1 << 63) <= value < 1 << 63 for value in found):
            raise TypeError
        return found
    except TypeError:
        several = " or several" if name == "eos_token_id" else ""
        raise ConfigError(f"{name} is {given!r}; it must be a token's id, a whole number{several}.") from None


def _check(model, input_ids: Tensor, mask: Tensor, max_new_tokens: int) -> None:
    if mask.shape != input_ids.shape:
        raise ConfigError(
            f"attention_mask is {tuple(mask.shape)}; it must have the shape of input_ids, {tuple(input_ids.shape)}."
        )
    lengths = mask.bool().sum(dim=1).tolist()
    if not lengths or not min(lengths):
        raise ConfigError("input_ids has a row without a token, after which nothing can be generated.")
    real, rows = input_ids[mask.bool()], support.vocabulary(model)
    for worst in (real.min().item(), real.max().item()):
        if not 0 <= worst < rows:
            raise ConfigError(
                f"input_ids has the id {worst}, and the model has embeddings for ids from 0 to {rows - 1}."
            )
    longest, positions = max(lengths), support.learned_positions(model)
    if longest + max_new_tokens - 1 > positions:
        raise ConfigError(
            f"max_new_tokens is {max_new_tokens} behind {longest} tokens, and the model has {positions} learned "
            f"positions. Set it to {max(positions - longest + 1, 0)} or less, or shorten the prompt."
        )


class _Search(NamedTuple):
    """What is guessed in a forward: a line of tokens, branches by the ranks of guesses, and one found in the text."""

    drafts: int
    paths: list[tuple[int, ...]]
    retrieval: int

    @property
    def branches(self) -> bool:
        return bool(self.paths or self.retrieval)


def _search(drafts: int, nodes: int, retrieval: int) -> _Search:
    if nodes > _MOST_NODES:
        raise ConfigError(f"tree_nodes is {nodes}; it must be {_MOST_NODES} or less.")
    for name, value in (("tree_nodes", nodes), ("retrieval", retrieval)):
        if value and not drafts:
            raise ConfigError(f"{name} is {value} with draft_tokens 0, which asks for no guess. Leave {name} out.")
    return _Search(drafts, tree.shape(nodes, drafts), retrieval)


def _row(model, inner, prompt: Tensor, limit: int, search: _Search, ends: set, random) -> tuple[Tensor, int]:
    """Return the new tokens of a row, at most `limit`, and the number of forwards."""
    from transformers import DynamicCache

    cache, dtype = DynamicCache(config=inner.config), next(model.parameters()).dtype
    # layers of a sliding window keep what a wrong guess would push out
    cache.activate_past_recording()
    text, entered, guesses, forwards = prompt.tolist(), 0, [], 0
    length = len(text) + limit
    while len(text) < length:
        wanted = min(search.drafts, length - len(text) - 1)
        guesses = guesses[:wanted]
        picks = torch.randint(len(text), (wanted - len(guesses),), generator=random).tolist()
        guesses += [[text[pick]] for pick in picks]
        found = tree.continuation(text, search.retrieval, wanted) if search.retrieval else []
        made = tree.grow(guesses, search.paths, found)
        block, before = torch.tensor([text[entered:] + made.tokens], device=prompt.device), len(text)
        if made.is_line:
            given = {"attention_mask": torch.ones(1, before + len(made), dtype=torch.long, device=prompt.device)}
        else:
            given = tree.inputs(made, before, entered, dtype, prompt.device)
        logits = model(input_ids=block, **given, past_key_values=cache, use_cache=True).logits[0, -len(made) - 1 :]
        said = logits.argmax(dim=-1).tolist()
        forwards += 1
        right = made.accepted(said)
        entered = before + len(right)
        tree.keep(cache, before, right, len(made))
        for token in [said[0], *(said[place + 1] for place in right)]:
            text.append(token)
            if token in ends:
                return torch.tensor(text[len(prompt) :], device=prompt.device), forwards
        behind = made.likeliest_behind(right[-1] if right else -1)
        if search.paths:
            ranked = logits[[place + 1 for place in behind]].topk(min(tree.WIDEST, logits.size(-1)), dim=-1)
            guesses = ranked.indices.tolist()
        else:
            guesses = [[said[place + 1]] for place in behind]
    return torch.tensor(text[len(prompt) :], device=prompt.device), forwards
