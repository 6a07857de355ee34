"""Small data sets in the shapes of TRL's test data, under the hub's names, as folders that `load_dataset` reads."""

import json
from pathlib import Path

_LEFT = (
    "Clear Short Early Quiet Warm Plain Open Fresh Steady Bright Tidy Honest Light Whole Calm Exact Brief Sound Kind"
)
_RIGHT = "vague long late loud cold ornate shut stale hasty dim messy sly heavy split wild rough wordy weak harsh"
LEFT, RIGHT = _LEFT.split(), _RIGHT.split()
ROWS = len(LEFT)


def write_data(folder: Path, rows: int = ROWS) -> dict[str, str]:
    """Write the first rows of the data sets, a tenth of them as the test split; returns their folders by hub name."""
    return {
        f"trl-internal-testing/{name}": _write(folder / name, configurations, rows)
        for name, configurations in (("zen", zen()), ("toolcall", toolcall()), ("harmony", harmony()))
    }


def texts() -> list[str]:
    """Everything that the rows say, for a tokenizer to learn from."""
    answers = zen()["standard_prompt_completion"]
    talk = [turn["content"] for row in zen()["conversational_prompt_completion"] for turn in _turns(row)]
    calls = [json.dumps(row) for row in toolcall()["preference"]]
    return [row["prompt"] + row["completion"] for row in answers] + talk + calls


def zen() -> dict[str, list[dict]]:
    """19 sentences in every format that TRL's trainers take, as texts and as messages."""
    named: dict[str, list[dict]] = {}
    for i, (left, right) in enumerate(zip(LEFT, RIGHT, strict=True)):
        prompt, good, bad = f"{left} is better than", f" {right}.", f" {RIGHT[(i + 7) % ROWS]}, of course."
        asked, answer, wrong = f"What is better than {right}?", f"{left}.", f"{LEFT[(i + 7) % ROWS]}, of course."
        for style, (p, c, r) in {
            "standard": (prompt, good, bad),
            "conversational": (
                [{"role": "user", "content": asked}],
                [{"role": "assistant", "content": answer}],
                [{"role": "assistant", "content": wrong}],
            ),
        }.items():
            whole = {"text": p + c} if style == "standard" else {"messages": p + c}
            rows = {
                "language_modeling": whole,
                "prompt_only": {"prompt": p},
                "prompt_completion": {"prompt": p, "completion": c},
                "preference": {"prompt": p, "chosen": c, "rejected": r},
                "implicit_prompt_preference": {"chosen": p + c, "rejected": p + r},
                "unpaired_preference": {"prompt": p, "completion": c if i % 2 else r, "label": bool(i % 2)},
            }
            for name, row in rows.items():
                named.setdefault(f"{style}_{name}", []).append(row)
    return named


def toolcall() -> dict[str, list[dict]]:
    """Calls of one function whose arguments differ from row to row, with the function's schema."""
    named: dict[str, list[dict]] = {}
    for i, place in enumerate(LEFT):
        unit = "celsius" if i % 2 else "kelvin"
        schema = {
            "type": "function",
            "function": {
                "name": "temperature",
                "description": "The temperature of a place.",
                "parameters": {
                    "type": "object",
                    "properties": {"place": {"type": "string"}, "unit": {"type": "string"}},
                    "required": ["place"],
                },
                "return": {"type": "string"},
            },
        }
        prompt = [{"role": "user", "content": f"How warm is it in {place}?"}]

        def call(arguments):
            function = {"name": "temperature", "arguments": arguments}
            return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}

        told = {"role": "tool", "name": "temperature", "content": str(i)}
        answer = {"role": "assistant", "content": f"It is {i} {unit} in {place}."}
        chosen, rejected = call({"place": place, "unit": unit}), call({"place": RIGHT[i], "unit": unit})
        rows = {
            "language_modeling": {"messages": [*prompt, chosen, told, answer]},
            "prompt_completion": {"prompt": prompt, "completion": [chosen, told, answer]},
            "preference": {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]},
        }
        for name, row in rows.items():
            named.setdefault(name, []).append(row | {"tools": [schema]})
    return named


def harmony() -> dict[str, list[dict]]:
    """Answers with a line of thinking, and a row's own arguments of the chat template."""
    named: dict[str, list[dict]] = {}
    for i, (left, right) in enumerate(zip(LEFT, RIGHT, strict=True)):
        prompt = [{"role": "user", "content": f"What is better than {right}?"}]

        def answer(word, right=right):
            return [{"role": "assistant", "thinking": f"It is the opposite of {right}.", "content": f"{word}."}]

        kwargs = {"reasoning_effort": ("low", "medium", "high")[i % 3], "model_identity": "You are a tiny model."}
        rows = {
            "language_modeling": {"messages": prompt + answer(left)},
            "prompt_completion": {"prompt": prompt, "completion": answer(left)},
            "preference": {"prompt": prompt, "chosen": answer(left), "rejected": answer(LEFT[(i + 7) % ROWS])},
        }
        for name, row in rows.items():
            named.setdefault(name, []).append(row | {"chat_template_kwargs": kwargs})
    return named


def _turns(row: dict) -> list[dict]:
    return [turn for value in row.values() if isinstance(value, list) for turn in value]


def _write(folder: Path, configurations: dict[str, list[dict]], number: int) -> str:
    from datasets import Dataset

    lines = ["---", "configs:"]
    for name, rows in configurations.items():
        parts = Dataset.from_list(rows[:number]).train_test_split(test_size=0.1, shuffle=False)
        lines += [f"- config_name: {name}", "  data_files:"]
        for split in ("train", "test"):
            path = folder / name / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            parts[split].to_parquet(path)
            lines += [f"  - split: {split}", f"    path: {name}/{split}.parquet"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return str(folder)
