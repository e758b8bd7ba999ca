"""Real power cuts: a file system in an image that is told to stop at once, and is then mounted anew.

    for each call that changes something:   mount -> OLD, synced -> a fork transacts -> before that call: shutdown
                                            umount -> mount -> a fork locks, and so recovers -> OLD or NEW

The shutdown is ``FS_IOC_SHUTDOWN`` without a flush of the file system's own log: what is not synced is lost, unless
something else had the log written, as an fsync of an unrelated file does; each cut is made with and without one.

All mounts are in a mount namespace of the process's own: nothing is left mounted when it ends, however it ends, and no
other process's namespace keeps a file system alive that was unmounted here.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from tests.crash.transaction_mutants import MUTANTS
from tests.workers.files.child import say
from tests.workers.files.child_transaction import check, forked, lay_out, transact

from ringpool.workers.files.oslayer import intercepted

FS_IOC_SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, 2
CHANGES = frozenset({"ftruncate", "fsync", "link", "mkdir", "open", "pwrite", "rename", "unlink", "write"})
IMAGE_BYTES = {"ext4": 64 << 20, "xfs": 320 << 20}
CLONE_NEWNS = 0x20000
RETURNED, LOST = 3, 4


def cut_everywhere(directory: str, kind: str, stride: str, mutant: str) -> None:
    """Says in a line how many cuts, and what they found wrong; or why there can be none."""
    try:
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
            raise OSError(ctypes.get_errno(), "unshare")
        _run("mount", "--make-rprivate", "/")
        disk = _Disk(Path(directory), kind)
        disk.mount()
        disk.unmount()
    except (OSError, subprocess.CalledProcessError) as error:
        say(f"impossible: {error}")
        return
    planted = MUTANTS[mutant].plant if mutant else nullcontext
    cuts = 0
    wrong: list[str] = []
    for flush_other in (False, True):
        at = 1
        while True:
            where = f"call {at}, {'with' if flush_other else 'without'} an fsync of another file"
            status = disk.cut(at, flush_other, planted)
            cuts += 1
            try:
                side = disk.recover()
                if status == RETURNED and side == "old":
                    side = "lost, though it had returned"
            except AssertionError as error:
                side = str(error)
            if side not in ("old", "new"):
                wrong.append(f"{where}: {side}")
            if status == RETURNED:
                break
            at += int(stride)
    say(f"{cuts} cuts; wrong: {wrong}")


class _Disk:
    def __init__(self, directory: Path, kind: str) -> None:
        self.kind = kind
        self.image, self.place = directory / "image", directory / "mount"
        self.trial = 0
        self.place.mkdir()
        with open(self.image, "wb") as image:
            image.truncate(IMAGE_BYTES[kind])
        _run(f"mkfs.{kind}", "-q", "-F" if kind == "ext4" else "-f", self.image)

    @property
    def base(self) -> Path:
        return self.place / f"base {self.trial}"

    def cut(self, at: int, flush_other: bool, planted: Callable[[], AbstractContextManager[None]]) -> int:
        self.mount()
        self.trial += 1
        lay_out(self.base)
        _run("sync", "-f", self.place)
        n = 0

        def stop() -> None:
            if flush_other:
                with open(self.place / "other", "wb") as other:
                    other.write(b"other" * 100)
                    other.flush()
                    os.fsync(other.fileno())
            fd = os.open(self.place, os.O_RDONLY)
            fcntl.ioctl(fd, FS_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))

        def around(name: str, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal n
            n += name in CHANGES
            if n == at and name in CHANGES:
                stop()
                os._exit(LOST)
            return call(*args, **kwargs)

        def work() -> None:
            with planted(), intercepted(around):
                transact(self.base)
            stop()
            os._exit(RETURNED)

        status = os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1])
        self.unmount()
        assert status in (RETURNED, LOST), status
        return status

    def recover(self) -> str:
        """Which side it is on. Raises ``AssertionError``."""
        self.mount()
        reader, writer = os.pipe()

        def look() -> None:
            try:
                side = "new" if check(self.base, "") else "old"
            except (AssertionError, OSError) as error:
                side = repr(error)
            os.write(writer, side.encode()[:4000])

        pid = forked(look)
        os.close(writer)
        with open(reader, "rb") as answer:
            side = answer.read().decode()
        os.waitpid(pid, 0)
        self.unmount()
        return side

    def mount(self) -> None:
        _run("mount", "-t", self.kind, "-o", "loop", self.image, self.place)

    def unmount(self) -> None:
        _run("umount", self.place)


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)
