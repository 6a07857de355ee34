"""Noise hangs on what it is for: its size on the sequence's real length, its draw on seed, step, tokens and place."""

import math

import pytest
import torch
from torch import nn

from posttrain.errors import ConfigError
from posttrain.mechanisms.noise import draws
from posttrain.mechanisms.noise.branches import repeated
from posttrain.mechanisms.noise.controller import EmbeddingNoise
from posttrain.models import tiny_model

ROWS = [[11, 12, 13], [21, 22, 23, 24, 25], [31, 32, 33, 34, 35, 36, 37, 38]]


def padded(rows, side="right", width=8):
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return dict(input_ids=ids, attention_mask=mask)


def flat(rows, extra=0):
    ids = torch.tensor([sum(rows, []) + [0] * extra])
    return dict(input_ids=ids, position_ids=torch.tensor([[p for row in rows for p in range(len(row))] + [0] * extra]))


def drawn(batch, kind="neftune", alpha=5.0, seed=3, step=7, size=64):
    """The noise of each real token, in the order of the rows, and that of padding."""
    found = draws.sequences(batch["input_ids"], batch.get("attention_mask"), batch.get("position_ids"))
    keys = draws.token_keys(batch["input_ids"], found, seed, step)
    made = draws.noise(kind, keys, draws.scales(kind, alpha, found, size), size, torch.float32)
    return made[found.real], made[~found.real]


def test_bounds_are_the_golden_numbers_of_each_length():
    golden = {10: 0.1976423538, 100: 0.0625, 2048: 0.0138106793}
    for length, bound in golden.items():
        found = draws.sequences(torch.ones(1, length, dtype=torch.long))
        reach = draws.scales("neftune", 5.0, found, 64)
        assert reach.tolist() == pytest.approx([bound] * length, rel=1e-6)
        assert draws.scales("uniform", 5.0, found, 64)[0] / math.sqrt(3) == pytest.approx(bound, rel=1e-6)
    reach = draws.scales("neftune", 5.0, draws.sequences(**flat(ROWS)), 64).unique(sorted=True).tolist()
    assert reach == pytest.approx([0.2209708691, 0.2795084972, 0.3608439182], rel=1e-6)
    # the whole row's length would give each of them 0.15625
    assert min(reach) > 1.3 * 0.15625


@pytest.mark.parametrize(("kind", "norm"), [("neftune", 5 / math.sqrt(3)), ("uniform", 5.0)])
def test_noise_is_uniform_within_its_bound_and_has_its_norm(kind, norm):
    ids = torch.arange(64).view(1, 64)
    made, _ = drawn(dict(input_ids=ids), kind, size=2048)
    bound = draws.KINDS[kind].scale * 5 / math.sqrt(64 * 2048)
    values = (made / bound).double().flatten()
    count = values.numel()
    assert values.abs().max() < 1 and values.abs().max() > 0.9999
    # six standard errors
    assert abs(values.mean()) < 6 / math.sqrt(3 * count)
    assert abs(values.square().mean() - 1 / 3) < 6 * math.sqrt(4 / 45 / count)
    histogram = torch.histc(values.float(), 16, -1, 1) / count
    assert (histogram - 1 / 16).abs().max() < 6 * math.sqrt(1 / 16 / count)
    assert made.norm().item() == pytest.approx(norm, rel=0.01)


def test_signs_are_fair_and_a_sequences_noise_has_the_norm_alpha_exactly():
    made, _ = drawn(padded(ROWS), "symnoise", size=4096)
    for place, row in ((0, ROWS[0]), (3, ROWS[1]), (8, ROWS[2])):
        own = made[place : place + len(row)]
        assert own.double().norm().item() == pytest.approx(5.0, rel=1e-6)
        assert own.abs().unique().tolist() == pytest.approx([5 / math.sqrt(len(row) * 4096)], rel=1e-6)
    ones = made.sign()
    assert abs(ones.mean()) < 6 / math.sqrt(ones.numel())
    # of coordinates that share a word, neighbours and a word apart
    for shift in (1, 2, 63, 64, 65):
        assert abs((ones[:, shift:] * ones[:, :-shift]).mean()) < 6 / math.sqrt(ones.numel())
    assert drawn(padded(ROWS), "symnoise", size=5)[0].shape == (16, 5)


def test_gaussian_noise_has_the_moments_of_a_normal_distribution():
    ids = torch.arange(64).view(1, 64)
    made, _ = drawn(dict(input_ids=ids), "gaussian", size=2048)
    values = (made * math.sqrt(64 * 2048) / 5).double().flatten()
    count = values.numel()
    # six standard errors of each moment
    for power, expected, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(values.pow(power).mean() - expected) < 6 * math.sqrt(spread / count), power
    assert made.norm().item() == pytest.approx(5.0, rel=0.01)


def test_noise_differs_between_tokens_coordinates_sequences_steps_and_seeds():
    size, limit = 4096, 6 / math.sqrt(4096)
    made, _ = drawn(padded(ROWS), size=size)
    others = [drawn(padded(ROWS), size=size, **change)[0] for change in (dict(seed=4), dict(step=8))]
    rows = torch.cat([made, *others])
    rows = rows / rows.norm(dim=1, keepdim=True)
    between = rows @ rows.T - torch.eye(len(rows))
    assert between.abs().max() < limit
    # one token's coordinates, against themselves moved on by 1 and by a word's other half
    for shift in (1, 2, 64):
        assert abs((rows[0, shift:] * rows[0, :-shift]).sum()) < limit
    # equal tokens at several places, and the same row with another last token
    alike, _ = drawn(dict(input_ids=torch.full((1, 4), 9)), size=size)
    assert len({row.sum().item() for row in alike}) == 4
    changed, _ = drawn(padded([[11, 12, 14]]), size=size)
    assert (changed[0] == made[0]).sum() < 10


@pytest.mark.parametrize(
    "batch",
    [padded(ROWS, "left"), padded(ROWS, width=20), flat(ROWS), flat(ROWS, extra=7)],
    ids=["left", "wide", "flat", "flat with padding"],
)
@pytest.mark.parametrize("kind", draws.KINDS)
def test_layout_changes_no_token_and_padding_gets_nothing(batch, kind):
    expected, _ = drawn(padded(ROWS), kind)
    made, padding = drawn(batch, kind)
    assert torch.equal(made, expected)
    assert not padding.any()
    # each row alone, in whatever order
    alone = torch.cat([drawn(padded([row]), kind)[0] for row in ROWS])
    assert torch.equal(alone, expected)


def splitmix(value: int) -> int:
    value &= 2**64 - 1
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 2**64 - 1
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 2**64 - 1
    return value ^ value >> 31


def test_draws_are_those_of_whole_numbers_without_tensors():
    golden, row, seed, step, size = 0x9E3779B97F4A7C15, ROWS[0], 3, 7, 5
    content = sum(splitmix(splitmix(token + 1) + (place + 1) * golden) for place, token in enumerate(row))
    run = 0
    for number in (seed, step, 0):
        run = splitmix((run + number + 1) * golden)
    made, _ = drawn(padded([row]), seed=seed, step=step, size=size)
    for place in range(len(row)):
        key = splitmix(splitmix(content ^ run) + (place + 1) * golden)
        for coordinate in range(size):
            word = splitmix(key + (coordinate // 2 + 1) * golden)
            whole = word >> 32 * (coordinate % 2) & 2**23 - 1
            value = ((whole + 0.5) / 2**22 - 1) * 5 / math.sqrt(len(row) * size)
            assert made[place, coordinate].item() == pytest.approx(value, rel=1e-5, abs=1e-9)


def test_the_gradient_is_that_of_embeddings_with_the_noise_added():
    model, batch = tiny_model().train(), padded(ROWS)
    noise = EmbeddingNoise("neftune", 5.0, seed=3)
    with noise.added_to(model, step=7):
        loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    found = draws.sequences(batch["input_ids"], batch["attention_mask"])
    made = torch.zeros(24, 64)
    made[found.real] = drawn(batch)[0]
    other = tiny_model().train()
    vectors = other.get_input_embeddings()(batch["input_ids"]) + made.view(3, 8, 64)
    expected = other(inputs_embeds=vectors, attention_mask=batch["attention_mask"], labels=batch["input_ids"]).loss
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-7)
    squares = noise.take_squares()
    assert squares[0].item() == pytest.approx(made.square().sum().item(), rel=1e-5)
    assert squares[1] > 0 and not noise.take_squares().any()


def test_forwards_without_gradient_and_outside_are_clean_and_no_hook_stays():
    model, batch = tiny_model().train(), padded(ROWS)
    clean = model(**batch).logits
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    noise = EmbeddingNoise("neftune", 5.0, seed=3)
    with noise.added_to(model, step=0):
        noisy = model(**batch).logits
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, clean)
            model.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False)
        assert torch.equal(model(**batch).logits, noisy)
    assert (noisy - clean)[batch["attention_mask"].bool()].abs().min() > 0
    assert torch.equal(model(**batch).logits, clean)
    with pytest.raises(KeyError), noise.added_to(model, step=0):
        raise KeyError
    assert hooks == [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]


def test_batches_and_models_that_noise_cannot_be_for_are_refused():
    model, noise, batch = tiny_model(), EmbeddingNoise("neftune", 5.0, seed=3), padded(ROWS)
    with noise.added_to(model, 0), pytest.raises(ConfigError, match="no input_ids of two dimensions"):
        model(inputs_embeds=torch.zeros(1, 3, 64))
    with noise.added_to(model, 0), pytest.raises(ConfigError, match=r"attention_mask is \(3, 1, 8, 8\)"):
        model(input_ids=batch["input_ids"], attention_mask=torch.ones(3, 1, 8, 8, dtype=torch.bool))
    with pytest.raises(ConfigError, match="Linear has no input embedding"), noise.added_to(nn.Linear(2, 2), 0):
        pass

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(300, 4)

        def get_input_embeddings(self):
            return self.embedding

        def forward(self, input_ids):
            return self.embedding.weight[input_ids]

    own = Own()
    with pytest.raises(ConfigError, match="without calling its input embedding"), noise.added_to(own, 0):
        own(input_ids=batch["input_ids"])


def test_two_signs_in_one_forward_are_two_forwards_on_either_side_of_the_embeddings():
    model, batch = tiny_model().train(), padded(ROWS)
    noise = EmbeddingNoise("symnoise", 5.0, seed=3)
    with noise.added_to(model, step=7):
        logits = model(**repeated(batch, 2)).logits
    found = draws.sequences(batch["input_ids"], batch["attention_mask"])
    made = torch.zeros(24, 64)
    made[found.real] = drawn(batch, "symnoise")[0]
    vectors = model.get_input_embeddings()(batch["input_ids"])
    real = batch["attention_mask"].bool()
    for sign, ours in ((1, logits[:3]), (-1, logits[3:])):
        moved = vectors + sign * made.view(3, 8, 64)
        expected = model(inputs_embeds=moved, attention_mask=batch["attention_mask"]).logits
        torch.testing.assert_close(ours[real], expected[real], atol=1e-5, rtol=1e-5)
    squares = noise.take_squares()
    assert squares[0].item() == pytest.approx(3 * 25, rel=1e-5)
    assert squares[1].item() == pytest.approx(vectors[real].square().sum().item(), rel=1e-5)


def test_the_mean_over_both_signs_leaves_the_curvature_alone():
    # golden numbers of a quadratic: odd orders cancel
    h = torch.tensor([[2, 0.5, 0], [0.5, 1, -0.3], [0, -0.3, 3]], dtype=torch.float64)
    g, x = (torch.tensor(values, dtype=torch.float64) for values in ([1, -1, 0.5], [0.2, -0.1, 0.4]))

    def f(at):
        return (g @ at + 0.5 * at @ h @ at).item()

    m = 0.05 / math.sqrt(3)
    assert m == pytest.approx(0.0288675135, rel=1e-8)
    e = torch.tensor([1.0, -1, 1], dtype=torch.float64)
    assert [f(x), f(x + m * e)] == pytest.approx([0.787, 0.9105768899], rel=1e-9)
    assert (f(x + m * e) + f(x - m * e)) / 2 == pytest.approx(0.7893333333, rel=1e-9)
    every = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3)
    assert sum(f(x + m * signs) for signs in every) / 8 == pytest.approx(0.7895, rel=1e-9)
    assert f(x) + m**2 / 2 * h.trace().item() == pytest.approx(0.7895, rel=1e-9)


def test_rows_are_repeated_by_known_names_and_bounds_of_sequences_go_on():
    ids = torch.arange(6).view(2, 3)
    batch = dict(
        input_ids=ids, labels=ids, position_ids=torch.tensor([[0, 1, 0]]), cu_seq_lens_q=torch.tensor([0, 2, 3, 6]),
        max_length_q=3, use_cache=False,
    )  # fmt: skip
    made = repeated(batch, 3)
    assert torch.equal(made["input_ids"], ids.repeat(3, 1)) and made["position_ids"].shape == (6, 3)
    assert made["cu_seq_lens_q"].tolist() == [0, 2, 3, 6, 8, 9, 12, 14, 15, 18]
    assert made["max_length_q"] == 3 and made["use_cache"] is False
    # a tensor of B numbers that are of no row, as where B is T
    with pytest.raises(ConfigError, match=r"the batch holds weights \(2,\), .* not known how they would share it"):
        repeated(batch | dict(weights=torch.ones(2)), 2)
    with pytest.raises(ConfigError, match="attention_mask"):
        repeated(batch | dict(attention_mask=torch.ones(2, 1, 3, 3)), 2)
