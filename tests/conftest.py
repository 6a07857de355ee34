import functools
import gc
import importlib.metadata
import inspect
import json
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("POSTTRAIN_LOG", "warning")
# tiny tensors: a second thread only waits
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests import sparing
from tests.made_up import WORDS, make_pairs  # noqa: F401

# accelerate reads a package's whole metadata each time it asks whether a model is PEFT's: a fifth of a tiny run
importlib.metadata.metadata = functools.cache(importlib.metadata.metadata)


def pytest_configure(config):
    """Hear the signals that a shell has a suite in the background ignore: tests send them, and to what they start."""
    for name, default in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, default)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """`@pytest.mark.core("a", "b")`: of a test's cases those whose ids begin so are core tests, others slow ones."""
    named, met = {}, set()
    for item in items:
        if marker := item.get_closest_marker("core"):
            found = {start for start in marker.args if item.callspec.id.startswith(start)}
            named.setdefault((item.path, item.function), set(marker.args))
            met |= {(item.path, item.function, start) for start in found}
            if not found:
                item.add_marker(pytest.mark.slow)
    if any("::" in argument for argument in config.args):
        return
    for (path, function), starts in named.items():
        if missing := [start for start in starts if (path, function, start) not in met]:
            raise pytest.UsageError(f"{path}, {function.__name__}: no case begins with {', '.join(missing)}")


def pytest_collection_finish(session):
    """Each run ends in a full collection, which need not go over all that was imported again and again."""
    gc.collect()
    gc.freeze()
    sparing.spare(pytest.MonkeyPatch())


# they share one warm process, and the process in which pytest runs them
WARM = ("tests/distributed/", "tests/interruption/")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return "warm" if nodeid.startswith(WARM) else super()._split_scope(nodeid)

    return Scheduling(config, log)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """What a module leaves need not be gone over in each of the next ones' collections either."""
    if nextitem and nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    """Where POSTTRAIN_TEST_CPU names a file: the processor seconds of each test, for `tests.budget`."""
    table = os.environ.get("POSTTRAIN_TEST_CPU")
    before = cpu_seconds() if table else 0.0
    yield_value = yield
    if table:
        with open(table, "a") as file:
            file.write(json.dumps([item.nodeid, round(cpu_seconds() - before, 3)]) + "\n")
    return yield_value


def cpu_seconds() -> float:
    """Of this process, of its children that have ended, and of the warm process with its own."""
    warm = sys.modules.get("tests.warm")
    return sum(os.times()[:4]) + (sum(server.cpu_seconds() for server in warm.SERVERS) if warm else 0.0)


TESTS = Path(__file__).parent


@pytest.fixture(scope="session")
def tokenizer():
    from posttrain.models import byte_tokenizer

    return byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory, tokenizer):
    """A tiny llama saved as a user's local model folder."""
    from posttrain.models import tiny_model

    folder = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def warm():
    """Starts runs that are processes of their own, without an import each."""
    from tests.warm import Server

    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))


@functools.cache
def _commit_of(folder: str) -> str | None:
    from posttrain.environment import git_commit

    return git_commit()


def _quicken_reports(patch):
    """Curves take longer to draw than a tiny run does. The commit of a folder is looked up once."""
    # not imported for this alone, which takes seconds
    if reporting := sys.modules.get("posttrain.run.report"):
        patch.setattr(reporting, "git_commit", lambda: _commit_of(os.getcwd()))
        plot = inspect.unwrap(reporting.plot_curves)
        patch.setattr(reporting, "plot_curves", functools.wraps(plot)(lambda *args: None))


@pytest.fixture(scope="session", autouse=True)
def quick_fixtures():
    """Reports of the runs of fixtures that are set up before those of a test."""
    with pytest.MonkeyPatch.context() as patch:
        _quicken_reports(patch)
        yield


@pytest.fixture(autouse=True)
def quick_reports(request, monkeypatch):
    """Tests that want curves ask for `curves`."""
    if "curves" not in request.fixturenames:
        _quicken_reports(monkeypatch)


# tests of runs, whose rows are mostly the same
RUNS = ("adapters", "contract", "recipe", "run", "trainers")


@pytest.fixture(autouse=True)
def checked_once(request, monkeypatch):
    """Rows are checked once for all tests of runs."""
    if request.path.relative_to(TESTS).parts[0] in RUNS:
        sparing.check_rows_once(monkeypatch)


@pytest.fixture
def curves(monkeypatch):
    """Runs in this process end with their picture."""
    from posttrain.run import report

    monkeypatch.setattr(report, "plot_curves", inspect.unwrap(report.plot_curves))


@pytest.fixture
def fingerprints(monkeypatch):
    """Data sets have the hash of what they hold and of how they were made."""
    for (module, name), hashed in sparing.HASHED.items():
        monkeypatch.setattr(module, name, hashed)


@pytest.fixture
def logged(caplog, monkeypatch):
    """What the library's own logger says, as `caplog` has it."""
    from posttrain.log import get_logger

    monkeypatch.setattr(get_logger(), "propagate", True)
    return caplog
