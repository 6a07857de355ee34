"""The card of an adapter that several clients trained: method, rounds, what each of them spent, how to load it."""

import platform
from pathlib import Path

from posttrain.config.setting import told_in_card
from posttrain.environment import library_versions
from posttrain.federated.config import FederatedConfig
from posttrain.hub.base_model import base_license, base_name
from posttrain.hub.metadata import render_card
from posttrain.hub.passages import introduction, loading_section
from posttrain.models import SMOLLM2, TINY
from posttrain.private import hide_forms
from posttrain.tables import format_table
from posttrain.visible import one_line, visible

# by method, what it is called and its paper
PAPERS = {
    "fedsvd": ("FedSVD", "2505.12805"),
    "ffa_lora": ("FFA-LoRA", "2403.12313"),
    "ffa_refactored_once": ("FFA-LoRA, refactored once", "2505.12805"),
    "fedavg_lora": ("federated averaging of a LoRA", "1602.05629"),
    "flora": ("FLoRA", "2409.05976"),
    "fedex_lora": ("FedEx-LoRA", "2410.09432"),
}


def write(folder: Path, source: str, args, config: FederatedConfig, reports: list[dict]) -> None:
    """Write `README.md` into the folder of a saved adapter, in the place of PEFT's.

    Args:
        source: the name or path that the base was loaded from. args: of the clients' trainer.
        reports: of the rounds.
    """
    from huggingface_hub import ModelCardData

    base = args.base_model_id or base_name(source)
    hub_base = None if base in (SMOLLM2, TINY) else base
    name, paper = PAPERS[config.method]
    settings = told_in_card(config) | {
        "learning_rate": args.learning_rate,
        "optim": getattr(args.optim, "value", args.optim),
        "steps of a turn": args.max_steps if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs",
        "seed": args.seed,
    }
    sections = [
        f"# {one_line(Path(args.output_dir).resolve().name)}",
        introduction("LoRA adapter", f"{name}, federated", base, True),
        loading_section(base, None, True),
        f"## Method\n\n{name} ([arXiv {paper}](https://arxiv.org/abs/{paper})), "
        f"{len(reports)} rounds in one process. Rows did not leave their client; what it sent did.",
        *([_privacy(args, reports)] if args.privacy is not None else []),
        "## Last round\n\n" + _clients(reports[-1]),
        "## Settings\n\n" + format_table(("setting", "value"), [(key, str(value)) for key, value in settings.items()]),
        "## Versions\n\n"
        + format_table(("library", "version"), [("python", platform.python_version()), *library_versions().items()]),
    ]
    metadata = ModelCardData(
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["posttrain", "federated", config.method, "lora"],
        base_model=hub_base,
        **base_license(source),
    )
    text = render_card(metadata, visible(hide_forms("\n\n".join(sections))) + "\n")
    (folder / "README.md").write_text(text, encoding="utf-8")


def spent_by(reports: list[dict]) -> dict[str, tuple[float, float]]:
    """Return the last epsilon and delta that each private client told of, by its id."""
    found = {}
    for report in reports:
        for client, told in report["clients"].items():
            if told["epsilon"] is not None:
                found[client] = told["epsilon"], told["delta"]
    return dict(sorted(found.items()))


def _privacy(args, reports: list[dict]) -> str:
    """Write what each client promises to its own rows, and what no promise covers."""
    privacy, spent = args.privacy, spent_by(reports)
    if not privacy.is_private:
        return "## Privacy\n\nClients trained without noise: **nothing is promised** about their rows."
    unit = "row" if privacy.privacy_unit_column is None else f"value of {one_line(privacy.privacy_unit_column)}"
    lines = [(client, f"{epsilon:.4g}", f"{delta:g}") for client, (epsilon, delta) in spent.items()]
    # a row is at one client alone
    several = f" A {unit} that several clients have spends at each of them." if privacy.privacy_unit_column else ""
    return (
        f"## Privacy\n\nEach client trained with differential privacy (DP-SGD). What it sent over all rounds is "
        f"(epsilon, delta)-differentially private for each {unit} of its own, against whoever sees it:\n\n"
        + format_table(("client", "epsilon", "delta"), lines)
        + "\n\nEpsilon is what a client told with its last answer; turns whose answer was lost are in its own ledger. "
        f"The number of a client's rows counts as known.{several} Not covered: settings that were chosen by earlier "
        "runs on the same rows, and the rounding of floating-point noise."
    )


def _clients(report: dict) -> str:
    def shown(value) -> str:
        return "" if value is None else f"{value:.4g}"

    names = ("rows", "loss", "update_norm")
    lines = [(client, *(shown(told[name]) for name in names)) for client, told in report["clients"].items()]
    found = format_table(("client", *names), lines)
    if report["evaluation"]:
        measured = [(name, shown(value)) for name, value in report["evaluation"].items()]
        found += "\n\nOn rows that are no client's:\n\n" + format_table(("metric", "value"), measured)
    return found
