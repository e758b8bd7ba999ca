"""What is shown of a run while it runs, and the sentences about it at its end.

    standard error   a terminal                                       anything else
    meanwhile        two lines that change, and then go               a line every 3 s
    at the end       failures, what of which kind, the summary, how to go on

    ━━━━━━━━━━━━━━━━━━━━━━━╸━━━━━━━━━━━  61 %   1,220 of 2,000 files   310 files/s   0:00:03 left
    3 failed   10 done before   2 workers   1 death

The first line's bar only moves to and fro until it is known how many inputs there are: ``Count`` lists them a second
time, in a thread. Where Ctrl-C has come, the second line says what is waited for.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING

from ringpool.cli.lines import AS_FILE, command, counted, may_redraw, one_line, say, size_in_words
from ringpool.cli.stopping import REASONS

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ringpool.coordinator.jobwork import Progress

PROGRESS_INTERVAL_S = 3.0  # between two lines where standard error is no terminal
REDRAWS_PER_S = 8
FAILURES_SHOWN_MAX = 20
RATE_OVER_S = 10.0  # the rate that is shown, and what is left by it, is that of so many seconds
COUNT_STEP, COUNT_PAUSE_S = 256, 0.005  # the run goes before
BAR_COLUMNS_MIN, BAR_COLUMNS_MAX, GAP_COLUMNS = 10, 40, 3


# ---- in words --------------------------------------------------------------------------------------------------------


class Failures:
    """The failures of a run: the first of them in words, and how many of which kind."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self._first: list[str] = []

    def add(self, path: str, kind: str, message: str) -> None:
        """One file has failed, or is set aside."""
        self.kinds[kind] += 1
        if len(self._first) < FAILURES_SHOWN_MAX:
            self._first.append(f"{path}: {kind}: {one_line(message) if message else kind}")

    def say(self) -> None:
        """Each in a line, up to twenty; then how many of which kind."""
        for failure in self._first:
            say(f"failed: {failure}")
        n = self.kinds.total()
        if n > len(self._first):
            say(f"failed: {n - len(self._first)} more")
        if n > 1:
            say("failures by kind: " + ", ".join(f"{n} {kind}" for kind, n in self.kinds.most_common()))


def in_words(progress: Progress) -> str:
    """Files, failures, bytes, time and rates, in one line."""
    spent_s = time.monotonic() - progress.began_s if progress.began_s else 0.0
    words = [f"{counted(progress.done, 'file')} done"]
    if progress.skipped:
        recovered = f" ({progress.drained} of them found in what a killed run had left)" if progress.drained else ""
        words.append(f"{progress.skipped} done before{recovered}")
    words.append(f"{progress.failed} failed")
    if progress.dead:
        words.append(f"{progress.dead} set aside")
    if progress.retried:
        words.append(f"{progress.retried} retried")
    if progress.worker_deaths:
        words.append(counted(progress.worker_deaths, "worker death"))
    words.append(f"{size_in_words(progress.input_bytes)} of input")
    if progress.output_bytes:
        words.append(f"{size_in_words(progress.output_bytes)} of output")
    words.append(f"{spent_s:.1f} s")
    n_run = progress.done + progress.failed
    if n_run:
        words.append(_rate_in_words(n_run / max(spent_s, 1e-3)))
    return ", ".join(words)


def _rate_in_words(rate_per_s: float) -> str:
    return f"{rate_per_s:.0f} files/s" if rate_per_s >= 10 else f"{rate_per_s:.2g} files/s"


def ways_on(progress: Progress, directory: str, *, is_repeatable: bool) -> str:
    """What one does about failures; empty where there are none. ``is_repeatable``: whether its inputs can be read again
    by ringpool.
    """
    if not (progress.failed or progress.dead):
        return ""
    ways = [f"`{command('status', directory)}` says what failed and why"]
    if progress.failed and is_repeatable:
        ways.append(f"`{command('retry', directory)}` does the failed files again")
    elif progress.failed:
        ways.append("the same command with the same list does the failed files again")
    if progress.dead:
        dead = f"`{command('retry', directory, '--dead')}`"
        if is_repeatable:
            ways.append(f"{dead} those that are set aside too")
        else:
            ways.append(f"{AS_FILE}, and then {dead} do those that are set aside")
    return "; ".join(ways)


# ---- how many there are ----------------------------------------------------------------------------------------------


class Count:
    """Counts ``files`` into ``progress.total``, in a thread, as long as it is entered; slowly: the run goes before."""

    def __init__(self, progress: Progress, files: Callable[[], Iterable[object] | None]) -> None:
        self._progress = progress
        self._files = files
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._count, name="ringpool-count", daemon=True)

    def __enter__(self) -> Count:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._ended.set()
        self._thread.join(1.0)  # a directory of a dead file server may hold it; it is a daemon

    def _count(self) -> None:
        with contextlib.suppress(Exception):  # what is wrong with inputs, the run says
            files = self._files()
            if files is None:
                return
            n = 0
            for n, _ in enumerate(files, 1):
                if not n % COUNT_STEP and self._ended.wait(COUNT_PAUSE_S):
                    return
            self._progress.total = n


# ---- on a terminal ---------------------------------------------------------------------------------------------------


class Screen:
    """The two lines of a run, from its ``progress``, whenever somebody draws them."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._samples: deque[tuple[float, int]] = deque()

    def draw(self, columns: int) -> RenderableType:
        """The lines as they are now, for a terminal that has so many columns."""
        from rich.console import Group

        progress = self._progress
        seen, total = progress.seen, progress.total
        if total is not None:
            total = max(total, seen)
        facts = self._facts(seen, total, self._rate_per_s(seen))
        if _columns_of(facts) + GAP_COLUMNS + BAR_COLUMNS_MIN > columns:
            return Group(_narrow(facts, columns), self._state())
        return Group(_with_bar(facts, seen, total), self._state())

    def _facts(self, seen: int, total: int | None, rate_per_s: float) -> list[str]:
        if total is None:
            return [f"{seen:,} files", _rate_in_words(rate_per_s)]
        share = f"{100 * seen // max(total, 1)} %"
        left = f"{_clock((total - seen) / rate_per_s)} left" if rate_per_s else "-:--:-- left"
        return [share, f"{seen:,} of {total:,} {'file' if total == 1 else 'files'}", _rate_in_words(rate_per_s), left]

    def _state(self) -> RenderableType:
        from rich.text import Text

        progress = self._progress
        if progress.stopping:
            n = min(progress.under_way, progress.workers)  # others are claimed, and will not begin
            why = "" if progress.stopping in REASONS.values() else f" ({progress.stopping})"
            run = f"{counted(n, 'file')} still {'runs' if n == 1 else 'run'}"
            words = f"stopping{why}: {run}, Ctrl-C {'' if why else 'again '}to stop at once"
            return Text(words, "yellow", no_wrap=True, overflow="ellipsis")
        parts = [
            (f"{progress.failed} failed", "bold red" if progress.failed else ""),
            (f"{progress.dead} set aside" if progress.dead else "", "red"),
            (f"{progress.skipped:,} done before" if progress.skipped else "", ""),
            (f"{progress.retried} retried" if progress.retried else "", ""),
            (counted(progress.workers, "worker"), ""),
            (counted(progress.worker_deaths, "death") if progress.worker_deaths else "", "red"),
        ]
        line = Text(no_wrap=True, overflow="ellipsis")
        for text, style in parts:
            if text:
                line.append("   " if line else "")
                line.append(text, style)
        return line

    def _rate_per_s(self, seen: int) -> float:
        now_s = time.monotonic()
        samples = self._samples
        samples.append((now_s, seen))
        while len(samples) > 2 and now_s - samples[0][0] > RATE_OVER_S:
            samples.popleft()
        first_s, first = samples[0]
        return (seen - first) / (now_s - first_s) if now_s > first_s else 0.0


def _with_bar(facts: list[str], seen: int, total: int | None) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    line = Table.grid(padding=(0, GAP_COLUMNS, 0, 0), expand=True)
    line.add_column(min_width=BAR_COLUMNS_MIN, max_width=BAR_COLUMNS_MAX, ratio=1)
    for _ in facts:
        line.add_column(no_wrap=True)
    line.add_row(ProgressBar(total=total, completed=seen, pulse=total is None), *facts)
    return line


def _narrow(facts: list[str], columns: int) -> RenderableType:
    """As many of them, from the first on, as there is room for."""
    from rich.text import Text

    n = len(facts)
    while n > 1 and _columns_of(facts[:n]) > columns:
        n -= 1
    return Text((" " * GAP_COLUMNS).join(facts[:n]), no_wrap=True, overflow="ellipsis")


def _columns_of(facts: list[str]) -> int:
    return sum(map(len, facts)) + GAP_COLUMNS * (len(facts) - 1)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(min(seconds, 359_999)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


# ---- showing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def shown(
    progress: Progress, files: Callable[[], Iterable[object] | None], *, quiet: bool, prints: bool
) -> Generator[Callable[[Progress], None] | None]:
    """Show ``progress`` meanwhile; what is given is to be called now and then. ``prints``: results fill the terminal;
    ``files``: lists the inputs, for their number.
    """
    is_terminal = sys.stderr.isatty()
    if quiet or (prints and is_terminal and sys.stdout.isatty()):
        yield None
    elif may_redraw():
        with contextlib.ExitStack() as stack:
            if progress.total is None:
                stack.enter_context(Count(progress, files))
            stack.enter_context(_live(Screen(progress)))
            yield None
    else:
        yield _line_progress()


@contextlib.contextmanager
def _live(screen: Screen) -> Generator[None]:
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True, emoji=False)
    with Live(
        console=console,
        get_renderable=lambda: screen.draw(console.width),
        refresh_per_second=REDRAWS_PER_S,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    ):
        console.show_cursor(True)  # Ctrl-Z gives the terminal to the shell, which needs it
        yield


def _line_progress() -> Callable[[Progress], None]:
    said = time.monotonic()

    def advance(progress: Progress) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= PROGRESS_INTERVAL_S:
            said = now
            say(f"so far {in_words(progress)}")

    return advance
