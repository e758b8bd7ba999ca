"""A file store for asyncio: the same operations, awaited; the loop is never blocked.

    await store.update(path, change)
        lock       AsyncPathLock: waits on the loop, in turn with all threads and processes; cancelled, it leaves
        file work  in a thread of ringpool's own, while the lock is held: all of the loop's default executor may wait
                   for that lock

A thread cannot be stopped. An operation that is cancelled during its file work therefore keeps the lock until that has
ended, well or not, and is cancelled then: nobody gets the lock while the old holder still writes. What it did is whole,
as ever.
"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from itertools import islice
from typing import BinaryIO, ParamSpec, TypeVar

from ringpool.workers.files.asynclocks import AsyncPathLock, in_thread
from ringpool.workers.files.durability import Durability
from ringpool.workers.files.locks import Mode, in_order
from ringpool.workers.files.naming import FilePath
from ringpool.workers.files.objects import ContentAddress, Source, VerifyReport
from ringpool.workers.files.replacement import octets
from ringpool.workers.files.store import FileStore
from ringpool.workers.files.unlocked import Content

NAMES_AT_ONCE = 1000  # of a find, from one visit to a thread

_P = ParamSpec("_P")
_R = TypeVar("_R")


class AsyncFileStore:
    """The files below ``base``; arguments, results and errors are those of ``FileStore``, which may be used as well."""

    def __init__(
        self, base: FilePath, *, durability: Durability | str = Durability.FULL, timeout_s: float | None = None
    ) -> None:
        self.store = FileStore(base, durability=durability, timeout_s=timeout_s)

    async def read(self, path: FilePath) -> bytes:
        """See ``FileStore.read``."""
        return await in_thread(self.store.read, path)

    async def read_text(self, path: FilePath, encoding: str = "utf-8") -> str:
        """See ``FileStore.read_text``."""
        return await in_thread(self.store.read_text, path, encoding)

    async def exists(self, path: FilePath) -> bool:
        """See ``FileStore.exists``."""
        return await in_thread(self.store.exists, path)

    async def stat(self, path: FilePath) -> os.stat_result:
        """See ``FileStore.stat``."""
        return await in_thread(self.store.stat, path)

    async def list(self, directory: FilePath = ".") -> list[str]:
        """See ``FileStore.list``."""
        return await in_thread(self.store.list, directory)

    async def find(self, pattern: FilePath, *, sort: bool = False) -> AsyncIterator[str]:
        """See ``FileStore.find``; for ``async for``."""
        found = self.store.find(pattern, sort=sort)

        def some() -> list[str]:
            return [*islice(found, NAMES_AT_ONCE)]

        while paths := await in_thread(some):
            for path in paths:
                yield path

    async def lock(self, path: FilePath, mode: Mode = "exclusive") -> AsyncPathLock:
        """See ``FileStore.lock``: ``async with await store.lock(path): ...``. It is re-entrant for the task."""
        return await self._lock(path, mode)

    async def _lock(self, path: FilePath, mode: Mode = "exclusive", *, create: bool = True) -> AsyncPathLock:
        lock_path = await in_thread(self.store.lock_path, path, create=create)
        return AsyncPathLock(lock_path, mode, timeout_s=self.store.timeout_s)

    async def write(self, path: FilePath, content: Content, *, durability: Durability | str | None = None) -> None:
        """See ``FileStore.write``."""
        async with await self.lock(path):
            await in_thread(self.store.unlocked.write, path, content, self.store.level(durability))

    async def append(self, path: FilePath, content: Content, *, durability: Durability | str | None = None) -> None:
        """See ``FileStore.append``."""
        async with await self.lock(path):
            await in_thread(self.store.unlocked.append, path, content, self.store.level(durability))

    async def update(
        self,
        path: FilePath,
        change: Callable[[bytes], Content | Awaitable[Content]],
        *,
        missing: bytes | None = None,
        durability: Durability | str | None = None,
    ) -> bytes:
        """See ``FileStore.update``. ``change`` runs on the loop, and may be ``async``: the lock is held meanwhile."""
        async with await self.lock(path):
            changed = change(await in_thread(self.store.before_update, path, missing))
            content = bytes(octets(await changed if inspect.isawaitable(changed) else changed))
            await in_thread(self.store.unlocked.write, path, content, self.store.level(durability))
        return content

    async def delete(self, path: FilePath, *, durability: Durability | str | None = None) -> None:
        """See ``FileStore.delete``."""
        async with await self._lock(path, create=False):
            await in_thread(self.store.unlocked.delete, path, self.store.level(durability))

    async def rename(
        self, old: FilePath, new: FilePath, *, replace: bool = False, durability: Durability | str | None = None
    ) -> None:
        """See ``FileStore.rename``."""
        both = [await self._lock(old, create=False), await self._lock(new)]
        deadline_s = None if self.store.timeout_s is None else time.monotonic() + self.store.timeout_s
        async with AsyncExitStack() as held:
            for lock in await in_thread(in_order, both):
                lock.timeout_s = None if deadline_s is None else max(0.0, deadline_s - time.monotonic())
                await held.enter_async_context(lock)
            level = self.store.level(durability)
            await in_thread(self.store.unlocked.rename, old, new, level, replace=replace)

    async def add(self, source: Source, *, durability: Durability | str | None = None) -> ContentAddress:
        """See ``FileStore.add``. A stream is read in the thread."""
        return await in_thread(self.store.add, source, durability=durability)

    async def open(self, address: ContentAddress | str) -> BinaryIO:
        """See ``FileStore.open``. Reading from the file blocks, as ever."""
        return await in_thread(self.store.open, address)

    async def verify(self, *addresses: ContentAddress | str) -> VerifyReport:
        """See ``FileStore.verify``."""
        return await in_thread(self.store.verify, *addresses)
