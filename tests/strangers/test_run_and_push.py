"""No file of a run, and none of a push or a merge, holds a secret or what a link leads to."""

import contextlib
import json
import os
import re
import shutil
from types import SimpleNamespace

import pytest
import torch

from posttrain import RobustDPOConfig, RobustDPOTrainer
from posttrain.adapters.loading import base_of, load_adapter
from posttrain.cli import merge
from posttrain.cli.data.output import write_lines
from posttrain.data.sources import read_rows
from posttrain.errors import ConfigError, DataError, EnvironmentIssue
from posttrain.hub.files import clean_readme, files_to_push, saved_weights
from posttrain.hub.merging import merge_adapter
from posttrain.hub.metadata import parse_card
from posttrain.hub.own_files import found, links_in
from posttrain.hub.repository import Destination
from posttrain.private import hide
from posttrain.run import checkpoint_files, checkpoints, report, training_state
from posttrain.run.checks import check_output_dir
from posttrain.run.markers import MARKER
from posttrain.run.places import check_places
from posttrain.run.report import RunReport
from posttrain.run.run_folder import RunFolder
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


def pushed_with(folder, name: str, **added) -> dict:
    """Write entries into a config of a run, and return what of the config is pushed."""
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(config | added, ensure_ascii=False))
    content = files_to_push(folder, folder, HUB)[name]
    return json.loads(content if isinstance(content, bytes) else content.read_bytes())


def test_configs_that_are_pushed_hold_no_secret_by_name_or_form_at_any_depth(linked):
    nested = {"api_token": "b2", "url": "https://u:c3@h", "hub_secret": 12345678, "n": [{"http_headers": {}}]}
    nested["n"][0]["http_headers"] = {"Authorization": "Basic d4", "Accept": "x"}
    for name in ("adapter_config.json", "tokenizer_config.json"):
        plain = pushed_with(linked, name)
        clean = {"url": "https://***@h", "n": [{"http_headers": {"Accept": "x"}}]}
        assert pushed_with(linked, name, client_secret="a1", nested=nested) == plain | {"nested": clean}


def test_tokens_of_a_vocabulary_labels_and_modules_are_pushed_as_they_are(linked):
    token = {"content": "<|password|>", "lstrip": False, "special": True}
    added = {
        "pad_token": "[PAD]", "user_token": "<|user|>", "blank_token": "|", "task_token": token, "key": 3,
        "added_tokens_decoder": {"7": token}, "additional_special_tokens": ["token", "x"],
        "extra_special_tokens": {"image_token": "hf_" + "a" * 30}, "chat_template": "{{ 'password: x' }}",
        "label2id": {"PASSWORD": 1, "API_KEY": 2}, "target_modules": ["query_key_value", "dense"],
    }  # fmt: skip
    (linked / "tokenizer_config.json").write_text(json.dumps(added))
    pushed = files_to_push(linked, linked, HUB)
    assert pushed["tokenizer_config.json"] == json.dumps(added).encode()
    assert pushed_with(linked, "adapter_config.json", target_modules=["key", "value"])["target_modules"] == [
        "key", "value"
    ]  # fmt: skip


def test_a_card_that_a_person_wrote_is_pushed_without_secrets(linked, run):
    code = 'login(token=os.environ["HF_TOKEN"])  # token=None, key = value'
    said = "Run `--judge_api_key cardKey8899 --seed 3`, password: cardPw1122."
    metadata = "hub_token: abc\nnote: ghp_abcdefghijklmnop\nmodel-index: [{name: a key, value: 0.5}]"
    (linked / "README.md").write_text(f"---\n{metadata}\n---\n# A card\n\n{code}\n\n{said}\n")
    card = files_to_push(linked, linked, HUB)["README.md"].decode()
    assert code in card and "Run `--judge_api_key *** --seed 3`, password: ***" in card
    metadata = parse_card(card, "README.md").data.to_dict()
    assert (metadata["note"], metadata["model-index"]) == ("***", [{"name": "a key", "value": 0.5}])
    assert "hub_token" not in metadata
    # the card that a run writes stays
    written = (run / "README.md").read_text()
    assert hide(written) == written


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


@pytest.mark.core(".posttrain.lock", "README.md", "adapter_model.safetensors", "training_args.bin")
@pytest.mark.parametrize("had", ["nothing", "a run"])
@pytest.mark.parametrize(
    "name",
    [
        ".posttrain.lock", "README.md", "metrics.csv", "metrics.tmp", "adapter_config.json", "tokenizer_config.json",
        "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja", "resolved_config.yaml", "curves.png",
        "training_args.bin", ".saving", "posttrain_run.json", ".posttrain_run.json.partial", "completions",
        "eval_results.json", "additional_chat_templates",
    ],
)  # fmt: skip
def test_a_run_does_not_write_through_links_in_its_folder(run, tmp_path, had, name):
    folder = tmp_path / "run"
    shutil.copytree(run, folder) if had == "a run" else folder.mkdir()
    for kind in ("private", "nowhere"):
        if (folder / name).exists() or (folder / name).is_symlink():
            (folder / name).unlink()
        (tmp_path / "private").write_text("PRIVATE")
        (folder / name).symlink_to(tmp_path / kind)
        with pytest.raises(ConfigError, match=f"files that a run writes: {re.escape(name)}. .* Remove them"):
            RobustDPOTrainer(
                model="no-model", args=RobustDPOConfig(**settings(folder, max_steps=1)), train_dataset=make_pairs(8)
            )
        assert (tmp_path / "private").read_text() == "PRIVATE" and not (tmp_path / "nowhere").exists()


def test_links_that_come_after_construction_are_refused_before_a_write(tiny_folder, tmp_path):
    folder = tmp_path / "run"
    trainer = RobustDPOTrainer(
        model=tiny_folder, args=RobustDPOConfig(**settings(folder, max_steps=1)), train_dataset=make_pairs(8),
        peft_config=lora(),
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    (tmp_path / "private").write_text("PRIVATE")
    (folder / "README.md").symlink_to(tmp_path / "private")
    os.mkfifo(folder / "metrics.csv")
    for act in (trainer.train, trainer.evaluate, trainer.save_model):
        with pytest.raises(ConfigError, match="README.md, metrics.csv"):
            act(*([make_pairs(2)] if act == trainer.evaluate else []))
    assert (tmp_path / "private").read_text() == "PRIVATE"


@pytest.mark.parametrize("name", ["loop", "dangling", "loop/run", "dangling/run", "behind"])
def test_a_path_with_a_link_that_leads_nowhere_is_refused_in_words(tmp_path, name):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere/else")
    (tmp_path / "behind").symlink_to("loop/run")
    told = f"output_dir is .*/{name}, and .*/{name.split('/')[0]} is a link that leads nowhere"
    with pytest.raises(ConfigError, match=told):
        check_output_dir(tmp_path / name)
    with pytest.raises(ConfigError, match="output is .* is a link that leads nowhere"):
        merge.run(SimpleNamespace(output=tmp_path / name))
    assert not (tmp_path / "nowhere").exists()
    with contextlib.suppress(EnvironmentIssue):
        # where there is no way, in words
        write_lines(tmp_path / name, [{}])
    (tmp_path / "whole").symlink_to(tmp_path)
    check_output_dir(tmp_path / "whole" / "whole" / "run")


def test_a_run_folder_may_be_a_link_and_others_links_in_it_stay(tmp_path):
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "latest").symlink_to(tmp_path / "run")
    for name, target in (("notes.txt", "nowhere"), ("latest", "run/checkpoint-3"), ("data", ".")):
        (tmp_path / "run" / name).symlink_to(tmp_path / target)
    check_places(tmp_path / "latest", ["default"])
    (tmp_path / "run" / "teacher").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="writes: teacher"):
        check_places(tmp_path / "latest", ["default", "teacher"])


@pytest.mark.parametrize("name", ["optimizer.pt", "additional_chat_templates", ".posttrain_saving.json.partial"])
def test_a_checkpoint_with_a_link_where_a_save_writes_is_not_written_into(tmp_path, name):
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    checkpoint_files.mark(folder, {"identity": {}, "files": {}})
    (folder / "notes.txt").symlink_to(tmp_path / "nowhere")
    assert not checkpoint_files.is_occupied(folder)
    (folder / name).symlink_to(tmp_path / "nowhere")
    assert checkpoint_files.is_occupied(folder)


@pytest.mark.parametrize("name", ["rng_state.pth", "trainer_state.json", "posttrain_saving.json", "optimizer.pt"])
def test_a_checkpoint_with_a_folder_where_a_save_writes_a_file_is_not_written_into(tmp_path, name):
    folder = tmp_path / "checkpoint-3"
    for own in ("notes", "global_step3", "optimizer_0", "pytorch_model_fsdp_0", "additional_chat_templates"):
        (folder / own).mkdir(parents=True)
        (folder / own / "x_optim_states.pt").touch()
    checkpoint_files.mark(folder, {"identity": {}, "files": {}})
    assert not checkpoint_files.is_occupied(folder)
    (folder / name).mkdir()
    assert checkpoint_files.is_occupied(folder)


def test_a_checkpoint_with_a_file_where_a_save_makes_a_folder_is_not_written_into(tmp_path):
    checkpoint_files.mark(tmp_path, {"identity": {}, "files": {}})
    (tmp_path / "additional_chat_templates").write_text("")
    assert checkpoint_files.is_occupied(tmp_path)


@pytest.mark.parametrize("name", ["metrics.jsonl", "model.safetensors", "posttrain_run.json", "metrics.tmp"])
def test_a_run_folder_with_a_folder_in_the_place_of_a_file_is_refused(tmp_path, name):
    for other in ("completions", "notes", "checkpoint-3"):
        (tmp_path / other).mkdir()
    check_places(tmp_path)
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=f"folders stand in the places of files .*: {name}. Remove"):
        check_places(tmp_path)


def test_a_run_folder_with_a_file_in_the_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / ".saving").write_text("")
    with pytest.raises(ConfigError, match="or files in those of its folders: .saving. Remove"):
        check_places(tmp_path)


class Evil:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def rewritten(folder, name, content):
    """Have a checkpoint's file hold something else, which its marker says is as it was saved."""
    path = folder / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".json":
        path.write_text(json.dumps(json.loads(path.read_text()) | content))
    else:
        torch.save(content, path)
    marker = json.loads((folder / MARKER).read_text())
    marker["files"][name] = path.stat().st_size
    marker["digests"].pop(name)
    (folder / MARKER).write_text(json.dumps(marker))


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_pickle_in_a_checkpoint_is_never_run(run, tiny_folder, tmp_path, name):
    shutil.copytree(run / "checkpoint-1", tmp_path / "checkpoint-1")
    rewritten(tmp_path / "checkpoint-1", name, Evil(tmp_path / "PWNED"))
    args = settings(tmp_path / "out", max_steps=2, optim="adamw_torch", check_resume=False)
    trainer = RobustDPOTrainer(
        model=tiny_folder, args=RobustDPOConfig(**args), train_dataset=make_pairs(8), peft_config=lora()
    )
    refused = pytest.raises(ConfigError, match=f"damaged: {name} holds no such state .* code in it is not run")
    with contextlib.nullcontext() if name == "training_args.bin" else refused:
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert not (tmp_path / "PWNED").exists()
    # what would have been run is what a plain load runs
    torch.load(tmp_path / "checkpoint-1" / name, weights_only=False)
    assert (tmp_path / "PWNED").exists()


@pytest.mark.core("trainer_state.json", "rng_state.pth", "adapter_model", "optimizer.pt-content10")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("trainer_state.json", dict(global_step="x")),
        ("trainer_state.json", dict(global_step=-5)),
        ("trainer_state.json", dict(max_steps=None)),
        ("trainer_state.json", dict(log_history=5)),
        ("trainer_state.json", dict(log_history=[5])),
        ("trainer_state.json", dict(save_steps="x")),
        ("trainer_state.json", dict(stateful_callbacks=5)),
        ("trainer_state.json", dict(best_metric="x")),
        ("trainer_state.json", dict(other=1)),
        ("trainer_state.json", b"[" * 100_000),
        ("optimizer.pt", [1, 2]),
        ("optimizer.pt", {}),
        ("optimizer.pt", {"state": {}, "param_groups": 5}),
        ("optimizer.pt", b"x" * 100),
        ("scheduler.pt", [1]),
        ("scheduler.pt", {"step": 5}),
        ("scheduler.pt", {"last_epoch": "x"}),
        ("rng_state.pth", {"python": 5}),
        ("rng_state.pth", {}),
        ("adapter_model.safetensors", b"x" * 100),
    ],
)
def test_auto_passes_over_a_state_of_another_form_with_a_word(run, tmp_path, name, content):
    folder = shutil.copytree(run / "checkpoint-1", tmp_path / "checkpoint-1")
    assert checkpoints.find(tmp_path, "auto", by_content=True) == folder
    rewritten(folder, name, content)
    assert checkpoints.find(tmp_path, "auto", by_content=True) is None
    assert checkpoints.passed_over(tmp_path, None).startswith(f"checkpoint-1 is damaged: {name} ")
    with pytest.raises(ConfigError, match=f"checkpoint-1 is damaged: {name} "):
        checkpoints.refuse_damaged(folder, weights_only=False, by_content=True)


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin", "scaler.pt", "config.json", "pytorch_model_fsdp_0/", "model.safetensors", "optimizer.bin",
        "model.safetensors.index.json", "optimizer_0/", "global_step1/x", "other/adapter_model.bin", "rng_state_1.pth",
    ],
)  # fmt: skip
def test_auto_passes_over_a_checkpoint_with_a_file_that_no_save_wrote_and_loading_reads(run, tmp_path, name):
    folder = shutil.copytree(run / "checkpoint-1", tmp_path / "checkpoint-1")
    for harmless in ("notes.txt", "plots/loss.png"):
        (folder / harmless).parent.mkdir(exist_ok=True)
        (folder / harmless).write_text("of the user")
    assert checkpoints.find(tmp_path, "auto", by_content=True) == folder
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.mkdir() if name.endswith("/") else path.write_bytes(b"evil")
    assert checkpoints.find(tmp_path, "auto", by_content=True) is None
    said = f"checkpoint-1 is damaged: {name.rstrip('/')} was not saved with it, and loading would read it"
    assert checkpoints.passed_over(tmp_path, None).startswith(said)
    with pytest.raises(ConfigError, match=said):
        checkpoints.refuse_damaged(folder, weights_only=False)


def test_a_scaler_of_another_precision_is_named(tmp_path):
    training_state.check_scaler(None, tmp_path)
    (tmp_path / "scaler.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match="holds scaler.pt, .* this run has none"):
        training_state.check_scaler(None, tmp_path)


@pytest.mark.parametrize(
    "line", [b"5", b"null", b"[1]", b'{"step": "x"}', b'{"a": 1}', b'{"step": 1e400}', b"\xff{nope", b"\0" * 9,
             b"[" * 100_000, b'{"step": 3, "lo']
)  # fmt: skip
def test_lines_of_metrics_that_are_none_are_passed_over(tmp_path, line):
    rows = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    good = [json.dumps(row).encode() for row in rows]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([good[0], line, good[1], line]))
    assert report._read_rows(tmp_path / "metrics.jsonl") == rows


@pytest.mark.parametrize(
    "content",
    [
        '{"identity": {}, "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"identity": {}, "x": ' + "[" * 200 + "]" * 200 + "}",
        '{"identity": {}, "x": ' + "9" * 10_000 + "}",
        *(
            {"identity": {}} | other
            for other in (
                dict(identity=[]), dict(files=["a"]), dict(files={"a": "b"}), dict(digests=5), dict(digests=None),
                dict(digests={"a": 1}), dict(update=[1]), dict(state=[]), dict(state={"method": 5}),
                dict(state={"schedule": {"total": 0, "knots": []}}), dict(state={"num_tokens": "x"}),
                dict(state={"schedule": {"total": 1, "knots": [1]}}), dict(files={"x" * 5000: 1}),
            )
        ),
    ],
)  # fmt: skip
def test_auto_passes_over_a_marker_of_another_form_with_a_word(run, tmp_path, content):
    folder = shutil.copytree(run / "checkpoint-1", tmp_path / "checkpoint-1")
    (folder / MARKER).write_text(content if isinstance(content, str) else json.dumps(content))
    assert checkpoints.find(tmp_path, "auto", by_content=True) is None
    assert checkpoints.passed_over(tmp_path, None).startswith("checkpoint-1 is damaged: ")
    if "files" not in content or not isinstance(content["files"], dict):
        assert "posttrain_complete.json cannot be read" in checkpoints.passed_over(tmp_path, None)


def test_a_folder_in_the_place_of_a_marker_marks_nothing(run, tmp_path):
    folder = shutil.copytree(run / "checkpoint-1", tmp_path / "checkpoint-1")
    (folder / MARKER).unlink()
    (folder / MARKER).mkdir()
    assert checkpoints.find(tmp_path, "auto", by_content=True) is None
    assert "was not written by posttrain" in checkpoints.passed_over(tmp_path, None)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("optimizer.pt", {"state": {}, "param_groups": [{"params": [0]}] * 2}, "damaged: optimizer.pt holds no such"),
        (
            "optimizer.pt",
            {"param_groups": [{"params": [0]}, {"params": []}]},
            "optimizer.pt or scheduler.pt of .* cannot",
        ),
        ("scheduler.pt", {"last_epoch": 1}, "optimizer.pt or scheduler.pt of the checkpoint .* cannot be loaded"),
        ("trainer_state.json", {"save_steps": 0}, "trainer_state.json has no save_steps, and save_strategy is steps"),
    ],
)
def test_a_state_that_does_not_fit_the_run_is_named(run, tiny_folder, tmp_path, name, content, told):
    folder = shutil.copytree(run / "checkpoint-1", tmp_path / "checkpoint-1")
    rewritten(folder, name, content)
    args = settings(
        tmp_path / "out", max_steps=2, optim="adamw_torch", check_resume=False, save_strategy="steps", save_steps=2
    )
    trainer = RobustDPOTrainer(
        model=tiny_folder, args=RobustDPOConfig(**args), train_dataset=make_pairs(8), peft_config=lora()
    )
    with pytest.raises(ConfigError, match=told):
        trainer.train(resume_from_checkpoint=str(folder))


def test_a_run_that_passed_over_a_damaged_checkpoint_does_not_say_that_auto_would_take_it(run, tmp_path, logged):
    shutil.copytree(run / "checkpoint-1", tmp_path / "checkpoint-1")
    args = SimpleNamespace(output_dir=str(tmp_path), overwrite=False, resume_weights_only=False)
    RunFolder._begin_anew(None, args)
    assert "would have gone on from checkpoint-1" in logged.text
    logged.clear()
    rewritten(tmp_path / "checkpoint-1", "optimizer.pt", b"x" * 100)
    RunFolder._begin_anew(None, args)
    assert "would have gone on" not in logged.text and "up to step 1; this run starts anew" in logged.text


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
