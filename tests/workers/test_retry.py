"""Retries: what is tried again, how long after, and what the caller gets to see in the end."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import pickle
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ringpool.errors import AtomicWriteError, DurabilityError, FileOperationError
from ringpool.workers import retry
from ringpool.workers.retry import NOTES_MAX, RetryPolicy, retrying


class BusyError(OSError):
    """What the retried functions raise."""


class Clock:
    """Stands in for the time: a sleep takes none, and is noted."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.sleeps: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now_s += seconds

    def monotonic(self) -> float:
        return self.now_s

    async def sleep_async(self, seconds: float) -> None:
        self.sleep(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(retry, "time", clock)
    monkeypatch.setattr(asyncio, "sleep", clock.sleep_async)
    return clock


class Flaky:
    """Fails with each of ``errors`` in turn, then returns what it is given."""

    def __init__(self, *errors: BaseException) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self, value: int = 1) -> int:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return value


def run(function: Any, *args: Any) -> Any:
    """The result of an ordinary or an async function."""
    result = function(*args)
    return asyncio.run(result) if asyncio.iscoroutine(result) else result


def as_async(function: Callable[..., Any]) -> Callable[..., Any]:
    async def call(*args: Any) -> Any:
        return function(*args)

    return call


both = pytest.mark.parametrize("flavour", [lambda function: function, as_async], ids=["sync", "async"])
SWIFT = RetryPolicy(delay_s=0)


# ---- the policy ------------------------------------------------------------------------------------------------------


def test_delays_grow_by_the_factor_up_to_the_maximum() -> None:
    policy = RetryPolicy(max_attempts=6, delay_s=1, factor=3, jitter=0, delay_max_s=20)
    assert list(policy.delays()) == [1, 3, 9, 20, 20]
    assert [policy.delay_after(attempt) for attempt in (1, 2, 3)] == [1, 3, 9]
    assert list(RetryPolicy(max_attempts=1).delays()) == []


def test_a_delay_that_no_number_can_hold_is_the_maximum() -> None:
    assert RetryPolicy(factor=10.0, jitter=0, delay_max_s=7).delay_after(10_000) == 7
    assert RetryPolicy(delay_s=0, factor=10.0).delay_after(10_000) == 0


def test_the_same_random_source_gives_the_same_delays_and_jitter_only_shortens() -> None:
    policy = RetryPolicy(max_attempts=200, delay_s=1, factor=1, jitter=0.25)
    first = list(policy.delays(random.Random(7)))
    assert first == list(policy.delays(random.Random(7)))
    assert first != list(policy.delays(random.Random(8)))
    assert 0.75 <= min(first) < 0.8
    assert 0.95 < max(first) <= 1


def test_a_policy_is_a_value() -> None:
    policy = RetryPolicy(on=KeyError)
    assert policy == RetryPolicy(on=(KeyError,))
    assert hash(policy) == hash(RetryPolicy(on=(KeyError,)))
    assert pickle.loads(pickle.dumps(policy)) == policy
    with pytest.raises(AttributeError):
        policy.max_attempts = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_attempts", 0),
        ("max_attempts", 2.5),
        ("max_attempts", True),
        ("max_attempts", None),
        ("delay_s", -0.1),
        ("delay_s", float("nan")),
        ("delay_s", float("inf")),
        ("delay_s", "1"),
        ("factor", 0.9),
        ("factor", float("inf")),
        ("jitter", -0.1),
        ("jitter", 1.1),
        ("on", ()),
        ("on", "OSError"),
        ("on", OSError("an instance")),
        ("on", KeyboardInterrupt),
        ("on", (OSError, BaseException)),
        ("delay_max_s", -1),
        ("deadline_s", -1),
        ("deadline_s", float("nan")),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{field} of a RetryPolicy must be .*, not "):
        RetryPolicy(**{field: value})


@pytest.mark.parametrize(
    ("on", "error", "covered"),
    [
        (OSError, OSError(), True),
        (OSError, FileNotFoundError(), True),
        (OSError, ValueError(), False),
        ((KeyError, ValueError), ValueError(), True),
        (Exception, KeyboardInterrupt(), False),
        (Exception, SystemExit(), False),
        (Exception, asyncio.CancelledError(), False),
        (OSError, AtomicWriteError("a", "rename", 5, "x"), True),
        (OSError, DurabilityError("a", "fsync", 5, "x"), False),
        (Exception, DurabilityError("a", "fsync", 5, "x"), False),
        (FileOperationError, DurabilityError("a", "fsync", 5, "x"), False),
        ((OSError, DurabilityError), DurabilityError("a", "fsync", 5, "x"), True),
    ],
)
def test_what_is_tried_again(on: Any, error: BaseException, covered: bool) -> None:
    assert RetryPolicy(on=on).covers(error) is covered


# ---- the decorator ---------------------------------------------------------------------------------------------------


@both
def test_a_call_is_tried_until_it_succeeds(flavour: Any) -> None:
    flaky = Flaky(OSError(1), OSError(2))
    assert run(retrying(SWIFT)(flavour(flaky)), 42) == 42
    assert flaky.calls == 3


@both
def test_the_last_error_itself_is_raised_and_tells_of_every_attempt(flavour: Any) -> None:
    first, last = FileNotFoundError("gone"), PermissionError("closed")
    flaky = Flaky(first, OSError("between"), last)
    around = sys.exception()  # a test that is interrupted at a bytecode may leave one
    with pytest.raises(PermissionError) as raised:
        run(retrying(SWIFT)(flavour(flaky)))
    assert raised.value is last
    assert raised.value.__context__ is around, "none of its own attempts"
    notes = raised.value.__notes__
    assert [note.split(" failed")[0] for note in notes] == ["attempt 1", "attempt 2", "attempt 3"]
    assert notes[0].endswith("FileNotFoundError: gone")
    assert not hasattr(first, "__notes__")
    assert flaky.calls == 3


@both
@pytest.mark.parametrize(
    "error",
    [KeyError("k"), KeyboardInterrupt(), asyncio.CancelledError(), DurabilityError("a", "fsync", 5, "x")],
    ids=lambda error: type(error).__name__,
)
def test_what_is_not_covered_passes_at_once_as_it_is(flavour: Any, error: BaseException) -> None:
    flaky = Flaky(error)

    with pytest.raises(type(error)):
        run(retrying(SWIFT)(flavour(flaky)))
    assert flaky.calls == 1
    assert not hasattr(error, "__notes__")


def test_an_uncovered_error_after_a_covered_one_tells_of_both() -> None:
    with pytest.raises(KeyError) as raised:
        retrying(SWIFT)(Flaky(OSError("first"), KeyError("second")))()
    assert len(raised.value.__notes__) == 2


@both
def test_sleeps_are_the_policys_and_none_follows_the_last_attempt(flavour: Any, clock: Clock) -> None:
    policy = RetryPolicy(max_attempts=4, delay_s=1, jitter=0.5)
    with pytest.raises(BusyError):
        run(retrying(policy, source=random.Random(3))(flavour(Flaky(*[BusyError()] * 9))))
    assert clock.sleeps == list(policy.delays(random.Random(3)))


def test_nobody_sleeps_up_to_a_deadline_that_leaves_no_attempt(clock: Clock) -> None:
    policy = RetryPolicy(max_attempts=100, delay_s=1, factor=1, jitter=0, deadline_s=3.5)
    flaky = Flaky(*[BusyError()] * 200)
    with pytest.raises(BusyError) as raised:
        retrying(policy)(flaky)()
    assert flaky.calls == 4
    assert clock.sleeps == [1, 1, 1]
    assert raised.value.__notes__[-1] == "no further attempt: it would begin after the deadline of 3.5 s"


def test_notes_are_bounded() -> None:
    with pytest.raises(BusyError) as raised:
        retrying(RetryPolicy(max_attempts=50, delay_s=0))(Flaky(*[BusyError()] * 50))()
    notes = raised.value.__notes__
    assert len(notes) == NOTES_MAX
    assert notes[0].startswith("attempt 1 ")
    assert notes[-1].startswith("attempt 50 ")


def test_one_error_raised_again_and_again_gets_its_notes_once() -> None:
    error = OSError("the same")
    with pytest.raises(OSError, match="the same") as raised:
        retrying(SWIFT)(Flaky(error, error, error))()
    assert len(raised.value.__notes__) == 3


def test_an_error_that_cannot_be_shown_is_raised_all_the_same() -> None:
    class MuteError(OSError):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    with pytest.raises(MuteError):
        retrying(SWIFT)(Flaky(MuteError(), MuteError(), MuteError()))()


def test_an_error_that_takes_no_notes_is_raised_all_the_same() -> None:
    @dataclasses.dataclass(frozen=True)
    class FrozenError(OSError):
        code: int

    with pytest.raises(FrozenError):
        retrying(SWIFT)(Flaky(FrozenError(1), FrozenError(2), FrozenError(3)))()


class Owner:
    """Methods of all kinds, each of which fails twice for each owner."""

    failures = 0

    def _fail_twice(self) -> None:
        self.failures += 1
        if self.failures <= 2:
            raise OSError("not yet")

    @retrying(SWIFT)
    def method(self, value: int) -> tuple[Owner, int]:
        """What a method says."""
        self._fail_twice()
        return self, value

    @retrying(SWIFT)
    async def async_method(self, value: int) -> tuple[Owner, int]:
        self._fail_twice()
        return self, value

    @retrying(SWIFT)
    @classmethod
    def of_the_class(cls, flaky: Flaky) -> tuple[type[Owner], int]:
        return cls, flaky()

    @retrying(SWIFT)
    @staticmethod
    def of_nobody(flaky: Flaky) -> int:
        return flaky()


def test_methods_keep_their_owner_and_their_name() -> None:
    owner = Owner()
    assert owner.method(5) == (owner, 5)
    assert Owner.method.__name__ == "method"
    assert Owner.method.__doc__ == "What a method says."
    assert asyncio.run(Owner().async_method(6))[1] == 6
    assert asyncio.iscoroutinefunction(Owner.async_method)
    assert Owner().of_the_class(Flaky(OSError())) == (Owner, 1)
    assert Owner().of_nobody(Flaky(OSError())) == 1


def test_each_call_counts_its_own_attempts() -> None:
    call = retrying(SWIFT)(Flaky(*[BusyError()] * 4))
    with pytest.raises(BusyError):
        call()
    assert call() == 1


def test_a_partial_and_an_object_with_an_async_call_are_awaited() -> None:
    async def fail(flaky: Flaky) -> int:
        return flaky()

    class Awaitable:
        async def __call__(self, flaky: Flaky) -> int:
            return flaky()

    for function in (functools.partial(fail), Awaitable()):
        assert asyncio.run(retrying(SWIFT)(function)(Flaky(OSError(), OSError()))) == 1


def test_an_async_function_waits_without_blocking_its_loop() -> None:
    ticks: list[int] = []

    async def fail(flaky: Flaky) -> int:
        return flaky()

    async def tick() -> None:
        for number in range(20):
            ticks.append(number)
            await asyncio.sleep(0)

    async def main() -> None:
        flaky = Flaky(OSError())
        slow = asyncio.create_task(retrying(RetryPolicy(delay_s=30, jitter=0))(fail)(flaky))
        await tick()
        assert flaky.calls == 1
        slow.cancel()
        with pytest.raises(asyncio.CancelledError):
            await slow
        assert flaky.calls == 1

    asyncio.run(main())
    assert len(ticks) == 20


def test_a_generator_function_is_refused() -> None:
    def generate() -> Iterator[int]:
        yield 1

    with pytest.raises(TypeError, match="generator"):
        retrying(SWIFT)(generate)


def test_without_a_policy_it_is_the_default_one(clock: Clock) -> None:
    @retrying
    def bare(flaky: Flaky) -> int:
        """What it says."""
        return flaky()

    @retrying()
    def called(flaky: Flaky) -> int:
        return flaky()

    for function in (bare, called):
        flaky = Flaky(*[BusyError()] * 2)
        assert function(flaky) == 1
        assert flaky.calls == RetryPolicy().max_attempts
        with pytest.raises(BusyError):
            function(Flaky(*[BusyError()] * 3))
    assert bare.__doc__ == "What it says."


@pytest.mark.parametrize("policy", [3, None, "3", OSError, RetryPolicy])
def test_what_is_no_policy_and_what_cannot_be_called_is_refused(policy: Any) -> None:
    with pytest.raises(TypeError, match="no RetryPolicy"):
        retrying(policy)
    with pytest.raises(TypeError, match="cannot be called"):
        retrying(SWIFT)(3)  # pyright: ignore[reportArgumentType]
