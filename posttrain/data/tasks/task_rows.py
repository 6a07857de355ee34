"""Tasks against their rendering: prompts as the model will see them, and demonstrations where they are learned from."""

from collections.abc import Mapping

from posttrain.data import objects
from posttrain.data.rendering import row_checks


def check(datasets, processing_class, args, name: str = "train_dataset") -> None:
    """Look for every text of tasks in its rendering, and say in the log what was found.

    Args:
        datasets: a `datasets.Dataset` with the column prompt, and demonstration where it is learned from; several by
            name; or None. Streams are not checked.
        args: the trainer's config.

    Raises DataError where the model would see or learn something else than the rows say, or a prompt cannot be
    rendered.
    """
    for key, dataset in datasets.items() if isinstance(datasets, Mapping) else [(name, datasets)]:
        if hasattr(dataset, "__len__") and len(dataset) and "prompt" in (getattr(dataset, "column_names", None) or ()):
            _check(dataset, processing_class, args, key)


def _check(dataset, processing_class, args, name: str) -> None:
    there = [number for number, prompt in enumerate(dataset.with_format(None)["prompt"]) if prompt]
    if not there:
        return
    # rows without a prompt get an environment's
    dataset = dataset.with_format(None).select(there)
    if isinstance(dataset[0]["prompt"], list) and not processing_class.chat_template:
        # what reads the prompts says that there is none
        return
    names = [column for column in ("prompt", "tools", "chat_template_kwargs") if column in dataset.column_names]
    rows, places = dataset.select_columns(names), [f"{name}, row {number + 1}" for number in there]
    answered: list[int] = []
    if args.learns_from_demonstrations and "demonstration" in dataset.column_names:
        answers = [
            _answer(prompt, given) for prompt, given in zip(dataset["prompt"], dataset["demonstration"], strict=True)
        ]
        answered = [number for number, answer in enumerate(answers) if answer]
        made = objects.exact([{**rows[number], "demonstration": answers[number]} for number in answered])
        where = [places[number] for number in answered]
        if answered:
            row_checks.report(made, processing_class, name, where, "tasks", args.chat_template_kwargs)
    others = sorted(set(range(len(rows))) - set(answered))
    if others:
        where = [places[number] for number in others]
        row_checks.report(rows.select(others), processing_class, name, where, "tasks", args.chat_template_kwargs)


def _answer(prompt, given):
    """Write a demonstration in the form of its prompt.

    None where it says nothing, or is none, which tokenising refuses.
    """
    if isinstance(given, str) and given.strip():
        return [{"role": "assistant", "content": given}] if isinstance(prompt, list) else given
    turn = given[0] if isinstance(given, list) and len(given) == 1 else None
    if not isinstance(turn, Mapping) or turn.get("role") != "assistant" or not isinstance(prompt, list):
        return None
    content = turn.get("content") or ""
    # what calls a tool need not say anything
    return given if isinstance(content, str) and (content.strip() or turn.get("tool_calls")) else None
