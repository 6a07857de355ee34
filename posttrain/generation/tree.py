"""Trees of guesses: continuations of a text that share what they begin with, checked in one forward."""

import heapq

import torch
from torch import Tensor, nn

from posttrain.errors import ConfigError

# guesses for one place, at most
WIDEST = 10
# how far a tree's logits may lie from those of its branches one by one, by the numbers' format
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4}


class Tree:
    """Guesses behind a text, in the order in which the forward has them; parents come before their children.

    Attributes:
        tokens: of each node. parents: the place of each node's parent, -1 for the text's last token.
        depths: of each node, from 1 on.
    """

    def __init__(self) -> None:
        self.tokens, self.parents, self.depths = [], [], []
        self._child: dict[tuple[int, int], int] = {}
        self._first: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, parent: int, token: int) -> int:
        """Add a guess behind `parent`, unless it is there; return its place."""
        place = self._child.setdefault((parent, token), len(self))
        if place == len(self):
            self.tokens.append(token)
            self.parents.append(parent)
            self.depths.append(1 + (self.depths[parent] if parent >= 0 else 0))
            self._first.setdefault(parent, place)
        return place

    def accepted(self, said: list[int]) -> list[int]:
        """Return the places of the guesses that are what the model says, from the text on.

        `said`: the model's own token behind the text, and behind each node.
        """
        at, found = -1, []
        while (place := self._child.get((at, said[at + 1]))) is not None:
            found.append(place)
            at = place
        return found

    def likeliest_behind(self, place: int) -> list[int]:
        """Return the places of the first guess behind a node, the first one behind that, and so on."""
        found = []
        while (place := self._first.get(place)) is not None:
            found.append(place)
        return found

    @property
    def is_line(self) -> bool:
        """Whether each guess stands behind the one before."""
        return self.parents == list(range(-1, len(self) - 1))


def shape(beside: int, depth: int) -> list[tuple[int, ...]]:
    """Return which guesses a tree has beside the likeliest line: paths of ranks, the likeliest first.

    The chance of the guess of rank k, from 0, is taken as 1 / (k + 2), whatever stands before it.
    """
    found, waiting = [], [(-1 / (rank + 2), (rank,)) for rank in range(WIDEST)]
    heapq.heapify(waiting)
    while waiting and len(found) < beside:
        chance, path = heapq.heappop(waiting)
        if any(path):
            found.append(path)
        if len(path) < depth:
            for rank in range(WIDEST):
                heapq.heappush(waiting, (chance / (rank + 2), (*path, rank)))
    return found


def grow(guesses: list[list[int]], paths: list[tuple[int, ...]], found: list[int]) -> Tree:
    """Make a tree of the first guess for each place, those that `paths` name, and a line that was found in the text.

    `guesses`: for each place behind the text, the likeliest first.
    """
    tree, place = Tree(), -1
    for ranked in guesses:
        place = tree.add(place, ranked[0])
    for path in paths:
        if len(path) <= len(guesses) and all(rank < len(ranked) for rank, ranked in zip(path, guesses, strict=False)):
            _add_line(tree, [ranked[rank] for rank, ranked in zip(path, guesses, strict=False)])
    _add_line(tree, found)
    return tree


def _add_line(tree: Tree, tokens: list[int]) -> None:
    place = -1
    for token in tokens:
        place = tree.add(place, token)


def continuation(text: list[int], matched: int, count: int) -> list[int]:
    """Return what followed the text's last tokens where these stood before: at most `count` tokens, or none.

    Of the places where `matched` of them stood that counts behind which the longest piece is the text's end, and of
    these the last. Takes a number of steps proportional to the text.
    """
    backwards, best, longest = text[::-1], 0, matched - 1
    # how far the text behind each place is the end of all of it: the Z array of the text backwards
    same, left, right = [0] * len(text), 0, 0
    for place in range(1, len(text)):
        size = min(right - place, same[place - left]) if place < right else 0
        while place + size < len(text) and backwards[size] == backwards[place + size]:
            size += 1
        same[place] = size
        if place + size > right:
            left, right = place, place + size
        if size > longest:
            best, longest = place, size
    return text[len(text) - best :][:count] if best else []


def inputs(tree: Tree, text: int, entered: int, dtype: torch.dtype, device) -> dict[str, Tensor]:
    """Return the mask (1, 1, Q, T + N) and positions (1, Q) of a forward of a text's last tokens and a tree.

    Args:
        text: T, the tokens before the tree. entered: how many of them the cache holds.
        dtype: of the mask, which is 0 where a token sees another, and the lowest number elsewhere.
    """
    nodes = len(tree)
    sees = torch.zeros(text - entered + nodes, text + nodes, dtype=torch.bool)
    sees[:, :text] = torch.ones(len(sees), text, dtype=torch.bool).tril(entered)
    behind = sees[text - entered :]
    for place, parent in enumerate(tree.parents):
        if parent >= 0:
            behind[place, text:] = behind[parent, text:]
        behind[place, text + place] = True
    mask = torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)
    positions = [*range(entered, text), *(text - 1 + depth for depth in tree.depths)]
    return {
        "attention_mask": mask[None, None].to(device),
        "position_ids": torch.tensor([positions], device=device),
    }


def keep(cache, text: int, places: list[int], nodes: int) -> None:
    """Keep in a cache the accepted ones of a tree's nodes, which are its last, and let go the others.

    `text`: how many tokens the cache holds before the tree.
    """
    right = len(places)
    if places != list(range(right)):
        for layer in cache.layers:
            for held in (layer.keys, layer.values):
                held[..., text : text + right, :] = held[..., [text + place for place in places], :]
    cache.crop(right - nodes)


def check(model: nn.Module, inner: nn.Module) -> None:
    """Refuse a model in whose forward the branches of a tree are not what they are one by one.

    Raises ConfigError where layers attend to a part of the text, or attention takes no mask of its own.
    """
    from transformers import DynamicCache

    name = type(inner).__name__
    if any(DynamicCache(config=inner.config).is_sliding):
        raise ConfigError(
            f"tree_nodes and retrieval are for models whose layers attend to the whole text, and {name} has windows. "
            "Leave both out."
        )
    weight = next(model.parameters())
    tree, vocabulary = Tree(), inner.config.get_text_config().vocab_size
    text, guesses = [token % vocabulary for token in (1, 2, 3)], [token % vocabulary for token in (4, 5, 6, 7)]
    branches = [guesses[:2], guesses[2:]]
    for branch in branches:
        _add_line(tree, branch)

    def forward(tokens, **given):
        ids = torch.tensor([tokens], device=weight.device)
        return model(input_ids=ids, use_cache=False, **given).logits[0, -2:].float()

    try:
        made = inputs(tree, len(text), 0, weight.dtype, weight.device)
        ids = torch.tensor([text + tree.tokens], device=weight.device)
        logits = model(input_ids=ids, use_cache=False, **made).logits[0, len(text) :].float()
        apart = torch.cat([forward(text + branch) for branch in branches])
        error = ((logits - apart).norm() / apart.norm().clamp(min=1e-12)).item()
    # attention of another kind has no place for such a mask
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        error = float("inf")
    if not error <= _TOLERANCE.get(weight.dtype, 3e-2):
        raise ConfigError(
            f"tree_nodes and retrieval need attention that takes a mask of each token, and {name} computes other "
            f"numbers with one (off by {error:.2g}). Load it with `attn_implementation='sdpa'`, or leave both out."
        )
