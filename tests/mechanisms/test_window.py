from types import SimpleNamespace

import pytest
import torch

from posttrain.mechanisms.metrics import MeanMetrics
from posttrain.mechanisms.window import Window, gather_rows, real_rows


def accelerator(rank=0, processes=1, remainder=-1, end=False, inside=True, gather=None):
    state = SimpleNamespace(in_dataloader=inside, end_of_dataloader=end, remainder=remainder)
    return SimpleNamespace(process_index=rank, num_processes=processes, gradient_state=state, gather=gather)


def test_only_the_last_round_of_an_epoch_has_rows_that_fill_up():
    assert real_rows(accelerator(remainder=3, end=False), 4) == 4
    assert real_rows(accelerator(remainder=0, end=True), 4) == 4, "the data divides evenly"
    assert real_rows(accelerator(remainder=-1, end=True), 4) == 4, "a stream, or drop_last"
    assert real_rows(accelerator(remainder=3, end=True, inside=False), 4) == 4


@pytest.mark.parametrize(("remainder", "expected"), [(5, [4, 1, 0]), (9, [4, 4, 1]), (12, [4, 4, 4]), (1, [1, 0, 0])])
def test_the_last_round_is_dealt_out_in_rank_order(remainder, expected):
    rows = [real_rows(accelerator(rank, 3, remainder, end=True), 4) for rank in range(3)]
    assert rows == expected and sum(rows) == remainder


def test_a_full_window_is_undone_by_exactly_one():
    for micro_batches, ranks, size in ((1, 1, 8), (3, 2, 5), (7, 3, 3)):
        assert Window(micro_batches, ranks, micro_batches * ranks * size).rescale(size) == 1.0


def test_undoing_gives_the_mean_over_all_rows():
    values = torch.arange(7.0)
    window = Window(micro_batches=3, world_size=1, rows=7)
    parts = values.split(3)
    total = sum((part * window.rescale(len(part))).mean() / window.micro_batches for part in parts)
    torch.testing.assert_close(total, values.mean())


def test_gathered_rows_are_those_of_all_ranks_in_order_without_fillers():
    held = [torch.tensor([1.0, 2.0, 9.0]), torch.tensor([3.0, 9.0, 9.0]), torch.tensor([4.0, 5.0, 6.0])]
    real = [torch.tensor([True, True, False]), torch.tensor([True, False, False]), torch.tensor([True] * 3)]
    for rank in range(3):
        answers = iter([torch.tensor([2, 1, 3]), torch.tensor([1.0, 2, 0, 3, 0, 0, 4, 5, 6])])
        sent = []

        def gather(tensor, answers=answers, sent=sent):
            sent.append(tensor)
            return next(answers)

        gathered, own = gather_rows(accelerator(rank, 3, gather=gather), held[rank], real[rank])
        assert gathered.tolist() == [1, 2, 3, 4, 5, 6]
        assert gathered[own].tolist() == held[rank][real[rank]].tolist()
        assert sent[0].tolist() == [int(real[rank].sum())] and sent[1].numel() == 3


def test_means_are_over_entries_not_over_batches():
    means = MeanMetrics()
    means.add("a", torch.tensor([1.0, 2.0, 3.0]))
    means.add("a", torch.tensor([10.0]))
    means.add("b", torch.tensor([1.0, float("nan")]), torch.tensor([True, False]))
    reduced = means.reduce(accelerator())
    assert reduced == {"a": (16.0, 4.0), "b": (1.0, 1.0)}
    assert means.reduce(accelerator()) == {}, "a log starts anew"


def test_ranks_that_saw_other_names_are_merged_by_name(monkeypatch):
    other = {"a": [4.0, 2.0], "only_there": [1.0, 1.0]}
    monkeypatch.setattr("posttrain.mechanisms.metrics.gather_object", lambda local: [*local, other])
    means = MeanMetrics()
    means.add("a", torch.tensor([1.0]))
    assert means.reduce(accelerator(processes=2)) == {"a": (5.0, 3.0), "only_there": (1.0, 1.0)}
