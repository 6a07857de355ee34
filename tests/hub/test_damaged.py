"""Which files a folder named as a checkpoint is pushed with, and what is said of files that are damaged."""

import json
import re
import shutil

import pytest
import yaml

import posttrain.cli
from posttrain.data.processing import load_processing_class
from posttrain.errors import DataError
from posttrain.hub.base_model import noted_base, run_of
from posttrain.hub.files import check_files
from posttrain.saved import check_shards

IDENTITY = {"method": "RobustDPOTrainer", "seed": 3, "data": "abc", "flip_rate": 0.3}


def note(folder, name, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps({"identity": IDENTITY | changes, "update": {"learning_rate": 1e-6}}))


def a_state(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text('{"global_step": 3}')


def test_a_checkpoint_belongs_to_the_run_around_it(saved_run, tmp_path):
    assert run_of(saved_run.folder / "checkpoint-3") == saved_run.folder.resolve()
    note(tmp_path, "posttrain_run.json")
    note(tmp_path / "checkpoint-3", "posttrain_complete.json")
    assert run_of(tmp_path / "checkpoint-3") == tmp_path
    a_state(tmp_path / "checkpoint-7")
    assert run_of(tmp_path / "checkpoint-7") == tmp_path
    (tmp_path / "link").symlink_to(tmp_path / "checkpoint-3")
    assert run_of(tmp_path / "link") == tmp_path
    # one of the two may have been written by a version that notes more
    note(tmp_path / "checkpoint-9", "posttrain_complete.json", reference=None)
    assert run_of(tmp_path / "checkpoint-9") == tmp_path


def test_the_settings_of_a_run_are_its_checkpoints(saved_run, tmp_path):
    shutil.copytree(saved_run.folder, tmp_path / "run")
    note(tmp_path / "run/checkpoint-3", "posttrain_complete.json", seed=42)
    assert run_of(tmp_path / "run/checkpoint-3") == tmp_path / "run"
    note(tmp_path / "run/checkpoint-3", "posttrain_complete.json", seed=41)
    assert run_of(tmp_path / "run/checkpoint-3") == tmp_path / "run/checkpoint-3"


@pytest.mark.parametrize("name", ["checkpoint-experiment", "checkpoint-", "checkpoint-03", "checkpoint-3-best"])
def test_another_name_makes_no_checkpoint(tmp_path, name):
    note(tmp_path, "posttrain_run.json")
    note(tmp_path / name, "posttrain_complete.json")
    a_state(tmp_path / name)
    assert run_of(tmp_path / name) == tmp_path / name


def test_a_checkpoint_apart_from_its_run_stands_alone(saved_run, tmp_path):
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(saved_run.folder / "checkpoint-3", folder)
    (tmp_path / "README.md").write_text("plans of mine")
    assert run_of(folder) == folder
    # a file of that name, of another program
    (tmp_path / "resolved_config.yaml").write_text("training:\n  base_model_id: org/other\n")
    assert run_of(folder) == folder and noted_base(folder) == (None, str(saved_run.base))
    for broken in ("[]", "- a\n- b\n", "a: [1,\n b: {", "training: 3\nversions: 4\nprocesses: 1\n"):
        (tmp_path / "resolved_config.yaml").write_text(broken)
        assert run_of(folder) == folder
    note(folder, "posttrain_complete.json")
    assert run_of(folder) == folder
    # another run's
    note(tmp_path, "posttrain_run.json", data="def")
    assert run_of(folder) == folder
    (tmp_path / "posttrain_run.json").write_text('{"identity": ')
    assert run_of(folder) == folder


def test_a_folder_beside_a_strangers_files_is_pushed_without_them(client_environment, hub, client, saved_run, tmp_path):
    for name, text in (("README.md", "plans of mine"), ("metrics.csv", "mine"), ("resolved_config.yaml", "a: b\n")):
        (tmp_path / name).write_text(text)
    shutil.copytree(saved_run.folder / "checkpoint-3", tmp_path / "checkpoint-3")
    shutil.copytree(saved_run.folder, tmp_path / "checkpoint-experiment")
    for name, repo in (("checkpoint-3", "me/three"), ("checkpoint-experiment", "me/experiment")):
        answer = client("push", folder=str(tmp_path / name), repo=repo)
        assert answer.error is None
        files = hub.repositories[repo].files
        assert b"plans of mine" not in files["README.md"] and files.get("metrics.csv") != b"mine"
    assert "metrics.csv" not in hub.repositories["me/three"].files


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "adapter_config.json is no valid JSON": lambda run: (run / "adapter_config.json").write_text('{"r": 4,'),
    "adapter_config.json holds a list": lambda run: (run / "adapter_config.json").write_text("[]"),
    "adapter_config.json is not UTF-8": lambda run: (run / "adapter_config.json").write_bytes(b'{"r": "\xff"}'),
    "tokenizer.json is no valid JSON": lambda run: cut(run / "tokenizer.json"),
    "tokenizer_config.json is no valid JSON": lambda run: (run / "tokenizer_config.json").write_text(""),
    "resolved_config.yaml is no valid YAML": lambda run: (run / "resolved_config.yaml").write_text("a: [1,\n b: {"),
    "resolved_config.yaml holds a list": lambda run: (run / "resolved_config.yaml").write_text("- a\n"),
    "README.md is not UTF-8 text": lambda run: (run / "README.md").write_bytes(b"\xff\xfe\x00bad"),
    "README.md, between its two lines": lambda run: (run / "README.md").write_text("---\na: [1,\n---\nmine\n"),
    "adapter_model.safetensors is damaged": lambda run: cut(run / "adapter_model.safetensors"),
    "adapter_model.safetensors is damaged, ": lambda run: (run / "adapter_model.safetensors").write_bytes(b""),
    "adapter_model.safetensors is damaged, or": lambda run: (run / "adapter_model.safetensors").write_text("weights"),
}


@pytest.mark.parametrize("told", DAMAGE)
def test_a_damaged_file_is_named_and_nothing_is_pushed(saved_run, tmp_path, capsys, told, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(saved_run.folder, run)
    monkeypatch.setattr("posttrain.hub.open_repository", lambda *a, **k: pytest.fail("a repository was opened"))
    check_files(run, run)
    DAMAGE[told](run)
    assert posttrain.cli.main(["push", str(run), "me/run", "--base-model-id", "org/base"]) == 3
    assert f"{run / told}" in capsys.readouterr().err
    if "README" not in told and "resolved" not in told and "tokenizer" not in told:
        assert posttrain.cli.main(["merge", str(run), str(tmp_path / "merged")]) in (2, 3)
        error = capsys.readouterr().err
        assert "cannot be written" not in error and str(run) in error
        assert not (tmp_path / "merged").exists()


def as_folder(path):
    path.unlink(missing_ok=True)
    path.mkdir()


TOKENIZERS = {
    "tokenizer.json is no valid JSON": lambda run: cut(run / "tokenizer.json"),
    "tokenizer_config.json is no valid JSON": lambda run: (run / "tokenizer_config.json").write_text("{"),
    "tokenizer.json cannot be read: it is no regular file": lambda run: as_folder(run / "tokenizer.json"),
    "chat_template.jinja is not UTF-8 text": lambda run: (run / "chat_template.jinja").write_bytes(b"\xff\xfe"),
    "tokenizer.json holds a list": lambda run: (run / "tokenizer.json").write_text("[]"),
}


@pytest.mark.parametrize("told", TOKENIZERS)
def test_a_damaged_tokenizer_beside_an_adapter_is_named(saved_run, tmp_path, capsys, told):
    run = shutil.copytree(saved_run.folder, tmp_path / "run")
    load_processing_class(str(run))
    TOKENIZERS[told](run)
    with pytest.raises(DataError, match=f"{re.escape(str(run))}/{told}"):
        load_processing_class(str(run))


def test_a_base_that_is_cut_off_is_named(saved_run, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(saved_run.base, base)
    cut(base / "model.safetensors")
    for verb in (
        ["merge", str(saved_run.folder), str(tmp_path / "merged")],
        ["generate", "--prompt", "a", "--adapter"],
    ):
        words = (
            [*verb, "--base", str(base)] if verb[0] == "merge" else [*verb, str(saved_run.folder), "--base", str(base)]
        )
        assert posttrain.cli.main(words) == 3
        assert f"{base / 'model.safetensors'} is damaged" in capsys.readouterr().err


def test_weights_in_several_files_are_all_looked_at(tmp_path):
    import torch
    from safetensors.torch import save_file

    index, first, second = (
        tmp_path / f"model{part}"
        for part in (".safetensors.index.json", "-00001-of-00002.safetensors", "-00002-of-00002.safetensors")
    )
    index.write_text(json.dumps({"weight_map": {"a": first.name, "b": second.name}}))
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(8)}, first)
    with pytest.raises(DataError, match="names model-00002-of-00002.safetensors, which is missing"):
        check_shards(index)
    save_file({"c": torch.zeros(8)}, second)
    with pytest.raises(DataError, match="model-00002-of-00002.safetensors holds no b"):
        check_files(tmp_path, tmp_path)
    save_file({"b": torch.zeros(8)}, second)
    check_files(tmp_path, tmp_path)
    cut(second)
    with pytest.raises(DataError, match="model-00002-of-00002.safetensors is damaged"):
        check_shards(index)
    index.write_text('{"weight_map": [1]}')
    with pytest.raises(DataError, match="says nothing of where the tensors lie"):
        check_files(tmp_path, tmp_path)


def test_an_empty_settings_file_is_as_good_as_none(saved_run, tmp_path):
    shutil.copytree(saved_run.folder, tmp_path / "run")
    (tmp_path / "run/resolved_config.yaml").write_text("")
    assert noted_base(tmp_path / "run") == (None, str(saved_run.base))
    (tmp_path / "run/resolved_config.yaml").write_text(yaml.safe_dump({"training": ["base_model_id"]}))
    assert noted_base(tmp_path / "run") == (None, str(saved_run.base))
    check_files(tmp_path / "run", tmp_path / "run")
