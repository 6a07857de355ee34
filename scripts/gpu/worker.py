"""The process of one case: imports what it stands on, waits for its turn, runs it, leaves its record."""

import gc
import importlib
import os
import pkgutil
import sys
import traceback
from pathlib import Path

from gpu.record import Case, Record, Skipped

# of an error, the lines that are kept
_LINES = 12


def cases(package: str = "gpu.checks") -> list[Case]:
    """Return the cases of a package, in their order. No library is imported."""
    folder = importlib.import_module(package)
    names = [found.name for found in pkgutil.iter_modules(folder.__path__, f"{package}.")]
    return sorted((importlib.import_module(name).CASE for name in names), key=lambda case: case.number)


def main(package: str, name: str, toy: bool, path: Path) -> None:
    """Run a case once standard input says how many seconds it has; always ends the process."""
    case = next(case for case in cases(package) if case.name == name)
    for module in case.imports:
        importlib.import_module(module)
    # what is imported need not be gone over in each collection
    gc.collect()
    gc.freeze()
    seconds = sys.stdin.readline()
    if not seconds:
        os._exit(1)
    record = Record(path, toy, float(seconds), _machine())
    try:
        case.run(record)
        met = all(check["met"] for check in record.content["checks"])
        record.end("passed" if met else "failed")
    except Skipped as reason:
        record.leave_out("the case", reason)
        record.end("skipped")
    except Exception as error:
        traceback.print_exc()
        lines = traceback.format_exception(error)
        record.end("error", "".join(lines)[-2000:] if len(lines) < _LINES else "".join(lines[-_LINES:])[-2000:])
    sys.stdout.flush()
    sys.stderr.flush()
    # threads of libraries and contexts of the card would take seconds to end in good order
    os._exit(0)


def _machine() -> dict:
    if "torch" not in sys.modules:
        return {}
    import harness

    return harness.machine()
