"""What a run leaves behind beside its weights: metrics, curves and the settings it really had."""

import contextlib
import csv
import dataclasses
import enum
import json
import math
import numbers
import os
import platform
import re
from pathlib import Path

from transformers import TrainerCallback

from posttrain import yaml_text
from posttrain.environment import device_name, git_commit, library_versions
from posttrain.errors import EnvironmentIssue
from posttrain.log import get_logger
from posttrain.private import without_secrets
from posttrain.run import lock

_NOT_PLOTTED = re.compile(r"epoch|step|total_flos|train_loss|num_tokens|.*(_runtime|_per_second)")
_MOST_PANELS = 12


class RunReport(TrainerCallback):
    """Writes metrics, curves and the resolved settings of a run into `output_dir`, from the main process.

    - `metrics.jsonl`: a line per log, with step, epoch and every number logged. A resumed run drops the lines beyond
      the step it resumes from.
    - `metrics.csv` and `curves.png` at the end of training (curves only where matplotlib is installed).
    - `resolved_config.yaml` at the start: the training arguments that have a value, those of a private run beside them,
      `sections`, what the method found out, versions and the git commit of the working folder. Tokens and other secrets
      are left out.

    `sections`: further settings to record, a name to a mapping each (the model's and the data's, for example).

    Attributes:
        found: returns what a method found out when training began, by name; asked at the first step.
    """

    def __init__(self, sections: dict | None = None):
        self.sections = sections or {}
        self.found = dict
        self._rows: list[dict] = []
        self._is_told = False

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir)
        path = folder / "metrics.jsonl"
        with _writing(folder):
            if state.global_step > 0:
                self._rows = [row for row in _read_rows(path) if row["step"] <= state.global_step]
            # What an earlier run of this folder left goes; an evaluation by this process before training stays.
            unfinished = path.with_suffix(".tmp")
            unfinished.write_text("".join(json.dumps(row) + "\n" for row in self._rows))
            unfinished.replace(path)
            write_resolved_config(args, folder / "resolved_config.yaml", self.sections)
        self._is_told = False

    def on_step_begin(self, args, state, control, **kwargs):
        if self._is_told or not state.is_world_process_zero:
            return
        self._is_told = True
        # callbacks that find it out may come after this one
        if found := self.found():
            folder = Path(args.output_dir)
            with _writing(folder):
                write_resolved_config(args, folder / "resolved_config.yaml", self.sections | {"found": found})

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        values = {name: _number(value) for name, value in logs.items() if isinstance(value, numbers.Real)}
        row = {"step": state.global_step, "epoch": values.pop("epoch", state.epoch), **values}
        self._rows.append(row)
        folder = Path(args.output_dir)
        with _writing(folder), open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")

    def on_train_end(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        lock.check_held(args.output_dir)
        # A run that has trained is not lost for want of a table or a picture.
        for write, name in ((write_csv, "metrics.csv"), (plot_curves, "curves.png")):
            try:
                write(self._rows, Path(args.output_dir) / name)
            except ImportError:
                get_logger().info("no %s without matplotlib: pip install 'posttrain[plots]'", name)
            except Exception as error:
                get_logger().warning("%s could not be written: %s", name, error)


@contextlib.contextmanager
def _writing(folder: Path):
    # a folder that was renamed is not made anew
    lock.check_held(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise EnvironmentIssue(f"{folder} cannot be written to: {error.strerror or error}") from error


def write_resolved_config(args, path: Path, sections: dict | None = None) -> None:
    """Write the settings of the run: training arguments, `sections`, versions, device, git commit."""
    training = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    privacy = getattr(args, "privacy", None)
    report = {
        "training": {name: value for name, value in training.items() if value not in (None, {}, [])},
        **({} if privacy is None or privacy is args else {"privacy": vars(privacy)}),
        **(sections or {}),
        "versions": library_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(args.device),
        "processes": args.world_size,
        "git": git_commit(),
    }
    path.write_text(yaml_text.dump(_plain(report)))


def write_csv(rows: list[dict], path: Path) -> None:
    """Write all rows as a table, with a column per name in the order of its first appearance."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, names)
        table.writeheader()
        table.writerows(rows)


def plot_curves(rows: list[dict], path: Path) -> None:
    """Plot a panel per metric over the steps; `eval_...`, of any set, shares the panel of its training metric."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, dict[str, list]] = {}
    trained = {name for row in rows for name in row if not name.startswith("eval_")}
    for row in rows:
        for name, value in row.items():
            if not _NOT_PLOTTED.fullmatch(name) and value is not None and math.isfinite(value):
                metric, label = _panel_of(name, trained)
                panels.setdefault(metric, {}).setdefault(label, []).append((row["step"], value))
    order = sorted(panels, key=_rank)[:_MOST_PANELS]
    if not order:
        return
    columns = min(3, len(order))
    lines = math.ceil(len(order) / columns)
    figure = Figure(figsize=(4 * columns, 2.6 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for index, name in enumerate(order, 1):
        axes = figure.add_subplot(lines, columns, index)
        for label, points in sorted(panels[name].items(), reverse=True):
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 40 else None, label=label)
        axes.set_title(name, fontsize=10)
        axes.grid(alpha=0.3)
        if len(panels[name]) > 1:
            axes.legend(fontsize=8)
    figure.supxlabel("step", fontsize=10)
    figure.savefig(path, dpi=110)


def _panel_of(name: str, trained: set[str]) -> tuple[str, str]:
    """Return the panel and the label of a metric: those of several evaluation sets are `eval_<set>_<metric>`."""
    if not name.startswith("eval_"):
        return name, "train"
    rest = name.removeprefix("eval_")
    metric = max((known for known in trained if rest.endswith(f"_{known}")), key=len, default=None)
    if rest in trained or metric is None:
        return rest, "eval"
    return metric, f"eval {rest.removesuffix(f'_{metric}')}"


def _rank(name: str) -> int:
    """Rank a metric's panel, as only the first are plotted: the loss, rewards, a method's own metrics, others."""
    if name == "loss":
        return 0
    if name.startswith("rewards/"):
        return 1
    return 3 if name.startswith(("logits/", "logps/", "entropy", "learning_rate")) else 2


def _number(value):
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _read_rows(path: Path) -> list[dict]:
    """Return the rows of a file of metrics, without the lines that are none."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else ():
        # the last line of a run killed while it wrote, or what others wrote there
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and type(row.get("step")) is int:
                rows.append(row)
    return rows


def _plain(value):
    """Convert `value` to YAML's own types, without secrets."""
    return without_secrets(_of_yaml(value))


def _of_yaml(value):
    if isinstance(value, dict):
        return {str(name): _of_yaml(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_of_yaml(item) for item in value]
    if isinstance(value, enum.Enum):
        return _of_yaml(value.value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _of_yaml(dataclasses.asdict(value))
    if value is None or isinstance(value, bool | int | float):
        return value
    return os.fspath(value) if isinstance(value, os.PathLike) else str(value)
