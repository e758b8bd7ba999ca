"""What a terminal shows of a run: the two lines while it runs, and what stays of them."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from rich.console import Console
from tests.cli.command import TASKS, Terminal, wait_until

from ringpool.cli.screen import Count, Screen, in_words
from ringpool.coordinator.jobwork import Progress


def drawn(progress: Progress, width: int = 100) -> list[str]:
    """The lines of ``progress`` on a terminal that has so many columns."""
    screen = Screen(progress)
    console = Console(width=width, force_terminal=True, color_system=None, legacy_windows=False)
    with console.capture() as capture:
        console.print(screen.draw(width))
    return [re.sub(r"\x1b\[[\d;]*m", "", line).rstrip() for line in capture.get().splitlines()]


# ---- frames ----------------------------------------------------------------------------------------------------------


def test_a_frame_has_the_bar_and_the_counts() -> None:
    progress = Progress(total=2000, done=1200, skipped=10, failed=3, dead=7, retried=2, worker_deaths=1, workers=2)
    bar, state = drawn(progress)
    assert re.fullmatch(r"━+[╸ ━]*   61 %   1,220 of 2,000 files   0 files/s   -:--:-- left", bar)
    assert state == "3 failed   7 set aside   10 done before   2 retried   2 workers   1 death"


def test_until_the_number_of_inputs_is_known_no_share_is_shown() -> None:
    bar, state = drawn(Progress(done=1200, workers=1))
    assert "1,200 files" in bar
    assert "%" not in bar
    assert state == "0 failed   1 worker"


def test_a_run_that_stops_says_what_it_waits_for() -> None:
    progress = Progress(total=9, workers=2, under_way=3, stopping="Ctrl-C")
    assert drawn(progress)[1] == "stopping: 2 files still run, Ctrl-C again to stop at once", "one has not begun"
    progress = Progress(total=9, workers=2, under_way=1, stopping="more than 2 failures")
    assert drawn(progress)[1] == "stopping (more than 2 failures): 1 file still runs, Ctrl-C to stop at once"
    progress = Progress(total=9, workers=2, under_way=1000, stopping="Ctrl-C")
    assert drawn(progress)[1] == "stopping: 2 files still run, Ctrl-C again to stop at once"


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_a_frame_has_two_lines_at_any_width(width: int) -> None:
    progress = Progress(total=2_000_000, done=1_200_000, skipped=100_000, failed=3, dead=7, retried=2, workers=64)
    lines = drawn(progress, width)
    assert len(lines) == 2
    assert all(len(line) <= width for line in lines)


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (20, "60 %"),
        (41, "60 %   1,200 of 2,000 files   0 files/s"),
        (59, "60 %   1,200 of 2,000 files   0 files/s   -:--:-- left"),
    ],
)
def test_a_narrow_terminal_has_fewer_facts_and_each_of_them_whole(width: int, line: str) -> None:
    assert drawn(Progress(total=2000, done=1200, workers=2), width)[0] == line


def test_more_files_than_were_counted_are_no_more_than_all() -> None:
    assert "100 %   12 of 12 files" in drawn(Progress(total=10, done=12))[0]


def test_the_summary_says_what_came_of_all() -> None:
    progress = Progress(done=1, skipped=5, drained=2, failed=1, dead=1, retried=3, worker_deaths=2, input_bytes=1500)
    progress.output_bytes = 36
    progress.began_s = time.monotonic() - 2
    said = re.fullmatch(
        r"1 file done, 5 done before \(2 of them found in what a killed run had left\), 1 failed, 1 set aside, "
        r"3 retried, 2 worker deaths, 1\.5 kB of input, 36 B of output, (\d+\.\d) s, [\d.]+ files/s",
        in_words(progress),
    )
    assert said
    assert float(said[1]) >= 2


# ---- how many there are ----------------------------------------------------------------------------------------------


def test_inputs_are_counted_in_a_thread_that_ends_with_the_run() -> None:
    progress = Progress()
    with Count(progress, lambda: range(1000)):
        wait_until(lambda: progress.total == 1000, "the count")
    progress = Progress()
    count = Count(progress, lambda: iter(int, 1))  # without an end
    with count:
        pass
    wait_until(lambda: not count._thread.is_alive(), "the end of the thread")
    assert progress.total is None
    with Count(progress, lambda: None):
        pass
    assert progress.total is None


# ---- a terminal ------------------------------------------------------------------------------------------------------


def test_a_terminal_shows_counts_that_rise_and_keeps_the_summary_alone(here: Path) -> None:
    place = here / "in"
    place.mkdir()
    for number in range(150):
        (place / str(number)).touch()
    (place / "1").unlink()
    with Terminal("run", f"{TASKS}:copy_slowly", "in", "--out", "out/{relpath}", "--workers", "2") as terminal:
        terminal.wait_for(r"\d+ %   \d+ of 149 files")
        terminal.wait_for("0 failed   2 workers")
        assert terminal.finish() == 0
    screen = terminal.screen
    assert re.fullmatch(r"ringpool: 149 files done, 0 failed, 0 B of input, [\d.]+ s, [\d.]+ files/s", screen.text)
    counts = [int(found[1]) for frame in screen.frames if (found := re.search(r"(\d+) of 149 files", frame))]
    assert counts == sorted(counts)
    assert len(set(counts)) >= 5
    whole = [frame for frame in screen.frames if re.search("files/s.*left\n", frame)]
    assert all(len(frame.splitlines()) == 2 for frame in whole)


def test_values_that_scroll_on_the_terminal_are_not_disturbed(numbers: Path) -> None:
    with Terminal("run", f"{TASKS}:size", numbers) as terminal:
        assert terminal.finish() == 0
    assert b"\x1b" not in terminal.screen.written
    lines = terminal.screen.text.splitlines()
    assert sorted(line.split()[0] for line in lines[:-1]) == [f"{numbers}/{n}.txt" for n in range(8)]
    assert lines[-1].startswith("ringpool: 8 files done")


def test_failures_are_listed_when_the_lines_are_gone(mixed: Path) -> None:
    with Terminal("run", "--exec", "test {stem} = fine && cp {src} {dst}", mixed, "--out", "out/{relpath}") as terminal:
        assert terminal.finish() == 1
    assert terminal.screen.text.count("ringpool: failed: ") == 4
    assert "failures by kind: 4 CommandError" in terminal.screen.text
