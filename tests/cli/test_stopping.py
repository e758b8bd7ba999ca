"""Signals that come twice for one, and those that come where nobody hears of what their handler raises."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from tests.cli.command import environment

from ringpool.cli import stopping
from ringpool.cli.stopping import Stopped, Stopper

WATCHDOG_S = 30.0


@pytest.fixture
def stopper() -> Iterator[Stopper]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored, and would stay so
    made = Stopper()
    made.install()
    yield made
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


class EndsLater:
    """Has a signal come while it is finalized, which lasts until it was heard where ``hangs``."""

    def __init__(self, stopper: Stopper, *, hangs: bool) -> None:
        self._stopper = stopper
        self._hangs = hangs

    def __del__(self) -> None:
        end_s = time.monotonic() + WATCHDOG_S
        try:
            signal.raise_signal(signal.SIGTERM)
            while self._hangs and time.monotonic() < end_s:
                time.sleep(0.001)
        except Stopped:
            self._stopper.number = -1  # it was raised in here


def finalize_one(stopper: Stopper, *, hangs: bool) -> None:
    one = EndsLater(stopper, hangs=hangs)
    del one
    end_s = time.monotonic() + WATCHDOG_S
    while not stopper.number and time.monotonic() < end_s:
        time.sleep(0.001)


def test_a_signal_that_comes_in_a_finalizer_is_raised_after_it(stopper: Stopper) -> None:
    with pytest.raises(Stopped):
        finalize_one(stopper, hangs=False)
    assert stopper.number == signal.SIGTERM


def test_a_finalizer_that_hangs_keeps_no_signal_out(stopper: Stopper) -> None:
    finalize_one(stopper, hangs=True)
    assert stopper.number == -1


@pytest.mark.parametrize("number", stopping.HANDLED)
def test_a_signal_that_comes_again_at_once_is_the_same_request(
    stopper: Stopper, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr(stopping, "SAME_S", dict.fromkeys(stopping.HANDLED, 1e9))
    with pytest.raises(Stopped):
        signal.raise_signal(number)
    signal.raise_signal(number)  # the default action would end this process
    assert stopper.number == number


def test_a_second_request_ends_a_command_without_a_job_where_it_stands() -> None:
    program = (
        "import signal; from ringpool.cli import stopping; stopping.SAME_S = dict.fromkeys(stopping.HANDLED, 0)\n"
        "stopping.stopper.install()\n"
        "try: signal.raise_signal(signal.SIGINT)\n"
        "except stopping.Stopped: signal.raise_signal(signal.SIGTERM)\n"
    )
    heeds = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also where the tests do not
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment(), timeout=WATCHDOG_S, preexec_fn=heeds)
    assert done.returncode == -signal.SIGTERM
