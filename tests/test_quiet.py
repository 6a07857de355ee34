import logging
import warnings

import pytest

import posttrain.quiet  # noqa: F401


@pytest.mark.parametrize(
    ("logger", "noise"),
    [
        ("DeepSpeed", "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it."),
        ("bitsandbytes.backends.cpu.ops", "Failed to load CPU gemm_4bit_forward from kernels-community: no kernels"),
    ],
)
def test_one_line_goes_and_the_others_of_its_logger_stay(logger, noise):
    # the library, and a verb of the command line, may have filters of their own by now
    ours = [entry for entry in logging.getLogger(logger).filters if "posttrain.quiet._filter" in _name(entry)]
    assert ours

    def passes(text):
        record = logging.makeLogRecord({"msg": text, "levelno": logging.WARNING})
        return all(entry(record) for entry in ours)

    assert not passes(noise)
    assert passes("the gradients overflowed")


def _name(entry) -> str:
    return f"{getattr(entry, '__module__', '')}.{getattr(entry, '__qualname__', '')}"


def test_warnings_about_a_run_still_come_through():
    import importlib

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        importlib.reload(posttrain.quiet)
        warnings.warn("`is_gradient_checkpointing` is deprecated and will be removed", FutureWarning, stacklevel=1)
        warnings.warn("something else will be removed", FutureWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["something else will be removed"]
