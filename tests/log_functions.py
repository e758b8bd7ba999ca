"""What the worker processes of the logging tests do. They tell where they are by files and by what they log."""

from __future__ import annotations

import logging
import logging.handlers
import os
import select
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ringpool.coordinator.logs import LogInbox
from ringpool.workers import logs
from ringpool.workers.logs import LogSender

NAME = "tests.logs"
logger = logging.getLogger(NAME)


def enter(sender: LogSender, function: Callable[..., None], *arguments: object) -> None:
    """The target of each process."""
    sender.install()
    function(*arguments)


def queue_records(queue: Any, name: str | None) -> None:
    """An initializer, as the logging cookbook has it."""
    logging.getLogger(name).addHandler(logging.handlers.QueueHandler(queue))


def add_null_handler() -> None:
    """An initializer that silences a warning of logging's own, as libraries advise."""
    logging.getLogger().addHandler(logging.NullHandler())


def log(text: str, *arguments: object) -> None:
    logger.warning(text, *arguments)


def log_count(n: int) -> None:
    for i in range(n):
        logger.info("%d", i)


def log_at_all_levels() -> None:
    for name in (NAME, f"{NAME}.loud", f"{NAME}.silent", "tests.other"):
        for level in (5, logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            logging.getLogger(name).log(level, "%s %d", name, level)


def log_an_error() -> None:
    try:
        raise LookupError("what was looked for")
    except LookupError:
        logger.exception("it %s", "failed", stack_info=True, extra={"items": [1, 2], "unpicklable": threading.Lock()})


def log_and_be_killed(n: int) -> None:
    log_count(n)
    os.kill(os.getpid(), signal.SIGKILL)


def log_for_ever(worker: int, begun: Path) -> None:
    i = 0
    while True:
        logger.info("%d %d %s", worker, i, "x" * (i % 97) * 10)
        i += 1
        if i == 50:
            begun.touch()


def log_in_threads(n_threads: int, n: int) -> None:
    threads = [threading.Thread(target=log_count, args=(n,), name=f"t{i}") for i in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def log_in_a_fork() -> None:
    logger.info("before")
    pid = os.fork()
    if not pid:
        logger.info("child")
        os._exit(0)
    os.waitpid(pid, 0)
    logger.info("after")


def log_impatiently(patience_s: float, n: int, done: Path) -> None:
    """With little patience; the records are large, so that the buffer fills soon."""
    logs.PATIENCE_S = patience_s
    for i in range(n):
        logger.info("%d %s", i, "x" * 30_000)
    done.touch()


def log_after(gate: Path, patience_s: float, n: int, done: Path) -> None:
    _wait_for(gate)
    log_impatiently(patience_s, n, done)


def log_around(gate: Path, patience_s: float, n: int) -> None:
    """Log more than there is room for, wait for the gate, log once more."""
    log_impatiently(patience_s, n, gate.with_name("lost"))
    _wait_for(gate)
    logger.info("room")


def close_all_and_log(path: Path) -> None:
    """Close all descriptors, and open files in their place: nothing of the records may get into these."""
    os.closerange(3, 1024)
    while (fd := os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)) < 300:
        pass
    os.dup2(os.open(path, os.O_WRONLY), 2)
    logger.warning("never in a file of the task")
    os.closerange(3, fd + 1)


def log_badly() -> None:
    logger.warning("%d", "no number")
    logger.warning("next")


def describe_logging(path: Path) -> None:
    """Write down how logging is set up here, and what an exec'd child inherits."""
    root = logging.getLogger()
    targets = {int(fd): os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)}
    sockets = {fd: target for fd, target in targets.items() if fd > 2 and target.startswith("socket:")}
    child = subprocess.run(["ls", "-l", "/proc/self/fd"], close_fds=False, capture_output=True, text=True, check=True)
    others = [logger for logger in root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    lines = [
        f"handlers {[type(handler).__name__ for handler in root.handlers]}",
        f"of others {[handler for other in others for handler in other.handlers]}",
        f"filters {[*root.filters, *logger.filters]}",
        f"propagate {logger.propagate}",
        f"levels {root.level} {logger.level} {logging.getLogger(NAME + '.loud').level}",
        f"disabled to {root.manager.disable}",
        f"high {max(sockets) >= 200}",
        f"in the child {any(target in child.stdout for target in sockets.values())}",
    ]
    path.write_text("\n".join(lines))


def _wait_for(path: Path) -> None:
    while not path.exists():
        select.select([], [], [], 0.005)


def _is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")


def be_a_coordinator() -> None:
    """Have a worker of its own, whose records go up twice."""
    inbox = LogInbox()
    inner = inbox.sender()
    pid = os.fork()
    if not pid:
        enter(inner, log, "from %s", "below")
        os._exit(0)
    os.waitpid(pid, 0)
    inbox.close(30)
