"""Each cell of the table in docs/strangers.md is under test."""

import importlib
import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from posttrain import ALoLConfig, QAEConfig, RobustDPOConfig
from posttrain.config import DataArguments, ModelArguments, parse
from posttrain.data.pairs.loading import load_preferences
from posttrain.data.tokens import render
from posttrain.errors import DataError
from posttrain.run import checkpoint_files as files
from posttrain.run import checkpoints

HERE = "tests.strangers."
SETTINGS, RUN, TEXTS = f"{HERE}test_settings_files", f"{HERE}test_run_and_push", f"{HERE}test_templates_and_texts"
OWN = f"{HERE}test_table"
ALLOW_LIST = "tests.hub.test_push:test_a_run_arrives_with_its_allowed_files_and_no_others"
BESIDE = "tests.hub.test_damaged:test_a_folder_beside_a_strangers_files_is_pushed_without_them"
LINKS = f"{RUN}:test_links_are_named_and_left_out_of_a_push"
VERBATIM = f"{OWN}:test_a_row_is_text_whatever_it_names"
KEPT = f"{OWN}:test_a_checkpoint_has_nothing_outside_of_it_deleted"
BEST = "tests.run.test_best:test_weights_that_a_checkpoint_points_to_elsewhere_are_not_loaded"
TEMPLATE = f"{TEXTS}:test_an_endless_template_is_a_sentence_and_the_process_goes_on"
SHOWN = f"{TEXTS}:test_errors_notes_tables_and_json_show_control_characters_as_text"
CODE = f"{RUN}:test_code_beside_an_adapter_or_a_data_set_is_not_run"
PICKLE = f"{RUN}:test_a_pickle_in_a_checkpoint_is_never_run"
OF_SETTINGS = f"{OWN}:test_what_settings_may_do_they_are_read_for"
DEEPSPEED = f"{SETTINGS}:test_deepspeed_settings_of_a_file_name_nothing_to_write_to"
OWN_FILES = "tests.data.test_folders:test_a_link_that_leads_out_is_not_read"
OF_ADAPTER = f"{OWN}:test_an_adapter_names_the_base_that_is_read"
# what is told of a settings file, an adapter or model, a checkpoint, a data set: the test of each
CELLS = {
    "runs Python code": (
        f"{SETTINGS}:test_a_reward_of_a_module_that_nobody_allowed_is_refused_before_it_is_imported",
        f"{RUN}:test_an_adapter_of_pickled_weights_is_not_loaded", PICKLE, CODE,
    ),
    "runs or replaces a program": (
        f"{SETTINGS}:test_env_sets_no_variable_by_which_programs_or_servers_are_chosen", CODE, PICKLE, CODE,
    ),
    "runs for ever, fills the memory": (
        f"{SETTINGS}:test_a_file_that_grows_without_bounds_is_refused_wherever_it_is_read", TEMPLATE, TEMPLATE,
        f"{TEXTS}:test_a_line_without_an_end_is_refused_by_its_number",
    ),
    "steers your console, forges lines": (
        SHOWN, f"{TEXTS}:test_what_a_template_says_is_shown_as_text_on_one_line", SHOWN,
        f"{TEXTS}:test_a_name_of_a_column_forges_no_line",
    ),
    "has your files pushed or merged": (ALLOW_LIST, LINKS, LINKS, BESIDE),
    "learns your secrets": (
        f"{OWN}:test_settings_learn_nothing_of_the_environment",
        f"{OWN}:test_a_template_learns_nothing_of_the_process",
        f"{RUN}:test_no_file_of_a_push_holds_a_secret_whoever_wrote_the_run", VERBATIM,
    ),
    "reads other files of yours": (OF_SETTINGS, OF_ADAPTER, BEST, OWN_FILES),
    "writes over files": (DEEPSPEED, f"{RUN}:test_a_merge_copies_no_file_behind_a_link", KEPT, VERBATIM),
    "sends something away": (OF_SETTINGS, LINKS, KEPT, VERBATIM),
    "makes the model say what it likes": (OF_SETTINGS, OF_ADAPTER, BEST, VERBATIM),
}  # fmt: skip


def test_each_cell_of_the_table_names_a_test_that_is_there():
    text = (Path(__file__).parents[2] / "docs" / "strangers.md").read_text()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert {row[0] for row in table[2:]} == CELLS.keys() and all(len(row) == 5 for row in table)
    for tests in CELLS.values():
        assert len(tests) == 4
        for test in tests:
            module, name = test.split(":")
            assert callable(getattr(importlib.import_module(module), name)), test


def test_settings_learn_nothing_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "hunter2hunter2")
    path = tmp_path / "run.yaml"
    path.write_text("dataset_name: ${MY_SECRET}\nmodel_name_or_path: $MY_SECRET/%(MY_SECRET)s/{MY_SECRET}/~\n")
    data, model = parse((DataArguments, ModelArguments), ["--config", str(path)])
    assert data.dataset_name == "${MY_SECRET}"
    assert model.model_name_or_path == "$MY_SECRET/%(MY_SECRET)s/{MY_SECRET}/~"


@pytest.mark.parametrize(
    "template", ["{{ environ }}{{ os }}{{ self._TemplateReference__context }}", "{{ messages.__class__.__mro__ }}"]
)
def test_a_template_learns_nothing_of_the_process(tiny_folder, monkeypatch, template):
    monkeypatch.setenv("MY_SECRET", "hunter2hunter2")
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = template
    try:
        said = tokenizer.decode(render([{"role": "user", "content": "hi"}], {}, tokenizer, "row 1"))
    except DataError as error:
        said = str(error)
    assert "hunter2" not in said and "<class" not in said


def test_a_row_is_text_whatever_it_names(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_SECRET", "hunter2hunter2")
    (tmp_path / "mine.txt").write_text("private")
    row = {"prompt": "${MY_SECRET}", "chosen": str(tmp_path / "mine.txt"), "rejected": "https://host/collect?x"}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    assert load_preferences(str(path), convert=False)[0] == row
    assert sorted(found.name for found in tmp_path.iterdir()) == ["mine.txt", "rows.jsonl"]


def test_a_checkpoint_has_nothing_outside_of_it_deleted(tmp_path):
    folder, mine = tmp_path / "run" / "checkpoint-1", tmp_path / "mine.txt"
    folder.mkdir(parents=True)
    mine.write_text("private")
    (folder / "model.safetensors").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "kept").write_text("x")
    (folder / "link").symlink_to(tmp_path / "other")
    names = ["model.safetensors", "../../mine.txt", str(mine), "link/kept", "link"]
    content = {"identity": {"method": "x"}, "files": dict.fromkeys(names, 1)}
    (folder / files.MARKER).write_text(json.dumps(content))
    checkpoints.rotate(tmp_path / "run", keep=None, best=None)
    assert folder.is_dir()
    checkpoints.clear(folder)
    assert not folder.exists() and mine.read_text() == "private" and (tmp_path / "other" / "kept").exists()


def test_an_adapter_names_the_base_that_is_read(tmp_path, tiny_folder):
    from posttrain.adapters.loading import base_of

    config = {"peft_type": "LORA", "base_model_name_or_path": str(tiny_folder)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    assert base_of(tmp_path)[0] == str(tiny_folder)


def test_what_settings_may_do_they_are_read_for():
    text = (Path(__file__).parents[2] / "docs" / "strangers.md").read_text()
    cells = [line.split("|")[2] for line in text.splitlines() if line.startswith("|")]
    named = set(re.findall(r"`(\w+)`", " ".join(cell for cell in cells if "**yes" in cell)))
    kinds = (DataArguments, ModelArguments, RobustDPOConfig, QAEConfig, ALoLConfig)
    known = {field.name for kind in kinds for field in fields(kind)}
    assert "dataset_name" in named and "output_dir" in named and named <= known
