"""Noise on tokens: which pieces are replaced and by what, whatever the layout of a batch."""

import pytest
import torch

from posttrain.mechanisms.noise import draws, tokens

ROW = [11, 12, 13, 21, 22, 23, 24, 25, 26, 27]
PROMPT = 3


def batch(*rows, width=None):
    """Rows of ids whose answers begin at PROMPT, padded on the right."""
    width = width or max(map(len, rows))
    ids = torch.tensor([list(row) + [0] * (width - len(row)) for row in rows])
    labels = torch.tensor([[-100] * PROMPT + list(row[PROMPT:]) + [-100] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, labels, draws.sequences(ids, mask)


def test_a_piece_may_begin_where_the_last_token_is_kept():
    _, labels, found = batch(ROW)
    at = tokens.starts(labels, found, 3)
    assert at.allowed.nonzero().flatten().tolist() == [3, 4, 5, 6]
    assert set(at.length[at.allowed].tolist()) == {3}


@pytest.mark.parametrize(("answer", "places"), [(0, []), (1, []), (2, [3]), (3, [3]), (4, [3]), (5, [3, 4])])
def test_short_answers_have_shorter_pieces_and_of_one_token_none(answer, places):
    _, labels, found = batch(ROW[: PROMPT + answer], width=10)
    at = tokens.starts(labels, found, 3)
    assert at.allowed.nonzero().flatten().tolist() == places
    assert all(length == min(3, answer - 1) for length in at.length[at.allowed].tolist())


def test_tokens_are_copied_from_in_front_and_from_what_was_copied(monkeypatch):
    ids, labels, found = batch(ROW)
    drawn = iter([1, 0, 3, 4])
    monkeypatch.setattr(draws, "below", lambda keys, bounds, number: torch.tensor([next(drawn)]))
    made = tokens.noisy(ids, labels, found, seed=0, step=0, length=3)
    assert made.input_ids.tolist() == [[11, 12, 13, 21, 11, 21, 11, 25, 26, 27]]
    assert made.is_noise.nonzero()[:, 1].tolist() == [4, 5, 6]


def test_each_token_is_replaced_as_often_as_the_formula_says():
    rows = 4000
    ids, labels, found = batch(*([id + 30 * i for id in ROW] for i in range(rows)))
    seen = tokens.noisy(ids, labels, found, 0, 0, 3).is_noise.float().mean(dim=0)
    expected = torch.tensor([0, 0, 0, 1 / 4, 1 / 2, 3 / 4, 3 / 4, 1 / 2, 1 / 4, 0])
    torch.testing.assert_close(seen, expected, atol=0.04, rtol=0)
    # of pieces of one token those at the sixth place: each of five tokens in front is copied alike
    made = tokens.noisy(ids, labels, found, 0, 0, 1)
    copied = made.input_ids[:, 5] - 30 * torch.arange(rows)
    share = torch.stack([(made.is_noise[:, 5] & (copied == token)).sum() for token in ROW[:5]]).float()
    torch.testing.assert_close(share / made.is_noise[:, 5].sum(), torch.full((5,), 0.2), atol=0.08, rtol=0)


def test_a_share_of_the_sequences_gets_a_piece():
    ids, labels, found = batch(*([id + 30 * i for id in ROW] for i in range(400)))
    made = tokens.noisy(ids, labels, found, 0, 0, 3, prob=0.3)
    touched = made.is_noise.any(dim=1).float().mean().item()
    assert touched == pytest.approx(0.3, abs=0.1)
    assert not tokens.noisy(ids, labels, found, 0, 0, 3, prob=0.0).is_noise.any()
    assert torch.equal(tokens.noisy(ids, labels, found, 0, 0, 0).input_ids, ids)


def test_padded_flattened_and_packed_rows_get_the_same_tokens():
    rows = [ROW, [5, 6, 7, 8, 9, 10], [31, 32, 33, *range(40, 55)], [61, 62, 63, 64]]
    ids, labels, found = batch(*rows)
    padded = tokens.noisy(ids, labels, found, 7, 3, 4)
    flat = torch.tensor([sum(rows, [])])
    positions = torch.tensor([[i for row in rows for i in range(len(row))]])
    flat_labels = torch.tensor([[label for row in rows for label in [-100] * PROMPT + row[PROMPT:]]])
    packed = tokens.noisy(flat, flat_labels, draws.sequences(flat, None, positions), 7, 3, 4)
    assert packed.input_ids[0].tolist() == padded.input_ids[found.real.view_as(ids)].tolist()
    left = torch.tensor([[0] * (18 - len(row)) + row for row in rows])
    left_labels = torch.tensor([[-100] * (18 - len(row) + PROMPT) + row[PROMPT:] for row in rows])
    on_the_left = tokens.noisy(left, left_labels, draws.sequences(left, (left > 0).long()), 7, 3, 4)
    assert on_the_left.input_ids[left > 0].tolist() == packed.input_ids[0].tolist()
    assert packed.is_noise.any() and (packed.input_ids != flat).any()
    begin = 0
    for row in rows:
        made = packed.input_ids[0, begin : begin + len(row)].tolist()
        assert made[:PROMPT] == row[:PROMPT] and made[-1] == row[-1] and set(made) <= set(row), "within its own row"
        begin += len(row)


def test_another_step_or_seed_replaces_others():
    ids, labels, found = batch(*([id + 30 * i for id in ROW] for i in range(20)))
    first, step, seed = (tokens.noisy(ids, labels, found, *key).input_ids for key in ((0, 0), (0, 1), (1, 0)))
    assert torch.equal(first, tokens.noisy(ids, labels, found, 0, 0).input_ids)
    assert not torch.equal(first, step) and not torch.equal(first, seed)


def test_of_several_answers_one_is_picked_by_its_starts():
    ids = torch.arange(1, 31) + 30 * torch.arange(2000).unsqueeze(1)
    labels = ids.clone()
    # answers at 3 to 6 and at 12 to 29: of pieces of 2, there are 2 and 16 starts
    labels[:, :3], labels[:, 7:12] = -100, -100
    noise = tokens.noisy(ids, labels, draws.sequences(ids), 0, 0, 2).is_noise
    assert (noise.sum(dim=1) == 2).all() and (noise[:, 1:] & noise[:, :-1]).any(dim=1).all(), "one piece each"
    assert noise[:, :7].any(dim=1).float().mean().item() == pytest.approx(2 / 18, abs=0.04)


def test_special_tokens_are_not_copied_where_they_are_left_out():
    ids, labels, found = batch([1, 2, 3, *range(10, 22)])
    special = torch.tensor([1, 3, *range(11, 21)])
    for step in range(50):
        made = tokens.noisy(ids, labels, found, 0, step, 5, special=special)
        assert set(made.input_ids[made.is_noise].tolist()) <= {2, 10, 21}
    none = tokens.noisy(ids, labels, found, 0, 0, 5, special=torch.arange(30))
    assert torch.equal(none.input_ids, ids) and not none.is_noise.any(), "nothing may be copied"


def test_rows_are_counted():
    ids, labels, found = batch(ROW, ROW[:4], ROW[:3])
    made = tokens.noisy(ids, labels, found, 0, 0, 3)
    assert (made.learned, made.sequences, made.skipped, made.full) == (8, 2, 1, 0)
    made = tokens.noisy(ids, ids, found, 0, 0, 3)
    assert made.full == 3


def test_rows_without_a_token_to_learn_are_left_alone():
    ids, labels, found = batch(ROW, ROW)
    made = tokens.noisy(ids, torch.full_like(ids, -100), found, 0, 0, 3)
    assert torch.equal(made.input_ids, ids) and made.sequences == 0
