"""How processes are started for a pool, and where none can be: start methods, the fork server, what stands in the way.

require_...      raise, before anything is made
context_of       the caller's choice, else the program's, else the fork server, told what to import for workers
start_server     now, with signals held back from it: for programs of our own
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Collection
from multiprocessing.context import BaseContext
from types import ModuleType

from ringpool import startup
from ringpool.coordinator import forkservers
from ringpool.coordinator.supervisor import WORKER_NAME, current_directory
from ringpool.errors import DaemonicProcessError, MainModuleError, MonkeyPatchedError, WorkingDirectoryError
from ringpool.workers.confinement import flush
from ringpool.workers.process import EXIT_UNGUARDED

START_METHOD = "forkserver"
_PATCHERS = {"gevent.monkey": "is_module_patched", "eventlet.patcher": "is_monkey_patched"}
_UNPATCHED = ("thread", "threading", "select", "socket")  # eventlet says "thread" for threading
_PRELOAD = [forkservers.AHEAD, "ringpool.workers.process"]


def require_no_main_import() -> None:
    """End a worker that is still importing the program's main module: its coordinator says why, once. Another process
    of ``multiprocessing`` that does so gets ``MainModuleError``; a fork server leaves that module to the workers.
    """
    if not startup.is_importing_main():
        return
    if startup.imports_main_ahead:
        startup.is_unguarded = True
        raise startup.Unguarded
    if multiprocessing.current_process().name.startswith(WORKER_NAME):
        flush()
        os._exit(EXIT_UNGUARDED)
    raise MainModuleError


def require_no_daemon() -> None:
    """Raise ``DaemonicProcessError`` in a process that may have no children."""
    if multiprocessing.current_process().daemon:
        raise DaemonicProcessError


def require_unpatched() -> None:
    """Raise ``MonkeyPatchedError`` where gevent or eventlet have replaced modules that a pool needs as they are."""
    for patcher, name in _PATCHERS.items():
        is_patched: Callable[[str], bool] = getattr(sys.modules.get(patcher), name, lambda _module: False)
        if module := next(filter(is_patched, _UNPATCHED), None):
            raise MonkeyPatchedError(patcher.partition(".")[0], module)


def require_directory(context: BaseContext) -> None:
    """Raise ``WorkingDirectoryError`` where workers could not go to the directory in which this process is."""
    here = current_directory()
    if context.get_start_method() != "fork" and not os.access(here, os.X_OK, effective_ids=True):
        raise WorkingDirectoryError(f"{here} may not be entered by user {os.geteuid()}")


def require_importable(name: str, mp_context: str | BaseContext | None) -> None:
    """Raise ``UnknownFunctionError`` where processes that are no forks of this one could not import that function."""
    context = mp_context if isinstance(mp_context, BaseContext) else None
    if name.startswith("__main__:") and (context or context_of(mp_context)).get_start_method() != "fork":
        from ringpool.workers import tasks  # here: calls need nothing of it

        tasks.require_importable_main(name)


def start_server(held_back: Collection[signal.Signals] = (signal.SIGINT, signal.SIGTERM)) -> None:
    """Start the fork server, if there is to be one; for a program whose processes are all of ringpool.

    Ctrl-C at a terminal reaches the server too, and would end it while it imports; so does the SIGTERM that ``timeout``
    and others send to a process group, and would end the workers with it, which are to have their grace. Here both are
    held back from it, and from each worker until that has a session of its own; other processes of the server never get
    what is ``held_back``.
    """
    if context_of(None).get_start_method() == "forkserver":
        forkservers.keep_short()
        forkservers.start(held_back)


def named_context(chosen: str | BaseContext | ModuleType) -> BaseContext:
    """The context that a caller means. ``multiprocessing`` itself, or a module like it: what that would use."""
    if isinstance(chosen, ModuleType):
        return chosen.get_context()
    return chosen if isinstance(chosen, BaseContext) else multiprocessing.get_context(chosen)


def context_of(chosen: str | BaseContext | ModuleType | None) -> BaseContext:
    """The context of a pool's processes; its fork server, if that is what it has, will import what workers need."""
    context = named_context(chosen or start_method())
    if context.get_start_method() == "forkserver":
        forkservers.forget_foreign()
        preload = forkservers.preload()
        if preload == ["__main__"]:  # the default: the program has not asked for its own
            context.set_forkserver_preload(_preload())
        elif "__main__" in preload:
            context.set_forkserver_preload([forkservers.AHEAD, *(name for name in preload if name != "__main__")])
    return context


def _preload() -> list[str]:
    """What the fork server imports, so that workers need not: what this program has of our room of workers. Where it
    cannot import the main module, each worker will, and of what that has imported here, we answer for our own modules.
    Typed at a prompt, or given by -c, it will not be imported.
    """
    main = sys.modules["__main__"]
    is_imported = getattr(main, "__spec__", None) is not None or getattr(main, "__file__", None) is not None
    ours = {name for name in list(sys.modules) if name.startswith("ringpool.workers.")}
    return _PRELOAD + sorted(ours | startup.homes_used if is_imported else ours)


def start_method() -> str:
    """What the program has set, where that differs from the platform's default; else ours. That default is also what
    ``multiprocessing`` says when it has only been used.
    """
    return START_METHOD if has_chosen_no_method() else multiprocessing.get_start_method()


def has_chosen_no_method() -> bool:
    """Whether the program has set no start method, or the platform's default one."""
    return multiprocessing.get_start_method(allow_none=True) in (None, multiprocessing.get_all_start_methods()[0])
