"""What a trainer would refuse of a launch that is not this process's, for plans."""

import copy
import logging

from posttrain.errors import ConfigError
from posttrain.log import get_logger


def refusal(kind: str, args, adapter, policy_is_reference: bool) -> str | None:
    """Return why a trainer with these settings refuses a launch of a kind; None where it takes it.

    Args:
        kind: of `posttrain.planning.job.KINDS`.
        args: the trainer's config, resolved. adapter: the config of a new adapter, or None.
        policy_is_reference: whether the reference is the policy itself with its adapter off.
    """
    from posttrain.run import adapter_schemes, devices, engines, optimizers
    from posttrain.run import refactoring as in_runs

    again = copy.copy(args)
    # what TRL fills in is there
    again._resolved_upstream = True
    log, level = get_logger(), get_logger().level
    # what it says of these settings was said
    log.setLevel(logging.ERROR)
    try:
        with engines.supposed(kind):
            again.__post_init__()
            optimizers.check(again)
            adapter_schemes.check(adapter, again)
            in_runs.check_settings(again)
            devices.check_placed_in_time(again, policy_is_reference)
    except ConfigError as error:
        return str(error)
    finally:
        log.setLevel(level)
    return None
