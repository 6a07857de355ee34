"""Tables and pictures of the cells of a_lol.py."""

import harness
import numpy as np

SIDES = ("chosen", "rejected")
MEASURES = {
    "score": "score of generations",
    "reward": "training reward of generations, estimated",
    "preferred": "better answer likelier",
    "gained": "better answer gained more",
    "weighted": "reward-weighted log-likelihood, nats a token",
    "selective": "log-likelihood: reward-weighted less plain",
    "length": "tokens generated",
}


def measured(result: dict, base: dict | None) -> dict[str, np.ndarray]:
    """What a cell scored, a value a held-out row.

    `preferred`: the chosen answer has the larger summed log-probability; `gained`: it gained more over the starting
    model than the rejected one. `weighted`: the log-probability per token of the row's two answers, each token weighed
    by its answer's reward; `selective`: that less the same with equal weights.
    """
    logps = np.stack([np.array(result[side]) for side in SIDES])
    tokens = np.stack([np.array(result[f"{side}_tokens"], float) for side in SIDES])
    rewards = np.stack([np.array(result[f"{side}_rewards"]) for side in SIDES])
    # weighed over the whole held-out part: rows whose answers are all bad count little
    weights, counts = (rewards * tokens).sum() / tokens.shape[1], tokens.sum() / tokens.shape[1]
    weighted, plain = (rewards * logps).sum(axis=0) / weights, logps.sum(axis=0) / counts
    found = {
        "score": np.array(result["score"]),
        "preferred": (logps[0] > logps[1]).astype(float),
        "weighted": weighted,
        "selective": weighted - plain,
        "length": np.array(result["lengths"], float),
    }
    if "reward" in result:
        found["reward"] = np.array(result["reward"])
    if base is not None:
        before = np.stack([np.array(base[side]) for side in SIDES])
        found["gained"] = ((logps - before)[0] > (logps - before)[1]).astype(float)
    return found


def summarise(stage: str, done: list[dict]) -> list[dict]:
    """Means with 95% intervals over seeds and rows, and paired differences from A-LoL and SFT on the same data."""
    arms: dict[tuple[str, str], dict[int, dict]] = {}
    for entry in done:
        arms.setdefault((entry["cell"]["data"], entry["cell"]["arm"]), {})[entry["cell"]["seed"]] = entry["result"]
    bases = arms.get(("none", "base"), {})
    scores = {
        key: {seed: measured(result, bases.get(seed) if key[1] != "base" else None) for seed, result in runs.items()}
        for key, runs in arms.items()
    }
    table = []
    for (data, arm), runs in arms.items():
        row = {"stage": stage, "data": data, "arm": arm, "seeds": len(runs)}
        mine = scores[data, arm]
        for name in MEASURES:
            if not all(name in values for values in mine.values()):
                continue
            row[name] = _rounded([mine[seed][name] for seed in sorted(mine)])
            for other in ("sft", "a_lol", "sft_kept"):
                theirs = scores.get((data, other), {})
                both = sorted(set(mine) & set(theirs))
                if other != arm and both:
                    row[f"{name}_minus_{other}"] = _rounded([mine[seed][name] - theirs[seed][name] for seed in both])
        for name in ("distinct_1", "distinct_2", "steps", "answers", "train_seconds"):
            row[name] = _rounded([[float(result[name])] for _, result in sorted(runs.items())])
        if (probe := next(iter(runs.values())).get("probe")) is not None:
            row["probe"] = probe
        table.append(row)
    return table


def show(rows: list[dict]) -> None:
    from posttrain.tables import format_table

    names = [*MEASURES, "distinct_1", "distinct_2"]

    def value(row, name):
        return "{:.3f} [{:.3f}, {:.3f}]".format(*row[name]) if name in row else ""

    lines = [[row["stage"], row["data"], row["arm"], row["seeds"], *(value(row, n) for n in names)] for row in rows]
    print(format_table(("stage", "data", "arm", "seeds", *names), lines))
    gaps = [f"{name}_minus_{other}" for name in ("score", "selective") for other in ("sft", "a_lol", "sft_kept")]
    lines = [
        [row["stage"], row["data"], row["arm"], *(value(row, n) for n in gaps)] for row in rows if row["arm"] != "base"
    ]
    print(format_table(("stage", "data", "arm", *gaps), lines))


def plot(rows: list[dict], path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stages = sorted({row["stage"] for row in rows}, reverse=True)
    names = ("score", "preferred", "selective")
    figure, axes = plt.subplots(len(stages), len(names), figsize=(4.2 * len(names), 3.6 * len(stages)), squeeze=False)
    for line, stage in zip(axes, stages, strict=True):
        found = [row for row in rows if row["stage"] == stage]
        arms = list(dict.fromkeys(row["arm"] for row in found))
        for axis, name in zip(line, names, strict=True):
            for data, shift in (("none", 0.0), ("as_is", -0.15), ("half_low", 0.15)):
                points = [row for row in found if row["data"] == data]
                x = [arms.index(row["arm"]) + shift for row in points]
                middle, low, high = (np.array([row[name][i] for row in points]) for i in range(3))
                label = {"none": "before", "as_is": "data as it is", "half_low": "half low rewards"}[data]
                axis.errorbar(x, middle, yerr=[middle - low, high - middle], fmt="o", capsize=2, label=label)
            axis.set_xticks(range(len(arms)), arms, rotation=45, ha="right")
            axis.set_title(f"{stage}: {MEASURES[name]}", fontsize=9)
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _rounded(table) -> list[float]:
    return [round(value, 4) for value in harness.bootstrap(np.stack([np.asarray(row, float) for row in table]))]
