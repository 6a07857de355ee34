"""Tables of the cells of adapters.py."""

import harness
import numpy as np

NAMES = ("loss", "calibration_error", "lists_right", "facts_right", "earlier_loss")
# what each arm is held against
AGAINST = ("lora", "lora_sgd", "adamw")


def measured(result: dict) -> dict[str, np.ndarray]:
    """A cell's values: loss in nats a token, each row's share of the held-out part's tokens taken into account."""
    found = {"loss": np.array(result["loss"]) / np.mean(result["tokens"])}
    if "earlier_loss" in result:
        found["earlier_loss"] = np.array(result["earlier_loss"]) / np.mean(result["earlier_tokens"])
    found |= {name: np.array(result[name], float) for name in ("lists_right", "facts_right") if name in result}
    return found | {name: np.array([result[name]], float) for name in ("calibration_error", "train_seconds")}


def summarise(stage: str, done: list[dict]) -> list[dict]:
    """Means with 95% intervals over seeds and rows, and paired differences from other arms on the same rows."""
    arms: dict[tuple[str, str, str], dict[int, dict]] = {}
    for entry in done:
        cell = entry["cell"]
        arms.setdefault((cell["rows"], cell["data"], cell["arm"]), {})[cell["seed"]] = measured(entry["result"])
    table = []
    for (rows, data, arm), mine in arms.items():
        row = {"stage": stage, "rows": rows, "data": data, "arm": arm, "seeds": len(mine)}
        for name in next(iter(mine.values())):
            row[name] = _rounded([mine[seed][name] for seed in sorted(mine)])
            for other in AGAINST:
                theirs = arms.get((rows, data, other), {})
                both = sorted(set(mine) & set(theirs))
                if other != arm and both:
                    row[f"{name}_minus_{other}"] = _rounded([mine[seed][name] - theirs[seed][name] for seed in both])
        table.append(row)
    return table


def show(rows: list[dict]) -> None:
    from posttrain.tables import format_table

    def value(row, name):
        return "{:.3f} [{:.3f}, {:.3f}]".format(*row[name]) if name in row else ""

    for suffix in ("", *(f"_minus_{other}" for other in AGAINST)):
        lines = [
            [row["stage"], row["rows"], row["data"], row["arm"], row["seeds"], *(value(row, n + suffix) for n in NAMES)]
            for row in rows
            if not suffix or f"loss{suffix}" in row
        ]
        if lines:
            print(format_table(("stage", "rows", "data", "arm", "seeds", *(n + suffix for n in NAMES)), lines))


def _rounded(table) -> list[float]:
    return [round(value, 5) for value in harness.bootstrap(np.stack([np.asarray(row, float) for row in table]))]
