"""Of a folder only files are read that lie in it, whatever its card, its settings and its rows name."""

import json
from types import SimpleNamespace

import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value

from posttrain.data import folders
from posttrain.data.sources import load_hub
from posttrain.errors import DataError

ROW = {"prompt": "x", "chosen": "a", "rejected": "b"}


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.jsonl").write_text(json.dumps(ROW | {"prompt": "PRIVATE"}) + "\n")
    return tmp_path / "mine" / "mine.jsonl"


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "theirs"
    folder.mkdir()
    return folder


def card(files, **config) -> str:
    return f"---\n{json.dumps({'configs': [{'config_name': 'default', 'data_files': files, **config}]})}\n---\n"


@pytest.mark.parametrize(
    "files",
    [
        "../mine/mine.jsonl",
        ["data/../../mine/*.jsonl"],
        [{"split": "train", "path": "MINE"}],
        {"train": ["train.jsonl"], "test": ["~/mine.jsonl"]},
        "http://127.0.0.1:9/leak.jsonl",
        "hf://datasets/me/private/x.jsonl",
        "file:///etc/passwd",
        "zip://x.jsonl::https://127.0.0.1:9/a.zip",
    ],
)
@pytest.mark.parametrize("place", ["README.md", ".huggingface.yaml"])
def test_a_card_names_no_file_elsewhere_and_no_server(theirs, mine, files, place):
    (theirs / "train.jsonl").write_text(json.dumps(ROW) + "\n")
    text = card(files).replace("MINE", str(mine))
    (theirs / place).write_text(text if place == "README.md" else text.replace("---", ""))
    with pytest.raises(DataError, match=f"{place} of the data set in the folder '{theirs}' names "):
        load_hub(str(theirs), "train")


def test_a_cards_folder_of_data_lies_in_the_folder(theirs, mine):
    (theirs / "README.md").write_text(card(None, data_dir="../mine"))
    with pytest.raises(DataError, match="names ../mine, a file out of that folder"):
        load_hub(str(theirs), "train")


@pytest.mark.parametrize("name", ["train.jsonl", "README.md", "dataset_infos.json"])
def test_a_link_that_leads_out_is_not_read(theirs, mine, name):
    (theirs / "test.jsonl").write_text(json.dumps(ROW) + "\n")
    (theirs / name).symlink_to(mine)
    with pytest.raises(DataError, match=f"reads {theirs}/{name}, which is a link that leads out of that folder"):
        load_hub(str(theirs), "train")


def test_a_card_that_names_the_folders_own_files_and_links_within_are_read(theirs):
    (theirs / "rows").mkdir()
    (theirs / "rows" / "a.jsonl").write_text(json.dumps(ROW) + "\n")
    (theirs / "b.jsonl").symlink_to("rows/a.jsonl")
    (theirs / "README.md").write_text(card([{"split": "train", "path": ["rows/*.jsonl", "b.jsonl"]}]))
    assert list(load_hub(str(theirs), "train")) == [ROW, ROW]


def test_files_that_were_asked_for_by_name_are_read(theirs, mine):
    assert load_hub(str(theirs), "train", data_files=str(mine))["prompt"] == ["PRIVATE"]


def test_a_snapshot_of_the_hubs_cache_has_its_files_beside_it(tmp_path):
    repository = tmp_path / "datasets--me--pairs"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "123").touch()
    (snapshot / "a.jsonl").symlink_to("../../blobs/123")
    (snapshot / "b.jsonl").symlink_to("../../refs/main")
    folders.check_inside(snapshot, snapshot / "a.jsonl")
    with pytest.raises(DataError, match="b.jsonl, which is a link that leads out"):
        folders.check_inside(snapshot, snapshot / "b.jsonl")


def test_a_card_that_grows_without_bounds_is_refused(theirs):
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    (theirs / "README.md").write_text("---\n" + "\n".join(lines) + "\n---\n")
    with pytest.raises(DataError, match="README.md is no valid YAML: .*aliases"):
        load_hub(str(theirs), "train")


@pytest.mark.parametrize("kind", ["harbor", "hdf5", "lance"])
def test_formats_that_name_other_files_are_refused(theirs, kind):
    module = SimpleNamespace(data_files={})
    made = type("Made", (), {"__module__": f"datasets.packaged_modules.{kind}.{kind}", "config": module})
    with pytest.raises(DataError, match=f"is of the kind {kind}, whose files name others to read"):
        folders.check_files(str(theirs), made())


@pytest.mark.parametrize("named", ["../mine/data-00000-of-00001.arrow", "MINE", 5])
def test_what_was_saved_names_its_own_files_alone(theirs, tmp_path, named):
    Dataset.from_list([ROW | {"prompt": "PRIVATE"}]).save_to_disk(tmp_path / "mine")
    Dataset.from_list([ROW]).save_to_disk(theirs)
    assert load_hub(str(theirs), "train")[0] == ROW
    state = json.loads((theirs / "state.json").read_text())
    mine = str(tmp_path / "mine" / "data-00000-of-00001.arrow")
    state["_data_files"] = [{"filename": mine if named == "MINE" else named}]
    (theirs / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match="state.json of the data set in the folder"):
        load_hub(str(theirs), "train")


def test_splits_that_were_saved_lie_in_the_folder(theirs, tmp_path):
    Dataset.from_list([ROW]).save_to_disk(tmp_path / "mine")
    DatasetDict({"train": Dataset.from_list([ROW])}).save_to_disk(theirs)
    assert load_hub(str(theirs), "train")[0] == ROW
    (theirs / "dataset_dict.json").write_text(json.dumps({"splits": ["../mine"]}))
    with pytest.raises(DataError, match="dataset_dict.json of the data set in the folder .* names ../mine"):
        load_hub(str(theirs), "../mine")
    (theirs / "dataset_dict.json").write_text(json.dumps({"splits": ["train"]}))
    rows = theirs / "train" / "data-00000-of-00001.arrow"
    rows.rename(tmp_path / "rows.arrow")
    rows.symlink_to(tmp_path / "rows.arrow")
    with pytest.raises(DataError, match="data-00000-of-00001.arrow, which is a link that leads out"):
        load_hub(str(theirs), "train")
    (theirs / "dataset_dict.json").write_text("{}")
    with pytest.raises(DataError, match="has no list of splits"):
        load_hub(str(theirs), "train")


@pytest.mark.parametrize("path", ["MINE", "../mine/mine.png", "https://127.0.0.1:9/x.png"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_row_names_no_image_elsewhere(theirs, tmp_path, path, nested):
    path = str(tmp_path / "mine.png") if path == "MINE" else path
    plain = {"bytes": Value("binary"), "path": Value("string")}
    values = [{"bytes": b"x", "path": path}, {"bytes": None, "path": path}, None]
    column = [[{"image": value}] for value in values] if nested else values
    raw = Features({"shown": List({"image": plain}) if nested else plain})
    bare = Features({"shown": List({"image": Image()}) if nested else Image()})
    rows = Dataset.from_dict({"shown": column}, features=raw).cast(bare)
    with pytest.raises(DataError, match="data set in the folder"):
        folders.check_media(str(theirs), rows)
    folders.check_media(str(theirs), rows.select([0, 2]).flatten_indices())
