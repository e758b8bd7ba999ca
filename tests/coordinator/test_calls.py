"""Calls: anything callable, with any arguments, whatever it does to its process."""

from __future__ import annotations

import ctypes
import errno
import functools
import multiprocessing
import operator
import os
import pickle
import re
import resource
import signal
import socket
import subprocess
import sys
import zipapp
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.coordinator import call_functions as functions
from tests.coordinator.program import ROOT, WATCHDOG_S, Program, is_alive, shared_memory_of, wait_until

from ringpool import RingPoolExecutor, TaskOptions, WorkerDiedError
from ringpool.errors import ArgumentTransportError, RemoteError, ResultTransportError
from ringpool.workers import values

RunProgram = Callable[..., Program]
TOP = """
from ringpool import RingPoolExecutor
from tests.coordinator import call_functions as functions
"""


@pytest.fixture(scope="module")
def executor() -> Iterator[RingPoolExecutor]:
    with RingPoolExecutor(2) as made:
        list(made.map(functions.process_id, range(64)))
        yield made


def serves(executor: RingPoolExecutor) -> bool:
    """Whether it runs tasks, on all its workers."""
    futures = [executor.submit(functions.double, item) for item in range(20)]
    return [future.result(WATCHDOG_S) for future in futures] == list(range(0, 40, 2))


# ---- anything callable -----------------------------------------------------------------------------------------------


def _callables() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...], Any]]:
    offset = 3

    def closure(x: int) -> int:
        return x + offset

    def generating(x: int) -> Any:
        return sum(item for item in (x, offset))

    class Local:
        def __init__(self, x: int) -> None:
            self.x = x

        def method(self, y: int) -> int:
            return self.x + y + offset

    return {
        "function": (functions.double, (4,), 8),
        "builtin": (pow, (2, 10), 1024),
        "class": (complex, (1, 2), 1 + 2j),
        "class of a module": (functions.Adder, (5,), functions.Adder(5)),
        "lambda": (lambda x: x + offset, (4,), 7),
        "closure": (closure, (4,), 7),
        "nested function with a generator": (generating, (4,), 7),
        "cached function": (functions.cached, (4,), 8),
        "bound method of a local class": (Local(1).method, (2,), 6),
        "partial": (partial(pow, 2), (5,), 32),
        "partial of a lambda": (partial(lambda x, y: (x, y), y=1), (2,), (2, 1)),
        "callable object": (functions.Adder(3), (4,), 7),
        "bound method": (functions.Adder(3).bound, (4,), 7),
        "class method": (functions.Adder.of_class, (4,), 7),
        "static method": (functions.Adder.of_nothing, (4,), 7),
        "method of a builtin type": (str.upper, ("a",), "A"),
        "bound method of a builtin": ([3, 1].index, (1,), 1),
        "itemgetter": (operator.itemgetter(1), ((1, 2),), 2),
        "reduce": (functools.reduce, (operator.add, [1, 2, 3]), 6),
        "NumPy function": (np.hypot, (3.0, 4.0), 5.0),
        "type": (type, (1,), int),
    }


CALLABLES = _callables()


@pytest.mark.parametrize("kind", CALLABLES)
def test_anything_callable_can_be_called(executor: RingPoolExecutor, kind: str) -> None:
    function, arguments, expected = CALLABLES[kind]
    assert executor.submit(function, *arguments).result(WATCHDOG_S) == expected
    assert executor.submit(function, *arguments).result(WATCHDOG_S) == expected
    columns = [[argument] * 20 for argument in arguments]
    assert list(executor.map(function, *columns)) == [expected] * 20


def test_a_class_is_sent_as_it_is_now(executor: RingPoolExecutor) -> None:
    """The callable goes with the call: what the program changes later does not reach back, nor stay away."""
    adder = functions.Adder(1)
    first = executor.submit(adder, 1)
    adder.n = 10
    assert (first.result(WATCHDOG_S), executor.submit(adder, 1).result(WATCHDOG_S)) == (2, 11)


def test_two_functions_of_one_name_are_two(executor: RingPoolExecutor) -> None:
    made = [eval(f"lambda x: x + {n}") for n in range(50)]
    assert [executor.submit(each, 1).result(WATCHDOG_S) for each in made] == list(range(1, 51))


def test_what_cannot_be_called_is_a_type_error(executor: RingPoolExecutor) -> None:
    with pytest.raises(TypeError, match="not callable"):
        executor.submit(5, 1).result(WATCHDOG_S)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="argument"):
        executor.submit(functions.double).result(WATCHDOG_S)
    with pytest.raises(TypeError):
        executor.submit()  # type: ignore[call-arg]


@pytest.mark.parametrize("arguments", [(), (1,), ([],)])
def test_none_is_no_function(executor: RingPoolExecutor, arguments: tuple[Any, ...]) -> None:
    nothing: Any = None
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        executor.submit(nothing, *arguments).result(WATCHDOG_S)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        executor.submit(nothing, *arguments, keyword=1).result(WATCHDOG_S)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        list(executor.map(nothing, [arguments]))


def test_keywords_of_any_name_reach_the_function(executor: RingPoolExecutor) -> None:
    given = {"fn": 1, "self": 2, "options": 3, "args": 4, "kwargs": 5, "timeout": 6, "priority": 7}
    assert executor.submit(functions.keywords, 0, **given).result(WATCHDOG_S) == ((0,), given)
    assert executor.submit_with(TaskOptions(), functions.keywords, 0, **given).result(WATCHDOG_S) == ((0,), given)
    assert executor.options(priority=1).submit(functions.keywords, **given).result(WATCHDOG_S) == ((), given)


@pytest.mark.parametrize("n_bytes", [0, 900, 960, 961, 4095, 4096, 100_000, 1 << 24])
def test_arguments_and_results_of_any_size(executor: RingPoolExecutor, n_bytes: int) -> None:
    for value in (b"x" * n_bytes, "é" * (n_bytes // 2), [b"x" * n_bytes], bytearray(n_bytes)):
        assert executor.submit(functions.identity, value).result(WATCHDOG_S) == value
    assert executor.submit(functions.keywords, word=b"x" * n_bytes).result(WATCHDOG_S)[1]["word"] == b"x" * n_bytes


MAIN = """
from functools import partial
from ringpool import RingPoolExecutor

OFFSET = 10

class Shifter:
    def __init__(self, n):
        self.n = n
    def shift(self, x):
        return x + self.n
    def __eq__(self, other):
        return type(other) is Shifter and other.n == self.n

class OwnError(Exception):
    pass

def shift(x):
    return x + OFFSET

def make(n):
    return Shifter(n)

def fail(words):
    raise OwnError(words)

if __name__ == "__main__":
    for method in ("forkserver", "spawn", "fork"):
        with RingPoolExecutor(2, mp_context=method) as pool:
            assert pool.submit(shift, 1).result() == 11
            assert list(pool.map(shift, range(500))) == list(range(10, 510))
            assert pool.submit(lambda x: shift(x) + 1, 1).result() == 12
            assert pool.submit(Shifter(5).shift, 1).result() == 6
            assert list(pool.map(partial(Shifter.shift, Shifter(2)), [1])) == [3]
            assert pool.submit(Shifter.shift, Shifter(4), 1).result() == 5
            assert pool.submit(make, 3).result() == Shifter(3)
            assert list(pool.map(make, range(20))) == [Shifter(n) for n in range(20)]
            error = pool.submit(fail, "words of it").exception()
            assert type(error) is OwnError and error.args == ("words of it",), repr(error)
            assert "in fail" in str(error.__cause__)
    print("well done")
"""


BACK = """
import enum
from dataclasses import dataclass
from ringpool import RingPoolExecutor
from ringpool.errors import RemoteError, ResultTransportError

@dataclass
class Point:
    x: int

class Colour(enum.Enum):
    RED = 1

class Outer:
    class Inner:
        pass

class OwnError(Exception):
    pass

class PairError(Exception):
    def __init__(self, first, second):
        super().__init__(first)

def make(kind):
    class Local:
        pass

    match kind:
        case "dataclass": return Point(3)
        case "in a list": return [Point(1), 2]
        case "enum": return Colour.RED
        case "nested": return Outer.Inner()
        case "class": return Outer.Inner
        case "function": return make
        case "lambda": return lambda: 0
        case "local": return Local()
        case "raise": raise OwnError("words of it", Point(4))
        case "raise what cannot be rebuilt": raise PairError("words", "of it")
    return kind()

def fail(kind):
    raise kind("words of it")

class Gone(Exception):
    pass

gone = Gone
del Gone

def outcomes(pool, function, item):
    yield lambda: pool.submit(function, item).result()
    yield lambda: list(pool.map(function, [item] * 50, chunksize=50))[49]

if __name__ == "__main__":
    for method in ("forkserver", "spawn", "fork"):
        with RingPoolExecutor(1, mp_context=method) as pool:
            for function in (make, lambda kind: make(kind)):
                def results(item):
                    return [outcome() for outcome in outcomes(pool, function, item)]
                def errors(item, function=function):
                    for outcome in outcomes(pool, function, item):
                        try:
                            raise AssertionError(outcome())
                        except Exception as error:
                            yield error
                assert results("dataclass") == [Point(3)] * 2
                assert results("in a list") == [[Point(1), 2]] * 2
                assert all(result is Colour.RED for result in results("enum"))
                assert all(type(result) is Outer.Inner for result in results("nested"))
                assert results("class") == [Outer.Inner] * 2
                assert results("function") == [make] * 2
                for outcome in outcomes(pool, function, "raise"):
                    try:
                        outcome()
                    except OwnError as error:
                        assert error.args == ("words of it", Point(4))
                        assert "in make" in str(error.__cause__)
                for error in errors("raise what cannot be rebuilt"):
                    assert type(error) is RemoteError and "PairError: words" in str(error), repr(error)
                for kind in ("lambda", "local"):
                    for error in errors(kind):
                        assert f"make.<locals>.{kind.capitalize()}".replace("Lambda", "<lambda>") in str(error), error
                        assert "return value, of type" in "".join(error.__notes__)
            if method == "fork":
                continue  # such a worker gives back the very class
            for error in errors(gone):
                assert type(error) is ResultTransportError and "sent Gone by its name" in str(error), repr(error)
            for error in errors(gone, fail):
                assert type(error) is RemoteError and error.message == "words of it", repr(error)
                assert "in fail" in str(error.__cause__) and "sent Gone by its name" in error.__notes__[0]
    print("well done")
"""


@pytest.mark.parametrize("program", [MAIN, BACK], ids=["calls", "results"])
@pytest.mark.parametrize(
    "how", ["a script", "python -c", "standard input", "python -m", "python -m package", "a directory", "a zip file"]
)
def test_what_the_main_module_defines_travels_both_ways(tmp_path: Path, program: str, how: str) -> None:
    script = tmp_path / "a_script.py"
    script.write_text(program)
    package, zipped = tmp_path / "a_package", tmp_path / "a_zip_file"
    package.mkdir()
    (package / "__main__.py").write_text(program)
    zipapp.create_archive(package, zipped)
    arguments = {
        "a script": [str(script)],
        "python -c": ["-c", program],
        "standard input": ["-"],
        "python -m": ["-m", "a_script"],
        "python -m package": ["-m", "a_package"],
        "a directory": [str(package)],
        "a zip file": [str(zipped)],
    }
    run = subprocess.run(
        [sys.executable, *arguments[how]],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore::DeprecationWarning"},
        input=program if how == "standard input" else "",
        capture_output=True,
        text=True,
        timeout=WATCHDOG_S,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "well done\n", "")


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_a_worker_that_starts_when_the_script_has_ended_finds_what_that_defines(
    run_program: RunProgram, method: str
) -> None:
    """The interpreter takes ``__file__`` from the main module before it calls what is to be called at exit."""
    program = run_program(
        f"""
        pool = RingPoolExecutor(1, {method!r}, name, ("me",), max_tasks_per_child=1)
        for index in range(3):
            pool.submit(note, f"note-{{index}}", "ended")
        results = pool.map(partial(note, "note-4"), ["ended"])  # not begun before the end
        globals()["kept"] = pool, results
        threading._register_atexit(Path("ended").touch)  # what comes by atexit itself comes after the tasks
        """,
        top="""
        from functools import partial
        from ringpool import RingPoolExecutor
        names = []

        def name(word):
            names.append(word)

        def note(path, ended):
            while not Path(ended).exists():
                select.select([], [], [], 0.005)
            Path(path).write_text(" ".join(names))
        """,
    )
    assert (program.finish(), program.err) == (0, "")
    assert [path.read_text() for path in program.file.parent.glob("note-*")] == ["me"] * 4
    program.assert_nothing_is_left()


def test_what_is_typed_at_a_prompt_after_a_script_goes_by_value(tmp_path: Path) -> None:
    script = tmp_path / "a_script.py"
    script.write_text("""
from ringpool import RingPoolExecutor

def shift(x):
    return x + 1

if __name__ == "__main__":
    pool = RingPoolExecutor(1)
    assert pool.submit(shift, 1).result() == 2
""")
    typed = "def typed(x): return shift(x) + 1\n\nprint(pool.submit(typed, 1).result())\npool.shutdown()\n"
    run = subprocess.run(
        [sys.executable, "-q", "-i", script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        input=typed,
        capture_output=True,
        text=True,
        timeout=WATCHDOG_S,
    )
    assert (run.returncode, run.stdout) == (0, "3\n"), run.stderr
    assert "Traceback" not in run.stderr


def test_a_program_can_be_debugged(tmp_path: Path) -> None:
    script = tmp_path / "a_script.py"
    script.write_text(MAIN)
    run = subprocess.run(
        [sys.executable, "-m", "pdb", "-c", "continue", script],
        env=os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=WATCHDOG_S,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("well done\nThe program finished"), run.stdout


def test_a_launcher_that_has_imported_multiprocessing_may_make_a_script_its_main_module(tmp_path: Path) -> None:
    """As ``coverage run`` does."""
    script = tmp_path / "a_script.py"
    script.write_text(MAIN)
    launch = f"import multiprocessing, runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", launch],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=WATCHDOG_S,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "well done\n", "")


INITIALIZED = """
import multiprocessing, sys
from ringpool import RingPoolExecutor

class Mark:
    def __init__(self, value):
        self.value = value

def initialize(mark, end):
    sys.kept = mark.value
    end.send(mark.value)

if __name__ == "__main__":
    ours, theirs = multiprocessing.Pipe()
    for method in ("forkserver", "spawn"):
        with RingPoolExecutor(1, mp_context=method, initializer=initialize, initargs=(Mark(3), theirs)) as pool:
            assert pool.submit(lambda: sys.kept).result() == 3
            assert ours.recv() == 3
    print("well done")
"""


@pytest.mark.parametrize("how", ["-c", "-"])
def test_an_initializer_of_a_main_that_is_no_file_is_sent_with_its_arguments(how: str) -> None:
    run = subprocess.run(
        [sys.executable, how, *([INITIALIZED] if how == "-c" else [])],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        input=INITIALIZED if how == "-" else "",
        capture_output=True,
        text=True,
        timeout=WATCHDOG_S,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "well done\n", "")


MADE_BY_LIBRARY = """
import abc, functools, sys
from dataclasses import dataclass
from typing import NamedTuple, Protocol
from ringpool import RingPoolExecutor

@dataclass(slots=True)
class Point:
    x: int

@dataclass(slots=True)
class Point3(Point):
    z: int

class Private:
    __slots__ = "__x", "__weakref__"
    def __init__(self, x):
        self.__x = x
    def __eq__(self, other):
        return type(other) is Private and other.__x == self.__x

class Single(abc.ABC):
    __slots__ = "x"
    def __eq__(self, other):
        return type(other) is Single and other.x == self.x

class HasX(Protocol):
    __slots__ = ()
    x: int

class Explicit(HasX):
    __slots__ = {"x": "what it is"}
    def __eq__(self, other):
        return type(other) is Explicit and other.x == self.x

class Pair(NamedTuple):
    x: int

def with_x(kind):
    made = kind()
    made.x = 3
    return made

SLOTTED = {
    "Point": lambda: Point(1), "Point3": lambda: Point3(1, 2), "Private": lambda: Private(4), "Pair": lambda: Pair(5),
    "Single": lambda: with_x(Single), "Explicit": lambda: with_x(Explicit),
}

def slotted(name):
    made = SLOTTED[name]()
    return made, hasattr(made, "__dict__")

@functools.lru_cache(maxsize=7)
def fibonacci(n):
    "The n-th."
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)

fibonacci.more = 3

def about_fibonacci():
    return fibonacci(30), fibonacci.cache_parameters()["maxsize"], fibonacci.__doc__, fibonacci.__name__, fibonacci.more

@functools.singledispatch
def depth(value):
    "How deep it is."
    return 0

@depth.register
def _(value: list):
    return 1 + max(map(depth, value), default=0)

depth.more = 4

def about_depth(value):
    return depth(value), depth.__doc__, depth.__name__, depth.more

class Lazy:
    def __init__(self, x):
        self.x = x
    @functools.cached_property
    def double(self):
        return 2 * self.x
    @functools.cache
    def plus(self, y):
        return self.x + y
    @functools.singledispatchmethod
    def kind(self, value):
        return "other"
    @kind.register
    def _(self, value: int):
        return "int"

def lazily(x):
    made = Lazy(x)
    return made.double + made.plus(1), made.kind(1), made.kind(""), made

def local():
    @functools.cache
    def inner(x):
        return x + 1
    return inner

if __name__ == "__main__":
    with RingPoolExecutor(2) as pool:
        for name in SLOTTED:
            assert pool.submit(slotted, name).result() == slotted(name), name
        assert pool.submit(fibonacci, 30).result() == 832040
        assert list(pool.map(fibonacci, range(5))) == [0, 1, 1, 2, 3]
        assert pool.submit(about_fibonacci).result() == (832040, 7, "The n-th.", "fibonacci", 3)
        assert pool.submit(depth, [[], [[]]]).result() == 3
        assert pool.submit(about_depth, [[]]).result() == (2, "How deep it is.", "depth", 4)
        *words, made = pool.submit(lazily, 5).result()
        assert (words, vars(made)) == ([16, "int", "other"], {"x": 5, "double": 10})
        assert pool.submit(Lazy(5).plus, 2).result() == 7
        assert pool.submit(local(), 1).result() == 2
        assert pool.submit(lambda: (fibonacci(7), depth([]), Lazy(2).double)).result() == (13, 1, 4)
    print("well done")
"""


@pytest.mark.parametrize("how", ["a script", "-"])
def test_what_the_library_makes_of_classes_and_functions_of_main_is_that_in_workers(tmp_path: Path, how: str) -> None:
    script = tmp_path / "a_script.py"
    script.write_text(MADE_BY_LIBRARY)
    run = subprocess.run(
        [sys.executable, script if how == "a script" else how],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        input=MADE_BY_LIBRARY,
        capture_output=True,
        text=True,
        timeout=WATCHDOG_S,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "well done\n", "")


CACHED_IN_A_SCRIPT = """
import functools
from ringpool import RingPoolExecutor

@functools.cache
def cached(x):
    return x

if __name__ == "__main__":
    with RingPoolExecutor(1) as pool:
        print(*[pool.submit(lambda: (cached(1), cached.cache_info().hits)).result()[1] for _ in range(3)])
"""


def test_a_cache_of_a_script_is_one_for_all_tasks_of_a_worker(tmp_path: Path) -> None:
    script = tmp_path / "a_script.py"
    script.write_text(CACHED_IN_A_SCRIPT)
    run = subprocess.run(
        [sys.executable, script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=WATCHDOG_S,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "0 1 2\n", "")


def test_a_class_method_of_a_module_goes_by_name_from_a_main_that_is_no_file() -> None:
    program = """
from ringpool import RingPoolExecutor
from tests.coordinator.call_functions import Keeper, keep
with RingPoolExecutor(1, initializer=keep, initargs=(5,)) as pool:
    print(pool.submit(Keeper.kept).result(), *pool.map(Keeper.kept, [1, 2]))
    print(pool.submit(lambda: Keeper.kept()).result())
"""
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=WATCHDOG_S,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "5 6 7\n5\n", "")


def test_what_stands_under_the_guard_of_a_script_is_not_found_and_says_so(tmp_path: Path) -> None:
    script = tmp_path / "a_script.py"
    script.write_text("""
import logging
from ringpool import RingPoolExecutor
from ringpool.errors import ArgumentTransportError, InitializerError
logging.disable()

if __name__ == "__main__":
    def hidden(x):
        return x

    class Hidden:
        pass

    for method in ("forkserver", "spawn"):
        with RingPoolExecutor(1, mp_context=method) as pool:
            for name, outcome in (
                ("hidden", lambda: pool.submit(hidden, 1).result()),
                ("hidden", lambda: pool.submit(hidden, x=[1]).result()),
                ("hidden", lambda: list(pool.map(hidden, range(50)))),
                ("Hidden", lambda: pool.submit(id, Hidden()).result()),
                ("Hidden", lambda: list(pool.map(id, [Hidden()] * 50, chunksize=50))),
            ):
                try:
                    outcome()
                except ArgumentTransportError as error:
                    assert f"'{name}'" in str(error) and "at the top level of the module" in str(error), error
                else:
                    raise AssertionError(name)
            assert pool.submit(abs, -1).result() == 1
        with RingPoolExecutor(1, mp_context=method, initializer=hidden, initargs=(1,)) as pool:
            try:
                pool.submit(abs, -1).result()
            except InitializerError as error:
                assert "'hidden'" in str(error) and "at the top level of the module" in str(error), error
            else:
                raise AssertionError("initializer")
    with RingPoolExecutor(1, mp_context="fork") as pool:
        assert (pool.submit(hidden, 1).result(), list(pool.map(hidden, range(3)))) == (1, [0, 1, 2])
    print("well done")
""")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=WATCHDOG_S,
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "well done\n", "")


# ---- descriptors, and what has a reducer of its own ------------------------------------------------------------------


@pytest.fixture(scope="module", params=["spawn", "forkserver", "fork"])
def by_method(request: pytest.FixtureRequest) -> Iterator[RingPoolExecutor]:
    with RingPoolExecutor(1, multiprocessing.get_context(request.param)) as made:
        yield made


def test_an_end_of_a_pipe_arrives_as_that(by_method: RingPoolExecutor) -> None:
    here, there = multiprocessing.Pipe()
    by_method.submit(functions.send_to, there, 1).result(WATCHDOG_S)
    list(by_method.map(functions.send_to, [there] * 3, [2, 3, 4]))
    by_method.submit(lambda: there.send(5)).result(WATCHDOG_S)
    assert [here.recv() for _ in range(5) if here.poll(WATCHDOG_S)] == [1, 2, 3, 4, 5]


def test_an_end_of_a_pipe_comes_back_as_that(by_method: RingPoolExecutor) -> None:
    end = by_method.submit(functions.open_pipe).result(WATCHDOG_S)
    by_method.submit(functions.answer, "well").result(WATCHDOG_S)
    assert end.poll(WATCHDOG_S)
    assert end.recv() == "well"


def test_a_socket_arrives_and_comes_back(by_method: RingPoolExecutor) -> None:
    here, there = socket.socketpair()
    with here, there:
        here.settimeout(WATCHDOG_S)
        by_method.submit(functions.send_to, there, "hi").result(WATCHDOG_S)
        assert here.recv(10) == b"hi"
        with by_method.submit(functions.hand_back, there).result(WATCHDOG_S) as back:
            back.sendall(b"ho")
        assert here.recv(10) == b"ho"


def test_no_worker_is_forked_while_what_sends_a_call_is_imported(run_program: RunProgram) -> None:
    """It could never import that: another thread's lock on the module is held in it for ever."""
    program = run_program(
        """
        start = supervisor.Supervisor._start

        def start_late(*arguments):
            time.sleep(0.2)
            start(*arguments)

        supervisor.Supervisor._start = start_late
        sys.meta_path.insert(0, Slow())
        with RingPoolExecutor(1, "fork") as pool:
            here, there = socket.socketpair()
            pool.submit(send, there).result()
            say("sent", here.recv(10))
        """,
        top="""
        import socket, time
        from importlib.machinery import PathFinder
        from ringpool import RingPoolExecutor
        from ringpool.coordinator import supervisor

        class Slow:
            @staticmethod
            def find_spec(name, path=None, target=None):
                if name != "multiprocessing.resource_sharer":
                    return None
                spec = PathFinder.find_spec(name, path)
                execute = spec.loader.exec_module

                def execute_slowly(module):
                    time.sleep(0.5)
                    execute(module)

                spec.loader.exec_module = execute_slowly
                return spec

        def send(end):
            end.sendall(b"hi")
        """,
    )
    assert program.wait_for("sent") == "b'hi'"
    assert program.finish() == 0, program.err


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_a_function_that_holds_a_socket_can_be_mapped(method: str) -> None:
    """A descriptor is fetched once, and a map's function is otherwise sent once for all workers."""
    here, there = socket.socketpair()
    with here, there, RingPoolExecutor(2, multiprocessing.get_context(method)) as own:
        here.settimeout(WATCHDOG_S)
        for function in (partial(functions.send_to, there), lambda word: functions.send_to(there, word)):
            list(own.map(function, "abcdefgh", chunksize=1))
            assert sorted(here.recv(1) for _ in range(8)) == [b"a", b"b", b"c", b"d", b"e", b"f", b"g", b"h"]
        assert list(own.map(partial(functions.hand_back_last, there), range(3), range(3))) == [0, 1, 2]
        end, other = multiprocessing.Pipe()
        list(own.map(partial(functions.send_to, other), range(4), chunksize=1))
        assert sorted(end.recv() for _ in range(4) if end.poll(WATCHDOG_S)) == [0, 1, 2, 3]


def test_an_exception_brings_its_end_of_a_pipe_and_leaves_the_workers_own(by_method: RingPoolExecutor) -> None:
    error = by_method.submit(functions.raise_with_end, "pipe").exception(WATCHDOG_S)
    assert isinstance(error, functions.EndError)
    by_method.submit(functions.answer, "well").result(WATCHDOG_S)
    with error.args[1] as end:
        assert end.poll(WATCHDOG_S)
        assert end.recv() == "well"


def test_an_exception_brings_its_socket(by_method: RingPoolExecutor) -> None:
    error = by_method.submit(functions.raise_with_end, "socket").exception(WATCHDOG_S)
    assert isinstance(error, functions.EndError)
    with error.args[1] as back:
        back.settimeout(WATCHDOG_S)
        by_method.submit(functions.send_to_kept, "hi").result(WATCHDOG_S)
        assert back.recv(10) == b"hi"


def test_no_descriptor_is_left_of_what_pickle_refuses(executor: RingPoolExecutor) -> None:
    here, there = socket.socketpair()
    with here, there:
        executor.submit(functions.hand_back_last, there, lambda: 1, 2).result(WATCHDOG_S)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            assert executor.submit(functions.hand_back_last, there, lambda: 1, 2).result(WATCHDOG_S) == 2
        assert len(os.listdir("/proc/self/fd")) < before + 20


def test_a_call_whose_connection_was_fetched_says_so_when_it_is_tried_again(tmp_path: Path) -> None:
    here, there = multiprocessing.Pipe()
    with here, there, RingPoolExecutor(1) as own:
        future = own.options(retries=1).submit(functions.die_once_with, there, str(tmp_path / "mark"))
        with pytest.raises(ArgumentTransportError, match="can be fetched once"):
            future.result(WATCHDOG_S)


def test_a_read_only_result_that_knows_protocol_5_alone_comes_back(executor: RingPoolExecutor) -> None:
    assert executor.submit(functions.read_only_by_protocol_5).result(WATCHDOG_S).array[0] == 1


def test_reducers_that_are_registered_with_multiprocessing_are_used(
    by_method: RingPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    # ``register`` could not be undone.
    monkeypatch.setitem(ForkingPickler._extra_reducers, functions.Registered, functions.reduce_registered)  # pyright: ignore
    sent = functions.Registered("sent")
    expected = "sent by its reducer"
    assert by_method.submit(functions.words_of_registered, sent).result(WATCHDOG_S) == expected
    assert by_method.submit(lambda: sent.words).result(WATCHDOG_S) == expected
    assert list(by_method.map(functions.words_of_registered, [sent, sent])) == [expected] * 2


# ---- arrays ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_bytes", "mapped"), [(1 << 13, False), (1 << 17, True), (1 << 24, True)])
def test_an_array_is_read_where_it_lies_in_shared_memory(
    executor: RingPoolExecutor, n_bytes: int, mapped: bool
) -> None:
    """Read-only in any case; a small one is copied, because a mapping costs more."""
    array = np.arange(n_bytes // 8, dtype=np.float64)
    expected = (float(array.sum()), False, mapped)
    assert executor.submit(functions.look_at_array, array).result(WATCHDOG_S) == expected
    assert executor.submit(functions.look_at_array, array=array).result(WATCHDOG_S) == expected
    assert list(executor.map(functions.look_at_array, [array])) == [expected]
    with pytest.raises(ValueError, match="read-only"):
        executor.submit(functions.write_to_array, array).result(WATCHDOG_S)


@pytest.mark.parametrize("n", [10, 1_000, 100_000])
@pytest.mark.parametrize("way", ["submit", "map", "map_unordered"])
def test_an_argument_that_comes_back_can_be_written_to(executor: RingPoolExecutor, way: str, n: int) -> None:
    """It was read-only in the worker."""
    array = np.arange(n, dtype=np.float64)
    for function in (functions.hand_back, functions.every_other, functions.head_of, functions.heads_of):
        if way == "submit":
            found: Any = executor.submit(function, array).result(WATCHDOG_S)
        else:
            [found] = getattr(executor, way)(function, [array])
        back = found["array"] if isinstance(found, dict) else found[0] if isinstance(found, list) else found
        assert back[0] == 0
        back[0] = 5
        assert array[0] == 0


@pytest.mark.parametrize("n", [1_000, 25_000, 400_000])
@pytest.mark.parametrize("way", ["keep_array", "keep_part", "keep_in_error"])
def test_an_array_that_a_worker_keeps_stays_as_it_was(way: str, n: int) -> None:
    """Shared memory of arrays that nobody has any more is written over."""
    with RingPoolExecutor(1) as own:
        for i in range(20):
            array = np.full(n, float(i))
            keep = getattr(functions, way)
            future = own.submit(keep, array=array) if way == "keep_part" else own.submit(keep, array)
            assert future.exception(WATCHDOG_S) is None or way == "keep_in_error"
            for value in (100.0, 200.0):
                assert own.submit(functions.sum_of, np.full(n, value)).result(WATCHDOG_S) == n * value
        assert list(own.map(functions.sum_of, [np.full(n, 300.0)] * 50)) == [n * 300.0] * 50
        assert own.submit(functions.first_of_kept).result(WATCHDOG_S) == list(range(20))


def test_an_array_that_a_fork_of_a_worker_has_stays_as_it_was(tmp_path: Path) -> None:
    gate, told = tmp_path / "gate", tmp_path / "told"
    with RingPoolExecutor(1) as own:
        own.submit(functions.leave_array_to_child, str(gate), str(told), np.full(25_000, 1.0)).result(WATCHDOG_S)
        for _ in range(20):
            own.submit(functions.sum_of, np.full(25_000, 2.0)).result(WATCHDOG_S)
        gate.touch()
        wait_until(lambda: told.exists() and told.read_text(), "the child's word")
        assert told.read_text() == "1.0"


def test_an_array_stays_as_it_was_where_a_child_returned_from_its_call() -> None:
    with RingPoolExecutor(1) as own:
        for i in range(4):
            own.submit(functions.keep_and_fork, np.full(25_000, float(i))).result(WATCHDOG_S)
        for _ in range(10):
            own.submit(functions.sum_of, np.full(25_000, 9.0)).result(WATCHDOG_S)
        assert own.submit(functions.first_of_kept).result(WATCHDOG_S) == [0, 1, 2, 3]


def test_an_array_that_an_orphan_of_a_dead_worker_has_stays_as_it_was(tmp_path: Path) -> None:
    gate, told, died = (str(tmp_path / name) for name in ("gate", "told", "died"))
    with RingPoolExecutor(1) as own:
        call = partial(functions.leave_array_to_child_and_die_once, gate, told, died)
        own.submit_with(TaskOptions(retries=1), call, np.full(25_000, 1.0)).result(WATCHDOG_S)
        for _ in range(20):
            own.submit(functions.sum_of, np.full(25_000, 2.0)).result(WATCHDOG_S)
        Path(gate).touch()
        wait_until(lambda: os.path.exists(told) and Path(told).read_text(), "the orphan's word")
        assert Path(told).read_text() == "1.0"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")
def test_a_task_that_becomes_somebody_else_gives_large_results() -> None:
    with RingPoolExecutor(1) as own:
        for user in (0, 0, 65534, 65534):
            assert own.submit(functions.give_bytes_as, user, 500_000).result(WATCHDOG_S) == bytes(500_000)


def test_shared_memory_that_nobody_reads_is_written_over_and_no_more_is_kept_than_that() -> None:
    def spare() -> dict[int, int]:
        """Bytes by inode: one blob keeps its inode, whatever its name."""
        names = [name for name in shared_memory_of(os.getpid()) if re.search(r"\.s\d+(\.\d+)?$", name)]
        return {(found := os.stat(f"/dev/shm/{name}")).st_ino: found.st_size for name in names}

    with RingPoolExecutor(2) as own:
        for n in (1_000, 25_000):
            own.submit(functions.sum_of, np.ones(n)).result(WATCHDOG_S)
            wait_until(spare, "a spare one")
            before = spare()
            for _ in range(20):
                assert own.submit(functions.sum_of, np.ones(n)).result(WATCHDOG_S) == n
            assert spare() == before
        for n_bytes in (3_200_000, 1_048_576 - 70, 1_048_576 - 69):  # too large, some by a hair
            assert own.submit(len, bytes(n_bytes)).result(WATCHDOG_S) == n_bytes
            assert spare() == before
        for _ in range(20):
            own.submit(functions.ones, 25_000).result(WATCHDOG_S)
        assert len(spare().keys() - before.keys()) <= 2 * 4
        for future in [own.submit(functions.sum_of, np.ones(100_000)) for _ in range(100)]:
            future.result(WATCHDOG_S)
        assert sum(spare().values()) <= 10 << 20


def test_an_array_that_comes_back_can_be_written_to(executor: RingPoolExecutor) -> None:
    for n in (10, 100_000):
        array = executor.submit(functions.ones, n).result(WATCHDOG_S)
        array += 1
        assert float(array.sum()) == 2 * n


@pytest.mark.parametrize("way", ["submit", "map", "map_unordered"])
def test_more_arrays_are_kept_than_there_are_descriptors(executor: RingPoolExecutor, way: str) -> None:
    n, limits = 100, resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 20, limits[1]))
    try:
        if way == "submit":
            futures = [executor.submit(functions.ones, 10_000) for _ in range(n)]
            kept = [future.result(WATCHDOG_S) for future in futures]
        else:
            kept = list(getattr(executor, way)(functions.ones, [10_000] * n))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [float(array.sum()) for array in kept] == [10_000] * n


def test_arrays_of_all_kinds_arrive_as_they_were(executor: RingPoolExecutor) -> None:
    square = np.arange(10_000, dtype=np.int32).reshape(100, 100)
    for array in (square, square.T, square[::2, ::3], np.asfortranarray(square), square.astype("U10"), np.array([[]])):
        found = executor.submit(functions.identity, array).result(WATCHDOG_S)
        assert found.dtype == array.dtype
        assert np.array_equal(found, array)
    mixed = np.array([{"a": 1}, None, "x"], dtype=object)
    assert list(executor.submit(functions.identity, mixed).result(WATCHDOG_S)) == list(mixed)


# ---- what cannot travel ----------------------------------------------------------------------------------------------


def test_what_cannot_be_sent_is_its_futures_exception(executor: RingPoolExecutor) -> None:
    future = executor.submit(functions.identity, functions.NeverPickled())
    with pytest.raises(TypeError, match="not to be pickled") as caught:
        future.result(WATCHDOG_S)
    assert "made of instead" in "".join(caught.value.__notes__)
    with pytest.raises(ArgumentTransportError, match="refuses to be rebuilt"):
        executor.submit(functions.identity, functions.NeverRebuilt()).result(WATCHDOG_S)
    assert serves(executor)


def test_what_cannot_come_back_is_its_futures_exception(executor: RingPoolExecutor) -> None:
    with pytest.raises(TypeError, match="not to be pickled") as caught:
        executor.submit(functions.meet, "return what cannot be pickled").result(WATCHDOG_S)
    assert "return value, of type NeverPickled, cannot be pickled" in "".join(caught.value.__notes__)
    with pytest.raises(ResultTransportError, match="refuses to be rebuilt") as refused:
        executor.submit(functions.meet, "return what cannot be rebuilt").result(WATCHDOG_S)
    assert "call_functions.py" in str(refused.value.__cause__), "where it was refused"
    assert serves(executor)


@pytest.mark.parametrize(
    "hazard", ["raise what cannot be pickled", "raise what cannot be rebuilt", "raise what is rebuilt as a text"]
)
def test_an_exception_that_cannot_travel_comes_in_words(executor: RingPoolExecutor, hazard: str) -> None:
    error = executor.submit(functions.meet, hazard).exception(WATCHDOG_S)
    assert isinstance(error, RemoteError)
    assert error.type_name.startswith(("Never", "Rebuilt"))
    assert error.message == "words of it"
    assert "in meet" in error.traceback
    assert "in meet" in str(error.__cause__)
    assert serves(executor)


@pytest.mark.parametrize("kind", [functions.FrozenError, functions.LengthlessError])
def test_an_exception_that_refuses_much_comes_as_it_is(executor: RingPoolExecutor, kind: type[Exception]) -> None:
    hazard = "raise what cannot be changed" if kind is functions.FrozenError else "raise what cannot be printed"
    error = executor.submit(functions.meet, hazard).exception(WATCHDOG_S)
    assert type(error) is kind
    assert "in meet" in str(error.__cause__)


def test_whatever_a_decoder_raises_the_future_ends(
    executor: RingPoolExecutor, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def decode_error(_value: object) -> BaseException:
        raise SystemExit("of a decoder")

    monkeypatch.setattr(values, "decode_error", decode_error)
    error = executor.submit(functions.meet, "raise").exception(WATCHDOG_S)
    assert isinstance(error, SystemExit)
    assert "of a decoder" in capsys.readouterr().err
    assert executor.submit(functions.double, 2).result(WATCHDOG_S) == 4


def test_an_exception_comes_with_its_causes_and_notes(executor: RingPoolExecutor) -> None:
    error = executor.submit(functions.raise_from, "the inner one").exception(WATCHDOG_S)
    assert type(error) is LookupError
    assert error.args == ("the outer one",)
    assert error.__notes__ == ["a note of the task"]
    text = str(error.__cause__)
    words = ["in raise_from", "in _refuse", "ArithmeticError: refuses the inner one", "direct cause", "the outer one"]
    places = [text.find(word) for word in [*words, "a note of the task"]]
    assert places[0] > -1
    assert places == sorted(places)


def test_an_exception_in_a_circle_comes_as_it_is(executor: RingPoolExecutor) -> None:
    error = executor.submit(functions.raise_cyclic).exception(WATCHDOG_S)
    assert isinstance(error, functions.CyclicError)
    assert error.me is error
    assert "the context" in str(error.__cause__)


# ---- what a task may do to its process -------------------------------------------------------------------------------


def test_a_task_that_exits_the_interpreter_raises_that(executor: RingPoolExecutor) -> None:
    with pytest.raises(SystemExit) as caught:
        executor.submit(functions.meet, "exit", 2).result(WATCHDOG_S)
    assert caught.value.code == 3
    with pytest.raises(KeyboardInterrupt):
        executor.submit(functions.meet, "raise an interrupt").result(WATCHDOG_S)
    assert serves(executor)


@pytest.mark.parametrize(
    ("hazard", "number", "exitcode"),
    [("by a signal", signal.SIGKILL, None), ("by a fault", signal.SIGSEGV, None), ("by os._exit", None, 5)],
)
def test_a_task_that_ends_its_process_fails_alone(
    executor: RingPoolExecutor, hazard: str, number: int | None, exitcode: int | None
) -> None:
    futures = [executor.submit(functions.double, item) for item in range(50)]
    dying = executor.submit(functions.meet, f"die {hazard}")
    futures += [executor.submit(functions.double, item) for item in range(50, 100)]
    error = dying.exception(WATCHDOG_S)
    assert isinstance(error, WorkerDiedError)
    assert isinstance(error, BrokenProcessPool)
    assert (error.signal, error.exitcode, error.deaths) == (number, exitcode, 1)
    assert "tests.coordinator.call_functions.meet" in str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert [future.result(WATCHDOG_S) for future in futures] == list(range(0, 200, 2))


def test_the_error_of_a_death_names_what_was_called(executor: RingPoolExecutor) -> None:
    """And nothing of its arguments, which may be large or secret, nor by its ``repr``, which may fail."""
    dying = functions.Dying()
    calls: list[tuple[Callable[..., Any], str]] = [
        (partial(functions.meet, "die by a signal", item=b"secret" * 100_000), "call_functions.meet"),
        (lambda: functions.meet("die by a signal"), "lambda"),
        (dying.method, "call_functions.Dying.method"),
        (dying, "Dying"),
        (partial(partial(dying.method)), "call_functions.Dying.method"),
    ]
    for call, name in calls:
        error = executor.submit(call).exception(WATCHDOG_S)
        assert isinstance(error, WorkerDiedError), error
        assert name in str(error)
        assert len(str(error)) < 300
    assert serves(executor)


@pytest.mark.parametrize(("first", "last"), [(0, 3), (3, 4096), (0, 4096)])
def test_a_task_that_closes_descriptors_keeps_its_result(executor: RingPoolExecutor, first: int, last: int) -> None:
    pid = executor.submit(functions.close_descriptors, first, last).result(WATCHDOG_S)
    wait_until(lambda: pid not in executor.worker_pids, "its worker's end")
    assert serves(executor)
    found = list(
        executor.map(lambda x: x and functions.close_descriptors(3, 4096) * 0 + x, [0] * 300 + [1] + [0] * 300)
    )
    assert found == [0] * 300 + [1] + [0] * 300


@pytest.mark.parametrize("bend", [functions.take_descriptors, functions.lower_the_limit_of_descriptors])
def test_a_task_that_leaves_no_descriptor_costs_no_other_anything(bend: Callable[[], int]) -> None:
    with RingPoolExecutor(1) as own:
        pid = own.submit(bend).result(WATCHDOG_S)
        assert [own.submit(functions.double, i).result(WATCHDOG_S) for i in range(3)] == [0, 2, 4]
        assert own.submit(bend).result(WATCHDOG_S) != pid
        assert own.submit(functions.length, bytes(100_000)).result(WATCHDOG_S) == 100_000
        assert own.submit(bend).result(WATCHDOG_S) != pid
        assert list(own.map(functions.double, range(100))) == list(range(0, 200, 2))
        assert own.stats().failed == 0


def test_what_fails_for_want_of_descriptors_is_the_last_of_its_process() -> None:
    items = [False] * 100 + [True] + [False] * 100
    with RingPoolExecutor(1) as own:
        found = list(own.map(functions.take_descriptors_or_one, items, return_exceptions=True))
    failed = [item for item in found if isinstance(item, OSError)]
    assert [item.errno for item in failed] == [errno.EMFILE]
    assert [item for item in found if not isinstance(item, OSError)] == [*items[:-1]]


def test_a_task_that_forks_has_one_result(executor: RingPoolExecutor, tmp_path: Path) -> None:
    path = str(tmp_path / "notes")
    pids = [executor.submit(functions.fork_and_return, path).result(WATCHDOG_S) for _ in range(5)]
    assert set(pids) <= set(executor.worker_pids)
    assert sorted(functions.noted(path)) == [0] * 5 + [1] * 5
    assert executor.submit(functions.fork_and_raise).result(WATCHDOG_S) in executor.worker_pids
    assert set(executor.map(functions.fork_and_return, [path] * 20)) <= set(executor.worker_pids)
    assert serves(executor)


def test_a_task_may_leave_a_child_behind(tmp_path: Path) -> None:
    gate, done = tmp_path / "gate", tmp_path / "done"
    with RingPoolExecutor(1) as own:
        worker, child = own.submit(functions.leave_child, str(gate), str(done)).result(WATCHDOG_S)
        assert own.submit(os.getpid).result(WATCHDOG_S) == worker
        assert is_alive(child)
    gate.touch()
    wait_until(lambda: not is_alive(child), "the child's end")


def test_a_death_is_noticed_though_a_child_lives_on(executor: RingPoolExecutor, tmp_path: Path) -> None:
    """One that holds all that the worker had open."""
    gate, path = tmp_path / "gate", str(tmp_path / "notes")
    with pytest.raises(WorkerDiedError):
        executor.submit(functions.leave_child_and_die, path, str(gate)).result(WATCHDOG_S)
    [child] = functions.noted(path)
    assert serves(executor)
    gate.touch()  # unless it ended with its worker's group, because it had not left that yet
    wait_until(lambda: not is_alive(child), "the child's end")


def test_what_tasks_print_is_printed(run_program: RunProgram) -> None:
    body = """
        with RingPoolExecutor(2) as pool:
            futures = [pool.submit(functions.print_much, 1 << 20) for _ in range(4)]
            assert [future.result() for future in futures] == [1 << 20] * 4
        say("done")
        """
    program = run_program(body, top=TOP)
    assert program.finish() == 0, program.err
    lines = program.out.splitlines()
    assert program.out.count(".") == 4 * ((1 << 20) // 100) * 99  # in whichever order: four processes share the pipe
    assert lines.count("done") == 1
    program.assert_nothing_is_left()


def test_a_task_that_changes_directory_changes_its_own(executor: RingPoolExecutor, tmp_path: Path) -> None:
    assert executor.submit(functions.change_directory, str(tmp_path)).result(WATCHDOG_S) == str(tmp_path)
    assert set(executor.map(lambda _: os.getcwd(), range(20))) == {os.getcwd()}


def test_a_task_that_ignores_signals_does_not_keep_its_worker_from_ending() -> None:
    with RingPoolExecutor(1) as own:
        before = own.submit(functions.handler_of, signal.SIGTERM).result(WATCHDOG_S)
        pid = own.submit(functions.install_handlers).result(WATCHDOG_S)
        assert own.submit(functions.handler_of, signal.SIGTERM).result(WATCHDOG_S) == before
    assert not is_alive(pid)


@pytest.mark.parametrize("daemon", [True, False])
def test_threads_that_a_task_left_do_not_keep_its_worker_from_ending(
    daemon: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    with RingPoolExecutor(1) as own:
        pid = own.submit(functions.start_threads, daemon).result(WATCHDOG_S)
        assert own.submit(os.getpid).result(WATCHDOG_S) == pid
    assert not is_alive(pid)
    words = f"ringpool: workers ({pid},) have not ended 5 s after they were told to, and are killed\n"
    assert capfd.readouterr().err == ("" if daemon else words)


def test_a_thread_that_a_task_left_has_time_to_end(tmp_path: Path) -> None:
    path = tmp_path / "notes"
    with RingPoolExecutor(1) as own:
        own.submit(functions.note_in_a_thread, str(path), 0.3).result(WATCHDOG_S)
        assert not path.exists()
    assert functions.noted(path) == [1]


_VIEW = memoryview(np.array([1.5, 2.5]))


@pytest.mark.parametrize(
    "send",
    [
        lambda pool: pool.submit(sum, _VIEW).result(),
        lambda pool: pool.submit(functools.partial(sum, _VIEW)).result(),
        lambda pool: pool.submit(lambda view=_VIEW: sum(view)).result(),
        lambda pool: list(pool.map(sum, [_VIEW, _VIEW])),
        lambda pool: pool.submit(functions.identity, {"a": [_VIEW]}).result(),
    ],
    ids=["argument", "partial", "default", "items", "inside"],
)
def test_a_memoryview_is_refused_and_not_sent_as_its_bytes(
    executor: RingPoolExecutor, send: Callable[[RingPoolExecutor], object]
) -> None:
    with pytest.raises(TypeError, match="cannot pickle 'memoryview' object"):
        send(executor)


def test_a_type_of_ctypes_without_a_name_is_named_in_the_error(executor: RingPoolExecutor) -> None:
    with pytest.raises(pickle.PicklingError, match="c_int_Array_2"):
        executor.submit(len, (ctypes.c_int * 2)()).result()
