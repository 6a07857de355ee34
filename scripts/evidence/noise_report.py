"""Tables of the cells of noise.py."""

import harness
import numpy as np

# what a row of the held-out part, or a question, has a value of
BY_ROW = ("lists_right", "facts_right", "invented")
# what a cell has one value of
BY_CELL = ("calibration_error", "accuracy", "curvature", "accepted_tokens", "noise_ratio", "steps", "train_seconds")
AGAINST = ("sft", "neftune", "neftune_2x")


def measured(result: dict) -> dict[str, np.ndarray]:
    """A cell's values: loss in nats a token, each row's share of the held-out part's tokens taken into account."""
    tokens = np.array(result["tokens"], float)
    found = {name: np.array(result[name]) / tokens.mean() for name in ("loss", "loss_4bit")}
    found["loss_of_rounding"] = found["loss_4bit"] - found["loss"]
    found |= {name: np.array(result[name], float) for name in BY_ROW if name in result}
    return found | {name: np.array([result[name]], float) for name in BY_CELL if name in result}


def summarise(stage: str, done: list[dict]) -> list[dict]:
    """Means with 95% intervals over seeds and rows, and paired differences from other arms on the same data."""
    arms: dict[tuple[str, str], dict[int, dict]] = {}
    for entry in done:
        cell = entry["cell"]
        arms.setdefault((cell["data"], cell["arm"]), {})[cell["seed"]] = measured(entry["result"])
    table = []
    for (data, arm), mine in arms.items():
        row = {"stage": stage, "data": data, "arm": arm, "seeds": len(mine)}
        for name in next(iter(mine.values())):
            row[name] = _rounded([mine[seed][name] for seed in sorted(mine)])
            for other in AGAINST:
                theirs = arms.get((data, other), {})
                both = sorted(set(mine) & set(theirs))
                if other != arm and both and all(name in theirs[seed] for seed in both):
                    row[f"{name}_minus_{other}"] = _rounded([mine[seed][name] - theirs[seed][name] for seed in both])
        table.append(row)
    return table


def show(rows: list[dict]) -> None:
    from posttrain.tables import format_table

    names = ("loss", "calibration_error", *BY_ROW, "curvature", "loss_of_rounding", "accepted_tokens")

    def value(row, name):
        return "{:.3f} [{:.3f}, {:.3f}]".format(*row[name]) if name in row else ""

    for suffix in ("", "_minus_sft"):
        lines = [
            [row["stage"], row["data"], row["arm"], row["seeds"], *(value(row, name + suffix) for name in names)]
            for row in rows
        ]
        print(format_table(("stage", "data", "arm", "seeds", *(name + suffix for name in names)), lines))


def _rounded(table) -> list[float]:
    return [round(value, 5) for value in harness.bootstrap(np.stack([np.asarray(row, float) for row in table]))]
