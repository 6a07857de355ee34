"""The table of a result, and what was not met."""

from collections.abc import Sequence

from gpu.record import Case

NOT_RUN = "not run"


def state_of(result: dict, case: Case) -> str:
    return result["cases"].get(case.name, {}).get("state", NOT_RUN)


def table(result: dict, cases: Sequence[Case]) -> str:
    """Return a table of the cases, and below it each check that was not met and each error."""
    from posttrain.tables import format_table

    lines, below = [], []
    for case in cases:
        record = result["cases"].get(case.name, {})
        checks = record.get("checks", [])
        met = f"{sum(check['met'] for check in checks)} of {len(checks)}"
        left_out = len(record.get("left_out", {}))
        lines.append([f"{case.number} {case.name}", state_of(result, case), record.get("seconds", ""), met, left_out])
        below += [
            f"NOT MET {case.name}: {check['what']}: {check['measured']} (wanted {check['wanted']})"
            for check in checks
            if not check["met"]
        ]
        if record.get("error"):
            below.append(f"{record['state'].upper()} {case.name}: {record['error'].strip()}")
        below += [f"left out {case.name}: {what}: {why}" for what, why in record.get("left_out", {}).items()]
    return "\n".join([format_table(("case", "state", "s", "met", "left out"), lines), *below])
