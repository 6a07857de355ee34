"""Tables and pictures of the cells of rlvr.py."""

import harness
import numpy as np

SPLITS = ("easy", "hard")
METRICS = ("greedy", "pass1", "passk")


def measured(cell: dict, split: str, samples: int) -> dict[str, np.ndarray]:
    """What a cell scored, a value a held-out task."""
    counts = np.array([int(digit) for digit in cell["result"][split]["sampled"]])
    greedy = np.array([int(digit) for digit in cell["result"][split]["greedy"]])
    return {"greedy": greedy.astype(float), "pass1": counts / samples, "passk": (counts > 0).astype(float)}


def per_run(cell: dict) -> dict[str, float]:
    """What a cell cost and how its rollouts were, a number each."""
    result = cell["result"]
    found = {name: result[name] for name in ("train_seconds", "update_tokens", "generated_tokens")}
    curve = result["curve"]
    if curve:
        for split in SPLITS:
            values = [entry[f"entropy_{split}"] for entry in curve]
            found |= {f"entropy_{split}_first": values[0], f"entropy_{split}_highest": max(values)}
    for split in SPLITS:
        found[f"entropy_{split}_last"] = result[split]["entropy"]
    kept = result["log"].get("rows/kept_share")
    if kept:
        found["rows_without_gradient"] = 1 - float(np.mean(kept))
    gated = result["log"].get("hpt/frac_sft_prompts")
    if gated:
        found["prompts_gated"] = float(np.mean(gated))
    return found


def summarise(done: list[dict], samples: int) -> dict:
    """Means with 95% intervals over seeds and tasks, and paired differences from GRPO and HPT on the same seeds."""
    arms: dict[str, dict[int, dict]] = {}
    for entry in done:
        arms.setdefault(entry["cell"]["arm"], {})[entry["cell"]["seed"]] = entry
    rows, runs = [], []
    for arm, by_seed in arms.items():
        for split in SPLITS:
            scores = {seed: measured(entry, split, samples) for seed, entry in by_seed.items()}
            row = {"arm": arm, "split": split, "seeds": len(by_seed), "k": samples}
            for metric in METRICS:
                row[metric] = _rounded(np.stack([scores[seed][metric] for seed in sorted(scores)]))
                for other in ("grpo_fast",) if arm == "qae_fast" else ("grpo", "hpt"):
                    both = sorted(set(by_seed) & set(arms.get(other, {})))
                    if arm != other and both:
                        theirs = [measured(arms[other][seed], split, samples)[metric] for seed in both]
                        gaps = np.stack([scores[seed][metric] for seed in both]) - np.stack(theirs)
                        row[f"{metric}_minus_{other}"] = _rounded(gaps)
            rows.append(row)
        facts = [per_run(by_seed[seed]) for seed in sorted(by_seed)]
        run = {"arm": arm, "seeds": len(facts)}
        for name in facts[0]:
            run[name] = _rounded(np.array([[fact[name]] for fact in facts]))
        other = {"qae": "grpo", "qae_fast": "grpo_fast"}.get(arm)
        both = sorted(set(by_seed) & set(arms.get(other, {})))
        for name in facts[0] if both else ():
            gaps = [[per_run(by_seed[seed])[name] - per_run(arms[other][seed])[name]] for seed in both]
            run[f"{name}_minus_{other}"] = _rounded(np.array(gaps))
        runs.append(run)
    return {"rows": rows, "runs": runs}


def show(content: dict) -> None:
    from posttrain.tables import format_table

    headers = ("arm", "split", "seeds", "greedy", "pass@1", "pass@k", "pass@1 minus GRPO", "pass@1 minus HPT")
    lines = []
    for row in content["rows"]:
        gaps = [_points(row.get(f"pass1_minus_{other}")) for other in ("grpo", "hpt")]
        lines.append([row["arm"], row["split"], row["seeds"], *(_percent(row[m]) for m in METRICS), *gaps])
    print(format_table(headers, lines))
    names = ("generated_tokens", "update_tokens", "train_seconds", "rows_without_gradient", "prompts_gated")
    names += tuple(f"entropy_{split}_{when}" for split in SPLITS for when in ("first", "highest", "last"))
    lines = [[run["arm"], *(_number(run.get(name)) for name in names)] for run in content["runs"]]
    print("\n" + format_table(("arm", *names), lines))


def pilot_line(arm: str, rate: float, result: dict) -> str:
    """A line of the pilot: greedy accuracy by split, entropy, and what it took."""
    scores = [f"{split} {np.mean([int(digit) for digit in result[split]['greedy']]):.3f}" for split in SPLITS]
    entropy = [f"{result[split]['entropy']:.3f}" for split in SPLITS]
    first = [f"{split} {result['curve'][0][f'pass1_{split}']:.2f}" for split in SPLITS]
    return (
        f"{arm}, learning rate {rate:g}: greedy {', '.join(scores)} (pass@1 before: {', '.join(first)}); entropy "
        f"{', '.join(entropy)}; {result['train_seconds']} s"
    )


def plot(done: list[dict], content: dict, path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 8))
    _bars(axes[0][0], content["rows"])
    _curves(axes[0][1], done, lambda result: _points_of(result["curve"], "pass1_hard"), None)
    axes[0][1].set(title="held-out hard tasks", xlabel="optimiser step", ylabel="pass@1, mean over seeds")
    both = ("grpo", "qae", "grpo_fast", "qae_fast")
    _curves(axes[1][0], done, lambda result: _points_of(result["curve"], "entropy_hard"), both)
    axes[1][0].set(title="hard tasks", xlabel="optimiser step", ylabel="entropy of own answers (nats a token)")
    _curves(axes[1][1], done, lambda result: _smooth(result["log"].get("rows/kept_share")), both)
    axes[1][1].set(title="training rollouts", xlabel="optimiser step", ylabel="share of zero advantages (of 5 steps)")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _bars(axis, rows: list[dict]) -> None:
    for number, split in enumerate(SPLITS):
        own = [row for row in rows if row["split"] == split]
        x = np.arange(len(own)) + 0.38 * (number - 0.5)
        y = np.array([row["pass1"] for row in own])
        errors = [y[:, 0] - y[:, 1], y[:, 2] - y[:, 0]]
        axis.bar(x, y[:, 0], 0.38, yerr=errors, capsize=2, label=split)
        axis.set_xticks(np.arange(len(own)), [row["arm"] for row in own], rotation=30)
    axis.set(title="after training", ylabel="pass@1 on held-out tasks")


def _curves(axis, done: list[dict], points, arms) -> None:
    """A line per arm: the mean over seeds, with a band between the lowest and the highest of them."""
    by_arm: dict[str, list] = {}
    for entry in done:
        arm, found = entry["cell"]["arm"], points(entry["result"])
        if arm != "warm" and found and (arms is None or arm in arms):
            by_arm.setdefault(arm, []).append(found)
    for arm, lines in by_arm.items():
        x = [step for step, _ in lines[0]]
        y = np.array([[value for _, value in line] for line in lines])
        axis.plot(x, y.mean(axis=0), marker="o", markersize=3, label=arm)
        if arms is not None:
            axis.fill_between(x, y.min(axis=0), y.max(axis=0), alpha=0.15)


def _points_of(curve: list[dict], name: str) -> list[tuple]:
    return [(entry["step"], entry[name]) for entry in curve]


def _smooth(kept, width: int = 5) -> list[tuple]:
    if not kept:
        return []
    blocks = [kept[start : start + width] for start in range(0, len(kept) - width + 1, width)]
    return [(width * (i + 1), 1 - float(np.mean(block))) for i, block in enumerate(blocks)]


def _rounded(table) -> list[float]:
    return [round(value, 4) for value in harness.bootstrap(table)]


def _percent(value) -> str:
    return "{:.1%} [{:.1%}, {:.1%}]".format(*value)


def _points(value) -> str:
    return "{:+.1%} [{:+.1%}, {:+.1%}]".format(*value) if value else ""


def _number(value) -> str:
    if not value:
        return ""
    return f"{value[0]:,.0f}" if abs(value[0]) >= 100 else f"{value[0]:.3f} [{value[1]:.3f}, {value[2]:.3f}]"
