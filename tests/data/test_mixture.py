"""Mixtures of data sets: what TRL's entries mean, which rows are taken, and what is refused."""

import json

import pytest
from datasets import disable_progress_bars
from trl import DatasetMixtureConfig, get_dataset

from posttrain import recipe
from posttrain.config import DataArguments, parse
from posttrain.config.mixture import rows_of_each
from posttrain.data.pairs.loading import load_preferences
from posttrain.errors import ConfigError, DataError


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Writes files of pairs, whose prompts are the file's name and the row's number, into the working folder."""
    monkeypatch.chdir(tmp_path)

    def write(**lengths):
        for name, length in lengths.items():
            rows = [{"prompt": f"{name}{i}", "chosen": "a", "rejected": "b"} for i in range(length)]
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return write


def mixed(*entries, evaluate=False, seed=1, **settings):
    arguments = DataArguments(datasets=list(entries), **settings)
    return recipe.load_splits(load_preferences, arguments, evaluate, seed)


@pytest.mark.parametrize("fractions", [(None, None), (0.5, 0.5), (3, 1), (0, 2.0), (1, 9)])
def test_the_rows_of_a_mixture_are_those_of_trl(files, tmp_path, fractions):
    files(a=10, b=7)
    disable_progress_bars()
    entries = [
        {"path": "json", "data_files": str(tmp_path / f"{name}.jsonl"), "fraction": fraction}
        for name, fraction in zip("ab", fractions, strict=True)
    ]
    theirs = get_dataset(DatasetMixtureConfig(datasets=entries))["train"]["prompt"][:]
    ours = [{"path": f"{name}.jsonl", "fraction": f} for name, f in zip("ab", fractions, strict=True)]
    assert mixed(*ours)[0]["prompt"][:] == theirs
    assert mixed(*entries)[0]["prompt"][:] == theirs


def test_no_row_comes_up_twice_and_shares_are_as_asked():
    assert rows_of_each([100, 10], [1, 1]) == [10, 10]
    assert rows_of_each([100, 10], [3, 1]) == [30, 10]
    assert rows_of_each([100, 10], [30, 10]) == [30, 10]
    assert rows_of_each([5, 0], [1, 0]) == [5, 0]
    assert rows_of_each([5, 3], [None, None]) == [5, 3]


def test_held_out_rows_are_drawn_by_the_seed_and_are_not_trained_on(files):
    files(a=12, b=8)
    entries = [{"path": "a.jsonl"}, {"path": "b.jsonl"}]
    train, held_out = mixed(*entries, test_split_size=0.25)
    assert len(held_out) == 5 and not set(train["prompt"]) & set(held_out["prompt"])
    again, other = mixed(*entries, test_split_size=0.25), mixed(*entries, test_split_size=0.25, seed=2)
    assert held_out["prompt"][:] == again[1]["prompt"][:] != other[1]["prompt"][:]
    assert len(mixed(*entries, test_split_size=0.25, max_eval_rows=2)[1]) == 2
    with pytest.raises(ConfigError, match="test_split_size is 0.01 of 1 training rows"):
        mixed({"path": "a.jsonl"}, max_train_rows=1, test_split_size=0.01)
    with pytest.raises(ConfigError, match="datasets name no rows for it. Set eval_dataset_name .* or test_split_size"):
        mixed(*entries, evaluate=True)


def test_data_sets_that_do_not_fit_together_are_named(files, tmp_path):
    files(a=2, b=2)
    rows = [{"prompt": f"c{i}", "chosen": "a", "rejected": "b", "flip_rate": 0.1, "tools": None} for i in range(2)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"datasets\[0\] \(a.jsonl\) has no column 'flip_rate', which datasets\[1\]"):
        mixed({"path": "a.jsonl"}, {"path": "c.jsonl"})
    train, _ = mixed({"path": "a.jsonl"}, {"path": "c.jsonl", "columns": ["prompt", "chosen", "rejected", "tools"]})
    assert len(train) == 4 and train["tools"][:] == [None] * 4
    with pytest.raises(DataError, match=r"datasets\[0\] \(a.jsonl\): columns has 'score', which is missing; found"):
        mixed({"path": "a.jsonl", "columns": ["score"]})
    messages = {"prompt": [{"role": "user", "content": "d"}]}
    messages |= {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    (tmp_path / "d.jsonl").write_text(json.dumps(messages) + "\n")
    with pytest.raises(DataError, match=r"datasets\[1\] \(d.jsonl\), row 1: prompt is a list, and in datasets\[0\]"):
        mixed({"path": "a.jsonl"}, {"path": "d.jsonl"})
    with pytest.raises(DataError, match="b.jsonl, line 1, column"):
        (tmp_path / "b.jsonl").write_text("{broken\n")
        mixed({"path": "a.jsonl"}, {"path": "b.jsonl"})
    with pytest.raises(ConfigError, match="a.jsonl: name is 'main', which is for data sets of the hub"):
        mixed({"path": "a.jsonl", "name": "main"})


REFUSED = {
    "datasets: []": "datasets is []; it must be a list of one entry or more",
    "datasets: [a.jsonl]": "datasets[0] is 'a.jsonl'; it must be a mapping, such as `path: a.jsonl`",
    "datasets: [{name: x}]": "datasets[0] has no path; name a local file",
    "datasets: [{path: a, weight: 2}]": "datasets[0] has the unknown key 'weight'; did you mean 'fraction'?",
    "datasets: [{path: a, splits: x}]": "datasets[0] has the unknown key 'splits'; did you mean 'split'?",
    "datasets: [{path: a, fraction: 1.0e+308}, {path: b, fraction: 1.0e+308}]": "the fractions add up to more than",
    "datasets: [{path: a, fraction: .inf}]": "it must be a number of 0 or more",
    "datasets: [{path: a, fraction: -1}]": "datasets[0]: fraction is -1; it must be a number of 0 or more",
    "datasets: [{path: a, fraction: .nan}]": "fraction is nan; it must be",
    "datasets: [{path: a, fraction: true}]": "fraction is True; it must be",
    "datasets: [{path: a, fraction: half}]": "fraction is 'half'; it must be a number of 0 or more",
    "datasets: [{path: a, fraction: 0}]": "every fraction is 0, which leaves no row",
    "datasets: [{path: a, fraction: 1}, {path: b}]": "datasets[1] has no fraction, and others have one",
    "datasets: [{path: a, columns: prompt}]": "columns is 'prompt'; it must be a list of column names",
    "datasets: [{path: a, split: 1}]": "split is 1; it must be a text, in quotes",
    "datasets: [{path: 'gym:x', name: y}]": "name is for data sets of the hub, and gym:x is made",
    "datasets: [{path: a}]\ndataset_name: b": "dataset_name is 'b' beside datasets; make it an entry",
    "datasets: [{path: a}]\nstreaming: true": "streaming is True: all rows are read and checked",
    "datasets: [{path: a}]\ntest_split_size: 1.5": "test_split_size is 1.5; it must be a share above 0 and below 1",
    "test_split_size: 0.1\neval_dataset_name: b": "test_split_size is 0.1 beside eval_dataset_name 'b'",
    "more_datasets: [b.jsonl]": "`more_datasets` is not a setting any more: write `datasets:`, a list",
}


@pytest.mark.parametrize("text", REFUSED)
def test_a_mixture_that_cannot_be_is_refused_with_its_entry_and_place(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse((DataArguments,), ["--config", str(path)])
    assert REFUSED[text] in str(caught.value) and f"{path}:" in str(caught.value)


def test_a_fraction_that_yaml_reads_as_a_text_is_a_number(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("datasets: [{path: a, fraction: 1e-9}, {path: b, fraction: 1}]")
    (data,) = parse((DataArguments,), ["--config", str(path)])
    assert [entry.fraction for entry in data.datasets] == [1e-9, 1]


def test_the_card_is_told_which_data_sets_of_the_hub_and_which_shares(files):
    files(a=4)
    arguments = DataArguments(datasets=[{"path": "a.jsonl", "fraction": 3}, {"path": "org/b", "fraction": 1}])
    assert recipe.hub_data(arguments) == {
        "dataset_name": ["org/b"],
        "eval_dataset_name": None,
        "eval_split": None,
        "mixture": [(None, 0.75), ("org/b", 0.25)],
    }
