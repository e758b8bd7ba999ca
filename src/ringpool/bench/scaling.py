"""What ``ringpool.benchmark`` found: how throughput grows with workers, and what a call costs.

turns of each contestant --median over the rounds--> Step    workers, files/s, latency, CPU, memory
turns of a round --ratio--> speed-up                         over the plain loop; over 1 worker where there is none
speed-up / workers = efficiency
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ringpool.bench import measure, tables
from ringpool.bench.tables import Table
from ringpool.bench.ways import Failure, Latency, Turn

PASS_S_MIN = 0.1
FEW_A_WORKER = 10  # with fewer inputs the end of a run, when some workers have nothing left, shows


class Step(NamedTuple):
    """Medians over the rounds for a number of workers, 0 for no pool; of ``latency.max_s`` and memory the largest.

    ``spread``: how far the quartiles of ``rate_per_s`` are apart, as a part of it; None for one round. ``speed_up``,
    ``efficiency``: None where there is nothing to compare with. CPU seconds are of one call.
    """

    workers: int
    rate_per_s: float
    spread: float | None
    speed_up: float | None
    speed_up_quartiles: tuple[float, float] | None
    efficiency: float | None
    latency: Latency
    start_s: float
    worker_cpu_s: float
    parent_cpu_s: float
    worker_rss_bytes: int
    parent_rss_bytes: int
    n_failed: int
    deaths: int


class BenchmarkReport(msgspec.Struct, frozen=True):
    """What came of a benchmark.

    ``function`` (str), ``way`` (str, how the pool ran it), ``noun`` (str, what an input is); ``n_inputs`` of
    ``n_listed`` inputs were used; ``rounds``, ``turn_s``; ``turns``: of each number of workers (0: no pool), one a
    round; ``others``: the part of the cores that other programs had, by round; ``machine``: where it was.

    ``print(report)`` shows it as text.
    """

    function: str
    way: str
    noun: str
    n_inputs: int
    n_listed: int
    rounds: int
    turn_s: float
    turns: dict[int, list[Turn]]
    others: list[float]
    machine: dict[str, Any]

    @property
    def steps(self) -> list[Step]:
        """Throughput, latency and costs, the plain loop first."""
        base = self._base()
        return [_step(workers, turns, base) for workers, turns in self.turns.items()]

    @property
    def base_workers(self) -> int | None:
        """What speed-ups are over: 0 for the plain loop, 1 for one worker; None where neither was measured whole."""
        return next((n for n in (0, 1) if n in self.turns and all(turn.n for turn in self.turns[n])), None)

    def _base(self) -> Sequence[Turn]:
        found = self.base_workers
        return () if found is None else self.turns[found]

    @property
    def is_job(self) -> bool:
        """Whether there were outputs."""
        return self.way.startswith("Job")

    @property
    def failures(self) -> dict[str, Failure]:
        """Calls that failed in the turns that count, by the kind of error; the first of each in words."""
        found: dict[str, Failure] = {}
        for turn in (turn for turns in self.turns.values() for turn in turns):
            for kind, failure in turn.failures.items():
                before = found.get(kind)
                found[kind] = failure if before is None else Failure(before.n + failure.n, before.first)
        return found

    @property
    def ok(self) -> bool:
        """Whether no call failed, and no process died."""
        return not self.failures and not any(turn.deaths for turns in self.turns.values() for turn in turns)

    # ---- as text

    def __str__(self) -> str:
        return "\n\n".join([measure.machine_in_words(self.machine, self.rounds), *map(str, self.as_tables())])

    def as_tables(self) -> list[Table]:
        """Three tables: how throughput scales, how long a call takes, and what it costs."""
        steps = self.steps
        one = self.noun
        used = f"{self.n_inputs:,}" if self.n_inputs == self.n_listed else f"{self.n_inputs:,} of {self.n_listed:,}"
        scaling = Table(
            f"{self.function}: {used} {one}s, by {self.way}",
            ["workers", f"{one}s/s", "spread", "speed-up", "efficiency", "first result"],
            [_scaling_row(step) for step in steps if step.rate_per_s],
            self._notes(steps),
        )
        measured = [step for step in steps if step.rate_per_s]
        latency = Table(
            f"seconds of one {one} in the function",
            ["workers", "p50", "p90", "p99", "max"],
            [[_name_of(step), *map(tables.duration, step.latency)] for step in measured],
        )
        costs = Table(
            f"what one {one} costs in CPU time, and the largest RSS",
            ["workers", "CPU, workers", "CPU, parent", "RSS, worker", "RSS, parent"],
            [_costs_row(step) for step in measured],
        )
        return [scaling, latency, costs]

    def _notes(self, steps: Sequence[Step]) -> list[str]:
        notes: list[str] = []
        if self.base_workers == 0:
            notes.append("speed-up: over a plain loop in one process without a pool, within a round")
        elif self.base_workers == 1:
            notes.append("speed-up: over 1 worker, within a round")
        if self.turns.get(0) and not all(turn.n for turn in self.turns[0]):
            notes.append("without a pool the function ended its process: it cannot be measured so")
        if self.is_job:
            notes.append("the plain loop writes its outputs in place: no ledger, no locks, no renames, no syncs")
        cores, workers_max = self.machine["cores"], max(self.turns)
        if workers_max > cores:
            notes.append(
                f"more workers than cores ({cores} that this process may use) share them: that speeds up only what "
                "waits, for a disk or a network"
            )
        if workers_max * FEW_A_WORKER > self.n_inputs:
            notes.append(
                f"{self.n_inputs} {self.noun}s are few for {_counted(workers_max)}: towards the end some have nothing "
                "to do, and efficiency is lower than in a long run"
            )
        pass_s = min(
            turn.seconds * self.n_inputs / max(turn.n, 1) for n, turns in self.turns.items() if n for turn in turns
        )
        if pass_s < PASS_S_MIN:
            notes.append(
                f"once through the inputs takes only {tables.duration(pass_s)}, of which much is its beginning and its "
                "end: give more inputs"
            )
        others = statistics.median(self.others)
        if others > measure.OTHERS_MAX:
            notes.append(f"other programs had {others:.0%} of the cores: measure again, on a quieter machine")
        notes.extend(
            f"with {_counted(step.workers)}, workers died {step.deaths:,} times, and were replaced"
            for step in steps
            if step.workers and step.deaths
        )
        if self.failures:
            n = sum(turn.n for turns in self.turns.values() for turn in turns)
            notes.append(
                f"FAILED: {sum(failure.n for failure in self.failures.values()):,} of {n:,} calls in all turns"
            )
            notes.extend(f"  {failure.in_words()}" for failure in self.failures.values())
        return notes

    # ---- kept

    def as_dict(self) -> dict[str, Any]:
        """All figures, those of each turn too, as JSON has them."""
        document = msgspec.to_builtins(self)
        steps = [{**step._asdict(), "latency": step.latency._asdict()} for step in self.steps]
        turns = {workers: [_turn_as_dict(turn) for turn in turns] for workers, turns in self.turns.items()}
        return {**document, "base_workers": self.base_workers, "steps": steps, "turns": turns}

    def write_json(self, file: str | os.PathLike[str]) -> None:
        """Write ``as_dict`` to ``file``. Raises ``OSError``."""
        Path(file).write_text(json.dumps(self.as_dict(), indent=1) + "\n")

    def plot(self, file: str | os.PathLike[str]) -> None:
        """Draw speed-up and latency over workers to ``file``, as SVG. Raises ``ModuleNotFoundError`` without
        matplotlib, ``OSError``.
        """
        from ringpool.bench import plots

        plots.plot_scaling(self, Path(file))


def _turn_as_dict(turn: Turn) -> dict[str, Any]:
    failures = {kind: failure._asdict() for kind, failure in turn.failures.items()}
    return {
        **turn._asdict(),
        "failures": failures,
        "latency": turn.latency._asdict(),
        "spent": turn.spent._asdict(),
    }


def _step(workers: int, turns: Sequence[Turn], base: Sequence[Turn]) -> Step:
    def median(figure: Callable[[Turn], float]) -> float:
        return statistics.median(map(figure, turns))

    rates = measure.spread([turn.rate_per_s for turn in turns])
    speed_up = None
    if base and all(turn.n for turn in turns):
        ratios = [turn.rate_per_s / other.rate_per_s for turn, other in zip(turns, base, strict=True)]
        speed_up = measure.spread(ratios)
    return Step(
        workers,
        rates.median,
        rates.relative if len(turns) > 1 and rates.median else None,
        speed_up and speed_up.median,
        speed_up and (speed_up.lower, speed_up.upper),
        speed_up.median / workers if speed_up and workers else None,
        Latency(
            median(lambda turn: turn.latency.p50_s),
            median(lambda turn: turn.latency.p90_s),
            median(lambda turn: turn.latency.p99_s),
            max(turn.latency.max_s for turn in turns),
        ),
        median(lambda turn: turn.start_s),
        median(lambda turn: turn.spent.worker_cpu_s / max(turn.n, 1)),
        median(lambda turn: turn.spent.parent_cpu_s / max(turn.n, 1)),
        max(turn.spent.worker_rss_bytes for turn in turns),
        max(turn.spent.parent_rss_bytes for turn in turns),
        sum(turn.n_failed for turn in turns),
        sum(turn.deaths for turn in turns),
    )


def _scaling_row(step: Step) -> list[str]:
    return [
        _name_of(step),
        tables.rate(step.rate_per_s),
        "-" if step.spread is None else tables.percent(step.spread),
        "-" if step.speed_up is None else tables.factor(step.speed_up),
        "-" if step.efficiency is None else tables.percent(step.efficiency),
        tables.duration(step.start_s) if step.workers else "-",
    ]


def _costs_row(step: Step) -> list[str]:
    has_parent = step.workers > 0
    return [
        _name_of(step),
        tables.duration(step.worker_cpu_s),
        tables.duration(step.parent_cpu_s) if has_parent else "-",
        tables.mib(step.worker_rss_bytes),
        tables.mib(step.parent_rss_bytes) if has_parent else "-",
    ]


def _counted(workers: int) -> str:
    return "1 worker" if workers == 1 else f"{workers} workers"


def _name_of(step: Step) -> str:
    return str(step.workers) if step.workers else "no pool"
