"""``ringpool.benchmark``: how a function of the user's own scales over workers, and what a call of it costs.

    function, inputs --checked--> Load --> contestants: no pool, 1, 2, 4 ... workers --take_turns--> BenchmarkReport

``ways`` has how the function is run, ``scaling`` what is made of the figures. Outputs are written below a directory of
their own on the file system of the real ones, and removed after each pass.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

from ringpool.bench import measure, ways
from ringpool.bench.scaling import BenchmarkReport
from ringpool.bench.ways import Load, Turn
from ringpool.coordinator import numbers, signals
from ringpool.coordinator.coordinator import Coordinator
from ringpool.coordinator.inputs import InputFile, list_inputs
from ringpool.coordinator.job import Inputs, Job
from ringpool.coordinator.lists import relpath_of
from ringpool.coordinator.outputs import NamedOutputs, with_outputs
from ringpool.errors import BenchmarkError, InputMissingError
from ringpool.shm import layout
from ringpool.workers import tasks

ROUNDS = 5
TURN_S = 1.0
INPUTS_A_WORKER_MIN = 2
NO_POOL = "no pool"
METHOD = "forkserver"
OnTurn = Callable[[int, str], object]


def benchmark(
    function: Callable[..., Any] | str,
    inputs: Inputs | Iterable[Any],
    workers: Sequence[int] = (1, 2, 4),
    *,
    output: str | Mapping[str, str] | None = None,
    params: Mapping[str, Any] | None = None,
    files: bool = True,
    rounds: int = ROUNDS,
    turn_s: float = TURN_S,
    sample: int | None = None,
    durability: str = "full",
    mp_context: str = METHOD,
    on_turn: OnTurn | None = None,
) -> BenchmarkReport:
    """How ``function`` scales over ``workers``, and what a call costs; ``print`` the report.

    ``inputs`` are those of a ``Job``: a file, directory, glob or list, a sequence of them, or any other iterable of
    paths. ``function`` is called as ``Coordinator.run_file_tasks`` calls it, or with ``output`` (a pattern, or several
    by name) as a ``Job`` does. What it writes goes below a temporary directory beside ``output``, never to it. With
    ``files=False`` inputs are values of any kind, for ``RingPoolExecutor.map``. ``params`` go to every call.

    Each number of workers, and a plain loop without a pool, has a turn in each of ``rounds`` rounds, after one that
    warms up. A turn runs through the inputs until it has lasted ``turn_s`` seconds. ``sample``: use so many of the
    inputs, drawn evenly, the same ones each time. ``durability``: of outputs. ``mp_context``: a start method's name.
    ``on_turn``: called before each turn with its round (0: warming up) and whose turn it is.

    A call that fails counts as one, and the report says how many did, and by what. Raises ``BenchmarkError`` where
    all of a turn fail, and where the function moves or replaces its inputs: what it has written to its outputs is kept
    then, and the error says where. Raises ``ValueError`` for numbers out of range and too few inputs;
    ``UnknownFunctionError``, ``ParameterError``, ``InputMissingError``, ``OutputPatternError``,
    ``OutputCollisionError`` as a job does.
    """
    _check_numbers(workers, rounds, turn_s, sample, mp_context)
    # A caller may not check types.
    if params is not None and not isinstance(params, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"params must be a mapping of names to values, not {params!r}")
    name, called, outputs = _checked(function, output, params or {}, durability, files=files)
    drawn = _files(inputs, () if outputs is None else outputs.bases) if files else _values(inputs)
    items, n_listed = _sample(drawn, sample)
    _check_inputs(items, workers, "file" if files else "item")
    words, scratch = _moved_outputs(outputs, items)
    load = Load(called, items, dict(params or {}), words, scratch, durability, turn_s, mp_context)
    way, how = _way(load)
    with Coordinator(1, mp_context=mp_context):  # the fork server is to import what workers need, before the plain loop
        pass
    contestants = {NO_POOL: partial(_checked_turn, name, partial(ways.alone, load))}
    contestants |= {_label(n): partial(_checked_turn, name, partial(way, load, n)) for n in workers}
    machine = measure.describe_machine("ringpool")
    with signals.handled():  # in the turn of the plain loop, and between turns, there is no pool
        series, others = measure.take_turns(contestants, rounds, on_turn)
    turns = {0: series[NO_POOL]} | {n: series[_label(n)] for n in workers}
    noun = "file" if files else "item"
    return BenchmarkReport(name, how, noun, len(items), n_listed, rounds, turn_s, turns, others, machine)


def _label(workers: int) -> str:
    return "1 worker" if workers == 1 else f"{workers} workers"


def _way(load: Load) -> tuple[Callable[[Load, int], Turn], str]:
    """What runs it on a pool, and what that is called."""
    if not load.is_files:
        return ways.mapped, "RingPoolExecutor.map"
    if load.outputs:
        return ways.job, f"Job.run, durability {load.durability}"
    return ways.filerun, "Coordinator.run_file_tasks"


def _checked_turn(name: str, run: Callable[[], Turn]) -> Turn:
    """A turn. Raises ``BenchmarkError`` where all of its calls failed."""
    turn = run()
    if turn.n and turn.n_failed == turn.n:
        kinds = "; ".join(failure.in_words() for failure in turn.failures.values())
        raise BenchmarkError(name, f"all {turn.n:,} calls failed: {kinds}")
    return turn


# ---- what can be wrong -----------------------------------------------------------------------------------------------


def _check_numbers(workers: Sequence[int], rounds: int, turn_s: float, sample: int | None, method: str) -> None:
    if isinstance(workers, int | str):
        raise TypeError(f"workers must be a sequence of numbers, such as [1, 2, 4], not {workers!r}")
    if not workers:
        raise ValueError("workers names no number of workers; give some, such as [1, 2, 4]")
    for n in workers:
        layout.check_number("workers", n, layout.WORKERS_MAX)
    if len({*workers}) < len(workers):
        raise ValueError(f"workers names a number twice: {', '.join(map(str, workers))}; leave one of them away")
    for what, number in (("rounds", rounds), ("sample", 1 if sample is None else sample)):
        if numbers.whole(what, number, "a whole number") < 1:
            raise ValueError(f"{what} must be 1 or more, not {number!r}")
    if not 0 < numbers.real("turn_s", turn_s) < math.inf:
        raise ValueError(f"turn_s must be more than 0 seconds, and have an end, not {turn_s!r}")
    methods = multiprocessing.get_all_start_methods()
    if method not in methods:
        raise ValueError(f"mp_context must be one of {', '.join(methods)}, not {method!r}")


def _checked(
    function: Callable[..., Any] | str,
    output: str | Mapping[str, str] | None,
    params: Mapping[str, Any],
    durability: str,
    *,
    files: bool,
) -> tuple[str, Callable[..., Any] | str, NamedOutputs | None]:
    """The function's name, how ``Load`` has it, and its outputs. All that is wrong with them is raised here."""
    if files:
        job = Job(function, (), output, params=params, durability=durability)  # nothing is begun by that
        name, signature = tasks.describe(function)
        tasks.require(name, signature, params)
        return name, name, job.outputs
    if output is not None:
        raise ValueError("output is for files, and files=False says that the inputs are none: leave one of them away")
    if isinstance(function, str):
        return function, tasks.resolve(function), None
    name = f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', repr(function))}"
    return name, function, None


def _check_inputs(items: Sequence[Any], workers: Sequence[int], noun: str) -> None:
    n_wanted = INPUTS_A_WORKER_MIN * max(workers)
    if not items:
        raise ValueError(f"there are no inputs: give at least {n_wanted} {noun}s for {_label(max(workers))}")
    if len(items) < n_wanted:
        raise ValueError(
            f"too few inputs to measure {_label(max(workers))}: {len(items)}; give at least {n_wanted} {noun}s "
            f"({INPUTS_A_WORKER_MIN} for each worker), or measure fewer workers"
        )


# ---- inputs and outputs ----------------------------------------------------------------------------------------------


def _files(inputs: Any, bases: Sequence[Path]) -> Iterator[InputFile]:
    """The files that ``inputs`` stand for, as a job has them; what is below ``bases`` is no input."""
    if isinstance(inputs, str | bytes | os.PathLike):
        inputs = [inputs]
    named = cast("Sequence[Any]", inputs)
    if isinstance(inputs, list | tuple) and not any(isinstance(one, InputFile) for one in named):
        return list_inputs(
            [one if isinstance(one, str) else Path(os.fsdecode(one)) for one in named], exclude_under=bases
        )
    return map(_as_file, named)


def _values(inputs: Any) -> Iterator[Any]:
    try:
        return iter(inputs)
    except TypeError:
        raise TypeError(f"inputs must be an iterable of values, not {inputs!r}") from None


def _as_file(one: Any) -> InputFile:
    file = one if isinstance(one, InputFile) else InputFile(os.fsdecode(one), relpath_of(os.fsdecode(one)))
    if not os.path.exists(file.path):
        raise InputMissingError(file.path)
    return file


def _sample(drawn: Iterator[Any], n_wanted: int | None) -> tuple[list[Any], int]:
    """``n_wanted`` of what is drawn, each with the same chance, in order; and how many were drawn. Constant memory."""
    chance = random.Random(0)
    kept: list[tuple[int, Any]] = []
    n = 0
    for n, item in enumerate(drawn, 1):
        if n_wanted is None or len(kept) < n_wanted:
            kept.append((n, item))
        elif (place := chance.randrange(n)) < n_wanted:
            kept[place] = (n, item)
    kept.sort(key=lambda pair: pair[0])
    return [item for _, item in kept], n


def _moved_outputs(outputs: NamedOutputs | None, items: Sequence[Any]) -> tuple[tuple[str, ...], str]:
    """The patterns in the form of ``NamedOutputs``, and the directory to make temporary ones in: that which is there of
    the real outputs', so that both are on one file system. Raises ``OutputCollisionError``, ``PermissionError``.
    """
    if outputs is None:
        return (), ""
    for _ in with_outputs(items, outputs, one_source=False):  # a collision is told with the real names
        pass
    names = outputs.names or ("",)
    patterns = [
        f"{name}={one.pattern}" if name else one.pattern for name, one in zip(names, outputs.patterns, strict=True)
    ]
    place = Path(os.path.abspath(outputs.base))
    while not place.is_dir():
        place = place.parent
    if not os.access(place, os.W_OK):
        raise PermissionError(f"{place}, where the outputs would go, cannot be written to: give another output pattern")
    return tuple(patterns), str(place)
