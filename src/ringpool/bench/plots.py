"""Plots of what was measured, as SVG. matplotlib is imported here, when one is drawn, and nowhere else.

plot_scaling    speed-up over workers, beside what all cores could give; latency over workers
"""

from __future__ import annotations

import importlib.util
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ringpool.bench.scaling import BenchmarkReport, Step


def require_matplotlib() -> None:
    """Raise ``ModuleNotFoundError``, which says what to install, where there is no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError(
            "a plot needs matplotlib, which is not installed: it comes with the extra `bench`, as in "
            "pip install 'ringpool[bench]'",
            name="matplotlib",
        )


def plot_scaling(report: BenchmarkReport, target: Path) -> None:
    """Speed-up with its quartiles, and latency. Raises ``ModuleNotFoundError``, ``OSError``."""
    require_matplotlib()
    mpl: Any = import_module("matplotlib")
    figure = import_module("matplotlib.figure").Figure(figsize=(9, 3.6), layout="constrained")
    speed_up, latency = figure.subplots(1, 2)
    steps = [step for step in report.steps if step.workers and step.speed_up is not None]
    _draw_speed_up(speed_up, steps, report.machine["cores"], report.base_workers)
    _draw_latency(latency, [step for step in report.steps if step.workers], report.noun)
    figure.suptitle(report.function)
    with mpl.rc_context({"svg.hashsalt": "ringpool"}):  # the same file for the same figures
        figure.savefig(target, format="svg", metadata={"Date": None})


def _draw_speed_up(axes: Any, steps: list[Step], cores: int, base_workers: int | None) -> None:
    workers = [step.workers for step in steps]
    if workers:
        axes.plot(
            workers,
            [min(n, cores) for n in workers],
            "--",
            color="grey",
            label=f"ideal, {cores} core{'' if cores == 1 else 's'}",
        )
        medians = [step.speed_up or 0.0 for step in steps]
        quartiles = [step.speed_up_quartiles or (0.0, 0.0) for step in steps]
        below = [median - lower for median, (lower, _) in zip(medians, quartiles, strict=True)]
        above = [upper - median for median, (_, upper) in zip(medians, quartiles, strict=True)]
        axes.errorbar(workers, medians, yerr=[below, above], marker="o", capsize=3, label="measured, quartiles")
        axes.set_xticks(workers)
        axes.legend()
    axes.set_xlabel("workers")
    axes.set_ylabel("speed-up over no pool" if base_workers == 0 else "speed-up over 1 worker")
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, linewidth=0.3)


def _draw_latency(axes: Any, steps: list[Step], noun: str) -> None:
    workers = [step.workers for step in steps]
    for label, figures in (
        ("p50", [step.latency.p50_s for step in steps]),
        ("p90", [step.latency.p90_s for step in steps]),
        ("p99", [step.latency.p99_s for step in steps]),
        ("max", [step.latency.max_s for step in steps]),
    ):
        axes.plot(workers, [1000 * seconds for seconds in figures], marker="o", label=label)
    axes.set_xticks(workers)
    axes.set_yscale("log")
    axes.set_xlabel("workers")
    axes.set_ylabel(f"ms in the function, a {noun}")
    axes.legend()
    axes.grid(visible=True, linewidth=0.3)
