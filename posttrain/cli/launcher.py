"""`accelerate launch` that leaves it to the ranks what to do at a signal: `python -m posttrain.cli.launcher ...`.

Left alone, it would die of the signal at once, or end the ranks half a minute later, while they save a checkpoint.
"""

import logging
import os
import signal
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
            if os.getpgid(rank.pid) != os.getpgrp() or os.getppid() != parent:
                rank.send_signal(number)

    for number in (*signals.ending(), signal.SIGINT):
        signal.signal(number, handle)
    # torch's launcher would take the handlers over; it has to be given one signal at least
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    signals.follow_parent(signal.SIGTERM)
    from accelerate.commands import launch
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # each rank tells what is wrong with it
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch.launch_command(launch.launch_command_parser().parse_args())
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        if not Path(os.environ.get("POSTTRAIN_EXIT_CODE_FILE", "")).is_file():
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            complain(f"rank {rank} {how}")
        return 128 - code if code < 0 else code
    return 0


if __name__ == "__main__":
    sys.exit(main())
