"""A worker's log records, on their way to the coordinator's ``logging``.

    worker:  logger.info(...) --> root logger --> Outlet --pickle--> one message --+
                                                                                   | one SOCK_SEQPACKET pair per pool
    coordinator:  the logger of that name <-- coordinator.logs.LogInbox <----------+

One record is one message, which the kernel takes whole or not at all: a sender that is killed leaves no torn record,
and what it had sent before is there to be read.

    message          a pickled dict: the record's attributes, their values plain, or bytes: a pickle of their own
    msg, exc_text    formatted here, with the arguments; args, exc_info   None
    too large        long texts lose their middle, with a note there; then what else is large goes
    nobody reads     the sender waits ``PATIENCE_S`` for room, then loses this record, and each later one for which
                     there is no room, without waiting. Standard error says when that begins; a record of logger
                     "ringpool.workers" says how many were lost, as soon as there is room
    no socket        closed by a task, or by the end of the pool: what is a warning goes to standard error
                     (``logging.lastResort``)

Pickle, since a text may hold lone surrogates (a file's name may), which UTF-8 formats refuse.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import pickle
import select
import socket
import time
from typing import Any

from ringpool.workers import reducers
from ringpool.workers.descriptor import Descriptor, out_of_the_way

PATIENCE_S = 5.0
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL  # per call: O_NONBLOCK would be shared with whoever has the socket
_PLAIN = frozenset((str, int, float, bool, type(None)))
_LEFT_OUT = frozenset(("msg", "args", "exc_info", "message", "asctime"))  # made anew, or a formatter's leavings
_TEXT_MIN = 32  # characters; if such short texts do not fit, attributes go
_traceback_of = logging.Formatter().formatException


class LogSender:
    """What a worker process needs to send its records. Made by ``LogInbox.sender`` for one process, passed as an
    argument to it, and let go by the coordinator once that has started.

    ``end``: this process's copy of the sending end (None: nothing is sent, and ``install`` does nothing);
    ``message_bytes_max``; ``levels``: of the coordinator's loggers, by name, "" for the root; ``disabled_to``: the
    level up to which ``logging.disable`` holds there.
    """

    def __init__(
        self, end: Descriptor | None, message_bytes_max: int, levels: dict[str, int], disabled_to: int
    ) -> None:
        self._end = end
        self._message_bytes_max = message_bytes_max
        self._levels = levels
        self._disabled_to = disabled_to
        self._outlet: Outlet | None = None

    def install(self) -> None:
        """Make the root logger of this process send all that passes the coordinator's levels. In the worker, once.

        What was configured before is taken off all loggers (handlers, filters): by ``fork`` or by importing the main
        module it is the coordinator's own, and acts there. What is configured later stands: ``addHandler`` adds
        to the sending, but see ``give_way``; ``logging.config.dictConfig`` and ``basicConfig(force=True)`` replace it.
        """
        if self._end is None:
            return
        fd = out_of_the_way(self._end.fileno())
        self._end.close()
        root = logging.getLogger()
        _strip(root)
        for logger in list(root.manager.loggerDict.values()):
            if isinstance(logger, logging.Logger):
                _strip(logger)
        for name, level in self._levels.items():
            logging.getLogger(name).setLevel(level)
        logging.disable(self._disabled_to)
        self._outlet = Outlet(socket.socket(fileno=fd), self._message_bytes_max)
        root.addHandler(self._outlet)

    def give_way(self) -> None:
        """Send no more where the root logger has another handler since that writes records, or sends them: that of a
        program that sees to its workers' records itself, and would have each twice.
        """
        root = logging.getLogger()
        if self._outlet is not None and any(map(_brings_records_away, root.handlers)):
            root.removeHandler(self._outlet)


def _brings_records_away(handler: logging.Handler) -> bool:
    """Whether it is a stream's or a file's, or one of ``logging.handlers``; not what counts or collects records."""
    kinds = type(handler).__mro__
    return logging.StreamHandler in kinds or any(kind.__module__ == "logging.handlers" for kind in kinds)


def _strip(logger: logging.Logger) -> None:
    for handler in list(logger.handlers):  # not closed: what they have buffered is the coordinator's to write
        logger.removeHandler(handler)
    for condition in list(logger.filters):
        logger.removeFilter(condition)
    logger.propagate = True


class Outlet(logging.Handler):
    """Sends each record as a message through ``end``, which it owns. Never waits longer than ``PATIENCE_S``."""

    def __init__(self, end: socket.socket, message_bytes_max: int) -> None:
        super().__init__()
        self._end = end
        self._fd = end.fileno()
        self._inode = os.fstat(self._fd).st_ino
        self._message_bytes_max = message_bytes_max
        self._room = select.poll()
        self._room.register(self._fd, select.POLLOUT)
        self._n_lost = 0
        atexit.register(end.close)  # not in close(), which a task may call for all handlers, and log on

    def emit(self, record: logging.LogRecord) -> None:
        """Send ``record``. It is left as it is, for other handlers."""
        try:
            message = encode(record, self._message_bytes_max)
            try:
                if not self._is_whole() or (self._n_lost and not self._own_up()) or not self._send(message):
                    self._lose()
            except OSError:
                _write_here(record)
        except Exception:
            self.handleError(record)

    def _is_whole(self) -> bool:
        """True; raises ``OSError`` where a task has closed the socket: the number may be another file's by now."""
        if os.fstat(self._fd).st_ino != self._inode:
            raise OSError("the socket's descriptor is another file's")
        return True

    def _send(self, message: bytes) -> bool:
        """Whether there was room for it, in time."""
        deadline = time.monotonic() + (0 if self._n_lost else PATIENCE_S)
        while True:
            try:
                self._end.send(message, _FLAGS)
                return True
            except BlockingIOError:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return False
                self._room.poll(left_s * 1000)

    def _own_up(self) -> bool:
        """Say how many records were lost; whether there was room for that."""
        text = f"{self._n_lost} log records of this process were lost: nobody read them for {PATIENCE_S:g} s"
        note = logging.LogRecord("ringpool.workers", logging.WARNING, __file__, 0, text, None, None)
        if not self._send(encode(note, self._message_bytes_max)):
            return False
        self._n_lost = 0
        return True

    def _lose(self) -> None:
        self._n_lost += 1
        if self._n_lost == 1:
            with contextlib.suppress(OSError):
                os.write(2, f"ringpool: process {os.getpid()} loses log records: nobody reads them\n".encode())


def _write_here(record: logging.LogRecord) -> None:
    """As ``logging`` does where nothing is configured."""
    if logging.lastResort is not None and record.levelno >= logging.lastResort.level:
        logging.lastResort.handle(record)


# ---- messages --------------------------------------------------------------------------------------------------------


def encode(record: logging.LogRecord, bytes_max: int) -> bytes:
    """The message of a record, at most ``bytes_max`` bytes (2,000 or more). Raises what formatting it raises."""
    attributes = {
        name: value if type(value) in _PLAIN else _pack(value)
        for name, value in record.__dict__.items()
        if name not in _LEFT_OUT
    }
    attributes["msg"] = record.getMessage()
    attributes["args"] = attributes["exc_info"] = None
    if record.exc_info and not record.exc_text:
        attributes["exc_text"] = _traceback_of(record.exc_info)
    message = pickle.dumps(attributes, pickle.HIGHEST_PROTOCOL)
    return message if len(message) <= bytes_max else _encode_cut(attributes, bytes_max)


def decode(message: memoryview | bytes) -> logging.LogRecord:
    """The record of a message. Raises whatever unpickling raises, of a message that is none."""
    attributes: dict[str, Any] = pickle.loads(message)
    for name, value in attributes.items():
        if type(value) is bytes:
            attributes[name] = _unpack(value)
    return logging.makeLogRecord(attributes)


def _pack(value: object) -> bytes:
    """A pickle of it; of its ``repr``, where it has none, or one that could be read once, and by this process's leave:
    a message outlives its sender, so no descriptor goes with it.
    """
    try:
        body = pickle.dumps(value, pickle.HIGHEST_PROTOCOL)
        return body if reducers.may_do_without(body) else reducers.dumps_by_table(value, None, is_shared=True)
    except Exception:
        try:
            text = repr(value)
        except Exception:
            text = f"<{type(value).__qualname__}>"
        return pickle.dumps(text)


def _unpack(packed: bytes) -> object:
    try:
        return pickle.loads(packed)
    except Exception as error:
        return f"[cannot be read here: {error!r}]"


def _encode_cut(attributes: dict[str, Any], bytes_max: int) -> bytes:
    """The message with its texts as long as fits; where short ones do not fit, with the usual attributes alone."""
    usual = {name: attributes[name] for name in logging.makeLogRecord({}).__dict__.keys() & attributes.keys()}
    message = b""
    for kept in (attributes, usual):
        text_max = bytes_max
        while text_max >= _TEXT_MIN:
            cut = {name: _cut(value, text_max) for name, value in kept.items()}
            message = pickle.dumps(cut, pickle.HIGHEST_PROTOCOL)
            if len(message) <= bytes_max:
                return message
            text_max //= 2
    return message


def _cut(value: Any, text_max: int) -> Any:
    if type(value) is bytes and len(value) > text_max:
        return f"[an attribute of {len(value):,} bytes is cut]"
    if type(value) is str and len(value) > text_max:
        kept = text_max // 2
        cut = f"[... {len(value) - 2 * kept:,} characters are cut here ...]"
        return f"{value[:kept]}{cut}{value[len(value) - kept :]}"
    return value
