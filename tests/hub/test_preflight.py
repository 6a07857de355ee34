"""What is known before the first step of a run that is to be pushed, and what a failed push leaves of it."""

import pytest

from posttrain.errors import ConfigError
from posttrain.hub import preflight
from posttrain.hub.base_model import base_license, hub_base, noted_base
from posttrain.models import SMOLLM2, TINY, folder_name, tiny_model
from tests.hub.client import arguments


def test_nothing_is_asked_of_the_hub_without_push_to_hub(client, hub):
    assert client("preflight", push_to_hub=False, hub_model_id="not a name").value is None
    assert not hub.requests


def test_the_repository_is_made_and_the_base_looked_up(client, hub):
    answer = client("preflight", hub_private_repo=True)
    assert answer.value == {
        "repo_id": "me/run",
        "base_model_id": "org/base",
        "license": {"license": "apache-2.0"},
    }
    assert hub.repositories["me/run"].private


def test_the_output_folder_names_the_repository_by_default(client, hub):
    assert client("preflight", hub_model_id=None, output_dir="runs/my-run").value["repo_id"] == "me/my-run"


@pytest.mark.parametrize("name", ["a/b/c", "with space", "me/two--dashes", "-me/x", "me/x.git", "me/" + "x" * 97])
def test_a_name_that_no_repository_can_have_is_refused_without_asking(name):
    with pytest.raises(ConfigError) as caught:
        preflight(arguments(hub_model_id=name), "org/base")
    assert str(caught.value).startswith(f"hub_model_id is {name!r}, which is no name of a repository on the hub.")
    with pytest.raises(ConfigError, match="hub_model_id, by default the last part of output_dir, is 'my run'"):
        preflight(arguments(hub_model_id=None, output_dir="runs/my run"), "org/base")


@pytest.mark.parametrize(
    ("base", "shown"),
    [
        ("/models/my-sft", "the local folder /models/my-sft"),
        (f"/home/a/.cache/posttrain/models/{folder_name(SMOLLM2)}", "embedded:smollm2-135m"),
        (f"/home/a/.cache/posttrain/models/{folder_name(TINY)}", "embedded:tiny"),
        ("embedded:tiny", "embedded:tiny"),
        (tiny_model(), "a model without a name"),
    ],
)
def test_a_base_without_a_hub_id_is_asked_for(base, shown):
    with pytest.raises(ConfigError) as caught:
        preflight(arguments(), base)
    assert str(caught.value) == (
        f"base_model_id is not set, and the base model is {shown}, which the hub does not know under that name. Set "
        "base_model_id to the hub's id of the model that it is, or was made from: ORG/NAME."
    )


def test_a_given_base_is_taken_for_a_local_one(client, hub):
    answer = client("preflight", model="/models/my-sft", base_model_id="org/base")
    assert answer.value["base_model_id"] == "org/base" and not answer.log
    with pytest.raises(ConfigError, match="base_model_id is '/models/my-sft', which is no name of a repository"):
        preflight(arguments(base_model_id="/models/my-sft"), "org/base")


def test_a_base_that_only_looks_like_a_hub_id_is_asked_for(client, hub):
    answer = client("preflight", model="runs/sft")
    assert answer.kind == "ConfigError" and answer.exit_code == 2
    assert answer.error.startswith("the base model runs/sft is not on the hub, or not for this token.")
    given = client("preflight", base_model_id="org/secret")
    assert given.value["base_model_id"] == "org/secret" and given.value["license"] == {}
    assert given.log == ["the base model org/secret is not on the hub, or not for this token"]


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_strategies_that_upload_optimizer_states_are_refused(strategy):
    with pytest.raises(ConfigError) as caught:
        preflight(arguments(hub_strategy=strategy), "org/base")
    assert str(caught.value) == (
        f"hub_strategy is {strategy}, which would upload optimizer states. Set it to every_save (the weights, at each "
        "save) or end; checkpoints stay in output_dir."
    )


def test_a_rationed_whoami_does_not_stop_a_full_name(client, hub):
    hub.fail("whoami", 429, times=99, message="rate limit")
    assert client("preflight").value["repo_id"] == "me/run"
    answer = client("preflight", hub_model_id="short")
    assert answer.kind == "EnvironmentIssue" and "429" in answer.error


def test_a_hub_that_is_down_stops_the_run_before_it_begins(client, hub):
    hub.fail("whoami", 502, times=99)
    answer = client("preflight")
    assert answer.kind == "EnvironmentIssue" and answer.error.startswith("the hub answered 502")
    assert hub.count("whoami") == 3


def test_a_push_at_the_end_gives_the_address_of_its_commit(client, hub, saved_run):
    settings = {"folder": str(saved_run.folder), "model": str(saved_run.base), "base_model_id": "org/base"}
    assert client("push_run", **settings).value == f"{hub.endpoint}/me/run/commit/{1:040x}"
    hub.reset()
    assert client("push_run", blocking=False, **settings).value == f"{hub.endpoint}/me/run/commit/{1:040x}"


@pytest.mark.core("fault2")
@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (("commit", 500), "the hub answered 500"),
        (("create", 401), "the hub does not accept the token (401)"),
        (("commit", "drop"), "the connection to the hub broke"),
        (("preupload", 403), "the token may not write to me/run (403"),
    ],
)
def test_a_failed_push_does_not_fail_the_run_and_prints_the_command(client, hub, saved_run, fault, reason):
    hub.fail(*fault, times=99)
    settings = {"model": str(saved_run.base), "base_model_id": "org/base", "hub_private_repo": True}
    for blocking in (True, False):
        answer = client("push_run", folder=str(saved_run.folder), blocking=blocking, **settings)
        assert answer.error is None and answer.value is None
        warning = answer.log[-1]
        assert warning.startswith(f"the run was not pushed to me/run: {reason}")
        assert warning.endswith(
            f"\nIt is saved in {saved_run.folder}. To push it from there:\n"
            f"  posttrain push {saved_run.folder} me/run --base-model-id org/base --private"
        )


def test_a_push_that_was_not_prepared_asks_for_the_base_in_its_command(client, hub, saved_run):
    answer = client("push_run", folder=str(saved_run.folder), model=str(saved_run.base), push_to_hub=False)
    assert answer.value is None and not hub.requests
    assert "base_model_id is not set, and the base model is the local folder" in answer.log[-1]
    assert answer.log[-1].endswith(f"posttrain push {saved_run.folder} me/run --base-model-id ORG/BASE")


def test_each_save_pushes_the_weights_of_its_checkpoint(client, hub, saved_run):
    names = ["checkpoint-2", "checkpoint-3"]
    assert client("push_checkpoints", folder=str(saved_run.folder), checkpoints=names, always=True).value
    messages = [commit["message"] for commit in hub.repositories["me/run"].commits]
    assert "Training in progress, step 2" in messages
    files = hub.repositories["me/run"].files
    assert "optimizer.pt" not in files and "trainer_state.json" not in files and "adapter_model.safetensors" in files
    assert not any(str(saved_run.home).encode() in content for content in files.values())


def test_strategy_end_pushes_no_checkpoint(client, hub, saved_run):
    call = {"folder": str(saved_run.folder), "checkpoints": ["checkpoint-2"]}
    assert client("push_checkpoints", hub_strategy="end", **call).value is False
    assert hub.count("commit") == 0


def test_a_save_is_not_pushed_while_the_last_one_is_under_way(client, hub, saved_run):
    hub.fail("commit", 429, message="slow down", Retry_After=1)
    names = ["checkpoint-2", "checkpoint-3"]
    client("push_checkpoints", folder=str(saved_run.folder), checkpoints=names)
    assert [commit["message"] for commit in hub.repositories["me/run"].commits] == ["Training in progress, step 2"]


def test_a_checkpoint_that_cannot_be_pushed_is_a_warning(client, hub, saved_run):
    hub.fail("commit", 403, times=99, message="read only now")
    answer = client("push_checkpoints", folder=str(saved_run.folder), checkpoints=["checkpoint-2"])
    assert answer.error is None and answer.log[-1].startswith(
        "step 2 was not pushed to me/run: the token may not write to me/run (403: read only now)"
    )


def test_a_license_is_taken_from_the_card_of_a_local_base_where_it_has_one(tmp_path):
    assert base_license(str(tmp_path)) == {}
    card = tmp_path / "README.md"
    card.write_text("---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n\n# Base\n")
    assert base_license(str(tmp_path)) == {"license": "other", "license_name": "own"}
    card.write_text("---\nlicense: [broken\n---\n# Base\n")
    assert base_license(str(tmp_path)) == {}
    assert base_license("org/not-in-the-cache") == {} and base_license("embedded:tiny") == {}
    assert base_license(f"/x/models/{folder_name(SMOLLM2)}") == {"license": "apache-2.0"}


def test_a_saved_run_tells_the_base_it_was_given_and_the_one_it_loaded(saved_run, tmp_path):
    assert noted_base(saved_run.folder) == (None, str(saved_run.base))
    assert noted_base(saved_run.folder / "checkpoint-2") == (None, str(saved_run.base))
    (tmp_path / "resolved_config.yaml").write_text("training: {base_model_id: org/base}\n")
    (tmp_path / "README.md").write_text("---\nbase_model: org/other\n---\n# Model\n")
    assert noted_base(tmp_path) == ("org/base", "org/other")
    assert hub_base(None, "org/other") == "org/other" and hub_base("org/base", "/x/y") == "org/base"
