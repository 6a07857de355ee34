import json
import os

import pytest
import torch
from safetensors.torch import save_file

from posttrain.mechanisms import value_head
from posttrain.mechanisms.value_head import ValueHead, fit, folds_of, load, pad, predict, save

WIDTH = 16


def make_states(n, seed=0, width=WIDTH):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (n,), generator=generator).tolist()
    return [torch.randn(length, width, generator=generator) for length in lengths]


@pytest.fixture
def head():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ValueHead(WIDTH, reward_max=4.0).eval()


def test_the_value_is_attention_pooling_by_the_formula(head):
    (states,) = make_states(1, seed=2)
    weight, bias = head.attention.in_proj_weight, head.attention.in_proj_bias
    q, k, v = (
        (x @ w.T + b).view(len(x), 8, 2).transpose(0, 1)
        for x, w, b in zip((head.query[0], states, states), weight.chunk(3), bias.chunk(3), strict=True)
    )
    pooled = (torch.softmax(q @ k.transpose(1, 2) / 2**0.5, dim=-1) @ v).transpose(0, 1).reshape(1, WIDTH)
    value = 4.0 * torch.sigmoid(head.linear(head.attention.out_proj(pooled)))
    torch.testing.assert_close(head(*pad([states])), value.squeeze(1))
    assert sum(p.numel() for p in head.parameters()) == 4 * WIDTH**2 + 6 * WIDTH + 1


def test_padding_and_batching_change_no_value(head):
    states = make_states(5)
    alone = [predict(head, [one])[0] for one in states]
    assert predict(head, states) == pytest.approx(alone, rel=1e-5)
    padded, mask = pad(states)
    # infinities in the padding must not come through
    poisoned = torch.where(mask.unsqueeze(-1), padded, float("nan"))
    with torch.no_grad():
        assert head(poisoned, mask).tolist() == pytest.approx(alone, rel=1e-5)
    assert len(set(alone)) == 5 and all(0 < value < 4 for value in alone)


def test_a_width_that_eight_does_not_divide_gets_fewer_heads():
    assert ValueHead(12).attention.num_heads == 6
    assert ValueHead(7).attention.num_heads == 7


def test_training_finds_what_the_states_say_and_starts_from_the_mean():
    states = make_states(80)
    rewards = torch.tensor([float(one[:, 0].mean() > 0) for one in states]) * 0.6 + 0.2
    counts = torch.ones(80)

    def error(head):
        return (torch.tensor(predict(head, states)) - rewards).square().mean().item()

    before = torch.random.get_rng_state()
    start = fit(states, rewards, counts, 1.0, 0, 0.01, seed=1)
    assert predict(start, states) == pytest.approx([rewards.mean().item()] * 80, abs=1e-6)
    trained = fit(states, rewards, counts, 1.0, 30, 0.01, seed=1)
    assert error(trained) < 0.2 * error(start)
    assert not trained.training
    again = fit(states, rewards, counts, 1.0, 30, 0.01, seed=1)
    assert predict(again, states) == predict(trained, states)
    assert torch.equal(torch.random.get_rng_state(), before), "the global random state is left alone"


def test_answers_count_by_their_number():
    states = make_states(2, seed=3)
    head = fit(states, torch.tensor([0.2, 0.8]), torch.tensor([3.0, 1.0]), 1.0, 0, 0.01, seed=0)
    assert predict(head, states) == pytest.approx([0.35, 0.35], abs=1e-6)


def test_folds_are_even_and_do_not_hang_on_the_order():
    keys = [f"prompt {i}" for i in range(23)]
    folds = folds_of(keys, 5)
    assert sorted(folds.count(fold) for fold in range(5)) == [4, 4, 5, 5, 5]
    turned = dict(zip(reversed(keys), folds_of(keys[::-1], 5), strict=True))
    assert [turned[key] for key in keys] == folds


def test_heads_are_saved_as_safetensors_and_found_by_their_key(tmp_path, head, logged):
    states = make_states(3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        other = ValueHead(WIDTH, reward_max=4.0).eval()
    path = save([head, other], tmp_path / "run", "k1")
    assert path.name == "value_head.safetensors" and {p.name for p in path.parent.glob("[!.]*")} == {path.name}
    first, second = load(tmp_path / "run", "k1")
    assert predict(first, states) == predict(head, states) and predict(second, states) == predict(other, states)
    assert not first.training and first.reward_max == 4.0
    assert load(tmp_path / "run", "k2") is None and load(tmp_path, "k1") is None
    beside = save([other], tmp_path / "run", "k2")
    assert beside != path and len(load(tmp_path / "run", "k1")) == 2 and len(load(tmp_path / "run")) == 2
    assert [predict(one, states) for one in load(tmp_path / "run", "k2")] == [predict(other, states)]
    beside.unlink()
    with value_head.safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["value_head"])
    assert len(facts.pop("digest")) == 32
    assert facts == {"key": "k1", "folds": 2, "hidden_size": WIDTH, "reward_max": 4.0}
    path.write_bytes(b"not a safetensors file")
    assert load(tmp_path / "run", "k1") is None and "cannot be read" in logged.text


def rewritten(path, tensors=None, **facts):
    """The file with other tensors, or other things said of them."""
    with value_head.safe_open(path, framework="pt") as file:
        held = json.loads(file.metadata()["value_head"]) | facts
        tensors = tensors or {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, {"value_head": json.dumps({k: v for k, v in held.items() if v is not None})})


def test_heads_without_a_digest_are_of_before_and_load(tmp_path, head):
    rewritten(save([head], tmp_path, "k"), digest=None)
    assert predict(load(tmp_path, "k")[0], make_states(3)) == predict(head, make_states(3))


def test_a_pipe_in_the_place_of_heads_is_set_aside(tmp_path, head):
    os.mkfifo(tmp_path / "value_head.safetensors")
    path = save([head], tmp_path, "k")
    assert load(tmp_path, "k") and (tmp_path / f"{path.name}.damaged1").is_fifo()


@pytest.mark.parametrize(
    ("how", "fault"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x7f"), "its digest is not that of its content"),
        (lambda path: rewritten(path, folds=0), "its digest is not"),
        (lambda path: rewritten(path, digest=None, hidden_size=1 << 40), "is no value head"),
        (lambda path: rewritten(path, digest=None, folds=3), "is no value head"),
        (lambda path: save_file({"x": torch.ones(1)}, path), "is no value head"),
    ],
    ids=["flipped bits", "other facts", "another width", "more folds", "somebody else's"],
)
def test_a_file_that_holds_no_whole_heads_is_set_aside_and_not_overwritten(tmp_path, head, logged, how, fault):
    path = save([head], tmp_path, "k")
    how(path)
    content = path.read_bytes()
    if fault == "is no value head":
        assert save([head], tmp_path, "k") == path
    else:
        assert load(tmp_path, "k") is None
    assert fault in logged.text and (tmp_path / f"{path.name}.damaged1").read_bytes() == content


def test_states_that_do_not_fit_on_a_device_stay_where_they_are(monkeypatch):
    from posttrain.mechanisms import value_head

    states = [torch.randn(3, 4), torch.randn(1, 4)]
    assert value_head.on_device(states, "cpu") is states and value_head.on_device([], "cuda") == []
    moved = value_head.on_device(states, "meta")
    assert [one.shape for one in moved] == [(3, 4), (1, 4)] and all(one.is_meta for one in moved)

    def full(*args):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(torch.Tensor, "to", full)
    assert value_head.on_device(states, "cuda") is states


def test_states_in_half_precision_are_read_as_their_fp32_values():
    from posttrain.mechanisms import value_head

    states = [torch.randn(3, 4).bfloat16(), torch.randn(1, 4).bfloat16()]
    padded, mask = value_head.pad(states)
    assert padded.dtype == torch.float32 and mask.tolist() == [[True] * 3, [True, False, False]]
    assert torch.equal(padded[0], states[0].float()) and torch.equal(padded[1, :1], states[1].float())
