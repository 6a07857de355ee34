"""A picture of a federated run's rounds: losses, what clients spend and send, and the shared factors."""

from collections.abc import Sequence
from pathlib import Path

from posttrain.log import get_logger

# clients with a line of their own; of more, the least, the mean and the greatest
_MOST_LINES = 12


def write(reports: Sequence[dict], path: Path) -> None:
    """Write the curves of a run's reports as a picture; nothing where matplotlib is missing, which is said."""
    try:
        _plot(panels_of(reports), path)
    except ImportError:
        get_logger().info("no %s without matplotlib: pip install 'posttrain[plots]'", path.name)
    # a run that has trained is not lost for want of a picture
    except Exception as error:
        get_logger().warning("%s could not be written: %s", path.name, error)


def panels_of(reports: Sequence[dict]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return the points (round, value) of each line of each panel; of what no round has, nothing.

    Panels are the clients' losses with their weighted mean, each figure of the evaluation, epsilons and norms of
    updates by client, bytes, the greatest and the least singular value of all modules, and ||A A^T - I||.
    """
    panels: dict[str, dict[str, list]] = {}

    def add(panel: str, line: str, report: dict, value) -> None:
        if value is not None:
            panels.setdefault(panel, {}).setdefault(line, []).append((report["round"], value))

    for report in reports:
        clients = report["clients"]
        for panel in ("loss", "epsilon", "update_norm"):
            for line, value in _by_client(reports, {name: told[panel] for name, told in clients.items()}):
                add(panel, line, report, value)
        add("loss", "weighted", report, report["loss"])
        for name, value in report["evaluation"].items():
            add(f"evaluation {name}", "evaluation", report, value)
        for name in ("up", "down"):
            add("MB", name, report, report[f"bytes_{name}"] / 1e6)
        values = [value for own in report["singular_values"].values() for value in own]
        add("singular values", "greatest", report, max(values))
        add("singular values", "least", report, min(values))
        add("||A A^T - I||", "greatest", report, report["orthonormality"])
    return panels


def _by_client(reports: Sequence[dict], values: dict) -> list[tuple[str, float]]:
    """Return the lines of a panel and their values in a round."""
    known = {name: value for name, value in values.items() if value is not None}
    if len({name for report in reports for name in report["clients"]}) <= _MOST_LINES or not known:
        return list(known.items())
    found = list(known.values())
    return [("least", min(found)), ("mean", sum(found) / len(found)), ("greatest", max(found))]


def _plot(panels: dict, path: Path) -> None:
    import math

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4 * columns, 2.6 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for index, (name, drawn) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(lines, columns, index)
        for label, points in sorted(drawn.items()):
            wide = 2.5 if label == "weighted" else 1.2
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 40 else None, label=label, linewidth=wide)
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3)
        if len(drawn) > 1:
            axes.legend(fontsize=6)
    figure.supxlabel("round", fontsize=10)
    figure.savefig(path, dpi=110)
