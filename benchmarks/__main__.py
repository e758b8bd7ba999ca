"""``python -m benchmarks [CASE ...]``: all that is measured, beside what people use today.

bench_dispatch   ring files trip memory real end   what it costs to hand out tasks
bench_atomic     write batch                       what a whole file costs, and a durable one
bench_locks      locks                             pairs, fairness, deaths
bench_status     status                            the status table
bench_pools      pools: pools-submit pools-map     RingPoolExecutor beside the pools that people use
                 pools-trip pools-files pools-cpu
                 pools-memory pools-start
bench_jobs       jobs: jobs-files jobs-disk         batch jobs, their ledger included
                 jobs-durable jobs-short jobs-long
                 jobs-resume jobs-memory
bench_guide      guide: guide-write guide-read      concurrent file operations as the guide to them has
                 guide-atomic guide-transaction     them, and the guide's own figures
                 guide-locks guide-memory
                 guide-queue guide-status
bench_claims     claims: claim-batching claim-mmap  four claims of that guide: true, false, or depends
                 claim-aiofiles claim-locks
bench_scale      scale: scale-workers scale-tasks   throughput over workers, tasks, slots and claims
                 scale-ring
bench_faults     faults: faults-deaths heavy-tail   deaths, long tasks among short ones, large arrays
                 arrays
bench_costs      costs: cost-cpu cost-locks         the CPU that a pool adds to a task, and file work under locks
``ringpool.bench.measure`` has the turns, ratios and verdicts, the machine, and the raw figures as JSON.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks import (
    bench_atomic,
    bench_claims,
    bench_costs,
    bench_dispatch,
    bench_faults,
    bench_guide,
    bench_jobs,
    bench_locks,
    bench_pools,
    bench_scale,
    bench_status,
)

from ringpool.bench import measure
from ringpool.bench.measure import Case

CASES: dict[str, Callable[[bool], Iterator[Case]]] = {
    **bench_dispatch.CASES,
    **bench_atomic.CASES,
    **bench_locks.CASES,
    **bench_status.CASES,
    **bench_pools.CASES,
    **bench_jobs.CASES,
    **bench_guide.CASES,
    **bench_claims.CASES,
    **bench_scale.CASES,
    **bench_faults.CASES,
    **bench_costs.CASES,
}
GROUPS = {
    "pools": tuple(bench_pools.CASES),
    "jobs": tuple(bench_jobs.CASES),
    "guide": tuple(bench_guide.CASES),
    "claims": tuple(bench_claims.CASES),
    "scale": tuple(bench_scale.CASES),
    "faults": tuple(bench_faults.CASES),
    "costs": tuple(bench_costs.CASES),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: measure, print, and keep. Returns 0, whatever the verdicts are: they are for people."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help=f"of {', '.join([*CASES, *GROUPS])}; all where none is named"
    )
    parser.add_argument("--quick", action="store_true", help=f"{measure.QUICK_ROUNDS} rounds of less work")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the raw figures there")
    chosen = parser.parse_args(arguments)
    names = [name for chosen_name in chosen.cases for name in GROUPS.get(chosen_name, (chosen_name,))] or [*CASES]
    unknown = [name for name in names if name not in CASES]
    if unknown:
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join([*CASES, *GROUPS])}")
    machine = measure.describe_machine("ringpool")
    measure.print_machine(machine, measure.QUICK_ROUNDS if chosen.quick else measure.ROUNDS)
    cases: list[Case] = []
    for case in itertools.chain.from_iterable(CASES[name](chosen.quick) for name in names):
        if measure.source_digest("ringpool") != machine["source"]:
            print("\nThe source has changed since the start: what follows is void. Measure again, on a copy.")
            case = case._replace(is_stale=True)
        measure.report(case)
        cases.append(case)
        gc.collect()
    measure.summarise(cases)
    if chosen.json is not None:
        measure.write_json(chosen.json, machine, cases)
    return 0


if __name__ == "__main__":
    sys.exit(main())
