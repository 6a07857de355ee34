"""Rows of conversations, and tokenizers with the templates that render them."""

import functools
from pathlib import Path

import trl

from posttrain.data import objects
from posttrain.data.rendering import row_checks
from posttrain.models import byte_tokenizer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CALL = [{"id": "call_1234", "type": "function", "function": {"name": "weather", "arguments": {"town": "Lyon"}}}]
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Now.", "parameters": {"type": "object", "properties": {}}},
}


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
