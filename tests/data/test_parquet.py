"""Parquet files with columns of types that `datasets` does not have."""

import decimal
import json
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from posttrain.cli import main
from posttrain.data import parquet
from posttrain.data.pairs.loading import load_preferences
from posttrain.data.scored.loading import load_scored
from posttrain.data.sources import read_rows
from posttrain.data.tasks.loading import load_demonstrations
from posttrain.errors import DataError

MAP = pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64()))
UNREADABLE = {
    "map": MAP,
    "map_in_object": pa.array([{"m": [("a", "b")]}], pa.struct([("m", pa.map_(pa.string(), pa.string()))])),
    "maps": pa.array([[[("a", 1)]]], pa.list_(pa.map_(pa.string(), pa.int64()))),
    "uuid": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([uuid.UUID(int=1).bytes], pa.binary(16))),
    "bool8": pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1], pa.int8())),
}


def write(path, **columns):
    pq.write_table(pa.table(columns), path)
    return str(path)


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_column_of_another_type_is_left_out_and_said(tmp_path, kind, logged):
    pair = {"prompt": ["q"], "chosen": ["c"], "rejected": ["r"]}
    source = write(tmp_path / "a.parquet", **pair, meta=UNREADABLE[kind])
    right = {"prompt": "q", "chosen": "c", "rejected": "r"}
    for convert in (True, False):
        logged.clear()
        assert load_preferences(source, convert=convert).to_list() == [right]
        assert logged.text.count("a.parquet: left out: the column meta (") == 1
    assert read_rows(source)[0] == [right]
    scored = write(tmp_path / "b.parquet", prompt=["q"], completion=["c"], reward=[1.0], meta=UNREADABLE[kind])
    assert load_scored(scored).to_list() == [{"prompt": "q", "completion": "c", "reward": 1.0}]
    task = write(tmp_path / "c.parquet", prompt=["q"], gold=["1"], meta=UNREADABLE[kind])
    assert load_demonstrations(task, need_demonstrations=False)["gold"][:] == ["1"]


@pytest.mark.parametrize("column", ["rejected", "tools", "chat_template_kwargs", "system"])
def test_a_column_that_is_read_is_not_left_out(tmp_path, column):
    pair = {"prompt": ["q"], "chosen": ["c"], "rejected": ["r"]}
    source = write(tmp_path / "a.parquet", **pair | {column: MAP})
    with pytest.raises(DataError, match=rf"a\.parquet: the column {column} is of the Arrow type map<string, int64"):
        load_preferences(source)
    with pytest.raises(DataError, match=f"the column {column} is of the Arrow type map"):
        read_rows(source)


def test_types_that_can_be_read_are(tmp_path, logged):
    source = write(
        tmp_path / "a.parquet",
        prompt=pa.array(["q"]).dictionary_encode(),
        chosen=pa.array(["c"], pa.large_string()),
        rejected=pa.array(["r"], pa.string_view()),
        price=pa.array([decimal.Decimal("1.5")]),
        sizes=pa.array([[1, 2]], pa.list_(pa.int64(), 2)),
    )
    assert load_preferences(source).to_list() == [{"prompt": "q", "chosen": "c", "rejected": "r"}]
    assert read_rows(source)[0][0]["price"] == decimal.Decimal("1.5")
    assert logged.text == ""


@pytest.mark.parametrize("command", ["inspect", "stats"])
def test_the_commands_read_such_files(tmp_path, capsys, command):
    source = write(tmp_path / "a.parquet", prompt=["q"], chosen=["c"], rejected=["r"], meta=MAP)
    assert main(["data", command, source, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["columns"] == ["prompt", "chosen", "rejected"]


def test_a_file_that_is_no_parquet_is_refused(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        load_preferences(str(tmp_path / "a.parquet"))


def _repeats(path, rows: int, **kwargs):
    indices = pa.array([0] * rows, pa.int32())
    pq.write_table(
        pa.table({"prompt": pa.DictionaryArray.from_arrays(indices, pa.array(["a" * 1000]))}), path, **kwargs
    )


@pytest.mark.parametrize(
    "write_it, most, message",
    [
        (lambda path: write(path, prompt=["a" * 1000]), {"LONGEST_CELL": 500}, "a row of .* 500 are the most"),
        (lambda path: _repeats(path, 9), {"_MOST_BYTES": (5000, 0)}, "bytes; 5,000 are the most"),
        (lambda path: _repeats(path, 9, store_schema=False), {"_MOST_BYTES": (5000, 0)}, "holds 9,.* bytes"),
        (lambda path: _repeats(path, 9), {"_MOST_ROWS": (5, 0)}, "holds 9 rows; 5 are the most"),
        (lambda path: write(path, a=[[[]] * 9]), {"_MOST_VALUES": (5, 0)}, "holds 9 values"),
        (lambda path: _repeats(path, 9), {"LONGEST_CELL": 500}, "a text of 1,000 bytes"),
    ],
)  # fmt: skip
def test_a_file_that_is_far_larger_than_its_bytes_is_refused(tmp_path, monkeypatch, write_it, most, message):
    for name, value in most.items():
        monkeypatch.setattr(parquet, name, value)
    write_it(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        parquet.read_parquet(tmp_path / "a.parquet")


def test_memory_that_arrow_does_not_get_is_a_sentence(tmp_path, monkeypatch):
    _repeats(tmp_path / "a.parquet", 9)

    def read(*_):
        raise pa.ArrowMemoryError("malloc of size 6000000000 failed")

    monkeypatch.setattr(parquet, "_read", read)
    with pytest.raises(DataError, match="asks for more than .* bytes of memory"):
        load_preferences(str(tmp_path / "a.parquet"))
