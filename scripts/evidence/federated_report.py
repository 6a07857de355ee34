"""What is kept of a cell of federated.py, and its tables."""

import harness
import numpy as np

# what a row of the held-out part has a value of
BY_ROW = ("right",)
# what a cell has one value of
BY_CELL = (
    "largest_rise", "summed_rises", "epsilon", "megabytes_up", "megabytes_down", "not_orthonormal", "diverged",
    "train_seconds",
)  # fmt: skip
NAMES = ("loss", "right", "largest_rise", "summed_rises", "epsilon", "megabytes_up", "megabytes_down", "diverged")
# what each arm is held against
AGAINST = ("fedsvd", "ffa_lora", "none")


def facts_of(reports: list[dict], looks: list[float]) -> dict:
    """What a run's reports and the losses of the held-out rows at its looks come to."""
    rises = [max(later - earlier, 0.0) for earlier, later in zip(looks, looks[1:], strict=False)]
    spent = [
        told["epsilon"] for report in reports for told in report["clients"].values() if told["epsilon"] is not None
    ]
    return {
        "losses": looks,
        "largest_rise": round(max(rises, default=0.0), 5),
        "summed_rises": round(sum(rises), 5),
        "epsilon": round(max(spent), 4) if spent else None,
        "megabytes_up": round(np.mean([report["bytes_up"] for report in reports]) / 1e6, 4),
        "megabytes_down": round(np.mean([report["bytes_down"] for report in reports]) / 1e6, 4),
        "not_orthonormal": round(reports[-1]["orthonormality"], 8),
        "left_out": sum(len(report["left_out"]) for report in reports),
    }


def measured(result: dict) -> dict[str, np.ndarray]:
    """A cell's values: loss in nats a token, each row's share of the held-out part's tokens taken into account."""
    found = {"loss": np.array(result["loss"]) / np.mean(result["tokens"])}
    found |= {name: np.array(result[name], float) for name in BY_ROW if name in result}
    return found | {name: np.array([result[name]], float) for name in BY_CELL if result.get(name) is not None}


def summarise(stage: str, done: list[dict]) -> list[dict]:
    """Means with 95% intervals over seeds and rows, their spread over seeds, and paired differences.

    An arm is held against FedSVD and FFA-LoRA under the same optimizer and privacy, and against itself without privacy.
    """
    arms: dict[tuple, dict[int, dict]] = {}
    for entry in done:
        cell = entry["cell"]
        key = (cell["arm"], cell["optimizer"], cell["epsilon"])
        arms.setdefault(key, {})[cell["seed"]] = measured(entry["result"])
    table = []
    for (arm, optimizer, epsilon), mine in arms.items():
        row = {"stage": stage, "arm": arm, "optimizer": optimizer, "private": epsilon, "seeds": len(mine)}
        others = {name: (name, optimizer, epsilon) for name in AGAINST[:2]} | {"none": (arm, optimizer, None)}
        for name in next(iter(mine.values())):
            known = [seed for seed in sorted(mine) if name in mine[seed]]
            row[name] = _rounded([mine[seed][name] for seed in known])
            means = [float(mine[seed][name].mean()) for seed in known]
            row[f"{name}_over_seeds"] = round(float(np.std(means, ddof=1)), 5) if len(means) > 1 else None
            for said, other in others.items():
                theirs = arms.get(other, {})
                both = [seed for seed in known if name in theirs.get(seed, {})]
                if other != (arm, optimizer, epsilon) and both and name in ("loss", *BY_ROW, "largest_rise"):
                    row[f"{name}_minus_{said}"] = _rounded([mine[seed][name] - theirs[seed][name] for seed in both])
        table.append(row)
    return table


def show(rows: list[dict]) -> None:
    from posttrain.tables import format_table

    def value(row, name):
        return "{:.3f} [{:.3f}, {:.3f}]".format(*row[name]) if row.get(name) is not None else ""

    for suffix in ("", *(f"_minus_{other}" for other in AGAINST)):
        names = [name + suffix for name in NAMES if any(name + suffix in row for row in rows)]
        lines = [
            [row["stage"], row["arm"], row["optimizer"], row["private"] or "no", row["seeds"]]
            + [value(row, name) for name in names]
            for row in rows
            if not suffix or f"loss{suffix}" in row
        ]
        if lines and names:
            print(format_table(("stage", "arm", "optimizer", "epsilon given", "seeds", *names), lines))


def _rounded(table) -> list[float]:
    return [round(value, 5) for value in harness.bootstrap(np.stack([np.asarray(row, float) for row in table]))]
