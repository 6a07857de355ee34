"""Trees of guesses: the tokens stay those of greedy generation, and branches are what they are one by one."""

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.generation import jacobi, tree
from posttrain.models import tiny_model
from tests.test_generation import LONG, greedy, repetitive


@pytest.fixture
def prompts():
    ids = torch.randint(3, 40, (3, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, :8] = 0
    return ids, mask


@pytest.fixture
def kept(monkeypatch):
    """The accepted places of each forward."""
    found, keep = [], tree.keep

    def noting(cache, text, places, nodes):
        found.append(places)
        return keep(cache, text, places, nodes)

    monkeypatch.setattr(tree, "keep", noting)
    return found


@pytest.mark.parametrize("settings", [dict(tree_nodes=30), dict(tree_nodes=30, retrieval=2), dict(retrieval=2)])
def test_the_tokens_are_those_of_greedy_generation(settings, prompts, kept):
    model, (ids, mask) = repetitive(), prompts
    made = jacobi.generate(model, ids, mask, max_new_tokens=40, eos_token_id=[], pad_token_id=0, **settings)
    assert torch.equal(made.sequences, greedy(model, ids, mask, 40))
    assert any(places != list(range(len(places))) for places in kept), "no branch was accepted, so nothing is shown"
    assert made.forwards.sum() == len(kept)


@pytest.mark.parametrize("kind", ["qwen3", "gpt_neox", "gpt2"])
def test_branches_that_are_wrong_leave_no_trace(kind, prompts, kept):
    torch.manual_seed(1)
    model, (ids, mask) = tiny_model(kind).eval(), prompts
    made = jacobi.generate(model, ids, mask, max_new_tokens=24, eos_token_id=[], tree_nodes=40, retrieval=1)
    assert torch.equal(made.sequences[:, 12:], greedy(model, ids, mask, 24)[:, 12:])
    assert sum(map(len, kept)) < 5 * len(kept)


def test_a_tree_takes_fewer_forwards_than_its_line(prompts):
    model, (ids, mask) = repetitive(), prompts
    line, branched = (
        jacobi.generate(model, ids, mask, max_new_tokens=40, eos_token_id=[], tree_nodes=nodes) for nodes in (0, 60)
    )
    assert branched.forwards.sum() < line.forwards.sum()


def test_the_shape_has_the_likeliest_branches_first():
    assert tree.shape(4, 3) == [(1,), (2,), (3,), (0, 1)]
    paths = tree.shape(62, 5)
    assert len(set(paths)) == 62 and all(any(path) for path in paths)
    # whoever stands behind another stands behind that one, or behind the line
    assert all(not any(path[:-1]) or path[:-1] in paths[:place] for place, path in enumerate(paths))
    assert tree.shape(0, 5) == []
    assert max(map(len, tree.shape(500, 2))) == 2 and len(tree.shape(500, 2)) == tree.WIDEST * (tree.WIDEST + 1) - 2


def test_a_tree_holds_each_guess_once():
    made = tree.grow([[5, 6], [7, 8]], [(1,), (0, 1), (1, 0), (2,)], [5, 8, 9])
    # the line, (1,), (0, 1), (1, 0); of what was found 9 is new, and rank 2 is not there
    assert made.tokens == [5, 7, 6, 8, 7, 9]
    assert made.parents == [-1, 0, -1, 0, 2, 3]
    assert made.depths == [1, 2, 1, 2, 2, 3]
    assert not made.is_line and tree.grow([[5], [7]], [(1,)], [5, 7]).is_line
    # behind the text the model says 6, behind 6 it says 7
    said = [6, 0, 0, 7, 0, 0, 0]
    assert made.accepted(said) == [2, 4]
    assert made.likeliest_behind(-1) == [0, 1] and made.likeliest_behind(3) == [5] and made.likeliest_behind(5) == []


def test_what_is_found_followed_the_longest_piece_that_is_the_end():
    text = [1, 2, 3, 4, 9, 2, 3, 5, 9, 9, 2, 3]
    # behind 2 3 stood 4 and 5; the second has 9 before as the end has
    assert tree.continuation(text, 2, 3) == [5, 9, 9]
    assert tree.continuation([7, 1, 2, 8, 1, 2, 9, 1, 2], 2, 2) == [9, 1]
    assert tree.continuation(text, 4, 3) == [] and tree.continuation([1, 1], 2, 3) == []
    # a repetition runs up to the end of the text
    assert tree.continuation([4, 4, 4], 1, 3) == [4]
    random = torch.Generator().manual_seed(0)
    for _ in range(200):
        text = torch.randint(3, (12,), generator=random).tolist()
        # by trying each place
        sizes = [sum(text[:at][-n:] == text[-n:] for n in range(1, at + 1)) for at in range(len(text))]
        best = max(range(len(text)), key=lambda at: (sizes[at], at))
        assert tree.continuation(text, 2, 4) == (text[best : best + 4] if sizes[best] >= 2 else [])


def test_each_node_sees_the_text_and_what_it_stands_behind():
    made = tree.grow([[5], [7]], [], [6])
    given = tree.inputs(made, 3, 2, torch.float32, "cpu")
    sees = (given["attention_mask"][0, 0] == 0).long().tolist()
    assert sees == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 1]]
    assert given["position_ids"].tolist() == [[2, 3, 4, 3]]


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("mistral", dict(tree_nodes=4), "MistralForCausalLM has windows. Leave both out"),
        ("llama", dict(tree_nodes=4, draft_tokens=0), "tree_nodes is 4 with draft_tokens 0, which asks for no guess"),
        ("llama", dict(retrieval=True), "retrieval is True; it must be a whole number of 0 or more"),
        ("llama", dict(tree_nodes=10**9), "tree_nodes is 1000000000; it must be 1024 or less"),
    ],
)
def test_trees_that_cannot_be_are_refused(kind, settings, message):
    model = tiny_model(kind, **({"sliding_window": 6} if kind == "mistral" else {}))
    with pytest.raises(ConfigError, match=message):
        jacobi.generate(model, LONG, max_new_tokens=4, **settings)


@pytest.mark.parametrize("lost", ["attention_mask", "position_ids"])
def test_a_model_that_takes_no_mask_or_positions_is_refused(lost, monkeypatch):
    torch.manual_seed(0)
    model = tiny_model()
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **given: forward(*args, **given | {lost: None}))
    with pytest.raises(ConfigError, match="LlamaForCausalLM computes other numbers with one"):
        jacobi.generate(model, LONG, max_new_tokens=4, tree_nodes=4)
