"""The rows of a ledger: how a batch gets into the table, and what of others it makes untrue.

    rows --values_of--> values, and what they add to the totals
           --forget_overwritten--> rows of other inputs with their outputs go: these are not done any more
           --insert--> files       new keys: nearly all of a run
           --replace--> files      others; the old rows' share of the totals goes

To find rows of others takes an index by output: 15 us a row, besides 10, and a third of the ledger. Most have none:
within a run no two inputs have one output, and the next run over the same inputs gives each its own again. It is made
where a run takes its inputs from elsewhere, or another job writes in the same places.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

from ringpool.coordinator.ledgerqueries import (
    RowTuple,
    State,
    Tally,
    Totals,
    as_text,
    decode_made,
    encode_facts,
    take_out,
    text_of,
)

CHUNK_ROWS = 50  # one statement inserts so many: 0.7 us a row less than one for each
WITH_OUTPUTS = "outputs "  # so begins the identity of a job that has some

_COLUMNS = 6
_FILE = "(?, ?, ?, ?, ?, ?)"
_INSERT = "INSERT OR FAIL INTO files (job, input, output, state, kind, facts) VALUES "
_INSERT_ONE = _INSERT + _FILE
_INSERT_CHUNK = _INSERT + ", ".join([_FILE] * CHUNK_ROWS)
_REPLACE = _INSERT_ONE.replace("OR FAIL", "OR REPLACE")
_KEY = "WHERE job = ? AND input = ? AND output = ?"
_ADD = """
    INSERT INTO totals VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET
        n_files = n_files + excluded.n_files, n_retried = n_retried + excluded.n_retried,
        input_bytes = input_bytes + excluded.input_bytes, output_bytes = output_bytes + excluded.output_bytes,
        duration_ns = duration_ns + excluded.duration_ns
"""
_ORIGINS = "CREATE TABLE IF NOT EXISTS origins (job INTEGER PRIMARY KEY, origin BLOB NOT NULL)"
_INDEX = "files_by_output"

Value: TypeAlias = int | bytes | str | None
_DONE = int(State.DONE)
_IS_FIRST = """
    SELECT NOT EXISTS (SELECT 1 FROM runs WHERE job = ?) AND NOT EXISTS (SELECT 1 FROM files WHERE job = ?)
"""
# Of inputs that are done and have one output, as older versions left such, nobody can tell whose it is.
_SHARED = f"""
    SELECT job, input, output FROM files WHERE state = {_DONE} AND output IN (
        SELECT output FROM files WHERE output <> x'' AND state = {_DONE} GROUP BY output HAVING count(*) > 1
    )
"""
_OF_OUTPUTS = "SELECT job, input, output, state FROM files WHERE output <> x'' AND output IN ({})"


def values_of(job: int, rows: Iterable[RowTuple], totals: Totals) -> list[Value]:
    """What the table's columns have of ``rows``, one behind the other; added up in ``totals``."""
    values: list[Value] = []
    key: tuple[int, str] | None = None
    tally = Tally()
    for row in rows:
        try:
            facts = encode_facts(row[2:])
        except UnicodeEncodeError:
            row = (*row[:13], as_text(row[13]), as_text(row[14]), as_text(row[15]), *row[16:])
            facts = encode_facts(row[2:])
        state, kind = row[2], row[13]
        if key is None or kind != key[1] or state != key[0]:
            key = state, kind
            tally = totals.setdefault(key, Tally())
        tally.n_files += 1
        if row[11] > 1:
            tally.n_retried += 1
        if row[3] > 0:
            tally.input_bytes += row[3]
        if row[8]:
            for made in decode_made(row[8]):
                tally.output_bytes += made.size
        tally.duration_ns += round(row[18] * 1e9)
        values += (job, row[0], row[1], state, None if state == _DONE else kind, facts)
    return values


def insert(db: sqlite3.Connection, values: list[Value]) -> None:
    """Raises ``sqlite3.IntegrityError`` where a key is there already; some rows are in then, to be rolled back."""
    chunk = CHUNK_ROWS * _COLUMNS
    whole = len(values) - len(values) % chunk
    for begin in range(0, whole, chunk):
        db.execute(_INSERT_CHUNK, values[begin : begin + chunk])
    for begin in range(whole, len(values), _COLUMNS):
        db.execute(_INSERT_ONE, values[begin : begin + _COLUMNS])


def replace(db: sqlite3.Connection, values: list[Value], totals: Totals) -> None:
    """Put rows in the places of those with their keys, whose share of the totals goes; the last one of a key counts."""
    for begin in range(0, len(values), _COLUMNS):
        take_out_row(db, totals, values[begin : begin + 3])
        db.execute(_REPLACE, values[begin : begin + _COLUMNS])


def delete(db: sqlite3.Connection, keys: Iterable[tuple[int, bytes, bytes]]) -> None:
    """Delete the rows of ``keys`` (job, input, output), where they are there; their share of the totals goes, too."""
    totals_of: dict[int, Totals] = {}
    for key in keys:
        if take_out_row(db, totals_of.setdefault(key[0], {}), key):
            db.execute(f"DELETE FROM files {_KEY}", key)
    for job, totals in totals_of.items():
        add_to_totals(db, job, totals)


def take_out_row(db: sqlite3.Connection, totals: Totals, key: Sequence[Value]) -> bool:
    """Whether there is a row of ``key``; if so, its share is taken out of ``totals``."""
    found = db.execute(f"SELECT facts FROM files {_KEY}", key).fetchone()
    if found is not None:
        take_out(totals, found[0])
    return found is not None


def forget_overwritten(db: sqlite3.Connection, job: int, values: Sequence[Value]) -> None:
    """Delete the rows of other inputs with the outputs of those in ``values`` that are done, and are not written yet.

    What failed stays: that its output is there is another's doing. But where the number of an input is in its output,
    an input that has another number since has failed for that.
    """
    [(identity,)] = db.execute("SELECT identity FROM jobs WHERE id = ?", (job,)).fetchall() or [("",)]
    is_numbered = "{index" in text_of(identity)
    owners = {row[2]: row[1] for row in batched(values, _COLUMNS) if row[3] == _DONE and row[2]}
    overwritten: list[tuple[int, bytes, bytes]] = []
    for outputs in batched(list(owners), CHUNK_ROWS):
        for its_job, input_, output, state in db.execute(_OF_OUTPUTS.format(", ".join("?" * len(outputs))), outputs):
            is_own = its_job == job
            if not (is_own and input_ == owners[output]) and (state == _DONE or (is_own and is_numbered)):
                overwritten.append((its_job, input_, output))
    delete(db, overwritten)


def batched(values: Sequence[Value], n: int) -> Iterator[Sequence[Value]]:
    """``n`` of them at a time."""
    return (values[begin : begin + n] for begin in range(0, len(values), n))


def add_to_totals(db: sqlite3.Connection, job: int, totals: Totals) -> None:
    """Add to what the ledger has of ``job`` in all."""
    db.executemany(_ADD, [(job, state, kind, *tally.sums) for (state, kind), tally in totals.items()])


def expect_inputs(db: sqlite3.Connection, job: int, origin: bytes) -> bool:
    """A run of ``job`` begins, over inputs of that ``origin``, see ``Ledger.expect_inputs``; whether it may overwrite
    what the ledger has as another input's: then there is an index by output.
    """
    db.execute(_ORIGINS)
    known = db.execute("SELECT origin FROM origins WHERE job = ?", (job,)).fetchone()
    [(is_first,)] = db.execute(_IS_FIRST, (job, job))
    jobs = db.execute("SELECT identity FROM jobs WHERE id <> ?", (job,)).fetchall()
    is_alone = not any(text_of(identity).startswith(WITH_OUTPUTS) for (identity,) in jobs)
    needs_index = not (is_alone and (is_first or (origin and known == (origin,))))
    if needs_index and not is_indexed(db):
        db.execute("DROP INDEX IF EXISTS outputs")  # an older version's, for numbered outputs
        db.execute(f"CREATE INDEX {_INDEX} ON files (output) WHERE output <> x''")
        delete(db, db.execute(_SHARED).fetchall())
    db.execute("INSERT OR REPLACE INTO origins VALUES (?, ?)", (job, origin))
    return needs_index


def is_indexed(db: sqlite3.Connection) -> bool:
    """Whether there is an index by output."""
    return bool(db.execute("SELECT 1 FROM sqlite_schema WHERE name = ?", (_INDEX,)).fetchall())
