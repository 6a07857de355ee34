"""`posttrain push` as a command."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest

import posttrain.cli
from tests.hub.fake_hub import TOKEN


@pytest.fixture
def command(client):
    """`posttrain push` in the process whose hub is the fake one."""

    def run(*arguments, token=None):
        answer = client("command", arguments=["push", *map(str, arguments)], token=token)
        assert answer.error is None, answer.error
        return SimpleNamespace(**answer.value)

    return run


def test_a_run_is_pushed_and_the_commit_named(command, hub, saved_run):
    done = command(saved_run.folder, "me/run", "--base-model-id", "org/base", "--private")
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["me/run"]
    assert repository.private and repository.commits[0]["message"] == "Upload by posttrain"
    weights = (saved_run.folder / "adapter_model.safetensors").read_bytes()
    assert repository.files["adapter_model.safetensors"] == weights
    assert json.loads(repository.files["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    assert f"Pushed {len(repository.files)} files to me/run: README.md, " in done.stdout
    assert done.stdout.endswith(f"{hub.endpoint}/me/run/commit/{1:040x}\n")


def test_a_merged_run_is_pushed_and_told_to_scripts(command, hub, saved_run):
    done = command(saved_run.folder, "whole", "--merged", "--json", "--base-model-id", "org/base")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts == {
        "repo": "me/whole",
        "commit": f"{hub.endpoint}/me/whole/commit/{1:040x}",
        "base_model": "org/base",
        "merged": True,
        "files": sorted(hub.repositories["me/whole"].files),
    }
    assert "model.safetensors" in facts["files"] and "adapter_config.json" not in facts["files"]


def test_a_refusing_hub_ends_the_command_with_its_reason(command, hub, saved_run):
    done = command(saved_run.folder, "me/run", "--base-model-id", "org/base", token="hf_wrong")
    assert done.returncode == 4
    assert "posttrain push: error: the hub does not accept the token (401)." in done.stderr
    assert "The same command pushes it again" in done.stderr and "Traceback" not in done.stderr


def test_without_a_hub_id_of_the_base_nothing_is_begun(capsys, saved_run):
    assert posttrain.cli.main(["push", str(saved_run.folder), "me/run"]) == 2
    assert capsys.readouterr().err == (
        f"posttrain push: error: --base-model-id is not set, and the base model is the local folder {saved_run.base}, "
        "which the hub does not know under that name. Set --base-model-id to the hub's id of the model that it is, or "
        "was made from: ORG/NAME.\n"
    )


def test_an_offline_hub_and_a_missing_token_are_named(capsys, saved_run, monkeypatch):
    arguments = ["push", str(saved_run.folder), "me/run", "--base-model-id", "org/base"]
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    assert posttrain.cli.main(arguments) == 4
    assert "there is no token for the hub. Log in with `hf auth login`, or set HF_TOKEN." in capsys.readouterr().err
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: TOKEN)
    assert posttrain.cli.main(arguments) == 4
    assert "the hub is switched off by HF_HUB_OFFLINE=1; unset it to push." in capsys.readouterr().err


def test_folders_that_hold_no_run_are_told_apart(capsys, tmp_path):
    assert posttrain.cli.main(["push", str(tmp_path / "gone"), "me/run"]) == 2
    assert f"RUN is {tmp_path / 'gone'}, which is no folder" in capsys.readouterr().err
    assert posttrain.cli.main(["push", str(tmp_path), "me/run"]) == 2
    assert "holds no adapter and no model; give the folder of a saved run." in capsys.readouterr().err
    checkpoint = tmp_path / "checkpoint-4"
    checkpoint.mkdir()
    (checkpoint / "posttrain_complete.json").write_text("{}")
    assert posttrain.cli.main(["push", str(tmp_path), "me/run"]) == 2
    assert f"push its newest complete checkpoint, {checkpoint}." in capsys.readouterr().err


def test_a_folder_without_a_model_is_refused_before_heavy_imports(capsys, tmp_path, monkeypatch):
    # an import of it fails
    monkeypatch.setitem(sys.modules, "posttrain.run.checkpoints", None)
    assert posttrain.cli.main(["push", str(tmp_path), "me/run"]) == 2
    assert "holds no adapter and no model; give the folder of a saved run." in capsys.readouterr().err


def test_pickled_weights_are_not_pushed(capsys, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    assert posttrain.cli.main(["push", str(tmp_path), "me/run", "--base-model-id", "org/base"]) == 3
    assert f"{tmp_path} holds no adapter_model.safetensors, so there is nothing to push." in capsys.readouterr().err


def test_a_name_that_cannot_be_is_refused(capsys, saved_run):
    assert posttrain.cli.main(["push", str(saved_run.folder), "a/b/c"]) == 2
    assert "ORG/NAME is 'a/b/c', which is no name of a repository on the hub." in capsys.readouterr().err


def test_merging_what_is_no_adapter_is_refused(capsys, saved_run):
    arguments = ["push", str(saved_run.base), "me/run", "--merged", "--base-model-id", "org/base"]
    assert posttrain.cli.main(arguments) == 2
    assert f"--merged is set, but {saved_run.base} holds a whole model. Leave --merged out." in capsys.readouterr().err


def test_a_merge_that_fails_makes_no_repository(command, hub, saved_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved_run.folder, run)
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "gone")}))
    done = command(run, "me/whole", "--merged", "--base-model-id", "org/base")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert str(tmp_path / "gone") in done.stderr and not hub.repositories
