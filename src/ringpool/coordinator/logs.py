"""What workers log comes in here, and goes to the logger of the same name.

    idle --sender()--> open --close()--> draining --all is read--> closed
                        |                   +--timeout_s is over: the rest is read, counted and dropped--> closed
                        +--fork--> in the child: closed, and does nothing

A pair of SOCK_SEQPACKET sockets serves all workers of a pool (``workers.logs`` has its messages). This process keeps
a copy of the sending end, so that a worker's death closes nothing; shutting it down acts on the socket itself, whoever
has a copy: the thread then reads what was sent before, and after that the end. There is no count of workers to keep,
and none to wait for.

One thread, "ringpool-logs", reads, and calls the program's handlers. Where these are slow, the kernel's buffer fills
and the workers wait, for a while.

A fork of the program waits until the thread is between two records: the lock of a stream that it writes to would stay
locked in the child for ever, where ``logging`` renews its own locks only. It waits ``FORK_PATIENCE_S`` at most, and
so does the thread for the fork, whatever signal handlers raise in between.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import threading
import time
import traceback

from ringpool.coordinator import signals
from ringpool.coordinator.ending import Ending
from ringpool.workers import logs
from ringpool.workers.descriptor import Descriptor
from ringpool.workers.logs import LogSender

MESSAGE_BYTES_MAX = 65_536
BUFFER_BYTES = 1 << 20  # or as much as net.core.wmem_max allows; the kernel doubles it, and counts its own share
_MESSAGES_MIN = 4  # of the largest size that fit the buffer
FORK_PATIENCE_S = 0.5
_FORK_STEP_S = 0.001  # so that who forks gets the lock from a thread that has a crowd of records to take it for

_open: set[LogInbox] = set()


class LogInbox:
    """The records of one pool's workers. ``begin`` and ``sender`` are for one thread, ``close`` for any."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._pair: tuple[socket.socket, ...] = ()  # receiving, sending
        self._message_bytes_max = 0
        self._closing = False
        self._dropping = False
        self._ending = Ending()
        self._at_work = threading.Lock()  # held while a record is handed over, or by a fork
        self._forking = False
        self._thread: threading.Thread | None = None

    def begin(self) -> None:
        """Open the sockets and start the thread, once. Raises ``OSError`` where there is no descriptor or thread left;
        it may then be tried again.
        """
        if self._thread is not None or self._closing:
            return
        receiving, sending = self._pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        _open.add(self)
        sending.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        room = sending.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        self._message_bytes_max = min(MESSAGE_BYTES_MAX, room // _MESSAGES_MIN)
        thread = threading.Thread(target=self._run, args=(receiving,), name="ringpool-logs", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            self._let_go()
            raise OSError(errno.EAGAIN, "no thread can be started for the workers' log records") from error
        self._thread = thread
        if self._closing:  # meanwhile, by a thread that saw none
            self._shut_down()

    def sender(self) -> LogSender:
        """For a worker process that is about to be started; a mute one after ``close``. Raises as ``begin`` does."""
        self.begin()
        levels, disabled_to = levels_in_force()
        pair = self._pair
        if self._closing or not pair:
            return LogSender(None, 0, levels, disabled_to)
        end = Descriptor(os.dup(pair[1].fileno()))
        return LogSender(end, self._message_bytes_max, levels, disabled_to)

    def close(self, timeout_s: float) -> None:
        """Hand over what was sent so far, which is all that workers that have ended had sent; then let go.

        After ``timeout_s`` seconds what is left is dropped, and standard error says how much. Called again, or in a
        fork of the process, it does nothing; in a handler that the thread itself has called, it does not wait.
        """
        self._closing = True
        thread = self._thread
        if thread is None or os.getpid() != self._pid:
            return
        self._shut_down()
        if not self._is_own_thread() and not self._ending.wait(timeout_s):
            self._dropping = True

    # Around a fork of the process, in whichever thread. Nothing relies on both halves being run, since Ctrl-C may come
    # in between; so the lock may be released by one who does not hold it, and some other fork is less sheltered then.

    def pause(self) -> None:
        """Before: wait for the end of the record that is being handed over. Not in the thread: its handler forks."""
        if not self._is_own_thread():
            self._forking = True
            self._at_work.acquire(timeout=FORK_PATIENCE_S)

    def go_on(self) -> None:
        """After, in the parent."""
        if not self._is_own_thread():
            self._forking = False
            self._rest()

    def forget(self) -> None:
        """After, in the child."""
        self._closing = True
        self._let_go()

    def _is_own_thread(self) -> bool:
        thread = self._thread
        return thread is not None and threading.get_ident() == thread.ident

    def _rest(self) -> None:
        with contextlib.suppress(RuntimeError):  # not locked
            self._at_work.release()

    def _shut_down(self) -> None:
        for sending in self._pair[1:]:
            with contextlib.suppress(OSError):  # the thread has closed it
                sending.shutdown(socket.SHUT_WR)

    def _let_go(self) -> None:
        _open.discard(self)  # first: a fork now must not close a number that is another file's by then
        pair, self._pair = self._pair, ()
        for end in pair:
            end.close()

    # ---- the thread

    def _run(self, receiving: socket.socket) -> None:
        buffer = memoryview(bytearray(self._message_bytes_max))
        n_dropped = 0
        try:
            while size := receiving.recv_into(buffer):  # 0: shut down, and all is read
                if self._dropping:
                    n_dropped += 1
                else:
                    self._handle(buffer[:size])
        except OSError:
            _say(f"ringpool: log records of workers cannot be received:\n{traceback.format_exc()}")
        finally:
            self._let_go()
            if n_dropped:
                _say(f"ringpool: {n_dropped} log records of workers were dropped: the handlers were too slow\n")
            self._ending.reached()

    def _handle(self, message: memoryview) -> None:
        if self._forking:
            time.sleep(_FORK_STEP_S)
        self._at_work.acquire(timeout=FORK_PATIENCE_S)
        try:
            hand_over(logs.decode(message))
        except BaseException:  # handlers are the program's, and raise what they like: the next record may do better
            _say(f"ringpool: a worker's log record could not be handled:\n{traceback.format_exc()}")
        finally:
            self._rest()


def levels_in_force() -> tuple[dict[str, int], int]:
    """The levels that were set, by logger name, "" for the root; and the level up to which logging is disabled."""
    root = logging.getLogger()
    levels = {"": root.level}
    for name, logger in list(root.manager.loggerDict.items()):  # a copy in one step: other threads make loggers
        if isinstance(logger, logging.Logger) and logger.level != logging.NOTSET:
            levels[name] = logger.level
    return levels, root.manager.disable


def hand_over(record: logging.LogRecord) -> None:
    """To the logger of its name, as if it had been logged here. Raises what handlers raise."""
    if record.levelname == f"Level {record.levelno}":  # the worker has no name for it; this process may
        record.levelname = logging.getLevelName(record.levelno)
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)


def _say(words: str) -> None:
    with contextlib.suppress(OSError):  # nobody listens
        os.write(2, words.encode(errors="backslashreplace"))


def _pause_all() -> None:
    for inbox in list(_open):
        inbox.pause()


def _go_on_all() -> None:
    for inbox in list(_open):
        inbox.go_on()


def _forget_all() -> None:
    for inbox in list(_open):
        inbox.forget()


signals.around_forks(_pause_all, _go_on_all, _forget_all)
