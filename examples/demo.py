"""``make demo``: compress the standard library with ``ringpool run``, kill a worker meanwhile, check every output.

    python examples/demo.py [DIRECTORY]       outputs go there and stay; without it, into a temporary one

    ringpool run --json  --> a line for each file   after the first 100 of them: SIGKILL for a worker
                         --> its exit               every output: there? gives its input back? has its checksum?

A kill may meet a worker between two tasks, or a run that is almost over: then there is nothing to see, and the whole is
done again.
Exits with 1 if anything is not as it should be.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import select
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import psutil

EXAMPLES = Path(__file__).resolve().parent
STDLIB = Path(sysconfig.get_paths()["stdlib"]).resolve()
# All modules but those in site-packages: no other directory of the standard library begins with "si".
SOURCES = ("*.py", "[!s]*/**/*.py", "s[!i]*/**/*.py")
WORKERS = min(4, len(os.sched_getaffinity(0)))
RESULTS_BEFORE_KILL = 100
ROUNDS_MAX = 5
EXIT_TIMEOUT_S = 10.0
FAULTS_SHOWN_MAX = 20


class Run(NamedTuple):
    """One run of the command.

    ``results``: its JSON lines by path; ``killed``: the pid of the killed worker, None where none was left to kill;
    ``survivors``: pids of its processes that outlived it.
    """

    status: int
    results: dict[str, dict[str, Any]]
    killed: int | None
    survivors: list[int]
    duration_s: float

    @property
    def retried(self) -> list[str]:
        return [path for path, result in self.results.items() if result["attempts"] > 1]


# ---- run and kill ----------------------------------------------------------------------------------------------------


def run_and_kill(target: Path) -> Run:
    """Run the command with outputs below ``target``, and in the middle of it kill one of its workers."""
    words = ["ringpool", "run", "gzip_task:gzip_file", *SOURCES, "--out", f"{target}/{{relpath}}.gz"]
    words += ["--param", "level=9", "--workers", str(WORKERS), "--json"]
    print(f"$ cd {shlex.quote(str(STDLIB))}\n$ {shlex.join(words)}", flush=True)
    search_path = [
        str(EXAMPLES),
        *map(os.path.abspath, filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))),
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(search_path)}
    results: dict[str, dict[str, Any]] = {}
    pidfds: dict[int, int] = {}
    killed = None
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-m", *words], cwd=STDLIB, env=environment, stdout=subprocess.PIPE
    ) as command:
        assert command.stdout is not None
        for line in command.stdout:
            result = json.loads(line)
            results[result["path"]] = result
            if len(results) == RESULTS_BEFORE_KILL:
                relatives = psutil.Process(command.pid).children(recursive=True)
                pidfds = {process.pid: os.pidfd_open(process.pid) for process in relatives}
                killed = kill_one(relatives)
    spent_s = time.monotonic() - began
    return Run(command.returncode, results, killed, outliving(pidfds), spent_s)


def kill_one(relatives: list[psutil.Process]) -> int | None:
    """SIGKILL for the first worker among ``relatives``; its pid."""
    for process in relatives:
        try:
            name = process.name()
            if name.startswith("ringpool-w"):
                process.kill()
                print(f"! SIGKILL for {name}, process {process.pid}", flush=True)
                return process.pid
        except psutil.NoSuchProcess:  # it has come to its own end
            continue
    return None


def outliving(pidfds: dict[int, int]) -> list[int]:
    """The pids of the processes that do not end within ``EXIT_TIMEOUT_S``. A pidfd is readable when its process has."""
    deadline = time.monotonic() + EXIT_TIMEOUT_S
    survivors: list[int] = []
    for pid, pidfd in pidfds.items():
        if not select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))[0]:
            survivors.append(pid)
        os.close(pidfd)
    return survivors


# ---- check -----------------------------------------------------------------------------------------------------------


def list_modules() -> set[str]:
    """What should have been compressed, relative to the standard library; found without ringpool."""
    found: set[str] = set()
    for directory, subdirectories, names in os.walk(STDLIB, followlinks=True):
        if Path(directory) == STDLIB:
            subdirectories[:] = [name for name in subdirectories if not name.startswith("si")]
        paths = (Path(directory, name) for name in names if name.endswith(".py"))
        found.update(str(path.relative_to(STDLIB)) for path in paths if path.is_file())
    return found


def find_faults(run: Run, modules: set[str], target: Path) -> dict[str, str]:
    """What is not as it should be, and why; by path where it is a module."""
    faults = {f"process {pid}": "outlived the command" for pid in run.survivors}
    if run.status:
        faults["the command"] = f"exited with {run.status}"
    faults |= dict.fromkeys(modules - run.results.keys(), "no result was reported")
    faults |= dict.fromkeys(run.results.keys() - modules, "a result was reported for what is no input")
    for path in modules & run.results.keys():
        if fault := find_fault(STDLIB / path, target / f"{path}.gz", run.results[path]["value"]):
            faults[path] = fault
    outputs = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    expected = {f"{path}.gz" for path in modules}
    strays = {path for path in outputs - expected if ".ringpool" not in Path(path).parts}
    return faults | dict.fromkeys(strays, "nobody ordered this file")


def find_fault(source: Path, output: Path, checksum: str) -> str | None:
    """What is wrong with one output."""
    try:
        content = gzip.decompress(output.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        return f"its output is not whole: {error}"
    if content != source.read_bytes():
        return "its output does not give its content back"
    if hashlib.sha256(content).hexdigest() != checksum:
        return f"its checksum is not the reported {checksum}"
    return None


# ---- the demo --------------------------------------------------------------------------------------------------------


def demonstrate(place: Path) -> int:
    """Run until a killed worker has cost a retry; the exit status."""
    modules = list_modules()
    for round_number in range(1, ROUNDS_MAX + 1):
        target = place / f"run-{round_number}"
        shutil.rmtree(target, ignore_errors=True)
        run = run_and_kill(target)
        faults = find_faults(run, modules, target)
        if faults or run.retried:
            break
        print("the kill hit nothing this time; once more", flush=True)
    rate_per_s = len(run.results) / run.duration_s
    speed = f"{run.duration_s:.1f} s, {rate_per_s:.0f} files/s"
    print(f"files compressed   {len(run.results)}, by {WORKERS} workers in {speed}")
    print(f"worker killed      {f'process {run.killed}' if run.killed else 'none'}")
    print(f"tried again        {', '.join(run.retried) or 'nothing'}")
    print(f"outputs verified   {len(modules - faults.keys())} of {len(modules)}: content and checksum")
    for what, why in list(faults.items())[:FAULTS_SHOWN_MAX]:
        print(f"FAULT              {what}: {why}")
    if faults:
        print(f"{len(faults)} faults")
    elif not run.retried:
        print(f"in {ROUNDS_MAX} runs no kill hit a task at work: nothing was shown")
    else:
        print("A worker was killed at work. Its task was run again; nothing is lost, torn or left over.")
    return 1 if faults or not run.retried else 0


def main() -> int:
    """With outputs in the directory that the command line names, or in a temporary one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", help="made where it is missing")
    place = parser.parse_args().directory
    if place is not None:
        return demonstrate(place.absolute())
    with tempfile.TemporaryDirectory(prefix="ringpool-demo-") as place:
        return demonstrate(Path(place))


if __name__ == "__main__":
    sys.exit(main())
