"""The model card: what was trained, on what, how well, and how to load it."""

import dataclasses
import inspect
import math
import os
import platform
from pathlib import Path

from posttrain.environment import library_versions
from posttrain.hub.base_model import adapter_config, base_license, base_name, changed_settings, is_hub_id, loaded_from
from posttrain.hub.metadata import Evaluation, eval_results, last_evaluation, render_card
from posttrain.hub.passages import introduction, loading_section
from posttrain.models import SMOLLM2, TINY
from posttrain.privacy.paper import PAPER
from posttrain.private import hide_forms, without_secrets
from posttrain.tables import format_table
from posttrain.visible import one_line, visible

_TRL_CITATION = """@software{vonwerra2020trl,
  title   = {{TRL: Transformers Reinforcement Learning}},
  author  = {von Werra, Leandro and Belkada, Younes and Tunstall, Lewis and Beeching, Edward and Thrush, Tristan and
             Lambert, Nathan and Huang, Shengyi and Rasul, Kashif and Gallou{\\'e}dec, Quentin},
  license = {Apache-2.0},
  url     = {https://github.com/huggingface/trl},
  year    = {2020}
}"""

# the settings of recipes for those of PEFT
_ADAPTER_NAMES = {
    "r": "lora_r", "target_modules": "lora_target_modules", "target_parameters": "lora_target_parameters",
    "modules_to_save": "lora_modules_to_save",
}  # fmt: skip


def write_model_card(
    trainer, model_name=None, dataset_name=None, tags=None, *, eval_dataset_name=None, eval_split=None, mixture=()
) -> Path:
    """Write `README.md` into the trainer's output folder, over whatever card is there, and return its path.

    The figures of the last evaluation stand in the text and, as `model-index`, in the metadata, from which the hub
    shows them. No local path enters the card: a base model or a data set that is not on the hub is described in words.
    Call it after the last save, since PEFT writes a card of its own beside each adapter. On several ranks, call it on
    the main one.

    Args:
        trainer: the trainer, or what has its attributes.
        model_name: defaults to the hub id's or the output folder's last part.
        dataset_name: a hub id, or several; names that are none are left out.
        tags: a tag or several, added to the trainer's own.
        eval_dataset_name: the hub id of the rows that were evaluated; None where they are local or generated.
        eval_split: the split that was read of it.
        mixture: of a mixture each data set's hub id, or None for local or generated rows, and its share of the rows,
            or None where all its rows were taken.
    """
    folder = Path(trainer.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "README.md"
    evaluated = (eval_dataset_name if is_hub_id(eval_dataset_name) else None, eval_split)
    card = _card(
        trainer, model_name, dataset_name, tags, evaluated, mixture, has_curves=(folder / "curves.png").exists()
    )
    path.write_text(card, encoding="utf-8")
    return path


def _card(trainer, model_name, dataset_name, tags, evaluated, mixture, has_curves: bool) -> str:
    from huggingface_hub import ModelCardData

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
    name = one_line(Path(model_name or args.hub_model_id or Path(args.output_dir).resolve().name).name)
    datasets = [name for name in _listed(dataset_name) if is_hub_id(name)]
    papers = trainer._paper if isinstance(trainer._paper, list | tuple) else [trainer._paper]
    promise = trainer.promise() if hasattr(trainer, "promise") else None
    private = [PAPER] if promise is not None and PAPER not in papers else []
    papers = [*papers, *private, getattr(adapter, "paper", None)]
    papers = [paper for paper in papers if paper]

    kind = "LoRA adapter" if adapter is not None and adapter.peft_type == "LORA" else "adapter" if adapter else "model"
    sections = [
        f"# {name}",
        introduction(kind, trainer._name, base, bool(adapter)),
        loading_section(base, trained, bool(adapter)),
        "## Method\n\n" + _method(trainer, papers),
        "## Data\n\n" + _data(trainer, mixture or [(name, None) for name in datasets]),
    ]
    libraries = library_versions().items()
    withheld = promise is not None and promise.withholds_metrics
    evaluation = None if withheld else last_evaluation(trainer.state.log_history)
    if promise is not None:
        sections.append("## Privacy\n\n" + promise.passage())
    if evaluation:
        sections.append("## Evaluation\n\n" + _evaluation(evaluation))
    if has_curves and not withheld:
        sections.append("## Curves\n\n![Metrics over the training steps](curves.png)")
    sections += [
        "## Settings\n\n"
        + format_table(("setting", "value"), _settings(trainer, adapter, promise))
        + "\n\nAll settings and the git commit are in `resolved_config.yaml`.",
        "## Versions\n\n" + format_table(("library", "version"), [("python", platform.python_version()), *libraries]),
        "## Citation\n\n" + "\n\n".join(f"```bibtex\n{entry}\n```" for entry in _citations(papers)),
    ]
    results = []
    if evaluation:
        names = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else ()
        results = eval_results(evaluation.metrics, names, *evaluated)
    is_lora = adapter is not None and adapter.peft_type == "LORA"
    own_tags = [*trainer._tag_names, *_tags_of(model), *(["lora"] if is_lora else [])]
    metadata = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[*own_tags, *_listed(tags)],
        base_model=hub_base,
        datasets=datasets or None,
        model_name=name if results else None,
        eval_results=results or None,
        **license,
    )
    return render_card(metadata, visible(hide_forms("\n\n".join(sections))) + "\n")


def _listed(names) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])


def _tags_of(model) -> list[str]:
    """Tell what TRL's cards are tagged with besides: the model's own tags, and where it was trained."""
    found = list(getattr(model, "model_tags", None) or [])
    found += ["unsloth"] if hasattr(model.config, "unsloth_version") else []
    return found + (["hf_jobs"] if "JOB_ID" in os.environ else [])


def _method(trainer, papers) -> str:
    sources = []
    for paper in papers:
        link = f" ([arXiv {paper['id']}](https://arxiv.org/abs/{paper['id']}))" if paper.get("id") else ""
        sources.append(f"- {paper['title']}{link}")
    return "\n".join([f"{trainer._name}, after:\n", *sources]) if sources else f"{trainer._name}."


def _data(trainer, mixture) -> str:
    parts = [
        (f"[{name}](https://huggingface.co/datasets/{name})" if name else "local or generated data")
        + (f" (share {share:.3g})" if share is not None else "")
        for name, share in mixture
    ]
    source = f"A mixture of {', '.join(parts)}" if len(parts) > 1 else "".join(parts) or "Local or generated data"
    size = f"{len(trainer.train_dataset):,} training rows" if hasattr(trainer.train_dataset, "__len__") else "streamed"
    given = getattr(trainer, "given_rows", None)
    if given and given > len(trainer.train_dataset):
        size += f" of {given:,} (the others have no gradient, or lost their answer to max_length)"
    held_out = trainer.eval_dataset
    sets = held_out if isinstance(held_out, dict) else {"": held_out}
    for name, rows in sets.items():
        if hasattr(rows, "__len__"):
            size += f", {len(rows):,} evaluation rows" + (f" ({one_line(name)})" if name else "")
    return f"{source}: {size}."


def _evaluation(found: Evaluation) -> str:
    rows = [(name, _short(value)) for name, value in found.metrics.items()]
    return f"After step {found.step}:\n\n" + format_table(("metric", "value"), rows)


def _settings(trainer, adapter, promise=None) -> list[tuple[str, str]]:
    from posttrain.config.setting import told_in_card
    from posttrain.mechanisms.base_digests import quantisation

    args = trainer.args
    split = (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size)
    method = told_in_card(args) | args.inherited_in_card()
    method |= {name: getattr(args, name) for name in _presets(type(args))}
    rows = [
        ("learning_rate", args.learning_rate),
        ("lr_scheduler_type", getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        ("warmup_steps", args.warmup_steps),
        ("optim", getattr(args.optim, "value", args.optim)),
        ("weight_decay", args.weight_decay),
        ("max_grad_norm", args.max_grad_norm),
        _rows_of_a_step(split, promise),
        ("optimiser steps", trainer.state.global_step),
        ("precision", "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"),
        ("seed", args.seed),
    ]
    common = {name for name, _ in rows}
    rows = [*((name, _set(args, name, value)) for name, value in method.items() if name not in common), *rows]
    found = trainer.found_by_method() if hasattr(trainer, "found_by_method") else {}
    found |= trainer.found_in_training() if hasattr(trainer, "found_in_training") else {}
    rows = [(name, _listed_values(value)) for name, value in found.items()] + rows
    if adapter is not None:
        rows += _adapter(adapter)
    if hasattr(adapter, "scheme"):
        rows = adapter.in_card(trainer) + rows
    dtype = str(getattr(trainer.model, "dtype", "float32")).removeprefix("torch.")
    if dtype != "float32":
        rows.append(("dtype", dtype))
    rounded = quantisation(trainer.model)
    method = rounded.pop("quantisation")
    if method:
        told = ", ".join(f"{name} {value}" for name, value in rounded.items() if value is not False)
        rows.append(("base weights", f"{method} ({told})" if told else method))
    return [(name, _short(value)) for name, value in rows]


def _rows_of_a_step(split: tuple[int, int, int], promise) -> tuple[str, str]:
    laid_out = f"per device {split[0]}, accumulation {split[1]}, ranks {split[2]}"
    if promise is None:
        return "rows an optimiser step", f"{math.prod(split)} ({laid_out})"
    return "units an optimiser step", f"{promise.expected} on average, {promise.cap} at most ({laid_out}, at most)"


def _listed_values(value):
    return ", ".join(map(_short, value)) if isinstance(value, list | tuple) else value


def _adapter(adapter) -> list[tuple[str, object]]:
    """Tell an adapter's settings: of a LoRA the usual ones, and what is not at PEFT's default."""
    changed = changed_settings(adapter)
    if adapter.peft_type == "LORA":
        usual = ("r", "lora_alpha", "lora_dropout", "target_modules")
        changed = {name: getattr(adapter, name) for name in usual if getattr(adapter, name) is not None} | changed
    else:
        changed = {"adapter": adapter.peft_type.value} | changed
    rows = [(_ADAPTER_NAMES.get(name, name), value) for name, value in changed.items()]
    lists = (list, tuple, set)
    return [(name, ", ".join(sorted(map(str, v))) if isinstance(v, lists) else v) for name, v in rows]


def _set(args, name: str, value):
    """Return a setting's value; for null, in words, what it means."""
    return f"null ({args.nulls[name]})" if value is None and name in args.nulls else value


def _presets(config: type) -> list[str]:
    """List upstream's settings to which a config here gives a default of its own."""
    from posttrain.config.setting import meanings

    own = [kind for kind in config.__mro__ if kind.__module__.startswith("posttrain.")]
    known = {entry.name for entry in dataclasses.fields(config)}
    names = [name for kind in own for name in inspect.get_annotations(kind) if name in known]
    return [name for name in dict.fromkeys(names) if name not in meanings(config)]


def _citations(papers) -> list[str]:
    return [*(paper["citation"].strip() for paper in papers if paper.get("citation")), _TRL_CITATION]


def _short(value) -> str:
    if value is None:
        return "null"
    return f"{value:.4g}" if isinstance(value, float) else str(without_secrets(value))
