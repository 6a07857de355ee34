import pytest
import torch

from posttrain.mechanisms.sequence_cache import TokenCache
from posttrain.mechanisms.weighted_sampler import WeightedSampler


def draw(weights, n, seed=0, epoch=0):
    return list(WeightedSampler(weights, n, seed, lambda: epoch))


def test_rows_come_up_by_their_weights_and_rows_of_weight_zero_never():
    counts = torch.bincount(torch.tensor(draw([0.0, 0.3, 0.0, 0.15, 0.0], 30_000)), minlength=5)
    assert counts[[0, 2, 4]].tolist() == [0, 0, 0]
    # [2/3, 1/3]; one standard error is 0.0027
    assert counts[1].item() / 30_000 == pytest.approx(2 / 3, abs=0.011)


def test_a_stream_follows_from_seed_and_epoch_alone():
    weights = [0.1, 0.2, 0.3, 0.4]
    assert draw(weights, 40) == draw(weights, 40)
    assert draw(weights, 40) != draw(weights, 40, epoch=1)
    assert draw(weights, 40, seed=1, epoch=0) != draw(weights, 40, seed=0, epoch=1)
    assert draw(weights, 40)[:10] == draw(weights, 10), "a longer stream begins with a shorter one"


def test_the_epoch_is_asked_when_one_begins():
    epoch = [0]
    sampler = WeightedSampler([1.0] * 8, 8, 5, lambda: epoch[0])
    first = list(sampler)
    epoch[0] = 1
    assert list(sampler) != first and len(sampler) == 8
    epoch[0] = 0
    assert list(sampler) == first


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -0.1], [1.0, float("nan")], [float("inf")]])
def test_weights_that_cannot_be_drawn_by_are_refused(weights):
    with pytest.raises(ValueError, match="weights must be finite numbers of 0 or more, at least one of them above 0"):
        WeightedSampler(weights, 4, 0, lambda: 0)


def test_a_token_cache_gives_back_what_it_was_given(tmp_path, logged):
    cache = TokenCache(tmp_path, "key")
    assert cache.load() == {}
    one, two = torch.tensor([-1.25, -0.5]), torch.tensor([-3.0])
    cache.add({b"a" * 16: one})
    cache.add({b"b" * 16: two, b"c" * 16: torch.zeros(0)})
    found = cache.load()
    assert [value.tolist() for value in found.values()] == [one.tolist(), two.tolist(), []]
    assert list(found) == [b"a" * 16, b"b" * 16, b"c" * 16]
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["key-tokens.safetensors"]
    assert not list(tmp_path.glob(".*.partial")), "no partial file is left"
    cache.path.write_bytes(b"not a safetensors file")
    assert cache.load() == {} and "cannot be read" in logged.text
    cache.add({b"a" * 16: two})
    assert cache.load()[b"a" * 16].tolist() == [-3.0]
