"""Outputs of file tasks: there whole or not at all, under their names, beside nothing that was not wanted."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests import task_functions as tasks
from tests.coordinator.program import WATCHDOG_S, Program, kill_worker, wait_until

from ringpool import Coordinator, FileResult, FileTask, PathLock, RetryPolicy, WorkerDiedError
from ringpool.errors import (
    AtomicWriteError,
    OutputCollisionError,
    OutputMissingError,
    ParameterError,
    RingpoolError,
)

MakeFiles = Callable[[int], list[Path]]
ATTEMPTS = 20


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Where outputs go; it does not exist yet."""
    return tmp_path / "outputs" / "below"


def names_in(place: Path) -> list[str]:
    """What is there, but for the directory of locks."""
    return sorted(set(os.listdir(place)) - {".ringpool"}) if place.exists() else []


# ---- how it goes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durability", ["none", "atomic", "data", "full"])
def test_an_output_appears_under_its_name_and_nothing_else(file: Path, place: Path, durability: str) -> None:
    with Coordinator(1, durability=durability) as own:
        assert own.submit_file_task(tasks.copy, file, place / "copy").result(WATCHDOG_S) == 5
    assert (place / "copy").read_bytes() == b"hello"
    assert names_in(place) == ["copy"]


@pytest.mark.parametrize("durability", ["none", "atomic", "data", "full"])
def test_outputs_in_groups_appear_under_their_names_and_nothing_else(
    files: MakeFiles, place: Path, durability: str
) -> None:
    paths = files(150)
    with Coordinator(2, durability=durability) as own:
        run = own.run_file_tasks(
            tasks.copy, paths, output=lambda src: place / src.name[-1] / src.name, group_commit=True
        )
        for result in run:
            assert result.ok
            assert result.output.read_text() == result.path.name, "a result comes when its output is in place"
    assert sorted(path.name for path in place.glob("?/[!.]*")) == [path.name for path in paths]


def test_every_input_of_a_run_has_its_output(pool: Coordinator, files: MakeFiles, place: Path) -> None:
    paths = files(300)
    results = list(pool.run_file_tasks(tasks.copy, paths, output=lambda src: place / src.name[-1] / src.name))
    assert all(r.ok and r.output == place / r.path.name[-1] / r.path.name for r in results)
    assert sorted(path.read_text() for path in place.glob("?/[!.]*")) == [path.name for path in paths]


def test_an_input_may_come_with_its_output(pool: Coordinator, file: Path, place: Path) -> None:
    inputs: list[Any] = [FileTask(file, place / "a"), FileTask(str(file), str(place / "b")), file]
    results = pool.run_file_tasks(tasks.copy, inputs, output=lambda _: os.fsencode(place / "c"))
    assert sorted(os.fsdecode(r.output) for r in results) == [str(place / name) for name in "abc"]
    assert names_in(place) == ["a", "b", "c"]


def test_a_function_may_do_without_an_output(pool: Coordinator, file: Path, place: Path) -> None:
    inputs = [FileTask(file, place / "a"), FileTask(file)]
    assert [r.value for r in pool.run_file_tasks(tasks.copy_or_size, inputs)] == [5, 5]
    assert names_in(place) == ["a"]


def test_the_staging_name_keeps_the_suffixes(pool: Coordinator, file: Path, place: Path) -> None:
    staged = Path(pool.submit_file_task(tasks.staging_of, file, place / "a.tar.gz").result(WATCHDOG_S))
    assert staged.name.endswith(".tar.gz")
    assert staged.parent == place
    assert names_in(place) == ["a.tar.gz"]


def test_an_output_replaces_what_was_there_and_keeps_its_mode(pool: Coordinator, file: Path, place: Path) -> None:
    place.mkdir(parents=True)
    target = place / "copy"
    target.write_text("old and longer")
    target.chmod(0o640)
    assert pool.submit_file_task(tasks.copy, file, target).result(WATCHDOG_S) == 5
    assert target.read_bytes() == b"hello"
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_an_input_may_be_its_own_output(pool: Coordinator, file: Path) -> None:
    assert pool.submit_file_task(tasks.copy, file, file).result(WATCHDOG_S) == 5
    assert file.read_bytes() == b"hello"


def test_a_link_is_followed(pool: Coordinator, file: Path, place: Path) -> None:
    place.mkdir(parents=True)
    (place / "link").symlink_to("real")
    assert pool.submit_file_task(tasks.copy, file, place / "link").result(WATCHDOG_S) == 5
    assert (place / "link").is_symlink()
    assert (place / "real").read_bytes() == b"hello"


# ---- inputs that become outputs --------------------------------------------------------------------------------------


def test_a_task_may_move_its_input_to_its_output(pool: Coordinator, file: Path, place: Path) -> None:
    pool.submit_file_task(tasks.move, file, place / "moved").result(WATCHDOG_S)
    assert (place / "moved").read_text() == "hello"
    assert not file.exists()
    assert names_in(place) == ["moved"]


@pytest.mark.parametrize("ending", ["raise", "kill"])
@pytest.mark.parametrize("is_directory", [False, True])
def test_an_input_that_was_moved_by_a_task_that_fails_is_kept(
    run_program: Callable[..., Program], tmp_path: Path, place: Path, ending: str, is_directory: bool
) -> None:
    """It is the only copy."""
    source = tmp_path / "source"
    content = source / "inside" if is_directory else source
    content.parent.mkdir(exist_ok=True)
    content.write_text("hello")
    program = run_program(
        f"""
        with Coordinator(1) as pool:
            params = {{"ending": {ending!r}}}
            pool.submit_file_task(tasks.move, {str(source)!r}, {str(place / "moved.txt")!r}, params=params).exception()
        """
    )
    assert program.finish() == 0, program.err
    [kept] = names_in(place)
    assert kept.endswith(".txt.kept")
    assert (place / kept / "inside" if is_directory else place / kept).read_text() == "hello"
    assert f"input {source} is gone, and its output is not in its place but in {place / kept}" in program.err


def test_a_directory_that_was_moved_to_an_outputs_place_is_kept(pool: Coordinator, tmp_path: Path, place: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/inside").write_text("hello")
    error = pool.submit_file_task(tasks.move, tmp_path / "source", place / "moved").exception(WATCHDOG_S)
    assert isinstance(error, OutputMissingError)
    [kept] = names_in(place)
    assert (place / kept / "inside").read_text() == "hello"


@pytest.mark.parametrize("ending", ["raise", "kill"])
def test_what_a_symlink_led_to_is_kept_where_a_task_that_fails_has_moved_it(
    pool: Coordinator, tmp_path: Path, file: Path, place: Path, ending: str
) -> None:
    (tmp_path / "link").symlink_to(file)
    params = {"ending": ending}
    future = pool.submit_file_task(tasks.move_what_it_leads_to, tmp_path / "link", place / "moved", params=params)
    assert future.exception(WATCHDOG_S) is not None
    [kept] = names_in(place)
    assert (place / kept).read_text() == "hello"


@pytest.mark.parametrize("ending", ["raise", "kill"])
def test_an_input_that_was_moved_is_kept_though_another_has_its_name(
    pool: Coordinator, file: Path, place: Path, ending: str
) -> None:
    future = pool.submit_file_task(tasks.move_and_put_another_there, file, place / "moved", params={"ending": ending})
    assert future.exception(WATCHDOG_S) is not None
    assert "hello" in [(place / kept).read_text() for kept in names_in(place)]


@pytest.mark.parametrize("ending", ["raise", "kill"])
def test_an_input_that_was_moved_is_kept_though_a_symlink_leads_to_it(
    pool: Coordinator, file: Path, place: Path, ending: str
) -> None:
    future = pool.submit_file_task(tasks.move_and_link, file, place / "moved", params={"ending": ending})
    assert future.exception(WATCHDOG_S) is not None
    [kept] = names_in(place)
    assert (place / kept).read_text() == "hello"


def test_what_a_dead_worker_wrote_of_an_input_that_is_no_file_is_removed(
    pool: Coordinator, tmp_path: Path, place: Path
) -> None:
    task = FileTask("s3://bucket/1", place / "made")
    params = {"mark": str(tmp_path / "mark")}
    [result] = pool.run_file_tasks(tasks.die_half_through_once, [task], params=params)
    assert result.ok
    assert (place / "made").read_text() == "whole"
    assert names_in(place) == ["made"]


def test_a_tasks_own_alarm_does_not_come_into_what_is_done_about_its_failure(files: MakeFiles, place: Path) -> None:
    inputs = [FileTask(path, place / path.name) for path in files(300)]
    with Coordinator(1) as own:
        for result in own.run_file_tasks(tasks.fail_under_alarms, inputs):
            assert isinstance(result.error, (ValueError, TimeoutError))
        assert own.stats().worker_deaths == 0
    assert names_in(place) == []


def test_what_a_task_wrote_of_an_input_that_never_was_is_removed_when_it_fails(
    pool: Coordinator, tmp_path: Path, place: Path
) -> None:
    task = FileTask(tmp_path / "a name", place / "made")
    [result] = pool.run_file_tasks(tasks.write_half, [task], params={"then": "raise"})
    assert isinstance(result.error, ValueError)
    assert names_in(place) == []


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        b"x" * 255,
        b"." + b"y" * 250 + b".png",
        b"a" * 200 + b"." + b"b" * 54,
        b"\xff\xfe.bin",
        "\u00e9\u4e2d".encode(),
        b" ",
        b"new\nline",
        b"-rf",
    ],
    ids=["long", "long, hidden", "long suffix", "not UTF-8", "not ASCII", "blank", "line", "dash"],
)
def test_names_of_every_kind_work(pool: Coordinator, tmp_path: Path, name: bytes) -> None:
    source = os.path.join(os.fsencode(tmp_path), name)
    with open(source, "wb") as made:
        made.write(b"hello")
    target = os.path.join(os.fsencode(tmp_path), b"outputs", name)
    assert pool.submit_file_task(tasks.copy, source, target).result(WATCHDOG_S) == 5
    [result] = pool.run_file_tasks(tasks.copy, [os.fsdecode(source)], output=lambda _: target)
    assert result.ok
    assert names_in(tmp_path / "outputs") == [os.fsdecode(name)]
    assert pool.submit_file_task(tasks.name, source).result(WATCHDOG_S) == os.fsdecode(name)


def test_a_name_that_is_too_long_is_an_error_of_its_task(pool: Coordinator, file: Path, place: Path) -> None:
    error = pool.submit_file_task(tasks.copy, file, place / ("x" * 256)).exception(WATCHDOG_S)
    assert isinstance(error, OSError | RingpoolError)
    assert "x" * 256 in str(error)
    assert names_in(place) == []


def test_paths_longer_than_a_record_work(pool: Coordinator, tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["d" * 200] * 7)
    deep.mkdir(parents=True)
    (deep / "input").write_bytes(b"hello")
    futures = [pool.submit_file_task(tasks.copy, deep / "input", deep / f"output-{i}") for i in range(20)]
    assert [future.result(WATCHDOG_S) for future in futures] == [5] * 20
    assert names_in(deep) == sorted(["input", *(f"output-{i}" for i in range(20))])


def test_relative_paths_mean_where_the_caller_is(
    pool: Coordinator, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    assert pool.submit_file_task(tasks.copy, "input", "copy-1").result(WATCHDOG_S) == 5
    moving = {"to": str(tmp_path / "elsewhere")}
    assert pool.submit_file_task(tasks.copy_after_moving, "input", "copy-2", params=moving).result(WATCHDOG_S) == 5
    inputs = [FileTask("input", "copy-3"), FileTask("input", "copy-4")]
    run = pool.run_file_tasks(tasks.copy_after_moving, inputs, params=moving)
    assert [(r.value, r.path) for r in run] == [(5, "input")] * 2
    assert names_in(tmp_path / "elsewhere") == []
    assert {f"copy-{i}" for i in (1, 2, 3, 4)} < set(names_in(tmp_path))


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "params", "kind"),
    [
        (tasks.write_nothing, {}, OutputMissingError),
        (tasks.write_directory, {}, OutputMissingError),
        (tasks.write_half, {"then": "raise"}, ValueError),
        (tasks.write_half, {"then": "exit"}, SystemExit),
        (tasks.write_half, {"then": "die"}, WorkerDiedError),
    ],
)
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_task_that_fails_leaves_no_trace(
    pool: Coordinator,
    file: Path,
    place: Path,
    function: Callable[..., None],
    params: dict[str, str],
    kind: type[BaseException],
    old: bytes | None,
) -> None:
    target = place / "output.txt"
    if old is not None:
        place.mkdir(parents=True)
        target.write_bytes(old)
    error = pool.submit_file_task(function, file, target, params=params).exception(WATCHDOG_S)
    assert isinstance(error, kind)
    if isinstance(error, OutputMissingError):
        assert str(target) in str(error)
    wait_until(lambda: names_in(place) == ([] if old is None else ["output.txt"]), "a tidy directory")
    assert old is None or target.read_bytes() == old


def test_an_output_of_a_second_attempt_is_that_of_the_second(pool: Coordinator, file: Path, place: Path) -> None:
    marks = file.parent / "marks"
    marks.mkdir()
    params = {"marks": str(marks)}
    [result] = pool.run_file_tasks(tasks.die_once_with_output, [FileTask(file, place / "output")], params=params)
    assert (result.error, result.attempts) == (None, 2)
    assert (place / "output").read_text() == "second"
    assert names_in(place) == ["output"]


def test_a_target_that_is_a_directory_is_refused(pool: Coordinator, file: Path, place: Path) -> None:
    (place / "there").mkdir(parents=True)
    error = pool.submit_file_task(tasks.copy, file, place / "there").exception(WATCHDOG_S)
    assert isinstance(error, AtomicWriteError)
    assert str(place / "there") in str(error)
    assert names_in(place) == ["there"]
    assert names_in(place / "there") == []


@pytest.mark.parametrize("n", [0, 100, 5000, 1_000_000])
def test_a_target_that_becomes_a_directory_is_an_error_of_its_task(
    pool: Coordinator, file: Path, place: Path, n: int
) -> None:
    """Found out when the output is to be put in place, however large the result beside it is."""
    before = pool.stats().worker_deaths
    target = place / "there"
    params = {"target": str(target), "n": n}
    error = pool.submit_file_task(tasks.block_target, file, target, params=params).exception(WATCHDOG_S)
    assert isinstance(error, AtomicWriteError)
    assert names_in(place) == ["there"]
    assert pool.stats().worker_deaths == before


@pytest.mark.parametrize("target", ["/proc/output", "/dev/null", "/proc/self/no/output", "/dev/null/output"])
def test_a_target_where_nothing_can_be_made_is_refused(pool: Coordinator, file: Path, target: str) -> None:
    error = pool.submit_file_task(tasks.copy, file, target).exception(WATCHDOG_S)
    assert isinstance(error, OSError)
    assert not os.path.isfile(target)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_to_is_an_error_of_its_task(
    pool: Coordinator, file: Path, place: Path
) -> None:
    place.mkdir(parents=True)
    place.chmod(0o500)
    try:
        error = pool.submit_file_task(tasks.copy, file, place / "output").exception(WATCHDOG_S)
        assert isinstance(error, PermissionError | RingpoolError)
        assert names_in(place) == []
    finally:
        place.chmod(0o700)


@pytest.mark.parametrize(
    ("function", "dst", "words"),
    [(tasks.size, "output", "no parameter dst"), (tasks.copy, None, "has no output")],
)
def test_a_function_and_its_output_must_fit(
    pool: Coordinator, file: Path, place: Path, function: Callable[..., Any], dst: str | None, words: str
) -> None:
    target = None if dst is None else place / dst
    before = pool.stats()
    with pytest.raises(ParameterError, match=words):
        pool.submit_file_task(function, file, target)
    with pytest.raises(ParameterError, match=words):
        list(pool.run_file_tasks(function, [FileTask(file, target)]))
    assert pool.stats() == before
    assert names_in(place) == []


# ---- collisions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", ["output", "./output", ".//./output"])
def test_two_inputs_with_one_output_are_refused(pool: Coordinator, files: MakeFiles, place: Path, second: str) -> None:
    one, two = files(2)
    inputs = [FileTask(one, place / "output"), FileTask(two, f"{place}/{second}")]
    run = pool.run_file_tasks(tasks.copy, inputs)
    assert next(run).path == one
    with pytest.raises(OutputCollisionError) as caught:
        next(run)
    assert str(one) in str(caught.value)
    assert str(two) in str(caught.value)
    assert (place / "output").read_text() == one.name


def test_an_output_may_be_written_again_by_a_later_run(pool: Coordinator, files: MakeFiles, place: Path) -> None:
    for path in files(5):
        [result] = pool.run_file_tasks(tasks.copy, [path], output=lambda _: place / "output")
        assert result.ok
        assert (place / "output").read_text() == path.name


def test_an_output_pattern_that_raises_ends_the_run_after_what_was_drawn(
    pool: Coordinator, files: MakeFiles, place: Path
) -> None:
    paths = files(3)

    def output(src: Path) -> Path:
        if src == paths[2]:
            raise LookupError("no place for it")
        return place / src.name

    run = pool.run_file_tasks(tasks.copy, paths, output=output)
    assert {next(run).path, next(run).path} == set(paths[:2])
    with pytest.raises(LookupError, match="no place"):
        next(run)


# ---- groups ----------------------------------------------------------------------------------------------------------


def seen_staged(
    files: MakeFiles, place: Path, marked: dict[int, str], *, group_commit: bool = True, **more: Any
) -> dict[str, FileResult]:
    """The results of ``copy_counting_staged`` over 300 files, by one worker; some ``marked`` with what they do."""
    inputs = place.parent.parent / "inputs"
    paths = sorted(inputs.iterdir()) if inputs.exists() else files(300)
    for number, content in marked.items():
        paths[number].write_text(content)
    with Coordinator(1, durability="atomic", attempts_max=1) as own:
        run = own.run_file_tasks(
            tasks.copy_counting_staged, paths, output=lambda src: place / src.name, group_commit=group_commit, **more
        )
        results = {result.path.name: result for result in run}
    assert sorted(results) == [path.name for path in paths]
    for name, result in results.items():
        if result.ok:
            assert result.attempts == 1
            assert (place / name).read_text() == (inputs / name).read_text()
    assert not [name for name in names_in(place) if name.startswith(".")]
    return results


def test_outputs_of_short_tasks_wait_for_each_other_where_that_is_wanted(files: MakeFiles, place: Path) -> None:
    assert any(
        max(result.value for result in seen_staged(files, place, {}).values()) > 5
        for _ in range(ATTEMPTS)  # on a busy machine short tasks look long
    )


def test_no_output_waits_for_another_where_that_is_not_wanted(files: MakeFiles, place: Path) -> None:
    assert {result.value for result in seen_staged(files, place, {}, group_commit=False).values()} == {0}


def test_no_output_waits_for_tasks_that_are_known_to_be_long(files: MakeFiles, place: Path) -> None:
    """After two of them in a row the mean says so, whatever came before."""
    results = seen_staged(files, place, dict.fromkeys(range(100, 130), "nap"))
    assert [results[f"{number:05}"].value for number in range(102, 130)] == [0] * 28


def test_a_death_costs_none_of_those_whose_outputs_are_staged(files: MakeFiles, place: Path, tmp_path: Path) -> None:
    for _ in range(ATTEMPTS):  # on a busy machine short tasks look long
        results = seen_staged(files, place, dict.fromkeys(range(50, 300, 50), "die"))
        failed = {name: result.error for name, result in results.items() if not result.ok}
        assert sorted(failed) == [f"{number:05}" for number in range(50, 300, 50)]
        assert all(isinstance(error, WorkerDiedError) for error in failed.values())
        if max(map(int, (tmp_path / "log").read_text().split())) > 0:  # so many were staged beside one that died
            return
    raise AssertionError("none died with others' outputs staged")


def test_an_output_that_cannot_be_put_in_place_fails_alone(files: MakeFiles, place: Path) -> None:
    results = seen_staged(files, place, {120: "block", 121: "block"})
    failed = {name: result.error for name, result in results.items() if not result.ok}
    assert sorted(failed) == ["00120", "00121"]
    assert all(isinstance(error, AtomicWriteError) for error in failed.values())
    assert names_in(place / "00120") == []


def test_no_output_waits_while_a_call_is_to_be_tried_again(files: MakeFiles, place: Path) -> None:
    retry = RetryPolicy(max_attempts=2, delay_s=0.01)
    results = seen_staged(files, place, dict.fromkeys(range(50, 300, 25), "fail once"), retry=retry)
    again = [results[f"{number:05}"].value for number in range(50, 300, 25)]
    assert again == [0] * 10


@pytest.mark.parametrize("durability", ["atomic", "data", "full"])
def test_a_group_that_is_committed_before_a_second_try_takes_nothing_from_that(
    files: MakeFiles, place: Path, durability: str
) -> None:
    paths = files(100)
    for path in paths[5::10]:
        path.write_text("fail once")
    retry = RetryPolicy(max_attempts=2, delay_s=0.0)
    with Coordinator(1, durability=durability) as own:
        run = own.run_file_tasks(
            tasks.copy_counting_staged, paths, output=lambda src: place / src.name, group_commit=True, retry=retry
        )
        assert [result.error for result in run] == [None] * 100
        assert own.stats().worker_deaths == 0
    assert names_in(place) == [path.name for path in paths]


@pytest.mark.parametrize("durability", ["atomic", "data", "full"])
@pytest.mark.parametrize("group_commit", [False, True])
def test_an_output_may_turn_out_to_be_on_another_file_system(
    file: Path, place: Path, other_file_system: Path, durability: str, group_commit: bool
) -> None:
    with Coordinator(1, durability=durability) as own:
        [result] = own.run_file_tasks(
            tasks.copy_to_elsewhere,
            [file],
            output=lambda _: place / "copy",
            params={"elsewhere": str(other_file_system)},
            group_commit=group_commit,
        )
        assert result.error is None
        assert own.stats().worker_deaths == 0
    assert (other_file_system / "copy").read_bytes() == b"hello"
    assert names_in(place) == ["copy"]


@pytest.mark.parametrize("durability", ["atomic", "data", "full"])
@pytest.mark.parametrize("deed", ["close", "close and open"])
def test_descriptors_that_a_task_closes_cost_no_other_its_output(
    files: MakeFiles, place: Path, durability: str, deed: str
) -> None:
    """Not even those by which its group is to be synced."""
    paths = files(300)
    for path in paths[39::40]:
        path.write_text(deed)
    with Coordinator(1, durability=durability) as own:
        run = own.run_file_tasks(
            tasks.copy_closing, paths, output=lambda src: place / src.name[-1] / src.name, group_commit=True
        )
        assert [result.error for result in run] == [None] * 300
    assert sorted(path.name for path in place.glob("?/[!.]*")) == [path.name for path in paths]


@pytest.mark.parametrize("durability", ["atomic", "full"])
def test_a_task_that_leaves_no_descriptor_has_its_output_all_the_same(
    files: MakeFiles, place: Path, durability: str
) -> None:
    """The coordinator puts it in its place; and the next task has a new worker."""
    paths = files(10)
    with Coordinator(1, durability=durability) as own:
        run = own.run_file_tasks(
            tasks.copy_leaving_no_descriptor, paths, output=lambda src: place / src.name[-1] / src.name
        )
        assert [result.error for result in run] == [None] * 10
        assert own.stats().worker_deaths >= 9
    assert sorted(path.name for path in place.glob("?/[!.]*")) == [path.name for path in paths]


def test_the_child_of_a_call_that_forked_is_not_tried_again(files: MakeFiles, place: Path, tmp_path: Path) -> None:
    """It would write where its parent's output is staged, and put in place what others have staged."""
    paths = files(20)
    with Coordinator(1, durability="atomic") as own:
        retry = RetryPolicy(max_attempts=2, delay_s=0.0)
        run = own.run_file_tasks(tasks.copy_forking, paths, output=lambda src: place / src.name, retry=retry)
        assert [result.unwrap() for result in run] == [0] * 20
    assert len((tmp_path / "log").read_text().split()) == 20
    assert names_in(place) == [path.name for path in paths]


@pytest.mark.parametrize("group_commit", [False, True])
def test_a_timer_that_a_task_has_left_does_not_come_into_a_commit(
    files: MakeFiles, place: Path, group_commit: bool
) -> None:
    paths = files(100)
    with Coordinator(1) as own:
        run = own.run_file_tasks(
            tasks.copy_leaving_a_timer, paths, output=lambda src: place / src.name, group_commit=group_commit
        )
        assert [result.error for result in run] == [None] * 100
        assert own.stats().worker_deaths == 0
    assert names_in(place) == [path.name for path in paths]


def test_a_worker_that_dies_waiting_for_a_lock_stops_nobody(file: Path, place: Path) -> None:
    """Whoever settles what it had staged does not wait for the lock in its stead, and all others for him."""
    place.mkdir(parents=True)
    with Coordinator(1) as own, PathLock(place / "copy"):
        future = own.submit_file_task(tasks.copy, file, place / "copy")
        while not future.done():
            wait_until(lambda: future.done() or names_in(place) != [], "an output that is staged")
            for pid in own.worker_pids:
                kill_worker(pid)
                wait_until(lambda pid=pid: pid not in own.worker_pids, "its end")
        assert isinstance(future.exception(), RingpoolError)
        assert own.submit_file_task(tasks.size, file).result(WATCHDOG_S) == 5
    assert names_in(place) == []


# ---- under fire ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_commit", [False, True])
def test_outputs_are_whole_although_workers_are_killed(files: MakeFiles, place: Path, group_commit: bool) -> None:
    paths = files(400)
    for path in paths:
        path.write_text(path.name * 20_000)
    results = []
    with Coordinator(2, attempts_max=20) as pool:  # results come in crowds: one task may meet several kills
        run = pool.run_file_tasks(tasks.copy, paths, output=lambda src: place / src.name, group_commit=group_commit)
        for result in run:
            results.append(result)
            if len(results) % 40 == 0:
                for pid in pool.worker_pids[:1]:
                    kill_worker(pid)
    assert sorted(r.path for r in results) == paths
    assert [r.error for r in results if not r.ok] == []
    assert names_in(place) == [path.name for path in paths]
    assert all((place / path.name).read_text() == path.read_text() for path in paths)
