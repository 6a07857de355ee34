"""No file of a run, and none of a push or a merge, holds a secret or what a link leads to."""

import contextlib
import json
import os
import pickle
import shutil

import pytest
import torch

from posttrain import RobustDPOConfig, RobustDPOTrainer
from posttrain.adapters.loading import base_of, load_adapter
from posttrain.data.sources import read_rows
from posttrain.errors import ConfigError, DataError
from posttrain.hub.files import clean_readme, files_to_push, saved_weights
from posttrain.hub.merging import merge_adapter
from posttrain.hub.own_files import found, links_in
from posttrain.hub.repository import Destination
from posttrain.run.report import RunReport
from tests.conftest import make_pairs
from tests.training import lora, settings

HUB = Destination("me/run", "org/base")
SECRETS = ("s3cr3t-of-a-hub", "hf_" + "Zq9" * 8, "sk-live-123456", "Bearer abcdefgh", "deadbeefdeadbeef", "me:pw@")


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_folder):
    out = tmp_path_factory.mktemp("run") / "out"
    args = settings(
        out, save_strategy="steps", save_steps=1, max_steps=1, hub_token=SECRETS[1], optim="adamw_torch",
        model_init_kwargs={"token": SECRETS[0]}, lr_scheduler_kwargs=None,
    )  # fmt: skip
    sections = {
        "data": {
            "dataset_name": f"https://{SECRETS[5]}host/rows?X-Amz-Signature={SECRETS[4]}",
            "reward_funcs": [f"judge:score?key={SECRETS[2]}"],
            "headers": {"Authorization": SECRETS[3]},
        }
    }
    trainer = RobustDPOTrainer(
        model=tiny_folder, args=RobustDPOConfig(**args), train_dataset=make_pairs(8), peft_config=lora(),
        callbacks=[RunReport(sections)],
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    # of a run that another release wrote
    resolved = out / "resolved_config.yaml"
    resolved.write_text(resolved.read_text() + f"old:\n  model_init_kwargs: {{token: {SECRETS[0]}}}\n")
    return out


def held(content: bytes) -> list[str]:
    return [secret for secret in SECRETS if secret.encode() in content]


def test_no_file_of_a_run_holds_a_secret_of_its_settings(run):
    files = [path for path in run.rglob("*") if path.is_file()]
    assert {"training_args.bin", "resolved_config.yaml", "README.md", "posttrain_complete.json"} <= {
        p.name for p in files
    }
    wrote = {path: held(path.read_bytes()) for path in files if path.name != "resolved_config.yaml"}
    assert not any(wrote.values()), wrote
    written, _, _ = (run / "resolved_config.yaml").read_text().partition("old:\n")
    assert held(written.encode()) == [] and "dataset_name: https://***@host/rows" in written


def test_no_file_of_a_push_holds_a_secret_whoever_wrote_the_run(run):
    pushed = files_to_push(run, run, HUB)
    contents = {n: c if isinstance(c, bytes) else c.read_bytes() for n, c in pushed.items()}
    assert {name: held(content) for name, content in contents.items() if held(content)} == {}
    assert json.loads(contents["adapter_config.json"])["r"] == 4
    assert json.loads(contents["tokenizer_config.json"])["eos_token"]


@pytest.fixture
def linked(run, tmp_path):
    """A copy of the run's adapter, beside a file that must not leave."""
    (tmp_path / "private").write_text("PRIVATE")
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((run / name).read_bytes())
    return folder


def test_links_are_named_and_left_out_of_a_push(linked, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("posttrain.log._logger.propagate", True)
    for name in ("README.md", "metrics.csv", "vocab.txt", "merges.txt\n"):
        os.symlink(tmp_path / "private", linked / name)
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "a.jinja").write_text("PRIVATE")
    os.symlink(tmp_path / "templates", linked / "additional_chat_templates")
    (tmp_path / "hard").write_text("x")
    os.link(tmp_path / "hard", linked / "metrics.jsonl")
    os.mkfifo(linked / "vocab.json")
    pushed = files_to_push(linked, linked, HUB)
    assert not any(b"PRIVATE" in (c if isinstance(c, bytes) else c.read_bytes()) for c in pushed.values())
    assert {"metrics.jsonl", "adapter_model.safetensors", "tokenizer.json"} <= set(pushed)
    named = "README.md, additional_chat_templates/a.jinja, metrics.csv, vocab.txt left out"
    assert named in caplog.text
    clean_readme(linked)
    assert (tmp_path / "private").read_text() == "PRIVATE"


def test_weights_behind_a_link_are_neither_pushed_nor_merged(linked, tmp_path):
    (linked / "adapter_model.safetensors").rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", linked / "adapter_model.safetensors")
    with pytest.raises(DataError, match=r"but links, which are not followed \(adapter_model.safetensors\)"):
        files_to_push(linked, linked, HUB)
    with pytest.raises(DataError, match="which are not followed"):
        merge_adapter(linked, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_merge_copies_no_file_behind_a_link(linked, tmp_path):
    os.symlink(tmp_path / "private", linked / "vocab.txt")
    merge_adapter(linked, tmp_path / "merged")
    assert (tmp_path / "merged" / "tokenizer.json").is_file() and not (tmp_path / "merged" / "vocab.txt").exists()


def test_a_run_folder_that_is_itself_behind_a_link_is_taken(linked, tmp_path):
    os.symlink(linked, tmp_path / "latest")
    assert set(saved_weights(tmp_path / "latest")) == {"adapter_config.json", "adapter_model.safetensors"}
    assert links_in(tmp_path / "latest", ("*",)) == [] and len(found(tmp_path / "latest", ("*.json",))) == 3


class Evil:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_pickle_in_a_checkpoint_is_never_run(run, tiny_folder, tmp_path, name):
    shutil.copytree(run / "checkpoint-1", tmp_path / "checkpoint-1")
    torch.save(Evil(tmp_path / "PWNED"), tmp_path / "checkpoint-1" / name)
    args = settings(tmp_path / "out", max_steps=2, optim="adamw_torch", check_resume=False)
    trainer = RobustDPOTrainer(
        model=tiny_folder, args=RobustDPOConfig(**args), train_dataset=make_pairs(8), peft_config=lora()
    )
    with contextlib.suppress(ConfigError, pickle.UnpicklingError):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert not (tmp_path / "PWNED").exists()
    # what would have been run is what a plain load runs
    torch.load(tmp_path / "checkpoint-1" / name, weights_only=False)
    assert (tmp_path / "PWNED").exists()


def test_an_adapter_of_pickled_weights_is_not_loaded(linked, tmp_path):
    (linked / "adapter_model.safetensors").unlink()
    torch.save(Evil(tmp_path / "PWNED"), linked / "adapter_model.bin")
    with pytest.raises(ConfigError, match="has no adapter_model.safetensors"):
        load_adapter(linked)
    assert not (tmp_path / "PWNED").exists()


def test_code_beside_an_adapter_or_a_data_set_is_not_run(linked, tmp_path, tiny_folder):
    (linked / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'PWNED')!r})\n")
    config = json.loads((linked / "adapter_config.json").read_text())
    config["auto_mapping"] = {"base_model_class": "Evil", "parent_library": "evil"}
    (linked / "adapter_config.json").write_text(json.dumps(config))
    load_adapter(linked, tiny_folder)
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "rows.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'PWNED')!r})\n")
    with pytest.raises(DataError):
        read_rows(str(rows))
    assert not (tmp_path / "PWNED").exists()


def test_an_adapter_names_no_base_with_control_characters_in_it(linked):
    config = json.loads((linked / "adapter_config.json").read_text())
    for name in ("a\nposttrain: fine", "a\x1b[2J", ["x"], 3):
        (linked / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
        with pytest.raises(ConfigError, match="names no base model"):
            base_of(linked)


def test_a_models_config_has_no_code_of_the_hub_loaded(linked, tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"attn_implementation": "evil/kernel"}))
    model = str(tmp_path / "model")
    said = "names the attention evil/kernel, compiled code from the hub"
    with pytest.raises(ConfigError, match=said):
        load_adapter(linked, model)
    with pytest.raises(ConfigError, match=said):
        RobustDPOTrainer(model=model, args=RobustDPOConfig(**settings(tmp_path / "out")), train_dataset=make_pairs(8))
    # who chooses one has chosen
    chosen = settings(tmp_path / "out", model_init_kwargs={"attn_implementation": "eager"})
    RobustDPOTrainer(model=model, args=RobustDPOConfig(**chosen), train_dataset=make_pairs(8), peft_config=lora())
