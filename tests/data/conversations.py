"""Rows of conversations, and tokenizers with the templates that render them."""

import functools
from pathlib import Path

import pytest
import trl

from posttrain.data import objects
from posttrain.data.rendering import row_checks
from posttrain.models import byte_tokenizer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
# templates that differ most in turns, calls and thoughts; the others are slow cases
KINDS = (
    "deepseekv3", "gemma3", "glm4moe", "gptoss", "llama3_1", "nemotron_3_nano", "phi3", "qwen2_5", "qwen3", "smolvlm",
)  # fmt: skip
CALL = [{"id": "call_1234", "type": "function", "function": {"name": "weather", "arguments": {"town": "Lyon"}}}]
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Now.", "parameters": {"type": "object", "properties": {}}},
}


def every_template(training=True):
    """The names of TRL's templates, with those for training or without, those that are not of `KINDS` as slow cases."""
    names = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
    names = [name for name in names if training or not name.endswith("_training")]
    return [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow) for name in names]


def user(content="Name a river.", **keys):
    return {"role": "user", "content": content, **keys}


def says(content="The Loire.", **keys):
    return {"role": "assistant", "content": content, **keys}


def pair(*prompt, chosen=None, rejected=None, **columns):
    sides = {"chosen": chosen or [says()], "rejected": rejected or [says("Paris.")]}
    return {"prompt": list(prompt) or [user()], **sides, **columns}


@functools.cache
def templated(text):
    """A tokenizer of bytes with this chat template, made once: tests only read it."""
    tokenizer = byte_tokenizer("<|pad|>")
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = text
    return tokenizer


def trl_template(name):
    return templated((TEMPLATES / f"{name}.jinja").read_text())


# renders roles and contents of any kind as they come
PLAIN = (
    "{%- for m in messages -%}<|im_start|>{{ m.role }}\n{{ BODY }}<|im_end|>\n{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
)


def plain(body="m.content"):
    return templated(PLAIN.replace("BODY", body))


def said(rows, tokenizer, **options) -> list[str]:
    return row_checks.check(objects.exact(rows), tokenizer, "data", **options).warnings
