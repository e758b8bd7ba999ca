"""How every benchmark here measures: the contestants take turns, and are compared within a round.

    round       1        2        3     ...
    baseline    a1       a2       a3        a peer, or no pool at all; its quartiles say how quiet the machine was
    ours        b1       b2       b3
    ratio       b1/a1    b2/a2    b3/a3     a machine that slows down for a while slows both; the median counts

    verdict     when
    void        the baseline's quartiles are further apart than 20 % of its median, or others had more than a tenth of
                the cores meanwhile: again, on a quieter machine
    met         the median ratio keeps the bar
    missed      it does not

Quartiles alone do not show a neighbour that is always there. It falsifies more than it slows: a pool that balances its
load and has more threads gets a larger share of what is left than its baseline does.

Figures hold for one state of the source. Its digest is printed and kept; where it is another at the end, somebody has
edited what was being measured, and every verdict from there on is void.

A round before the first warms up and is not counted. Garbage is collected before each turn, and collection is left on
during it, as in any program.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import platform
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import psutil

ROUNDS = 9
QUICK_ROUNDS = 3
SPREAD_MAX = 0.2  # of the baseline's quartiles, over its median; beyond it a verdict would be a coin's

OTHERS_MAX = 0.1  # of this process's cores, that others may have had in the median round
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_BUSY_FIELDS = (1, 2, 3, 6, 7, 8)  # of /proc/stat: user, nice, system, irq, softirq, steal

Figure = TypeVar("Figure")
Item = TypeVar("Item")


class Spread(NamedTuple):
    """Quartiles of a series of figures."""

    lower: float
    median: float
    upper: float

    @property
    def relative(self) -> float:
        """How far the quartiles are apart, as a part of the median."""
        return (self.upper - self.lower) / self.median if self.median else math.inf


class Bar(NamedTuple):
    """What a figure has to keep: at least ``limit``, or at most."""

    limit: float
    at_least: bool

    def is_kept(self, figure: float) -> bool:
        """Whether ``figure`` is on the right side."""
        return figure >= self.limit if self.at_least else figure <= self.limit


class Claim(NamedTuple):
    """What a case is to show of the series ``ours``.

    With a ``baseline``, ``bar`` is for the median of the ratios; without one, for the worst figure of all rounds. A
    claim without a bar is only reported.
    """

    ours: str
    baseline: str | None
    bar: Bar | None = None


class Outcome(NamedTuple):
    """What became of a claim. ``verdict``: met, missed, void, or empty where there is no bar."""

    claim: Claim
    figure: float
    verdict: str


class Turns(NamedTuple, Generic[Figure]):
    """``series``: a figure for each round, by contestant. ``others``: the part of the cores that others had in it."""

    series: dict[str, list[Figure]]
    others: list[float]


class Cpu(NamedTuple):
    """CPU seconds spent so far: by this process, and by its descendants, living or ended."""

    own_s: float
    descendants_s: float


class Case(NamedTuple):
    """What was measured, as in ``Turns``, in ``unit``; and what it is to show."""

    title: str
    unit: str
    series: Mapping[str, Sequence[float]]
    claims: Sequence[Claim]
    others: Sequence[float] = ()
    is_stale: bool = False  # the source changed while it was measured


def at_least(limit: float) -> Bar:
    """A bar that a figure must reach."""
    return Bar(limit, at_least=True)


def at_most(limit: float) -> Bar:
    """A bar that a figure must not pass."""
    return Bar(limit, at_least=False)


def take_turns(
    contestants: Mapping[str, Callable[[], Figure]], rounds: int, on_turn: Callable[[int, str], object] | None = None
) -> Turns[Figure]:
    """Let each contestant run once a round, in their order. One more round, before the first, warms up.

    ``on_turn`` is told the round (0: the one that warms up) and the contestant before each turn.
    """
    series: dict[str, list[Figure]] = {name: [] for name in contestants}
    others: list[float] = []
    for number in range(rounds + 1):
        began_s, began_busy_s = time.perf_counter(), _others_s()
        for name, run in contestants.items():
            if on_turn is not None:
                on_turn(number, name)
            _collect_garbage()
            figure = run()
            if number:
                series[name].append(figure)
        if number:
            available_s = (time.perf_counter() - began_s) * len(os.sched_getaffinity(0))
            others.append(max(0.0, _others_s() - began_busy_s) / available_s)
    return Turns(series, others)


def _collect_garbage() -> None:
    """With no signal handler in it: in a weakref's callback, say, nobody would hear of what one raises."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        gc.collect()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _others_s() -> float:
    """CPU seconds that this process's cores have spent, on anything but itself and its descendants, living or ended."""
    cores = {f"cpu{core}" for core in os.sched_getaffinity(0)}
    busy_ticks = 0
    for line in Path("/proc/stat").read_text().splitlines():
        fields = line.split()
        if fields[0] in cores:
            busy_ticks += sum(int(fields[at]) for at in _BUSY_FIELDS)
    return busy_ticks / _TICKS_PER_S - sum(cpu_s())


def cpu_s() -> Cpu:
    """What this process and its descendants have spent. Exact to a hundredth of a second."""
    me = psutil.Process()
    times = me.cpu_times()
    descendants_s = times.children_user + times.children_system
    for process in me.children(recursive=True):
        try:
            spent = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        descendants_s += spent.user + spent.system + spent.children_user + spent.children_system
    return Cpu(times.user + times.system, descendants_s)


def rate_per_s(run: Callable[[Sequence[Item]], object], items: Sequence[Item]) -> Callable[[], float]:
    """A contestant that gives ``items`` to ``run``; its figure is how many a second it does."""

    def turn() -> float:
        began_s = time.perf_counter()
        run(items)
        return len(items) / (time.perf_counter() - began_s)

    return turn


def spread(figures: Sequence[float]) -> Spread:
    """The quartiles of ``figures``, both ends included."""
    if len(figures) < 2:
        return Spread(figures[0], figures[0], figures[0])
    return Spread(*statistics.quantiles(figures, n=4, method="inclusive"))


def judge(case: Case, claim: Claim) -> Outcome:
    """The figure and the verdict of one claim."""
    ours = case.series[claim.ours]
    if claim.baseline is None:
        worst = min if claim.bar is not None and claim.bar.at_least else max
        figure, is_void = worst(ours), False
    else:
        baseline = case.series[claim.baseline]
        figure = statistics.median(b / a for a, b in zip(baseline, ours, strict=True))
        is_void = spread(baseline).relative > SPREAD_MAX or _others(case) > OTHERS_MAX
    is_void = is_void or case.is_stale
    if claim.bar is None:
        return Outcome(claim, figure, "")
    return Outcome(claim, figure, "void" if is_void else "met" if claim.bar.is_kept(figure) else "missed")


def _others(case: Case) -> float:
    return statistics.median(case.others) if case.others else 0.0


# ---- what is printed and kept


def report(case: Case) -> list[Outcome]:
    """Print a case as a table; the outcomes of its claims."""
    print(f"\n{case.title}")
    print(f"    {'':40} {'median ' + case.unit:>20}   {'quartiles':^23}   spread")
    for name, figures in case.series.items():
        quartiles = spread(figures)
        between = f"{_digits(quartiles.lower):>10} .. {_digits(quartiles.upper):<9}"
        print(f"    {name:40} {_digits(quartiles.median):>20}   {between}   {quartiles.relative:6.1%}")
    if case.others:
        print(f"    others had {_others(case):.0%} of the cores meanwhile")
    outcomes = [judge(case, claim) for claim in case.claims]
    for outcome in outcomes:
        print(f"    {_sentence(case, outcome)}")
    sys.stdout.flush()
    return outcomes


def _sentence(case: Case, outcome: Outcome) -> str:
    claim, figure, verdict = outcome
    unit = "x" if claim.baseline is not None else f" {case.unit}"
    against = f" / {claim.baseline}" if claim.baseline is not None else ""
    text = f"{claim.ours}{against}: {figure:.3g}{unit}"
    if claim.bar is None:
        return text
    word = "at least" if claim.bar.at_least else "at most"
    return f"{text}; bar: {word} {claim.bar.limit:g}{unit}: {verdict.upper()}"


def _digits(figure: float) -> str:
    return f"{figure:,.0f}" if figure >= 999.5 else f"{figure:.3g}"


def summarise(cases: Sequence[Case]) -> None:
    """Print every bar with its figure and its verdict, once more and together."""
    print("\nbars")
    for case in cases:
        for outcome in (judge(case, claim) for claim in case.claims if claim.bar is not None):
            print(f"  {outcome.verdict:7}{case.title.partition(':')[0]:38}{_sentence(case, outcome)}")


def source_digest(package: str) -> str:
    """A digest of all Python files below the directory of the imported ``package``."""
    directory = Path(str(sys.modules[package].__file__)).parent
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(directory.rglob("*.py")):
        digest.update(os.fsencode(file.relative_to(directory)) + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def describe_machine(package: str) -> dict[str, Any]:
    """What the figures hold for: processor, cores that this process may use, kernel, Python, load before the start, and
    the digest of ``package``.
    """
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "processor": model or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20,
        "kernel": platform.release(),
        "libc": " ".join(platform.libc_ver()),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "load_1_minute": os.getloadavg()[0],
        "source": source_digest(package),
        "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def machine_in_words(machine: Mapping[str, Any], rounds: int) -> str:
    """The machine's description, and a warning where others seem to be at work on it."""
    in_words = "1 round" if rounds == 1 else f"{rounds} rounds"
    lines = [
        "{processor}, {counted}, {memory_mib:,} MiB; Linux {kernel}, {libc}, {python}".format_map(
            {**machine, "counted": "1 core" if machine["cores"] == 1 else f"{machine['cores']} cores"}
        ),
        f"source {machine['source']}; {in_words}; load before the start: {machine['load_1_minute']:.2f}",
    ]
    if machine["load_1_minute"] > machine["cores"] / 4:
        lines.append("Others are at work on this machine: figures are noisy, and those of two workers are too low.")
    return "\n".join(lines)


def print_machine(machine: Mapping[str, Any], rounds: int) -> None:
    """Print what ``machine_in_words`` says."""
    print(machine_in_words(machine, rounds))


def write_json(file: Path, machine: Mapping[str, Any], cases: Sequence[Case]) -> None:
    """Write all raw figures, and what was made of them, to ``file``. Raises ``OSError``."""
    document = {
        "machine": machine,
        "cases": [
            {
                "title": case.title,
                "unit": case.unit,
                "series": {name: list(figures) for name, figures in case.series.items()},
                "others": list(case.others),
                "is_stale": case.is_stale,
                "claims": [
                    {
                        "ours": claim.ours,
                        "baseline": claim.baseline,
                        "bar": None if claim.bar is None else claim.bar._asdict(),
                        "figure": outcome.figure,
                        "verdict": outcome.verdict,
                    }
                    for claim, outcome in ((claim, judge(case, claim)) for claim in case.claims)
                ],
            }
            for case in cases
        ],
    }
    file.write_text(json.dumps(document, indent=1) + "\n")
