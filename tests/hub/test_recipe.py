"""A recipe run that is to be pushed, from the preflight to the last commit."""

import json
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard

from tests.hub.conftest import ROOT

# three full runs through the recipe
pytestmark = pytest.mark.slow

SETTINGS = """
model_name_or_path: embedded:tiny
dataset_name: generated:reverse_list
max_train_rows: 8
use_peft: true
lora_target_modules: all-linear
flip_rate: 0.2
per_device_train_batch_size: 2
max_steps: 2
save_steps: 1
logging_steps: 1
push_to_hub: true
hub_model_id: me/run
base_model_id: org/base
disable_tqdm: true
"""


@pytest.fixture
def recipe(client_environment, tmp_path):
    """Run the recipe; it returns the finished process."""

    def run(*arguments, launcher=(), **environment):
        config = tmp_path / "config.yaml"
        config.write_text(SETTINGS + f"output_dir: {tmp_path}/out\n")
        return subprocess.run(
            [sys.executable, *launcher, "recipes/robust_dpo.py", "--config", str(config), *arguments],
            cwd=ROOT,
            env=client_environment
            | {"PYTHONPATH": str(ROOT), "POSTTRAIN_CACHE": str(tmp_path / "cache")}
            | environment,
            capture_output=True,
            text=True,
            timeout=400,
        )

    return run


def test_every_save_and_the_end_reach_the_hub(hub, recipe, tmp_path):
    done = recipe()
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["me/run"]
    messages = [commit["message"] for commit in repository.commits]
    # The second save is left out where the first is still under way
    assert messages[0] == "Training in progress, step 1" and messages[-1] == "End of training"
    assert set(messages[1:-1]) <= {"Training in progress, step 2"} and hub.count("create") == 1
    weights = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert repository.files["adapter_model.safetensors"] == weights
    assert json.loads(repository.files["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    metadata = ModelCard(repository.files["README.md"].decode()).data.to_dict()
    assert metadata["base_model"] == "org/base" and metadata["license"] == "apache-2.0"
    assert {"metrics.jsonl", "resolved_config.yaml", "curves.png"} <= set(repository.files)
    for content in [*repository.files.values(), *hub.bodies]:
        assert str(tmp_path).encode() not in content
    for card in (tmp_path / "out").glob("checkpoint-*/README.md"):
        assert str(tmp_path) not in card.read_text()


def test_a_refused_token_ends_the_run_before_it_begins(hub, recipe, tmp_path):
    done = recipe(HF_TOKEN="hf_wrong")
    assert done.returncode == 4 and "the hub does not accept the token (401)" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_hub_that_refuses_each_commit_leaves_a_whole_run_and_the_command(hub, recipe, tmp_path):
    hub.fail("commit/main", 403, times=99, message="read only")
    done = recipe()
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert f"posttrain push {tmp_path}/out me/run --base-model-id org/base" in done.stderr


def test_two_ranks_push_once_and_stop_together(hub, recipe):
    launcher = ("-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu_ddp.yaml")
    done = recipe("--hub_strategy", "end", launcher=launcher)
    assert done.returncode == 0, done.stderr
    assert [commit["message"] for commit in hub.repositories["me/run"].commits] == ["End of training"]
    assert hub.count("whoami") == 1
    stopped = recipe(launcher=launcher, HF_TOKEN="hf_wrong")
    assert stopped.returncode != 0 and "exitcode  : 4" in stopped.stderr
    assert stopped.stderr.count("error: the hub does not accept the token (401)") == 1
