"""`accelerate launch` that leaves it to the ranks what to do at a signal: `python -m posttrain.cli.launcher ...`.

Left alone, it would die of the signal at once, or end the ranks half a minute later, while they save a checkpoint.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys

from posttrain import exit_codes, outputs, signals
from posttrain.console import complain


def main() -> int:
    import psutil

    outputs.keep_going()
    parent, got = os.getppid(), []

    def handle(number: int, frame) -> None:
        got.append(number)
        ranks = psutil.Process().children()
        if not ranks:
            raise signals.Terminated(number)
        for rank in ranks:
            # torch starts each in a group of its own; nobody signals ours once the parent was killed
            with contextlib.suppress(ProcessLookupError, psutil.Error):
                if os.getpgid(rank.pid) != os.getpgrp() or os.getppid() != parent:
                    rank.send_signal(number)

    with signals.handled(handle, (*signals.ending(), signal.SIGINT)):
        who, code = _launch()
    return _told(who, code, was_signalled=bool(got)) if code else 0


def _launch() -> tuple[str, int]:
    """Return which rank failed first and its exit code, negative for a signal; code 0 where none did."""
    # torch's launcher would take the handlers over; it has to be given one signal at least
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    signals.follow_parent(signal.SIGTERM)
    from accelerate.commands import launch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # each rank tells what is wrong with it
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    args = launch.launch_command_parser().parse_args()
    # with it, the exit code of a single process would be lost
    args.quiet = False
    try:
        launch.launch_command(args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        return f"rank {rank}", failure.exitcode
    except subprocess.CalledProcessError as error:
        return "the run", error.returncode
    return "", 0


def _told(who: str, code: int, was_signalled: bool) -> int:
    """Return the exit code to end with; say whose it is where no rank has told why it failed."""
    ends = 128 - code if code < 0 else code
    kept = exit_codes.kept()
    # a signal that did not come from outside is how torch ended the ranks that had not failed
    if kept is None or kept > 128 and kept != ends and not was_signalled:
        # a single process that failed has told why, or Python has, and so has a rank with a code of ours
        if code < 0 or who != "the run" and code not in exit_codes.OWN:
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            complain(f"{who} {how}")
        exit_codes.keep(ends, anew=False)
    elif kept == 1 and who != "the run":
        complain(f"{who} ended with exit code 1")
    return ends


if __name__ == "__main__":
    sys.exit(main())
