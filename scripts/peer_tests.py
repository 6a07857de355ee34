"""TRL's own tests with our trainers in the place of theirs: which pass with TRL's class, and which with ours.

    python scripts/peer_tests.py --tests trl/tests                        # test_dpo_trainer.py, test_grpo_trainer.py
    python scripts/peer_tests.py --tests trl/tests --files test_dpo_trainer.py --match precompute --json peer.json

For those who have a checkout of TRL at hand, best of the version that is installed. Nothing of it is copied, and
nothing is written there. Models are random ones of a few hundred weights, built here under the hub's names, and data
sets are made up in the same shapes, so no network is used. Vision models are not built. A test counts where it passes
with TRL's own class on this machine; what fails with it says nothing of ours, and is listed apart: tests of another
version of TRL, and those that name token ids of Qwen or sentences of the hub's data. DPO takes some 10 minutes on one
core, GRPO some 30, or 15 with --rows 6.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# by test file; SFTTrainer's tests are of rows without a score, which `ALoLTrainer` has no use for
SWAPS = {
    "test_dpo_trainer.py": {"DPOTrainer": "posttrain:RobustDPOTrainer"},
    "test_grpo_trainer.py": {"GRPOTrainer": "posttrain:PolicyGradientTrainer"},
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tests", type=Path, required=True, metavar="DIR", help="the folder tests of a checkout of TRL"
    )
    parser.add_argument("--files", nargs="+", default=list(SWAPS), metavar="FILE", help="test files there")
    parser.add_argument("--match", metavar="EXPRESSION", help="as pytest's -k")
    parser.add_argument("--rows", type=int, default=19, metavar="N", help="rows of a data set; fewer are faster")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the results go")
    parser.add_argument("--known", type=Path, metavar="FILE", help="results of TRL's own class from an earlier --json")
    args = parser.parse_args(arguments)
    problem = _problem(args)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    started = time.monotonic()
    known = json.loads(args.known.read_text())["results"] if args.known else {}
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        environment, failed = _prepare(Path(folder), args.rows)
        for name in args.files:
            results[name] = {"theirs": known[name]["theirs"]} if name in known else {}
            for side, swap in (("theirs", {}), ("ours", SWAPS[name])):
                if side in results[name]:
                    continue
                print(f"{name}, {'our' if swap else 'their'} class ...", file=sys.stderr, flush=True)
                results[name][side] = _run(Path(folder), args.tests.resolve(), name, args.match, environment, swap)
            if args.match and name in known:
                ran = results[name]["ours"]
                results[name]["theirs"] = {test: found for test, found in known[name]["theirs"].items() if test in ran}
    seconds = round(time.monotonic() - started)
    print(report(results, failed))
    print(f"\n{seconds // 60} minutes {seconds % 60} seconds.")
    if args.json:
        args.json.write_text(json.dumps({"results": results, "models_not_built": failed}, indent=1) + "\n")
    return 0


def compare(theirs: dict, ours: dict) -> dict:
    """Names of tests by what happened: `both` pass, `differ` (TRL's alone passes), `apart` (TRL's fails), `skipped`."""
    groups = {"both": [], "differ": [], "apart": [], "skipped": []}
    for test, result in theirs.items():
        mine = ours.get(test, {"outcome": "failed"})["outcome"]
        if result["outcome"] == "skipped":
            groups["skipped"].append(test)
        elif result["outcome"] == "failed":
            groups["apart"].append(test)
        else:
            groups["both" if mine == "passed" else "differ"].append(test)
    return groups


def report(results: dict, failed: dict[str, str]) -> str:
    """The table, the tests that differ with their reasons, and what says nothing here."""
    lines = ["| file | pass with TRL's class | with ours | refused by ours | otherwise |", "|---|---|---|---|---|"]
    details = []
    for name, sides in results.items():
        groups = compare(sides["theirs"], sides["ours"])
        both, differ = len(groups["both"]), groups["differ"]
        reasons = {test: _reason(sides["ours"].get(test)) for test in differ}
        refused = sum(reason.startswith("posttrain.errors.ConfigError") for reason in reasons.values())
        lines.append(f"| {name} | {both + len(differ)} | {both} | {refused} | {len(differ) - refused} |")
        details += ["", f"{name}: {len(differ)} pass with TRL's class alone"]
        details += [f"- {test}: {reason}" for test, reason in reasons.items()]
        details += ["", f"{name}: {len(groups['apart'])} fail with TRL's own class here, and say nothing of ours"]
        details += [f"- {test}: {_reason(sides['theirs'][test])}" for test in groups["apart"]]
        skipped = Counter(_reason(sides["theirs"][test]) for test in groups["skipped"])
        details += ["", f"{name}: {len(groups['skipped'])} skipped"]
        details += [f"- {number} x {reason}" for reason, number in skipped.most_common()]
    if failed:
        details += ["", "Models that could not be built"]
        details += [f"- {name}: {why}" for name, why in failed.items()]
    return "\n".join([*lines, *details])


def _problem(args) -> str | None:
    if not args.tests.is_dir():
        return f"--tests is {args.tests}, which is no folder; give the folder `tests` of a checkout of TRL."
    for name in args.files:
        if name not in SWAPS:
            return f"--files names {name}; those with a trainer of ours are {', '.join(SWAPS)}."
        if not (args.tests / name).is_file():
            return f"{args.tests} has no {name}; give the folder `tests` of a checkout of TRL."
    if args.known and not args.known.is_file():
        return f"--known is {args.known}, which is no file; give what an earlier --json wrote."
    if args.json and not args.json.absolute().parent.is_dir():
        return f"--json is {args.json}, whose folder is not there; make it first."
    return None


def _prepare(folder: Path, number: int) -> tuple[dict[str, str], dict[str, str]]:
    """The environment of a run: a cache with the models, folders of data, nothing of the hub; and what is missing."""
    sys.path.insert(0, str(ROOT))
    import datasets
    import transformers
    from peer import models, rows

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    data = rows.write_data(folder / "data", number)
    failed = models.write_hub(folder / "hub", rows.texts())
    path = os.pathsep.join([str(ROOT), str(ROOT / "scripts"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {
        "PYTHONPATH": path,
        "PYTHONDONTWRITEBYTECODE": "1",
        "PEER_DATA": json.dumps(data),
        "HF_HUB_CACHE": str(folder / "hub"),
        "HF_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "POSTTRAIN_CACHE": str(folder / "cache"),
        "POSTTRAIN_LOG": "error",
    }, failed


def _run(folder: Path, tests: Path, name: str, match: str | None, environment: dict, swap: dict) -> dict:
    """One file with one side's classes: outcome, seconds and reason by test."""
    # a link, so that the checkout's own package trl is not on the path
    link = folder / "checkout" / tests.name
    if not link.exists():
        link.parent.mkdir()
        link.symlink_to(tests)
    results = folder / "results.jsonl"
    results.write_text("")
    command = [
        sys.executable, "-m", "pytest", str(link / name), "-p", "peer.plugin", "-p", "no:cacheprovider", "-q", "-m",
        "not slow", "--rootdir", str(link.parent), "-c", os.devnull, "--basetemp", str(folder / "runs"),
        *(("-k", match) if match else ()),
    ]  # fmt: skip
    given = environment | {"PEER_SWAP": json.dumps(swap), "PEER_RESULTS": str(results)}
    done = subprocess.run(command, cwd=link.parent, env=given, capture_output=True, text=True)
    found = [json.loads(line) for line in results.read_text().splitlines()]
    if not found and done.returncode != 5:
        raise SystemExit(f"error: pytest could not run {name}:\n{(done.stdout + done.stderr)[-2000:]}")
    return {result.pop("test"): result for result in found}


def _reason(result: dict | None) -> str:
    return "did not run" if result is None else result.get("reason", result["outcome"])


if __name__ == "__main__":
    sys.exit(main())
