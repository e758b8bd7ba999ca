"""Inputs of a list are drawn many at once; whatever is among them, what is drawn is what one by one would be."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, strategies as st
from tests import task_functions as task_functions

from ringpool import Coordinator, FileResult, FileTask
from ringpool.coordinator.drawing import Drawing
from ringpool.coordinator.filerun import TOGETHER_PATH_BYTES_MAX, _pieces_of
from ringpool.coordinator.tickets import Ticket
from ringpool.errors import ParameterError, PathNameError
from ringpool.workers import tasks

LONG = "/" + "x" * TOGETHER_PATH_BYTES_MAX


class NamedFile(os.PathLike[str]):
    def __init__(self, name: str) -> None:
        self.name = name

    def __fspath__(self) -> str:
        return self.name


class Name(str):
    """A string that is no mere string."""


names = st.one_of(
    st.sampled_from(["/a", "b", "", "/", ".", "a\0b", "/\0", "\udc80", "\ud800", "x/../y", "/a//b", "ü", LONG]),
    st.text(max_size=5).map(lambda text: "/" + text),
    st.text(max_size=5),
)
sources = st.one_of(
    names,
    names.map(Path),
    st.sampled_from([b"/bytes", b"relative", b"", Name("/n"), NamedFile("/p"), FileTask("/t"), FileTask("/t", None)]),
)


def plain(src: str) -> None:
    """A task function without an output."""


def needs_output(src: str, dst: str) -> None:
    """A task function that needs one."""


def drawing_of(inputs: Any, function: Any = plain, output: Any = None) -> Drawing:
    # No inbox and no maker of tickets: both are for outputs, of which none is drawn here.
    return Drawing(inputs, output, "tests:f", tasks.signature_of(function, "tests:f"), None, None)  # type: ignore[arg-type]


def source_of(item: Any) -> Any:
    return item.src if isinstance(item, FileTask) else item


def told(drawn: Any) -> tuple[Any, Any]:
    """Path and input, or why there is no path."""
    if isinstance(drawn, FileResult):
        assert isinstance(drawn.error, PathNameError)
        return str(drawn.error), drawn.path
    return drawn


def together_then_one_by_one(drawing: Drawing, n: int) -> Iterator[tuple[Any, Any]]:
    while (found := drawing.together(n)) is not None:
        paths, items = found
        assert len(paths) == len(items) <= n
        yield from zip(paths, items, strict=True)
        if len(paths) < n:
            return
    yield from map(told, drawing)


@given(st.lists(sources, max_size=30), st.integers(1, 8), st.integers(0, 5), st.sampled_from([list, tuple]))
def test_what_is_drawn_together_is_what_is_drawn_one_by_one(
    inputs: list[Any], n: int, n_before: int, kind: type
) -> None:
    wanted = [told(drawn) for drawn in drawing_of(iter(inputs))]
    drawing = drawing_of(kind(inputs))
    found = [told(drawn) for drawn in islice(drawing, n_before)]
    found += together_then_one_by_one(drawing, n)
    assert found == wanted
    assert [item for _, item in found] == [source_of(item) for item in inputs]


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 16])
def test_a_list_of_any_length_comes_to_its_end(n: int) -> None:
    inputs = [f"/{i}" for i in range(n)]
    drawing = drawing_of(inputs)
    found: list[Any] = []
    while (drawn := drawing.together(8)) is not None and drawn[0]:
        found += drawn[1]
    assert found == inputs


def test_strings_and_paths_of_a_list_are_drawn_together() -> None:
    inputs: list[Any] = ["/a", Path("/b"), "c", Path("d/e")]
    here = os.getcwdb()
    assert drawing_of(inputs).together(9) == (
        [b"/a", b"/b", os.path.join(here, b"c"), os.path.join(here, b"d/e")],
        inputs,
    )


@pytest.mark.parametrize("odd", [b"/bytes", Name("/n"), NamedFile("/p"), FileTask("/t"), "a\0b", "", "\ud800", LONG])
def test_what_is_not_plain_is_drawn_one_by_one(odd: Any) -> None:
    drawing = drawing_of(["/a", odd, "/b"])
    assert drawing.together(3) is None
    assert [told(drawn)[1] for drawn in drawing] == ["/a", source_of(odd), "/b"]


@pytest.mark.parametrize("make", [iter, dict.fromkeys])
def test_only_lists_and_tuples_are_drawn_together(make: Any) -> None:
    assert drawing_of(make(["/a", "/b"])).together(2) is None


def test_outputs_are_given_one_by_one() -> None:
    assert drawing_of(["/a"], output=lambda src: f"{src}.out").together(1) is None


def test_a_function_that_needs_an_output_is_refused_its_first_input() -> None:
    drawing = drawing_of(["/a"], needs_output)
    assert drawing.together(1) is None
    with pytest.raises(ParameterError, match="the task has no output"):
        next(iter(drawing))


def test_relative_paths_are_those_of_the_directory_where_the_first_was_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing = drawing_of(["a", "b", "c"])
    monkeypatch.chdir(tmp_path)
    assert told(next(iter(drawing))) == (os.fsencode(tmp_path / "a"), "a")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert drawing.together(2) == ([os.fsencode(tmp_path / "b"), os.fsencode(tmp_path / "c")], ["b", "c"])


@given(st.lists(st.integers(1, 40), max_size=50), st.integers(10, 100))
def test_pieces_have_all_paths_and_fit_where_they_can(lengths: list[int], room: int) -> None:
    paths = [b"x" * n for n in lengths]
    cuts = list(_pieces_of(paths, room))
    pieces = [paths[at:end] for at, end in cuts]
    assert [path for piece in pieces for path in piece] == paths
    assert all(pieces)
    for piece in pieces:
        assert len(piece) == 1 or len(msgspec.msgpack.encode(piece)) <= room


def test_a_run_over_a_list_gives_each_input_once(pool: Coordinator, tmp_path: Path) -> None:
    """Strings and paths, absolute and not, the same one twice, and some that can name no file, far into the run."""
    (tmp_path / "file").write_text("content")
    file = tmp_path / "file"
    inputs: list[Any] = [str(file), file, os.path.relpath(file), Path(os.path.relpath(file))] * 1000
    inputs[3000:3000] = ["", "a\0b", os.fsencode(file), FileTask(file), NamedFile(str(file))]
    results = list(pool.run_file_tasks(task_functions.size, inputs))
    assert sorted(map(repr, (result.path for result in results))) == sorted(repr(source_of(item)) for item in inputs)
    assert sorted(repr(result.path) for result in results if not result.ok) == [repr(""), repr("a\0b")]
    assert {result.value for result in results if result.ok} == {len("content")}


def test_an_input_whose_path_raises_lets_those_before_it_end(pool: Coordinator, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content")
    inputs = [str(tmp_path / "file")] * 2990
    broken: Any = object.__new__(type(Path()))
    results: list[FileResult] = []
    with pytest.raises(AttributeError):
        results.extend(pool.run_file_tasks(task_functions.size, [*inputs, broken, *inputs]))
    assert sum(result.ok for result in results) == len(inputs)


def test_a_run_that_another_thread_closes_while_it_draws_begins_no_vector(
    pool: Coordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("content")
    inputs = [str(tmp_path / "file")] * 20_000
    run = pool.run_file_tasks(task_functions.size, inputs)
    together, closed = run._drawn.together, threading.Event()
    n_retired = 0
    retired = run._inbox._on_retired

    def retire() -> None:
        nonlocal n_retired
        n_retired += 1
        retired()

    monkeypatch.setattr(run._inbox, "_on_retired", retire)

    def close_meanwhile(n: int) -> Any:
        found = together(n)
        if n > 100 and not closed.is_set():
            closer = threading.Thread(target=run.close)
            closer.start()
            closer.join()
            pool._pump.call(lambda: None)  # and the pump has met all that was queued by then
            closed.set()
        return found

    monkeypatch.setattr(run._drawn, "together", close_meanwhile)
    list(run)
    assert closed.is_set()
    pool._pump.wait_idle()
    assert pool.stats().completed + pool.stats().failed < 19_000
    pool._pump.call(lambda: None)  # it has met the second abandoning too
    assert not run._inbox._left
    assert n_retired == 1


def test_what_a_signal_handler_raises_ends_the_run(
    pool: Coordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("content")
    run = pool.run_file_tasks(task_functions.size, [str(tmp_path / "file")] * 5000)
    queue, n_queued = pool._pump.queue, 0

    def strike(ticket: Ticket) -> None:
        nonlocal n_queued
        queue(ticket)
        n_queued += 1
        if n_queued == 10:
            raise TimeoutError("by a handler")

    monkeypatch.setattr(pool._pump, "queue", strike)
    with pytest.raises(TimeoutError, match="by a handler"):
        list(run)
    monkeypatch.undo()
    assert list(run) == []
    assert [result.ok for result in pool.run_file_tasks(task_functions.size, [tmp_path / "file"])] == [True]
