"""Figures computed in a thread: the same ones, whatever was guessed, and no thread is left or forked."""

import os
import threading
import warnings

import pytest

from posttrain.privacy.ahead import Ahead


class Squares:
    """Gives squares, remembers them, and notes in which thread each was computed; it waits for `gate`."""

    def __init__(self):
        self.known, self.threads, self.gate = {}, [], threading.Event()
        self.gate.set()

    def __call__(self, key):
        if key not in self.known:
            self.threads.append(threading.current_thread().name)
            self.gate.wait()
            self.known[key] = key * key
        return self.known[key]


OWN = "posttrain-ahead"


def running():
    return [thread for thread in threading.enumerate() if thread.name == OWN]


def test_what_was_guessed_is_computed_in_a_thread_and_once():
    squares = Squares()
    ahead = Ahead(squares)
    squares.gate.clear()
    ahead.begin(3)
    ahead.begin(3)
    squares.gate.set()
    assert ahead.get(3) == 9 and squares.threads == [OWN] and not running()
    ahead.begin(3)
    assert ahead.get(3) == 9 and squares.threads == [OWN]


def test_what_was_not_guessed_is_computed_where_it_is_asked_for_and_waits_for_nothing():
    squares = Squares()
    ahead = Ahead(squares)
    squares.known[4] = 16
    squares.gate.clear()
    ahead.begin(3)
    # were the thread waited for, this would not return
    assert ahead.get(4) == 16 and running()
    squares.gate.set()
    ahead.begin(5)
    assert ahead.get(5) == 25 and ahead.get(3) == 9 and set(squares.threads) == {OWN}
    assert ahead.get(6) == 36 and squares.threads[-1] == threading.current_thread().name
    assert not running()


def test_what_the_computation_raises_is_raised_where_it_is_asked_for():
    def fails(key):
        raise ZeroDivisionError(key)

    ahead = Ahead(fails)
    ahead.begin(1)
    ahead.wait()
    ahead.begin(2)
    with pytest.raises(ZeroDivisionError):
        ahead.get(2)
    assert not running()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_process_is_forked_while_nothing_is_computed():
    squares = Squares()
    ahead = Ahead(squares)
    squares.gate.clear()
    # what is registered last comes first: the computation may end once the fork has begun
    os.register_at_fork(before=squares.gate.set)
    ahead.begin(3)
    with warnings.catch_warnings():
        # of threads that torch has
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        os._exit(squares.known.get(3, 0))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not running()
