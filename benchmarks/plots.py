"""Plots of what was measured, as SVG: ``python -m benchmarks.plots KIND SOURCE PLOT.svg [MODEL.json]``.

    kind      source                                                       shows
    memory    FILE.csv of python -m benchmarks.bench_jobs memory N         RSS of a job's parent over time
    scaling   FILE.json of python -m benchmarks scale-workers --json       throughput over workers; with MODEL.json, of
              ... and of python -m benchmarks.model --json                 benchmarks.model, what that predicts
    ratios    FILE.json of python -m benchmarks --json, whatever cases     ours against each peer, by case
    faults    FILE.json of python -m benchmarks faults-deaths --json       what became of the tasks, by contestant

The same figures give the same file. Series differ by their markers and hatches too, for those who print in grey.
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "ringpool"  # the same file for the same figures
mpl.rcParams["font.size"] = 9

from matplotlib import pyplot  # noqa: E402

STYLES = {  # colours that those tell apart, too, who do not see red and green
    "run_file_tasks": ("#0072b2", "o", "-"),
    "RingPoolExecutor.map": ("#009e73", "s", "-"),
    "ProcessPoolExecutor.map": ("#d55e00", "^", "-"),
    "split, no pool": ("#555555", "x", "-"),
}
MODELLED = ("run_file_tasks", "RingPoolExecutor.map")
PEERS = ("ProcessPoolExecutor", "Pool.", "joblib", "mpire", "pebble", "loky", "dask")
OURS = ("RingPoolExecutor", "Coordinator", "run_file_tasks")
BETTER, WORSE, NEUTRAL = "#0072b2", "#d55e00", "#bbbbbb"
FATES = {"results": ("#0072b2", ""), "errors": ("#e6c35c", "///"), "lost": ("#d55e00", "xxx")}
FAULT_TASKS = 1_000


def _save(figure: Any, target: Path) -> None:
    figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)
    pyplot.close(figure)


def _cases(source: Path) -> list[dict[str, Any]]:
    return json.loads(source.read_text())["cases"]


def _machine(source: Path) -> str:
    machine = json.loads(source.read_text())["machine"]
    return f"{machine['processor']}, {machine['cores']} cores; {machine['python']}; {machine['began'][:10]}"


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
    _save(figure, target)


# ---- throughput over workers


def plot_scaling(source: Path, target: Path, model: Path | None = None) -> None:
    """A panel for each size of tasks: measured, with quartiles; predicted; and the split if it scaled for ever."""
    cases = [case for case in _cases(source) if case["title"].startswith("scale-workers, ")]
    predictions = json.loads(model.read_text())["predictions"] if model is not None else []
    figure, panels = pyplot.subplots(1, len(cases), figsize=(3.1 * len(cases), 4.2), squeeze=False)
    for axes, case in zip(panels[0], cases, strict=True):
        task = case["title"].removeprefix("scale-workers, ").partition(" of CPU")[0]
        _plot_predictions(axes, [each for each in predictions if each["task"] == task])
        _plot_measured(axes, case["series"])
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({int(n) for line in axes.get_lines() for n in line.get_xdata()})
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.set_title(f"{task} of CPU a task", fontsize=9)
        axes.set_xlabel("workers")
        axes.grid(visible=True, linewidth=0.3)
    panels[0][0].set_ylabel("tasks a second")
    lines = {line.get_label(): line for axes in panels[0] for line in axes.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="lower center", ncols=4, frameon=False)
    figure.suptitle(f"Throughput over workers: measured, and as the model has it\n{_machine(source)}", fontsize=10)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    _save(figure, target)


def _plot_measured(axes: Any, series: dict[str, list[float]]) -> None:
    for name, (colour, marker, style) in STYLES.items():
        found = sorted(
            (int(label.rpartition(", ")[2].split()[0]), figures)
            for label, figures in series.items()
            if label.rpartition(", ")[0] == name
        )
        counts, medians = [n for n, _ in found], [statistics.median(figures) for _, figures in found]
        axes.plot(
            counts, medians, color=colour, marker=marker, linestyle=style, linewidth=1.2, markersize=5, label=name
        )


def _plot_predictions(axes: Any, predictions: Sequence[dict[str, Any]]) -> None:
    if not predictions:
        return
    counts = sorted({each["workers"] for each in predictions})
    ideal = [n / predictions[0]["task_s"] for n in counts]
    axes.plot(counts, ideal, color="#555555", linestyle=":", linewidth=1, label="nothing but the tasks")
    for name, dashes in zip(MODELLED, ((5, 2), (2, 1)), strict=True):
        rates = [
            each["rate_per_s"] for n in counts for each in predictions if (each["way"], each["workers"]) == (name, n)
        ]
        axes.plot(counts, rates, color=STYLES[name][0], dashes=dashes, linewidth=1.2, label=f"{name}, model")


# ---- ratios


def _ratios(source: Path) -> Iterator[tuple[str, str, float]]:
    """Case, label, and how many times as good ours is; of claims that compare ours with somebody else's."""
    for case in _cases(source):
        short = case["title"].partition(":")[0]
        more_is_better = case["unit"].endswith("/s")
        for claim in case["claims"]:
            ours, baseline, figure = claim["ours"], claim["baseline"], claim["figure"]
            if baseline is None or ours.startswith(PEERS) or baseline.startswith(OURS) or "slots" in baseline:
                continue
            yield short, f"{ours} / {baseline}", figure if more_is_better else 1 / figure


def plot_ratios(source: Path, target: Path) -> None:
    """A bar for each claim against a peer: how many times as good, whichever way its unit counts."""
    bars = [*_ratios(source)]
    figure, axes = pyplot.subplots(figsize=(10, 1.3 + 0.2 * (len(bars) + len({case for case, _, _ in bars}))))
    place, places, labels, former = 0.0, list[float](), list[str](), ""
    for case, label, times in bars:
        if case != former:
            place += 1
            axes.text(
                0, place - 0.05, case, transform=axes.get_yaxis_transform(), fontsize=8, weight="bold", va="center"
            )
            former = case
        place += 1
        better = times >= 1
        axes.barh(
            place,
            times - 1,
            left=1,
            height=0.75,
            color=BETTER if better else WORSE,
            hatch="" if better else "///",
            edgecolor="white",
            linewidth=0,
        )
        axes.annotate(
            f"{times:.3g}x",
            (times, place),
            xytext=(3 if better else -3, 0),
            textcoords="offset points",
            ha="left" if better else "right",
            va="center",
            fontsize=7,
        )
        places.append(place)
        labels.append(label)
    axes.set_xscale("log")
    axes.set_yticks(places, labels, fontsize=7)
    axes.set_ylim(place + 0.8, 0.2)
    axes.margins(x=0.12)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.xaxis.set_major_formatter(lambda times, _: f"{times:g}x")
    axes.set_xlabel("times as good, median of the ratios\nhatched: ringpool is slower     plain: ringpool is faster")
    axes.set_title(f"ringpool beside what people use\n{_machine(source)}", fontsize=10)
    axes.grid(visible=True, axis="x", linewidth=0.3)
    figure.tight_layout()
    _save(figure, target)


# ---- deaths


def plot_faults(source: Path, target: Path) -> None:
    """A bar for each contestant: of its tasks, those with their result, those with an error, and those lost."""
    cases = {case["title"].partition(":")[0]: case["series"] for case in _cases(source)}
    kinds = [title.rpartition(", ")[2] for title in cases if title.startswith("faults, results, ")]
    figure, panels = pyplot.subplots(len(kinds), 1, figsize=(9, 0.9 + 3.2 * len(kinds)), squeeze=False)
    for axes, kind in zip(panels[:, 0], kinds, strict=True):
        results, lost = cases[f"faults, results, {kind}"], cases[f"faults, lost, {kind}"]
        seconds = cases[f"faults, until the end or the watchdog, {kind}"]
        names = [*results]
        for place, name in enumerate(names):
            done, gone = results[name][0], lost[name][0]
            left = 0.0
            for fate, n in (("results", done), ("errors", FAULT_TASKS - done - gone), ("lost", gone)):
                colour, hatch = FATES[fate]
                axes.barh(place, n, left=left, color=colour, hatch=hatch, edgecolor="white", linewidth=0, label=fate)
                left += n
            counts = f"{done:.0f} / {FAULT_TASKS - done - gone:.0f} / {gone:.0f}   {seconds[name][0]:.1f} s"
            axes.text(FAULT_TASKS * 1.01, place, counts, va="center", fontsize=8)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlim(0, FAULT_TASKS)
        axes.set_title(f"10 of the tasks are {kind}", fontsize=9)
        axes.text(FAULT_TASKS * 1.01, -0.9, "results / errors / lost   time", fontsize=8, va="center")
    panels[-1, 0].set_xlabel(f"tasks, of {FAULT_TASKS:,}")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    legend = dict(zip(labels, handles, strict=True))
    figure.legend(legend.values(), legend.keys(), loc="lower right", ncols=3, frameon=False)
    figure.suptitle(f"What becomes of 1,000 tasks when 10 kill their worker\n{_machine(source)}", fontsize=10)
    figure.tight_layout()
    _save(figure, target)


PLOTS: dict[str, Callable[..., None]] = {
    "memory": plot_memory,
    "scaling": plot_scaling,
    "ratios": plot_ratios,
    "faults": plot_faults,
}


def main(arguments: Sequence[str]) -> None:
    """Which plot, of what, and where to."""
    kind, *files = arguments
    PLOTS[kind](*map(Path, files))


if __name__ == "__main__":
    main(sys.argv[1:])
