"""When a failed call is tried again, and after how long: one policy for file operations and for tasks.

    attempt 1 --fails--> delay_s --> attempt 2 --fails--> delay_s * factor --> ... --> attempt max_attempts
                            |                                                              |
             never over delay_max_s; shortened by              the last error is raised as it is,
             a random share of it, up to jitter                with a note of each attempt

A call is tried again after an error of ``on``, which holds subclasses of ``Exception`` only: Ctrl-C, ``SystemExit`` and
the cancellation of an asyncio task pass at once. ``DurabilityError`` counts only where ``on`` names it: after a failed
fsync the kernel may have dropped the pages, and a second one would report success.

A wait that no attempt can follow is not waited: after the last attempt, and where it would end past ``deadline_s``.
"""

from __future__ import annotations

import functools
import inspect
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypeVar, cast, overload

from ringpool.errors import DurabilityError, add_note, words_of

NOTES_MAX = 10  # of attempts that an error carries: the first, and the last ones

_P = ParamSpec("_P")
_R = TypeVar("_R")


# ---- what a policy may say -------------------------------------------------------------------------------------------


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _are_exceptions(value: Any) -> bool:
    return len(value) > 0 and all(isinstance(kind, type) and issubclass(kind, Exception) for kind in value)


_RULES: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("max_attempts", "a whole number, 1 or more", _is_count),
    ("delay_s", "seconds, 0 or more", lambda value: _is_number(value) and value >= 0),
    ("factor", "a number, 1 or more", lambda value: _is_number(value) and value >= 1),
    ("jitter", "a share from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1),
    ("on", "one or more subclasses of Exception", _are_exceptions),
    ("delay_max_s", "seconds, 0 or more", lambda value: _is_number(value) and value >= 0),
    ("deadline_s", "seconds, 0 or more, or None", lambda value: value is None or (_is_number(value) and value >= 0)),
)


# ---- the policy ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often, how fast and on what errors. Immutable, and picklable where the classes of ``on`` are.

    ``max_attempts`` counts the first one. ``delay_s`` is the first wait, ``factor`` (1 or more) what each further one
    is multiplied by, ``delay_max_s`` what none exceeds. ``jitter`` (0 to 1) is the share of a wait that chance may take
    away. ``on`` is an exception class or a tuple of them. ``deadline_s`` bounds the time from the start of the first
    attempt to the start of the last one; an attempt under way is not cut short.

    Raises ``ValueError``, which names the field.
    """

    max_attempts: int = 3
    delay_s: float = 0.1
    factor: float = 2.0
    jitter: float = 0.5
    on: type[Exception] | tuple[type[Exception], ...] = (OSError,)
    delay_max_s: float = 60.0
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        on: Any = self.on
        if not isinstance(on, tuple):
            object.__setattr__(self, "on", (on,))
        for field, meaning, accepts in _RULES:
            value = getattr(self, field)
            if not accepts(value):
                raise ValueError(f"{field} of a RetryPolicy must be {meaning}, not {value!r}")

    def within(self, duration_s: float) -> RetryPolicy:
        """The same, but that no attempt is to begin later than ``duration_s`` seconds after the first."""
        is_within = self.deadline_s is not None and self.deadline_s <= duration_s
        return self if is_within or not math.isfinite(duration_s) else replace(self, deadline_s=duration_s)

    def covers(self, error: BaseException) -> bool:
        """Whether an attempt that ended in ``error`` may be followed by another one."""
        on = cast("tuple[type[Exception], ...]", self.on)
        if isinstance(error, DurabilityError):
            return any(issubclass(kind, DurabilityError) and isinstance(error, kind) for kind in on)
        return isinstance(error, on)

    def delay_after(self, attempt: int, source: random.Random | None = None) -> float:
        """Seconds to wait after failed attempt number ``attempt`` (1 is the first); chance comes from ``source``."""
        try:
            whole_s = min(self.delay_s * self.factor ** (attempt - 1), self.delay_max_s)
        except OverflowError:
            whole_s = self.delay_max_s if self.delay_s else 0.0
        chance = source.random() if source is not None else random.random()
        return whole_s * (1 - self.jitter * chance)

    def delays(self, source: random.Random | None = None) -> Iterator[float]:
        """The waits, in seconds, one fewer than attempts. The same ``source`` state gives the same ones."""
        return (self.delay_after(attempt, source) for attempt in range(1, self.max_attempts))


# ---- calls that are tried again --------------------------------------------------------------------------------------

_DEFAULT = RetryPolicy()


@overload
def retrying(policy: Callable[_P, _R]) -> Callable[_P, _R]: ...


@overload
def retrying(
    policy: RetryPolicy = ..., *, source: random.Random | None = None
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]: ...


def retrying(policy: Any = _DEFAULT, *, source: random.Random | None = None) -> Any:
    """Decorate a function or method, ordinary or ``async``, so that a call is tried again as ``policy`` says.

    ``@retrying`` and ``@retrying()`` mean ``RetryPolicy()``. What is raised in the end is the last attempt's own
    exception; where there were several attempts, its notes tell of each. An ``async`` function waits without blocking
    its loop. Raises ``TypeError`` for what is no policy, for what cannot be called, and for a generator function: its
    errors come when it is iterated, not when it is called.
    """
    if isinstance(policy, RetryPolicy):
        return _decorator(policy, source)
    if isinstance(policy, type) or not (callable(policy) or isinstance(policy, classmethod)):
        raise TypeError(
            f"{policy!r} is no RetryPolicy: write @retrying(RetryPolicy(...)), or @retrying for the default"
        )
    return _decorator(_DEFAULT, source)(cast("Any", policy))


def _decorator(policy: RetryPolicy, source: random.Random | None) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        method: Any = function
        if isinstance(method, (staticmethod, classmethod)):
            method = cast("Any", method)
            return method.__class__(decorate(method.__func__))
        if not callable(function):
            raise TypeError(f"{function!r} cannot be called: what is retried is a function or method")
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError(f"{function!r} is a generator function: retry what its caller does with each item")

        @functools.wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            attempts = _Attempts(policy, source)
            while True:
                try:
                    return function(*args, **kwargs)
                except Exception as error:
                    wait_s = attempts.failed(error)
                    if wait_s is None:
                        raise
                time.sleep(wait_s)

        @functools.wraps(function)
        async def call_async(*args: _P.args, **kwargs: _P.kwargs) -> Any:
            import asyncio  # here: it takes longer to import than all that a worker needs

            attempts = _Attempts(policy, source)
            while True:
                try:
                    return await cast("Any", function(*args, **kwargs))
                except Exception as error:
                    wait_s = attempts.failed(error)
                    if wait_s is None:
                        raise
                await asyncio.sleep(wait_s)

        is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            getattr(function, "__call__", None)  # noqa: B004  (an object with an async __call__)
        )
        return cast("Callable[_P, _R]", call_async) if is_async else call

    return decorate


class _Attempts:
    """The attempts of one call so far. Of errors it keeps words only, so that no frames live on."""

    __slots__ = ("_began", "_count", "_notes", "_policy", "_source")

    def __init__(self, policy: RetryPolicy, source: random.Random | None) -> None:
        self._policy = policy
        self._source = source
        self._began = time.monotonic()
        self._count = 0
        self._notes: list[str] = []

    def failed(self, error: Exception) -> float | None:
        """Seconds until the next attempt. None: there is none; ``error`` has its notes now and is to be raised."""
        self._count += 1
        policy = self._policy
        elapsed_s = time.monotonic() - self._began
        self._remember(error, elapsed_s)
        if policy.covers(error) and self._count < policy.max_attempts:
            wait_s = policy.delay_after(self._count, self._source)
            if policy.deadline_s is None or elapsed_s + wait_s < policy.deadline_s:
                return wait_s
            self._notes.append(f"no further attempt: it would begin after the deadline of {policy.deadline_s:g} s")
        if len(self._notes) > 1:
            for text in self._notes:
                add_note(error, text)
        return None

    def _remember(self, error: Exception, elapsed_s: float) -> None:
        if len(self._notes) == NOTES_MAX:
            del self._notes[1]
        self._notes.append(
            f"attempt {self._count} failed after {elapsed_s:.3f} s: {type(error).__name__}: {words_of(error)}"
        )
