"""``make demo``: compress the standard library with ``ringpool run``, kill a worker meanwhile, check every output.

    python examples/demo.py [DIRECTORY]       outputs go there and stay; without it, into a temporary one

    ringpool run --json  --> a line for each file   after the first 100 of them: SIGKILL for a worker
                         --> its exit               every output: there? gives its input back? has its checksum?

A kill may meet a worker between two tasks, or a run that is almost over: then there is nothing to see, and the whole is
done again.
Exits with 1 if anything is not as it should be.
"""

from __future__ import annotations

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
    module_path = os.pathsep.join(filter(None, [str(EXAMPLES), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": module_path}
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


def find_faults(run: Run, target: Path) -> list[str]:
    """Everything about ``run`` and its outputs that is not as it should be."""
    modules = list_modules()
    faults = [f"the command exited with {run.status}"] if run.status else []
    faults += [f"process {pid} outlived the command" for pid in run.survivors]
    faults += [f"{path}: no result was reported" for path in modules - run.results.keys()]
    faults += [f"{path}: a result was reported for what is no input" for path in run.results.keys() - modules]
    for path in modules & run.results.keys():
        try:
            content = gzip.decompress((target / f"{path}.gz").read_bytes())
        except (OSError, EOFError, ValueError) as error:
            faults.append(f"{path}: its output is not whole: {error}")
            continue
        if content != (STDLIB / path).read_bytes():
            faults.append(f"{path}: its output does not give its content back")
        if hashlib.sha256(content).hexdigest() != run.results[path]["value"]:
            faults.append(f"{path}: its checksum is not the one reported")
    outputs = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    strays = {path for path in outputs if ".ringpool" not in Path(path).parts} - {f"{path}.gz" for path in modules}
    return faults + [f"{target / path}: nobody ordered that file" for path in strays]


# ---- the demo --------------------------------------------------------------------------------------------------------


def demonstrate(place: Path) -> int:
    """Run until a killed worker has cost a retry; the exit status."""
    for round_number in range(1, ROUNDS_MAX + 1):
        target = place / f"run-{round_number}"
        shutil.rmtree(target, ignore_errors=True)
        run = run_and_kill(target)
        faults = find_faults(run, target)
        if faults or run.retried:
            break
        print("the kill hit nothing this time; once more", flush=True)
    n = len(run.results)
    print(f"{n} files compressed in {run.duration_s:.1f} s by {WORKERS} workers: {n / run.duration_s:.0f} files/s")
    print(f"worker killed: {run.killed}; tried again: {', '.join(run.retried) or 'nothing'}")
    for fault in faults[:20]:
        print(f"FAULT: {fault}")
    wrong = {fault.partition(":")[0] for fault in faults}
    print(f"outputs that give back their inputs and have the checksums reported: {n - len(wrong)} of {n}")
    if faults:
        print(f"{len(faults)} faults")
        return 1
    if not run.retried:
        print(f"in {ROUNDS_MAX} runs no kill hit a task that ran: nothing was shown")
        return 1
    print("one worker was killed, one task was run again, nothing was lost and nothing is left over")
    return 0


def main() -> int:
    """With outputs in the directory that the command line names, or in a temporary one."""
    if len(sys.argv) > 1:
        return demonstrate(Path(sys.argv[1]).absolute())
    with tempfile.TemporaryDirectory(prefix="ringpool-demo-") as place:
        return demonstrate(Path(place))


if __name__ == "__main__":
    sys.exit(main())
