"""Tables of the cells of dp.py."""

import harness
import numpy as np

# what a row of the held-out part, or a secret, has a value of
BY_ROW = ("lists_right", "exposure_once", "exposure_often")
# what a cell has one value of
BY_CELL = (
    "noise_multiplier", "epsilon", "clipped_fraction", "gradient_norm", "units", "audit_bound", "steps",
    "train_seconds",
)  # fmt: skip
NAMES = ("loss", *BY_ROW, "noise_multiplier", "epsilon", "audit_bound")


def measured(result: dict) -> dict[str, np.ndarray]:
    """A cell's values: loss in nats a token, each row's share of the held-out part's tokens taken into account."""
    found = {"loss": np.array(result["loss"]) / np.mean(result["tokens"])}
    found |= {name: np.array(result[name], float) for name in BY_ROW if name in result}
    return found | {name: np.array([result[name]], float) for name in BY_CELL if result.get(name) is not None}


def summarise(stage: str, done: list[dict]) -> list[dict]:
    """Means with 95% intervals over seeds and rows, and paired differences from other cells of the same seeds."""
    arms: dict[tuple[str, str, int], dict[int, dict]] = {}
    for entry in done:
        cell = entry["cell"]
        arms.setdefault((cell["unit"], cell["arm"], cell["audit"]), {})[cell["seed"]] = measured(entry["result"])
    table = []
    for (unit, arm, audit), mine in arms.items():
        row = {"stage": stage, "unit": unit, "arm": arm, "audit": audit, "seeds": len(mine)}
        others = {"plain": ("none", "plain", 0), "inf": (unit, "inf", 0)}
        others |= {"row": ("row", arm, audit)} if unit == "person" else {}
        others |= {"unaudited": (unit, arm, 0)} if audit else {}
        for name in next(iter(mine.values())):
            row[name] = _rounded([mine[seed][name] for seed in sorted(mine)])
            for said, other in others.items():
                theirs = arms.get(other, {})
                both = [seed for seed in sorted(set(mine) & set(theirs)) if name in theirs[seed]]
                if other != (unit, arm, audit) and both and name not in BY_CELL:
                    row[f"{name}_minus_{said}"] = _rounded([mine[seed][name] - theirs[seed][name] for seed in both])
        table.append(row)
    return table


def show(rows: list[dict]) -> None:
    from posttrain.tables import format_table

    def value(row, name):
        return "{:.3f} [{:.3f}, {:.3f}]".format(*row[name]) if name in row else ""

    for suffix in ("", "_minus_inf", "_minus_row"):
        names = [name + suffix for name in NAMES if any(name + suffix in row for row in rows)]
        lines = [
            [row["stage"], row["unit"], row["arm"], row["audit"], row["seeds"], *(value(row, name) for name in names)]
            for row in rows
            if not suffix or f"loss{suffix}" in row
        ]
        if lines:
            print(format_table(("stage", "unit", "arm", "audit", "seeds", *names), lines))


def _rounded(table) -> list[float]:
    return [round(value, 5) for value in harness.bootstrap(np.stack([np.asarray(row, float) for row in table]))]
