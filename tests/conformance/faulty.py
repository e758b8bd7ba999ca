"""Executors with one fault each: the harness has to find it, or it proves nothing."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

from ringpool.shm import owner, segment


class ForgetfulExecutor(ProcessPoolExecutor):
    """Takes no keywords along."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        kwargs.clear()
        return super().submit(fn, *args, **kwargs)


class ThreadLeavingExecutor(ProcessPoolExecutor):
    """Leaves a thread behind."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait, cancel_futures=cancel_futures)
        threading.Thread(target=threading.Event().wait, daemon=True).start()


class ChildLeavingExecutor(ProcessPoolExecutor):
    """Leaves a child behind that nobody has waited for."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait, cancel_futures=cancel_futures)
        os.waitid(os.P_PID, os.posix_spawn("/bin/true", ["true"], {}), os.WEXITED | os.WNOWAIT)


class MemoryLeavingExecutor(ProcessPoolExecutor):
    """Leaves shared memory behind, until the process ends."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait, cancel_futures=cancel_futures)
        me = owner.this_process()
        name = f"{segment.SHM_DIRECTORY}/rp.{owner.pid_namespace()}.{me.pid}.{me.start}.00000000"
        os.close(os.open(name, os.O_CREAT, 0o600))
        threading._register_atexit(os.unlink, name)  # type: ignore[attr-defined]
