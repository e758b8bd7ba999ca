"""``python -m benchmarks``: all that is measured. So far: what it costs to hand out tasks, see ``bench_dispatch``."""

from __future__ import annotations

import sys

from benchmarks import bench_dispatch

if __name__ == "__main__":
    sys.exit(bench_dispatch.main())
