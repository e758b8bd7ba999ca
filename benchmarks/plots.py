"""Plots of what was measured, as SVG: ``python -m benchmarks.plots memory FILE.csv PLOT.svg``.

memory    seconds and RSS of a job's parent, from ``python -m benchmarks.bench_jobs memory N FILE.csv``
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "ringpool"  # the same file for the same figures

from matplotlib import pyplot  # noqa: E402


def plot_memory(source: Path, target: Path) -> None:
    """RSS over time."""
    with source.open(newline="") as table:
        rows = [(float(seconds), float(mib)) for seconds, mib in list(csv.reader(table))[1:]]
    figure, axes = pyplot.subplots(figsize=(7, 3))
    axes.plot([seconds for seconds, _ in rows], [mib for _, mib in rows], linewidth=1)
    axes.set_xlabel("seconds since the start of the job")
    axes.set_ylabel("RSS of the parent, MiB")
    axes.set_ylim(bottom=0)
    axes.grid(visible=True, linewidth=0.3)
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})


def main(arguments: Sequence[str]) -> None:
    """Which plot, of what, and where to."""
    kind, source, target = arguments
    {"memory": plot_memory}[kind](Path(source), Path(target))


if __name__ == "__main__":
    main(sys.argv[1:])
