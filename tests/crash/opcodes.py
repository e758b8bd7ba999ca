"""Stopping at a bytecode: calls a function before each one that is executed in ``ringpool/shm``.

    with Bytecodes(act) as bytecodes:        act(1), act(2), ... before the first, the second, ... bytecode
        end.publish(tasks)                   act may kill the process, raise (an interrupt), or let others run
    bytecodes.n                              how many there were

    Python 3.11     sys.settrace, f_trace_opcodes. What raises out of a trace function ends the tracing: a profile
                    function begins it again at the next call or return, so that the way out is stopped at as well
    from 3.12 on    sys.monitoring, INSTRUCTION

A bytecode is the finest step that a signal handler of Python can interrupt, and every store into shared memory is
made by one. What lies inside of one (a copy of several words) is left to the random kills.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import CodeType, FrameType, TracebackType
from typing import Any

import ringpool.shm

SHM_ROOM = os.path.dirname(os.path.realpath(ringpool.shm.__file__ or "")) + os.sep
_TOOL = 4  # one of those that sys.monitoring leaves to nobody in particular


def is_ours(code: CodeType) -> bool:
    """Whether ``code`` stands in a file of ``ringpool/shm``."""
    return code.co_filename.startswith(SHM_ROOM)


class Bytecodes:
    """Calls ``act(n)`` before the n-th bytecode of ``ringpool/shm`` in this block and in this thread, n from 1.

    While ``paused`` is set, bytecodes are neither counted nor acted upon.
    """

    def __init__(self, act: Callable[[int], None]) -> None:
        self.n = 0
        self.paused = False
        self._act = act
        self._former: Any = None

    def _step(self) -> None:
        if not self.paused:
            self.n += 1
            self._act(self.n)

    if sys.version_info >= (3, 12):

        def __enter__(self) -> Bytecodes:
            monitoring = sys.monitoring
            monitoring.use_tool_id(_TOOL, "ringpool crash tests")
            monitoring.register_callback(_TOOL, monitoring.events.INSTRUCTION, self._instruction)
            monitoring.set_events(_TOOL, monitoring.events.INSTRUCTION)
            monitoring.restart_events()
            return self

        def _instruction(self, code: CodeType, _offset: int) -> object:
            if not is_ours(code):
                return sys.monitoring.DISABLE
            self._step()
            return None

        def __exit__(
            self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
        ) -> None:
            sys.monitoring.set_events(_TOOL, 0)
            sys.monitoring.register_callback(_TOOL, sys.monitoring.events.INSTRUCTION, None)
            sys.monitoring.free_tool_id(_TOOL)

    else:

        def __enter__(self) -> Bytecodes:
            self._former = sys.gettrace(), sys.getprofile()
            sys.setprofile(self._begin_again)
            sys.settrace(self._trace)
            return self

        def _trace(self, frame: FrameType, event: str, _argument: object) -> Callable[..., Any] | None:
            if not is_ours(frame.f_code):
                return None
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            if event == "opcode":
                self._step()
            return self._trace

        def _begin_again(self, frame: FrameType, _event: str, _argument: object) -> None:
            if sys.gettrace() is not None:
                return
            each: FrameType | None = frame
            while each is not None:
                if is_ours(each.f_code):
                    each.f_trace, each.f_trace_opcodes, each.f_trace_lines = self._trace, True, False
                each = each.f_back
            sys.settrace(self._trace)

        def __exit__(
            self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
        ) -> None:
            former_trace, former_profile = self._former
            sys.setprofile(former_profile)
            sys.settrace(former_trace)


def kill_before(at: int) -> Callable[[int], None]:
    """For ``Bytecodes``: SIGKILL for this process before bytecode number ``at``."""

    def act(n: int) -> None:
        if n == at:
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def interrupt_before(*at: int) -> Callable[[int], None]:
    """For ``Bytecodes``: ``KeyboardInterrupt`` before each bytecode whose number is in ``at``."""

    def act(n: int) -> None:
        if n in at:
            raise KeyboardInterrupt(n)

    return act
