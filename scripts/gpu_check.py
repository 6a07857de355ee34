"""Checks on a GPU what was proved on CPUs only, in under nine minutes on one card.

    python scripts/gpu_check.py --json gpu_check.json

Each case has a process of its own and a deadline, so that one that hangs or crashes ends alone. The JSON grows by case:
the same command again runs the cases that have no result or failed. Nothing is downloaded, and DeepSpeed, bitsandbytes,
flash attention and model files are not needed: what is missing is left out, and said. Exit code 1 where a case failed
or has no result. What each case proves, and how to report the JSON: docs/gpu.md.

With `--toy` all cases run at toy sizes on the CPU.
"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import harness  # noqa: F401  puts the checkout on the path
from gpu import running, showing, worker


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    options.add_argument("--json", type=Path, metavar="FILE", default=Path("gpu_check.json"), help="the results")
    options.add_argument("--case", nargs="+", metavar="NAME", help="run these cases, also where they have passed")
    options.add_argument("--list", action="store_true", help="say which cases there are, and end")
    options.add_argument("--toy", action="store_true", help="toy sizes on the CPU")
    options.add_argument("--minutes", type=float, default=8.8, help="none runs longer than this")
    options.add_argument("--cases", default="gpu.checks", help=argparse.SUPPRESS)
    options.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parser()
    args = options.parse_args(arguments)
    if args.worker:
        worker.main(args.cases, args.worker[0], args.toy, Path(args.worker[1]))
    cases = worker.cases(args.cases)
    if args.list:
        print("\n".join(f"{case.number:2d} {case.name:10} {case.proves}" for case in cases))
        return 0
    names = [case.name for case in cases]
    if unknown := sorted(set(args.case or ()) - set(names)):
        options.error(f"there is no case {', '.join(unknown)}; there are {', '.join(names)}")
    if not args.minutes > 0:
        options.error(f"--minutes is {args.minutes:g}; it must be above 0")
    if not args.toy and not _has_card():
        options.error("no CUDA device is visible; --toy runs all cases at toy sizes on the CPU")

    from posttrain.environment import git_commit

    path = args.json.resolve()
    # whose commit it is
    os.chdir(Path(__file__).resolve().parents[1])
    result = running.read(path, args.toy, git_commit())
    wanted = args.case or [case.name for case in cases if showing.state_of(result, case) not in running.DONE]
    running.run([case for case in cases if case.name in wanted], args.cases, result, path, args.minutes)
    shown = [case for case in cases if case.name in (args.case or names)]
    print(showing.table(result, shown))
    print(f"written: {path}")
    return int(any(showing.state_of(result, case) not in running.DONE for case in shown))


def _has_card() -> bool:
    # asked in a way that makes no context on it
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
