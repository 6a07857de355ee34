import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from posttrain.errors import ConfigError, EnvironmentIssue
from posttrain.remote import check_model_name, model_failure, out_of_reach, reads_as_path


@pytest.mark.parametrize("name", ["./model", "../model", "/models/a", "runs/a/b", "~/a", "a b", "C:\\a", "runs/a/"])
def test_a_name_that_is_no_hub_id_reads_as_a_path(name):
    assert reads_as_path(name)


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-0.6B", "org/a.b_c-d"])
def test_a_hub_id_does_not(name):
    assert not reads_as_path(name)
    check_model_name(name)


def test_a_folder_that_is_missing_is_named_with_its_neighbour(tmp_path):
    (tmp_path / "qwen-small").mkdir()
    (tmp_path / "weights.bin").touch()
    with pytest.raises(ConfigError, match=r"is a folder that does not exist \(.*Did you mean .*/qwen-small\?"):
        check_model_name(str(tmp_path / "qwen-smal"))
    with pytest.raises(ConfigError, match="is a file; give the folder that holds it"):
        check_model_name(str(tmp_path / "weights.bin"))
    check_model_name(str(tmp_path / "qwen-small"))


def caused(cause):
    try:
        raise OSError("cannot load") from cause
    except OSError as error:
        return error


def test_only_a_hub_that_cannot_be_reached_is_an_issue_of_the_environment(monkeypatch):
    class Transport(Exception):
        pass

    Transport.__name__ = "TransportError"
    for cause in (LocalEntryNotFoundError("x"), ConnectionError("x"), Transport("x")):
        assert out_of_reach(caused(cause))
    assert not out_of_reach(caused(ValueError("x")))

    class Answer:
        headers, request = {}, None

        def __init__(self, status_code):
            self.status_code = status_code

    answers = {code: HfHubHTTPError("x", response=Answer(code)) for code in (401, 404, 429, 503)}
    assert [code for code, error in answers.items() if out_of_reach(caused(error))] == [429, 503]
    monkeypatch.delenv("HF_HUB_OFFLINE")
    unreachable = model_failure("org/gone", caused(ConnectionError("x")))
    assert isinstance(unreachable, EnvironmentIssue)
    assert "the hub cannot be reached. Mend the connection, or give a local folder." in str(unreachable)
    wrong = model_failure("org/gone", caused(answers[404]))
    assert isinstance(wrong, ConfigError) and "model 'org/gone' cannot be loaded: cannot load" in str(wrong)


def test_an_adapter_given_as_a_model_is_told_from_one(tmp_path):
    (tmp_path / "adapter_config.json").touch()
    assert "holds an adapter, not a model. Give its base model, or merge the two first: posttrain merge" in str(
        model_failure(str(tmp_path), OSError("no config.json"))
    )
