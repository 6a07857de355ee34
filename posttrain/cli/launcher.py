"""`accelerate launch` that leaves it to the ranks what to do at a signal: `python -m posttrain.cli.launcher ...`.

Left alone, it would die of the signal at once, or end the ranks half a minute later, while they save a checkpoint.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

from posttrain import signals
from posttrain.console import complain


def main() -> int:
    import psutil

    parent = os.getppid()

    def handle(number: int, frame) -> None:
        ranks = psutil.Process().children()
        if not ranks:
            raise signals.Terminated(number)
        for rank in ranks:
            # torch starts each in a group of its own; nobody signals ours once the parent was killed
            with contextlib.suppress(ProcessLookupError, psutil.Error):
                if os.getpgid(rank.pid) != os.getpgrp() or os.getppid() != parent:
                    rank.send_signal(number)

    with signals.handled(handle, (*signals.ending(), signal.SIGINT)):
        return _launch()


def _launch() -> int:
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
        return _told(f"rank {rank}", failure.exitcode)
    except subprocess.CalledProcessError as error:
        # the code says it: the recipe has told why, or Python with a traceback
        return _told("the run", error.returncode) if error.returncode < 0 else error.returncode
    return 0


def _told(who: str, code: int) -> int:
    if not Path(os.environ.get("POSTTRAIN_EXIT_CODE_FILE", "")).is_file():
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        complain(f"{who} {how}")
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main())
