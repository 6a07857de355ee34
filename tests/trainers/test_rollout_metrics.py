"""What is logged of an update: means over the rows that are in it, whatever the split."""

import pytest

from tests.rollouts import PARENT, entries, prompts, train

MEANS = ("entropy", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")
CLIPS = (*MEANS[1:], "clip_ratio/low_min", "clip_ratio/high_max")
# the second step is on stale log-probs; a narrow range clips some of them
STALE = dict(num_iterations=2, max_steps=2, epsilon=1e-3, learning_rate=2.0, check_gradients=False)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")


def split(size, rows=16):
    return dict(per_device_train_batch_size=size, gradient_accumulation_steps=rows // size)


@pytest.mark.core("2-sequence")
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_means_are_over_the_kept_rows_whatever_the_split(tiny_folder, tmp_path, size, level):
    run = STALE | dict(data=prompts([1, 0, 4, 2]), importance_sampling_level=level)
    # one micro-batch holds all kept rows: TRL's own means
    _, whole = train(tiny_folder, tmp_path / "whole", **run, **split(16))
    _, trainer = train(tiny_folder, tmp_path / "split", **run, **split(size))
    for row, expected in zip(entries(trainer), entries(whole), strict=True):
        for name in ("entropy", *CLIPS):
            assert row[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
        assert row["entropy"] == pytest.approx(5.54, abs=0.1), "an untrained model's"
    assert entries(trainer)[0]["rows/kept_share"] == 0.5
    assert entries(whole)[1]["clip_ratio/region_mean"] > 0.1


@pytest.mark.core("cispo")
@pytest.mark.parametrize("loss", ["cispo", "vespo"])
def test_the_other_losses_means_too(tiny_folder, tmp_path, loss):
    run = dict(data=prompts([1, 0, 4, 2]), num_iterations=2, max_steps=2, loss_type=loss, learning_rate=2.0)
    run |= dict(epsilon_high=1.001) if loss == "cispo" else {}
    name = "cispo_clip_ratio" if loss == "cispo" else "vespo/phi_seq_mean"
    _, whole = train(tiny_folder, tmp_path / "whole", **run, **split(16))
    _, trainer = train(tiny_folder, tmp_path / "split", **run, **split(2))
    for row, expected in zip(entries(trainer), entries(whole), strict=True):
        assert row[name] == pytest.approx(expected[name], rel=1e-4)


def test_an_update_without_rows_has_no_means(tiny_folder, tmp_path):
    _, trainer = train(tiny_folder, tmp_path, data=prompts([0, 4, 0, 4]), max_steps=1)
    row = entries(trainer)[0]
    assert row["rows/kept_share"] == 0 and not set(row) & {"entropy", *CLIPS}


@pytest.mark.slow
def test_with_all_rows_in_the_update_the_means_are_the_parents(tiny_folder, tmp_path):
    stale = {name: value for name, value in STALE.items() if name != "check_gradients"}
    off = dict(prefix_sharing="never", drop_zero_advantage_rows=False)
    _, parent = train(tiny_folder, tmp_path / "trl", **PARENT, **stale, **split(2))
    _, trainer = train(tiny_folder, tmp_path / "ours", **off, **stale, **split(2))
    for row, expected in zip(entries(trainer), entries(parent), strict=True):
        for name in ("entropy", *CLIPS):
            assert row[name] == expected[name], name


def test_the_size_of_advantages_stands_beside_a_loss_of_nothing(tiny_folder, tmp_path):
    run = dict(data=prompts([2, 0, 4, 2]), max_steps=1, scale_rewards="none", loss_type="dr_grpo")
    _, trainer = train(tiny_folder, tmp_path, **run, **split(4))
    # half of the rows have an advantage of 1/2 either way
    assert entries(trainer)[0]["loss/abs_advantage"] == pytest.approx(0.25)


@pytest.mark.slow
def test_a_step_without_demonstrations_has_no_likelihood_of_them(tiny_folder, tmp_path):
    run = dict(preset="hpt", num_generations=4, max_steps=1)
    _, trainer = train(tiny_folder, tmp_path / "none", data=prompts([2, 1, 3, 2]), **run, **split(4))
    assert not [name for row in entries(trainer) for name in row if row[name] is None or name == "hpt/sft_nll"]
    _, trainer = train(tiny_folder, tmp_path / "some", data=prompts([2, 0, 3, 2]), **run, **split(4))
    assert entries(trainer)[0]["hpt/sft_nll"] > 1
