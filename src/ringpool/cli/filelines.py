"""What is written of one file: a JSON object, a row of CSV, or its value as text.

    key              of a file                                   where from
    path             as it was given; in ``results`` absolute
    state, ok        done, failed or dead; whether it is done    ledger
    value            what the function returned                  ledger; one that cannot be rebuilt here says so
    error            null, or its type, message and traceback    ledger
    output           the first one's path, or null               as its pattern is, absolute or not
    outputs          path, size and digest of each               ledger
    input_bytes, attempts, deaths, duration_s, started_s, worker, peak_rss_bytes

In CSV, of several outputs each has columns of its own: ``output_1``, ``output_bytes_1``, ``digest_1``, ...
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from typing import Any

from ringpool.cli.lines import as_json, as_text
from ringpool.coordinator.ledger import Made, Row, State
from ringpool.coordinator.verify import decode_made
from ringpool.errors import words_of
from ringpool.workers import values

CSV_COLUMNS = ("path", "value", "input_bytes", "attempts", "deaths", "duration_s", "started_s", "peak_rss_bytes")


class Files:
    """Writes files down. ``base`` (str): outputs are given relative to it, as their pattern is; empty: as they are."""

    def __init__(self, base: str = "") -> None:
        self._prefix = f"{base.rstrip('/')}/" if base else ""

    def as_object(self, row: Row, path: str) -> str:
        """All that is known of a file, as a JSON object."""
        made = made_of(row)
        outputs = [{"path": self._shown(one.path), "size": one.size, "digest": one.digest.hex()} for one in made]
        is_done = row.state == State.DONE
        first = row.output or None
        return as_json(
            {
                "path": path,
                "output": first and self._shown(first),
                "ok": is_done,
                "value": value_of(row),
                "error": None if is_done else {"type": row.kind, "message": row.message, "traceback": row.traceback},
                "attempts": row.attempts,
                "duration_s": row.duration_s,
                "worker": row.worker,
                "state": State(row.state).name.lower(),
                "outputs": outputs,
                "input_bytes": row.size if row.size >= 0 else None,
                "deaths": row.deaths,
                "started_s": row.started_s,
                "peak_rss_bytes": row.peak_rss,
            }
        )

    def _shown(self, output: bytes) -> str:
        return os.fsdecode(output).removeprefix(self._prefix)


def value_of(row: Row) -> object:
    """What the function returned."""
    if row.value is None:
        return None
    try:
        return values.decode(row.encoding, row.value)
    except Exception as error:  # its class is not here, or not any more
        return f"(cannot be rebuilt here: {type(error).__name__}: {words_of(error)})"


def made_of(row: Row) -> list[Made]:
    """The outputs of a file that is done."""
    return decode_made(row.made) if row.made else []


# ---- CSV -------------------------------------------------------------------------------------------------------------


def csv_header(n_outputs: int) -> str:
    """The line above all others, for files with so many outputs."""
    marks = [f"_{number}" for number in range(1, n_outputs + 1)] if n_outputs > 1 else [""] * n_outputs
    return _csv_line(
        [*CSV_COLUMNS, *(f"{name}{mark}" for mark in marks for name in ("output", "output_bytes", "digest"))]
    )


def csv_row(row: Row) -> str:
    """A file's line."""
    outputs = [cell for one in made_of(row) for cell in (os.fsdecode(one.path), one.size, one.digest.hex())]
    return _csv_line(
        [
            os.fsdecode(row.input),
            _as_cell(value_of(row)),
            row.size if row.size >= 0 else "",
            row.attempts,
            row.deaths,
            row.duration_s,
            row.started_s,
            row.peak_rss,
            *outputs,
        ]
    )


def _as_cell(value: object) -> str:
    if isinstance(value, dict | list | tuple):
        return as_json({"value": value})[len('{"value": ') : -1]
    return as_text(value)


def _csv_line(cells: Iterable[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\r\n").writerow(cells)  # what is not in it goes unquoted, before Python 3.13
    return line.getvalue().removesuffix("\r\n")
