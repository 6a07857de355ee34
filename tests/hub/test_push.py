"""Pushing with the real client against a small local hub."""

import json
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain.hub import clean_readme
from tests.hub.conftest import make_run
from tests.hub.fake_hub import TOKEN, Repository

FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "chat_template.jinja",
    "curves.png",
    "metrics.csv",
    "metrics.jsonl",
    "resolved_config.yaml",
    "tokenizer.json",
    "tokenizer_config.json",
}
COMMIT, CREATE = "POST /api/models/me/run/commit/main", "POST /api/repos/create"


def push(client, saved_run, folder=None, **kwargs):
    return client("push", folder=str(folder or saved_run.folder), **kwargs)


def said_of_tries(answer) -> list[str]:
    """What a push said, behind the warning that its weights were not trained with differential privacy."""
    assert "rows that it was trained on may be read back from the weights" in answer.log[0]
    return answer.log[1:]


def metadata_of(content: bytes) -> dict:
    return ModelCard(content.decode()).data.to_dict()


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(40).view(2, 20)).logits


def test_a_run_arrives_with_its_allowed_files_and_no_others(client, hub, saved_run):
    answer = push(client, saved_run, commit_message="First")
    assert answer.error is None and set(answer.value["files"]) == FILES
    repository = hub.repositories["me/run"]
    assert set(repository.files) == FILES
    assert [commit["message"] for commit in repository.commits] == ["First"]
    assert answer.value["commit"] == f"{hub.endpoint}/me/run/commit/{1:040x}"
    for name in ("adapter_model.safetensors", "tokenizer.json", "metrics.jsonl", "curves.png"):
        assert repository.files[name] == (saved_run.folder / name).read_bytes(), name


def test_weights_go_as_a_large_file_and_texts_in_the_commit(client, hub, saved_run):
    push(client, saved_run)
    assert list(hub.large.values()) == [(saved_run.folder / "adapter_model.safetensors").read_bytes()]
    order = [line for line in hub.requests if "auth-check" not in line]
    assert [line.split(" ")[1] for line in order] == [
        "/api/whoami-v2",
        "/api/repos/create",
        "/api/models/org/base",
        "/api/models/me/run",
        "/api/validate-yaml",
        "/api/models/me/run/preupload/main",
        "/me/run.git/info/lfs/objects/batch",
        f"/large/{next(iter(hub.large))}",
        "/large-verify",
        "/api/models/me/run/commit/main",
    ]


def test_no_local_path_and_no_token_leaves_the_machine(client, hub, saved_run):
    assert str(saved_run.base) in (saved_run.folder / "adapter_config.json").read_text()
    assert str(saved_run.home) in (saved_run.folder / "resolved_config.yaml").read_text()
    push(client, saved_run)
    for body in [*hub.bodies, *hub.repositories["me/run"].files.values()]:
        assert str(saved_run.home).encode() not in body
        assert saved_run.home.name.encode() not in body
        assert TOKEN.encode() not in body
    settings = yaml.safe_load(hub.repositories["me/run"].files["resolved_config.yaml"])
    assert settings["training"]["output_dir"] == "run" and settings["data"]["dataset_name"] == "pairs.jsonl"
    assert settings["training"]["pair_loss"] == "rdpo"


def test_the_card_names_the_base_its_license_and_the_repository(client, hub, saved_run):
    push(client, saved_run)
    content = hub.repositories["me/run"].files["README.md"]
    assert metadata_of(content) == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "base_model": "org/base",
        "license": "apache-2.0",
        "tags": ["trl", "posttrain", "robust_dpo", "dpo", "lora"],
        "model-index": [
            {
                "name": "run",
                "results": [
                    {
                        "task": {"type": "text-generation"},
                        "dataset": {"name": "Local or generated data", "type": "unknown"},
                        "metrics": [{"type": "rewards/accuracies", "name": "eval_rewards/accuracies", "value": 0.75}],
                    }
                ],
            }
        ],
    }
    text = content.decode()
    assert "It belongs onto [org/base](https://huggingface.co/org/base)." in text
    assert 'from_pretrained("org/base")' in text and 'PeftModel.from_pretrained(base, "me/run")' in text
    assert 'AutoTokenizer.from_pretrained("me/run")' in text
    for section in ("Method", "Data", "Evaluation", "Curves", "Settings", "Versions", "Citation"):
        assert f"\n## {section}\n" in text
    assert "24 training rows, 6 evaluation rows" in text and "2403.00409" in text and "None" not in text


@pytest.mark.slow
def test_the_pushed_adapter_loads_with_plain_peft_and_says_the_same(client, hub, saved_run, tmp_path):
    push(client, saved_run)
    arrive(hub, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    local = json.loads((saved_run.folder / "adapter_config.json").read_text())
    assert config == local | {"base_model_name_or_path": "org/base"}
    base = AutoModelForCausalLM.from_pretrained(saved_run.base)
    plain = logits_of(base)
    loaded = logits_of(PeftModel.from_pretrained(base, tmp_path))
    assert torch.equal(loaded, logits_of(saved_run.model)) and (loaded - plain).abs().max() > 1e-3
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "<|im_end|>"


def test_the_local_run_still_names_its_local_base(client, hub, saved_run):
    before = {path: path.read_bytes() for path in saved_run.folder.rglob("*") if path.is_file()}
    push(client, saved_run)
    assert {path: path.read_bytes() for path in saved_run.folder.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_merged_push_is_a_model_that_says_what_the_adapter_said(client, hub, saved_run, tmp_path):
    answer = push(client, saved_run, merged=True)
    assert answer.error is None
    model_files = {"config.json", "generation_config.json", "model.safetensors"}
    assert set(answer.value["files"]) == FILES - {"adapter_config.json", "adapter_model.safetensors"} | model_files
    arrive(hub, tmp_path)
    merged = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert torch.allclose(merged, logits_of(saved_run.model), atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token == "<|im_end|>"
    content = (tmp_path / "README.md").read_text()
    assert metadata_of(content.encode())["library_name"] == "transformers"
    assert "lora" not in metadata_of(content.encode())["tags"]
    assert "A model: an adapter, trained with Robust DPO by `posttrain`, merged into [org/base]" in content
    assert 'AutoModelForCausalLM.from_pretrained("me/run")' in content and "PeftModel" not in content


def test_a_checkpoint_is_pushed_with_the_card_of_its_run(client, hub, saved_run):
    answer = push(client, saved_run, folder=saved_run.folder / "checkpoint-2", repo="me/step-2")
    assert set(answer.value["files"]) == FILES
    card = hub.repositories["me/step-2"].files["README.md"]
    assert b"# step-2\n\nA LoRA adapter trained with Robust DPO" in card


def test_what_a_person_wrote_into_the_card_stays(client, hub, tokenizer, tmp_path):
    run = make_run(tmp_path / "home", tokenizer)
    card = run.folder / "README.md"
    card.write_text(card.read_text().replace("# run\n", "# run\n\nMy own words.\n"))
    push(client, run)
    assert b"My own words." in hub.repositories["me/run"].files["README.md"]


def test_a_run_without_a_card_gets_a_short_one(client, hub, tokenizer, tmp_path):
    run = make_run(tmp_path / "home", tokenizer)
    (run.folder / "README.md").unlink()
    assert push(client, run).error is None
    content = hub.repositories["me/run"].files["README.md"]
    assert metadata_of(content)["base_model"] == "org/base" and metadata_of(content)["library_name"] == "peft"
    assert b'PeftModel.from_pretrained(base, "me/run")' in content


def test_the_card_that_peft_writes_in_a_checkpoint_loses_the_local_path(saved_run, tmp_path):
    saved_run.model.save_pretrained(tmp_path)
    assert str(saved_run.base) in (tmp_path / "README.md").read_text()
    clean_readme(tmp_path)
    assert str(saved_run.base) not in (tmp_path / "README.md").read_text()
    assert "base_model" not in metadata_of((tmp_path / "README.md").read_bytes())
    saved_run.model.save_pretrained(tmp_path)
    clean_readme(tmp_path, "org/base")
    assert str(saved_run.base) not in (tmp_path / "README.md").read_text()
    assert metadata_of((tmp_path / "README.md").read_bytes())["base_model"] == "org/base"


@pytest.mark.slow
def test_a_second_push_of_the_same_run_makes_no_empty_commit(client, hub, saved_run):
    push(client, saved_run)
    again = push(client, saved_run)
    assert again.error is None and len(hub.repositories["me/run"].commits) == 1
    assert hub.count("PUT /large/") == 1


def test_a_folder_without_weights_is_refused(client, hub, tmp_path):
    answer = client("push", folder=str(tmp_path))
    assert answer.kind == "DataError" and answer.exit_code == 3
    assert answer.error == (
        f"{tmp_path} holds no adapter_model.safetensors or model.safetensors, so there is nothing to push. Name the "
        "folder of a saved run."
    )


@pytest.mark.parametrize("place", ["validate-yaml", "commit"])
def test_a_server_error_that_passes_is_tried_again(client, hub, saved_run, place):
    hub.fail(place, 500, times=2)
    answer = push(client, saved_run)
    assert answer.error is None and set(hub.repositories["me/run"].files) == FILES
    tries = said_of_tries(answer)
    assert hub.count(place) == 3 and len(tries) == 2
    assert tries[0].endswith("Trying again in 0.05 s.")


@pytest.mark.slow
def test_a_server_error_that_stays_ends_after_the_last_try(client, hub, saved_run):
    hub.fail(COMMIT, 503, times=99, message="under maintenance")
    answer = push(client, saved_run)
    assert answer.kind == "EnvironmentIssue" and answer.exit_code == 4
    assert answer.error == "the hub answered 503 (under maintenance)."
    assert hub.count(COMMIT) == 3 and not hub.repositories["me/run"].files


def test_the_hubs_own_waiting_time_is_kept(client, hub, saved_run):
    hub.fail(COMMIT, 429, message="slow down", Retry_After=1)
    answer = push(client, saved_run)
    assert answer.error is None
    assert said_of_tries(answer) == ["the hub answered 429 (slow down). Trying again in 1 s."]


@pytest.mark.parametrize("place", [COMMIT, "PUT /large/"])
def test_a_line_that_goes_dead_is_tried_again(client, hub, saved_run, place):
    hub.fail(place, "drop")
    answer = push(client, saved_run)
    assert answer.error is None and set(hub.repositories["me/run"].files) == FILES
    weights = (saved_run.folder / "adapter_model.safetensors").read_bytes()
    assert hub.repositories["me/run"].files["adapter_model.safetensors"] == weights


@pytest.mark.slow
def test_a_line_that_stays_dead_is_named(client, hub, saved_run):
    hub.fail(COMMIT, "drop", times=99)
    answer = push(client, saved_run)
    assert answer.kind == "EnvironmentIssue"
    assert answer.error.startswith("the connection to the hub broke (")
    assert hub.count(COMMIT) == 3


def test_a_commit_whose_answer_was_lost_is_not_made_twice(client, hub, saved_run):
    hub.fail(COMMIT, "drop_after")
    answer = push(client, saved_run)
    assert answer.error is None and answer.value["commit"].endswith(f"/commit/{1:040x}")
    assert len(hub.repositories["me/run"].commits) == 1


def test_a_conflict_is_tried_again_and_then_named(client, hub, saved_run):
    hub.fail(COMMIT, 409, message="The branch moved")
    assert push(client, saved_run).error is None
    hub.repositories.clear()
    hub.fail(COMMIT, 409, times=99, message="The branch moved")
    answer = push(client, saved_run)
    assert answer.error == "another change to me/run came in between (409: The branch moved)."
    assert hub.count(COMMIT) == 2 + 3


@pytest.mark.slow
def test_an_existing_repository_is_written_to(client, hub, saved_run):
    push(client, saved_run)
    (file,) = [line for line in hub.requests if "auth-check" in line] or [None]
    assert file is None
    answer = push(client, saved_run)
    assert answer.error is None and hub.count("auth-check/write") == 1


def test_a_wrong_token_is_named_at_once(client, hub, saved_run):
    answer = push(client, saved_run, token="hf_wrong")
    assert (answer.kind, answer.exit_code) == ("EnvironmentIssue", 4)
    assert answer.error == (
        "the hub does not accept the token (401). Log in with `hf auth login`, or set HF_TOKEN to one that can write "
        "to me/run."
    )
    assert hub.requests == ["GET /api/whoami-v2"]


def test_a_token_that_can_only_read_is_refused_before_anything_is_made(client, hub, saved_run):
    hub.role = "read"
    answer = push(client, saved_run)
    assert "can only read, and me/run is to be written" in answer.error and not hub.repositories


def test_a_foreign_account_is_named(client, hub, saved_run):
    answer = push(client, saved_run, repo="others/run")
    assert answer.kind == "EnvironmentIssue"
    assert answer.error.startswith("the token may not write to others/run (403: You don't have the rights to create")
    assert 'namespace "others"' in answer.error


def test_a_token_for_one_repository_needs_no_right_to_make_it(client, hub, saved_run):
    push(client, saved_run)
    hub.fail(CREATE, 403, message="no right to create")
    assert push(client, saved_run).error is None


def test_a_private_push_into_a_public_repository_is_refused(client, hub, saved_run):
    assert push(client, saved_run, repo="me/secret", private=True).error is None
    assert hub.repositories["me/secret"].private
    assert push(client, saved_run, repo="me/secret", private=True).error is None
    push(client, saved_run)
    commits = len(hub.repositories["me/run"].commits)
    answer = push(client, saved_run, private=True)
    assert answer.kind == "ConfigError" and "me/run is on the hub already and is public" in answer.error
    assert len(hub.repositories["me/run"].commits) == commits


def test_metadata_that_the_hub_refuses_is_quoted(client, hub, saved_run):
    hub.models["org/base"] = {"license": "made-up"}
    answer = push(client, saved_run)
    assert answer.kind == "EnvironmentIssue" and hub.count("validate-yaml") == 1
    assert re.search(r"the hub refuses the upload to me/run \(400: .*\"license\" must be one of", answer.error)


def test_a_name_without_an_owner_is_one_of_the_token(client, hub, saved_run):
    answer = push(client, saved_run, repo="short")
    assert answer.value["repo_id"] == "me/short" and "me/short" in hub.repositories


def test_a_named_license_comes_with_its_name_and_link(client, hub, saved_run):
    link = "https://example.org/license"
    hub.models["org/base"] = {"license": "other", "license_name": "own", "license_link": link}
    push(client, saved_run)
    metadata = metadata_of(hub.repositories["me/run"].files["README.md"])
    assert (metadata["license"], metadata["license_name"], metadata["license_link"]) == ("other", "own", link)


def arrive(hub, folder) -> None:
    for name, content in hub.repositories["me/run"].files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
MODEL_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@pytest.mark.core("model.safetensors.index.json")
@pytest.mark.parametrize("name", MODEL_FILES)
def test_an_adapter_is_not_put_beside_a_whole_model(client, hub, saved_run, name):
    hub.repositories["me/run"] = Repository(files={name: b"theirs", "config.json": b"{}"})
    answer = push(client, saved_run)
    assert answer.kind == "ConfigError"
    assert f"me/run holds a whole model ({name}), and an adapter is to be pushed." in answer.error
    assert not hub.repositories["me/run"].commits
    answer = client("preflight", is_adapter=True)
    assert answer.kind == "ConfigError" and f"me/run holds a whole model ({name})" in answer.error
    assert client("preflight", is_adapter=False).error is None


@pytest.mark.core("adapter_model.safetensors")
@pytest.mark.parametrize("name", ADAPTER_FILES)
def test_a_whole_model_is_not_put_beside_an_adapter(client, hub, saved_run, name):
    hub.repositories["me/run"] = Repository(files={name: b"theirs", "README.md": b"mine"})
    answer = push(client, saved_run, folder=saved_run.base)
    assert answer.kind == "ConfigError"
    assert f"me/run holds an adapter ({name}), and a whole model is to be pushed." in answer.error
    assert not hub.repositories["me/run"].commits
    answer = client("preflight", is_adapter=False)
    assert answer.kind == "ConfigError" and f"me/run holds an adapter ({name})" in answer.error
    assert client("preflight", is_adapter=True).error is None


@pytest.mark.core("eval")
@pytest.mark.parametrize("name", ["model_card.md", "eval/model.safetensors", "adapter_notes.txt", "config.json"])
def test_other_files_of_a_repository_are_no_weights(client, hub, saved_run, name):
    hub.repositories["me/run"] = Repository(files={name: b"theirs"})
    assert push(client, saved_run).error is None and name in hub.repositories["me/run"].files


def test_a_run_whose_repository_got_a_model_meanwhile_warns_and_pushes_nothing(client, hub, saved_run):
    hub.repositories["me/run"] = Repository(files={"model.safetensors": b"theirs"})
    answer = client("push_run", folder=str(saved_run.folder))
    assert answer.error is None and answer.value is None
    assert "the run was not pushed to me/run: me/run holds a whole model (model.safetensors)" in answer.log[-1]
    assert not hub.repositories["me/run"].commits
