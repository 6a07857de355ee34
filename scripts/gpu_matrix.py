"""Holds the GPU column of the README's matrix against the results in docs/evidence/gpu, which alone fill it.

    python scripts/gpu_matrix.py            # says which cells are not what the results say; exit code 1 if any
    python scripts/gpu_matrix.py --write    # writes them

A result is the JSON that `scripts/gpu_check.py` wrote on a card. A cell names, by card, which of its row's words were
proved, which failed and which no case ran. Without a result each cell is "not run".
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "evidence" / "gpu"
_HEADING, _COLUMN, NOT_RUN = "## What was tested where", "GPU", "not run"


def of_case(name: str) -> Callable[[dict], bool | None]:
    """Proved by a whole case."""

    def proved(cases: dict) -> bool | None:
        state = cases.get(name, {}).get("state")
        return None if state in (None, "skipped") else state == "passed"

    return proved


def of_checks(name: str, part: str) -> Callable[[dict], bool | None]:
    """Proved by the checks of a case in whose text a part stands; a case that was cut short proves nothing."""

    def proved(cases: dict) -> bool | None:
        case = cases.get(name, {})
        met = [check["met"] for check in case.get("checks", []) if part in f"{check['what']}, "]
        if not met:
            return None
        return all(met) and case["state"] in ("passed", "failed")

    return proved


def of_nothing(cases: dict) -> bool | None:
    """No case has it."""
    return None


# words of the matrix's rows, and what proves them
WORDS = {
    "one process": of_case("trainers"),
    "4-bit": of_checks("trainers", ", 4-bit"),
    "DDP": of_checks("ranks", "ddp, 2 ranks"),
    "ZeRO-2": of_nothing,
    "ZeRO-3": of_nothing,
    "FSDP2": of_checks("ranks", "fsdp2, 2 ranks"),
    "NCCL": of_checks("ranks", "ddp, 2 ranks"),
    "several nodes": of_nothing,
    "fp32": of_checks("start", ", fp32, "),
    "bf16": of_case("trainers"),
    "fp16": of_nothing,
}


def results(folder: Path = RESULTS) -> list[dict]:
    """Return the results in a folder, by the names of their files.

    Raises:
        SystemExit: one is of toy sizes, of no commit as it stands, or no result.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text())
            toy, commit, cases = result["toy"], result["commit"], result["cases"]
            card = result["machine"]["hardware"]["accelerator"]
        except (ValueError, KeyError, TypeError):
            raise SystemExit(f"{path} is no result of gpu_check on a card") from None
        if toy or not commit or commit.endswith("-dirty"):
            raise SystemExit(f"{path} is of {'toy sizes' if toy else f'the commit {commit}'}, which proves nothing")
        found.append({"card": card, "commit": commit, "cases": cases})
    return found


def cell(row: str, found: list[dict]) -> str:
    """Return what results say of a row of the matrix, by the words in its first column.

    Raises:
        SystemExit: the row has no word that is known here.
    """
    words = [word for word in WORDS if word in row]
    if not words:
        raise SystemExit(f"no word of the row {row!r} is known to {Path(__file__).name}: add what proves it")
    parts, run = [], set()
    for result in found:
        told = {word: WORDS[word](result["cases"]) for word in words}
        for state, how in ((True, "yes"), (False, "failed")):
            named = [word for word, is_met in told.items() if is_met is state]
            if named:
                parts.append(f"{result['card']} at {result['commit'][:7]}: {how}: {', '.join(named)}")
        run |= {word for word, is_met in told.items() if is_met is not None}
    left = [word for word in words if word not in run]
    if left:
        parts.append(f"{NOT_RUN}: {', '.join(left)}" if run else NOT_RUN)
    return "; ".join(parts)


def matrix(text: str) -> dict[int, tuple[str, str]]:
    """Return by the number of its line the first and the last column of each row of the README's matrix.

    Raises:
        SystemExit: there is no such table, or its last column is another.
    """
    lines = text.splitlines()
    if _HEADING not in lines:
        raise SystemExit(f"there is no heading {_HEADING!r}")
    start = lines.index(_HEADING) + 1
    columns = [_columns(line) for line in lines[start:]]
    rows = columns[: next((at for at, row in enumerate(columns) if not row), len(columns))]
    if len(rows) < 3 or rows[0][-1] != _COLUMN:
        raise SystemExit(f"below {_HEADING!r} stands no table whose last column is {_COLUMN!r}")
    return {start + at: (row[0], row[-1]) for at, row in enumerate(rows) if at > 1}


def _columns(line: str) -> list[str]:
    return [part.strip() for part in line.strip().strip("|").split("|")] if line.startswith("|") else []


def differing(text: str, found: list[dict]) -> dict[int, tuple[str, str, str]]:
    """Return of each cell that is not what results say: the row, the cell, what they say."""
    rows = {line: (row, now, cell(row, found)) for line, (row, now) in matrix(text).items()}
    return {line: entry for line, entry in rows.items() if entry[1] != entry[2]}


def written(text: str, found: list[dict]) -> str:
    """Return the text with the cells that results say."""
    lines = text.splitlines()
    for line, (_, _, wanted) in differing(text, found).items():
        lines[line] = lines[line].rstrip().removesuffix("|").rpartition("|")[0] + f"| {wanted} |"
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--write", action="store_true", help="write the cells")
    args, readme = options.parse_args(arguments), ROOT / "README.md"
    text, found = readme.read_text(), results()
    wrong = differing(text, found)
    if args.write:
        readme.write_text(written(text, found))
        print(f"{len(wrong)} cells written")
        return 0
    for row, now, wanted in wrong.values():
        print(f"{row}: is {now!r}, and the results say {wanted!r}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
