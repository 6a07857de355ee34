import gzip
import json

import datasets
import pytest
from datasets import Dataset

from posttrain.data.generated import reverse_list_pairs
from posttrain.data.pairs.loading import load_preferences
from posttrain.errors import ConfigError, DataError, EnvironmentIssue

ROWS = [
    {"prompt": f"Q{i}", "chosen": f"yes {i}", "rejected": f"no {i}", "flip_rate": i / 10, "source": "s"}
    for i in range(3)
]
KEPT = [{name: value for name, value in row.items() if name != "source"} for row in ROWS]
LINES = "\n".join(map(json.dumps, ROWS)) + "\n\n"


def write(path, content):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write(content)
    return str(path)


@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl", "pairs.jsonl.gz", "pairs.parquet"])
def test_each_kind_of_file_gives_the_same_rows_and_only_the_columns_in_use(tmp_path, name):
    path = tmp_path / name
    if name.endswith("parquet"):
        Dataset.from_list(ROWS).to_parquet(path)
    else:
        write(path, json.dumps(ROWS) if name.endswith("json") else LINES)
    assert load_preferences(str(path)).to_list() == KEPT
    assert load_preferences(str(path), limit=2).to_list() == KEPT[:2]
    assert len(load_preferences(str(path), limit=99)) == 3


def test_messages_and_implicit_prompts_are_kept_as_they_are(tmp_path):
    conversation = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    row = {"chosen": conversation, "rejected": [conversation[0], {"role": "assistant", "content": "no"}]}
    assert load_preferences(write(tmp_path / "a.jsonl", json.dumps(row))).to_list() == [row]


def test_generated_pairs_come_by_n_and_seed_with_a_disjoint_second_split():
    train = load_preferences("generated:reverse_list?n=20&seed=4")
    assert train.to_list() == reverse_list_pairs(20, 4).to_list()
    assert len(load_preferences("generated:reverse_list")) == 256
    test = load_preferences("generated:reverse_list?n=20&seed=4", split="test", limit=5)
    assert test.to_list() == reverse_list_pairs(20, 5, exclude=train).to_list()[:5]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("generated:sort", "'generated:sort' is not known; generated pairs are generated:reverse_list"),
        ("generated:arithmetic", "'generated:arithmetic' makes tasks; generated pairs are generated:reverse_list"),
        ("gym:chain_sum", "'gym:chain_sum' makes tasks; generated pairs are"),
        ("generated:reverse_list?n=many", "n='many' is no integer"),
        ("generated:reverse_list?n=0", "n=0 must be at least 1"),
        ("generated:reverse_list?n=4&n=5", "n is given twice; keep one"),
        ("generated:reverse_list?rows=5", "no option 'rows' \\(it has n, seed, words\\)"),
    ],
)
def test_wrong_generated_sources_are_named(source, message):
    with pytest.raises(ConfigError, match=message):
        load_preferences(source)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", LINES.replace('"no 1"', '"no 1'), r"a\.jsonl, line 2, column \d+: broken JSON"),
        ("a.jsonl.gz", LINES.replace('"no 2"', "no 2"), r"a\.jsonl\.gz, line 3, column \d+: broken JSON"),
        ("a.jsonl", '{"chosen": "a",\n' + LINES, r"a\.jsonl, line 1, column 16: broken JSON"),
        ("a.jsonl", LINES + "[" * 100_000, r"a\.jsonl, line 5: JSON that cannot be read: .*recursion"),
        ("a.json", '{"chosen": ' + "9" * 5000 + "}", r"a\.json: JSON that cannot be read: Exceeds the limit"),
        (
            "a.json",
            LINES,
            r"line 2, column 1: broken JSON: Extra data. A file with a row on each line is to be",
        ),
        ("a.json", json.dumps(ROWS, indent=1).replace('"no 1"', "no"), "line 12, column 15: broken JSON"),
        ("a.json", '{"data": []}', r"must hold a list of rows, not an object"),
        (
            "a.jsonl",
            '{"prompt": "p", "rejected": "a"}',
            r"line 1 has no column chosen. Found: prompt, rejected. Needed: chosen, rejected, and prompt unless both .*"
            r"These look like standard prompt-only rows .* A row looks like .*\n  {\"prompt\": \"2 \+ 2 =\", [^\n]*$",
        ),
        (
            "a.jsonl",
            '{"prompt": "p", "completion": "c", "label": true}',
            "These look like standard unpaired preference rows .*, without a second answer to compare with. A row",
        ),
        (
            "a.jsonl",
            '{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}',
            "Found: conversations. .*These look like conversational sharegpt rows .*, without a second answer",
        ),
        (
            "a.json",
            '[{"instruction": "q", "output": "a"}]',
            "row 1 has no column chosen and rejected. .* These look like standard alpaca rows .*, without a second",
        ),
        (
            "a.jsonl",
            '{"question": "q", "good": "a", "bad": "b"}',
            r"Found: question, good, bad. .* Rename question to prompt, good to chosen, bad to rejected.",
        ),
        ("a.jsonl", LINES + '{"prompt": "p"}', r"line 5: 'chosen' and 'rejected' missing, though other"),
        ("a.jsonl", '{"chosen": "a", "rejected": null}', "line 1: 'rejected' is null; every row needs both sides"),
        ("a.jsonl", '{"chosen": null, "rejected": null}', "line 1: 'chosen' and 'rejected' are null"),
        ("a.jsonl", '["a"]', "line 1: a row must be an object .* not a list"),
        ("a.jsonl", LINES + '{"chosen": "a", "rejected": "b"}', "line 5: 'prompt' is missing, though other"),
        ("a.jsonl", LINES + '{"prompt": null, "chosen": "a", "rejected": "b"}', "line 5: 'prompt' is null; fill it in"),
        (
            "a.jsonl",
            LINES + '{"prompt": "p", "chosen": 3, "rejected": "b"}',
            r"line 5: chosen is a number, and in .*line 1 it is a text; all rows need the same type",
        ),
        (
            "a.jsonl",
            '{"chosen": [{"content": "a"}], "rejected": "b"}\n{"chosen": [{"content": ["a"]}], "rejected": "b"}',
            r"line 2: chosen\[\].content is a list, and in .*line 1 it is a text",
        ),
        (
            "a.jsonl",
            LINES + '{"prompt": "p", "chosen": "\\ud800", "rejected": "b"}',
            r"line 5: '\\ud800' is half of a surrogate pair, and no character. Mend the row, or leave it out.",
        ),
        ("a.jsonl", "\n", r"a\.jsonl holds no rows"),
        ("a.json", "[]", r"a\.json holds no rows"),
        ("a.csv", "x", r"a\.csv is of an unknown kind; readable are \.json, \.jsonl, \.jsonl\.gz, \.parquet"),
        ("a.parquet", "x", "cannot be read as parquet"),
    ],
)
def test_unreadable_files_are_answered_with_the_place_and_the_reason(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        load_preferences(write(tmp_path / name, content))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_file_that_is_not_utf8_is_answered_with_the_line(tmp_path, name):
    content = LINES.encode() + '{"chosen": "été"}\n'.encode("latin-1")
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(DataError, match=r", line 5: not UTF-8 text \(invalid continuation byte\); save the file as"):
        load_preferences(str(tmp_path / name))


def test_a_file_that_is_not_gzip_is_named(tmp_path):
    (tmp_path / "a.jsonl.gz").write_text(LINES)
    with pytest.raises(DataError, match="cannot be read as gzipped UTF-8"):
        load_preferences(str(tmp_path / "a.jsonl.gz"))


def test_parquet_without_a_side_lists_what_was_found(tmp_path):
    Dataset.from_list(ROWS).remove_columns("rejected").to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="a.parquet has no column rejected. Found: prompt, chosen"):
        load_preferences(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("source", ["no/such/file.jsonl", "gone.json", "./gone", "data/x.csv"])
def test_a_missing_file_is_not_taken_for_a_hub_id(source):
    with pytest.raises(DataError, match="does not exist"):
        load_preferences(source)


def test_hub_data_goes_through_the_same_checks(monkeypatch):
    asked = []

    def load(source, split):
        asked.append((source, split))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_preferences("org/pairs.v2", split="test", limit=1).to_list() == KEPT[:1]
    assert asked == [("org/pairs.v2", "test")]


def test_an_unreachable_hub_is_an_issue_of_the_environment(monkeypatch):
    def load(source, split):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        EnvironmentIssue, match="'org/pairs' is no file .*, and the hub cannot be reached. HF_HUB_OFFLINE is"
    ):
        load_preferences("org/pairs")


def test_a_limit_below_one_is_refused():
    with pytest.raises(ConfigError, match="limit=0 must be at least 1"):
        load_preferences("generated:reverse_list", limit=0)


def test_a_folder_is_read_if_it_holds_data_and_named_if_not(tmp_path):
    from datasets import DatasetDict

    (tmp_path / "files").mkdir()
    with pytest.raises(DataError, match="files' is a folder without data files that can be read; give a file"):
        load_preferences(str(tmp_path / "files"))
    write(tmp_path / "files" / "train.jsonl", LINES)
    assert load_preferences(str(tmp_path / "files")).to_list() == KEPT
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert load_preferences(str(tmp_path / "one"), split="test").to_list() == KEPT
    DatasetDict(train=Dataset.from_list(ROWS)).save_to_disk(tmp_path / "several")
    assert load_preferences(str(tmp_path / "several")).to_list() == KEPT
    with pytest.raises(DataError, match="several' has no split 'test'; it has train."):
        load_preferences(str(tmp_path / "several"), split="test")
    (tmp_path / "one" / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match="one' cannot be read"):
        load_preferences(str(tmp_path / "one"))


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet"])
@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Add.", "input": "2 2", "chosen": "4", "rejected": "5"},
        {
            "conversations": [{"from": "human", "value": "Add.\n2 2"}],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
    ],
    ids=["alpaca", "sharegpt"],
)
def test_alpaca_and_sharegpt_pairs_become_messages(tmp_path, name, row):
    rows = [row | {"source": 1}, row | {"source": "x"}]
    if name.endswith("parquet"):
        Dataset.from_list([row, row]).to_parquet(tmp_path / name)
    else:
        write(tmp_path / name, "\n".join(map(json.dumps, rows)))
    loaded = load_preferences(str(tmp_path / name))
    assert loaded.to_list() == 2 * [
        {
            "prompt": [{"role": "user", "content": "Add.\n2 2"}],
            "chosen": [{"role": "assistant", "content": "4"}],
            "rejected": [{"role": "assistant", "content": "5"}],
        }
    ]


@pytest.mark.parametrize("name", ["pairs.json", "pairs.jsonl", "pairs.parquet", "folder"])
def test_columns_that_are_read_beside_the_pairs_are_kept_where_they_are(tmp_path, name):
    rows = [{**row, "user": f"u{place % 2}"} for place, row in enumerate(ROWS)]
    path = tmp_path / name
    if name == "folder":
        Dataset.from_list(rows).save_to_disk(path)
    elif name.endswith("parquet"):
        Dataset.from_list(rows).to_parquet(path)
    else:
        write(path, json.dumps(rows) if name.endswith("json") else "\n".join(map(json.dumps, rows)))
    kept = [{name: value for name, value in row.items() if name != "source"} for row in rows]
    assert load_preferences(str(path), beside=("user",)).to_list() == kept
    assert load_preferences(str(path), beside=("user", "prompt", "nobody")).to_list() == kept
    assert load_preferences(str(path)).to_list() == KEPT


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Q", "chosen": "yes", "rejected": "no"},
        {"conversations": [{"from": "human", "value": "Q"}], "chosen": {"from": "gpt", "value": "yes"},
         "rejected": {"from": "gpt", "value": "no"}},
        {"prompt": "Q", "chosen": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "yes"}],
         "rejected": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "no"}]},
    ],
    ids=["alpaca", "sharegpt", "ultrafeedback"],
)  # fmt: skip
def test_columns_beside_stay_with_rows_that_are_converted(row, tmp_path):
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({**row, "user": user}) for user in ("u1", "u2")))
    found = load_preferences(path, beside=("user",))
    assert found["user"][:] == ["u1", "u2"] and found[0]["prompt"][0]["content"] == "Q"
