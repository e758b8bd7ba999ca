"""What becomes of a result that is being decoded when a signal comes."""

from __future__ import annotations

from typing import Any

import pytest

from ringpool.coordinator import futures, signals
from ringpool.coordinator.tickets import Ticket
from ringpool.errors import ResultTransportError
from ringpool.shm.dispatch import Task
from ringpool.shm.layout import Encoding, Status
from ringpool.shm.results import ResultRecord

TICKET = Ticket(Task(1, b""), None, "a", None)
RECORD = ResultRecord(int(Status.OK), 0, int(Encoding.MSGPACK), b"\x01", 0, 0, 0)


def raising(error: BaseException) -> Any:
    def decode(*_: Any) -> Any:
        raise error

    return decode


def test_ctrl_c_while_a_result_is_decoded_is_no_error_of_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(futures.values, "decode", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        futures.outcome_of(TICKET, RECORD)


def test_a_value_that_exits_when_it_is_rebuilt_is_an_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(futures.values, "decode", raising(SystemExit(3)))
    value, error = futures.outcome_of(TICKET, RECORD)
    assert value is None
    assert isinstance(error, ResultTransportError)


def test_a_signal_that_ends_the_program_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(futures.values, "decode", raising(SystemExit(143)))
    monkeypatch.setattr(signals, "_n_ended", 1)
    with pytest.raises(SystemExit):
        futures.outcome_of(TICKET, RECORD)
