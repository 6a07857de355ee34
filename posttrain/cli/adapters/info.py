"""`posttrain adapters info`: ranks, singular values and norms of a LoRA adapter, as a table or a picture."""

import math
import os
import tempfile
from pathlib import Path

from posttrain.checks import check_links
from posttrain.cli.adapters.output import folder
from posttrain.console import say, say_json
from posttrain.errors import ConfigError, EnvironmentIssue, require
from posttrain.private import hide
from posttrain.visible import one_line

_ENERGIES = (0.9, 0.99)
# kinds of modules that have a line of their own in the picture
_MOST_KINDS = 8


def add_parser(actions) -> None:
    parser = actions.add_parser(
        "info",
        help="ranks, singular values and norms of what an adapter adds to each module",
        description="Tells of each module's change, scale B A: its shape, the rank as stored, the scale, the Frobenius "
        "norm, the largest and the smallest singular value, the effective rank (exp of the entropy of the singular "
        "values) and the ranks that keep 90% and 99% of the squared values.",
    )
    parser.add_argument("adapter", type=folder, metavar="ADAPTER", help="folder of the adapter")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw what a truncation to each rank leaves out")
    parser.add_argument("--force", action="store_true", help="write over FILE.png")
    parser.add_argument("--json", action="store_true", help="for scripts, with all singular values")
    parser.set_defaults(run_action=run)


def run(args) -> int:
    """Print the facts."""
    if args.plot is not None:
        _check_picture(args.plot, args.force)
    from posttrain import quiet
    from posttrain.adapters import saved_lora

    quiet.quiet_libraries()
    found = saved_lora.read(args.adapter)
    from posttrain.adapters.low_rank import spectra

    spectrums = spectra(found)
    config = found.config
    facts = {
        "adapter": str(args.adapter),
        "base_model": config.get("base_model_name_or_path"),
        "r": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        "use_rslora": bool(config.get("use_rslora")),
        "scheme": found.scheme,
        "scheme_settings": found.scheme_settings,
        "more_than_a_and_b": found.refused,
        "norm": math.hypot(*(one.norm for one in spectrums.values())),
        "modules": {path: _facts(one) for path, one in spectrums.items()},
    }
    if args.plot is not None:
        _draw(spectrums, args.plot, args.adapter.resolve().name)
    if args.json:
        say_json(facts)
        return 0
    from posttrain.tables import format_table

    base = one_line(facts["base_model"] or "a base that it does not name")
    how = ", rsLoRA" if facts["use_rslora"] else ""
    own = ", ".join(f"{name} {value}" for name, value in found.scheme_settings.items())
    trained = f", trained as {found.scheme}" + (f" ({one_line(own)})" if own else "") if found.scheme else ""
    say(hide(f"{args.adapter}: LoRA r {config.get('r')}, alpha {config.get('lora_alpha')}{how}, of {base}{trained}"))
    for reason in found.refused:
        say(f"It is more than A and B, so merge and truncate refuse it: {reason}.")
    headers = ("module", "weight", "rank", "scale", "norm", "largest", "smallest", "effective", "90%", "99%")
    rows = []
    for path, one in facts["modules"].items():
        numbers = (one[name] for name in ("scale", "norm", "largest", "smallest"))
        ranks = one["rank_for"].values()
        shape = "{} x {}".format(*one["shape"])
        rows.append((one_line(path), shape, one["rank"], *map("{:.3g}".format, numbers), f"{one['effective_rank']:.2f}",
                     *ranks))  # fmt: skip
    say("\n" + format_table(headers, rows) + "\n")
    say(f"{len(rows)} module{'' if len(rows) == 1 else 's'}; Frobenius norm of all changes: {facts['norm']:.4g}")
    if args.plot is not None:
        say(hide(f"{args.plot}: the picture"))
    return 0


def _facts(one) -> dict:
    values = one.singular_values.tolist()
    return {
        "shape": list(one.shape), "rank": one.rank, "scale": one.scale, "norm": one.norm, "largest": values[0],
        "smallest": values[-1], "effective_rank": one.effective_rank,
        "rank_for": {f"{energy:g}": one.rank_for(energy) for energy in _ENERGIES}, "singular_values": values,
    }  # fmt: skip


def _check_picture(path: Path, force: bool) -> None:
    require("matplotlib", "plots", "--plot")
    if path.suffix != ".png":
        raise ConfigError(f"--plot is {path}; its name must end in .png.")
    check_links(path, "--plot")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot is {path}, and there is no folder {path.parent}; make it, or name another.")
    if path.is_dir() or (path.exists() and not force):
        raise ConfigError(f"{path} exists already. Name another file" + ("." if path.is_dir() else ", or add --force."))


def _draw(spectrums: dict, path: Path, title: str) -> None:
    """Draw over each rank the relative error of truncating to it: a line a kind of module, its median; their range."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    kinds: dict[str, list] = {}
    for name, one in spectrums.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(one.left_out())
    shown = sorted(kinds, key=lambda kind: -len(kinds[kind]))[:_MOST_KINDS]
    if others := [tail for kind in kinds if kind not in shown for tail in kinds[kind]]:
        kinds["others"] = others
        shown.append("others")
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for kind in shown:
        width = max(map(len, kinds[kind]))
        # beyond its own rank nothing is left out of a module
        tails = [tail.tolist() + [0.0] * (width - len(tail)) for tail in kinds[kind]]
        columns = [sorted(column) for column in zip(*tails, strict=True)]
        line = axes.plot([column[len(column) // 2] for column in columns], marker=".", label=f"{kind} ({len(tails)})")
        low, high = [column[0] for column in columns], [column[-1] for column in columns]
        axes.fill_between(range(width), low, high, alpha=0.12, color=line[0].get_color(), linewidth=0)
    axes.set_xlabel("rank that is kept")
    axes.set_ylabel("relative error (Frobenius)")
    axes.set_ylim(0, 1.02)
    axes.set_title(
        f"{one_line(title)}: what a truncation leaves out, median and range of modules", fontsize=10, parse_math=False
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _write(figure, path)


def _write(figure, path: Path) -> None:
    """Write a picture, whole or not at all."""
    target = Path(os.path.realpath(path))
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as beside:
            temporary = Path(beside) / target.name
            figure.savefig(temporary, dpi=120)
            os.replace(temporary, target)
    except OSError as error:
        raise EnvironmentIssue(f"{path} cannot be written ({error.strerror or error}).") from None
