"""A program that runs a job: ``python -m tests.jobs.job_program SOURCE TARGET DURABILITY [FUNCTION [DIRECTORY]]``."""

from __future__ import annotations

import sys

from tests.jobs import job_functions

from ringpool import Job

if __name__ == "__main__":
    source, target, durability, *name = sys.argv[1:]
    function = getattr(job_functions, name[0] if name else "compress")
    directory = name[1] if len(name) > 1 else None
    job = Job(function, source, f"{target}/{{relpath}}.gz", directory=directory, durability=durability, attempts_max=63)
    report = job.run(2)
    print("ended", report.progress.done, report.progress.skipped, report.progress.failed, flush=True)
    sys.exit(not report.ok)
